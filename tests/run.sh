#!/usr/bin/env bash
# All tests: bash tests/run.sh [pytest arguments]. With --fast, those that start verl or take a minute are left out.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

export HF_HUB_OFFLINE=1
selection=()
if [ "${1:-}" = --fast ]; then
    selection=(-m "not end_to_end and not slow")
    shift
fi
exec python -m pytest tests "${selection[@]}" "$@"
