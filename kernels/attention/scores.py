"""Score functions: what becomes of a score before the softmax, pair by pair.

    alibi(heads=8)                                 a bias that grows with the distance (Press et al. 2022)
    score_fn(fn, scalars=...)                      any function of the score, its head and its positions
    score_mod(fn)                                  one written for PyTorch's FlexAttention

A score function is a pytree like a mask's predicate: its type is static, its numbers may be traced. Its derivative by
the score is taken by JAX; its numbers are constants, but for `implementation="reference"`, which differentiates all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ..masks import check_closure, shapes_of, trace_rule


class ScoreFn:
    """A function of a scaled score, its head, query and key; the base of all."""

    def apply(self, score: Array, head: Array, query: Array, key: Array) -> Array:
        """Return the scores that take their place: elementwise, arguments broadcast to `score`."""
        raise NotImplementedError

    def check(self, heads: int) -> None:
        """Raise ValueError unless its numbers are for so many heads."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SoftCap(ScoreFn):
    """cap tanh(score / cap), as in Gemma 2."""

    cap: float = dataclasses.field(metadata={"static": True})

    def apply(self, score: Array, head: Array, query: Array, key: Array) -> Array:
        return self.cap * jnp.tanh(score / self.cap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Alibi(ScoreFn):
    """score + slope (key - query), with a slope for each head."""

    slopes_H: ArrayLike

    def apply(self, score: Array, head: Array, query: Array, key: Array) -> Array:
        return score + jnp.asarray(self.slopes_H, score.dtype)[head] * (key - query).astype(score.dtype)

    def check(self, heads: int) -> None:
        if np.shape(self.slopes_H) != (heads,):
            raise ValueError(f"alibi: slopes must have shape ({heads},), got {np.shape(self.slopes_H)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pointwise(ScoreFn):
    """What a function says; see `score_fn`."""

    fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    scalars: Any

    def apply(self, score: Array, head: Array, query: Array, key: Array) -> Array:
        return self.fn(score, head, query, key, self.scalars).astype(score.dtype)


def alibi(*, heads: int | None = None, slopes: ArrayLike | None = None) -> ScoreFn:
    """Return ALiBi's bias: slope (key - query) is added to a scaled score.

    Args:
      heads: how many there are, for the paper's slopes 2^(-8 h / H), h = 1 ... H.
      slopes: (H,), to choose them.

    Raises:
      ValueError: unless one of both is given.
    """
    if (heads is None) == (slopes is None):
        raise ValueError("alibi: give either heads=H, for the paper's slopes, or slopes")
    if heads is not None:
        slopes = np.exp2(-8 * np.arange(1, heads + 1) / heads).astype(np.float32)
    assert slopes is not None
    return Alibi(slopes)


def score_fn(fn: Callable[..., Any], *, scalars: Any = ()) -> ScoreFn:
    """Return the score function fn(score, head, query, key, scalars) -> score.

    It must be elementwise: it is given arrays that broadcast against each other, and may use no Python `if` on them.
    Its own identity is static: a new lambda compiles anew.

    Args:
      fn: the function.
      scalars: a pytree of numbers, or of small arrays, for all pairs.

    Raises:
      ValueError: if the function does not return one number for a pair, decides in Python, or closes over an array that
        is traced.
    """
    score, index = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    jaxpr = trace_rule("score_fn", fn, score, index, index, index, shapes_of(scalars), instead="jnp.where")
    if (
        len(jaxpr.out_avals) != 1
        or jaxpr.out_avals[0].shape
        or not jnp.issubdtype(jaxpr.out_avals[0].dtype, jnp.floating)
    ):
        raise ValueError(f"score_fn: the function must return one score for a pair, got {jaxpr.out_avals}")
    check_closure("score_fn", jaxpr, "scalars")
    return Pointwise(fn, scalars)


def score_mod(fn: Callable[..., Any], *, batch: ArrayLike = 0) -> ScoreFn:
    """Return the score function of one of FlexAttention's form: fn(score, batch, head, query, key) -> score.

    Args:
      fn: elementwise, as in `score_fn`.
      batch: the number that the function is told; the scores of all sequences of a call are treated alike.
    """
    return score_fn(_without_scalars(fn), scalars=jnp.asarray(batch, jnp.int32))


@functools.cache
def _without_scalars(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` in `score_fn`'s form; the same one for the same function, so that nothing compiles anew."""

    def in_our_form(score: Array, head: Array, query: Array, key: Array, batch: Array) -> Any:
        return fn(score, batch, head, query, key)

    return in_our_form


def apply_scores(scores: tuple[ScoreFn, ...], score: Array, head: Array, query: Array, key: Array) -> Array:
    """Apply one score function after the other; positions and heads broadcast to `score`."""
    for one in scores:
        score = one.apply(score, head, query, key)
    return score
