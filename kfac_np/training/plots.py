"""Pictures of a training run, drawn without a display. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from kfac_np.errors import ConfigError
from kfac_np.training.files import write_atomically
from kfac_np.training.records import read_evaluations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "plot_curves", "plot_factors", "plot_images", "plot_lines", "read_curves"]

_HostArray = np.ndarray[Any, Any]

# Dark to light, each with its own dashes and marker: they tell apart in grey, too.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#c1272d", "linestyle": "--", "marker": "s"},
    {"color": "#3f7fbf", "linestyle": "-.", "marker": "^"},
    {"color": "#5a9e4b", "linestyle": ":", "marker": "D"},
    {"color": "#b58bd0", "linestyle": (0, (6, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#e0a030", "linestyle": (0, (1, 2)), "marker": "x"},
)

_AVERAGED = ", averaged"


@final
@dataclass(frozen=True)
class Curve:
    """A quantity that was evaluated now and then during one run.

    Attributes
    ----------
    label : str
    steps, seconds, values : sequences of equal length
    averaged : bool
        Whether it is of the averaged parameters of a run; the label is the run's and ", averaged".

    Examples
    --------
    >>> Curve("kfac", [0, 10], [0.0, 1.5], [540.0, 120.0]).label
    'kfac'
    """

    label: str
    steps: Sequence[int]
    seconds: Sequence[float]
    values: Sequence[float]
    averaged: bool = False


def plot_curves(
    path: str | os.PathLike[str],
    curves: Sequence[Curve],
    ylabel: str = "training loss",
    title: str = "",
) -> None:
    """Draw a quantity against iterations and against seconds, on a logarithmic scale.

    Averaged parameters have a wide, pale line below that of the current ones, so that both are seen
    where they are the same.

    Parameters
    ----------
    path : path
    curves : sequence of Curve
    ylabel : str
        What is drawn.
    title : str
        Of which data and model.

    Raises
    ------
    ConfigError
        Matplotlib is missing.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     plot_curves(f"{directory}/curves.png", [Curve("a", [0, 1], [0.0, 0.1], [9.0, 3.0])])
    """
    figure = _figure(11.0, 4.4)
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    longest = max((c.steps[-1] for c in curves if len(c.steps)), default=1)
    lines = []
    for curve, style in zip(curves, _styles(curves), strict=True):
        lines += by_step.plot(curve.steps, curve.values, **style)
        by_second.plot(curve.seconds, curve.values, **style)
    shortest = min((c.steps[-1] for c in curves if len(c.steps)), default=1)
    if longest > 10 * max(1, shortest):  # else the run of few, expensive steps is a vertical line
        by_step.set_xscale("symlog", linthresh=10)
        by_step.set_xlim(left=0)
    for axes, xlabel in ((by_step, "iterations"), (by_second, "seconds of optimisation")):
        _log_scale(axes, [v for c in curves for v in c.values])
        axes.set_xlabel(xlabel)
        axes.grid(True, which="both", color="0.9")
        axes.set_axisbelow(True)
    by_step.set_ylabel(ylabel)
    by_second.tick_params(axis="y", which="both", labelleft=True)
    if curves:  # outside, where it hides nothing
        labels, columns = [_plain(curve.label) for curve in curves], min(len(curves), 4)
        figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(_plain(title), fontsize=11)
    _save(figure, path)


def read_curves(directory: str | os.PathLike[str], label: str) -> list[Curve]:
    """Read the training loss of a run directory's evaluations.

    Parameters
    ----------
    directory : path
    label : str

    Returns
    -------
    list of Curve
        One of the current parameters, and one of the averaged ones if there are any.

    Examples
    --------
    >>> read_curves("no/such/run", "kfac")
    []
    """
    records = read_evaluations(Path(directory) / "evaluations.jsonl")
    curves = []
    for kind, suffix in (("current", ""), ("averaged", _AVERAGED)):
        have = [r for r in records if kind in r and r[kind]["loss"] is not None]
        if have:
            steps, seconds = [r["step"] for r in have], [r["seconds"] for r in have]
            losses = [r[kind]["loss"] for r in have]
            curves.append(Curve(f"{label}{suffix}", steps, seconds, losses, kind == "averaged"))
    return curves


def plot_images(
    path: str | os.PathLike[str],
    rows: Mapping[str, _HostArray],
    image_shape: tuple[int, int, int],
    title: str = "",
) -> None:
    """Draw rows of images, one row a label: originals and their reconstructions.

    Parameters
    ----------
    path : path
    rows : mapping of str to array, shape (n, height · width · channels)
        Values in [0, 1]; of a reconstruction also beyond, which are drawn like the nearest.
    image_shape : (height, width, channels)
        Three channels are red, green and blue; of any other number the mean is drawn, 1 as black.
    title : str

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     plot_images(f"{directory}/images.png", {"data": np.zeros((3, 4))}, (2, 2, 1))
    """
    height, width, channels = image_shape
    columns = max(images.shape[0] for images in rows.values())
    figure = _figure(1.1 + 0.85 * columns, 0.85 * len(rows) * height / width + 0.4)
    figure.suptitle(_plain(title), fontsize=11)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, images) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(_plain(label), rotation=0, ha="right", va="center")
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
        for axes, image in zip(line, images, strict=False):
            pixels = image.reshape(image_shape)
            if channels == 3:
                axes.imshow(np.clip(pixels, 0.0, 1.0))
            else:
                axes.imshow(pixels.mean(axis=-1), cmap="gray_r", vmin=0.0, vmax=1.0)
    _save(figure, path)


def plot_factors(
    path: str | os.PathLike[str], moments: Mapping[str, Mapping[str, Any]], title: str = ""
) -> None:
    """Draw each layer's Kronecker factors as images, and their eigenvalues.

    Parameters
    ----------
    path : path
    moments : mapping of path to moments
        As a K-FAC state holds them; what is not a square matrix is left out.
    title : str

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     plot_factors(f"{directory}/f.png", {"0": {"A": np.eye(3), "G": np.eye(2)}})
    """
    layers = {
        name: {k: m for k, m in each.items() if m.ndim == 2 and m.shape[0] == m.shape[1]}
        for name, each in moments.items()
    }
    layers = {name: each for name, each in layers.items() if each}
    if not layers:
        raise ConfigError("factors: expected square matrices among the moments, found none")
    figure = _figure(2.0 * len(layers) + 1.6, 6.4)
    grid = figure.subplots(3, len(layers), squeeze=False)
    for column, (name, matrices) in zip(grid.T, layers.items(), strict=True):
        for axes, (key, matrix) in zip(column[:2], matrices.items(), strict=False):
            # Entries span decades: a symmetric root shows the small ones, too.
            largest = float(np.abs(matrix).max())
            root = np.sign(matrix) * np.sqrt(np.abs(matrix) / (largest or 1.0))
            image = axes.imshow(root, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="antialiased")
            size = f"{matrix.shape[0]}×{matrix.shape[1]}"
            axes.set_title(f"layer {name}: {key} {size}\nlargest {largest:.2g}", fontsize=8)
        for axes in column[:2]:
            axes.set_xticks([])
            axes.set_yticks([])
        for style, (key, matrix) in zip(_STYLES, matrices.items(), strict=False):
            values = np.linalg.eigvalsh(matrix.astype(np.float64))[::-1]
            rank = np.linspace(0.0, 1.0, len(values))
            line = {"color": style["color"], "linestyle": style["linestyle"]}
            column[2].plot(rank, np.maximum(values, 1e-12 * values[0]), label=key, **line)
        column[2].set_yscale("log")
        column[2].tick_params(labelsize=7)
        column[2].set_xlabel("rank / size", fontsize=8)
    grid[2, 0].set_ylabel("eigenvalues", fontsize=8)
    grid[2, 0].legend(fontsize=8)
    bar = figure.colorbar(image, ax=grid[:2, :], shrink=0.7, ticks=np.linspace(-1.0, 1.0, 5))
    bar.ax.set_yticklabels(["-1", "-1/4", "0", "1/4", "1"], fontsize=8)
    bar.set_label("entry / largest entry of its factor", fontsize=8)
    figure.suptitle(_plain(f"Kronecker factors: {title}" if title else "Kronecker factors"))
    _save(figure, path)


def plot_lines(
    path: str | os.PathLike[str],
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    title: str = "",
    level: tuple[str, float] | None = None,
    mark: tuple[str, float, float] | None = None,
) -> None:
    """Draw several quantities against one.

    Parameters
    ----------
    path : path
    lines : mapping of name to (x, y)
        The first is drawn boldest.
    labels : (str, str)
        Of the axes, x first.
    title : str
    level : (str, float), optional
        A horizontal line to compare with, and its name.
    mark : (str, float, float), optional
        A point that matters: its name, x and y.

    Raises
    ------
    ConfigError
        Matplotlib is missing.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     plot_lines(f"{directory}/a.png", {"a": ([0.1, 0.5], [0.9, 0.8])}, ("share", "accuracy"))
    """
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    if level is not None:
        axes.axhline(level[1], color="0.55", linewidth=1.0, label=_plain(level[0]))
    for i, (name, (x, y)) in enumerate(lines.items()):
        style = {**_STYLES[i % len(_STYLES)], "markersize": 4.5, "linewidth": 1.5}
        axes.plot(x, y, label=_plain(name), **style)
    if mark is not None:
        axes.plot(*mark[1:], "o", markersize=13, markerfacecolor="none", color="#c1272d",
                  label=_plain(mark[0]))  # fmt: skip
    axes.set(xlabel=_plain(labels[0]), ylabel=_plain(labels[1]))
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="best")
    axes.set_title(_plain(title), fontsize=11)
    _save(figure, path)


def _styles(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """One style for each run; an average has its run's colour."""
    styles: list[dict[str, Any]] = []
    runs: dict[str, int] = {}
    for curve in curves:
        run = curve.label.removesuffix(_AVERAGED) if curve.averaged else curve.label
        i = runs.setdefault(run, len(runs))
        style = {**_STYLES[i % len(_STYLES)], "markersize": 4.0, "linewidth": 1.5}
        style["markevery"] = max(1, len(curve.steps) // 12)
        if curve.averaged:
            style |= {"linestyle": "-", "linewidth": 6.0, "alpha": 0.3, "marker": "", "zorder": 1.5}
        styles.append(style)
    return styles


def _plain(text: str) -> str:
    """A text that matplotlib takes for no formula, and that a legend does not leave out."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [v for v in values if v > 0 and np.isfinite(v)]
    if not positive:
        return
    axes.set_yscale("log")
    # Less than two decades need numbers between the powers of ten.
    few = max(positive) < 100 * min(positive)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if few else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float) -> Figure:
    """A figure of its own: pyplot would keep a global one and look for a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
