"""What a worker measures and compares, with a side without a framework."""

import json
import time

import numpy as np

from jax_speedrun.config import PRESETS
from jax_speedrun.tools.comparison.turns import make_job
from jax_speedrun.tools.comparison.worker import load_arrays, measure, parity, sample_ms
from tests.tools.comparison.fakes import FakeSide, parity_inputs, parity_job

TINY = PRESETS["tiny"]
WINDOWS = [{"tokens": 128, "blocks": 1, "step": 0}, {"tokens": 384, "blocks": 3, "step": 10}]


def test_a_sample_is_the_mean_over_calls_not_waited_for():
    events = []
    samples = sample_ms(lambda: events.append("call") or time.sleep(0.002), lambda _: events.append("wait"), 3, 0.02)
    assert len(samples) == 3
    assert all(2 <= ms < 20 for ms in samples)
    # Two to warm up and one to choose the number of calls, each waited for; then several calls to a wait.
    assert events[:6] == ["call", "wait"] * 3
    assert events.count("wait") == 6
    assert events.count("call") >= 3 + 3 * 2


def test_measures_the_parts_asked_for_the_step_first():
    side = FakeSide()
    inputs = {"tokens": np.zeros((1, 8)), "targets": np.zeros((1, 8))}
    job = make_job(
        TINY,
        "measure",
        parts=["head", "attention", "step"],
        windows=WINDOWS,
        samples=2,
        sample_seconds=0.0,
    )
    result = measure(side, {**job, "began": time.time() - 5}, inputs)
    assert [(t["part"], t["window"]) for t in result["times"]] == [
        ("step", 128),
        ("step", 384),
        ("attention_forward", 128),
        ("attention_forward", 384),
        ("attention", 128),
        ("attention", 384),
        ("head", None),
        ("matmul", None),
    ]
    assert all(len(t["ms"]) == 2 for t in result["times"])
    assert 5 <= result["first_step_s"] < 6
    # Taken before anything else could raise it.
    assert result["peak_bytes"] == sum(part == "step" for part, _, _ in side.dispatched)
    assert {(window, step) for part, window, step in side.dispatched if part == "step"} == {(1, 0), (3, 10)}
    json.dumps(result)


def test_parity_worker_takes_snapshots_and_starts_again_for_the_curve(tmp_path):
    result = parity(FakeSide(), parity_job(tmp_path), parity_inputs())
    arrays = load_arrays(tmp_path / "out.npz")
    assert arrays.keys() == {
        f"{what}:{name}" for what in ("gradient", "after1", "after3") for name in ("head", "blocks.0.lambdas")
    }
    np.testing.assert_array_equal(arrays["after3:head"], 0.5)
    assert result["loss"] == 2.0
    assert result["losses"] == [0.0, 1.0, 2.0, 0.0]  # three sequences, then from the start
    assert result["validation"] == {"0": 26.0, "2": 6.5, "4": 1.625}
