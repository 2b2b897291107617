# Sourced by demo.sh and test.sh: a virtual environment in .venv with the pinned versions, made once per set of pins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # containers set it, and then each of many processes compiles all that it imports

setup() {
    local pins stamp=.venv/.recray-pins
    pins=$(cat pyproject.toml infra/constraints.txt infra/setup.sh | sha256sum | cut -d' ' -f1)
    if [[ -f $stamp && $(<"$stamp") == "$pins" ]]; then
        return
    fi
    local python=${PYTHON:-python3.11}
    command -v "$python" >/dev/null || python=python3
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
        echo "recray needs Python 3.11; name one with PYTHON=/path/to/python3.11" >&2
        exit 1
    }
    echo "setting up .venv (once; a minute or a few)" >&2
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    # a CPU build of torch where an index for one is named; else whatever the configured index has
    .venv/bin/python -m pip install --quiet --no-compile ${RECRAY_TORCH_INDEX:+--index-url "$RECRAY_TORCH_INDEX"} torch==2.13.0
    # uv takes seconds where pip takes minutes; where it does not reach what pip is configured to, pip does it
    .venv/bin/python -m pip install --quiet --constraint infra/constraints.txt uv
    local rest=(--quiet --constraint infra/constraints.txt --editable '.[dev]')
    .venv/bin/uv pip install --python .venv/bin/python "${rest[@]}" || .venv/bin/python -m pip install "${rest[@]}"
    echo "$pins" >"$stamp"
}
