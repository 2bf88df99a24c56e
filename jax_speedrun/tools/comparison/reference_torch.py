"""The recipe in PyTorch, to compare with: the same model, names and numbers as jax_speedrun.

Trains what `scripts/train.py --preset eighth` trains on one GPU, or `--preset sub3min` on as many as torchrun
starts processes, as fast as PyTorch's own means allow: torch.compile, FlexAttention over block lists, an FP8
head, Muon batched over equal shapes and split over the GPUs, fused Adam. reference_run.py trains it, compare.py
measures it. Imports PyTorch and nothing else. Read it beside config.py, block_mask.py, model.py, head/op.py, muon.py
and optimizer.py. Names carry shapes: T tokens, D model width, H heads, K head width, C = H K, F MLP width,
V vocab, N matrices or sequences.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

BLOCK_SIZE = 128
DOCUMENT_START = 50256
ATTENTION_SCALE = 0.12
NORM_EPSILON = torch.finfo(torch.float32).eps
ROTARY_BASE = 1024
CAP, TEMPERATURE = 30.0, 7.5
X_SCALE, W_SCALE, GRADIENT_SCALE = 2.0, 32.0, 2.0**13
QUINTIC = (3.4445, -4.7750, 2.0315)
EAGER_HEAD_CHUNKS = 8


# --- Numbers: as in config.py, which says what each means --------------------------


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 50257
    padded_vocab_size: int = 50304
    layers: int = 12
    width: int = 768
    heads: int = 6
    head_width: int = 128
    mlp_width: int = 3072
    long_layers: tuple[int, ...] = (0, 4, 11)
    attention_free_layers: tuple[int, ...] = (7,)
    value_embedding_tables: int = 3
    table_dtype: str = "bfloat16"
    compute_dtype: str = "bfloat16"
    head_precision: str = "fp8"
    evaluation_precision: str = "bfloat16"

    def value_embedding_of(self, layer: int) -> int | None:
        from_end = layer - (self.layers - self.value_embedding_tables)
        if layer < self.value_embedding_tables:
            return layer
        return from_end if from_end >= 0 else None


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    muon_learning_rate: float = 0.05
    head_learning_rate: float = 0.008
    embedding_learning_rate: float = 0.6
    scalar_learning_rate: float = 0.04
    momentum_warmup_steps: int = 300
    window_tokens: int = 1728
    newton_schulz_dtype: str = "bfloat16"


# --- Masks --------------------------------------------------------------------------


def dense_to_ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts and indices of the true columns of each row, nearest (highest) first: (B,) and (B, B) int32."""
    columns = dense.shape[-1]
    order = torch.argsort((~dense).flip(-1).int(), dim=-1, stable=True)
    return dense.sum(-1, dtype=torch.int32), (columns - 1 - order).int()


def long_short_masks(tokens_T: Tensor, window_blocks: Tensor) -> tuple[BlockMask, BlockMask]:
    """Return the two masks of a sequence.

    The window, an int32 scalar tensor, only clamps the counts: nothing recompiles.
    """
    documents_T = (tokens_T == DOCUMENT_START).cumsum(0, dtype=torch.int32)

    def mask_function(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_T[query] == documents_T[key])

    first, last = documents_T[::BLOCK_SIZE], documents_T[BLOCK_SIZE - 1 :: BLOCK_SIZE]
    block = torch.arange(first.shape[0], device=tokens_T.device)
    query, key = block[:, None], block
    shares_document = (first[:, None] <= last) & (first <= last[:, None])
    one_document = first == last
    visited = (query >= key) & shares_document
    full = (query > key) & one_document[:, None] & one_document & (first[:, None] == first)
    partial_counts, partial_indices = dense_to_ordered(visited & ~full)
    full_counts, full_indices = dense_to_ordered(full)

    def windowed(window: Tensor) -> BlockMask:
        partial = torch.minimum(partial_counts, (window - full_counts).clamp_min(1))
        full = torch.minimum(full_counts, (window - 1).clamp_min(0))
        lists = [x[None, None].contiguous() for x in (partial, partial_indices, full, full_indices)]
        return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK_SIZE, mask_mod=mask_function)

    return windowed(window_blocks), windowed(window_blocks // 2)


def dense_mask(mask: BlockMask) -> Tensor:
    """Return the token-level (T, T) boolean matrix.

    Full blocks satisfy the mask function, so it may be applied to them too.
    """
    visited = mask.to_dense()[0, 0].bool()
    tokens = torch.arange(visited.shape[0] * BLOCK_SIZE, device=visited.device)
    visible = visited.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)
    return visible & mask.mask_mod(tokens, tokens, tokens[:, None], tokens)


