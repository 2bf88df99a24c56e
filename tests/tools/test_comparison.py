"""scripts/compare.py: what its workers measure, how they are started, and what is made of their answers."""

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
import time

import jax
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from jax_speedrun.config import PRESETS
from jax_speedrun.data.batches import END_OF_TEXT, TINY_DATA
from jax_speedrun.errors import UsageError
from jax_speedrun.optimizer import window_blocks
from jax_speedrun.tools.comparison import parity as compare_parity
from jax_speedrun.tools.comparison import report as compare_report
from jax_speedrun.tools.comparison import turns as compare
from jax_speedrun.tools.comparison.jax_side import JaxSide
from jax_speedrun.tools.comparison.parity import Line
from jax_speedrun.tools.comparison.worker import PARTS, load_arrays, measure, parity, sample_ms, step_of_window, thin
from tests.paths import ROOT
from tests.scripts import load_script

SCRIPT = ROOT / "scripts" / "compare.py"
TINY = PRESETS["tiny"]

FAKE_ANSWER = {
    "device": "cpu",
    "versions": {"torch": "0"},
    "fallbacks": ["PyTorch: a stand-in"],
    "attention": "none",
    "kernels": "none",
    "peak_flops": None,
    "matmul_size": 512,
    "first_step_s": 2.0,
    "peak_bytes": 3 << 30,
}


@pytest.fixture(scope="module")
def script():
    return load_script("compare")


def fake_python(path, body):
    """A stand-in for PyTorch's Python: says that torch is there, and answers as `body` does with `job` in scope."""
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\nif sys.argv[1] == '-c':\n    sys.exit(0)\n"
        f"job = json.load(open(sys.argv[-1]))\n{body}\n"
    )
    path.chmod(0o755)
    return str(path)


class FakeSide:
    """A model of two parameters that shrink by a factor of `decay` a step, and clocks that do not tick."""

    def __init__(self, decay=0.5):
        self.decay = decay
        self.dispatched = []
        self.values = {}

    def describe(self):
        return {"device": "fake", "fallbacks": []}

    def dispatcher(self, part, tokens_T, targets_T, window, step):
        return lambda: self.dispatched.append((part, window, step))

    def wait(self, result):
        pass

    def peak_bytes(self):
        return len(self.dispatched)

    def load(self, weights):
        self.values = dict(weights)

    def parameters(self):
        return dict(self.values)

    def gradients(self, tokens_T, targets_T, window):
        return 2.0, dict(self.values)

    def step(self, tokens_T, targets_T, step):
        self.values = {name: self.decay * value for name, value in self.values.items()}
        return float(tokens_T[0])

    def evaluate(self, tokens_NT, targets_NT, step):
        return float(sum(value.sum() for value in self.values.values()))


# --- The worker -------------------------------------------------------------------


def test_a_sample_is_the_mean_over_calls_not_waited_for():
    events = []
    samples = sample_ms(lambda: events.append("call") or time.sleep(0.002), lambda _: events.append("wait"), 3, 0.02)
    assert len(samples) == 3
    assert all(2 <= ms < 20 for ms in samples)
    # Two to warm up and one to choose the number of calls, each waited for; then several calls to a wait.
    assert events[:6] == ["call", "wait"] * 3
    assert events.count("wait") == 6
    assert events.count("call") >= 3 + 3 * 2


@pytest.mark.parametrize("name", ["tiny", "eighth"])
def test_step_of_window_is_the_first_with_it(name):
    config = PRESETS[name]
    final = config.optimizer.window_tokens
    windows = [int(window_blocks(step, config.steps, final)) for step in range(0, config.steps + 1)]
    for window in set(windows):
        assert step_of_window(window, config.steps, final) == windows.index(window)
    with pytest.raises(ValueError, match="never has a window of 99 blocks"):
        step_of_window(99, config.steps, final)


def test_measures_the_parts_asked_for_the_step_first():
    side = FakeSide()
    inputs = {"tokens": np.zeros((1, 8)), "targets": np.zeros((1, 8))}
    job = compare.make_job(
        TINY, "measure", parts=["head", "attention", "step"], windows=[1, 3], samples=2, sample_seconds=0.0
    )
    result = measure(side, {**job, "began": time.time() - 5}, inputs)
    assert [(t["part"], t["window"]) for t in result["times"]] == [
        ("step", 1),
        ("step", 3),
        ("attention_forward", 1),
        ("attention_forward", 3),
        ("attention", 1),
        ("attention", 3),
        ("head", None),
        ("matmul", None),
    ]
    assert all(len(t["ms"]) == 2 for t in result["times"])
    assert 5 <= result["first_step_s"] < 6
    # Taken before anything else could raise it.
    assert result["peak_bytes"] == sum(part == "step" for part, _, _ in side.dispatched)
    assert {(window, step) for part, window, step in side.dispatched if part == "step"} == {(1, 0), (3, 10)}
    json.dumps(result)


