"""Pictures of a training run, drawn without a display. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from kfac_np.errors import ConfigError
from kfac_np.training.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "plot_curves", "plot_images"]

_HostArray = np.ndarray[Any, Any]

# Dark to light, each with its own dashes and marker: they tell apart in grey, too.
_STYLES = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#c1272d", "linestyle": "--", "marker": "s"},
    {"color": "#3f7fbf", "linestyle": "-.", "marker": "^"},
    {"color": "#5a9e4b", "linestyle": ":", "marker": "D"},
    {"color": "#b58bd0", "linestyle": (0, (6, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#e0a030", "linestyle": (0, (1, 2)), "marker": "x"},
)


@final
@dataclass(frozen=True)
class Curve:
    """A quantity that was evaluated now and then during one run.

    Attributes
    ----------
    label : str
    steps, seconds, values : sequences of equal length

    Examples
    --------
    >>> Curve("kfac", [0, 10], [0.0, 1.5], [540.0, 120.0]).label
    'kfac'
    """

    label: str
    steps: Sequence[int]
    seconds: Sequence[float]
    values: Sequence[float]


def plot_curves(
    path: str | os.PathLike[str], curves: Sequence[Curve], ylabel: str = "training loss"
) -> None:
    """Draw a quantity against iterations and against seconds, on a logarithmic scale.

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
    for i, curve in enumerate(curves):
        style = {**_STYLES[i % len(_STYLES)], "markersize": 4.0, "linewidth": 1.5}
        style["markevery"] = max(1, len(curve.steps) // 12)
        by_step.plot(curve.steps, curve.values, label=curve.label, **style)
        by_second.plot(curve.seconds, curve.values, label=curve.label, **style)
    shortest = min((c.steps[-1] for c in curves if len(c.steps)), default=1)
    if longest > 10 * max(1, shortest):  # else the run of few, expensive steps is a vertical line
        by_step.set_xscale("symlog", linthresh=10)
        by_step.set_xlim(left=0)
    for axes, xlabel in ((by_step, "iterations"), (by_second, "seconds of optimisation")):
        _log_scale(axes, [v for c in curves for v in c.values])
        axes.set_xlabel(xlabel)
        axes.grid(True, which="both", color="0.9")
    by_step.set_ylabel(ylabel)
    by_second.tick_params(axis="y", which="both", labelleft=True)
    if curves:
        by_second.legend()
    _save(figure, path)


def plot_images(
    path: str | os.PathLike[str],
    rows: Mapping[str, _HostArray],
    image_shape: tuple[int, int],
) -> None:
    """Draw rows of grey images, one row a label: originals and their reconstructions.

    Parameters
    ----------
    path : path
    rows : mapping of str to array, shape (n, height · width)
        Values in [0, 1].
    image_shape : (height, width)

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     plot_images(f"{directory}/images.png", {"data": np.zeros((3, 4))}, (2, 2))
    """
    height, width = image_shape
    columns = max(images.shape[0] for images in rows.values())
    figure = _figure(1.1 + 0.85 * columns, 0.85 * len(rows) * height / width + 0.1)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, images) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
        for axes, image in zip(line, images, strict=False):
            axes.imshow(image.reshape(height, width), cmap="gray_r", vmin=0.0, vmax=1.0)
    _save(figure, path)


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    positive = [v for v in values if v > 0 and np.isfinite(v)]
    if not positive:
        return
    axes.set_yscale("log")
    # Less than two decades need numbers between the powers of ten.
    few = max(positive) < 100 * min(positive)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if few else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    formatter = ScalarFormatter()
    formatter.set_scientific(False)
    axes.yaxis.set_major_formatter(formatter)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float) -> Figure:
    """A figure of its own: pyplot would keep a global one and look for a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'kfac_np[cli]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
