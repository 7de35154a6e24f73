"""What KFC assumes about a convolutional network, measured: correlations between locations."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_np import trees
from kfac_np.backend import Rng, get_backend, to_numpy
from kfac_np.data import digits
from kfac_np.figures.drawing import (
    Drawing,
    HostArray,
    Table,
    heat_map,
    label_axes,
    line_style,
    new_figure,
)
from kfac_np.figures.networks import as_in_the_paper, trained
from kfac_np.fisher import MonteCarlo
from kfac_np.layers import Conv, Dense, Flatten, Layer, MaxPool, ReLU, Reshape, Sequential
from kfac_np.losses import SoftmaxCrossEntropy
from kfac_np.objective import Evaluation, Objective

__all__ = ["autocorrelation", "draw", "spatial_maps"]

_REACH = 5  # the largest offset, in pixels
_CONVOLUTIONS = (1, 3, 5)  # their places in the network


def draw(quick: bool = False) -> Drawing:
    """Correlations between locations, and second moments at each, before and behind convolutions.

    Activations are the inputs of a convolution; derivatives are those of the log-likelihood, for
    targets sampled from the model, with respect to its outputs.

    References
    ----------
    Grosse & Martens 2016, §3 (spatial homogeneity, SH; spatially uncorrelated derivatives, SUD)
    and its figure of such correlations.
    """
    maps = spatial_maps(_partly_trained(quick))
    figure = new_figure(12.6, 5.1)
    figure.suptitle("digits, three convolutions of 3 × 3, trained in part", fontsize=10)
    names = [f"{kind[0]}{i}" for kind in ("correlation", "moment") for i in range(3)]
    grid: Any = figure.subplot_mosaic(
        [[*(f"{quantity[0]}_{name}" for name in names), "profile"] for quantity in maps],
        width_ratios=(1, 1, 1, 1, 1, 1, 1.7),
    )
    rows: list[tuple[object, ...]] = []
    moments: list[tuple[object, ...]] = []
    images: list[Any] = []
    for quantity, layers in maps.items():
        for i, x in enumerate(layers):
            found, second = autocorrelation(x, _REACH), _second_moments(x)
            layer, cell = f"conv {i + 1}", f"{quantity[0]}_"
            axes = grid[f"{cell}c{i}"], grid[f"{cell}m{i}"]
            images.append(heat_map(axes[0], found, layer, limits=(-0.5, 1.0), signed=True))
            spread = float(second.std() / second.mean())
            images.append(heat_map(axes[1], second, layer, limits=(0.0, 3.0)))
            axes[1].set_xlabel(f"spread {spread:.2f}", fontsize=7)
            for (dy, dx), value in np.ndenumerate(found):
                rows.append((quantity, layer, dy - _REACH, dx - _REACH, float(value)))
            for (y, column), value in np.ndenumerate(second):
                moments.append((quantity, layer, y, column, float(value)))
            line = {**line_style(i), "linestyle": "-" if quantity == "activations" else ":"}
            grid["profile"].plot(*_profile(found), label=f"{quantity}, {layer}", **line)
        grid[f"{quantity[0]}_c0"].set_ylabel(quantity, fontsize=9)
    for name, title, image in (
        ("c", "correlation at an offset of -5 to 5 pixels", images[0]),
        ("m", "second moment at each location, relative to its mean", images[1]),
    ):
        column = [grid[f"{q[0]}_{name}{i}"] for q in maps for i in range(3)]
        bar = figure.colorbar(image, ax=column, location="bottom", shrink=0.7, pad=0.03)
        bar.set_label(title, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    label_axes(grid["profile"], "correlation and distance", "offset (pixels)", "mean |correlation|")
    grid["profile"].legend(fontsize=7)
    return Drawing(
        figure,
        Table(("quantity", "layer", "dy", "dx", "correlation"), rows),
        {"locations": Table(("quantity", "layer", "y", "x", "second_moment"), moments)},
    )


def autocorrelation(x: HostArray, reach: int) -> HostArray:
    """Σ_c E[x_c(t) x_c(t + d)] / √(Σ_c E[x_c(t)²] Σ_c E[x_c(t + d)²]), centred, for offsets d.

    The mean over examples at each location is taken off; expectations are over examples and over
    locations t for which t + d is in the image, too.

    Parameters
    ----------
    x : array, shape (N, H, W, C)
    reach : int
        The largest offset, smaller than H and W.

    Returns
    -------
    array, shape (2 reach + 1, 2 reach + 1)
        1 in the middle.

    Examples
    --------
    >>> checks = np.asarray([[1.0, -1.0], [-1.0, 1.0]])
    >>> autocorrelation(np.stack([checks, -checks])[..., None], 1)[1]
    array([-1.,  1., -1.])
    """
    x = x - x.mean(axis=0)
    size = 2 * reach + 1
    out = np.empty((size, size))
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            here = x[:, max(0, -dy) : x.shape[1] - max(0, dy)]
            here = here[:, :, max(0, -dx) : x.shape[2] - max(0, dx)]
            there = x[:, max(0, dy) : x.shape[1] - max(0, -dy)]
            there = there[:, :, max(0, dx) : x.shape[2] - max(0, -dx)]
            norm = np.sqrt(np.sum(here**2) * np.sum(there**2))
            out[dy + reach, dx + reach] = np.sum(here * there) / norm if norm else 0.0
    return out


def spatial_maps(e: Evaluation) -> dict[str, list[HostArray]]:
    """Inputs of the convolutions and derivatives at their outputs, each (N, H, W, C).

    Examples
    --------
    >>> maps = spatial_maps(_partly_trained(quick=True))
    >>> [x.shape[1:] for x in maps["activations"]]
    [(8, 8, 1), (8, 8, 4), (8, 8, 4)]
    """
    network: Any = e.objective.network
    activations = []
    for i in _CONVOLUTIONS:
        y, _ = Sequential(*network.layers[:i]).forward(e.params[:i], e.inputs)
        activations.append(to_numpy(y))
    (statistics,) = MonteCarlo(1).statistics(e, Rng(1))
    found = dict(trees.items(statistics))
    gradients = [to_numpy(found[str(i)].stacked_g)[0] for i in _CONVOLUTIONS]
    return {
        "activations": activations,
        "derivatives": [
            g.reshape(*a.shape[:3], -1) for g, a in zip(gradients, activations, strict=True)
        ],
    }


def _second_moments(x: HostArray) -> HostArray:
    """E[x²] at each location, relative to its mean: flat if statistics are homogeneous."""
    moments = np.asarray((x**2).mean(axis=(0, 3)))
    return moments / moments.mean()


def _profile(correlations: HostArray) -> tuple[list[int], list[float]]:
    """Means of absolute values on the squares around the middle."""
    reach = correlations.shape[0] // 2
    y, x = np.indices(correlations.shape) - reach
    rings = np.maximum(np.abs(y), np.abs(x))
    means = [float(np.abs(correlations[rings == r]).mean()) for r in range(reach + 1)]
    return list(range(reach + 1)), means


def _partly_trained(quick: bool) -> Evaluation:
    """Three convolutions of 3 × 3 on digits, trained by K-FAC to a few per cent of error."""
    channels, examples, steps = (4, 100, 3) if quick else (16, 1500, 20)
    backend = get_backend("numpy", "float64")
    layers: list[Layer] = [Reshape((8, 8, 1))]
    depth = 1
    for _ in range(3):
        layers += [Conv(depth, channels, (3, 3), padding="same"), ReLU()]
        depth = channels
    network = Sequential(*layers, MaxPool((2, 2), 2), Flatten(), Dense(16 * channels, 10))
    objective = Objective(network, SoftmaxCrossEntropy())
    data = digits()
    assert data.t_train is not None
    x = backend.asarray(data.x_train[:examples].astype(np.float64))
    t = backend.asarray(data.t_train[:examples])
    kfac = as_in_the_paper(objective, 1.0)
    state = trained(kfac, x, t, min(500, examples), steps)
    return objective.evaluate(state.params, x, t)
