"""Attribution of kernels to the parts of a step: on a program with known parts, and the script as a whole."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.config import PRESETS
from jax_speedrun.kernels.implementation import compiling_for_hopper
from jax_speedrun.kernels.layer.residual_hopper import matmul_add
from jax_speedrun.tools import profile_step, profiling
from jax_speedrun.tools.profiling import PARTS, Kernel, attribute, instruction_parts, kernels

HLO = """HloModule jit_step, is_scheduled=true

%fused_computation (p0: bf16[8,8]) -> bf16[8,8] {
  %p0 = bf16[8,8]{1,0} parameter(0)
  ROOT %multiply.1 = bf16[8,8]{1,0} multiply(%p0, %p0), metadata={op_name="jit(step)/jvp()/mul"}
}

%body (arg: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %arg = (s32[], bf16[8,8]{1,0}) parameter(0)
  %gte.1 = bf16[8,8]{1,0} get-tuple-element(%arg), index=1
  %exp.1 = bf16[8,8]{1,0} exponential(%gte.1), metadata={op_name="jit(step)/jvp(head)/while/body/exp"}
  ROOT %tuple.1 = (s32[], bf16[8,8]{1,0}) tuple(%gte.0, %exp.1)
}

ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %copy.1 = bf16[8,8]{0,1} copy(%a)
  %cublas-gemm.1 = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%a, %copy.1), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
  %loop_multiply_fusion = bf16[8,8]{1,0} fusion(%a), kind=kLoop, calls=%fused_computation
  %gemm_fusion_dot.2 = bf16[8,8]{1,0} fusion(%a), kind=kCustom, calls=%fused_computation, \
metadata={op_name="jit(step)/jvp(head)/dot_general"}
  %custom-call.3 = bf16[8,8]{1,0} custom-call(%a), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(step)/transpose(jvp(attention))/dq"}
  %scatter.1 = f32[8,8]{1,0} scatter(%a), metadata={op_name="jit(step)/transpose(jvp(embedding))/scatter-add"}
  %sort.1 = s32[8]{0} sort(%a), dimensions={0}, metadata={op_name="jit(step)/jvp(masks)/sort"}
  %while.1 = (s32[], bf16[8,8]{1,0}) while(%t), condition=%cond, body=%body, metadata={op_name="jit(step)/jvp(head)/w"}
  %all-reduce.1 = f32[8,8]{1,0} all-reduce(%a), replica_groups={}, metadata={op_name="jit(step)/psum"}
  ROOT %sqrt.1 = bf16[8,8]{1,0} sqrt(%a), metadata={op_name="jit(step)/sqrt"}
}
"""


def test_every_part_is_recognised():
    parts = instruction_parts(HLO)
    want = {
        "cublas-gemm.1": profiling.HIDDEN_MATMULS,
        "copy.1": profiling.HIDDEN_MATMULS,  # its user's
        "loop_multiply_fusion": profiling.ELEMENTWISE,  # named by what is inside
        "gemm_fusion_dot.2": profiling.HEAD_MATMULS,
        "exp.1": profiling.HEAD_PASSES,
        "custom-call.3": profiling.ATTENTION,
        "scatter.1": profiling.EMBEDDING,
        "sort.1": profiling.MASKS,
        "all-reduce.1": profiling.COMMUNICATION,
        "sqrt.1": profiling.OPTIMIZER,
    }
    assert {name: parts[name] for name in want} == want
    assert "while.1" not in parts


def test_kernels_are_grouped_and_none_is_lost():
    found = [
        Kernel("a", "sort.1", 2, 1.0),
        Kernel("b", "exp.1", 1, 2.0),
        Kernel("c", "exp.1", 1, 5.0),
        Kernel("memset", None, 1, 0.5),
        Kernel("loop", "while.1", 1, 100.0),
        Kernel("ncclDevKernel_ReduceScatter", "reduce-scatter.7", 1, 3.0),  # wrapped in another by the module
    ]
    grouped = attribute(found, instruction_parts(HLO))
    assert [kernel.name for kernel in grouped[profiling.HEAD_PASSES]] == ["c", "b"]
    assert [kernel.name for kernel in grouped[profiling.UNKNOWN]] == ["memset"]
    assert [kernel.name for kernel in grouped[profiling.COMMUNICATION]] == ["ncclDevKernel_ReduceScatter"]
    # The loop's time is that of its body once more.
    assert sum(kernel.ms for members in grouped.values() for kernel in members) == 11.5


def test_a_real_profile_of_a_real_program(tmp_path):
    def loss(w, x):
        with jax.named_scope("head"):
            return jnp.sum(jnp.sin(x @ w) ** 2)

    def step(w, x):
        return w - jnp.sqrt(jnp.abs(jax.grad(loss)(w, x)))

    x = jnp.asarray(np.random.default_rng(0).standard_normal((256, 256)), jnp.float32)
    compiled = jax.jit(step).lower(x, x).compile()
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            compiled(x, x).block_until_ready()
    parts = attribute(kernels(tmp_path, "jit_step"), instruction_parts(compiled.as_text()))
    for part in (profiling.HEAD_MATMULS, profiling.HEAD_PASSES):
        assert sum(kernel.ms for kernel in parts[part]) > 0, part
        assert all(kernel.launches % 3 == 0 for kernel in parts[part])
    assert not parts[profiling.ATTENTION]
    assert kernels(tmp_path, "jit_other") == []


def test_no_profile(tmp_path):
    with pytest.raises(ValueError, match="xplane"):
        kernels(tmp_path, "jit_step")


@pytest.mark.slow
def test_the_script(tmp_path, monkeypatch, capsys):
    model = dataclasses.replace(
        PRESETS["tiny"].model, layers=2, width=16, heads=1, head_width=16, mlp_width=32, long_layers=(0,),
        attention_free_layers=(), value_embedding_tables=1,
    )  # fmt: skip
    small = dataclasses.replace(PRESETS["tiny"], model=model, sequences=1, sequence_length=256, attention="reference")
    monkeypatch.setitem(PRESETS, "tiny", small)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    arguments = ["--preset", "tiny", "--window", "256", "--steps", "2", "--mesh", "1", "--out", str(tmp_path / "p")]
    assert profile_step.main(arguments) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert all(set(part.name.split()) <= set(printed.split()) for part in PARTS)
    saved = json.loads((tmp_path / "p" / "parts.json").read_text())
    assert saved["head matmuls"]
    assert saved["optimisers"]
    assert sum(kernel["ms"] for kernel in saved["not attributed"]) == 0
    assert profile_step.main(["--preset", "tiny", "--window", "12672"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "profile_step.py: error: --window 12672: a run's windows are multiples of 128 tokens, here up to 640\n"
    )
    assert profile_step._start(None, small) == 12  # of 24 steps


@pytest.mark.parametrize(
    ("sequences", "attention", "optimisers"), [(1, "8 12", "8"), (4, "32 48", "8"), (None, "", "")]
)
def test_bounds_are_for_what_a_device_does(capsys, sequences, attention, optimisers):
    profile_step.show({part: [] for part in PARTS}, 1, sequences)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    bounds = {name: " ".join(rest) for name, ms, *rest in filter(lambda row: row[1:2] == ["0.00"], rows)}
    assert (bounds["attention"], bounds["optimisers"]) == (attention, optimisers)


def test_a_table_fits_80_columns_whatever_kernels_are_called(capsys):
    kernel = Kernel("a", "a_very_long_name_of_a_fusion_" * 4, 1, 123.456)
    profile_step.show({part: [kernel] * 3 for part in PARTS}, 2, 4)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("123.46 a_very_long" in line for line in lines) == 2 * len(PARTS)
    words = {word for line in lines for word in line.split()}
    assert all(set(part.name.split()) <= words for part in PARTS)


def test_the_scope_of_our_matmuls_is_the_one_that_profiles_look_for():
    """The name is read from a kernel lowered for a GPU."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((128, 256), (256, 256)))
    with compiling_for_hopper():
        lowered = jax.jit(lambda x, w: matmul_add(x, w)[0]).trace(x, w).lower(lowering_platforms=("cuda",))
    (name,) = set(re.findall(r'loc\("([^"]*matmul_add/mpmd_map)"', lowered.as_text(debug_info=True)))
    hlo = HLO.replace("transpose(jvp(attention))/dq", f"transpose(jvp())/{name}")
    assert instruction_parts(hlo)["custom-call.3"] is profiling.HIDDEN_MATMULS
    other = HLO.replace("transpose(jvp(attention))/dq", "transpose(jvp())/mpmd_map")
    assert instruction_parts(other)["custom-call.3"] is profiling.ELEMENTWISE


