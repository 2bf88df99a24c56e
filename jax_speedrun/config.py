"""What is trained: the recipe's numbers, the presets, and the peak rates of the devices it runs on.

`sub3min` is the record of 16 January 2025; the other presets differ only in
what their definition below names.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp

from .errors import UsageError
from .kernels import attention, head
from .kernels.block_mask import BLOCK_SIZE
from .kernels.head import HeadPrecision, fp8_supported
from .kernels.implementation import Implementation, choose
from .kernels.layer.mlp import unsupported as mlp_unsupported
from .kernels.layer.self_attention import unsupported as self_attention_unsupported

ComputeDtype = Literal["bfloat16", "float32"]

ATTENTION_SCALE = 0.12
NORM_EPSILON = float(jnp.finfo(jnp.float32).eps)  # PyTorch's default, also for bfloat16 input
ROTARY_BASE = 1024
KERNELS: tuple[Implementation, ...] = ("auto", "hopper", "xla")
"""Implementations of everything but attention."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of the model."""

    vocab_size: int = 50257
    padded_vocab_size: int = 50304
    layers: int = 12
    width: int = 768
    heads: int = 6
    head_width: int = 128
    mlp_width: int = 3072
    long_layers: tuple[int, ...] = (0, 4, 11)
    """Layers that attend with the long window; all others take the short one."""
    attention_free_layers: tuple[int, ...] = (7,)
    value_embedding_tables: int = 3
    """Tables added to the values of the first and, again, of the last so many layers."""
    table_dtype: ComputeDtype = "bfloat16"
    """Storage of the four embedding tables and of their Adam moments."""
    compute_dtype: ComputeDtype = "bfloat16"
    head_precision: HeadPrecision = "fp8"
    """Rounding of the head's matmuls in training."""
    evaluation_precision: HeadPrecision = "bfloat16"
    """The same in evaluation and sampling."""

    def value_embedding_of(self, layer: int) -> int | None:
        """Which value-embedding table layer `layer` mixes into its values, if any."""
        from_end = layer - (self.layers - self.value_embedding_tables)
        if layer < self.value_embedding_tables:
            return layer
        return from_end if from_end >= 0 else None

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token multiplies: hidden matrices and head, without the tables."""
        channels = self.heads * self.head_width
        attention = (self.layers - len(self.attention_free_layers)) * 4 * channels * self.width
        return attention + self.layers * 2 * self.mlp_width * self.width + self.padded_vocab_size * self.width

    def attention_flops(self, long_pairs: int, short_pairs: int) -> int:
        """FLOP of attention, forward and backward, over so many visible (query, key) pairs of each mask.

        As for parameters, the backward pass counts twice: 4 FLOP a pair and channel forward (q k^T and weights times
        v), 8 backward. What a kernel computes once more, and what its blocks compute beyond the mask, does not count.
        """
        attending = set(range(self.layers)) - set(self.attention_free_layers)
        pairs = sum(long_pairs if layer in self.long_layers else short_pairs for layer in attending)
        return 12 * self.heads * self.head_width * pairs


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates, and what else moves over the run; the shapes of the schedules are in optimizer.py."""

    muon_learning_rate: float = 0.05
    head_learning_rate: float = 0.008
    embedding_learning_rate: float = 0.6
    scalar_learning_rate: float = 0.04
    momentum_warmup_steps: int = 300
    """Muon's momentum goes from 0.85 to 0.95 over so many steps."""
    window_tokens: int = 1728
    """The attention window grows linearly from 0 to this, rounded up to whole blocks of 128."""
    newton_schulz_dtype: ComputeDtype = "bfloat16"
    update_dtype: ComputeDtype = "bfloat16"
    """Adam's updates of head and tables are rounded to this before they travel, on any number of devices."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run, fully resolved: what config.json records and a checkpoint must agree with."""

    preset: str
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1385
    sequences: int = 8
    """Sequences a step, over all devices."""
    sequence_length: int = 65536
    validation_tokens: int = 10_485_760
    validation_every: int = 125
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one at the end only."""
    epochs: int = 1
    """How often the data may be gone through."""
    seed: int = 0
    attention: Implementation = "auto"
    """Implementation of attention."""
    kernels: Implementation = "auto"
    """Implementation of everything else, one of `KERNELS`."""

    def __post_init__(self) -> None:
        if self.sequence_length <= 0 or self.sequence_length % BLOCK_SIZE:
            raise UsageError(
                f"--sequence-length must be a positive multiple of {BLOCK_SIZE}, got {self.sequence_length}"
            )
        for option, value, largest in (
            ("--steps", self.steps, 2**31 - 1),
            ("--sequences", self.sequences, 2**16),
            ("--sequence-length", self.sequence_length, 2**31 - BLOCK_SIZE),
            ("--validation-every", self.validation_every, 2**31 - 1),
            ("--epochs", self.epochs, 2**31 - 1),
        ):
            if not 1 <= value <= largest:
                raise UsageError(f"{option} must be at least 1 and at most {largest}, got {value}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed must be between 0 and {2**32 - 1}, got {self.seed}")
        if self.checkpoint_every < 0:
            raise UsageError(f"--checkpoint-every must be 0 (at the end only) or more, got {self.checkpoint_every}")

    @property
    def tokens_per_step(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def matmul_flops(self) -> int:
        """FLOP of a step's matmuls: 6 a parameter and token, 2 of them forward. Without attention and optimisers."""
        return 6 * self.model.matmul_parameters * self.tokens_per_step


