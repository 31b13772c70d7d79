#!/usr/bin/env bash
# Two A800 80 GB: TinyZero's GRPO on Qwen2.5-3B.
#   bash launch/a800_x2.sh [overrides]        DRY_RUN=1: only print the commands
export STACK=gpu
. "$(dirname "$0")/common.sh"
launch hardware=a800_x2 recipe=tinyzero_grpo model=qwen2.5_3b "$@"