def parity_job(tmp_path, **changes):
    weights = {"head": np.full((2, 3), 4.0, np.float32), "blocks.0.lambdas": np.ones(2, np.float32)}
    np.savez(tmp_path / "weights.npz", **weights)
    paths = {name: str(tmp_path / "weights.npz") for name in ("initial", "filled")}
    return {
        **paths,
        "arrays_out": str(tmp_path / "out.npz"),
        "snapshots": [1, 3],
        "curve_steps": 4,
        "validate_every": 2,
        "window": 5,
        **changes,
    }


def parity_inputs():
    rows = np.arange(3)[:, None] * np.ones(8)
    return {"tokens": rows, "targets": rows, "val_tokens": rows, "val_targets": rows}


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


# --- Starting workers -------------------------------------------------------------


def test_frameworks_take_turns():
    started = []

    def launch(framework, job, name):
        started.append((framework, name))
        return {"answer": len(started)}

    after_one, results = compare.measure_in_turns(launch, {}, 2, say=lambda _: None)
    assert after_one == results[:2]
    assert started == [("jax", "jax-0"), ("torch", "torch-0"), ("jax", "jax-1"), ("torch", "torch-1")]
    assert [(r["framework"], r["round"], r["answer"]) for r in results] == [
        ("jax", 0, 1),
        ("torch", 0, 2),
        ("jax", 1, 3),
        ("torch", 1, 4),
    ]


def test_a_workers_answer_is_its_last_line(tmp_path):
    python = fake_python(tmp_path / "python", "print('hello'); print(json.dumps({'part': job['parts'], 'n': 1}))")
    launch = compare.Launcher({"torch": python}, tmp_path / "work")
    launch.require_torch()
    assert launch("torch", {"parts": ["head"]}, "torch-0") == {"part": ["head"], "n": 1}
    assert time.time() - 60 < json.loads((tmp_path / "work" / "torch-0.json").read_text())["began"] < time.time()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("ValueError: bad", r"^the torch worker failed \(ValueError: bad\); see .*torch-0.log$"),
        ("CUDA out of memory. Tried", "smaller --sequence-length"),
    ],
)
def test_a_failed_worker_is_one_line(tmp_path, said, message):
    launch = compare.Launcher({"torch": fake_python(tmp_path / "python", f"sys.exit({said!r})")}, tmp_path / "work")
    with pytest.raises(UsageError, match=message):
        launch("torch", {}, "torch-0")


