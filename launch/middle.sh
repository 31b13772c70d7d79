#!/usr/bin/env bash
# The middle rung: a language model of five million parameters on two cores. Its base model is made here, in 45 minutes.
# Then launch/ladder.sh measures it, teaches it to search, measures it, trains it by GRPO, and measures it again.
#   bash launch/middle.sh [hydra overrides of verl_recipes.train]
#   NAME=middle, TRACES, WARM, EVAL, DRY_RUN=1    as of launch/ladder.sh
# The same command again goes on where it was ended. docs/warm_start.md shows what came of it.
. "$(dirname "$0")/common.sh"

export HF_HUB_OFFLINE=1 # nothing is fetched after the installation
problems="preset=3to4 preset.rows=60000 preset.test_size=256"
direct="styles.first_try=1 styles.search=0 styles.search_with_backtracking=0"
traces="styles.search=0 styles.first_try=0 styles.search_with_backtracking=1"
warm="steps=160 batch=64 lr=1e-3 actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"
read -ra of_data <<< "$problems"
read -ra of_direct <<< "$direct"

if [ ! -e models/middle ]; then
    step python -m data_prep "out=data/middle" "${of_data[@]}"
    step python -m data_prep.traces data=data/middle out=data/middle-direct "${of_direct[@]}"
    step python -m verl_recipes.middle_base
fi
export NAME=${NAME:-middle} DATA=$problems TRACES=${TRACES:-$traces} WARM=${WARM:-$warm} EVAL=${EVAL:-n=8}
exec bash launch/ladder.sh middle hardware=cpu recipe=middle "$@"
