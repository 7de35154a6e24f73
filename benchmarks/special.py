"""What is measured besides step times: components, growth, start-up."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Settings, best_rates, summarise
from benchmarks.processes import ContenderError, Process, environment
from benchmarks.registry import ROOFLINE, Contender, choose, interpreter
from benchmarks.workloads import WORKLOADS, Workload, classifier, convnet, tiny

COMPONENTS = Contender("components", "components", "own", models=("fixed", "exact"))
SPECIAL = ("components", "growth", "startup")


def start(contender: Contender, workload: Workload, settings: Settings) -> tuple[Process, Any]:
    """A process of its own, after its first step, and what it told."""
    env = environment(settings.threads, settings.device, settings.tf32)
    process = Process(interpreter(contender, settings.pythons), contender.program, env, None)
    try:
        return process, process.ask(**settings.setup(contender, workload))
    except ContenderError:
        process.close()
        raise


# Components


def components(settings: Settings, quick: bool) -> tuple[dict[str, Any], str]:
    """Each part of a step of this library, on a fully connected network and a convolutional one."""
    record, texts = {}, []
    for name in ("W1-1000-exact", "W2-128"):
        workload = tiny(WORKLOADS[name]) if quick else WORKLOADS[name]
        result = _components(workload, settings)
        record[name] = result
        texts.append(components_table(name, result))
    return record, "\n\n".join(texts)


def _components(workload: Workload, settings: Settings) -> dict[str, Any]:
    roofline, _ = start(ROOFLINE, workload, settings)
    try:
        parts, _ = start(COMPONENTS, workload, settings)
        try:
            for k in range(max(3, settings.rounds // 3)):
                if k % 5 == 0:
                    roofline.ask(do="step", count=1)
                parts.ask(do="step", count=1)
            result = parts.close()["result"]
        finally:
            parts.close()
        gemm = best_rates(roofline.close()["result"]["rates"])
    finally:
        roofline.close()
    found = {}
    for name, times in result["times"].items():
        count = result["operations"][name]
        summary = summarise(times[1:], 1)
        rate = count / summary["per_step"] if count else None
        found[name] = {**summary, "operations": count, "rate": rate}
        found[name]["of_roofline"] = rate / gemm["gemm"] if rate else None
    return {"components": found, "failed": result["failed"], "roofline": gemm}


def components_table(name: str, result: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        f"### components of {name}",
        "",
        "| component | ms (quartiles) | processor ms | GFLOP | GFLOP/s | of roofline |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for part, r in result["components"].items():
        low, high = r["quartiles"]
        counted = ("–", "–", "–")
        if r["rate"]:
            counted = (f"{1e-9 * r['operations']:.2f}", f"{1e-9 * r['rate']:.1f}",
                       f"{r['of_roofline']:.0%}")  # fmt: skip
        lines.append(
            f"| {part} | {1e3 * r['median']:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f}) "
            f"| {1e3 * r['processor_per_step']:.2f} | {' | '.join(counted)} |"
        )
    lines += [f"| {part} | {why} | | | | |" for part, why in result["failed"].items()]
    return "\n".join(lines)


# Growth


def growth_points(quick: bool) -> Iterator[tuple[str, int, Workload]]:
    """Axis, value on it, workload: one thing grows at a time."""

    def point(axis: str, value: int, network: Any, batch: int) -> tuple[str, int, Workload]:
        return axis, value, Workload(f"{axis} {value}", network, batch)

    few = 2 if quick else 10
    for width in (32, 64, 125, 250, 500, 1000, 2000)[2 * (not quick) :][:few]:
        yield point("width", width, classifier((784, width, width, 10)), 256)
    for depth in (1, 2, 4, 8, 16)[:few]:
        yield point("depth", depth, classifier((784, *(256,) * depth, 10)), 256)
    for batch in (64, 256, 1024, 4096)[:few]:
        yield point("batch", batch, classifier((784, 500, 500, 10)), batch)
    for channels in (8, 16, 32, 64)[:few]:
        yield point("channels", channels, convnet((16, 16, 3), (channels, channels)), 64)
    for side in (8, 16, 32, 64)[:few]:
        yield point("image size", side, convnet((side, side, 3), (16, 16)), 32)


def growth(settings: Settings, names: list[str], quick: bool) -> tuple[list[dict[str, Any]], str]:
    """Seconds per step (without a refresh) and peak memory, in a fresh process for each point."""
    rows = []
    for axis, value, workload in growth_points(quick):
        for contender in choose(names or ["kfac_np"], workload):
            row: dict[str, Any] = {"contender": contender.name, "axis": axis, "value": value}
            try:
                row |= _growth_point(contender, workload, settings)
            except ContenderError as error:
                row["failed"] = str(error)
            rows.append(row)
    return rows, growth_table(rows)


def _growth_point(contender: Contender, workload: Workload, settings: Settings) -> dict[str, Any]:
    process, started = start(contender, workload, settings)
    try:
        steps = process.ask(do="step", count=3)["steps"][1:]
        seconds = min(s["wall"] for s in steps)
        # The second refresh is step 20: up to there, unless it takes long.
        count = max(3, min(17, math.ceil(2.0 / seconds)))
        steps += process.ask(do="step", count=count)["steps"]
        peak = process.close()["peak_bytes"]
    finally:
        process.close()
    parts = workload.operations(contender.method)
    usual = [s for s in steps if not s["kind"]]
    refresh = [s["wall"] for s in steps if s["kind"]]
    return {
        "seconds": statistics.median(s["wall"] for s in usual),
        "processor_seconds": statistics.median(s["cpu"] for s in usual),
        "refresh_seconds": statistics.median(refresh) if refresh else None,
        "peak_bytes": peak,
        "step_bytes": peak - started["ready_bytes"],
        "operations": sum(parts.values()) - parts.get("refresh", 0.0),
    }


def growth_table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "### growth",
        "",
        "| | contender | ms/step | processor ms | GFLOP/s | peak MB | of these the steps' |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        if "failed" in r:
            lines.append(f"| {r['axis']} {r['value']} | {r['contender']} | {r['failed']} | | | | |")
            continue
        lines.append(
            f"| {r['axis']} {r['value']} | {r['contender']} | {1e3 * r['seconds']:.2f} "
            f"| {1e3 * r['processor_seconds']:.2f} | {1e-9 * r['operations'] / r['seconds']:.1f} "
            f"| {1e-6 * r['peak_bytes']:.0f} | {1e-6 * r['step_bytes']:.0f} |"
        )
    return "\n".join(lines)


def growth_csv(rows: list[dict[str, Any]]) -> str:
    """As a table for other programs."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def growth_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against size, both axes logarithmic; dotted: proportional to the operations.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    good = [r for r in rows if "failed" not in r]
    axes_names = list(dict.fromkeys(r["axis"] for r in good))
    names = list(dict.fromkeys(r["contender"] for r in good))
    figure, axes = pyplot.subplots(
        2, len(axes_names), figsize=(3.2 * len(axes_names), 6), squeeze=False,
        sharex="col", sharey="row", constrained_layout=True,
    )  # fmt: skip
    for column, axis in enumerate(axes_names):
        top, bottom = axes[0][column], axes[1][column]
        for i, name in enumerate(names):
            mine = [r for r in good if r["axis"] == axis and r["contender"] == name]
            if not mine:
                continue
            x = [r["value"] for r in mine]
            style = {"color": f"C{i}", "marker": "o", "markersize": 4}
            top.plot(x, [1e3 * r["seconds"] for r in mine], label=name, **style)
            last = mine[-1]
            ideal = [1e3 * last["seconds"] * r["operations"] / last["operations"] for r in mine]
            label = "as the operations grow" if i == 0 else None
            top.plot(x, ideal, color=f"C{i}", linestyle=":", linewidth=1, label=label)
            bottom.plot(x, [1e-6 * r["peak_bytes"] for r in mine], **style)
        ticks = sorted({r["value"] for r in good if r["axis"] == axis})
        for plot in (top, bottom):
            plot.set_xscale("log", base=2)
            plot.set_yscale("log")
            plot.set_xticks(ticks, [str(t) for t in ticks])
            plot.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            plot.yaxis.set_minor_formatter(ticker.NullFormatter())
            plot.grid(alpha=0.3)
        bottom.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        bottom.set_xlabel(axis)
    axes[0][0].set_ylabel("ms per step")
    axes[1][0].set_ylabel("peak memory, MB")
    axes[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# Start-up


def startup(
    settings: Settings, names: list[str], quick: bool
) -> tuple[dict[str, dict[str, Any]], str]:
    """Import time and first-step time of every contender, three fresh processes each."""
    workload = tiny(WORKLOADS["W1-1000-fixed"]) if quick else WORKLOADS["W1-1000-fixed"]
    record: dict[str, dict[str, Any]] = {}
    for _ in range(1 if quick else 3):
        for contender in choose(names, workload):
            times = record.setdefault(contender.name, {"import": [], "setup": [], "first step": []})
            if "failed" in times:
                continue
            try:
                process, told = start(contender, workload, replace(settings))
            except ContenderError as error:
                times["failed"] = str(error)
                continue
            process.close()
            for key, column in (("import", "import"), ("setup", "setup"),
                                ("first step", "first_step")):  # fmt: skip
                times[key].append(told[f"{column}_seconds"])
    lines = [
        "### start-up (W1-1000-fixed; medians of fresh processes)",
        "",
        "| contender | import s | network and optimiser s | first step s | until then |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, times in record.items():
        if "failed" in times:
            lines.append(f"| {name} | {times['failed']} | | | |")
            continue
        medians = [statistics.median(times[key]) for key in ("import", "setup", "first step")]
        cells = " | ".join(f"{value:.2f}" for value in (*medians, sum(medians)))
        lines.append(f"| {name} | {cells} |")
    return record, "\n".join(lines)
