"""What all figures share: styles, heat maps, axes, and files that are whole or not there."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from kfac_np.errors import ConfigError
from kfac_np.training.files import write_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Drawing",
    "HostArray",
    "Table",
    "cells",
    "heat_map",
    "label_axes",
    "line_style",
    "log_axis",
    "new_figure",
    "save",
]

HostArray = np.ndarray[Any, Any]

# Light is small and dark is large, in grey too: lightness falls all along these.
MAGNITUDE, SIGNED = "magma_r", "cividis"
DOTS_PER_INCH = 100

# Different lightness, dashes and markers: lines that can be told apart without colour.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#b3302a", "linestyle": "--", "marker": "s"},
    {"color": "#3f7fbf", "linestyle": "-.", "marker": "^"},
    {"color": "#d9962b", "linestyle": (0, (6, 1, 1, 1, 1, 1)), "marker": "D"},
    {"color": "#5a9e4b", "linestyle": ":", "marker": "v"},
    {"color": "#8f63b0", "linestyle": (0, (2, 2)), "marker": "x"},
)


@final
@dataclass(frozen=True)
class Table:
    r"""Named columns of plain values.

    Examples
    --------
    >>> Table(("step", "loss"), [(0, 2.5)]).to_csv()
    'step,loss\n0,2.5\n'
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]

    def to_csv(self) -> str:
        """The table as text, numbers with six digits."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_cell(value) for value in row] for row in self.rows)
        return out.getvalue()


@final
@dataclass(frozen=True, eq=False)
class Drawing:
    """A picture, and the numbers behind it.

    Attributes
    ----------
    figure : Figure
        Of matplotlib.
    table : Table
    more : mapping of str to Table
        Further tables, by what is appended to the figure's name.

    Examples
    --------
    >>> Drawing(new_figure(2.0, 2.0), Table(("x",), [(1,)])).table.columns
    ('x',)
    """

    figure: Figure
    table: Table
    more: Mapping[str, Table] = field(default_factory=dict)


def save(drawing: Drawing, directory: str | os.PathLike[str], name: str) -> list[Path]:
    """Write NAME.png, NAME.csv and what more tables there are, each as a whole.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     drawing = Drawing(new_figure(2.0, 2.0), Table(("x",), [(1,)]))
    ...     [path.name for path in save(drawing, directory, "empty")]
    ['empty.png', 'empty.csv']
    """
    directory = Path(directory)
    picture = directory / f"{name}.png"
    write_atomically(
        picture, lambda file: drawing.figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    )
    written = [picture]
    for suffix, table in {"": drawing.table, **drawing.more}.items():
        written.append(directory / (f"{name}-{suffix}.csv" if suffix else f"{name}.csv"))
        write_text(written[-1], table.to_csv())
    return written


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, sizes in inches: pyplot would keep a global one.

    Raises
    ------
    ConfigError
        Matplotlib is missing.

    Examples
    --------
    >>> float(new_figure(3.0, 2.0).get_figwidth())
    3.0
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def line_style(i: int, points: int = 12) -> dict[str, Any]:
    """Colour, dashes and marker of the i-th line, with about a dozen markers on `points`.

    Examples
    --------
    >>> line_style(0)["color"], line_style(6)["color"]
    ('#000000', '#000000')
    """
    style = {**_LINES[i % len(_LINES)], "markersize": 4.0, "linewidth": 1.4}
    return {**style, "markevery": max(1, points // 12)}


def label_axes(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title and labels in one size, and a light grid.

    Examples
    --------
    >>> axes = new_figure(2.0, 2.0).subplots()
    >>> label_axes(axes, "a", "b", "c")
    >>> axes.get_xlabel()
    'b'
    """
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(xlabel, fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, which="both", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def log_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis ("x" or "y") for positive values, with plain numbers where they fit.

    Examples
    --------
    >>> axes = new_figure(2.0, 2.0).subplots()
    >>> log_axis(axes, "y", [1.0, 30.0])
    >>> axes.get_yscale()
    'log'
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [v for v in values if v > 0 and np.isfinite(v)]
    if not positive:
        return
    decades = np.log10(max(positive) / min(positive))
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    if decades < 2.2:  # less than that needs numbers between the powers of ten
        many = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
        few = (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=many if decades < 0.8 else few))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())


def cells(matrix: HostArray, size: int) -> HostArray:
    """Means of absolute values over size × size entries: a matrix as so many pixels.

    Parameters
    ----------
    matrix : array, shape (m, n)
        Sizes that are multiples of `size`.
    size : int

    Examples
    --------
    >>> cells(np.asarray([[1.0, -1.0], [3.0, 3.0]]), 2)
    array([[2.]])
    """
    m, n = matrix.shape
    blocks = np.abs(matrix).reshape(m // size, size, n // size, size)
    return np.asarray(blocks.mean(axis=(1, 3)))


def heat_map(
    axes: Axes,
    matrix: HostArray,
    title: str,
    *,
    limits: tuple[float, float],
    log: bool = False,
    signed: bool = False,
    lines: Sequence[float] = (),
) -> Any:
    """Draw a matrix in light (small) to dark (large), and lines between its blocks.

    Returns
    -------
    AxesImage
        To give a colour bar to.

    Examples
    --------
    >>> axes = new_figure(2.0, 2.0).subplots()
    >>> heat_map(axes, np.eye(2), "identity", limits=(0.0, 1.0)).get_clim()
    (0.0, 1.0)
    """
    from matplotlib.colors import LogNorm, Normalize

    norm = LogNorm(*limits, clip=True) if log else Normalize(*limits, clip=True)
    image = axes.imshow(
        matrix, cmap=SIGNED if signed else MAGNITUDE, norm=norm, interpolation="nearest"
    )
    for at in lines:
        for draw in (axes.axhline, axes.axvline):
            draw(at - 0.5, color="0.45", linewidth=0.6, linestyle="--")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def _cell(value: object) -> object:
    return f"{float(value):.6g}" if isinstance(value, float | np.floating) else value
