"""What is made of measurements: a summary, a table, notes and a chart."""

import json
import time

import matplotlib.image
import numpy as np
import pytest

from jax_speedrun.tools.comparison import report
from tests.tools.comparison.fakes import FAKE_ANSWER, render, words_of


def results(jax_ms=10.0, torch_ms=20.0, *, xla_ms=None, control=None, **changes):
    """Two rounds of steps at windows of 128 and 512 tokens; `control` and `changes` are for PyTorch."""
    both = []
    sides = {"jax": jax_ms, "xla": xla_ms, "torch": torch_ms}
    for number in range(2):
        for side, ms in sides.items():
            if ms is None:
                continue
            times = [{"part": "step", "window": w, "ms": [ms * w / 128, ms * w / 128 + number]} for w in (128, 512)]
            matmul_ms = control if control and side == "torch" else 1.0
            times += [
                {"part": "head", "window": None, "ms": [5.0]},
                {"part": "matmul", "window": None, "ms": [matmul_ms]},
            ]
            answer = {**FAKE_ANSWER, "first_step_s": 30.0 - number, "times": times, "side": side, "round": number}
            answer |= {"peak_flops": 1e12 if side == "jax" else None, **(changes if side == "torch" else {})}
            both.append(answer)
    return both


WORK = (1000, 6e9, {128: 1e9, 512: 2e9})  # tokens, FLOP of matmuls, and of attention by window
ON_A_CPU = {"platform": "cpu", "reduced": "dense attention"}


def test_summary_of_known_samples():
    summary = report.summarize(results(), *WORK)
    rows = {(row["part"], row["window"]): row for row in summary["rows"]}
    assert list(rows) == [("step", 128), ("step", 512), ("head", None), ("matmul", None)]
    assert rows["step", 512]["jax"] == {"median": 40.0, "low": 40.0, "high": 41.0, "n": 4}
    assert rows["step", 512]["ratio"] == 2.0
    assert summary["ceiling_flops"] == pytest.approx(2 * 512**3 / 1e-3)
    assert summary["sides"]["jax"]["first_step_s"] == {"cold": 30.0, "warm": 29.0}
    first, second = summary["throughput"]
    assert first["tokens_per_s"] == pytest.approx({"jax": 100_000, "torch": 50_000})
    # 6e9 FLOP in 10 ms of 1e12 a second
    assert first["mfu"]["without_attention"] == pytest.approx({"jax": 0.6, "torch": 0.3})
    assert first["mfu"]["with_attention"] == pytest.approx({"jax": 0.7, "torch": 0.35})
    assert first["mfu_of_ceiling"]["without_attention"]["jax"] == pytest.approx(6e11 / summary["ceiling_flops"])
    assert second["mfu"]["with_attention"]["jax"] == pytest.approx(0.2, rel=0.02)  # 8e9 FLOP in 40 to 41 ms
    json.dumps(summary)


@pytest.mark.parametrize(
    ("ratio", "said"), [(1.5, "JAX 1.50 x"), (0.5, "PyTorch 2.00 x"), (1.005, "even"), (0.995, "even"), (None, "")]
)
def test_verdict(ratio, said):
    assert report.verdict(ratio) == said


def test_table_and_notes_say_it_all():
    summary = report.summarize(results(), *WORK)
    text = render(report.table(summary, "a title"))
    for part in (
        "a title",
        "40.00 ±1.2%",
        "JAX 2.00 x",
        "even",
        "0% apart",
        "60.0 / 70.0",
        "30.0 s",
        "29.0 s",
        "3.0 GiB",
        "1.2.3",
        "4.5.6",
    ):
        assert part in text
    notes = "\n".join(report.notes(summary))
    assert "a stand-in" in notes
    assert "torch 4.5.6" in notes
    assert "datasheet 1 TFLOP/s" in notes
    assert "medians of 4 samples" in notes
    bare = [{**r, "peak_flops": None, "first_step_s": None, "peak_bytes": None} for r in results()]
    text = render(report.table(report.summarize(bare, *WORK), ""))
    for unknown in ("datasheet", "caches", "memory"):
        assert unknown not in text


def test_jax_without_our_kernels_has_a_column():
    summary = report.summarize(results(xla_ms=15.0), *WORK)
    assert [row["xla"]["median"] for row in summary["rows"]] == [15.0, 60.0, 5.0, 1.0]
    assert summary["rows"][0]["ratio"] == 2.0  # PyTorch to JAX as it is
    assert summary["throughput"][0]["tokens_per_s"]["xla"] == pytest.approx(1e6 / 15)
    text = render(report.table(summary, "a title"))
    for cell in ("10.00 ±", "15.00 ±", "20.00 ±", "kernels"):
        assert cell in text
    assert "JAX without our kernels" in words_of(report.chart(summary, ""))
    assert "JAX without our kernels" not in words_of(report.chart(report.summarize(results(), *WORK), ""))


