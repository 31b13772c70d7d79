#!/usr/bin/env bash
# Three A800 80 GB, the Datawhale-R1 article's hardware, its recipe without the withdrawn reward (topology=split: its 2 + 1).
#   bash launch/a800_x3.sh [overrides]        DRY_RUN=1: only print the commands
export STACK=gpu
. "$(dirname "$0")/common.sh"
launch hardware=a800_x3 recipe=datawhale_r1 model=qwen2.5_3b_instruct "$@"
