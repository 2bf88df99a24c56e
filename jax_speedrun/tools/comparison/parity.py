"""Do both frameworks compute the same? Same weights, same tokens, and a tolerance taken from PyTorch itself.

No two programs round alike, so "the same" needs a yardstick: PyTorch runs twice, compiled and eagerly, which is
the same arithmetic with other roundings. JAX may differ from compiled PyTorch by `FACTOR` times what eager
PyTorch does for the same parameter of any layer, or by a floor where those two happen to round alike. The tolerance of
whole curves is fixed, so eager PyTorch, which is slow, trains none.
"""

import dataclasses
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from ...config import Config
from ..layout import make_table, wrap
from . import report
from .turns import Job, Result, make_job
from .worker import load_arrays, save_arrays, thin

SNAPSHOTS = (1, 2, 5, 10)
FACTOR = 3.0
GRADIENT_FLOOR = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative, in the Euclidean norm of one parameter's gradient; a vector's to that of its kind, if that is larger."""
CHANGE_FLOOR = {"float32": 5e-3, "bfloat16": 5e-2}
"""The same for what training has changed: Adam's first step is a sign, which rounding flips where gradients vanish."""
LOSS_TOLERANCE = 1e-3
CURVE_TOLERANCE = 0.02
SIDES = {"jax": ("jax", True), "torch": ("torch", True), "eager": ("torch", False)}


@dataclasses.dataclass(frozen=True)
class Line:
    """One quantity: JAX against compiled PyTorch, eager against compiled PyTorch, and what is allowed."""

    quantity: str
    difference: float
    rounding: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        # False for nan.
        return self.difference <= self.tolerance


def run_parity(
    launch: Callable[[str, Job, str], Result],
    config: Config,
    folder: Path,
    *,
    window: int,
    curve_steps: int,
    say: Callable[[str], None] = print,
) -> tuple[list[Line], dict[str, Result]]:
    """Do all of it. `folder` holds inputs.npz, and takes the arrays (gigabytes, deleted at the end).

    Returns:
      The lines, and each side's result: `loss`, `losses`, `validation`.
    """
    initial, filled = folder / "initial.npz", folder / "filled.npz"
    arrays = {side: folder / f"{side}.npz" for side in SIDES}
    try:
        say("initial weights: jax")
        launch("jax", make_job(config, "initial", arrays_out=str(initial)), "initial")
        start = fill(load_arrays(initial), config.seed)
        save_arrays(filled, start)
        results = {}
        for side, (framework, compile) in SIDES.items():
            say(f"parity: {side}")
            job = make_job(
                config,
                "parity",
                inputs=str(folder / "inputs.npz"),
                initial=str(initial),
                filled=str(filled),
                arrays_out=str(arrays[side]),
                snapshots=SNAPSHOTS,
                curve_steps=curve_steps if compile else 0,
                validate_every=config.validation_every,
                window=window,
            )
            job["compile"] = compile
            results[side] = launch(framework, job, side)
        return list(lines(config.model.compute_dtype, results, arrays, start)), results
    finally:
        for path in (initial, filled, *arrays.values()):
            path.unlink(missing_ok=True)


