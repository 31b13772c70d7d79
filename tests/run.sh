#!/usr/bin/env bash
# The tests: bash tests/run.sh [pytest arguments].
#   --fast    within a minute: without those that start verl or take seconds (marks `end_to_end` and `slow`)
#   --all     for a release: also those that take minutes to an hour (mark `long`), shuffled; 66 minutes on two cores
#   --gpu-stack    the packages of requirements/gpu.txt (.venv-gpu, 10.6 GB; no card is needed): what composes, against the
#                  vLLM that GPUs get, and what is imported there
# As many run at a time as the machine has cores and memory for, up to four; -n 0 runs them one by one.
set -euo pipefail
[ "${1:-}" != --gpu-stack ] || export STACK=gpu
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

export HF_HUB_OFFLINE=1
unset FORCE_COLOR TTY_COMPATIBLE # rich would take what tests read for a terminal
selection=(-m "not long") order=(-p no:randomly)
case "${1:-}" in
    --fast) selection=(-m "not end_to_end and not slow and not long"); shift ;;
    --all) selection=() order=(); export NEW_EXAMPLES=1; shift ;;
    --gpu-stack)
        shift
        PYTHONPATH=tests exec python -m pytest -p gpu_stack "${order[@]}" tests/test_recipes.py tests/test_gpu_path.py tests/test_attention.py \
            -m "not long and not end_to_end" "$@" ;;
esac
if [[ "${selection[*]}" != *slow* ]] && ! command -v chromium > /dev/null && ! command -v chromium-browser > /dev/null; then
    echo "Chromium is missing, so the tests of the report are skipped; on Debian: apt-get install chromium"
fi
memory="from verl_recipes.planning.space import free_memory; print(int(free_memory() / 6e9))" # a run takes 5.5 GB
most=$(python -c "$memory")
[[ "${selection[*]}" != *"not slow"* ]] || most=4 # these start no run
most=$((most < 1 ? 1 : most > 4 ? 4 : most))
exec python -m pytest tests -n logical --maxprocesses "$most" --no-loadscope-reorder "${order[@]}" "${selection[@]}" "$@"
