#!/usr/bin/env bash
# Eight A800 80 GB: DAPO on Qwen2.5-7B.
#   bash launch/a800_x8.sh [overrides]        DRY_RUN=1: only print the commands
export STACK=gpu
. "$(dirname "$0")/common.sh"
launch hardware=a800_x8 recipe=dapo model=qwen2.5_7b "$@"
