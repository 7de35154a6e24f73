"""The inverse of F̃, and its block-diagonal and block-tridiagonal approximations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from kfac_np import trees
from kfac_np.curvature import BlockDiagonal, BlockTridiagonal, Curvature, FullKronecker, KFACBlock
from kfac_np.figures.drawing import (
    Drawing,
    HostArray,
    Table,
    cells,
    heat_map,
    label_axes,
    line_style,
    log_axis,
    new_figure,
)
from kfac_np.figures.fisher import block_norms, layer_slices
from kfac_np.figures.networks import (
    MiddleLayers,
    damped,
    middle_moments,
    small_autoencoder,
    small_classifier,
)

__all__ = ["draw", "inverses"]

_NAMES = {"exact": "exact  F̃⁻¹", "diagonal": "block-diagonal", "tridiagonal": "block-tridiagonal"}
_DECADES = 3.0  # of the colour scale


def draw(quick: bool = False) -> Drawing:
    """F̃⁻¹ and its two approximations for four middle layers, and their errors against γ.

    All three are damped by factored Tikhonov with the same γ before they are inverted.

    References
    ----------
    Martens & Grosse 2015, §4 (the figures of inverses and of their block averages) and §6.3.
    """
    figure = new_figure(11.0, 9.2)
    parts: Any = figure.subfigures(2, 1, hspace=0.03)
    gammas = np.logspace(-3, 1, 3 if quick else 9)
    tables: dict[str, list[tuple[object, ...]]] = {"errors": [], "blocks": [], "pixels": []}
    problems = {"autoencoder": small_autoencoder(quick), "classifier": small_classifier(quick)}
    for part, (name, middle) in zip(parts, problems.items(), strict=True):
        part.suptitle(f"{middle.summary}; pictures at γ = {middle.gamma:.2g}", fontsize=9)
        moments = _all_moments(middle)
        found = inverses(middle, moments, middle.gamma)
        axes = _draw_matrices(part, middle, found, name, tables)
        errors = []
        for gamma in [*gammas, middle.gamma]:
            each = inverses(middle, moments, float(gamma))
            norm = np.linalg.norm(each["exact"])
            for kind in ("diagonal", "tridiagonal"):
                error = float(np.linalg.norm(each[kind] - each["exact"]) / norm)
                tables["errors"].append((name, float(gamma), kind, error))
                errors.append((kind, float(gamma), error))
        _draw_errors(axes, errors, middle.gamma)
    return Drawing(
        figure,
        Table(("network", "gamma", "approximation", "relative_error"), tables["errors"]),
        {
            "blocks": Table(
                ("network", "approximation", "row_layer", "column_layer", "mean_absolute_entry")
                + ("exact_norm", "difference_norm", "relative_error"),
                tables["blocks"],
            ),
            "pixels": Table(("network", "row", "column", *_NAMES), tables["pixels"]),
        },
    )


def inverses(
    middle: MiddleLayers, moments: Mapping[str, Any], gamma: float
) -> dict[str, HostArray]:
    """Dense inverses of the middle layers' matrices, their factors damped by γ.

    Returns
    -------
    dict
        "exact" for F̃, "diagonal" and "tridiagonal" for what takes its place.

    Examples
    --------
    >>> middle = small_classifier(quick=True)
    >>> list(inverses(middle, _all_moments(middle), 0.1))
    ['exact', 'diagonal', 'tridiagonal']
    """
    found = dict(trees.items(middle.evaluation.params))
    params = {path: found[path] for path in middle.paths}
    out = {}
    for name, curvature in _curvatures(middle).items():
        matrix = curvature.matrix(damped(moments[name], KFACBlock(), gamma), params).to_dense()
        out[name] = np.linalg.inv(np.asarray(matrix))
    return out


def _curvatures(middle: MiddleLayers) -> dict[str, Curvature]:
    return {
        "exact": FullKronecker(),
        "diagonal": BlockDiagonal(),
        "tridiagonal": BlockTridiagonal(chains=(middle.paths,)),
    }


def _all_moments(middle: MiddleLayers) -> dict[str, Any]:
    return {name: middle_moments(c, middle) for name, c in _curvatures(middle).items()}


def _draw_matrices(
    part: Any,
    middle: MiddleLayers,
    found: Mapping[str, HostArray],
    name: str,
    tables: Mapping[str, list[tuple[object, ...]]],
) -> Any:
    """Three inverses in a row; below, block averages of the first and errors of the others.

    Returns the axes for the errors against γ.
    """
    mosaic = [["exact", "diagonal", "tridiagonal", "errors"], ["blocks", "d", "t", "errors"]]
    grid = part.subplot_mosaic(mosaic, width_ratios=(1, 1, 1, 1.1))
    places = layer_slices(middle)
    unit = dict(trees.items(middle.evaluation.params))[middle.paths[0]].shape[1]
    lines = [place.start / unit for place in list(places.values())[1:]]
    pixels = {kind: cells(m, unit) for kind, m in found.items()}
    top = float(np.quantile(pixels["exact"], 0.995))
    limits = (top * 10.0**-_DECADES, top)
    for kind, picture in pixels.items():
        image = heat_map(grid[kind], picture, _NAMES[kind], limits=limits, log=True, lines=lines)
    for kind in ("diagonal", "tridiagonal"):
        axes = grid[kind[0]]
        error = cells(found[kind] - found["exact"], unit)
        heat_map(axes, error, f"error, {_NAMES[kind]}", limits=limits, log=True, lines=lines)
        relative = np.linalg.norm(found[kind] - found["exact"]) / np.linalg.norm(found["exact"])
        axes.set_xlabel(f"relative, Frobenius: {relative:.3g}", fontsize=8)
    bar = part.colorbar(image, ax=[grid["tridiagonal"], grid["t"]], shrink=0.8, extend="both")
    bar.set_label("mean absolute entry for two units", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _draw_blocks(grid["blocks"], found["exact"], list(places.values()), limits)
    for kind, m in found.items():
        for row in block_norms(found["exact"], m, places)[:-1]:
            i, j = places[str(row[0])], places[str(row[1])]
            mean = float(np.abs(m[i, j]).mean())
            tables["blocks"].append((name, kind, *row[:2], mean, *row[2:]))
    for y, x in itertools.product(range(len(pixels["exact"])), repeat=2):
        tables["pixels"].append((name, y, x, *(float(p[y, x]) for p in pixels.values())))
    return grid["errors"]


def _draw_blocks(
    axes: Any, inverse: HostArray, places: list[slice], limits: tuple[float, float]
) -> None:
    """Means of absolute values over whole blocks, with the largest as 1 for the numbers."""
    means = np.asarray([[np.abs(inverse[i, j]).mean() for j in places] for i in places])
    heat_map(axes, means, "exact F̃⁻¹, means over blocks", limits=limits, log=True)
    for (i, j), value in np.ndenumerate(means):
        dark = value > limits[0] * 10 ** (0.55 * _DECADES)
        text = f"{value / means.max():.2g}"
        colour = "white" if dark else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("numbers: relative to the largest", fontsize=8)


def _draw_errors(axes: Any, errors: list[tuple[str, float, float]], gamma: float) -> None:
    for i, kind in enumerate(("diagonal", "tridiagonal")):
        points = sorted((g, error) for k, g, error in errors if k == kind)
        axes.plot(*zip(*points, strict=True), label=_NAMES[kind], **line_style(i))
    axes.axvline(gamma, color="0.5", linewidth=0.8)
    axes.set_xscale("log")
    log_axis(axes, "y", [error for _, _, error in errors])
    label_axes(axes, "relative error of the inverse", "γ (the line: pictures)", "")
    axes.legend(fontsize=7)
