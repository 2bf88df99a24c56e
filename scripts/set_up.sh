#!/bin/sh
# sh scripts/set_up.sh ENVIRONMENT train|test: makes ENVIRONMENT hold what training, or what the tests need.
#
# It changes no environment that it did not make, and finishes one that it began. Where nvidia-smi finds a GPU, training
# gets JAX for the CUDA that the driver supports.
set -eu
cd "$(dirname "$0")/.."
environment=$1 purpose=$2
made_here=$environment/.jax_speedrun

# JAX's own conditions: CUDA 13 from driver 580 and compute capability 7.5, CUDA 12 from driver 525.
gpu_extra() {
    gpu=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null) || return 0
    echo "$gpu" | awk -F '[., ]+' 'NR == 1 {
        driver = $1 + 0; capability = 10 * $(NF - 1) + $NF
        if (driver >= 580 && capability >= 75) print "cuda13"
        else if (driver >= 525) print "cuda12"
        else if (driver > 0) print "NVIDIA driver " driver " is too old for JAX (525): the CPU it is" >"/dev/stderr"
    }'
}

if [ -e "$environment" ] && [ ! -e "$made_here" ] && [ -n "$(ls -A "$environment")" ]; then
    echo "$environment was not made by this Makefile and is left as it is: 'make VENV=.venv-speedrun $purpose' makes one" \
        "beside it; to use it all the same, '$environment/bin/python -m pip install -e .'" \
        "and '$environment/bin/python scripts/train.py'" >&2
    exit 1
fi

extra=test
if [ "$purpose" = train ]; then
    extra=$(gpu_extra)
fi
# Holds the folder that was installed: a checkout that was moved is installed again.
ready=$environment/.ready-${extra:-cpu}
if [ "$(cat "$ready" 2>/dev/null)" = "$PWD" ] && [ "$ready" -nt pyproject.toml ]; then
    exit 0
fi

if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(sh scripts/find_python.sh)
    echo "Setting up $environment with $("$python" --version): once, for a few minutes."
    mkdir -p "$environment"
    touch "$made_here"
    find "$environment" -mindepth 1 -maxdepth 1 ! -name .jax_speedrun -exec rm -rf {} +
    "$python" -m venv "$environment"
fi
echo "Installing jax_speedrun${extra:+ with the extra $extra} into $environment."
if ! "$environment/bin/python" -m pip install --disable-pip-version-check --editable ".${extra:+[$extra]}"; then
    echo "The installation into $environment did not finish; the same command goes on with it." >&2
    exit 1
fi
echo "$PWD" >"$ready"
