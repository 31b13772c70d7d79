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
# The tests of the report drive a real browser. Where it is missing and cannot be installed here, they fail and say so.
if ! command -v chromium > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    echo "Installing Chromium for the tests of the report"
    { apt-get update && apt-get install -y --no-install-recommends chromium; } > .venv/chromium.log 2>&1 ||
        echo "Chromium could not be installed; see .venv/chromium.log" >&2
fi
exec python -m pytest tests "${selection[@]}" "$@"
