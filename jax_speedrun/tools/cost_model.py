"""What a run will be, before anything is compiled: layout and memory, what its devices send each other, and the time.

`communication_plan` derives every collective of a step from the shapes of the
parameters alone. A test holds it against the compiled program; docs/scaling.md
shows it for 8 devices. Times are predictions for H100s from the constants below,
no more: of other devices only what does not depend on them is said.
"""

import functools
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ..banks import Bank, banks, round_up
from ..config import PRESETS, Config, ModelConfig
from ..kernels.implementation import on_hopper
from ..model import GPT
from ..optimizer import parameter_labels
from .layout import wrap

FLOAT32, BFLOAT16 = 4, 2  # bytes
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


class DeviceModel(NamedTuple):
    """All that a plan asks of a `jax.Device`, for one that this machine need not have."""

    platform: str
    device_kind: str
    compute_capability: str


H100 = cast(jax.Device, DeviceModel("gpu", "NVIDIA H100 80GB HBM3", "9.0"))


class Collective(NamedTuple):
    """`number` collectives in a step over arrays of `nbytes` in all when whole; `behind`: the work that hides them.

    A reduce-scatter is of gradients, an all-gather of updates, an all-reduce of what is neither long nor many.
    """

    what: str
    kind: Kind
    number: int
    dtype: str
    nbytes: int
    behind: str

    def ms(self, devices: int) -> float:
        """Predict the time of all of them: the bytes that cross each link of a ring, and starting it."""
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


def planned_device(config: Config, here: jax.Device) -> jax.Device:
    """Return what a dry run is about: `here`, or an H100 where that is a CPU and the recipe, in bfloat16, for a GPU."""
    return H100 if here.platform == "cpu" and config.model.compute_dtype == "bfloat16" else here


def describe(config: Config, mesh: Mesh, device: jax.Device | None = None) -> str:
    """Return the lines at the head of a run.

    Args:
      config: resolved for `device`.
      mesh: the run's.
      device: what a dry run is planned for; None: the mesh's.
    """
    here = mesh.devices.flat[0]
    device = device or here
    local = config.sequences // mesh.size
    parameters, state_bytes = _state_bytes(config, mesh.size)
    activation_bytes = _activation_bytes(config)
    kind = f"{mesh.size} x {device.device_kind} ({device.platform}), mesh axis 'data'"
    if device is not here:
        kind += f"; all below is for these, not for this machine's {mesh.size} x {here.device_kind}"
    facts = {
        "preset": config.preset,
        "devices": kind,
        "batch": f"{config.sequences} sequence(s) of {config.sequence_length:,} tokens a step, {local} on each device"
        + (", one after the other" if local > 1 else ""),
        "tokens": f"{config.tokens_per_step:,} a step x {config.steps:,} steps = "
        f"{config.tokens_per_step * config.steps:,}",
        "model": f"{parameters / 1e6:.1f} M parameters, of which {config.model.matmul_parameters / 1e6:.1f} M "
        f"in matmuls; {config.matmul_flops / 1e12:.2f} TFLOP a step without attention",
        "attention": f"{config.attention}; head matmuls in {config.model.head_precision}",
        "memory": f"about {(state_bytes + activation_bytes) / 2**30:.1f} GiB a device: "
        f"{state_bytes / 2**30:.1f} parameters, gradients and optimiser state, "
        f"{activation_bytes / 2**30:.1f} activations of one sequence",
    }
    return "\n".join(wrap(f"{name + ':':<12}{fact}", " " * 12) for name, fact in facts.items() if fact)