def fill(weights: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Return the weights with nothing special about them: the record's zeros would hide most gradients.

    Zero matrices become like the others, uniform with standard deviation 0.5 / sqrt(fan_in); vectors are moved.
    """
    generator = np.random.default_rng(seed)
    filled = {}
    for name, value in weights.items():
        if value.ndim == 1:
            value = value + 0.1 * generator.standard_normal(value.shape)
        elif not value.any():
            bound = math.sqrt(3) * 0.5 / math.sqrt(value.shape[-1])
            value = generator.uniform(-bound, bound, value.shape)
        filled[name] = value.astype(np.float32)
    return filled


def lines(
    dtype: str, results: Mapping[str, Result], arrays: Mapping[str, Path], start: Mapping[str, np.ndarray]
) -> Iterator[Line]:
    """Yield every quantity compared, parameter by parameter."""
    loss = {side: result["loss"] for side, result in results.items()}
    yield _scalar_line("loss, step 0", loss, LOSS_TOLERANCE)
    files = {side: np.load(path) for side, path in arrays.items()}
    measured: dict[str, Measured] = {}
    try:
        for key in files["torch"].files:
            what, name = key.split(":")
            values = {side: file[key] for side, file in files.items()}
            if what != "gradient":
                values = {side: value - thin(start[name]) for side, value in values.items()}
            measured[f"{what}: {name}"] = Measured.of(values["jax"], values["eager"], values["torch"])
    finally:
        for file in files.values():
            file.close()
    kinds: dict[str, list[Measured]] = defaultdict(list)
    for quantity, one in measured.items():
        kinds[kind_of(quantity)].append(one)
    for quantity, one in measured.items():
        kind = kinds[kind_of(quantity)]
        # A vector is a few sums of a great many terms. Where they happen to cancel, their rounding does not.
        usual = math.sqrt(sum(other.size**2 for other in kind) / len(kind)) if one.is_vector else 0.0
        difference, rounding = (_ratio(distance, max(one.size, usual)) for distance in (one.difference, one.rounding))
        # The rounding of two or three numbers may be small by chance: what one layer's has been, another's may be.
        worst = max(_ratio(other.rounding, max(other.size, usual)) for other in kind)
        floor = (GRADIENT_FLOOR if quantity.startswith("gradient:") else CHANGE_FLOOR)[dtype]
        yield Line(quantity, difference, rounding, max(floor, FACTOR * worst))
    for step in results["torch"]["validation"]:
        losses = {side: r["validation"][step] for side, r in results.items() if step in r["validation"]}
        yield _scalar_line(f"validation loss, step {step}", losses, CURVE_TOLERANCE)


def _scalar_line(quantity: str, values: Mapping[str, float], tolerance: float) -> Line:
    rounding = abs(values["eager"] - values["torch"]) if "eager" in values else None
    return Line(quantity, abs(values["jax"] - values["torch"]), rounding, tolerance)


class Measured(NamedTuple):
    """One array of all sides, in Euclidean norms: JAX and eager less compiled PyTorch, and compiled PyTorch itself."""

    difference: float
    rounding: float
    size: float
    is_vector: bool

    @classmethod
    def of(cls, jax: np.ndarray, eager: np.ndarray, torch: np.ndarray) -> "Measured":
        if not jax.shape == eager.shape == torch.shape:
            raise ValueError(f"shapes {jax.shape} (JAX), {eager.shape} (eager) and {torch.shape} (compiled PyTorch)")
        return cls(_norm(jax - torch), _norm(eager - torch), _norm(torch), torch.ndim == 1)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _ratio(distance: float, size: float) -> float:
    """Return distance / size, 0 where both are 0."""
    return distance / size if size else (0.0 if distance == 0 else math.inf)


def worst_of_each_kind(lines: Iterable[Line]) -> list[Line]:
    """Return the same parameter of all layers in one line: the one closest to, or furthest beyond, its tolerance."""
    kinds: dict[str, Line] = {}
    for line in lines:
        known = kinds.get(kind_of(line.quantity))
        if known is None or not line.difference / line.tolerance <= known.difference / known.tolerance:
            kinds[kind_of(line.quantity)] = line
    return list(kinds.values())


def kind_of(quantity: str) -> str:
    """Return a quantity's name without the number of its layer or table."""
    return re.sub(r"\.\d+", ".*", quantity)


def table(lines: Iterable[Line], title: str) -> Table:
    result = make_table(title, "worst of each kind", "JAX -\nPyTorch", "eager -\ncompiled", "tolerance", "")
    for line in worst_of_each_kind(lines):
        style = None if line.passed else "bold red"
        numbers = ("-" if x is None else f"{x:.2e}" for x in (line.difference, line.rounding, line.tolerance))
        result.add_row(line.quantity, *numbers, "ok" if line.passed else "TOO FAR", style=style)
    return result


def to_json(lines: Iterable[Line], results: Mapping[str, Result]) -> dict[str, Any]:
    return {
        "lines": [{**dataclasses.asdict(line), "passed": line.passed} for line in lines],
        "sides": dict(results),
    }


def headline(results: Mapping[str, Result]) -> str:
    """Return card, today's date and versions on one line."""
    return report.headline({side: results[side] for side in ("jax", "torch")}, time.strftime("%Y-%m-%d"))


def draw(results: Mapping[str, Result], path: Path, description: str) -> None:
    """Write `chart` as a PNG."""
    chart(results, description).savefig(path, format="png")


def chart(results: Mapping[str, Result], description: str) -> Figure:
    """Return a chart of the training losses of both, and of how far apart they are, complete alone."""
    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    losses = {side: np.array(results[side]["losses"]) for side in ("jax", "torch")}
    above.plot(losses["torch"], color="tab:orange", linewidth=1, label="PyTorch")
    above.plot(losses["jax"], color="tab:blue", linewidth=1, label="JAX")
    below.plot(losses["jax"] - losses["torch"], color="tab:blue", linewidth=1, label="JAX - PyTorch")
    above.set(ylabel="training loss (nats per token)")
    apart = np.abs(losses["jax"] - losses["torch"])
    spread = (
        f"from the same weights on the same tokens; apart by {apart.mean():.1e} in the mean, {apart.max():.1e} at most"
    )
    above.set_title("\n".join(map(wrap, (headline(results), description, spread))), fontsize=9)
    below.set(xlabel="step", ylabel="difference")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
