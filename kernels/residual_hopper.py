"""A product that joins the residual stream on Hopper: product_hopper.py multiplies, the sum is made in registers."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from .attention_hopper_ops import rows
from .product_hopper import CONFIG, HALF, PART, Config, Epilogue, Values, product, row_sums


@functools.partial(jax.jit, static_argnames=("squares", "config", "interpret"))  # lowered once, not once a layer
def sum_product(
    x_TD: Array | tuple[Array, ...],
    w_ND: Array,
    terms: tuple[tuple[Array | None, Array], ...] = (),
    factor_T: Array | None = None,
    *,
    squares: bool = False,
    config: Config = CONFIG,
    interpret: bool,
) -> tuple[Array, Array | None]:
    """f x W^T + the sum of factor * term, (T, N) bf16; shapes as `product_hopper` says.

    Args:
      x_TD, w_ND: bf16. x may be in several arrays of equal shape, side by side.
      terms: at most two (T, N) bf16 arrays, each with its factor of every row, (T,) float32, or None for 1. Factors,
        their products and the sum of these are rounded to bf16 before the matrix product joins them.
      factor_T: f, float32; None for 1.
      squares: return as well, (parts, T) float32, parts of every row's sum of squares.
    """
    shape = (HALF, PART)
    factors = [factor_T, *(factor for factor, _ in terms)]
    given = [factor is not None for factor in factors]

    def times(number: int, row_values: Values, part: Array) -> Array:
        if not given[number]:
            return part
        return part * rows(row_values[sum(given[:number])].astype(part.dtype), shape)

    def keep(row_values: Values, parts: Values) -> Array:
        # In pairs of bf16: as float32 they would not fit beside the accumulator.
        weighted = [times(i, row_values, part) for i, part in enumerate(parts, start=1)]
        return sum(weighted[1:], start=weighted[0])

    def finish(acc: Values, row_values: Values, narrow: Values, kept: Values) -> tuple[Values, Values]:
        del narrow
        result = [times(0, row_values, part) for part in acc]
        if kept:
            result = [a + b.astype(jnp.float32) for a, b in zip(result, kept, strict=True)]
        return result, [row_sums(part * part for part in result)] if squares else []

    epilogue = Epilogue(
        finish,
        rows=[factor for factor in factors if factor is not None],
        tiles=[term for _, term in terms],
        keep=keep,
        unit=config.columns // PART if squares else 1,
        row_results=int(squares),
    )
    result_TN, *sums = product("sum_product", x_TD, w_ND, epilogue, config=config, interpret=interpret)
    return result_TN, sums[0] if squares else None
