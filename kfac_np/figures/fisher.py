"""Exact Fisher, its Kronecker-factored approximation F̃, and their difference, as pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from kfac_np import trees
from kfac_np.curvature import FullKronecker, FullMatrix
from kfac_np.figures.drawing import (
    Drawing,
    HostArray,
    Table,
    cells,
    heat_map,
    new_figure,
)
from kfac_np.figures.networks import (
    MiddleLayers,
    middle_moments,
    small_autoencoder,
    small_classifier,
)

__all__ = ["block_norms", "draw", "layer_slices"]

_TITLES = ("exact Fisher  |F|", "Kronecker-factored  |F̃|", "difference  |F - F̃|")


def draw(quick: bool = False) -> Drawing:
    """F, F̃ and |F - F̃| for the four middle layers of an autoencoder and of a classifier.

    References
    ----------
    Martens & Grosse 2015, §3 (the figure of F, F̃ and their difference).
    """
    figure = new_figure(9.6, 6.7)
    grid = figure.subplots(2, 3)
    rows: list[tuple[object, ...]] = []
    pixels: list[tuple[object, ...]] = []
    problems = {"autoencoder": small_autoencoder(quick), "classifier": small_classifier(quick)}
    for line, (name, middle) in zip(grid, problems.items(), strict=True):
        exact, factored = _matrices(middle)
        places = layer_slices(middle)
        rows += [(name, *row) for row in block_norms(exact, factored, places)]
        # a pixel for the weights that lead to one unit and those that lead to another
        unit = dict(trees.items(middle.evaluation.params))[middle.paths[0]].shape[1]
        # the largest value that is told apart: the few beyond it would leave the rest white
        top = float(np.quantile(cells(exact, unit), 0.985))
        lines = [place.start / unit for place in list(places.values())[1:]]
        pictures = [cells(m, unit) for m in (exact, factored, exact - factored)]
        for axes, picture, title in zip(line, pictures, _TITLES, strict=True):
            image = heat_map(axes, picture, title, limits=(0.0, top), lines=lines)
        line[0].set_ylabel(middle.summary.replace(" after ", "\nafter "), fontsize=8)
        error = np.linalg.norm(exact - factored) / np.linalg.norm(exact)
        line[2].set_xlabel(f"‖F - F̃‖ / ‖F‖ = {error:.3g} (Frobenius)", fontsize=8)
        bar = figure.colorbar(image, ax=list(line), shrink=0.9, extend="max")
        bar.set_label("mean absolute entry for two units", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        for i, j in itertools.product(range(len(pictures[0])), repeat=2):
            pixels.append((name, i, j, *(float(p[i, j]) for p in pictures)))
    columns = ("network", "row_layer", "column_layer", "exact_norm", "difference_norm")
    more = ("network", "row", "column", "exact", "kronecker_factored", "difference")
    return Drawing(
        figure, Table((*columns, "relative_error"), rows), {"pixels": Table(more, pixels)}
    )


def layer_slices(middle: MiddleLayers) -> dict[str, slice]:
    """Where the parameters of each layer are in a matrix over all middle layers.

    Examples
    --------
    >>> layer_slices(small_classifier(quick=True))["4"]
    slice(42, 84, None)
    """
    found = dict(trees.items(middle.evaluation.params))
    sizes = [found[path].shape[0] * found[path].shape[1] for path in middle.paths]
    ends = list(itertools.accumulate(sizes))
    return {
        path: slice(end - size, end)
        for path, size, end in zip(middle.paths, sizes, ends, strict=True)
    }


def block_norms(
    exact: HostArray, approximate: HostArray, places: Mapping[str, slice]
) -> list[tuple[object, ...]]:
    """Frobenius norms of each block, of its error, and their quotient; then of the whole.

    Examples
    --------
    >>> block_norms(np.eye(2), np.zeros((2, 2)), {"0": slice(0, 2)})[0]
    ('0', '0', 1.414..., 1.414..., 1.0)
    """
    everything = slice(0, exact.shape[0])
    pairs = list(itertools.product(places.items(), repeat=2))
    out: list[tuple[object, ...]] = []
    for (row, i), (column, j) in [*pairs, (("all", everything), ("all", everything))]:
        norm = float(np.linalg.norm(exact[i, j]))
        error = float(np.linalg.norm(exact[i, j] - approximate[i, j]))
        out.append((row, column, norm, error, error / norm if norm else 0.0))
    return out


def _matrices(middle: MiddleLayers) -> tuple[HostArray, HostArray]:
    """F and F̃ of the middle layers."""
    like = dict(trees.items(middle.evaluation.params))
    params = {path: like[path] for path in middle.paths}
    full, kronecker = FullMatrix(), FullKronecker()
    exact = full.matrix(middle_moments(full, middle), params).to_dense()
    factored = kronecker.matrix(middle_moments(kronecker, middle), params).to_dense()
    return np.asarray(exact), np.asarray(factored)
