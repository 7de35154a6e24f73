"""What the runs of `tables.py` say together, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

Lines = list[dict[str, Any]]
Key = tuple[str, str, str, int]  # data, units, dtype, batch

FITTED = 1e-6  # of the first loss: below that, which loss is lower does not matter
SLACK = 1.01


def loss_of(line: dict[str, Any], column: str = "final") -> float:
    """Infinite where it is not a number; the loss of a run that failed does not count."""
    value = line[column]
    lost = value is None or (line["failed"] and column != "first")
    return math.inf if lost else float(value)


def ends_above(line: dict[str, Any]) -> bool:
    """The last loss is above the first."""
    return loss_of(line) > loss_of(line, "first")


def medians(lines: Lines, column: str = "final") -> dict[str, dict[Key, float]]:
    """By optimiser and cell, over seeds; "adam" is the better rate of a cell."""
    grouped: dict[str, dict[Key, list[float]]] = {}
    for line in lines:
        key = (line["data"], line["units"], line["dtype"], line["batch"])
        cells = grouped.setdefault(line["optimizer"], {})
        cells.setdefault(key, []).append(loss_of(line, column))
    found = {
        name: {key: statistics.median(values) for key, values in cells.items()}
        for name, cells in grouped.items()
    }
    adams = [cells for name, cells in found.items() if name.startswith("adam-")]
    if adams:
        keys = dict.fromkeys(key for cells in adams for key in cells)
        found["adam"] = {key: min(c[key] for c in adams if key in c) for key in keys}
    return found


def no_worse(mine: float, other: float, first: float) -> bool:
    """At most 1 % above the other's loss, or a millionth of the first."""
    return math.isfinite(mine) and (mine <= SLACK * other or mine <= FITTED * first)


class Comparison:
    """One optimiser's medians beside another's, in the cells that both have."""

    def __init__(self, lines: Lines, mine: str, other: str, column: str = "final") -> None:
        ends, starts = medians(lines, column), medians(lines, "first")
        a, b = ends.get(mine, {}), medians(lines).get(other, {})
        self.rows = [(key, a[key], b[key], starts[mine][key]) for key in a if key in b]

    def share(self, keep: Callable[[Key], bool] = lambda _: True) -> str:
        """Cells that are no worse, and those whose loss is simply no higher, of how many."""
        rows = [r for r in self.rows if keep(r[0])]
        if not rows:
            return "–"
        good = sum(no_worse(*r[1:]) for r in rows)
        lower = sum(math.isfinite(r[1]) and r[1] <= r[2] for r in rows)
        return f"{good / len(rows):.0%} ({lower / len(rows):.0%}) of {len(rows)}"

    def worst(self, count: int) -> list[str]:
        """Rows of the cells with the largest ratio of the losses."""

        def ratio(row: tuple[Key, float, float, float]) -> float:
            floor = FITTED * row[3]
            return max(row[1], floor) / max(row[2], floor)

        bad = sorted((r for r in self.rows if not no_worse(*r[1:])), key=ratio, reverse=True)
        return [
            f"| {'/'.join((*key[:3], str(key[3] or 'all')))} | {first:.3g} | {a:.3g} | {b:.3g} "
            f"| {ratio((key, a, b, first)):.3g} |"
            for key, a, b, first in bad[:count]
        ]


def summary(lines: Lines, worst: int = 20) -> str:
    """Failures, shares of cells, and the cells where K-FAC is furthest behind Adam."""
    names = list(dict.fromkeys(line["optimizer"] for line in lines))
    text = ["### runs", ""]
    text += ["| optimiser | runs | failed | end above their start | median of steps |"]
    text += ["|---|---:|---:|---:|---:|"]
    for name in names:
        runs = [line for line in lines if line["optimizer"] == name]
        failed = sum(bool(r["failed"]) for r in runs)
        above = sum(not r["failed"] and ends_above(r) for r in runs)
        steps = statistics.median(r["steps"] for r in runs)
        text.append(f"| {name} | {len(runs)} | {failed} | {above} | {steps:g} |")
    text += ["", "### cells in which the loss is no worse", ""]
    text += ["Median over seeds at most 1 % above the other's, or below a millionth of the first"]
    text += ["loss; in brackets: simply not above the other's."]
    others = ("adam", "adam-0.001", "adam-0.01", "sklearn-adam", "sklearn-lbfgs")
    text += ["", f"| | {' | '.join(others)} |", f"|---|{'---:|' * len(others)}"]
    for name in (n for n in ("kfac", "ekfac") if n in names):
        for column, label in (("final", name), ("averaged", f"{name}, averaged iterate")):
            shares = [Comparison(lines, name, other, column).share() for other in others]
            text.append(f"| {label} | {' | '.join(shares)} |")
    for mine in (n for n in ("kfac", "ekfac") if n in names):
        comparison = Comparison(lines, mine, "adam")
        if comparison.rows:
            text += ["", f"### {mine} beside adam", "", *_breakdown(comparison)]
            text += ["", f"| {mine}'s worst cells | first loss | {mine} | adam | ratio |"]
            text += ["|---|---:|---:|---:|---:|", *comparison.worst(worst)]
    return "\n".join(text)


def _breakdown(comparison: Comparison) -> Iterable[str]:
    yield "| | cells no worse |"
    yield "|---|---:|"
    for axis in range(4):
        for value in dict.fromkeys(row[0][axis] for row in comparison.rows):
            name = f"batch {value or 'all'}" if axis == 3 else value
            yield f"| {name} | {comparison.share(lambda key, i=axis, v=value: key[i] == v)} |"  # type: ignore[misc]
