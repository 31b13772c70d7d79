#!/usr/bin/env bash
# The tests: bash tests/run.sh [pytest arguments].
#   --fast    within a minute: without those that start verl or take seconds (marks `end_to_end` and `slow`)
#   --all     for a release: with those that take minutes to an hour each (mark `long`), in random order
# Two run at a time, or as many as the machine has cores, up to four; -n 0 runs them one by one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

export HF_HUB_OFFLINE=1
selection=(-m "not long") order=(-p no:randomly)
case "${1:-}" in
    --fast) selection=(-m "not end_to_end and not slow and not long"); shift ;;
    --all) selection=() order=(); export NEW_EXAMPLES=1; shift ;;
esac
if [[ "${selection[*]}" != *slow* ]] && ! command -v chromium > /dev/null && ! command -v chromium-browser > /dev/null; then
    echo "Chromium is missing, so the tests of the report are skipped; on Debian: apt-get install chromium"
fi
exec python -m pytest tests -n logical --maxprocesses 4 --dist loadgroup "${order[@]}" "${selection[@]}" "$@"
