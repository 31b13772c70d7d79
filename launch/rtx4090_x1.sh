#!/usr/bin/env bash
# One RTX 4090 24 GB: TinyZero's GRPO with LoRA on Qwen2.5-1.5B; docs/launch.md says what this card can and cannot do.
#   bash launch/rtx4090_x1.sh [overrides]        DRY_RUN=1: only print the commands
export STACK=gpu
. "$(dirname "$0")/common.sh"
launch hardware=rtx4090_x1 recipe=tinyzero_grpo model=qwen2.5_1.5b "$@"
