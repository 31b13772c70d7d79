#!/usr/bin/env bash
# For the first owner of a GPU: two short runs on one card show what no CPU could (flash-attn, vLLM's sleep mode and CUDA
# graphs, nccl), and what they took beside what plan said. The report is runs/gpu_check.md: attach it to an issue, whether
# it went well or not.
#   bash launch/gpu_check.sh [hardware=rtx4090 | hardware=h100] [overrides]     DRY_RUN=1: only print the commands
export STACK=gpu
. "$(dirname "$0")/common.sh"

report=runs/gpu_check.md
[ "$DRY_RUN" = 1 ] || { mkdir -p runs; exec > >(tee "$report") 2>&1; echo '```'; }
step nvidia-smi || :
step python -m data_prep # the tiny data serve both runs

# A stage that fails ends in the report; the next one may still say something.
common=(hardware=a800 tuning=full fresh=true seed=0 data.train_files=data/tiny/train.parquet data.val_files=data/tiny/test.parquet
    trainer.total_training_steps=5 trainer.save_freq=5 trainer.val_before_train=true eval_n=1)
tiny=("${common[@]}" recipe=tiny model=tiny name=gpu_check-tiny)
small=("${common[@]}" recipe=tinyzero_grpo model=qwen2.5_0.5b name=gpu_check-0.5b prompts=32 updates=1)
(launch "${tiny[@]}" "$@") || echo "gpu_check: the tiny run failed"
(launch "${small[@]}" "$@") || { echo "gpu_check: the run of 0.5B failed; the end of its log:"; tail -n 60 runs/gpu_check-0.5b/log.txt || :; }
step python benchmarks/gpu_check.py runs/gpu_check-tiny runs/gpu_check-0.5b || :
[ "$DRY_RUN" = 1 ] || { echo '```'; echo "report: $report" >&2; }