def test_missing_torch_is_one_line(script, tmp_path, capsys):
    no_torch = tmp_path / "python"
    no_torch.write_text("#!/bin/sh\nexit 1\n")
    no_torch.chmod(0o755)
    out = tmp_path / "out"
    assert script.main(["--torch-python", str(no_torch), "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        "compare.py: error: PyTorch is not installed; run: pip install -e '.[torch]' (or name --torch-python)\n"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "1,99"], "--windows 99: a run of 24 steps never"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--curve-steps", "-1"], "--curve-steps must be at least 1"),
        (["--attention", "fast"], "--attention fast: choose one of auto"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--sequence-length", "100"], "--sequence-length must be a positive multiple of 128"),
        (["--train"], "--train needs --data"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(script, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    python = fake_python(tmp_path / "python", "")
    assert script.main(["--preset", "tiny", "--torch-python", python, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"compare.py: error: {message}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_out_must_be_new(script, tmp_path, capsys):
    python = fake_python(tmp_path / "python", "")
    assert script.main(["--preset", "tiny", "--torch-python", python, "--out", str(tmp_path)]) == 2
    assert "there already; name another folder" in capsys.readouterr().err


def test_inputs_are_text_cut_into_documents(tmp_path):
    said = compare.write_inputs(tmp_path / "inputs.npz", TINY, TINY_DATA, 40, cut=True, validation=3)
    assert "log-normal" in said
    arrays = load_arrays(tmp_path / "inputs.npz")
    tokens, targets = arrays["tokens"].reshape(-1), arrays["targets"].reshape(-1)
    assert arrays["tokens"].shape == (40, 1024)
    assert arrays["val_tokens"].shape == arrays["val_targets"].shape == (3, 1024)
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    lengths = np.diff(np.flatnonzero(tokens == END_OF_TEXT))
    assert 200 < np.median(lengths) < 600
    compare.write_inputs(tmp_path / "same.npz", TINY, TINY_DATA, 3, cut=False, validation=0)
    plain = load_arrays(tmp_path / "same.npz")
    assert (plain["tokens"] == END_OF_TEXT).sum() <= 3
    agree = plain["tokens"] == arrays["tokens"][:3]
    assert (agree | (arrays["tokens"][:3] == END_OF_TEXT)).all()


# --- What is made of the answers ---------------------------------------------------


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
    summary = compare_report.summarize(results(), *WORK)
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
    assert compare_report.verdict(ratio) == said


def render(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_table_and_notes_say_it_all():
    summary = compare_report.summarize(results(), *WORK)
    text = render(compare_report.table(summary, "a title"))
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
    notes = "\n".join(compare_report.notes(summary))
    assert "PyTorch: a stand-in" in notes
    assert "datasheet 1 TFLOP/s" in notes
    bare = [{**r, "peak_flops": None, "first_step_s": None, "peak_bytes": None} for r in results()]
    text = render(compare_report.table(compare_report.summarize(bare, *WORK), ""))
    for unknown in ("datasheet", "caches", "memory"):
        assert unknown not in text


@pytest.mark.parametrize(("jax_ms", "torch_ms", "color"), [(10.0, 20.0, "blue"), (20.0, 10.0, "orange")])
def test_chart_puts_the_winner_on_its_side(tmp_path, jax_ms, torch_ms, color):
    summary = compare_report.summarize(results(jax_ms, torch_ms), *WORK)
    compare_report.draw(summary, tmp_path / "chart.png", "title")
    pixels = matplotlib.image.imread(tmp_path / "chart.png")[..., :3]
    colors = {"blue": (0x1F, 0x77, 0xB4), "orange": (0xFF, 0x7F, 0x0E)}
    found = {name: np.abs(pixels - np.array(rgb) / 255).max(-1) < 0.02 for name, rgb in colors.items()}
    assert found[color].sum() > 1000
    assert sum(mask.sum() for mask in found.values()) == found[color].sum()


# --- Parity -----------------------------------------------------------------------


def test_fill_leaves_no_zero_and_no_special_scalar():
    weights = {"a": np.zeros((4, 300), np.float32), "b": np.ones((2, 2), np.float32), "c": np.array([1.0, 0.0])}
    filled = compare_parity.fill(weights, 0)
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
        return parity(FakeSide(decays[name]), {**job, "validate_every": 2}, parity_inputs())

    lines, answers = compare_parity.run_parity(
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
    _, first, second, other = compare_parity.lines("bfloat16", results, arrays, {})
    assert (first.rounding, first.tolerance) == pytest.approx((0.0, 0.3))
    assert (second.rounding, second.tolerance) == pytest.approx((0.1, 0.3))
    assert other.tolerance == compare_parity.GRADIENT_FLOOR["bfloat16"]
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
    _, _, vector, _, matrix = compare_parity.lines("bfloat16", results, arrays, {})
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
        return list(compare_parity.lines("float32", results, arrays, {}))[1]

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
    worst = compare_parity.worst_of_each_kind(lines)
    assert [line.quantity for line in worst] == ["gradient: blocks.1.w", "gradient: head"]
    text = render(compare_parity.table(lines, "title"))
    assert text.count("TOO FAR") == 2
    assert compare_parity.to_json(lines, {})["lines"][0]["passed"]


def test_parity_chart(tmp_path):
    sides = {side: {"losses": [3.0, 2.0, 1.5]} for side in compare_parity.SIDES}
    compare_parity.draw(sides, tmp_path / "parity.png", "title")
    assert matplotlib.image.imread(tmp_path / "parity.png").shape[0] > 100


# --- The real JAX side ------------------------------------------------------------


def test_jax_side_gives_back_what_it_loads_and_steps_like_the_program():
    small = {"padded_vocabulary": 256, "layers": 4, "long_layers": (0, 3), "attention_free_layers": (2,)}
    model = dataclasses.replace(TINY.model, value_embedding_tables=1, width=32, mlp_width=48, **small)
    side = JaxSide(compare.make_job(dataclasses.replace(TINY, model=model, sequence_length=256), "parity"))
    weights = compare_parity.fill(side.parameters(), 0)
    assert "blocks.0.attention.qkv_3CD" in weights
    side.load(weights)
    for name, value in side.parameters().items():
        np.testing.assert_array_equal(value, weights[name])
    tokens = np.arange(256, dtype=np.int32)
    loss, gradients = side.gradients(tokens, tokens, 2)
    assert all(gradients[name].any() for name in weights)
    # With a window of 2 blocks: the step that has it.
    step = step_of_window(2, TINY.steps, TINY.optimizer.window_tokens)
    assert side.step(tokens, tokens, step) == pytest.approx(loss, rel=1e-5)
    assert side.evaluate(tokens[None], tokens[None], step) < loss
    moved = side.parameters()
    assert all((moved[name] != weights[name]).any() for name in weights)
    for part in (*(part for parts in PARTS.values() for part in parts), "matmul"):
        result = side.dispatcher(part, tokens, tokens, 2, step)()
        side.wait(result)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result)), part
    with pytest.raises(ValueError, match=r"head: weights of shape \(1, 1\)"):
        side.load({**weights, "head": np.zeros((1, 1))})


def run_script(tmp_path, python, *options):
    return subprocess.run(
        [
            *(sys.executable, SCRIPT, "--preset", "tiny", "--sequence-length", "256", "--torch-python", python),
            *("--out", tmp_path / "out", *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


def test_the_whole_command_with_a_stand_in_for_pytorch(tmp_path):
    times = [{"part": part, "window": 3, "ms": [4.0]} for part in ("attention_forward", "attention")]
    times.append({"part": "matmul", "window": None, "ms": [4.0]})
    answer = {**FAKE_ANSWER, "times": times, "first_step_s": None, "peak_bytes": None}
    python = fake_python(tmp_path / "python", f"print(json.dumps({answer!r}))")
    parts = ("--parts", "attention", "--windows", "3", "--rounds", "1", "--samples", "2")
    done = run_script(tmp_path, python, *parts)
    assert done.returncode == 0, done.stderr
    assert "attention, one layer, forward + backward" in done.stdout
    assert "PyTorch: a stand-in" in done.stdout
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    jax_times = written["results"][0]["times"]
    assert [(t["part"], t["window"], len(t["ms"])) for t in jax_times] == [(t["part"], t["window"], 2) for t in times]
    assert all(ms > 0 for t in jax_times for ms in t["ms"])
    assert written["results"][0]["versions"]["jax"] == jax.__version__
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    assert not (tmp_path / "out" / "work" / "cache").exists()


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit('ValueError: lost')", 2, "worker failed (ValueError: lost)"),
        ("import os, time; os.kill(os.getppid(), 2); time.sleep(60)", 130, "compare.py: stopped"),
    ],
    ids=["failure", "interrupt"],
)
def test_finished_rounds_outlast_a_failure_and_an_interrupt(tmp_path, end, code, said):
    answer = {**FAKE_ANSWER, "times": [{"part": part, "window": 3, "ms": [4.0]} for part in ("step", "matmul")]}
    body = f"if sys.argv[-1].endswith('torch-1.json'):\n    {end}\nprint(json.dumps({answer!r}))"
    python = fake_python(tmp_path / "python", body)
    parts = ("--jax-python", python, "--parts", "step", "--windows", "3", "--rounds", "3")
    done = run_script(tmp_path, python, *parts)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "full step with optimisers" in done.stdout
    assert "1 of 3 rounds" in " ".join(done.stdout.split())
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(written["results"]) == 2
    # 256 tokens in 4 ms: a step here is one sequence, whatever the preset's batch.
    assert written["throughput"][0]["tokens_per_s"] == pytest.approx({"jax": 64_000, "torch": 64_000})
    assert (tmp_path / "out" / "compare.png").exists()
    assert not (tmp_path / "out" / "work" / "cache").exists()


def test_the_whole_command_with_pytorch(tmp_path):
    """Both measured and compared: set TORCH_PYTHON to a Python with PyTorch, unless this one has it."""
    if importlib.util.find_spec("torch"):
        python = sys.executable
    else:
        python = os.environ.get("TORCH_PYTHON") or pytest.skip(
            "PyTorch is not installed; pip install -e '.[torch]', or name a Python that has it in TORCH_PYTHON"
        )
    done = run_script(tmp_path, python, "--parity", "--curve-steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "out" / "parity.json").read_text())["lines"]
    gradients = [line for line in lines if line["quantity"].startswith("gradient")]
    assert len(gradients) == 39
    assert max(line["difference"] for line in gradients) < 1e-4
