"""Mask functions: which query sees which key, as predicates that compose.

    causal() & window(left=1023) & same_document(ids)        Gemma's local layers, packed documents
    causal() | prefix(length)                                a prefix language model
    causal() & (window(left=1023) | prefix(4))               a window and four sink tokens
    window(left=256, right=256) | global_tokens(flags)       Longformer
    window(left=512, right=512) & dilated(4)                 its dilated heads
    chunks(64) & ~key_is(padding)                            blocks on the diagonal, without padding

A predicate answers two questions. `pairs(query, key)`: does this token see that one? And `blocks(query, key)`, from
which lists of blocks are made without a look at their pairs: *may* any query of a block see any key of another, and
*must* all see all? Answers combine as in three-valued logic (`~`: may = not must). Both may be careful: a `may` too
many costs time, since blocks that are not full apply `pairs`; and so does a `must` too few.

    may   must                        causal() & window(left=3),    key block  0 1 2
    no    no    never touched   .     blocks of two tokens:      query block 0  P . .
    yes   no    partial         P                                            1  F P .
    yes   yes   full            F                                            2  P F P

The *type* of a predicate is static, its numbers are leaves of a pytree and may be traced: a window that grows
recompiles nothing. `mask_fn` makes a predicate of any function, and `mask_mod` of one written for PyTorch's
FlexAttention; their blocks are found by looking at all pairs, one block of queries at a time.

Source: FlexAttention's mask_mod (Dong et al. 2024, arXiv:2412.05496); the blocks' bounds are interval arithmetic.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

COMBINE = "jnp.where, &, | and ~"
"""What a mask function uses in place of Python's `if`, `and`, `or` and `not`."""
FAR = 2**30
"""Of a window: further than any two tokens lie apart, and small enough for int32 sums."""


class Blocks(NamedTuple):
    """Blocks of neighbouring tokens of one side, (B, 1) for queries and (1, B) for keys."""

    first: Array
    last: Array  # inclusive; the last block may be short
    size: int

    def tokens(self) -> Array:
        """Return the tokens of each block, (..., size); a short block repeats its last one."""
        return jnp.minimum(self.first[..., None] + jnp.arange(self.size), self.last[..., None])


class Verdict(NamedTuple):
    """For each pair of blocks, booleans that broadcast to (query blocks, key blocks)."""

    may: Array
    must: Array


class Mask:
    """A predicate on (query, key, head); the base of all. Combine them with `&`, `|` and `~`."""

    @property
    def heads(self) -> int:
        """How many heads it tells apart; 1 if all have one mask."""
        return max((part.heads for part in self._parts()), default=1)

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        """Return whether each query sees each key: positions, and heads, that broadcast against each other."""
        raise NotImplementedError

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        """Return what is known of pairs of blocks without looking at their tokens; of all heads together."""
        raise NotImplementedError

    def check(self, q_length: int, kv_length: int, batch: tuple[int, ...] = ()) -> None:
        """Raise ValueError unless every number fits: (*batch,), and per token (*batch, q_length) or kv_length."""
        if len({1, *(part.heads for part in self._parts())}) > 2:
            raise ValueError(f"{self} combines masks of different numbers of heads")
        for part in self._parts():
            part.check(q_length, kv_length, batch)
        lengths = {"query": q_length, "key": kv_length}
        for own in dataclasses.fields(self):  # type: ignore[arg-type]
            side, value = own.metadata.get("per"), getattr(self, own.name)
            if own.metadata.get("static") or isinstance(value, Mask):
                continue
            wanted = (*batch, lengths[side]) if side in lengths else batch
            for shape in map(np.shape, jax.tree.leaves(value)):
                if shape != wanted and (side != "any" or shape[: len(batch)] != batch):
                    whole = f"{q_length} queries and {kv_length} keys" + "".join(f", a batch of {n}" for n in batch)
                    raise ValueError(f"{self}: {own.name} must have shape {wanted} for {whole}, got {shape}")

    def _parts(self) -> list["Mask"]:
        values = (getattr(self, own.name) for own in dataclasses.fields(self))  # type: ignore[arg-type]
        return [value for value in values if isinstance(value, Mask)]

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Opposite(self)

    def __bool__(self) -> bool:
        raise TypeError("masks combine with &, | and ~, not with 'and', 'or' and 'not'")


