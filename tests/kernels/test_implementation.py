"""Which implementation a name stands for, on devices that are not here, and what is said where one cannot run."""

import functools
import re
import threading
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels import head
from jax_speedrun.kernels.attention import block_sparse_attention
from jax_speedrun.kernels.block_mask import long_short_masks
from jax_speedrun.kernels.embedding import embed
from jax_speedrun.kernels.head import head_loss
from jax_speedrun.kernels.implementation import (
    Implementation,
    choose,
    compiling_for_hopper,
    interpret_kernels,
    interpreting,
    on_hopper,
)
from jax_speedrun.kernels.layer.mlp import mlp
from jax_speedrun.kernels.layer.residual import add_linear
from jax_speedrun.kernels.layer.self_attention import self_attention
from tests.devices import A100, B200, H100, TPU

OTHERS = [A100, B200, TPU, jax.devices("cpu")[0]]
REASON = "T a multiple of 128, got 100"
name_of = functools.partial(choose, "op")


def nothing_missing():
    return None


def something_missing():
    return REASON


def test_auto_is_hopper_where_it_runs_and_supports_the_arguments():
    assert name_of("auto", nothing_missing, device=H100) == "hopper"
    assert name_of("auto", something_missing, device=H100) == "xla"
    for device in OTHERS:
        assert name_of("auto", nothing_missing, device=device) == "xla"


def test_what_kernels_need_is_not_asked_where_they_cannot_run():
    """Pallas' GPU backend, which the answer may need, is not part of every jaxlib."""

    def unreachable():
        raise AssertionError

    for device in OTHERS:
        assert name_of("auto", unreachable, device=device) == "xla"
        with pytest.raises(ValueError, match="an H100 or H200"):
            name_of("hopper", unreachable, device=device)
    assert name_of("xla", unreachable, device=H100) == "xla"


def test_hopper_where_it_cannot_run_says_why_in_one_line():
    assert name_of("hopper", nothing_missing, device=H100) == "hopper"
    with pytest.raises(ValueError, match=f"^op: implementation 'hopper' needs {REASON}; use 'xla' or 'auto'$"):
        name_of("hopper", something_missing, device=H100)
    for device in OTHERS:
        kind = re.escape(device.device_kind)
        message = f"^op: implementation 'hopper' needs an H100 or H200, not {kind}; use 'xla' or 'auto'$"
        with pytest.raises(ValueError, match=message):
            name_of("hopper", nothing_missing, device=device)


def test_without_a_device_the_first_of_this_process_counts():
    assert not on_hopper(jax.devices()[0])
    assert name_of("auto", nothing_missing) == "xla"
    with pytest.raises(ValueError, match=f"not {jax.devices()[0].device_kind};"):
        name_of("hopper", nothing_missing)


@pytest.mark.parametrize("name", ["Hopper", "fast", "plain", "", None, True, 3, "reference"])
def test_names_that_an_op_lacks_are_refused_everywhere(name):
    for device in (H100, *OTHERS):
        with pytest.raises(ValueError, match=f"^op: unknown implementation {name!r}; choose one of auto, hopper, xla$"):
            name_of(name, nothing_missing, device=device)


def test_an_op_may_have_more_names():
    names = get_args(Implementation)
    assert names == ("auto", "hopper", "xla", "reference")
    assert name_of("reference", something_missing, device=H100, names=names) == "reference"
    with pytest.raises(ValueError, match=r"choose one of auto, hopper, xla, reference$"):
        name_of("flash", nothing_missing, device=H100, names=names)


@pytest.mark.parametrize("context", [interpret_kernels, compiling_for_hopper])
def test_inside_these_hopper_is_traced_on_any_device(context):
    for device in OTHERS:
        with context():
            assert name_of("hopper", nothing_missing, device=device) == "hopper"
            assert name_of("auto", nothing_missing, device=device) == "hopper"
            assert name_of("auto", something_missing, device=device) == "xla"
            assert name_of("xla", nothing_missing, device=device) == "xla"
            with pytest.raises(ValueError, match=REASON):
                name_of("hopper", something_missing, device=device)
        with pytest.raises(ValueError, match="an H100 or H200"):
            name_of("hopper", nothing_missing, device=device)


def test_contexts_nest_and_end_with_an_error():
    assert not interpreting()
    with interpret_kernels():
        assert interpreting()
        with compiling_for_hopper():
            assert not interpreting()
        assert interpreting()
    with pytest.raises(ZeroDivisionError), interpret_kernels():
        1 / 0  # noqa: B018
    assert not interpreting()


def test_a_context_is_of_its_thread_alone():
    seen = []
    with interpret_kernels():
        thread = threading.Thread(target=lambda: seen.append(interpreting()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_jit_keeps_what_was_traced_inside_apart():
    """Jitted outside and called in and out: once a trace for each, and each the right one."""
    traced = []

    @jax.jit
    def double(x):
        traced.append(interpreting())
        return 2 * x

    for _ in range(2):
        double(jnp.ones(3))
        with interpret_kernels():
            double(jnp.ones(3))
    assert traced == [False, True]


X = jnp.zeros((128, 256), jnp.bfloat16)
RSTD, WEIGHT = jnp.ones(128), jnp.zeros((256, 256))
TOKENS = jnp.zeros(128, jnp.int32)
MASK, _ = long_short_masks(TOKENS, 1)
QUARTER = jnp.zeros((128, 32))
OPS = {
    "block_sparse_attention": lambda name: block_sparse_attention(
        X.reshape(128, 2, 128), X.reshape(128, 2, 128), X.reshape(128, 2, 128), MASK, scale=0.1, implementation=name
    ),
    "head_loss": lambda name: head_loss(X, WEIGHT, TOKENS, "fp8", name),
    "embed": lambda name: embed(WEIGHT, TOKENS, implementation=name),
    "mlp": lambda name: mlp(X, RSTD, WEIGHT, WEIGHT, name),
    "add_linear": lambda name: add_linear(X, X, WEIGHT, epsilon=1e-6, implementation=name),
    "self_attention": lambda name: self_attention(
        X,
        RSTD,
        jnp.zeros((3, 256, 256)),
        None,
        jnp.ones(2),
        QUARTER,
        QUARTER,
        MASK,
        heads=2,
        softmax_scale=0.1,
        epsilon=1e-6,
        implementation=name,
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_every_op_knows_the_names_and_where_it_is(op):
    """Arguments that the kernels support: it is the CPU that they do not."""
    automatic, plain = (jax.tree.map(np.asarray, OPS[op](name)) for name in ("auto", "xla"))
    jax.tree.map(np.testing.assert_array_equal, automatic, plain)
    with pytest.raises(ValueError, match=f"^{op}: implementation 'hopper' needs an H100 or H200, not cpu; use 'xla'"):
        OPS[op]("hopper")
    with pytest.raises(ValueError, match=f"^{op}: unknown implementation 'Hopper'; choose one of auto, hopper, xla"):
        OPS[op]("Hopper")
    with compiling_for_hopper():
        jax.eval_shape(lambda: OPS[op]("hopper"))


def test_the_head_asks_for_its_units():
    assert not head.fp8_supported(jax.devices("cpu")[0])
    assert [head.fp8_supported(device) for device in (H100, B200, A100, TPU)] == [True, True, False, False]
