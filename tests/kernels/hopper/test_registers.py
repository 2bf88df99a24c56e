"""Do the kernels get the registers that they need? Seen without a GPU: compiled for a described H100, ptxas tells."""

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest

from tests.paths import ROOT

COMPILERS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
COMPILE = f"""
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_speedrun.kernels.attention.hopper import attend
from jax_speedrun.kernels.attention.schedule import build_schedule
from jax_speedrun.kernels.block_mask import long_short_masks
from jax_speedrun.kernels.head import head_loss
from jax_speedrun.kernels.implementation import compiling_for_hopper
from jax_speedrun.kernels.layer.mlp import mlp
from jax_speedrun.kernels.layer.residual import add_linear
from jax_speedrun.kernels.layer.self_attention import self_attention

h100 = open({str(ROOT / "tests" / "h100.txtpb")!r}).read()
topology = topologies.get_topology_desc("h100", "cuda", target_config=h100, topology="1x1x1")
everywhere = NamedSharding(Mesh(np.array(topology.devices[:1]), ("data",)), PartitionSpec())

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

def gradients(function, *arguments):
    def loss(*arguments):
        return jax.tree.leaves(function(*arguments))[-1].astype(jnp.float32).sum()

    wanted = [i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]
    with compiling_for_hopper():
        jax.jit(jax.grad(loss, wanted)).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()

def attention(q, k, v, tokens):
    mask, _ = long_short_masks(tokens, 7)
    return attend(0.12, q, k, v, mask.documents, build_schedule(mask))

def layer(x, rstd, qkv, values, lambdas, cos, sin, tokens):
    mask, _ = long_short_masks(tokens, 7)
    return self_attention(
        x, rstd, qkv, values, lambdas, cos, sin, mask,
        heads=6, softmax_scale=0.12, epsilon=1e-6, implementation="hopper",
    )

def capped(q, k, v, tokens, sinks):
    return with_sinks(q, k, v, tokens, sinks, soft_cap=50.0)

def with_sinks(q, k, v, tokens, sinks, soft_cap=None):
    mask, _ = long_short_masks(tokens, 7)
    return attend(0.12, q, k, v, mask.documents, build_schedule(mask), sinks, soft_cap, True)

T, D, F, V = 8192, 768, 3072, 50304
f32 = dict(dtype=jnp.float32)
tokens, rstd = array(T, dtype=jnp.int32), array(T, **f32)
for heads, width in ((12, 64), (6, 128)):
    q = array(T, heads, width)
    gradients(attention, q, q, q, tokens)
    shared = array(T, 2, width)
    gradients(capped if width == 64 else with_sinks, q, shared, shared, tokens, array(heads, **f32))
angles = array(T, 32, **f32)
gradients(layer, array(T, D), rstd, array(3, D, D, **f32), array(T, D), array(2, **f32), angles, angles, tokens)
residual = dict(epsilon=1e-6, implementation="hopper")
gradients(lambda *a: add_linear(*a, **residual)[0], array(T, D), array(T, D), array(D, D, **f32))
gradients(lambda *a: mlp(*a, "hopper"), array(T, D), rstd, array(F, D, **f32), array(D, F, **f32))
gradients(lambda x, w, t: head_loss(x, w, t, "fp8", "hopper"), array(T, D), array(V, D, **f32), tokens)
"""
SPILLED = re.compile(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores", re.DOTALL)
KERNELS = {
    "block_sparse_attention_forward", "block_sparse_attention_dq", "block_sparse_attention_dkv", "matmul_norm_rotary",
    "matmul_add", "matmul_relu_squared", "matmul_slope", "head_logits", "head_logit_gradient",
}  # fmt: skip
ALLOWED = {"matmul_add": 96}
"""Bytes: of the one that mixes values with their embeddings. It has spilled as much in every layout that was tried."""


@pytest.mark.slow
@pytest.mark.skipif(
    not any(distribution.name in COMPILERS for distribution in metadata.distributions()),
    reason="needs JAX's compiler for CUDA, no GPU: pip install -e '.[cuda13]'",
)
def test_nothing_spills_and_no_matmul_waits_for_another(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # what is found there is not compiled
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of the driver's version, without a driver
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = "\n".join(path.read_text(errors="replace") for path in tmp_path.glob("*.ptxas"))
    spilled = [(name, int(size)) for name, size in SPILLED.findall(said)]
    assert {name for name, _ in spilled} == KERNELS
    assert [(name, size) for name, size in spilled if size > ALLOWED.get(name, 0)] == []
    assert "C7510" not in said  # wgmma serialised
    assert "C7504" not in said  # setmaxnreg ignored
