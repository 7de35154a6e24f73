"""Queries beside the training images that helped them most, and those that harmed them most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from kfac_np.figures.drawing import HostArray, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Panel", "Row", "draw_influential"]

_COLOURS = ("#000000", "#2c6ba0", "#b3302a")  # of the captions: query, helpful, harmful
_SIZE = 0.95  # of an image, in inches


@final
@dataclass(frozen=True, eq=False)
class Panel:
    """An image, shape (height, width, channels) with values in [0, 1], and what is said of it.

    Examples
    --------
    >>> Panel(np.zeros((2, 2, 1)), "a 3").caption
    'a 3'
    """

    image: HostArray
    caption: str


@final
@dataclass(frozen=True, eq=False)
class Row:
    """A query, and as many helpful as harmful images, the most extreme first.

    Examples
    --------
    >>> panel = Panel(np.zeros((2, 2, 1)), "a 3")
    >>> len(Row(panel, [panel], [panel]).helpful)
    1
    """

    query: Panel
    helpful: Sequence[Panel]
    harmful: Sequence[Panel]


def draw_influential(rows: Sequence[Row], title: str) -> Figure:
    """Draw a row for each query.

    Parameters
    ----------
    rows : sequence of Row
        At least one; as many images in each.
    title : str

    Examples
    --------
    >>> panel = Panel(np.zeros((2, 2, 1)), "a 3")
    >>> figure = draw_influential([Row(panel, [panel], [panel])], "digits")
    >>> len(figure.axes)
    3
    """
    k = len(rows[0].helpful)
    height, width, _ = rows[0].query.image.shape
    each = _SIZE * height / width + 0.38
    figure = new_figure((_SIZE + 0.1) * (2 * k + 1) + 0.6, each * len(rows) + 0.75)
    figure.suptitle(title, fontsize=11)
    parts: HostArray = np.asarray(figure.subfigures(1, 3, width_ratios=(1.25, k, k)))
    headings = ("query", "most helpful, change without", "most harmful, change without")
    lines = max(1 + row.query.caption.count("\n") for row in rows)
    for part, heading, colour, count in zip(parts, headings, _COLOURS, (1, k, k), strict=True):
        part.suptitle(heading, fontsize=9, color=colour)
        grid = part.subplots(len(rows), count, squeeze=False)
        for line, row in zip(grid, rows, strict=True):
            panels = {"query": [row.query], headings[1]: row.helpful, headings[2]: row.harmful}
            for axes, panel in zip(line, panels[heading], strict=True):
                _show(axes, panel, colour, lines)
    return figure


def _show(axes: Axes, panel: Panel, colour: str, lines: int) -> None:
    caption = "\n" * (lines - 1 - panel.caption.count("\n")) + panel.caption  # all as high
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(caption.replace("$", r"\$"), fontsize=7, color=colour, pad=3)
    for spine in axes.spines.values():
        spine.set_color(colour)
    if panel.image.shape[-1] == 3:
        axes.imshow(np.clip(panel.image, 0.0, 1.0))
    else:
        axes.imshow(panel.image.mean(axis=-1), cmap="gray_r", vmin=0.0, vmax=1.0)
