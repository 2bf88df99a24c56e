"""A matmul that joins the residual stream on Hopper: hopper/matmul.py multiplies, the sum is made in registers."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from ..hopper.config import WARPGROUP_ROWS
from ..hopper.matmul import CONFIG, PART, Config, Epilogue, Values, matmul, row_sums
from ..hopper.primitives import rows


@functools.partial(jax.jit, static_argnames=("squares", "config"))  # lowered once, not once a layer
def matmul_add(
    x_TD: Array | tuple[Array, ...],
    w_ND: Array,
    term: tuple[Array | None, Array] | None = None,
    factor_T: Array | None = None,
    *,
    addend: tuple[Array, Array] | None = None,
    squares: bool = False,
    config: Config = CONFIG,
) -> tuple[Array, Array | None]:
    """Return f (x W^T + factor * addend) + factor * term, (T, N) bf16; shapes as `hopper.matmul` says.

    Args:
      x_TD, w_ND: bf16. x may be in several arrays of equal shape, side by side.
      term: the factor of every row, (T,) float32, or None for 1, and a (T, N) bf16 array; their product is rounded to
        bf16 before the matmul joins it.
      factor_T: f, float32; None for 1.
      addend: a (T, N) bf16 array and the factor of every row, added in float32.
      squares: return as well, (parts, T) float32, parts of every row's sum of squares.
    """
    shape = (WARPGROUP_ROWS, PART)
    weight_T, term_TN = term or (None, None)

    def keep(row_values: Values, part: Array) -> Array:
        return part if weight_T is None else part.astype(jnp.float32) * rows(row_values[0], shape)

    def finish(acc: Values, row_values: Values, narrow: Values, kept: Values) -> tuple[Values, Values]:
        del narrow
        result = acc if factor_T is None else [part * rows(row_values[-1], shape) for part in acc]
        if kept:
            result = [a + b.astype(jnp.float32) for a, b in zip(result, kept, strict=True)]
        return result, [row_sums(part * part for part in result)] if squares else []

    epilogue = Epilogue(
        finish,
        rows=[values for values in (weight_T, factor_T) if values is not None],
        tile=term_TN,
        keep=keep,
        addend=addend,
        unit=config.columns // PART if squares else 1,
        row_results=int(squares),
    )
    result_TN, *sums = matmul("matmul_add", x_TD, w_ND, epilogue, config=config)
    return result_TN, sums[0] if squares else None