def parameter_shapes(model: ModelConfig) -> dict[str, object]:
    """Return the tree of parameters with shapes for arrays."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: GPT(model, nnx.Rngs(0)))))


def communication_plan(config: Config, devices: int) -> list[Collective]:
    """Return every collective of one training step on `devices` devices: none on one."""
    if devices == 1:
        return []
    groups = _groups(config.model)
    o, update = config.optimizer.newton_schulz_dtype, config.optimizer.update_dtype
    gradients, updates = [], []

    def add(name: str, buckets: int, numbers: int, dtype: str, behind: str, gathers: int, update_dtype: str) -> None:
        sizes = numbers * jnp.dtype(dtype).itemsize, numbers * jnp.dtype(update_dtype).itemsize
        gradients.append(Collective(name, "reduce-scatter", buckets, dtype, sizes[0], behind))
        updates.append(Collective(name, "all-gather", gathers, update_dtype, sizes[1], EXPOSED))

    for bank in _banks(config.model, devices):
        numbers = sum(bank.sizes) * bank.short * bank.long
        name = f"{bank.short} x {bank.long} matrices"
        add(name, len(bank.sizes), numbers, "float32", "weight gradients", 1, o)
    for name, leaves, behind in (
        ("head", groups["head"], EXPOSED),
        ("tables", groups["embeddings"], "Newton-Schulz, tables"),
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
    """Predict a step of the record's model on H100s with `sequences` of 65,536 tokens, or a part of one, on each."""
    compute = (STEP_MS - NEWTON_SCHULZ_MS) * sequences
    alone, shared = (
        sum(sum(bank.sizes) * _newton_schulz_flops(bank) / n for bank in _banks(config.model, n)) for n in (1, devices)
    )
    plan = communication_plan(config, devices)
    hidden = sum(c.ms(devices) for c in plan if c.behind != EXPOSED)
    exposed = sum(c.ms(devices) for c in plan if c.behind == EXPOSED) + max(0.0, hidden - BACKWARD * compute)
    return Prediction(compute, NEWTON_SCHULZ_MS * shared / alone, exposed)


KINDS: dict[Kind, str] = {
    "reduce-scatter": "reduce-scatter of gradients",
    "all-reduce": "all-reduce",
    "all-gather": "all-gather of updates",
}


def describe_scaling(config: Config, devices: int, device: jax.Device = H100) -> str:
    """Return what the devices send each other and how long a step takes, for `--dry-run` and docs/scaling.md."""
    timed = on_hopper(device)
    lines = _communication(communication_plan(config, devices), devices, timed)
    if missing := _not_measured(config, device):
        return "\n".join([*lines, wrap(f"time: not predicted; it was measured {missing}", "  ")])

    step = predict(config, devices, config.sequences / devices)
    return "\n".join(
        [
            *lines,
            f"predicted on {devices} x H100: {step.step:.1f} ms a step, "
            f"{step.step * config.steps / 1000:.0f} s for {config.steps:,} steps",
            f"  {step.compute:6.1f} ms forward and backward",
            f"  {step.newton_schulz:6.1f} ms Newton-Schulz",
            f"  {step.exposed:6.1f} ms communication that nothing hides",
            wrap(
                f"from {STEP_MS} ms measured for one sequence and the whole optimiser on one H100, {NEWTON_SCHULZ_MS} "
                "of them Newton-Schulz",
                "  ",
            ),
            *_on_paper(config),
        ]
    )


def _not_measured(config: Config, device: jax.Device) -> str | None:
    """Return with what alone steps were measured, if the run has something else."""
    record = PRESETS["sub3min"]
    if not on_hopper(device):
        return f"on H100 only, not on {device.device_kind}"
    shape = config.model.width, config.model.layers, config.sequence_length
    if shape != (record.model.width, record.model.layers, record.sequence_length):
        return "for the record's shapes only"
    if not {config.attention, config.kernels} <= {"auto", "hopper"}:
        return "with the Hopper kernels only"
    return None


