"""What the devices of a mesh send each other in a step, how long that takes, and how far it scales.

`communication_plan` derives every collective of a step from the shapes of the
parameters alone. A test holds it against the compiled program; docs/scaling.md
shows it for 8 devices. Times are predictions from the constants below, no more.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..banks import Bank, banks, round_up
from ..config import PRESETS, Config, ModelConfig
from ..model import GPT
from ..optimizer import parameter_labels

BUS_BYTES_PER_MS = 350e6
"""Assumed: 350 GB/s, what NCCL calls bus bandwidth, also between hosts (one 400 Gb/s card a GPU)."""
COLLECTIVE_MS = 0.02
"""Assumed: what starting a collective costs before its first byte moves."""
HOP_MS = 0.003
"""Assumed: what each further device of a ring adds to that."""
STEP_MS = 91.6
"""Measured: `eighth` on one H100, a sequence of 65,536 tokens and the whole optimiser, mean over the windows of a run
(docs/lab-book.md, 2026-11-25)."""
NEWTON_SCHULZ_MS = 3.5
"""Measured on one H100: Newton-Schulz of all the record's matrices in a profile of 2026-11-25, part of the above."""
BACKWARD = 2 / 3
"""The share of forward and backward that is backward."""
EXPOSED = "nothing"

Kind = Literal["reduce-scatter", "all-gather", "all-reduce"]


class Collective(NamedTuple):
    """`number` collectives in a step over arrays of `nbytes` in all when whole; `behind`: the work that hides them."""

    what: str
    kind: Kind
    number: int
    dtype: str
    nbytes: int
    behind: str

    def ms(self, devices: int) -> float:
        """Predicted, for all of them: the bytes that cross each link of a ring, and starting it."""
        passes = 2 if self.kind == "all-reduce" else 1
        moved = passes * (devices - 1) / devices * self.nbytes
        return moved / BUS_BYTES_PER_MS + self.number * (COLLECTIVE_MS + passes * (devices - 1) * HOP_MS)


class Prediction(NamedTuple):
    """Milliseconds of a step: forward and backward, Newton-Schulz, and the communication that nothing hides."""

    compute: float
    newton_schulz: float
    exposed: float

    @property
    def step(self) -> float:
        return sum(self)


def parameter_shapes(model: ModelConfig) -> dict[str, object]:
    """The tree of parameters with shapes for arrays."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: GPT(model, nnx.Rngs(0)))))


def communication_plan(config: Config, devices: int) -> list[Collective]:
    """Every collective of one training step on `devices` devices: none on one."""
    if devices == 1:
        return []
    groups = _groups(config.model)
    o, update = config.optimizer.newton_schulz_dtype, config.optimizer.update_dtype
    gradients, updates = [], []

    def add(name: str, buckets: int, numbers: int, dtype: str, behind: str, gathers: int, update_dtype: str) -> None:
        sizes = numbers * jnp.dtype(dtype).itemsize, numbers * jnp.dtype(update_dtype).itemsize
        gradients.append(Collective(f"gradients: {name}", "reduce-scatter", buckets, dtype, sizes[0], behind))
        updates.append(Collective(f"updates: {name}", "all-gather", gathers, update_dtype, sizes[1], EXPOSED))

    for bank in _banks(config.model, devices):
        numbers = sum(bank.sizes) * bank.short * bank.long
        name = f"{bank.short} x {bank.long} matrices"
        add(name, len(bank.sizes), numbers, "float32", "weight gradients", 1, o)
    for name, leaves, behind in (
        ("head", groups["head"], EXPOSED),
        ("tables", groups["embeddings"], "table gradients, Newton-Schulz"),
    ):
        numbers = sum(round_up(leaf.shape[0], devices) * leaf.shape[1] for leaf in leaves)
        add(name, len(leaves), numbers, str(leaves[0].dtype), behind, len(leaves), update)
    scalars = 1 + sum(leaf.size for leaf in groups["scalars"])
    return [
        *gradients,
        Collective("scalars and loss", "all-reduce", 1, "float32", 4 * scalars, "weight gradients"),
        *updates,
    ]


def predict(config: Config, devices: int, sequences: float) -> Prediction:
    """A step of the record's model on H100s with `sequences` of 65,536 tokens (or a part of one) on each device."""
    compute = (STEP_MS - NEWTON_SCHULZ_MS) * sequences
    alone, shared = (
        sum(sum(bank.sizes) * _newton_schulz_flops(bank) / n for bank in _banks(config.model, n)) for n in (1, devices)
    )
    plan = communication_plan(config, devices)
    hidden = sum(c.ms(devices) for c in plan if c.behind != EXPOSED)
    exposed = sum(c.ms(devices) for c in plan if c.behind == EXPOSED) + max(0.0, hidden - BACKWARD * compute)
    return Prediction(compute, NEWTON_SCHULZ_MS * shared / alone, exposed)


