# shellcheck shell=bash
# Sourced by the launch scripts: the environment, then `launch OVERRIDES`: doctor, plan, run. Each stops what follows.
#   DRY_RUN=1   print the commands and start nothing
#   SETUP=0     use the present Python instead of making an environment (launch/setup.sh)
#   force=true  among the overrides: start although plan says that the run does not fit
[ -n "${BASH_VERSION:-}" ] || { echo "error: these scripts need bash: bash $0" >&2; exit 2; }
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ulimit -n 65536 2>/dev/null || : # Ray opens thousands of files; doctor says so if this is not allowed

step() {
    printf '+%s\n' "$(printf ' %q' "$@")"
    [ "$DRY_RUN" = 1 ] || "$@"
}

launch() {
    # && because `set -e` has no effect in a function whose exit status the caller checks
    step python -m verl_recipes.doctor "$@" &&
        { [ "${STACK:-cpu}" = cpu ] || step python -m verl_recipes.plan "$@"; } && # there is nothing to plan on a CPU
        step python -m verl_recipes.train "$@"
}
