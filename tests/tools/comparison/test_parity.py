"""Parity: what counts as the same, from three sides whose answers are known."""

import time

import matplotlib.image
import numpy as np
import pytest

from jax_speedrun.config import PRESETS
from jax_speedrun.tools.comparison import parity
from jax_speedrun.tools.comparison.parity import Line
from jax_speedrun.tools.comparison.worker import parity as parity_of_a_side
from jax_speedrun.tools.comparison.worker import thin
from tests.tools.comparison.fakes import FakeSide, parity_inputs, render, words_of


def test_fill_leaves_no_zero_and_no_special_scalar():
    weights = {"a": np.zeros((4, 300), np.float32), "b": np.ones((2, 2), np.float32), "c": np.array([1.0, 0.0])}
    filled = parity.fill(weights, 0)
    np.testing.assert_allclose(filled["a"].std(), 0.5 / np.sqrt(300), rtol=0.1)
    np.testing.assert_array_equal(filled["b"], weights["b"])
    assert (filled["c"] != weights["c"]).all()
    assert {value.dtype for value in filled.values()} == {np.dtype(np.float32)}


def test_thin_keeps_what_is_small():
    small = np.zeros((100, 3))
    assert thin(small) is small
    assert thin(np.broadcast_to(np.float32(0), (1 << 15, 1 << 10))).shape == (1 << 11, 1 << 10)


def parity_lines(tmp_path, decays):
    """Lines from three fake sides, whose parameters shrink by different factors."""

    def launch(framework, job, name):
        if job["task"] == "initial":
            np.savez(job["arrays_out"], **{"blocks.0.w": np.ones((2, 3), np.float32)})
            return {}
        return parity_of_a_side(FakeSide(decays[name]), {**job, "validate_every": 2}, parity_inputs())

    lines, answers = parity.run_parity(
        launch, PRESETS["eighth"], tmp_path, window=14, curve_steps=4, say=lambda _: None
    )
    assert list(tmp_path.iterdir()) == []
    return {line.quantity: line for line in lines}, answers


def test_parity_passes_equal_sides_and_finds_a_different_one(tmp_path):
    lines, answers = parity_lines(tmp_path, {"jax": 0.5, "torch": 0.5, "eager": 0.5})
    assert list(lines) == [
        "loss, step 0",
        "gradient: blocks.0.w",
        *(f"after{n}: blocks.0.w" for n in (1, 2, 5, 10)),
        *(f"validation loss, step {n}" for n in (0, 2, 4)),
    ]
    assert all(line.passed and line.difference == 0 for line in lines.values())
    assert answers.keys() == {"jax", "torch", "eager"}

    lines, _ = parity_lines(tmp_path, {"jax": 0.6, "torch": 0.5, "eager": 0.5})
    assert lines["gradient: blocks.0.w"].passed
    assert lines["after1: blocks.0.w"].difference == pytest.approx(0.2)
    assert not lines["after1: blocks.0.w"].passed
    assert not lines["validation loss, step 2"].passed


def test_parity_allows_what_rounding_does_to_pytorch_itself(tmp_path):
    lines, _ = parity_lines(tmp_path, {"jax": 0.6, "torch": 0.5, "eager": 0.55})
    line = lines["after1: blocks.0.w"]
    assert (line.difference, line.rounding, line.tolerance) == pytest.approx((0.2, 0.1, 0.3))
    assert line.passed


def test_what_rounding_does_in_one_layer_it_may_do_in_another(tmp_path):
    values = {  # gradients of two layers' lambdas, and of another kind
        "torch": (1.0, 1.0, 1.0),
        "eager": (1.0, 1.1, 1.0),
        "jax": (1.2, 1.4, 1.2),
    }
    names = ("gradient:blocks.0.lambdas", "gradient:blocks.1.lambdas", "gradient:blocks.0.w")
    arrays = {side: tmp_path / f"{side}.npz" for side in values}
    for side, numbers in values.items():
        np.savez(arrays[side], **{name: np.float32([x, 0]) for name, x in zip(names, numbers, strict=True)})
    results = {side: {"loss": 1.0, "validation": {}} for side in values}
    _, first, second, other = parity.lines("bfloat16", results, arrays, {})
    assert (first.rounding, first.tolerance) == pytest.approx((0.0, 0.3))
    assert (second.rounding, second.tolerance) == pytest.approx((0.1, 0.3))
    assert other.tolerance == parity.GRADIENT_FLOOR["bfloat16"]
    assert [line.passed for line in (first, second, other)] == [True, False, False]