def describe_scaling(config: Config, devices: int) -> str:
    """Several lines of text for `--dry-run` and docs/scaling.md."""
    plan = communication_plan(config, devices)
    if plan:
        lines = [
            f"each step on {devices} devices (ms at {BUS_BYTES_PER_MS / 1e6:.0f} GB/s bus bandwidth, "
            f"{1000 * COLLECTIVE_MS:.0f} us a collective and {1000 * HOP_MS:.0f} us a hop, assumed):",
            f"  {'what':<34}{'collective':<16}{'number':>7}  {'dtype':<9}{'bytes':>13}{'ms':>8}  hidden behind",
        ]
        lines += [
            f"  {c.what:<34}{c.kind:<16}{c.number:>7}  {c.dtype:<9}{c.nbytes:>13,}{c.ms(devices):>8.3f}  {c.behind}"
            for c in plan
        ]
        number, nbytes = sum(c.number for c in plan), sum(c.nbytes for c in plan)
        lines.append(f"  {'all':<50}{number:>7}  {'':<9}{nbytes:>13,}{sum(c.ms(devices) for c in plan):>8.3f}")
    else:
        lines = ["each step on 1 device: no communication"]
    record = PRESETS["sub3min"]
    if (config.model.width, config.model.layers, config.sequence_length) != (
        record.model.width,
        record.model.layers,
        record.sequence_length,
    ):
        return "\n".join([*lines, "time: not predicted; measurements exist for the record's shapes on H100 only"])

    step = predict(config, devices, config.sequences / devices)
    lines += [
        f"predicted on H100: {step.step:.1f} ms a step ({step.compute:.1f} forward and backward, "
        f"{step.newton_schulz:.1f} Newton-Schulz, {step.exposed:.1f} communication that nothing hides), "
        f"{step.step * config.steps / 1000:.0f} s for {config.steps:,} steps",
        f"  from {STEP_MS} ms measured for one sequence and the whole optimiser on one H100, "
        f"{NEWTON_SCHULZ_MS} of them Newton-Schulz",
        *_on_paper(config),
    ]
    return "\n".join(lines)


def _on_paper(config: Config) -> list[str]:
    """8 to 1024 GPUs: the same batch cut into shorter sequences, and a whole sequence for each GPU."""
    lines = [
        "on paper, more GPUs: the same batch in shorter sequences (what then costs, apart from another recipe), or a",
        "whole sequence for each GPU (a larger batch); speed as a multiple of 8 GPUs' tokens a second:",
        f"  {'GPUs':>5}{'tokens each':>13}{'ms a step':>11}{'speed':>7}{'tokens each':>13}{'ms a step':>11}{'speed':>7}"
        f"{'zeros sent':>12}{'all communication':>19}",
    ]
    base = predict(config, 8, 1).step
    for devices in (8, 16, 32, 64, 128, 256, 512, 1024):
        same, larger = predict(config, devices, 8 / devices), predict(config, devices, 1)
        layout = _banks(config.model, devices)
        sent = sum(sum(bank.sizes) * bank.short * bank.long for bank in layout)
        filled = sum(sum(map(len, bank.members)) * bank.short * bank.long for bank in layout)
        ms = sum(c.ms(devices) for c in communication_plan(config, devices))
        lines.append(
            f"  {devices:>5}{8 * 65536 // devices:>13,}{same.step:>11.1f}{base / same.step:>7.1f}"
            f"{65536:>13,}{larger.step:>11.1f}{base / larger.step * devices / 8:>7.1f}"
            f"{1 - filled / sent:>12.0%}{ms:>16.1f} ms"
        )
    return lines


@functools.cache
def _groups(model: ModelConfig) -> dict[str, list[jax.ShapeDtypeStruct]]:
    params = parameter_shapes(model)
    groups: dict[str, list[jax.ShapeDtypeStruct]] = {"hidden": [], "head": [], "embeddings": [], "scalars": []}
    for label, leaf in zip(jax.tree.leaves(parameter_labels(params)), jax.tree.leaves(params), strict=True):
        groups[label].append(leaf)
    return groups


def _banks(model: ModelConfig, devices: int) -> list[Bank]:
    return banks([leaf.shape for leaf in _groups(model)["hidden"]], devices)


def _newton_schulz_flops(bank: Bank) -> int:
    """Of one matrix in one of the five steps: the Gram matrix, its square, and the product with the matrix."""
    return 2 * bank.short**2 * (2 * bank.long + bank.short)