@pytest.mark.parametrize("factor", [0.12345, 12.345, 1234.5])
def test_a_table_of_three_columns_fits_whatever_the_numbers(factor):
    measured = results(1, 30, xla_ms=20)
    for part in (part for result in measured for part in result["times"]):
        part["ms"] = [factor * ms for ms in part["ms"]]
    summary = report.summarize(measured, *WORK)
    text = render(report.table(summary, "a long title " * 10))
    assert text.count("±") == 3 * 4


@pytest.mark.parametrize(("control", "trusted"), [(1.0, True), (1.09, True), (0.92, True), (1.11, False), (0.9, False)])
def test_a_control_that_differs_takes_the_trust_away(control, trusted):
    summary = report.summarize(results(control=control), *WORK)
    assert summary["control"]["trusted"] == trusted
    said = [*report.warnings(summary), words_of(report.chart(summary, ""))]
    assert all(("not to be trusted: the control" in line) == (not trusted) for line in said if line)
    assert len(said) == 1 + (not trusted)
    if not trusted:
        assert "11% apart" in render(report.table(summary, ""))
        assert f"1 ms in JAX, {control} ms in PyTorch, 11% apart" in said[0]


def test_on_a_cpu_frameworks_are_timed_and_no_factor_is_claimed(tmp_path):
    on_a_cpu = [{**r, "platform": "cpu", "device": "cpu"} for r in results(**ON_A_CPU)]
    summary = report.summarize(on_a_cpu, *WORK)
    assert {row["part"]: row["ratio"] for row in summary["rows"]} == {"step": None, "head": None, "matmul": 1.0}
    text = render(report.table(summary, ""))
    assert "10.00 ±" in text
    assert "20.00 ±" in text
    assert " x" not in text
    (line,) = report.warnings(summary)
    assert line == "no factor between frameworks: PyTorch ran with dense attention, which is not the same work"
    words = words_of(report.chart(summary, "what"))
    assert line in words
    assert "faster" not in words
    report.draw(summary, tmp_path / "chart.png", "what")
    assert matplotlib.image.imread(tmp_path / "chart.png").shape[0] > 100


def test_frameworks_on_two_devices_are_not_compared():
    on_two = [{**r, **({"platform": "cpu", "device": "a CPU"} if r["side"] == "jax" else {})} for r in results()]
    summary = report.summarize(on_two, *WORK)
    assert summary["incomparable"] == "JAX ran on a CPU and PyTorch ran on a card"
    assert summary["rows"][0]["ratio"] is None


def test_a_chart_is_complete_alone():
    chart = report.chart(report.summarize(results(), *WORK), "eighth, 65,536 tokens a step")
    words = words_of(chart)
    for part in (
        "JAX 1.2.3 and PyTorch 4.5.6 on a card",
        time.strftime("%Y-%m-%d"),
        "eighth, 65,536 tokens a step; windows in tokens",
        "full step with optimisers, window 512",
        "10.00 : 20.00 ms",
        "medians",
        "fastest to slowest samples",
    ):
        assert part in words
    # The spread of the second row: 20 / 11 to 21 / 10 for one, of four times that the other.
    (spread,) = (c for c in chart.axes[0].collections if len(c.get_segments()) == 4)
    first = spread.get_segments()[0]
    np.testing.assert_allclose(first[:, 0], [20 / 11 - 1, 21 / 10 - 1])


@pytest.mark.parametrize(("jax_ms", "torch_ms", "color"), [(10.0, 20.0, "blue"), (20.0, 10.0, "orange")])
def test_chart_puts_the_winner_on_its_side(tmp_path, jax_ms, torch_ms, color):
    summary = report.summarize(results(jax_ms, torch_ms), *WORK)
    report.draw(summary, tmp_path / "chart.png", "title")
    pixels = matplotlib.image.imread(tmp_path / "chart.png")[..., :3]
    colors = {"blue": (0x1F, 0x77, 0xB4), "orange": (0xFF, 0x7F, 0x0E)}
    found = {name: np.abs(pixels - np.array(rgb) / 255).max(-1) < 0.02 for name, rgb in colors.items()}
    assert found[color].sum() > 1000
    assert sum(mask.sum() for mask in found.values()) == found[color].sum()
