"""The embedding bench at small sizes, and the bound that it holds gradients against."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels.embedding.op import plain_gradient
from jax_speedrun.kernels.embedding.order import sort_tokens
from jax_speedrun.tools.bench.embedding import error_of_bound, main

SIZES = ("--length", "256", "--width", "128", "--vocab-size", "300")


@pytest.mark.slow
def test_it_runs_small_without_a_gpu(tmp_path, capsys):
    arguments = [*SIZES, "--out", str(tmp_path)]
    assert main([*arguments, "--variants", "xla", "scatter"]) == 0
    record = json.loads((tmp_path / "embedding.json").read_text())
    assert [row["variant"] for row in record["rows"]] == ["sort", "xla", "scatter"]
    assert all(row["error_of_bound"] <= 1 for row in record["rows"][1:])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert main([*arguments, "--length", "100"]) == 2
    assert "error: --length 100: must be a positive multiple of 64" in capsys.readouterr().err


@pytest.mark.slow
def test_the_kernel_is_tried_out_in_the_interpreter(tmp_path):
    assert main(["--length", "64", "--width", "128", "--vocab-size", "50", "--out", str(tmp_path)]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "embedding.json").read_text())["rows"]}
    assert rows["hopper"]["repeats"]


def test_a_wrong_row_is_beyond_the_bound():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 20, 128))
    d_rows = jnp.asarray(rng.standard_normal((128, 8)), jnp.bfloat16)
    order, right = sort_tokens(tokens, 50), plain_gradient(d_rows, tokens, 50, jnp.bfloat16)
    assert 0.3 < error_of_bound(right, d_rows, order) <= 1
    assert error_of_bound(right * 1.02, d_rows, order) > 1
    assert error_of_bound(right.at[40].set(1.0), d_rows, order) == np.inf  # an id that is absent
