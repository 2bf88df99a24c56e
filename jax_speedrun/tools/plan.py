"""What a run will be, before anything is compiled: devices, batch layout, tokens, memory."""

import jax
from jax.sharding import Mesh

from ..config import Config
from ..kernels.implementation import slow_kernels_note
from .communication import parameter_shapes

FLOAT32, BFLOAT16 = 4, 2


def describe(config: Config, mesh: Mesh) -> str:
    """Several lines of text at the head of a run; `communication.describe_scaling` says more."""
    device = mesh.devices.flat[0]
    local = config.sequences // mesh.size
    parameters, state_bytes = _state_bytes(config, mesh.size)
    activation_bytes = _activation_bytes(config)
    lines = [
        f"preset:     {config.preset}",
        f"devices:    {mesh.size} x {device.device_kind} ({device.platform}), mesh axis 'data'",
        f"batch:      {config.sequences} sequence(s) of {config.sequence_length:,} tokens a step, "
        f"{local} on each device" + (", one after the other" if local > 1 else ""),
        f"tokens:     {config.tokens_per_step:,} a step x {config.steps:,} steps = "
        f"{config.tokens_per_step * config.steps:,}",
        f"model:      {parameters / 1e6:.1f} M parameters, of which {config.model.matmul_parameters / 1e6:.1f} M "
        f"in matmuls; {config.matmul_flops / 1e12:.2f} TFLOP a step "
        "without attention",
        f"attention:  {config.attention}; head matmuls in {config.model.head_precision}",
        *([f"note:       {note}"] if (note := slow_kernels_note(config.attention)) else []),
        f"memory:     about {(state_bytes + activation_bytes) / 2**30:.1f} GiB a device: "
        f"{state_bytes / 2**30:.1f} parameters, gradients and optimiser state, "
        f"{activation_bytes / 2**30:.1f} activations of one sequence",
    ]
    return "\n".join(lines)


def _state_bytes(config: Config, devices: int) -> tuple[int, int]:
    """Number of parameters, and the bytes of parameters, gradients and a device's share of the moments."""
    params = jax.tree.leaves(parameter_shapes(config.model))
    count = sum(p.size for p in params)
    stored = sum(p.size * p.dtype.itemsize for p in params)
    hidden = config.model.matmul_parameters - config.model.padded_vocab_size * config.model.width
    moments = 2 * stored - hidden * FLOAT32  # Adam keeps two, Muon one
    # Several sequences on a device are summed in float32; a single one leaves gradients as parameters are stored.
    gradients = stored if config.sequences == devices else count * FLOAT32
    return count, stored + moments // devices + gradients


def _activation_bytes(config: Config) -> int:
    """What the backward pass of one sequence needs: an estimate that counts each block's large arrays, plain path."""
    model = config.model
    itemsize = BFLOAT16 if model.compute_dtype == "bfloat16" else FLOAT32
    # Residual stream, its two norms, q, k, v before and after norm and rotary, attention's output; MLP twice.
    per_token_and_layer = 4 * model.width + 6 * model.heads * model.head_width + 2 * model.mlp_width
    return config.sequence_length * model.layers * per_token_and_layer * itemsize
