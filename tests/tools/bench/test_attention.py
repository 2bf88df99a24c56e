"""The attention bench at small sizes: what it measures, records and refuses."""

import json

import matplotlib.image
import pytest

from jax_speedrun.tools.bench.attention import LONG_LAYERS, SHORT_LAYERS, Row, layer_mix, main

SIZES = ("--peers", "xla", "--length", "512", "--heads", "1", "--head-width", "32")


@pytest.mark.slow
def test_it_runs_small_without_a_gpu(tmp_path, capsys):
    assert main([*SIZES, "--windows", "128", "512", "--draws", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [(row["window"], row["kind"], row["direction"]) for row in rows] == [
        (window, kind, direction)
        for window in (128, 512)
        for kind in ("long", "short")
        for direction in ("forward", "backward")
    ]
    assert all(0 < error < 5e-3 for row in rows for error in row["relative_errors"])
    assert [len(row["largest_errors"]) for row in rows[:2]] == [1, 3]
    # 2 matmuls forward and 5 backward, of the same pairs.
    work = [row["tflops"] * row["ms"] for row in rows]
    assert work[1] == pytest.approx(2.5 * work[0])
    assert work[4] > 2 * work[0]
    assert matplotlib.image.imread(tmp_path / "attention.png").shape[0] > 100
    printed = capsys.readouterr().out
    assert "layer mix at a window of 512 tokens" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_layer_mix_is_that_of_the_record():
    rows = [
        Row(1792, kind, peer, direction, ms, 0, 0, None, None)
        for peer, factor in (("hopper", 1), ("flex", 2))
        for kind, direction, ms in (("long", "forward", 1.0 * factor), ("short", "backward", 0.5 * factor))
    ]
    ours = LONG_LAYERS * 1.0 + SHORT_LAYERS * 0.5
    said = layer_mix([*rows, Row(128, "long", "hopper", "forward", 9.0, 0, 0, None, None)], 1792)
    assert f"hopper {ours:.2f} ms, flex {2 * ours:.2f} ms, hopper / flex 0.500" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--windows", "100"), "--windows 100: must be a positive multiple of 128 tokens"),
        (("--windows", "0"), "--windows 0: must be a positive multiple of 128 tokens"),
        (("--draws", "0"), "--draws: must be at least 1"),
        (("--length", "100"), "--length 100: must be a positive multiple of 128"),
        (("--peers", "hopper"), "--peers: only xla runs without a GPU"),
        (("--data", "nowhere"), "--data nowhere: no such folder"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    assert main([*SIZES, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench_attention.py: error: {said}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
