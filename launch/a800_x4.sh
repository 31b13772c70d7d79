#!/usr/bin/env bash
# Four A800 80 GB, the hardware that Datawhale names for TinyZero, and TinyZero's PPO on Qwen2.5-3B.
#   bash launch/a800_x4.sh [overrides]        DRY_RUN=1: only print the commands
export STACK=gpu
. "$(dirname "$0")/common.sh"
launch hardware=a800_x4 recipe=tinyzero_ppo model=qwen2.5_3b "$@"
