"""Statistics of finished runs from their logs: is the loss below the target, and how long did they take?

Of one group of runs, or of two against each other.
"""

import argparse
import dataclasses
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from ..errors import UsageError
from .command import make_parser, run_command
from .layout import wrap

TARGET = 3.28
CONFIDENCE = 0.95
_VALIDATION = re.compile(r"^step:(\d+)/(\d+) val_loss:(\S+) train_time:(\S+)ms step_avg:(\S+)ms$", re.MULTILINE)
_RESUMED = re.compile(r"^resumed:\d+/\d+$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as the last validation line of its log has it; if `resumed`, its clock left out 10 steps more.

    `curve`: (training time in s, validation loss) at each validation, nan where the loss was.
    """

    log: Path
    steps: int
    val_loss: float
    train_time_s: float
    step_avg_ms: float
    resumed: bool
    curve: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation and the mean's 95 % interval (Student's t); nan beside the mean for n = 1."""

    n: int
    mean: float
    deviation: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of one group minus that of another, its 95 % interval and two-sided p-value (Welch's t-test)."""

    mean: float
    low: float
    high: float
    p: float


def read_run(log: Path) -> Run:
    """Read a log.txt, or that of a run's folder.

    Raises:
      UsageError: it cannot be read, or the run was not finished.
    """
    file = log / "log.txt" if log.is_dir() else log
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); name the log.txt of a run") from error
    validations = _VALIDATION.findall(text)
    final = [line for line in validations if line[0] == line[1]]
    if not final:
        raise UsageError(f"{file}: no validation at the last step; leave out runs that are not finished")
    if len(final) > 1:
        raise UsageError(f"{file}: {len(final)} validations at the last step; give each run a log of its own")
    step, _, *values = final[0]
    try:
        val_loss, train_time_ms, step_avg_ms = map(float, values)
        curve = tuple((float(time_ms) / 1000, float(loss)) for _, _, loss, time_ms, _ in validations)
    except ValueError as error:
        raise UsageError(f"{file}: {error} in a validation line; the log is damaged") from error
    if not math.isfinite(val_loss):
        raise UsageError(f"{file}: the last validation loss is {val_loss}; leave out runs that diverged")
    return Run(file, int(step), val_loss, train_time_ms / 1000, step_avg_ms, bool(_RESUMED.search(text)), curve)


def read_runs(logs: Sequence[Path]) -> list[Run]:
    """Read one group of runs.

    Raises:
      UsageError: as `read_run`, or the group counts a log twice or mixes runs of different length.
    """
    runs: dict[Path, Run] = {}
    for run in map(read_run, logs):
        if runs.setdefault(run.log.resolve(), run) is not run:
            raise UsageError(f"{run.log}: named twice; each run counts once")
        first = next(iter(runs.values()))
        if run.steps != first.steps:
            raise UsageError(f"{run.log}: {run.steps} steps, but {first.log} has {first.steps}; compare with --versus")
    return list(runs.values())


def summarize(values: Sequence[float]) -> Summary:
    """Describe a sample of at least one value."""
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return Summary(n, mean, math.nan, math.nan, math.nan)
    deviation = float(np.std(values, ddof=1))
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return Summary(n, mean, deviation, mean - half, mean + half)


def p_below(values: Sequence[float], target: float) -> float:
    """Return the one-sided p-value of a true mean below `target` (t-test); nan for one value, or several equal ones."""
    if len(values) < 2 or np.ptp(values) == 0:
        return math.nan
    return float(scipy.stats.ttest_1samp(values, target, alternative="less").pvalue)


def compare(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Compare two samples by Welch's test; nan where one has fewer than 2 values or neither has any spread."""
    mean = float(np.mean(values) - np.mean(others))
    if min(len(values), len(others)) < 2 or np.ptp(values) == np.ptp(others) == 0:
        return Difference(mean, math.nan, math.nan, math.nan)
    test = scipy.stats.ttest_ind(values, others, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue))


def report(runs: Sequence[Run], versus: Sequence[Run] = (), target: float = TARGET) -> str:
    """Return the statistics as text, for one group of runs or two."""
    lines = _describe(runs, target)
    if versus:
        lines += ["", "versus", *_describe(versus, target), "", "difference (first group minus second)"]
        differences = [
            (name, compare(values, others), decimals)
            for (name, values, decimals), (_, others, _) in zip(_columns(runs), _columns(versus), strict=True)
        ]
        lines += [f"  {name:<8} {_difference(difference, decimals)}" for name, difference, decimals in differences]
        if any(math.isnan(difference.p) for _, difference, _ in differences):
            lines.append("  a test needs at least 2 logs on each side, and values that differ")
        else:
            lines.append("  p by Welch's t-test, two-sided")
    return "\n".join(lines)


def draw(groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Write `chart` as a PNG.

    Raises:
      UsageError: if `path` cannot be written.
    """
    try:
        chart(groups).savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from error


def chart(groups: Mapping[str, Sequence[Run]]) -> Figure:
    """Return a chart of validation loss over training time, a line a run and a colour a group, complete alone."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    title = []
    for number, (name, runs) in enumerate(groups.items()):
        for run in runs:
            label = f"{name}: {_end(runs)}" if run is runs[0] else None
            axes.plot(*zip(*run.curve, strict=True), ".-", color=f"C{number}", linewidth=1, label=label)
        made_with = dict.fromkeys(about for run in runs if (about := _made_with(run)))
        title.append(f"{name}, {runs[0].steps} steps: {'; '.join(made_with) or 'no config.json beside the logs'}")
    # The first loss, that of random weights, would leave no room for the rest.
    later = [loss for runs in groups.values() for run in runs for _, loss in run.curve[1:]]
    axes.set_ylim(min(later) - 0.1, max(later) + 0.1)
    axes.set(xlabel="training time by the record's clock, s", ylabel="validation loss, nats")
    axes.set_title("\n".join([*map(wrap, title), f"drawn {time.strftime('%Y-%m-%d')}"]), fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(title="at the end, mean ± deviation", fontsize=9)
    return figure


def _end(runs: Sequence[Run]) -> str:
    loss, time_s = (summarize([getattr(run, name) for run in runs]) for name in ("val_loss", "train_time_s"))
    if len(runs) == 1:
        return f"{loss.mean:.3f} after {time_s.mean:.0f} s (n = 1)"
    spread = f"{loss.mean:.4f} ± {loss.deviation:.4f} after {time_s.mean:.1f} ± {time_s.deviation:.1f} s"
    return f"{spread} (n = {len(runs)})"


def _made_with(run: Run) -> str | None:
    """Return framework, version and card of a run, from the config.json beside its log; None if that says nothing."""
    try:
        about = json.loads(run.log.with_name("config.json").read_text(encoding="utf-8"))
        if named := (about["config"] or {}).get("framework"):  # PyTorch's runs, whose devices are not JAX's
            return str(named)
        framework = about.get("framework", "jax")
        devices = about["devices"]
        return f"{framework} {about['versions'][framework]} on {devices['count']} x {devices['kind']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _columns(runs: Sequence[Run]) -> list[tuple[str, list[float], int]]:
    return [
        ("val loss", [run.val_loss for run in runs], 5),
        ("time, s", [run.train_time_s for run in runs], 2),
        ("step, ms", [run.step_avg_ms for run in runs], 2),
    ]


def _describe(runs: Sequence[Run], target: float) -> list[str]:
    lines = [f"{len(runs)} run{'s' * (len(runs) > 1)} of {runs[0].steps} steps"]
    for name, values, decimals in _columns(runs):
        lines.append(f"  {name:<8} {_summary(summarize(values), decimals)}")
    if len(runs) < 2:
        lines.append("  interval, deviation and t-test need at least 2 logs")
    else:
        p = p_below([run.val_loss for run in runs], target)
        verdict = "undefined, all losses are equal" if math.isnan(p) else f"{p:.4g}"
        lines.append(f"  p-value of a mean val loss below {target:g} (one-sided t-test): {verdict}")
    if resumed := sum(run.resumed for run in runs):
        lines.append(f"  {resumed} of them resumed: their clocks left out 10 steps more at each start")
    return lines


def _summary(summary: Summary, decimals: int) -> str:
    mean = f"mean {summary.mean:8.{decimals}f}"
    if summary.n < 2:
        return mean
    interval = f"{summary.low:8.{decimals}f} to {summary.high:8.{decimals}f}"
    return f"{mean}  95 % interval {interval}  deviation {summary.deviation:.{decimals}f}"


def _difference(difference: Difference, decimals: int) -> str:
    mean = f"{difference.mean:+9.{decimals}f}"
    if math.isnan(difference.p):
        return mean
    interval = f"{difference.low:+9.{decimals}f} to {difference.high:+9.{decimals}f}"
    return f"{mean}  95 % interval {interval}  p = {difference.p:.4g}"


def parser() -> argparse.ArgumentParser:
    p = make_parser("significance.py", __doc__)
    p.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="log.txt of a finished run, or its folder")
    p.add_argument(
        "--versus", type=Path, nargs="+", default=[], metavar="LOG", help="a second group of runs to compare with"
    )
    p.add_argument(
        "--target", type=float, default=TARGET, metavar="LOSS", help="val loss to be below (default: %(default)s)"
    )
    p.add_argument("--chart", type=Path, metavar="FILE", help="draw the loss curves of all runs, as a PNG")
    p.add_argument(
        "--names", nargs=2, default=("runs", "versus"), metavar="NAME", help="of the two groups in the chart"
    )
    return p


def run(options: argparse.Namespace) -> int:
    groups = read_runs(options.logs), read_runs(options.versus)
    print(report(*groups, options.target))
    if options.chart:
        draw({name: runs for name, runs in zip(options.names, groups, strict=True) if runs}, options.chart)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), run, arguments)
