#!/usr/bin/env bash
# A run on an existing Ray cluster, through Ray's job submission (docs/launch.md):
#   bash launch/ray_submit.sh http://HEAD:8265 hardware=a800 gpus=8 nodes=2 recipe=... model=... [overrides]
#   bash launch/ray_submit.sh http://HEAD:8265 attach=JOB      follow a job that already runs
# It ships the code and the data files, streams the log, reconnects if the connection drops, and ends with the job's exit
# status. Ctrl-C leaves the job running. SIGTERM ends it, and it saves the step that it is in first. The run folder must
# be on a file system that all nodes share.
case "${1:-}" in http* | -h | --help) ;; *) echo "error: the first argument is the dashboard's address, http://HEAD:8265" >&2; exit 2 ;; esac
[ -n "${STACK:-}" ] || [ ! -d "$(dirname "$0")/../.venv-gpu" ] || export STACK=gpu # the one that is made already
. "$(dirname "$0")/common.sh"
address=$1
shift
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS # Ray would use them instead of the address above
# A head that finds a token turns authentication on, but its clients do not by themselves (Ray 2.60).
[ ! -f ~/.ray/auth_token ] || export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
[[ "${1:-}" == attach=* ]] || step python -m verl_recipes.plan "$@"
step exec python -m verl_recipes.submit "$address" "$@" # a signal to this script is for it
