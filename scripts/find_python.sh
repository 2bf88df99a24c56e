#!/bin/sh
# Prints the path of a Python 3.12 or newer that can make environments, or says how to get one.
# PYTHON=/path/to/python: that one or none.
check='import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))'
if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c "$check" >/dev/null 2>&1 && command -v "$PYTHON" && exit 0
    echo "PYTHON=$PYTHON is no Python 3.12 or newer with venv; name another or leave it out" >&2
    exit 1
fi
# pyenv's and uv's stand in no PATH under their own names.
installed=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python \
    "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}"/cpython-3.*/bin/python 2>/dev/null | sort -V -r)
IFS='
'
for python in python3 python3.14 python3.13 python3.12 python $installed; do
    if "$python" -c "$check" >/dev/null 2>&1; then
        command -v "$python"
        exit 0
    fi
done
echo "No Python 3.12 or newer with venv found. Install one (such as 'apt install python3.12-venv', 'uv python install \
3.12' or 'pyenv install 3.12') or name it: make PYTHON=/path/to/python3.12" >&2
exit 1
