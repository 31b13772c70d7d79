#!/usr/bin/env bash
# All tests: bash tests/run.sh [pytest arguments]. With --fast, under two minutes, without those that start verl or
# take seconds (by their marks `end_to_end` and `slow`).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

export HF_HUB_OFFLINE=1
selection=()
if [ "${1:-}" = --fast ]; then
    selection=(-m "not end_to_end and not slow")
    shift
fi
if [ ${#selection[@]} = 0 ] && ! command -v chromium > /dev/null && ! command -v chromium-browser > /dev/null; then
    echo "Chromium is missing, so the tests of the report are skipped; on Debian: apt-get install chromium"
fi
exec python -m pytest tests "${selection[@]}" "$@"
