"""Stand-ins for what compare.py starts: a Python that answers at once, and a side without a framework."""

import io
import sys

import numpy as np
from matplotlib.text import Text
from rich.console import Console

FAKE_ANSWER = {
    "device": "a card",
    "platform": "gpu",
    "versions": {"jax": "1.2.3", "torch": "4.5.6"},
    "fallbacks": ["a stand-in"],
    "reduced": None,
    "attention": "none",
    "kernels": "none",
    "peak_flops": None,
    "matmul_size": 512,
    "first_step_s": 2.0,
    "peak_bytes": 3 << 30,
}


def fake_python(path, body):
    """A stand-in for PyTorch's Python, or JAX's: it has torch but no GPU, and answers as `body` does of a `job`."""
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\nif sys.argv[1] == '-c':\n    sys.exit('jax' in sys.argv[2])\n"
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
        return {"device": "fake", "versions": {"jax": "1.2.3", "torch": "4.5.6"}, "fallbacks": []}

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


def render(table):
    """The table as a terminal of 80 columns has it: nothing wider, nothing left out."""
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    return text


def words_of(figure):
    """All text in a figure."""
    return " ".join(" ".join(text.get_text() for text in figure.findobj(Text)).split())