_TINY_MODEL = ModelConfig(
    layers=6,
    width=64,
    heads=2,
    head_width=32,
    mlp_width=256,
    long_layers=(0, 2, 5),
    attention_free_layers=(3,),
    table_dtype="float32",
    compute_dtype="float32",
    head_precision="float32",
    evaluation_precision="float32",
)

CHECKPOINT_EVERY = 250
"""Steps of the record: half a minute of it on 8 GPUs, 4 to 5 on one, which is what a kill may cost. A save is 1.9 GB:
it stops the host for 1.1 to 1.7 s and is complete 4 s later, while steps go on at their usual rate (docs/lab-book.md).
It comes with every second validation, when the clock stands still."""

PRESETS = {
    "sub3min": Config("sub3min", checkpoint_every=CHECKPOINT_EVERY),
    "eighth": Config("eighth", sequences=1, checkpoint_every=CHECKPOINT_EVERY),
    "tiny": Config(
        "tiny",
        model=_TINY_MODEL,
        # The narrow head needs larger steps to move its logits as far. Scalars get smaller ones: noise decides their
        # first (docs/lab-book.md), and any number of devices should give the same losses.
        optimizer=OptimizerConfig(
            head_learning_rate=0.03,
            scalar_learning_rate=0.01,
            momentum_warmup_steps=20,
            window_tokens=640,
            newton_schulz_dtype="float32",
            update_dtype="float32",
        ),
        steps=24,
        sequence_length=1024,
        validation_tokens=16384,
        validation_every=6,
        checkpoint_every=12,
    ),
}
"""`sub3min`: the record. `eighth`: one of its eight sequences a step. `tiny`: every part of it on two CPU cores."""


def resolve(config: Config, device: jax.Device) -> Config:
    """The run as `device` can do it: FP8 emulated where the hardware lacks it, `auto` attention and kernels named."""
    model = config.model
    if model.head_precision == "fp8" and not fp8_supported(device):
        model = dataclasses.replace(model, head_precision="fp8_emulated")
    resolved = dataclasses.replace(config, model=model)
    attention_name = _choose(
        "attention",
        config.attention,
        lambda: attention.unsupported(jnp.dtype(model.compute_dtype), model.head_width, BLOCK_SIZE, ATTENTION_SCALE),
        device,
        get_args(Implementation),
    )
    resolved = dataclasses.replace(resolved, attention=attention_name)
    return dataclasses.replace(
        resolved, kernels=_choose("kernels", config.kernels, lambda: _kernels_unsupported(resolved), device, KERNELS)
    )


def _choose(
    option: str,
    name: Implementation,
    unsupported: Callable[[], str | None],
    device: jax.Device,
    names: tuple[Implementation, ...],
) -> Implementation:
    try:
        return choose(f"--{option} {name}", name, unsupported, device=device, names=names)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _kernels_unsupported(config: Config) -> str | None:
    """Return what the kernels of everything but attention need of a run, None where they have it."""
    model, tokens, dtype = config.model, config.sequence_length, jnp.dtype(config.model.compute_dtype)
    if config.attention != "hopper":
        return f"--attention hopper, got {config.attention}"
    channels = model.heads * model.head_width
    return (
        head.unsupported(model.head_precision, tokens, model.padded_vocab_size, model.width)
        or mlp_unsupported(dtype, tokens, model.width, model.mlp_width)
        or self_attention_unsupported(dtype, tokens, model.width, channels, model.head_width, model.head_width // 4)
    )


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """Invert `to_dict`. Raises UsageError for what another version of the program has written, and this one has not."""

    def build[T](kind: type[T], values: dict[str, Any]) -> T:
        fields = {field.name for field in dataclasses.fields(cast(Any, kind))}
        if others := sorted(fields ^ values.keys()):
            raise UsageError(
                f"a configuration of another version of this program: {', '.join(others)} "
                f"{'is' if len(others) == 1 else 'are'} not in both; go on with the version that wrote it"
            )
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    nested = {
        "model": build(ModelConfig, values.get("model", {})),
        "optimizer": build(OptimizerConfig, values.get("optimizer", {})),
    }
    return build(Config, {**values, **nested})


HOST_FIELDS = frozenset({"preset", "seed", "epochs", "checkpoint_every", "validation_every", "validation_tokens"})
"""Fields that compiled functions do not depend on, except through the shapes of their arguments."""


def cache_key(config: Config) -> str:
    """Return what the compiled functions of a run depend on, for `ProgramCache`: every field but `HOST_FIELDS`."""
    return repr({name: value for name, value in vars(config).items() if name not in HOST_FIELDS})


RUN_FIELDS = frozenset({"preset", "attention", "kernels", "checkpoint_every", "validation_every", "validation_tokens"})
"""Fields that may change when a run is resumed; all others are the recipe."""


def recipe_differences(saved: Config, wanted: Config) -> list[str]:
    """The fields of the recipe in which two runs differ, as `name (saved -> wanted)`."""

    def flat(config: Config) -> dict[str, object]:
        values = to_dict(config)
        nested = {f"{group}.{k}": v for group in ("model", "optimizer") for k, v in values.pop(group).items()}
        return {k: v for k, v in {**values, **nested}.items() if k not in RUN_FIELDS}

    old, new = flat(saved), flat(wanted)
    return [f"{name} ({old[name]} -> {new[name]})" for name in old if old[name] != new[name]]


PEAK_BF16_TFLOPS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense bfloat16 rate with float32 accumulation, TFLOP/s, from the vendor's data sheets; first match counts."""


def peak_flops(device: jax.Device) -> float | None:
    """Datasheet FLOP/s of one device in bfloat16, or None where the table has none."""
    for name, tflops in PEAK_BF16_TFLOPS.items():
        if name.lower() in device.device_kind.lower():
            return tflops * 1e12
    return None
