"""The head bench at small sizes, its kernels in the interpreter."""

import json

import pytest

from jax_speedrun.tools.bench import head

SIZES = ("--tokens", "128", "--vocab-size", "640", "--width", "256", "--error-tokens", "128", "--chunks", "128")


@pytest.mark.slow
def test_it_runs_small_without_a_gpu(tmp_path, capsys, monkeypatch):
    assert head.main([*SIZES, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "head.json").read_text())
    assert {row["name"] for row in record["rows"]} >= {"whole, xla", "whole, hopper", "dx, cuBLASLt"}
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    monkeypatch.setattr(head, "LARGEST_ERROR", -1.0)
    assert head.main([*SIZES, "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tokens", "33"), "--tokens 33: the kernels need"),
        (("--tokens", "0"), "--tokens 0: the kernels need at least one token"),
        (("--tokens", "256", "--chunks", "512"), "--chunks 512: must divide --tokens 256"),
    ],
)
def test_sizes_that_the_kernels_do_not_have_are_one_line(capsys, options, said):
    assert head.main([*SIZES, *options]) == 2
    assert f"bench_head.py: error: {said}" in capsys.readouterr().err
