"""The bench of a layer's matmuls at small sizes, its kernels in the interpreter."""

import json

import pytest

from jax_speedrun.tools.bench import matmuls

SIZES = ("--tokens", "128", "--width", "256", "--hidden", "256")


@pytest.mark.slow
def test_it_runs_small_without_a_gpu(tmp_path, capsys, monkeypatch):
    assert matmuls.main([*SIZES, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "matmuls.json").read_text())["rows"]
    by_kernels = [row for row in rows if row["error"] is not None]
    assert len(by_kernels) == 8
    assert all(row["error"] > 2.0**-10 for row in by_kernels)  # some roundings, not none
    # So small a matmul waits for memory: x, y, their sum and the weight in bfloat16.
    predicted = {row["name"]: row["predicted_ms"] for row in rows}
    bytes_moved = 2 * (3 * 128 * 256 + 256 * 256)
    assert predicted["x + y W^T and its rstd"] == pytest.approx(bytes_moved / 3.0e12 * 1e3)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_sizes_that_the_kernels_do_not_have_are_one_line(tmp_path, capsys):
    assert matmuls.main([*SIZES, "--tokens", "33", "--out", str(tmp_path)]) == 2
    assert "T a multiple of 128, got 33" in capsys.readouterr().err
