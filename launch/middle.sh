#!/usr/bin/env bash
# The middle rung: a language model of five million parameters on two cores. Its base model is made here, in an hour.
# Then launch/ladder.sh measures it, warm-starts it, measures it, trains it by GRPO, and measures it again. The
# problems are always the same.
#   bash launch/middle.sh [hydra overrides of verl_recipes.train]
#   NAME=middle, TRACES, WARM, EVAL, DRY_RUN=1    as of launch/ladder.sh
# The same command again continues where it was ended. Only the base starts anew if it was ended in the middle; delete
# models/middle to make another. docs/results.md shows what came of it.
export STACK=cpu
. "$(dirname "$0")/common.sh"

export HF_HUB_OFFLINE=1 # nothing is fetched after the installation
problems="preset=3to4 preset.rows=60000 preset.test_size=256"
direct="styles.first_try=1 styles.search=0 styles.search_with_backtracking=0"
traces="styles.first_try=0.5 styles.search=0 styles.search_with_backtracking=0.5"
warm="steps=60 lr=5e-4"
# It saves a third of an update. hardware=cpu, which is composed after the recipe, says fp32.
bf16=actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16
read -ra of_data <<< "$problems"
read -ra of_direct <<< "$direct"

# What the ladder refuses is refused now, and not after an hour.
NAME=${NAME:-middle} DRY_RUN=1 bash launch/ladder.sh middle hardware=cpu "$@" > /dev/null
if [ ! -e models/middle/config.json ]; then
    step python -m data_prep "out=data/middle" "${of_data[@]}"
    step python -m data_prep.traces data=data/middle out=data/middle-direct "${of_direct[@]}"
    step python -m verl_recipes.middle_base
fi
export NAME=${NAME:-middle} DATA=$problems TRACES="$traces ${TRACES:-}" WARM="$warm ${WARM:-}"
exec bash launch/ladder.sh middle hardware=cpu recipe=middle "$bf16" "$@"
