"""Every op inside `jax.shard_map` with its defaults, and on Explicit meshes: as on one device, or one clear line."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_speedrun.kernels.attention import block_sparse_attention
from jax_speedrun.kernels.block_mask import long_short_masks
from jax_speedrun.kernels.embedding import embed
from jax_speedrun.kernels.head import head_logits, head_loss
from jax_speedrun.kernels.implementation import compiling_for_hopper, interpret_kernels
from jax_speedrun.kernels.layer.mlp import mlp
from jax_speedrun.kernels.layer.residual import add_linear, known_rstd, rstd
from jax_speedrun.kernels.layer.self_attention import self_attention
from tests.marks import slow

N, T, D, V, F, HEADS, K = 2, 128, 16, 40, 32, 2, 8
EPSILON = 1e-6
BY_DEVICE, WHOLE = P("data"), P()


def attention_layer(x, qkv, embedding, lambdas, cos, sin, tokens, *, name="xla", head_width=K):
    """As many heads as there are."""
    long, _ = long_short_masks(tokens, 1)
    options = {"softmax_scale": 0.1, "epsilon": EPSILON, "attention": "reference", "implementation": name}
    heads = qkv.shape[1] // head_width
    return self_attention(x, rstd(x, EPSILON), qkv, embedding, lambdas, cos, sin, long, heads=heads, **options)


rng = np.random.default_rng(0)
X, EMBEDDING = (rng.standard_normal((N, T, width)).astype(np.float32) for width in (D, HEADS * K))
TABLE, WEIGHT, FC, PROJ, QKV, COS, SIN = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((V, D), (D, D), (F, D), (D, F), (3, HEADS * K, D), (T, 2), (T, 2))
)
IDS = rng.integers(0, V, (N, T)).astype(np.int32)
LAYER = (X, QKV, EMBEDDING, np.array([0.7, -0.4], np.float32), COS, SIN, np.where(IDS == 3, 50256, IDS))

# An op, its arguments, which of them have a leading axis of sequences, and how many, the first ones, have gradients.
OPS: dict[str, Any] = {
    "embed": (embed, (TABLE, IDS), (False, True), 1),
    "head_loss": (functools.partial(head_loss, precision="float32"), (X, TABLE, IDS), (True, False, True), 2),
    "head_logits": (functools.partial(head_logits, precision="float32"), (X, TABLE), (True, False), 2),
    "mlp": (lambda x, fc, proj: mlp(x, rstd(x, EPSILON), fc, proj), (X, FC, PROJ), (True, False, False), 3),
    "add_linear": (functools.partial(add_linear, epsilon=EPSILON), (X, 2 * X, WEIGHT), (True, True, False), 3),
    "known_rstd": (lambda x: known_rstd(x, rstd(x, EPSILON)), (X,), (True,), 1),
    "self_attention": (attention_layer, LAYER, (True, False, True, False, False, False, True), 4),
}


def loss_of(op, *arguments):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(op(*arguments)))


def mesh_of(kind, devices=N):
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,))


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(np.abs(b).max()))


@functools.cache
def on_one_device(name):
    """The sum of a loss over sequences, and its gradients."""
    op, arguments, by_sequence, differentiable = OPS[name]

    def loss(*arguments):
        axes = tuple(0 if own else None for own in by_sequence)
        return jnp.sum(jax.vmap(functools.partial(loss_of, op), axes)(*arguments))

    return jax.jit(jax.value_and_grad(loss, tuple(range(differentiable))))(*arguments)


@pytest.mark.parametrize("differentiated", ["outside", slow("inside")])
@pytest.mark.parametrize("name", OPS)
def test_a_sequence_a_device_in_shard_map(name, differentiated):
    """With its defaults: JAX checks what varies over devices, and sums gradients of what all of them share."""
    op, arguments, by_sequence, differentiable = OPS[name]
    specs, which = tuple(BY_DEVICE if own else WHOLE for own in by_sequence), tuple(range(differentiable))

    def local_loss(*arguments):
        own = (a[0] if own else a for a, own in zip(arguments, by_sequence, strict=True))
        return jax.lax.psum(loss_of(op, *own), "data")

    shard = functools.partial(jax.shard_map, mesh=mesh_of(AxisType.Auto), in_specs=specs)
    if differentiated == "outside":
        run = jax.value_and_grad(shard(local_loss, out_specs=WHOLE), which)
    else:
        run = shard(jax.value_and_grad(local_loss, which), out_specs=(WHOLE, tuple(specs[i] for i in which)))
    assert_close(jax.jit(run)(*arguments), on_one_device(name))


@pytest.mark.parametrize("name", OPS)
def test_a_sequence_a_device_on_an_explicit_mesh(name):
    op, arguments, by_sequence, differentiable = OPS[name]
    mesh = mesh_of(AxisType.Explicit)
    specs = (BY_DEVICE if own else WHOLE for own in by_sequence)
    with jax.set_mesh(mesh):
        arguments = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arguments, specs, strict=True)]
        axes = tuple(0 if own else None for own in by_sequence)

        def loss(*arguments):
            return jnp.sum(jax.vmap(functools.partial(loss_of, op), axes)(*arguments))

        got = jax.jit(jax.value_and_grad(loss, tuple(range(differentiable))))(*arguments)
    assert_close(got, on_one_device(name))


def test_heads_and_hidden_channels_a_device_in_shard_map():
    """x is shared, the weights are split: its gradients through all parts are summed."""
    x, qkv, embedding, *rest = (a[0] if own else a for a, own in zip(LAYER, OPS["self_attention"][2], strict=True))

    def whole(x, qkv, embedding, fc, proj):
        x, y = attention_layer(x, qkv, embedding, *rest)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(mlp(x, rstd(x, EPSILON), fc, proj)))

    def local(x, qkv, embedding, fc, proj):
        x, y = attention_layer(x, qkv, embedding, *rest)
        past_mlp = x + jax.lax.psum(mlp(x, rstd(x, EPSILON), fc, proj) - x, "data")
        return jax.lax.psum(jnp.sum(jnp.sin(y)), "data") + jnp.sum(jnp.sin(past_mlp))

    columns = P(None, "data")
    specs = (WHOLE, columns, columns, BY_DEVICE, columns)
    split = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=WHOLE)
    arguments, which = (x, qkv, embedding, FC, PROJ), (0, 1, 2, 3, 4)
    got, want = (jax.jit(jax.value_and_grad(loss, which))(*arguments) for loss in (split, whole))
    assert_close(got, want)


KERNEL_X = jax.ShapeDtypeStruct((N, 128, 256), jnp.bfloat16)
KERNEL_W, KERNEL_IDS = jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((N, 128), jnp.int32)


def hopper_attention(x, w, ids):
    q = x.reshape(128, 2, 128)
    return block_sparse_attention(q, q, q, long_short_masks(ids, 1)[0], scale=0.1, implementation="hopper")


def hopper_layer(x, w, ids):
    quarter = jnp.ones((128, 32))
    arguments = x, jnp.stack([w, w, w]), None, jnp.ones(2), quarter, quarter, ids
    return attention_layer(*arguments, name="hopper", head_width=128)[1]


HOPPER_OPS = {
    "block_sparse_attention": hopper_attention,
    "head_loss": lambda x, w, ids: head_loss(x, w, ids, "fp8", "hopper"),
    "embed": lambda x, w, ids: embed(w, ids, implementation="hopper"),
    "mlp": lambda x, w, ids: mlp(x, jnp.ones(128), w, w, "hopper"),
    "add_linear": lambda x, w, ids: add_linear(x, x, w, epsilon=EPSILON, implementation="hopper")[0],
    "self_attention": hopper_layer,
}


@pytest.mark.parametrize("name", HOPPER_OPS)
def test_kernels_in_shard_map(name):
    """Gradients have the types of what they are of, which says that those of shared weights are summed."""

    def local_loss(x, w, ids):
        return jax.lax.psum(jnp.sum(HOPPER_OPS[name](x[0], w, ids[0]).astype(jnp.float32)), "data")

    loss = jax.shard_map(
        local_loss, mesh=mesh_of(AxisType.Auto), in_specs=(BY_DEVICE, WHOLE, BY_DEVICE), out_specs=WHOLE
    )
    with compiling_for_hopper():
        program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(KERNEL_X, KERNEL_W, KERNEL_IDS)
    assert [a.shape for a in program.out_avals] == [KERNEL_X.shape, KERNEL_W.shape]


def test_a_kernels_gradient_of_a_shared_table_is_summed():
    ids, table, d_rows = rng.integers(0, V, (N, 64)), np.ones((V, 128), np.float32), rng.standard_normal((N, 64, 128))

    def local_loss(table, ids, d_rows):
        return jax.lax.psum(jnp.sum(embed(table, ids[0], implementation="hopper") * d_rows[0]), "data")

    specs = (WHOLE, BY_DEVICE, BY_DEVICE)
    loss = jax.shard_map(local_loss, mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=WHOLE)
    with interpret_kernels():
        got = jax.jit(jax.grad(loss))(table, ids, d_rows)
    want = np.zeros(table.shape)
    np.add.at(want, ids, d_rows)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", HOPPER_OPS)
def test_kernels_refuse_explicit_meshes(name):
    mesh = mesh_of(AxisType.Explicit)
    arrays = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, BY_DEVICE if a.shape[0] == N else WHOLE))
        for a in (KERNEL_X, KERNEL_W, KERNEL_IDS)
    ]
    message = (
        rf"^{name}: implementation 'hopper' needs arrays of one device, got .* on an Explicit mesh \(call it inside"
    )
    with compiling_for_hopper(), jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.vmap(HOPPER_OPS[name], (0, None, 0)), *arrays)


ONE = {name: tuple(a[0] if own else a for a, own in zip(OPS[name][1], OPS[name][2], strict=True)) for name in OPS}


@pytest.mark.parametrize(
    ("name", "which", "spec"),
    [
        ("embed", 0, P("data")),
        ("embed", 1, P("data")),
        ("head_loss", 0, P("data")),
        ("head_loss", 1, P("data")),
        ("mlp", 0, P(None, "data")),
        ("mlp", 1, P("data")),
        ("add_linear", 2, P(None, "data")),
        ("self_attention", 1, P(None, "data")),
    ],
)
def test_what_an_explicit_mesh_splits_is_refused(name, which, spec):
    mesh = mesh_of(AxisType.Explicit)
    arrays = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec if i == which else WHOLE))
        for i, a in enumerate(ONE[name])
    ]
    message = rf"^{name} cannot take .*@data.* as it is split over the mesh; call it inside jax.shard_map, "
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(OPS[name][0], *arrays)


def test_masks_of_tokens_that_an_explicit_mesh_splits_are_refused():
    mesh = mesh_of(AxisType.Explicit)
    tokens = jax.ShapeDtypeStruct((512,), jnp.int32, sharding=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"^long_short_masks cannot take .*@data.* as it is split"):
        jax.eval_shape(long_short_masks, tokens, 2)


@pytest.mark.parametrize("name", ["mlp", "add_linear"])
def test_tokens_may_be_split_where_every_token_is_alone(name):
    op, _, by_sequence, differentiable = OPS[name]
    mesh, run = mesh_of(AxisType.Explicit), jax.value_and_grad(functools.partial(loss_of, op), range(differentiable))
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(a, NamedSharding(mesh, BY_DEVICE if own else WHOLE))
            for a, own in zip(ONE[name], by_sequence, strict=True)
        ]
        got = jax.jit(run)(*arrays)
    assert_close(got, jax.jit(run)(*ONE[name]))
