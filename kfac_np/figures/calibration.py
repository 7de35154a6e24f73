"""Whether probabilities and bands say how often one is right: numbers, and pictures of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from kfac_np.figures.drawing import (
    Drawing,
    HostArray,
    Table,
    label_axes,
    line_style,
    log_axis,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Reliability", "Seen", "coverage", "draw_coverage", "draw_reliability"]

_LEVELS = np.asarray([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])


@final
@dataclass(frozen=True, eq=False)
class Reliability:
    """How often what was given a probability came true, in bins of that probability.

    Attributes
    ----------
    probability : array
        Mean of each bin that is not empty.
    frequency : array
        Share of it that came true.
    counts : array

    Examples
    --------
    >>> r = Reliability.of(np.asarray([0.9, 0.9, 0.3]), np.asarray([1.0, 0.0, 0.0]))
    >>> r.probability, r.frequency, round(r.error, 3)
    (array([0.3, 0.9]), array([0. , 0.5]), 0.367)
    """

    probability: HostArray
    frequency: HostArray
    counts: HostArray

    @classmethod
    def of(cls, probability: HostArray, came_true: HostArray, bins: int = 15) -> Reliability:
        """Put probabilities in [0, 1] into bins of one width; `came_true` in [0, 1]."""
        p, t = (np.asarray(a, dtype=np.float64).reshape(-1) for a in (probability, came_true))
        where = np.minimum((p * bins).astype(np.int64), bins - 1)
        counts = np.bincount(where, minlength=bins)
        full = counts > 0
        mean_p, mean_t = (np.bincount(where, a, bins)[full] / counts[full] for a in (p, t))
        return cls(mean_p, mean_t, counts[full])

    @property
    def error(self) -> float:
        """The expected calibration error: mean distance of frequency from probability."""
        distance = np.abs(self.probability - self.frequency)
        return float((distance * self.counts).sum() / self.counts.sum())


@final
@dataclass(frozen=True, eq=False)
class Seen:
    """An image, and what was said of it.

    Attributes
    ----------
    image : array, shape (height, width, channels)
    text : str
    """

    image: HostArray
    text: str


def draw_reliability(
    curves: Mapping[str, Reliability],
    title: str,
    xlabel: str,
    ylabel: str,
    seen: tuple[str, Sequence[Seen]] = ("", ()),
) -> Drawing:
    """Frequency against probability, how many there are of each, and images under a title.

    Examples
    --------
    >>> one = Reliability.of(np.asarray([0.9, 0.3]), np.asarray([1.0, 0.0]))
    >>> draw_reliability({"network": one}, "digits", "confidence", "accuracy").table.columns
    ('of', 'probability', 'frequency', 'count')
    """
    figure = new_figure(11.0 if seen[1] else 4.6, 5.0)
    figure.suptitle(title, fontsize=11)
    parts: Any = (figure, None)
    if seen[1]:
        parts = figure.subfigures(1, 2, width_ratios=(4.6, 6.4))
    left, right = parts
    above, below = left.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.0))
    above.plot((0, 1), (0, 1), color="0.6", linewidth=1.0, linestyle=":")
    rows: list[tuple[object, ...]] = []
    width = 0.35 / 15
    for i, (name, r) in enumerate(curves.items()):
        style = {**line_style(i), "markersize": 5.0}
        above.plot(r.probability, r.frequency, label=f"{name}: off by {r.error:.3f}", **style)
        at = r.probability + (i - 0.5 * (len(curves) - 1)) * width
        below.bar(at, r.counts, width=width, color=style["color"], alpha=0.85)
        rows += zip([name] * len(r.counts), r.probability, r.frequency, r.counts, strict=True)
    above.set_xlim(-0.02, 1.02)
    above.set_ylim(-0.02, 1.02)
    label_axes(above, "how often it came true", "", ylabel)
    above.legend(fontsize=8, loc="upper left")
    log_axis(below, "y", [1.0, *(float(c) for r in curves.values() for c in r.counts)])
    label_axes(below, "", xlabel, "how many")
    if right is not None:
        _images(right, *seen)
    return Drawing(figure, Table(("of", "probability", "frequency", "count"), rows))


def _images(figure: Any, title: str, seen: Sequence[Seen]) -> None:
    columns = 4
    rows = -(-len(seen) // columns)
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.reshape(-1):
        axes.set_axis_off()
    for axes, one in zip(grid.reshape(-1), seen, strict=False):
        _image(axes, one.image)
        axes.set_title(one.text, fontsize=7)


def _image(axes: Axes, image: HostArray) -> None:
    if image.shape[-1] == 3:
        axes.imshow(np.clip(image, 0.0, 1.0))
    else:
        axes.imshow(image.mean(axis=-1), cmap="gray_r", vmin=0.0, vmax=1.0)


def coverage(error: HostArray, deviation: HostArray) -> tuple[HostArray, HostArray]:
    """Levels, and the share of errors inside the central interval of a Gaussian of each level.

    Parameters
    ----------
    error : array
        Target minus mean.
    deviation : array, of that shape
        Standard deviation that was predicted.

    Examples
    --------
    >>> levels, shares = coverage(np.asarray([0.0, 1.0, 3.0]), np.ones(3))
    >>> float(levels[-3]), round(float(shares[-3]), 3)
    (0.9, 0.667)
    """
    # The level of the interval that just reaches the error: P(|z| < a) = erf(a/√2).
    reached = np.sort((np.abs(error) / deviation).reshape(-1))
    shares = np.searchsorted(reached, _quantiles(_LEVELS), side="right") / reached.size
    return _LEVELS, np.asarray(shares)


def _quantiles(levels: HostArray) -> HostArray:
    """a with P(|z| < a) = level, for standard normal z."""
    from statistics import NormalDist

    return np.asarray([NormalDist().inv_cdf(0.5 + 0.5 * level) for level in levels])


def draw_coverage(
    curves: Mapping[str, tuple[HostArray, HostArray]], title: str, what: str
) -> Drawing:
    """Share of targets inside their bands, against what it should be.

    Examples
    --------
    >>> levels, shares = coverage(np.asarray([0.0, 1.0]), np.ones(2))
    >>> draw_coverage({"network": (levels, shares)}, "a curve", "targets").table.columns
    ('of', 'level', 'share')
    """
    figure = new_figure(4.8, 4.6)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color="0.6", linewidth=1.0, linestyle=":")
    rows: list[tuple[object, ...]] = []
    for i, (name, (levels, shares)) in enumerate(curves.items()):
        off = float(np.abs(levels - shares).mean())
        axes.plot(levels, shares, label=f"{name}: off by {off:.3f}", **line_style(i))
        rows += zip([name] * len(levels), levels, shares, strict=True)
    label_axes(axes, f"share of {what} inside", "level of the interval", "share inside")
    axes.legend(fontsize=8, loc="upper left")
    return Drawing(figure, Table(("of", "level", "share"), rows))
