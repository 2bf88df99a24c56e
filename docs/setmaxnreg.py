"""Print what ptxas says of a kernel that asks for registers, compiled for a described H100; no GPU needed."""

import os
import re
import tempfile
from pathlib import Path

os.environ.update(
    MOSAIC_GPU_DUMP_TO=(dump := tempfile.mkdtemp()),
    MOSAIC_GPU_DUMP_PTXAS="1",
    JAX_PLATFORMS="cpu",
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    JAX_ENABLE_COMPILATION_CACHE="0",
)
import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def kernel(x, w, out, x_smem, w_smem, ready):
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == 2)  # copies, and needs few registers
    def _produce():
        plgpu.set_max_registers(24, action="decrease")
        plgpu.copy_gmem_to_smem(x, x_smem, ready)
        plgpu.copy_gmem_to_smem(w, w_smem, ready)

    @pl.when(warpgroup < 2)  # 64 x 256 sums in float32, held twice: 128 + 64 registers and more
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        plgpu.barrier_wait(ready)

        def multiply(acc):
            plgpu.wgmma(acc, x_smem, w_smem)
            return plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)

        acc = plgpu.ACC((64, 256), jnp.float32)
        first = pl.run_scoped(multiply, acc).astype(jnp.bfloat16)
        second = pl.run_scoped(multiply, acc)
        w_smem[...] = second.astype(jnp.bfloat16) * first
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(w_smem, out)
        plgpu.wait_smem_to_gmem(0)


def tile(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((64, 256), jnp.bfloat16),
    scratch_types=[tile(64, 64), tile(64, 256), plgpu.Barrier(num_arrivals=2)],
    num_threads=3,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
)
description = (Path(__file__).parent.parent / "tests" / "h100.txtpb").read_text()
h100 = topologies.get_topology_desc("h100", "cuda", target_config=description, topology="1x1x1").devices[:1]
place = NamedSharding(Mesh(np.array(h100), ("x",)), PartitionSpec())
x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in ((64, 64), (64, 256)))
jax.jit(run).trace(x, w).lower(lowering_platforms=("cuda",)).compile()
(said,) = (path.read_text() for path in Path(dump).glob("*.ptxas"))
print(f"jax {jax.__version__}")
print("\n".join(line for line in said.splitlines() if re.search("setmaxnreg|registers|spill", line)))
