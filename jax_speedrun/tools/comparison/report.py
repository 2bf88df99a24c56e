"""What compare.py says of its measurements: a summary as JSON values, a table, notes, a chart."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ..layout import make_table, wrap
from .turns import Result

NAMES = {"jax": "JAX", "xla": "JAX without our kernels", "torch": "PyTorch"}
COLORS = {"jax": "tab:blue", "xla": "black", "torch": "tab:orange"}
LABELS = {
    "step": "full step with optimisers",
    "micro": "micro-step (forward + backward)",
    "attention_forward": "attention, one layer, forward",
    "attention": "attention, one layer, forward + backward",
    "head": "head + loss, forward + backward",
    "optimizer": "optimisers",
    "matmul": "control: matmul of large squares",
}
EVEN = 0.01
"""Medians closer than this, relative, are called even."""
CONTROL_TOLERANCE = 0.1
"""The same matmul may differ by so much between frameworks: what differs more was measured on another machine."""


def summarize(
    results: Sequence[Result], tokens: int, flops: float, attention_flops: Mapping[int, float]
) -> dict[str, Any]:
    """Return medians over all samples of all rounds, and what follows from them.

    Args:
      results: of `measure_in_turns`.
      tokens: of a step.
      flops: of a step's matmuls, forward and backward, without attention and optimisers, as in the log of a run.
      attention_flops: of a step's attention, for each window measured, in tokens.

    Returns:
      `date`. `sides`: for each side measured, device, versions, fallbacks, first step cold and warm (s), peak memory.
      `incomparable`: why no factor is given, None where one is. `control`: each side's ms for the same matmul, how far
      they are `apart`, and whether the comparison is `trusted` for that. `rows`: one for each part and window, with
      median, low, high (ms) and n for each side, and `ratio`, PyTorch's median over JAX's, None where incomparable.
      `throughput`: for each window of the full step, tokens/s, and MFU of the datasheet's rate and of the measured
      matmul's, each "without_attention" and "with_attention".
    """
    of_side = {name: [r for r in results if r["side"] == name] for name in NAMES}
    sides = {name: _describe(of_one) for name, of_one in of_side.items() if of_one}
    incomparable = _incomparable(sides)
    rows = []
    for entry in results[0]["times"]:
        key = entry["part"], entry["window"]
        row: dict[str, Any] = {"part": key[0], "window": key[1]}
        row |= {name: _statistics(of_side[name], *key) for name in sides}
        # The control is the same work everywhere.
        comparable = incomparable is None or key[0] == "matmul"
        row["ratio"] = row["torch"]["median"] / row["jax"]["median"] if comparable else None
        rows.append(row)

    control_ms = {name: row[name]["median"] for row in rows if row["part"] == "matmul" for name in sides}
    apart = max(control_ms.values()) / min(control_ms.values()) - 1
    ceiling = 1000 * 2 * results[0]["matmul_size"] ** 3 / min(control_ms.values())
    peak = next((r["peak_flops"] for r in results if r["peak_flops"]), None)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "sides": sides,
        "incomparable": incomparable,
        "control": {"ms": control_ms, "apart": apart, "trusted": apart <= CONTROL_TOLERANCE},
        "rows": rows,
        "throughput": _throughput(rows, list(sides), tokens, flops, attention_flops, peak, ceiling),
        "peak_flops": peak,
        "ceiling_flops": ceiling,
    }


def _statistics(results: Sequence[Result], part: str, window: int | None) -> dict[str, float]:
    """Return median, low, high (ms) and n of one part in all rounds of one side."""
    times = [time for result in results for time in result["times"]]
    samples = [ms for time in times if (time["part"], time["window"]) == (part, window) for ms in time["ms"]]
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples), "n": len(samples)}


def _throughput(
    rows: Sequence[dict[str, Any]],
    sides: Sequence[str],
    tokens: int,
    flops: float,
    attention_flops: Mapping[int, float],
    peak: float | None,
    ceiling: float,
) -> list[dict[str, Any]]:
    entries = []
    for row in rows:
        if row["part"] != "step":
            continue
        ms = {name: row[name]["median"] for name in sides}
        work = {"without_attention": flops, "with_attention": flops + attention_flops[row["window"]]}
        entries.append(
            {
                "window": row["window"],
                "tokens_per_s": {name: 1000 * tokens / ms[name] for name in sides},
                "mfu": None if peak is None else _mfu(work, ms, peak),
                "mfu_of_ceiling": _mfu(work, ms, ceiling),
            }
        )
    return entries


def _mfu(work: Mapping[str, float], ms: Mapping[str, float], peak: float) -> dict[str, dict[str, float]]:
    return {what: {name: 1000 * flops / of_side / peak for name, of_side in ms.items()} for what, flops in work.items()}


def _describe(results: Sequence[Result]) -> dict[str, Any]:
    first = results[0]
    warm = [r["first_step_s"] for r in results[1:] if r["first_step_s"] is not None]
    peaks = [r["peak_bytes"] for r in results if r["peak_bytes"] is not None]
    kept = ("device", "platform", "versions", "fallbacks", "reduced", "attention", "kernels")
    return {
        **{name: first[name] for name in kept},
        "first_step_s": {"cold": first["first_step_s"], "warm": statistics.median(warm) if warm else None},
        "peak_bytes": max(peaks) if peaks else None,
    }


def _incomparable(sides: Mapping[str, dict[str, Any]]) -> str | None:
    """Return why the frameworks have not done the same work on the same device, if they have not."""
    if len({about["platform"] for about in sides.values()}) > 1:
        return " and ".join(f"{NAMES[name]} ran on {about['device']}" for name, about in sides.items())
    for name, about in sides.items():
        if about["reduced"]:
            return f"{NAMES[name]} ran with {about['reduced']}"
    return None


def verdict(ratio: float | None) -> str:
    """Return who is faster, and how much, from PyTorch's time over JAX's; nothing for None."""
    if ratio is None:
        return ""
    if abs(ratio - 1) < EVEN:
        return "even"
    return f"JAX {ratio:.2f} x" if ratio > 1 else f"PyTorch {1 / ratio:.2f} x"


def table(summary: dict[str, Any], title: str) -> Table:
    """Return all of the summary, for a terminal of 80 columns."""
    sides = list(summary["sides"])
    result = make_table(title, "ms", "window", *(_heading(name, summary) for name in sides), "faster")

    known = ""

    def add(label: str, window: int | None, cells: Mapping[str, str], said: str = "", style: str | None = None) -> None:
        nonlocal known
        once_only, known = "" if label == known else label, label
        result.add_row(once_only, str(window or ""), *(cells[name] for name in sides), said, style=style)

    for row in summary["rows"]:
        ratio, said = row["ratio"], verdict(row["ratio"])
        style = None if ratio is None or abs(ratio - 1) < EVEN else "green" if ratio > 1 else "yellow"
        if row["part"] == "matmul":
            said = f"{summary['control']['apart']:.0%} apart"
            style = None if summary["control"]["trusted"] else "bold red"
        add(LABELS[row["part"]], row["window"], {name: _cell(row[name]) for name in sides}, said, style)
    result.add_section()
    for entry in summary["throughput"]:
        add("tokens/s", entry["window"], {name: f"{rate:,.0f}" for name, rate in entry["tokens_per_s"].items()})
    for key, of in (("mfu", "datasheet"), ("mfu_of_ceiling", "measured matmul")):
        for entry in summary["throughput"]:
            if (mfu := entry[key]) is not None:
                alone, all_ = mfu["without_attention"], mfu["with_attention"]
                cells = {name: f"{100 * alone[name]:.1f} / {100 * all_[name]:.1f}" for name in sides}
                add(f"MFU of {of}, %, without / with attention", entry["window"], cells)
    result.add_section()

    def once(label: str, form: str, of: Callable[[dict[str, Any]], float | None]) -> None:
        numbers = {name: of(summary["sides"][name]) for name in sides}
        if any(numbers.values()):  # without the full step among the parts nobody looked
            add(label, None, {n: "-" if number is None else form.format(number) for n, number in numbers.items()})

    once("to end of first step, caches cold", "{:.1f} s", lambda about: about["first_step_s"]["cold"])
    once("to end of first step, caches warm", "{:.1f} s", lambda about: about["first_step_s"]["warm"])
    once("peak memory", "{:.1f} GiB", lambda about: about["peak_bytes"] and about["peak_bytes"] / 2**30)
    return result


def _heading(name: str, summary: dict[str, Any]) -> str:
    if name == "xla":
        return "JAX, not\nour kernels"
    versions = summary["sides"][name]["versions"]
    return f"{NAMES[name]}\n{versions[name]}" if name in versions else NAMES[name]


def _cell(ms: Mapping[str, float]) -> str:
    """Return the median, and half of what lies between the fastest and the slowest sample, in per cent of it."""
    median = ms["median"]
    decimals = 3 if median < 10 else 2 if median < 100 else 1 if median < 1000 else 0
    spread = 50 * (ms["high"] - ms["low"]) / median
    return f"{median:,.{decimals}f} ±{spread:.{int(spread < 10)}f}%"


def warnings(summary: dict[str, Any]) -> list[str]:
    """Return what must be known before any number is believed: one line each, none where all is well."""
    lines = []
    control = summary["control"]
    if not control["trusted"]:
        times = ", ".join(f"{ms:.3g} ms in {NAMES[name]}" for name, ms in control["ms"].items())
        lines.append(
            f"not to be trusted: the control, the same matmul everywhere, took {times}, {control['apart']:.0%} apart; "
            "end what else runs on this machine and compare again"
        )
    if summary["incomparable"]:
        lines.append(f"no factor between frameworks: {summary['incomparable']}, which is not the same work")
    return lines


def notes(summary: dict[str, Any]) -> list[str]:
    """Return what a reader of the numbers has to know: how they were made, devices, versions, what fell back."""
    rows, sides = summary["rows"], summary["sides"]
    samples = max(row[name]["n"] for row in rows for name in sides)
    lines = [f"{summary['date']}: medians of {samples} samples ± half of their range; windows in tokens"]
    for name, about in sides.items():
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        lines.append(
            f"{NAMES[name]}: {about['device']}; {versions}; attention {about['attention']}, kernels {about['kernels']}"
        )
        lines += about["fallbacks"]
    peak = summary["peak_flops"]
    rate = "no datasheet rate known for it" if peak is None else f"datasheet {peak / 1e12:,.0f} TFLOP/s"
    lines.append(f"rates: measured matmul {summary['ceiling_flops'] / 1e12:,.1f} TFLOP/s, {rate}")
    return lines


def draw(summary: dict[str, Any], path: Path, description: str) -> None:
    """Write `chart` as a PNG."""
    chart(summary, description).savefig(path, format="png")


def chart(summary: dict[str, Any], description: str) -> Figure:
    """Return a chart with a bar for each part and window, complete alone: devices, date, versions, what is compared.

    Where the frameworks can be compared, to the right where JAX is faster and to the left where PyTorch is; else the
    time of each.
    """
    rows = summary["rows"]
    per_row = 0.34 if summary["incomparable"] is None else 0.5
    figure = Figure(figsize=(10, 2.2 + per_row * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    if summary["incomparable"] is None:
        _draw_gains(axes, rows, summary)
    else:
        _draw_times(axes, rows, summary)
    labels = [LABELS[row["part"]] + (f", window {row['window']}" if row["window"] else "") for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    about = headline(summary["sides"], summary["date"])
    figure.suptitle("\n".join([about, wrap(f"{description}; windows in tokens")]), fontsize=9)
    if said := warnings(summary):
        axes.set_title("\n".join(map(wrap, said)), color="tab:red", fontsize=8)
    return figure


def headline(sides: Mapping[str, Mapping[str, Any]], date: str) -> str:
    """Return card, date and versions on one line, of what each side says of itself."""
    versions = [f"{NAMES[name]} {sides[name]['versions'].get(name, '')}".strip() for name in ("jax", "torch")]
    devices = dict.fromkeys(about["device"] for about in sides.values())
    return f"{' and '.join(versions)} on {' and '.join(devices)}, {date}"


def _draw_gains(axes: Axes, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    ratios = [row["ratio"] for row in rows]
    gains = [_gain(ratio) for ratio in ratios]
    places = range(len(rows))
    spread = [
        (_gain(row["torch"]["low"] / row["jax"]["high"]), _gain(row["torch"]["high"] / row["jax"]["low"]))
        for row in rows
    ]
    axes.barh(places, gains, color=[_color(ratio) for ratio in ratios])
    axes.hlines(places, *zip(*spread, strict=True), color="black", linewidth=1, label="fastest to slowest samples")
    reach = max(0.1, *(abs(gain) for gain in gains))
    without: list[float] = []
    if "xla" in summary["sides"]:
        without = [_gain(row["torch"]["median"] / row["xla"]["median"]) for row in rows]
        axes.plot(without, places, "D", color=COLORS["xla"], markersize=4, markerfacecolor="white", label=NAMES["xla"])
        reach = max(reach, *(abs(gain) for gain in without))
    ends = []  # of all that is drawn
    for place, (row, gain, (low, high)) in enumerate(zip(rows, gains, spread, strict=True)):
        text = f"{row['jax']['median']:,.2f} : {row['torch']['median']:,.2f} ms"
        side = 1 if gain >= 0 else -1
        ends.append(max(gain, high) if side > 0 else min(gain, low))
        axes.text(
            ends[-1] + side * 0.02 * reach, place, text, va="center", ha="left" if side > 0 else "right", fontsize=8
        )
    # Numbers need room beside their bars; a side that nobody won needs none but for the axis' words.
    left, right = (1.6 * max(0.25 * reach, *(side * end for end in (*ends, *without))) for side in (-1, 1))
    axes.set_xlim(-left, right)
    ticks = [tick for tick in axes.get_xticks() if -left <= tick <= right]
    axes.set_xticks(ticks, [f"{abs(tick):.0%}" for tick in ticks])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("JAX : PyTorch, medians")
    axes.legend(fontsize=7, loc="lower right")
    for side, name in ((-1, "←  PyTorch faster by"), (1, "JAX faster by  →")):
        axes.annotate(
            name,
            (0, 0),
            (side * 6, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            fontsize=8,
        )


def _draw_times(axes: Axes, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    height = 0.8 / len(summary["sides"])
    for number, name in enumerate(summary["sides"]):
        medians = [row[name]["median"] for row in rows]
        errors = [[row[name]["median"] - row[name]["low"] for row in rows],
                  [row[name]["high"] - row[name]["median"] for row in rows]]  # fmt: skip
        places = [place + (number - (len(summary["sides"]) - 1) / 2) * height for place in range(len(rows))]
        axes.barh(
            places, medians, height, xerr=errors, color=COLORS[name], label=NAMES[name], error_kw={"linewidth": 1}
        )
    axes.set_xscale("log")
    axes.set_xlabel("ms, medians, fastest to slowest samples")
    axes.legend(fontsize=7)


def _gain(ratio: float) -> float:
    """Return how much faster, symmetric whoever wins: twice as fast is as long a bar to either side."""
    return ratio - 1 if ratio >= 1 else 1 - 1 / ratio


def _color(ratio: float) -> str:
    if abs(ratio - 1) < EVEN:
        return "0.6"
    return COLORS["jax"] if ratio > 1 else COLORS["torch"]
