#!/bin/sh
# Prints the path of a Python 3.12 or newer, or says how to get one.
check='import sys, ensurepip; sys.exit(sys.version_info < (3, 12))'
pyenv_pythons=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python 2>/dev/null | sort -t. -k3 -n -r)
for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python $pyenv_pythons; do
    if "$python" -c "$check" >/dev/null 2>&1; then
        command -v "$python"
        exit 0
    fi
done
echo "No Python 3.12 or newer found. Install one (such as 'apt install python3.12-venv', 'uv python install 3.12' \
or 'pyenv install 3.12') or name it: make PYTHON=/path/to/python3.12" >&2
exit 1