def test_exposed_communication_is_what_runs_alone(monkeypatch):
    launches = [
        ("gpu 0", "matmul", "cublas-gemm.1", 0, 10),
        ("gpu 0", "ncclDevKernel_AllReduce", None, 8, 15),  # 10 to 12 alone
        ("gpu 0", "fusion", "loop_multiply_fusion", 12, 14),  # 14 to 15 alone
        ("gpu 0", "another", "all-reduce.1", 20, 24),  # alone
        ("gpu 0", "another", "all-reduce.1", 22, 26),  # and on for 2
        ("gpu 1", "ncclDevKernel_AllReduce", None, 8, 15),
        ("gpu 1", "matmul", "cublas-gemm.1", 0, 20),
    ]
    milliseconds = [profiling._Launch(*launch[:3], 1e6 * launch[3], 1e6 * launch[4]) for launch in launches]
    monkeypatch.setattr(profiling, "_launches", lambda profile, module: milliseconds)
    assert profiling.exposed_communication(None, "", instruction_parts(HLO)) == pytest.approx(2 + 1 + 6)


def test_asynchronous_collectives_are_communication():
    hlo = """HloModule jit_step

%async_computation (p: f32[8]) -> f32[1] {
  %p = f32[8]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[1]{0} reduce-scatter(%p), metadata={op_name="jit(step)/psum_scatter"}
}

ENTRY %main (a: f32[8]) -> f32[1] {
  %a = f32[8]{0} parameter(0)
  %reduce-scatter-start = ((f32[8]{0}), f32[1]{0}) async-start(%a), calls=%async_computation
  ROOT %reduce-scatter-done = f32[1]{0} async-done(%reduce-scatter-start)
}
"""
    parts = instruction_parts(hlo)
    assert parts["reduce-scatter-start"] is parts["reduce-scatter.1"] is profiling.COMMUNICATION
