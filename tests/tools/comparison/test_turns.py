"""How workers are started, and what they are given."""

import json
import time

import numpy as np
import pytest

from jax_speedrun.config import PRESETS
from jax_speedrun.data.batches import TINY_DATA
from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.block_mask import DOCUMENT_START
from jax_speedrun.tools.comparison import turns
from jax_speedrun.tools.comparison.worker import load_arrays
from tests.tools.comparison.fakes import fake_python

TINY = PRESETS["tiny"]


def take_turns(sides, kernels):
    """What is started, and with what job, in two rounds."""
    started = []

    def launch(framework, job, name):
        started.append((framework, job, name))
        return {"answer": len(started), "attention": "xla", "kernels": kernels}

    jobs = {side: {"of": side} for side in sides}
    return started, list(turns.measure_in_turns(launch, jobs, 2, say=lambda _: None))


def test_frameworks_take_turns():
    started, (after_one, results) = take_turns(["jax", "torch"], "hopper")
    assert after_one == results[:2]
    assert [(framework, name) for framework, _, name in started] == [
        ("jax", "jax-0"),
        ("torch", "torch-0"),
        ("jax", "jax-1"),
        ("torch", "torch-1"),
    ]
    assert [(r["side"], r["round"], r["answer"]) for r in results] == [
        ("jax", 0, 1),
        ("torch", 0, 2),
        ("jax", 1, 3),
        ("torch", 1, 4),
    ]


def test_jax_without_our_kernels_takes_its_turn_where_there_are_any():
    started, (_, results) = take_turns(["jax", "xla", "torch"], "hopper")
    assert [name for *_, name in started] == ["jax-0", "xla-0", "torch-0", "jax-1", "xla-1", "torch-1"]
    assert started[1][:2] == ("jax", {"of": "xla"})
    assert [result["side"] for result in results[:3]] == ["jax", "xla", "torch"]
    started, _ = take_turns(["jax", "xla", "torch"], "xla")
    assert [name for *_, name in started] == ["jax-0", "torch-0", "jax-1", "torch-1"]


def test_a_workers_answer_is_its_last_line(tmp_path):
    python = fake_python(tmp_path / "python", "print('hello'); print(json.dumps({'part': job['parts'], 'n': 1}))")
    launch = turns.Launcher({"torch": python}, tmp_path / "work")
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
    launch = turns.Launcher({"torch": fake_python(tmp_path / "python", f"sys.exit({said!r})")}, tmp_path / "work")
    with pytest.raises(UsageError, match=message):
        launch("torch", {}, "torch-0")


def test_inputs_are_text_cut_into_documents(tmp_path):
    said = turns.write_inputs(tmp_path / "inputs.npz", TINY, TINY_DATA, 40, cut=True, validation=3)
    assert "log-normal" in said
    arrays = load_arrays(tmp_path / "inputs.npz")
    tokens, targets = arrays["tokens"].reshape(-1), arrays["targets"].reshape(-1)
    assert arrays["tokens"].shape == (40, 1024)
    assert arrays["val_tokens"].shape == arrays["val_targets"].shape == (3, 1024)
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    lengths = np.diff(np.flatnonzero(tokens == DOCUMENT_START))
    assert 200 < np.median(lengths) < 600
    turns.write_inputs(tmp_path / "same.npz", TINY, TINY_DATA, 3, cut=False, validation=0)
    plain = load_arrays(tmp_path / "same.npz")
    assert (plain["tokens"] == DOCUMENT_START).sum() <= 3
    agree = plain["tokens"] == arrays["tokens"][:3]
    assert (agree | (arrays["tokens"][:3] == DOCUMENT_START)).all()
