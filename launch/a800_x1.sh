#!/usr/bin/env bash
# One A800 80 GB: TinyZero's PPO on a model of 1.5 billion parameters.
#   bash launch/a800_x1.sh [overrides]        DRY_RUN=1: only print the commands
export STACK=gpu
. "$(dirname "$0")/common.sh"
launch hardware=a800_x1 recipe=tinyzero_ppo model=qwen2.5_1.5b "$@"