# Of a predicate's field: how many numbers it holds. Without any of these, one.
PER_QUERY, PER_KEY, ANY_SHAPE = {"per": "query"}, {"per": "key"}, {"per": "any"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Both(Mask):
    """What two masks let see."""

    first: Mask
    second: Mask

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return self.first.pairs(query, key, head) & self.second.pairs(query, key, head)

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        a, b = self.first.blocks(query, key), self.second.blocks(query, key)
        return Verdict(a.may & b.may, a.must & b.must)

    def __str__(self) -> str:
        return f"{self.first} & {self.second}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Either(Mask):
    """What one of two masks lets see."""

    first: Mask
    second: Mask

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return self.first.pairs(query, key, head) | self.second.pairs(query, key, head)

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        a, b = self.first.blocks(query, key), self.second.blocks(query, key)
        return Verdict(a.may | b.may, a.must | b.must)

    def __str__(self) -> str:
        return f"({self.first} | {self.second})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Opposite(Mask):
    """What a mask hides."""

    mask: Mask

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return ~self.mask.pairs(query, key, head)

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        may, must = self.mask.blocks(query, key)
        return Verdict(~must, ~may)

    def __str__(self) -> str:
        return f"~({self.mask})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Everything(Mask):
    """All pairs."""

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return jnp.ones(jnp.broadcast_shapes(jnp.shape(query), jnp.shape(key)), bool)

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        every = jnp.ones((), bool)
        return Verdict(every, every)

    def __str__(self) -> str:
        return "everything()"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Keys up to the query's own position."""

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return query >= key

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        return Verdict(query.last >= key.first, query.first >= key.last)

    def __str__(self) -> str:
        return "causal()"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Window(Mask):
    """Keys at most `left` before and `right` after the query; None: however far."""

    left: ArrayLike | None
    right: ArrayLike | None

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return self._holds(query - key, query - key)

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        # The distances between two blocks fill an interval, so that its ends decide.
        nearest, furthest = query.first - key.last, query.last - key.first
        return Verdict(self._holds(nearest, furthest), self._holds(furthest, nearest))

    def _holds(self, back: Array, ahead: Array) -> Array:
        """Return whether distance `back` is within the left side, and distance `ahead` within the right one."""
        holds = jnp.ones(jnp.shape(back), bool)
        if self.left is not None:
            holds &= back <= self.left
        if self.right is not None:
            holds &= -ahead <= self.right
        return holds

    def __str__(self) -> str:
        return f"window(left={_show(self.left)}, right={_show(self.right)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dilated(Mask):
    """Keys at distances that are multiples of `step`."""

    step: ArrayLike

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return (query - key) % self.step == 0

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        every = jnp.ones((), bool)
        return Verdict(every, every & (jnp.asarray(self.step) == 1))

    def __str__(self) -> str:
        return f"dilated({_show(self.step)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """The first `length` keys."""

    length: ArrayLike

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return key < self.length

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        return Verdict(key.first < self.length, key.last < self.length)

    def __str__(self) -> str:
        return f"prefix({_show(self.length)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Chunks(Mask):
    """Keys of the query's own chunk of `size` tokens."""

    size: ArrayLike

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return query // self.size == key // self.size

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        return _ranges_meet(*((side.first // self.size, side.last // self.size) for side in (query, key)))

    def __str__(self) -> str:
        return f"chunks({_show(self.size)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SameDocument(Mask):
    """Keys whose id is the query's; `kv_ids` None: both sides are one sequence."""

    ids: ArrayLike = field(metadata=PER_QUERY)
    kv_ids: ArrayLike | None = field(metadata=PER_KEY)

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        of_query, of_key = self._ids_at(query, key)
        return of_query == of_key

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        of_query, of_key = self._ids_at(query.tokens(), key.tokens())
        return _ranges_meet(*((ids.min(axis=-1), ids.max(axis=-1)) for ids in (of_query, of_key)))

    def check(self, q_length: int, kv_length: int, batch: tuple[int, ...] = ()) -> None:
        super().check(q_length, kv_length, batch)
        if self.kv_ids is None and q_length != kv_length:
            raise ValueError(f"same_document: {q_length} queries and {kv_length} keys need ids each: give kv_ids too")

    def __str__(self) -> str:
        return "same_document(ids)" if self.kv_ids is None else "same_document(ids, kv_ids)"

    def _ids_at(self, query: Array, key: Array) -> tuple[Array, Array]:
        return _at(self.ids, query), _at(self.ids if self.kv_ids is None else self.kv_ids, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QueryIs(Mask):
    """Every key, for queries with a flag."""

    flags: ArrayLike = field(metadata=PER_QUERY)

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return _at(self.flags, query) != 0

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        return _any_and_all(_at(self.flags, query.tokens()) != 0)

    def __str__(self) -> str:
        return "query_is(flags)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KeyIs(Mask):
    """Keys with a flag."""

    flags: ArrayLike = field(metadata=PER_KEY)

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        return _at(self.flags, key) != 0

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        return _any_and_all(_at(self.flags, key.tokens()) != 0)

    def __str__(self) -> str:
        return "key_is(flags)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MaskFn(Mask):
    """What a function says; see `mask_fn`."""

    fn: Callable[..., Any] = field(metadata={"static": True})
    query_data: Any = field(metadata=PER_QUERY)
    key_data: Any = field(metadata=PER_KEY)
    scalars: Any = field(metadata=ANY_SHAPE)
    head_count: int = field(metadata={"static": True})

    @property
    def heads(self) -> int:
        return self.head_count

    def pairs(self, query: Array, key: Array, head: ArrayLike = 0) -> Array:
        of_query = jax.tree.map(lambda x: _at(x, query), self.query_data)
        of_key = jax.tree.map(lambda x: _at(x, key), self.key_data)
        return self.fn(head, query, key, of_query, of_key, self.scalars)

    def blocks(self, query: Blocks, key: Blocks) -> Verdict:
        keys_BC = key.tokens()[0]
        heads = jnp.arange(self.heads)[:, None, None, None]

        def one_row(queries_C: Array) -> Verdict:
            seen = self.pairs(queries_C[:, None, None], keys_BC, heads)
            seen = jnp.broadcast_to(seen, (self.heads, len(queries_C), *keys_BC.shape))
            return Verdict(seen.any(axis=(0, 1, 3)), seen.all(axis=(0, 1, 3)))

        return Verdict(*lax.map(one_row, query.tokens()[:, 0]))

    def __str__(self) -> str:
        return f"mask_fn({getattr(self.fn, '__name__', self.fn)})"


def everything() -> Mask:
    """Let every query see every key."""
    return Everything()


def causal() -> Mask:
    """Let a query see the keys up to its own position.

    Where keys begin earlier than queries do, as with a cache, `window(right=offset)` says the same with an offset.
    """
    return Causal()


def window(*, left: ArrayLike | None = None, right: ArrayLike | None = None) -> Mask:
    """Let a query see keys at most `left` tokens before it and `right` after it; None sets no limit.

    A symmetric window has both; a causal one of w tokens, the query's own among them, is
    `causal() & window(left=w - 1)`.
    """
    return Window(*(bound if bound is None else _number("window", bound) for bound in (left, right)))


def dilated(step: ArrayLike) -> Mask:
    """Let a query see every `step`-th key, counted from its own position in both directions (Longformer's dilation)."""
    return Dilated(_number("dilated", step, least=1))


def prefix(length: ArrayLike) -> Mask:
    """Let every query see the first `length` keys: a prefix that sees itself whole, or sink tokens."""
    return Prefix(_number("prefix", length))


def chunks(size: ArrayLike) -> Mask:
    """Let a query see the keys of its own chunk of `size` tokens: blocks along the diagonal."""
    return Chunks(_number("chunks", size, least=1))


def same_document(ids: ArrayLike, kv_ids: ArrayLike | None = None) -> Mask:
    """Let a query see keys with its own id.

    Args:
      ids: (T,) integers, in any order; blocks are skipped where the ranges of their ids do not meet, so that sorted
        ones skip most.
      kv_ids: (S,), of the keys, where they are another sequence.
    """
    return SameDocument(_ids("same_document", ids), None if kv_ids is None else _ids("same_document", kv_ids))


def query_is(flags: ArrayLike) -> Mask:
    """Let the queries that are flagged, (T,) booleans, see every key."""
    return QueryIs(_flags("query_is", flags))


def key_is(flags: ArrayLike) -> Mask:
    """Let every query see the keys that are flagged, (S,) booleans. `& ~key_is(padding)` hides padding."""
    return KeyIs(_flags("key_is", flags))


def global_tokens(flags: ArrayLike) -> Mask:
    """Let tokens that are flagged see all, and be seen by all: Longformer's global attention, of one sequence."""
    return query_is(flags) | key_is(flags)


def mask_fn(
    fn: Callable[..., Any], *, query_data: Any = (), key_data: Any = (), scalars: Any = (), heads: int | None = None
) -> Mask:
    """Return the mask of a function fn(head, query, key, query_data, key_data, scalars) -> boolean.

    The function must be elementwise: it is given integer arrays that broadcast against each other, and may use no
    Python `if`, `and` or `or` on them. Its own identity is static: a new lambda compiles anew.

    Args:
      fn: the function.
      query_data, key_data: pytrees of (T,) and of (S,) arrays; the function is given their entries at query and key.
      scalars: a pytree of numbers, or of small arrays, that all pairs share.
      heads: how many there are, for a function that looks at the head. Lists of blocks are shared: a block is visited
        by all heads if any needs it.

    Raises:
      ValueError: if the function does not return one boolean a pair, looks at the head though `heads` is not
        given, or closes over an array that is traced.
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    data = (jax.tree.map(lambda x: jax.ShapeDtypeStruct((), jnp.result_type(x)), x) for x in (query_data, key_data))
    jaxpr = trace_rule("mask_fn", fn, index, index, index, *data, shapes_of(scalars), instead=COMBINE)
    if len(jaxpr.out_avals) != 1 or jaxpr.out_avals[0].shape or jaxpr.out_avals[0].dtype != bool:
        raise ValueError(f"mask_fn: the function must return one boolean for a pair, got {jaxpr.out_avals}")
    check_closure("mask_fn", jaxpr, "query_data, key_data or scalars, of which the function gets its entries")
    if heads is None and _is_used(jaxpr.jaxpr, 0):
        raise ValueError("mask_fn: the function looks at its head; say how many there are: heads=H")
    return MaskFn(fn, query_data, key_data, scalars, 1 if heads is None else heads)


def mask_mod(fn: Callable[..., Any], *, batch: ArrayLike | None = None, heads: int | None = None) -> Mask:
    """Return the mask of a function of FlexAttention's form: fn(batch, head, query, key) -> boolean.

    What it closes over must be known when it is traced; `mask_fn` takes the rest. For a batch in which sequences
    differ, map over their numbers: `jax.vmap(lambda n: BlockMask.from_mask(mask_mod(fn, batch=n), T))(jnp.arange(N))`.

    Args:
      fn: elementwise, as in `mask_fn`.
      batch: the sequence's number, for a function that looks at it; may be traced.
      heads: how many there are, for a function that looks at the head.

    Raises:
      ValueError: as `mask_fn` does, or if the function looks at the batch though it is not given.
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    if batch is None and _is_used(trace_rule("mask_mod", fn, *[index] * 4, instead=COMBINE).jaxpr, 0):
        raise ValueError("mask_mod: the function looks at its batch; say which sequence it is: batch=n")
    number = jnp.int32(0) if batch is None else jnp.asarray(batch, jnp.int32)
    return mask_fn(_without_data(fn), scalars=number, heads=heads)


@functools.cache
def _without_data(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` in `mask_fn`'s form; the same one for the same function, so that nothing compiles anew."""

    def in_our_form(head: Array, query: Array, key: Array, query_data: Any, key_data: Any, batch: Array) -> Any:
        del query_data, key_data
        return fn(batch, head, query, key)

    return in_our_form


def causal_document_ids(mask: Mask) -> ArrayLike | None:
    """Return the ids of `causal() & same_document(ids)`, the record's rule; None for any other."""
    if isinstance(mask, Both):
        for one, other in ((mask.first, mask.second), (mask.second, mask.first)):
            if isinstance(one, Causal) and isinstance(other, SameDocument) and other.kv_ids is None:
                return other.ids
    return None


def shapes_of(tree: Any) -> Any:
    """Return shape and dtype in place of every number and array of a tree."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


def trace_rule(name: str, fn: Callable[..., Any], *arguments: Any, instead: str) -> Any:
    """Return the jaxpr of a function on one pair, that of a mask or a score.

    Raises:
      ValueError: if it decides something in Python; the message begins with `name` and says what to use instead.
    """
    try:
        return jax.make_jaxpr(fn)(*arguments)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"{name}: the function decides something in Python by what it is given; use {instead}"
        ) from error


def check_closure(name: str, jaxpr: Any, hand_over: str) -> None:
    """Raise ValueError for a function that closes over an array that is traced, and say where to hand it over."""
    if any(isinstance(const, jax.core.Tracer) for const in jaxpr.consts):
        raise ValueError(f"{name}: the function closes over an array that is traced; hand it over in {hand_over}")


def _is_used(jaxpr: Any, argument: int) -> bool:
    variable = jaxpr.invars[argument]
    return any(variable is used for eqn in jaxpr.eqns for used in eqn.invars) or variable in jaxpr.outvars


def _ranges_meet(query: tuple[Array, Array], key: tuple[Array, Array]) -> Verdict:
    """Return what ranges of values say of equality: (lowest, highest) of each block."""
    may = (query[0] <= key[1]) & (key[0] <= query[1])
    return Verdict(may, may & (query[0] == query[1]) & (key[0] == key[1]))


def _any_and_all(flags: Array) -> Verdict:
    """Return what the flags of a side's tokens, (..., size), say of its blocks."""
    return Verdict(flags.any(axis=-1), flags.all(axis=-1))


def _at(values: ArrayLike, position: Array) -> Array:
    # Padding lies behind the last token, whose value it takes; what pads is hidden elsewhere.
    return jnp.take(jnp.asarray(values), position, mode="clip")


def whole_number(demand: str, value: ArrayLike) -> Array | np.ndarray:
    """Return one integer as an array of its own type.

    Raises:
      ValueError: "`demand`, got ..." for what is no integer, or several.
    """
    number = value if isinstance(value, jax.Array) else np.asarray(value)
    if number.ndim != 0 or not (jnp.issubdtype(number.dtype, jnp.integer) or isinstance(value, int)):
        raise ValueError(f"{demand}, got {number.dtype} {number.shape}")
    return number


def _number(name: str, value: ArrayLike, least: int = -FAR) -> ArrayLike:
    """Return a number of a predicate as int32 within reach."""
    number = whole_number(f"{name} takes an integer, of tokens", value)
    if isinstance(value, int | np.integer):
        if value < least and least > 0:
            raise ValueError(f"{name}: must be at least {least}, got {value}")
        return np.int32(max(min(int(value), FAR), -FAR))
    limits = jnp.iinfo(number.dtype)
    return jnp.asarray(number.clip(max(-FAR, limits.min), min(FAR, limits.max)).astype(jnp.int32))


def _ids(name: str, ids: ArrayLike) -> ArrayLike:
    array = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: ids must be integers of shape (T,), got {array.dtype} {array.shape}")
    return array


def _flags(name: str, flags: ArrayLike) -> ArrayLike:
    array = flags if isinstance(flags, jax.Array) else np.asarray(flags)
    if array.dtype != bool:
        raise ValueError(f"{name}: flags must be booleans of shape (T,), got {array.dtype} {array.shape}")
    return array


def _show(number: ArrayLike | None) -> str:
    return str(int(number)) if isinstance(number, int | np.integer) else "None" if number is None else "..."
