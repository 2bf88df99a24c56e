"""What the compiled step really sends and multiplies, read from its HLO, against the plan made from shapes alone."""

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_speedrun.config import PRESETS, Config, resolve
from jax_speedrun.optimizer import muon, state_specs
from jax_speedrun.sharding import DATA_AXIS, shards_of
from jax_speedrun.step import make_program
from jax_speedrun.tools.cost_model import (
    H100,
    Kind,
    communication_plan,
    describe,
    describe_scaling,
    planned_device,
    predict,
)
from tests.devices import A100
from tests.hlo import dot_flops, text
from tests.paths import ROOT
from tests.scripts import load_script
from tests.test_sharding import SMALL, compilation_cache, mesh_of  # noqa: F401 (a fixture)

DTYPE_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVE = re.compile(
    r"= (.+?) (reduce-scatter|all-gather|all-reduce|(?:ragged-)?all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Sent(NamedTuple):
    number: int
    nbytes: int


def compiled_step(config: Config, devices: int) -> str:
    program = make_program(config, mesh_of(devices))
    sequences = jax.ShapeDtypeStruct((config.sequences, config.sequence_length), jnp.int32)
    return text(program.train_step.lower(jax.eval_shape(program.init, 0), sequences, sequences))


def collectives(hlo: str, devices: int) -> dict[str, Sent]:
    """Number and bytes of whole arrays of each kind of collective in a compiled program."""
    found: dict[str, list[int]] = {}
    for shape, kind in COLLECTIVE.findall(hlo):
        arrays = [
            DTYPE_BYTES[t] * math.prod(map(int, filter(None, dims.split(",")))) for t, dims in ARRAY.findall(shape)
        ]
        # XLA may send several arrays as one message; each counts.
        found.setdefault(kind, []).extend(a * (devices if kind == "reduce-scatter" else 1) for a in arrays)
    return {kind: Sent(len(sizes), sum(sizes)) for kind, sizes in found.items()}


def planned(config: Config, devices: int) -> dict[Kind, Sent]:
    number: Counter[Kind] = Counter()
    nbytes: Counter[Kind] = Counter()
    for c in communication_plan(config, devices):
        number[c.kind] += c.number
        nbytes[c.kind] += c.nbytes
    return {kind: Sent(number[kind], nbytes[kind]) for kind in number}


@pytest.mark.slow
def test_the_step_sends_what_the_plan_says_and_nothing_else():
    assert collectives(compiled_step(SMALL, 8), 8) == planned(SMALL, 8)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_same_for_tiny_on_any_mesh(devices):
    tiny = dataclasses.replace(PRESETS["tiny"], attention="xla")
    assert collectives(compiled_step(tiny, devices), devices) == planned(tiny, devices)


def test_a_reshard_nobody_asked_for_is_seen():
    """Activations that XLA must gather, and rows that must change their owner."""
    mesh = mesh_of(8)
    split, other = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((DATA_AXIS,), (None, DATA_AXIS)))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def hlo(function, **options):
        return text(jax.jit(function, **options).lower(x))

    gathered = collectives(hlo(lambda x: jnp.sin(x) @ x, in_shardings=split, out_shardings=split), 8)
    assert gathered == {"all-gather": Sent(1, 64 * 64 * 4)}
    moved = collectives(hlo(lambda x: x + 1, in_shardings=split, out_shardings=other), 8)
    assert set(moved) == {"all-to-all"}


def muon_flops(layers: int, devices: int) -> int:
    """Multiplications of one update per device, for `layers` times the record's kinds of matrices at width 16."""
    mesh = mesh_of(devices)
    shards = shards_of(mesh)
    shapes = {"qkv": (3, 16, 16), "out": (16, 16), "fc": (64, 16), "proj": (16, 64)}
    params = {i: {name: jnp.zeros(shape) for name, shape in shapes.items()} for i in range(layers)}
    transform = muon(0.1, newton_schulz_steps=2, dtype=jnp.float32, shards=shards)
    state = transform.init(params)
    specs = state_specs(state, shards)
    everywhere = PartitionSpec()
    update = jax.shard_map(
        transform.update, mesh=mesh, in_specs=(everywhere, specs), out_specs=(everywhere, specs), check_vma=False
    )
    return dot_flops(text(jax.jit(update).lower(params, state)))


@pytest.mark.slow
def test_newton_schulz_is_shared_out():
    """3 layers have 12 squares and 6 rectangles; on 8 devices zeros make them 16 and 8."""
    square, rectangle = (2 * 2 * 16 * 16 * (2 * long + 16) for long in (16, 64))
    assert muon_flops(3, 1) == 12 * square + 6 * rectangle
    assert muon_flops(3, 8) == 2 * square + rectangle


