#!/usr/bin/env bash
# The whole story on a CPU, from a bare machine to a trained model and a table: two cores, 8 GiB of memory, no GPU.
#   bash launch/cpu.sh [hydra overrides of verl_recipes.train]
# The same command again installs nothing. It continues a run that was ended, or says that it is complete; fresh=true
# starts anew.
export STACK=cpu
. "$(dirname "$0")/common.sh"

export HF_HUB_OFFLINE=1 # nothing is fetched after the installation

# 1. Problems with known solutions; the numbers of the test problems never occur together in training.
step python -m data_prep

# 2. verl measures the base model in assets/tiny_base, trains it with GRPO, and measures it again.
launch hardware=cpu recipe=tiny "$@"