def _communication(plan: list[Collective], devices: int, timed: bool) -> list[str]:
    """Return a table of collectives; without `timed`, of what is sent alone."""
    if not plan:
        return ["each step on 1 device: no communication"]
    if timed:
        title = (
            f"each step on {devices} devices sends (ms at {BUS_BYTES_PER_MS / 1e6:.0f} GB/s bus bandwidth, "
            f"{1000 * COLLECTIVE_MS:.0f} us a collective and {1000 * HOP_MS:.0f} us a hop, assumed)"
        )
    else:
        title = f"each step on {devices} devices sends"

    def line(what: str, number: object, dtype: str, nbytes: object, ms: object = "", behind: str = "") -> str:
        cells = f"{what:<22}{number:>5}  {dtype:<8}{nbytes:>13}"
        return (f"{cells}{ms:>7}  {behind}" if timed else cells).rstrip()

    lines = [wrap(title, "  "), line("", "calls", "dtype", "bytes", "ms", "hidden behind")]
    for kind, name in KINDS.items():
        lines.append(name)
        lines += [
            line(f"  {c.what}", c.number, c.dtype, f"{c.nbytes:,}", f"{c.ms(devices):.3f}", c.behind)
            for c in plan
            if c.kind == kind
        ]
    number, nbytes, ms = sum(c.number for c in plan), sum(c.nbytes for c in plan), sum(c.ms(devices) for c in plan)
    return [*lines, line("all", number, "", f"{nbytes:,}", f"{ms:.3f}")]


def _on_paper(config: Config) -> list[str]:
    """Return a table for 8 to 1024 GPUs: the same batch cut into shorter sequences, a whole sequence for each GPU."""
    lines = [
        wrap(
            "on paper, more GPUs: the same batch in shorter sequences (what then costs, apart from another recipe), or "
            "a whole sequence for each GPU (a larger batch). Speed is a multiple of 8 GPUs' tokens a second, zeros are "
            "a share of what is sent, communication is all of it.",
            "  ",
        ),
        f"{'':>7}{'same batch':>29}{'a sequence each':>22}",
        f"{'GPUs':>7}{'tokens each':>13}{'ms':>8}{'speed':>8}{'ms':>14}{'speed':>8}{'zeros':>8}{'communication':>14}",
    ]
    base = predict(config, 8, 1).step
    for devices in (8, 16, 32, 64, 128, 256, 512, 1024):
        same, larger = predict(config, devices, 8 / devices), predict(config, devices, 1)
        layout = _banks(config.model, devices)
        sent = sum(sum(bank.sizes) * bank.short * bank.long for bank in layout)
        filled = sum(sum(map(len, bank.members)) * bank.short * bank.long for bank in layout)
        ms = sum(c.ms(devices) for c in communication_plan(config, devices))
        lines.append(
            f"{devices:>7}{8 * 65536 // devices:>13,}{same.step:>8.1f}{base / same.step:>8.1f}"
            f"{larger.step:>14.1f}{base / larger.step * devices / 8:>8.1f}{1 - filled / sent:>8.0%}{ms:>11.1f} ms"
        )
    return lines


def _state_bytes(config: Config, devices: int) -> tuple[int, int]:
    """Return the number of parameters, and the bytes of them, of gradients and of a device's share of the moments."""
    params = jax.tree.leaves(parameter_shapes(config.model))
    count = sum(p.size for p in params)
    stored = sum(p.size * p.dtype.itemsize for p in params)
    hidden = config.model.matmul_parameters - config.model.padded_vocab_size * config.model.width
    moments = 2 * stored - hidden * FLOAT32  # Adam keeps two, Muon one
    # Several sequences on a device are summed in float32; a single one leaves gradients as parameters are stored.
    gradients = stored if config.sequences == devices else count * FLOAT32
    return count, stored + moments // devices + gradients


def _activation_bytes(config: Config) -> int:
    """Estimate what the backward pass of one sequence needs: each block's large arrays, in plain JAX."""
    model = config.model
    itemsize = BFLOAT16 if model.compute_dtype == "bfloat16" else FLOAT32
    # Residual stream, its two norms, q, k, v before and after norm and rotary, attention's output; MLP twice.
    per_token_and_layer = 4 * model.width + 6 * model.heads * model.head_width + 2 * model.mlp_width
    return config.sequence_length * model.layers * per_token_and_layer * itemsize


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
    """Return the FLOP of one matrix in one of the five steps: Gram matrix, its square, both times the matrix."""
    return 2 * bank.short**2 * (2 * bank.long + bank.short)