def test_a_vector_that_nearly_cancels_is_measured_by_its_kind(tmp_path):
    values = {  # vectors of two layers, the second nearly 0; matrices likewise
        "torch": (1.0, 1e-3, 1.0, 1e-3),
        "eager": (1.0, 1e-3, 1.0, 1e-3),
        "jax": (1.0, 2e-3, 1.0, 2e-3),
    }
    arrays = {side: tmp_path / f"{side}.npz" for side in values}
    for side, (*vectors, a, b) in values.items():
        named = {f"gradient:blocks.{i}.lambdas": np.float32([x, 0]) for i, x in enumerate(vectors)}
        named |= {f"gradient:blocks.{i}.w": np.float32([[x, 0]]) for i, x in enumerate((a, b))}
        np.savez(arrays[side], **named)
    results = {side: {"loss": 1.0, "validation": {}} for side in values}
    _, _, vector, _, matrix = parity.lines("bfloat16", results, arrays, {})
    assert vector.difference == pytest.approx(1e-3 / np.sqrt((1 + 1e-6) / 2))
    assert vector.passed
    assert matrix.difference == pytest.approx(1.0)
    assert not matrix.passed


def test_parity_of_zeros_and_of_different_shapes(tmp_path):
    arrays = {side: tmp_path / f"{side}.npz" for side in ("jax", "torch", "eager")}
    results = {side: {"loss": 1.0, "validation": {}} for side in arrays}

    def line(jax, torch):
        for side, value in (("jax", jax), ("torch", torch), ("eager", torch)):
            np.savez(arrays[side], **{"gradient:w": value})
        return list(parity.lines("float32", results, arrays, {}))[1]

    assert line(np.zeros((2, 2)), np.zeros((2, 2))).difference == 0
    assert line(np.ones((2, 2)), np.zeros((2, 2))).difference == np.inf
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) \(JAX\), \(2, 2\)"):
        line(np.zeros((1, 2)), np.zeros((2, 2)))


def test_table_shows_the_worst_layer_of_each_kind():
    lines = [
        Line("gradient: blocks.0.w", 0.5, 0.0, 1.0),
        Line("gradient: blocks.1.w", 0.05, 0.0, 0.01),
        Line("gradient: head", float("nan"), 0.0, 0.01),
    ]
    worst = parity.worst_of_each_kind(lines)
    assert [line.quantity for line in worst] == ["gradient: blocks.1.w", "gradient: head"]
    text = render(parity.table(lines, "title"))
    assert text.count("TOO FAR") == 2
    assert parity.to_json(lines, {})["lines"][0]["passed"]


def test_parity_chart(tmp_path):
    about = {"device": "a card", "versions": {"jax": "1.2.3", "torch": "4.5.6"}}
    sides = {side: {**about, "losses": [3.0, 2.0, 1.5]} for side in parity.SIDES}
    sides["jax"]["losses"] = [3.0, 2.25, 1.5]
    parity.draw(sides, tmp_path / "parity.png", "title")
    assert matplotlib.image.imread(tmp_path / "parity.png").shape[0] > 100
    words = words_of(parity.chart(sides, "eighth, 250 steps"))
    for part in (
        f"JAX 1.2.3 and PyTorch 4.5.6 on a card, {time.strftime('%Y-%m-%d')}",
        "eighth, 250 steps",
        "apart by 8.3e-02 in the mean, 2.5e-01 at most",
    ):
        assert part in words
