"""What is made of measurements: a summary, a table, notes and a chart."""

import json

import matplotlib.image
import numpy as np
import pytest

from jax_speedrun.tools.comparison import report
from tests.tools.comparison.fakes import FAKE_ANSWER, render


def results(jax_ms=10.0, torch_ms=20.0):
    both = []
    for number in range(2):
        for framework, ms in (("jax", jax_ms), ("torch", torch_ms)):
            times = [{"part": "step", "window": w, "ms": [ms * w, ms * w + number]} for w in (1, 4)]
            times += [
                {"part": "head", "window": None, "ms": [5.0]},
                {"part": "matmul", "window": None, "ms": [ms / 10]},
            ]
            answer = {**FAKE_ANSWER, "first_step_s": 30.0 - number, "times": times, "framework": framework}
            both.append({**answer, "round": number, "peak_flops": 1e12 if framework == "jax" else None})
    return both


WORK = (1000, 6e9, {1: 1e9, 4: 2e9})  # tokens, FLOP of matmuls, and of attention by window


def test_summary_of_known_samples():
    summary = report.summarize(results(), *WORK)
    rows = {(row["part"], row["window"]): row for row in summary["rows"]}
    assert list(rows) == [("step", 1), ("step", 4), ("head", None), ("matmul", None)]
    assert rows["step", 4]["jax"] == {"median": 40.0, "low": 40.0, "high": 41.0, "n": 4}
    assert rows["step", 4]["ratio"] == 2.0
    assert summary["ceiling_flops"] == pytest.approx(2 * 512**3 / 1e-3)
    assert summary["frameworks"]["jax"]["first_step_s"] == {"cold": 30.0, "warm": 29.0}
    first, second = summary["throughput"]
    assert first["tokens_per_s"] == pytest.approx({"jax": 100_000, "torch": 50_000})
    # 6e9 FLOP in 10 ms of 1e12 a second
    assert first["mfu"]["without_attention"] == pytest.approx({"jax": 0.6, "torch": 0.3})
    assert first["mfu"]["with_attention"] == pytest.approx({"jax": 0.7, "torch": 0.35})
    assert first["mfu_of_ceiling"]["without_attention"]["jax"] == pytest.approx(6e11 / summary["ceiling_flops"])
    assert second["mfu"]["with_attention"]["jax"] == pytest.approx(0.2, rel=0.02)  # 8e9 FLOP in 40 to 41 ms
    json.dumps(summary)


@pytest.mark.parametrize(
    ("ratio", "said"), [(1.5, "JAX 1.50 x faster"), (0.5, "PyTorch 2.00 x faster"), (1.005, "even"), (0.995, "even")]
)
def test_verdict(ratio, said):
    assert report.verdict(ratio) == said


def test_table_and_notes_say_it_all():
    summary = report.summarize(results(), *WORK)
    text = render(report.table(summary, "a title"))
    for part in (
        "a title",
        "40.00 ms (40.00 to 41.00)",
        "JAX 2.00 x faster",
        "even",
        "60.0%, with attention 70.0%",
        "30.0 s",
        "29.0 s",
        "3.0 GiB",
    ):
        assert part in text
    notes = "\n".join(report.notes(summary))
    assert "PyTorch: a stand-in" in notes
    assert "datasheet 1 TFLOP/s" in notes
    bare = [{**r, "peak_flops": None, "first_step_s": None, "peak_bytes": None} for r in results()]
    text = render(report.table(report.summarize(bare, *WORK), ""))
    for unknown in ("datasheet", "caches", "memory"):
        assert unknown not in text


@pytest.mark.parametrize(("jax_ms", "torch_ms", "color"), [(10.0, 20.0, "blue"), (20.0, 10.0, "orange")])
def test_chart_puts_the_winner_on_its_side(tmp_path, jax_ms, torch_ms, color):
    summary = report.summarize(results(jax_ms, torch_ms), *WORK)
    report.draw(summary, tmp_path / "chart.png", "title")
    pixels = matplotlib.image.imread(tmp_path / "chart.png")[..., :3]
    colors = {"blue": (0x1F, 0x77, 0xB4), "orange": (0xFF, 0x7F, 0x0E)}
    found = {name: np.abs(pixels - np.array(rgb) / 255).max(-1) < 0.02 for name, rgb in colors.items()}
    assert found[color].sum() > 1000
    assert sum(mask.sum() for mask in found.values()) == found[color].sum()
