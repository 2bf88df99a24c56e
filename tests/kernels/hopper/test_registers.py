"""Does this jax compile the kernels with the registers they ask for? Seen without a GPU, on a described H100."""

import os
import subprocess
import sys
from importlib import metadata

import jax
import pytest

from jax_speedrun.kernels.implementation import SPILLING_JAX
from tests.paths import ROOT

COMPILERS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
COMPILE_ATTENTION = f"""
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_speedrun.kernels.attention.hopper import attend
from jax_speedrun.kernels.attention.schedule import build_schedule
from jax_speedrun.kernels.block_mask import long_short_masks

h100 = open({str(ROOT / "tests" / "h100.txtpb")!r}).read()
topology = topologies.get_topology_desc("h100", "cuda", target_config=h100, topology="1x1x1")
everywhere = NamedSharding(Mesh(np.array(topology.devices[:1]), ("data",)), PartitionSpec())
q = jax.ShapeDtypeStruct((8192, 6, 128), jnp.bfloat16, sharding=everywhere)
tokens = jax.ShapeDtypeStruct((8192,), jnp.int32, sharding=everywhere)

def attention(q, k, v, tokens):
    mask, _ = long_short_masks(tokens, 7)
    return attend(0.12, q, k, v, mask.documents, build_schedule(mask))

jax.jit(attention).trace(q, q, q, tokens).lower(lowering_platforms=("cuda",)).compile()
"""


@pytest.mark.skipif(
    not any(distribution.name in COMPILERS for distribution in metadata.distributions()),
    reason="needs JAX's compiler for CUDA, no GPU: pip install -e '.[cuda13]'. What is said of releases that spill is "
    "tested everywhere (test_packaging.py, test_train.py)",
)
def test_setmaxnreg_is_ignored_by_the_releases_that_are_left_out_and_by_no_other(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # what is found there is not compiled
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of the driver's version, without a driver
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    command = [sys.executable, "-c", COMPILE_ATTENTION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = b"".join(path.read_bytes() for path in tmp_path.glob("*.ptxas")).decode(errors="replace")
    assert "registers" in said
    assert ("'setmaxnreg' ignored" in said) == (jax.__version__ in SPILLING_JAX), said