def test_one_device_sends_nothing():
    assert communication_plan(PRESETS["sub3min"], 1) == []
    assert "no communication" in describe_scaling(PRESETS["eighth"], 1)


def test_plan_of_the_record():
    """By hand: 33 + 11 squares in six buckets, 24 rectangles in three, rows padded from 50,257 to 50,264."""
    square, rectangle, rows = 768 * 768, 768 * 3072, 50264 * 768
    assert planned(PRESETS["sub3min"], 8) == {
        "reduce-scatter": Sent(6 + 3 + 1 + 4, 4 * (48 * square + 24 * rectangle + 50304 * 768) + 2 * 4 * rows),
        "all-gather": Sent(2 + 1 + 4, 2 * (48 * square + 24 * rectangle + 50304 * 768 + 4 * rows)),
        # 12 pairs of residual weights, 11 of value weights, 6 skips, the loss.
        "all-reduce": Sent(1, 4 * (24 + 22 + 6 + 1)),
    }


def test_prediction_adds_up():
    one, eight = (predict(PRESETS["sub3min"], devices, 8 / devices) for devices in (1, 8))
    assert one.exposed == 0
    assert one.compute == pytest.approx(8 * eight.compute)
    # Newton-Schulz of 48 squares and 24 rectangles, where one device has 44 and 24.
    assert eight.newton_schulz * 8 / one.newton_schulz == pytest.approx((48 * 3 + 24 * 9) / (44 * 3 + 24 * 9))


def plan(config: Config, devices: int, device=None) -> str:
    """What a dry run prints."""
    mesh = mesh_of(devices)
    device = device or planned_device(config, mesh.devices.flat[0])
    config = resolve(config, device)
    return f"{describe(config, mesh, device)}\n{describe_scaling(config, devices, device)}"


@pytest.mark.parametrize(("preset", "devices"), [("sub3min", 8), ("sub3min", 2), ("eighth", 1)])
def test_a_plan_on_a_cpu_for_a_gpus_recipe_is_for_h100s_throughout(preset, devices):
    text = " ".join(plan(PRESETS[preset], devices).split())
    assert f"{devices} x {H100.device_kind} (gpu)" in text
    assert f"all below is for these, not for this machine's {devices} x cpu" in text
    assert "attention: hopper; head matmuls in fp8 " in text
    assert f"predicted on {devices} x H100: " in text


def test_a_plan_for_this_machine_says_nothing_of_another(capsys):
    text = plan(PRESETS["tiny"], 8)
    assert "8 x cpu (cpu)" in text
    assert "attention:  xla; head matmuls in float32" in text
    assert "time: not predicted; it was measured on H100 only, not on cpu" in text
    for of_gpus in ("GB/s", " ms", "predicted on", "hidden"):
        assert of_gpus not in text


def test_a_plan_for_another_gpu_is_for_that_one():
    text = plan(PRESETS["sub3min"], 8, A100)
    assert "attention:  xla; head matmuls in fp8_emulated" in text
    assert "measured on H100 only, not on NVIDIA A100-SXM4-80GB" in text
    assert "GB/s" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": "xla", "kernels": "xla"}, "with the Hopper kernels only"),
        ({"kernels": "xla"}, "with the Hopper kernels only"),
        ({"sequence_length": 1024}, "for the record's shapes only"),
    ],
)
def test_what_was_not_measured_is_not_predicted(changes, said):
    text = plan(dataclasses.replace(PRESETS["sub3min"], **changes), 8)
    assert f"time: not predicted; it was measured {said}" in text
    assert "predicted on" not in text


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_plan_fits_80_columns(preset, devices):
    config = PRESETS[preset]
    if config.sequences % devices == 0:
        assert max(map(len, plan(config, devices).splitlines())) <= 80


def test_the_dry_run_plans_kernels_that_this_machine_cannot_run(capsys):
    arguments = ["--preset", "eighth", "--attention", "hopper", "--kernels", "hopper", "--dry-run"]
    assert load_script("train").main(arguments) == 0
    assert "predicted on 1 x H100: " in capsys.readouterr().out
    assert load_script("train").main([*arguments[:-1], "--data", "nowhere"]) == 2
    assert "H100 or H200, not cpu" in capsys.readouterr().err


def test_docs_show_the_plan_as_the_function_makes_it():
    docs = ROOT / "docs" / "scaling.md"
    assert describe_scaling(PRESETS["sub3min"], 8) in docs.read_text()