# FlexAttention needs compiling also where the rest runs eagerly: without, it forms all T x T scores.
_flex_attention = torch.compile(flex_attention, dynamic=False)


def block_sparse_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, mask: BlockMask) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_THK, v_THK))
    if q.is_cuda:
        y = _flex_attention(q, k, v, block_mask=mask, scale=ATTENTION_SCALE)
    else:  # FlexAttention has no backward pass on a CPU
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(mask), scale=ATTENTION_SCALE)
    return y[0].transpose(0, 1)


# --- The head -----------------------------------------------------------------------


def fp8_supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


# Compiled on their own, since to the compiled model around them a custom op is opaque.
@torch.compile(dynamic=False)
def _fp8_matmul(x_TD: Tensor, w_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x8_TD = (x_TD * X_SCALE).to(torch.float8_e4m3fn)
    w8_VD = (w_VD * W_SCALE).to(torch.float8_e4m3fn)
    z_TV = torch._scaled_mm(
        x8_TD,
        w8_VD.t(),
        scale_a=_scalar(1 / X_SCALE, x_TD),
        scale_b=_scalar(1 / W_SCALE, x_TD),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return z_TV, x8_TD, w8_VD


@torch.compile(dynamic=False)
def _fp8_gradients(d_z_TV: Tensor, x8_TD: Tensor, w8_VD: Tensor, gradient_scale: float) -> tuple[Tensor, Tensor]:
    d8_TV = (d_z_TV * gradient_scale).to(torch.float8_e5m2)
    scale = _scalar(1 / gradient_scale, d_z_TV)
    # The second operand of an FP8 matmul must be stored by columns.
    d_x_TD = torch._scaled_mm(
        d8_TV,
        _by_columns(w8_VD),
        scale_a=scale,
        scale_b=_scalar(1 / W_SCALE, d_z_TV),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    d_w_DV = torch._scaled_mm(
        x8_TD.t().contiguous(),
        _by_columns(d8_TV),
        scale_a=_scalar(1 / X_SCALE, d_z_TV),
        scale_b=scale,
        out_dtype=torch.float32,
        use_fast_accum=False,
    )
    return d_x_TD, d_w_DV


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


@torch.library.custom_op("speedrun::fp8_head", mutates_args=())
def fp8_head(x_TD: Tensor, w_VD: Tensor, gradient_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x W^T in bfloat16, and the two FP8 operands for the backward pass."""
    return _fp8_matmul(x_TD, w_VD)


@fp8_head.register_fake
def _(x_TD: Tensor, w_VD: Tensor, gradient_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    z_TV = x_TD.new_empty((x_TD.shape[0], w_VD.shape[0]), dtype=torch.bfloat16)
    return z_TV, torch.empty_like(x_TD, dtype=torch.float8_e4m3fn), torch.empty_like(w_VD, dtype=torch.float8_e4m3fn)


@torch.library.custom_op("speedrun::fp8_head_backward", mutates_args=())
def fp8_head_backward(d_z_TV: Tensor, x8_TD: Tensor, w8_VD: Tensor, gradient_scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (bfloat16) and, transposed, of W (float32)."""
    return _fp8_gradients(d_z_TV.contiguous(), x8_TD, w8_VD, gradient_scale)


@fp8_head_backward.register_fake
def _(d_z_TV: Tensor, x8_TD: Tensor, w8_VD: Tensor, gradient_scale: float) -> tuple[Tensor, Tensor]:
    d_x_TD = torch.empty_like(x8_TD, dtype=torch.bfloat16)
    return d_x_TD, w8_VD.new_empty(w8_VD.shape[::-1], dtype=torch.float32)


def _fp8_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.gradient_scale = inputs[2]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _fp8_backward(ctx: torch.autograd.function.FunctionCtx, d_z_TV: Tensor, *_: None) -> tuple[Tensor, Tensor, None]:
    d_x_TD, d_w_DV = fp8_head_backward(d_z_TV, *ctx.saved_tensors, ctx.gradient_scale)
    return d_x_TD, d_w_DV.t(), None


fp8_head.register_autograd(_fp8_backward, setup_context=_fp8_setup)


def head_loss(x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, precision: str, chunks: int = 1) -> Tensor:
    """Return the mean cross-entropy of the capped logits.

    `chunks` > 1 forms them piecewise, twice, so that they fit eagerly.
    """
    tokens = x_TD.shape[0]

    def total(x_TD: Tensor, targets_T: Tensor) -> Tensor:
        if precision == "fp8":
            z_TV = fp8_head(x_TD, head_VD, GRADIENT_SCALE * tokens)[0]
        else:
            dtype = getattr(torch, precision)
            z_TV = x_TD.to(dtype) @ head_VD.to(dtype).t()
        logits_TV = CAP * torch.sigmoid(z_TV.float() / TEMPERATURE)
        return F.cross_entropy(logits_TV, targets_T.long(), reduction="sum") / tokens

    if chunks == 1:
        return total(x_TD, targets_T)
    pieces = zip(x_TD.chunk(chunks), targets_T.chunk(chunks), strict=True)
    return torch.stack([checkpoint(total, *piece, use_reentrant=False) for piece in pieces]).sum()


# --- The model ----------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPSILON)


def rotary_angles(tokens: int, head_width: int, device: torch.device) -> Tensor:
    """Return the angles (T, K / 2), of which the upper half is 0."""
    rotated = head_width // 4
    frequencies = (1 / ROTARY_BASE) ** torch.linspace(0, 1, rotated, dtype=torch.float32, device=device)
    frequencies = torch.cat([frequencies, frequencies.new_zeros(rotated)])
    return torch.arange(tokens, dtype=torch.float32, device=device)[:, None] * frequencies


def rotate(x_THK: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x_THK.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x_THK.dtype)


def mix(weights: Iterable[Tensor | float], *values: Tensor) -> Tensor:
    """Return sum_i weights[i] values[i] in float32, in the values' dtype."""
    total = sum(weight * value.float() for weight, value in zip(weights, values, strict=True))
    return total.to(values[0].dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def uniform_matrix(*shape: int) -> Tensor:
    bound = math.sqrt(3) * 0.5 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        channels = config.heads * config.head_width
        self.qkv_3CD = nn.Parameter(uniform_matrix(3, channels, config.width))
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.out_DC = nn.Parameter(torch.zeros(config.width, channels))

    def forward(self, x_TD: Tensor, value_embedding_TC: Tensor | None, mask: BlockMask, angles: Tensor) -> Tensor:
        q_TC, k_TC, v_TC = linear(x_TD, self.qkv_3CD.flatten(0, 1)).chunk(3, dim=-1)
        if value_embedding_TC is None:
            v_TC = mix(self.lambdas[:1], v_TC)
        else:
            v_TC = mix(self.lambdas, v_TC, value_embedding_TC)
        q_THK, k_THK, v_THK = (x.unflatten(-1, (self.heads, -1)) for x in (q_TC, k_TC, v_TC))
        q_THK, k_THK = rotate(norm(q_THK), angles), rotate(norm(k_THK), angles)
        y_THK = block_sparse_attention(q_THK, k_THK, v_THK, mask)
        return linear(y_THK.flatten(-2), self.out_DC)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc_FD = nn.Parameter(uniform_matrix(config.mlp_width, config.width))
        self.proj_DF = nn.Parameter(torch.zeros(config.width, config.mlp_width))

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(F.relu(linear(x_TD, self.fc_FD)).square(), self.proj_DF)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.attention = None if layer in config.attention_free_layers else Attention(config)
        self.mlp = MLP(config)

    def forward(
        self, x_TD: Tensor, x0_TD: Tensor, value_embedding_TC: Tensor | None, mask: BlockMask, angles: Tensor
    ) -> Tensor:
        x_TD = mix(self.lambdas, x_TD, x0_TD)
        if self.attention is not None:
            x_TD = x_TD + self.attention(norm(x_TD), value_embedding_TC, mask, angles)
        return x_TD + self.mlp(norm(x_TD))


class GPT(nn.Module):
    """Parameters are named as in model.py, with dots: `blocks.0.attention.qkv_3CD`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

        def table(width: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(config.vocab_size, width).to(getattr(torch, config.table_dtype)))

        self.embed = table(config.width)
        channels = config.heads * config.head_width
        self.value_embeds = nn.ParameterList(table(channels) for _ in range(config.value_embedding_tables))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.skip_weights = nn.Parameter(torch.ones(config.layers // 2))
        self.head = nn.Parameter(torch.zeros(config.padded_vocab_size, config.width))

    def hidden(self, tokens_T: Tensor, window_blocks: Tensor) -> Tensor:
        config, dtype = self.config, getattr(torch, self.config.compute_dtype)
        long_mask, short_mask = long_short_masks(tokens_T, window_blocks)
        angles = rotary_angles(tokens_T.shape[0], config.head_width, tokens_T.device)
        values = [F.embedding(tokens_T, table).to(dtype) for table in self.value_embeds]
        x_TD = x0_TD = norm(F.embedding(tokens_T, self.embed).to(dtype))

        skips: list[Tensor] = []
        half = config.layers // 2
        for layer, block in enumerate(self.blocks):
            if layer >= half:
                x_TD = mix((1.0, self.skip_weights[layer - half]), x_TD, skips.pop())
            table_index = config.value_embedding_of(layer)
            value_embedding_TC = None if table_index is None else values[table_index]
            mask = long_mask if layer in config.long_layers else short_mask
            x_TD = block(x_TD, x0_TD, value_embedding_TC, mask, angles)
            if layer < half:
                skips.append(x_TD)
        return norm(x_TD)

    def forward(
        self, tokens_T: Tensor, targets_T: Tensor, window_blocks: Tensor, head_precision: str, head_chunks: int = 1
    ) -> Tensor:
        """Return the mean cross-entropy in nats, a float32 scalar."""
        x_TD = self.hidden(tokens_T, window_blocks)
        return head_loss(x_TD, self.head, targets_T, head_precision, head_chunks)


# --- Optimisers ---------------------------------------------------------------------


def newton_schulz(x_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Roughly orthogonalise matrices with rows <= columns; muon.py explains it."""
    a, b, c = QUINTIC
    x = x_NRC.to(dtype)
    x = (x.float() / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, inner, x, beta=a)
    return x


def _lay_down(matrices: Tensor) -> Tensor:
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def stack_gradients(gradients: list[Tensor], padded: int) -> Tensor:
    """Return all matrices of a shape or its transpose as one stack, filled up with zeros to `padded` of them."""
    shape = sorted(gradients[0].shape[-2:])
    gradient_NRC = torch.cat([_lay_down(g).reshape(-1, *shape) for g in gradients])
    return F.pad(gradient_NRC, (0, 0, 0, 0, 0, padded - gradient_NRC.shape[0]))


def orthogonal_momentum(gradient_NRC: Tensor, buffer_NRC: Tensor, momentum: Tensor, dtype: str) -> Tensor:
    buffer_NRC.lerp_(gradient_NRC, 1 - momentum)
    return newton_schulz(torch.lerp(gradient_NRC, buffer_NRC, momentum), getattr(torch, dtype))


def apply_update(parameters: list[Tensor], o_NRC: Tensor, rate: Tensor) -> None:
    counts = [p.numel() // o_NRC[0].numel() for p in parameters]
    parts = o_NRC[: sum(counts)].float().split(counts)
    for p, o in zip(parameters, parts, strict=True):
        tall = p.shape[-2] > p.shape[-1]
        scale = math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
        p.sub_((rate * scale) * (o.mT if tall else o).reshape(p.shape))


def muon_update(
    parameters: list[Tensor], gradients: list[Tensor], buffer_NRC: Tensor, rate: Tensor, momentum: Tensor, dtype: str
) -> None:
    """Make one step, in place, of one process alone."""
    gradient_NRC = stack_gradients(gradients, buffer_NRC.shape[0])
    apply_update(parameters, orthogonal_momentum(gradient_NRC, buffer_NRC, momentum, dtype), rate)


class Muon:
    """Muon over stacks: Newton-Schulz runs once per distinct shape, tall matrices lying down beside the wide ones.

    With several processes each owns a share of every stack: gradients are averaged and scattered,
    orthogonalised in shares, and the results gathered.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: str, *, compile: bool):
        members: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for p in parameters:
            short, long = sorted(p.shape[-2:])
            members[short, long].append(p)
        self.dtype = dtype

        def maybe_compiled(function: Any) -> Any:
            return torch.compile(function, dynamic=False) if compile else function

        self.update = maybe_compiled(muon_update)
        self.stack, self.orthogonalise, self.apply = map(
            maybe_compiled, (stack_gradients, orthogonal_momentum, apply_update)
        )
        self.stacks = []
        for (short, long), group in members.items():
            count = sum(p.numel() for p in group) // (short * long)
            self.stacks.append((group, group[0].new_zeros(-(-count // processes()), short, long)))

    @torch.no_grad()
    def step(self, rate: float, momentum: float) -> None:
        for group, buffer_NRC in self.stacks:
            gradients = [p.grad for p in group]
            # Numbers that change every step go in as tensors, or each would be compiled in.
            rate_, momentum_ = _scalar(rate, buffer_NRC), _scalar(momentum, buffer_NRC)
            if processes() == 1:
                self.update(group, gradients, buffer_NRC, rate_, momentum_, self.dtype)
                continue
            gradient_NRC = self.stack(gradients, processes() * buffer_NRC.shape[0])
            share_NRC = torch.empty_like(buffer_NRC)
            dist.reduce_scatter_tensor(share_NRC, gradient_NRC)
            o_NRC = self.orthogonalise(share_NRC / processes(), buffer_NRC, momentum_, self.dtype)
            all_NRC = o_NRC.new_empty(gradient_NRC.shape)
            dist.all_gather_into_tensor(all_NRC, o_NRC.contiguous())
            self.apply(group, all_NRC, rate_)


def processes() -> int:
    """Return how many train together: one a GPU under torchrun, else this one alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors: list[Tensor]) -> None:
    """Take the mean over all processes, in place."""
    if processes() > 1:
        for handle in [dist.all_reduce(x, async_op=True) for x in tensors]:
            handle.wait()
        torch._foreach_div_(tensors, processes())


def learning_rate_factor(step: int, steps: int, cooldown_fraction: float = 0.4, final: float = 0.1) -> float:
    weight = min(max((1 - step / steps) / cooldown_fraction, 0.0), 1.0)
    return weight + (1 - weight) * final


def momentum_at(step: int, warmup_steps: int) -> float:
    return 0.85 + 0.1 * min(step / warmup_steps, 1.0)


def window_blocks(step: int, steps: int, final_window_tokens: int) -> int:
    return max(-(-(final_window_tokens * step) // (BLOCK_SIZE * steps)), 1)


# --- Training -----------------------------------------------------------------------


class Training:
    """Model and optimisers. `compile=False` runs the same arithmetic eagerly, for comparing roundings."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        steps: int,
        *,
        seed: int = 0,
        device: torch.device,
        compile: bool = True,
    ):
        torch.manual_seed(seed)
        self.config, self.rates, self.steps, self.device = model, optimizer, steps, device
        self.model = GPT(model).to(device)
        self.head_chunks = 1 if compile else EAGER_HEAD_CHUNKS
        self.loss = torch.compile(self.model, dynamic=False) if compile else self.model

        hidden: list[nn.Parameter] = []
        scalars: list[nn.Parameter] = []
        tables: list[nn.Parameter] = []
        for name, p in self.model.named_parameters():
            if name == "head":
                continue
            group = tables if name.startswith(("embed", "value_embeds")) else hidden if p.ndim >= 2 else scalars
            group.append(p)
        self.muon = Muon(hidden, optimizer.newton_schulz_dtype, compile=compile)
        self.adam_parameters = [self.model.head, *tables, *scalars]
        peaks = (
            ([self.model.head], optimizer.head_learning_rate),
            (tables, optimizer.embedding_learning_rate),
            (scalars, optimizer.scalar_learning_rate),
        )
        groups = [{"params": params, "lr": peak, "peak": peak} for params, peak in peaks]
        self.adam = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-10, fused=True)

    def window(self, step: int) -> int:
        """Return the long window in blocks."""
        return window_blocks(step, self.steps, self.rates.window_tokens)

    def window_tokens(self, step: int) -> int:
        return BLOCK_SIZE * self.window(step)

    def muon_rate(self, step: int) -> float:
        return self.rates.muon_learning_rate * learning_rate_factor(step, self.steps)

    def _window_tensor(self, blocks: int) -> Tensor:
        return torch.full((), blocks, dtype=torch.int32, device=self.device)

    def micro_step(self, tokens_T: Tensor, targets_T: Tensor, window: int) -> Tensor:
        """Run forward and backward of one sequence. Gradients are added to what `.grad` holds."""
        loss = self.loss(tokens_T, targets_T, self._window_tensor(window), self.config.head_precision, self.head_chunks)
        loss.backward()
        return loss.detach()

    def update(self, step: int) -> None:
        """Run the optimisers, with the schedules' values at `step`, on the gradients' mean over all processes."""
        average([p.grad for p in self.adam_parameters])
        factor = learning_rate_factor(step, self.steps)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        self.adam.step()
        momentum = momentum_at(step, self.rates.momentum_warmup_steps)
        self.muon.step(self.muon_rate(step), momentum)

    def step(self, tokens_NT: Tensor, targets_NT: Tensor, step: int) -> Tensor:
        """Make one training step on this process's sequences; return the loss before it, over all, not waited for."""
        sequences = list(zip(tokens_NT, targets_NT, strict=True))
        loss = torch.stack([self.micro_step(*pair, self.window(step)) for pair in sequences]).mean()
        if len(sequences) > 1:
            torch._foreach_div_([p.grad for p in self.model.parameters()], len(sequences))
        average([loss])
        self.update(step)
        self.model.zero_grad(set_to_none=True)
        return loss

    @torch.no_grad()
    def evaluate(self, tokens_NT: Tensor, targets_NT: Tensor, step: int) -> float:
        """Return the mean loss of sequences that the processes share."""
        window = self._window_tensor(self.window(step))
        precision = self.config.evaluation_precision
        rank = dist.get_rank() if dist.is_initialized() else 0
        share = zip(tokens_NT[rank :: processes()], targets_NT[rank :: processes()], strict=True)
        total = torch.zeros((), device=self.device)
        for pair in share:
            total += self.loss(*pair, window, precision, self.head_chunks)
        average([total])
        return total.item() * processes() / len(tokens_NT)
