"""What compare.py says of its measurements: a summary as JSON values, a table, a chart."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from .turns import FRAMEWORKS, Result

NAMES = {"jax": "JAX", "torch": "PyTorch"}
LABELS = {
    "step": "full step with optimisers",
    "micro": "micro-step (forward + backward)",
    "attention_forward": "attention, one layer, forward",
    "attention": "attention, one layer, forward + backward",
    "head": "head + loss, forward + backward",
    "optimizer": "optimisers",
    "matmul": "matmul of large squares",
}
EVEN = 0.01
"""Medians closer than this, relative, are called even."""


def summarize(
    results: Sequence[Result], tokens: int, flops: float, attention_flops: Mapping[int, float]
) -> dict[str, Any]:
    """Medians over all samples of all rounds, and what follows from them.

    Args:
      results: of `measure_in_turns`.
      tokens: of a step.
      flops: of a step's matmuls, forward and backward, without attention and optimisers, as in the log of a run.
      attention_flops: of a step's attention, for each window measured.

    Returns:
      `rows`: one for each part and window, with median, low, high (ms) and n for each framework, and `ratio`, PyTorch's
      median over JAX's. `frameworks`: for each, device, versions, fallbacks, first step cold and warm (s), peak
      memory. `throughput`: for each window of the full step, tokens/s, and MFU of the datasheet's rate and of the
      measured matmul's, each "without_attention" and "with_attention".
    """
    frameworks = {name: _describe([r for r in results if r["framework"] == name]) for name in FRAMEWORKS}
    rows = []
    for entry in results[0]["times"]:
        key = entry["part"], entry["window"]
        row: dict[str, Any] = {"part": key[0], "window": key[1]}
        for name in FRAMEWORKS:
            samples = [
                sample
                for result in results
                if result["framework"] == name
                for other in result["times"]
                if (other["part"], other["window"]) == key
                for sample in other["ms"]
            ]
            row[name] = {
                "median": statistics.median(samples),
                "low": min(samples),
                "high": max(samples),
                "n": len(samples),
            }
        row["ratio"] = row["torch"]["median"] / row["jax"]["median"]
        rows.append(row)

    fastest_ms = min(row[name]["median"] for row in rows if row["part"] == "matmul" for name in FRAMEWORKS)
    ceiling = 1000 * 2 * results[0]["matmul_size"] ** 3 / fastest_ms
    peak = next((r["peak_flops"] for r in results if r["peak_flops"]), None)
    throughput = []
    for row in rows:
        if row["part"] == "step":
            ms = {name: row[name]["median"] for name in FRAMEWORKS}
            work = {"without_attention": flops, "with_attention": flops + attention_flops[row["window"]]}
            throughput.append(
                {
                    "window": row["window"],
                    "tokens_per_s": {name: 1000 * tokens / ms[name] for name in FRAMEWORKS},
                    "mfu": None if peak is None else _mfu(work, ms, peak),
                    "mfu_of_ceiling": _mfu(work, ms, ceiling),
                }
            )
    return {
        "frameworks": frameworks,
        "rows": rows,
        "throughput": throughput,
        "peak_flops": peak,
        "ceiling_flops": ceiling,
    }


def _mfu(work: Mapping[str, float], ms: Mapping[str, float], peak: float) -> dict[str, dict[str, float]]:
    return {what: {name: 1000 * flops / ms[name] / peak for name in FRAMEWORKS} for what, flops in work.items()}


def _describe(results: Sequence[Result]) -> dict[str, Any]:
    first = results[0]
    warm = [r["first_step_s"] for r in results[1:] if r["first_step_s"] is not None]
    peaks = [r["peak_bytes"] for r in results if r["peak_bytes"] is not None]
    return {
        "device": first["device"],
        "versions": first["versions"],
        "fallbacks": first["fallbacks"],
        "attention": first["attention"],
        "kernels": first["kernels"],
        "first_step_s": {"cold": first["first_step_s"], "warm": statistics.median(warm) if warm else None},
        "peak_bytes": max(peaks) if peaks else None,
    }


def verdict(ratio: float) -> str:
    """Who is faster, and how much, from PyTorch's time over JAX's."""
    if abs(ratio - 1) < EVEN:
        return "even"
    return f"JAX {ratio:.2f} x faster" if ratio > 1 else f"PyTorch {1 / ratio:.2f} x faster"


def table(summary: dict[str, Any], title: str) -> Table:
    """All of the summary, for a terminal."""
    result = Table("", "window", *NAMES.values(), "", title=title, title_justify="left")

    def add(label: str, window: object, values: dict[str, str], ratio: float | None = None) -> None:
        style = None if ratio is None or abs(ratio - 1) < EVEN else "green" if ratio > 1 else "yellow"
        said = "" if ratio is None else verdict(ratio)
        cells = (values[name] for name in FRAMEWORKS)
        result.add_row(label, "" if window is None else str(window), *cells, said, style=style)

    for row in summary["rows"]:
        values = {}
        for name in FRAMEWORKS:
            ms = row[name]
            values[name] = f"{ms['median']:,.2f} ms ({ms['low']:,.2f} to {ms['high']:,.2f})"
        add(LABELS[row["part"]], row["window"], values, row["ratio"])
    result.add_section()
    for entry in summary["throughput"]:
        rates = entry["tokens_per_s"]
        values = {name: f"{rates[name]:,.0f}" for name in FRAMEWORKS}
        add("tokens/s", entry["window"], values, rates["jax"] / rates["torch"])
    for entry in summary["throughput"]:
        for key, label in (("mfu", "MFU, of the datasheet's rate"), ("mfu_of_ceiling", "MFU, of the measured matmul")):
            if (mfu := entry[key]) is not None:
                alone, all_ = mfu["without_attention"], mfu["with_attention"]
                values = {name: f"{alone[name]:.1%}, with attention {all_[name]:.1%}" for name in FRAMEWORKS}
                add(label, entry["window"], values)
    result.add_section()

    def once(label: str, form: str, of: Callable[[dict[str, Any]], float | None]) -> None:
        numbers = {name: of(summary["frameworks"][name]) for name in FRAMEWORKS}
        if any(numbers.values()):  # without the full step among the parts nobody looked
            add(label, None, {name: _or_dash(number, form) for name, number in numbers.items()})

    once("start to end of first step, caches cold", "{:.1f} s", lambda about: about["first_step_s"]["cold"])
    once("start to end of first step, caches warm", "{:.1f} s", lambda about: about["first_step_s"]["warm"])
    once("peak memory", "{:.1f} GiB", lambda about: about["peak_bytes"] and about["peak_bytes"] / 2**30)
    return result


def _color(ratio: float) -> str:
    if abs(ratio - 1) < EVEN:
        return "0.6"
    return "tab:blue" if ratio > 1 else "tab:orange"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def notes(summary: dict[str, Any]) -> list[str]:
    """What a reader of the numbers has to know: devices, versions, what fell back."""
    lines = []
    for name in FRAMEWORKS:
        about = summary["frameworks"][name]
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        lines.append(
            f"{NAMES[name]}: {about['device']}; {versions}; attention {about['attention']}, kernels {about['kernels']}"
        )
        lines += [f"  {fallback}" for fallback in about["fallbacks"]]
    peak = summary["peak_flops"]
    rate = "no datasheet rate known for it" if peak is None else f"datasheet {peak / 1e12:,.0f} TFLOP/s"
    lines.append(f"rates: measured matmul {summary['ceiling_flops'] / 1e12:,.1f} TFLOP/s, {rate}")
    return lines


def draw(summary: dict[str, Any], path: Path, title: str) -> None:
    """A bar for each part and window, to the right where JAX is faster and to the left where PyTorch is. PNG."""
    rows = summary["rows"]
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    # Symmetric whoever wins: twice as fast is as long a bar to either side.
    gains = [row["ratio"] - 1 if row["ratio"] >= 1 else 1 - 1 / row["ratio"] for row in rows]
    axes.barh(range(len(rows)), gains, color=[_color(row["ratio"]) for row in rows])
    reach = max(0.1, *(abs(gain) for gain in gains))
    for place, (row, gain) in enumerate(zip(rows, gains, strict=True)):
        text = f"{row['jax']['median']:,.2f} : {row['torch']['median']:,.2f} ms"
        side = 1 if gain >= 0 else -1
        axes.text(gain + side * 0.02 * reach, place, text, va="center", ha="left" if side > 0 else "right", fontsize=8)
    labels = [LABELS[row["part"]] + (f", window {row['window']}" if row["window"] else "") for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    # Numbers need room beside their bars; a side that nobody won needs none but for the axis' words.
    left, right = (1.6 * max(0.25 * reach, *(side * gain for gain in gains)) for side in (-1, 1))
    axes.set_xlim(-left, right)
    ticks = [tick for tick in axes.get_xticks() if -left <= tick <= right]
    axes.set_xticks(ticks, [f"{abs(tick):.0%}" for tick in ticks])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("JAX : PyTorch, medians; windows in blocks")
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
    axes.set_title(title, fontsize=10)
    figure.savefig(path, format="png")
