#!/usr/bin/env bash
# Two A800 80 GB: TinyZero's GRPO on Qwen2.5-3B.
#   bash launch/a800_x2.sh [overrides]        DRY_RUN=1: only print what would run
export STACK=gpu
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch hardware=a800_x2 recipe=tinyzero_grpo model=qwen2.5_3b "$@"
