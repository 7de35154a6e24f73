"""What damping does to an update: its size, its direction, and what is gained by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kfac_np import trees
from kfac_np.backend import Rng, get_backend, to_numpy
from kfac_np.curvature import BlockDiagonal, BlockTridiagonal, Curvature, FullMatrix, KFACBlock
from kfac_np.data import digits
from kfac_np.figures.drawing import Drawing, Table, label_axes, line_style, new_figure
from kfac_np.figures.networks import as_in_the_paper, trained
from kfac_np.fisher import Exact
from kfac_np.layers import Tanh, glorot
from kfac_np.objective import Evaluation
from kfac_np.products import quadratic_forms
from kfac_np.training.models import autoencoder
from kfac_np.trees import Tree

__all__ = ["compare_updates", "draw"]

_COLUMNS = (
    *("method", "gamma", "lambda", "update_norm", "cosine_to_gradient", "cosine_to_exact"),
    *("loss_decrease", "alpha", "rescaled_loss_decrease", "rescaled_model_decrease"),
)
_SIZES = {False: (64, 20, 10, 4), True: (64, 6, 3)}


def draw(quick: bool = False) -> Drawing:
    """Updates by K-FAC's curvatures, damped in different ways, against γ = √λ.

    Size, angle to the exactly damped natural gradient -(F + λI)⁻¹∇L, and the decrease of the loss
    on all of the data: as the update comes, and re-scaled by the α that minimises the undamped
    quadratic model with the exact F (decrease of the model: thin lines).

    References
    ----------
    Martens & Grosse 2015, §6 (the figure of damping with and without re-scaling).
    """
    e = _partly_trained(quick)
    gammas = np.logspace(-4, 1, 6 if quick else 26)
    rows = compare_updates(e, [float(g) for g in gammas])
    figure = new_figure(9.6, 7.4)
    sizes = "-".join(map(str, _SIZES[quick]))
    figure.suptitle(f"digits, autoencoder {sizes}, tanh, trained in part", fontsize=10)
    grid = figure.subplots(2, 2, sharex=True).ravel()
    gains = [max(row[column] for row in rows) for column in (6, 8)]
    for i, name in enumerate(dict.fromkeys(row[0] for row in rows)):
        own = np.asarray([row[1:] for row in rows if row[0] == name])
        style = line_style(i, len(own))
        for axes, column in zip(grid, (2, 4, 5, 7), strict=True):
            axes.plot(own[:, 0], own[:, column], label=name, **style)
        thin = {**style, "linewidth": 0.6, "marker": "", "label": None}
        grid[3].plot(own[:, 0], own[:, 8], **thin)
    for axes, title, ylabel in zip(
        grid,
        ("size of the update", "direction", "gain as it comes, α = 1", "gain with the best α"),
        ("‖Δ‖", "cosine to (F + γ²I)⁻¹∇L", "decrease of the loss", "decrease of the loss"),
        strict=True,
    ):
        label_axes(axes, title, "γ = √λ", ylabel)
        axes.set_xscale("log")
    grid[0].set_yscale("log")
    grid[1].set_ylim(-0.05, 1.05)
    grid[2].set_ylim(-0.3 * gains[0], 1.1 * gains[0])
    grid[3].set_ylim(-0.05 * gains[1], 1.15 * gains[1])
    for axes in grid[2:]:
        axes.axhline(0.0, color="0.4", linewidth=0.8)
    grid[0].legend(fontsize=7)
    grid[3].plot([], [], color="0.3", linewidth=0.6, label="thin: what the model promised")
    grid[3].legend(handles=grid[3].lines[-1:], fontsize=7)
    return Drawing(figure, Table(_COLUMNS, rows))


def compare_updates(e: Evaluation, gammas: list[float]) -> list[Any]:
    """Update and gain of every method at every γ, as rows of the figure's table.

    Examples
    --------
    >>> rows = compare_updates(_partly_trained(quick=True), [0.1])
    >>> [row[0] for row in rows][-1]
    'exact Fisher, Tikhonov'
    """
    gradient = e.gradient()
    exact = _exact_solver(e)
    truths = [trees.scale(-1.0, exact(gamma, gradient)) for gamma in gammas]
    rows = []
    for name, solve in {**_approximate(e), "exact Fisher, Tikhonov": exact}.items():
        for gamma, truth in zip(gammas, truths, strict=True):
            update = trees.scale(-1.0, solve(gamma, gradient))
            rows.append((name, gamma, gamma**2, *_gains(e, gradient, update, truth)))
    return rows


Solver = Callable[[float, Tree], Tree]


def _approximate(e: Evaluation) -> dict[str, Solver]:
    curvatures: Mapping[str, Curvature] = {
        "block-diagonal, factored": BlockDiagonal(KFACBlock()),
        "block-diagonal, exact": BlockDiagonal(KFACBlock(exact_damping=True)),
        "block-tridiagonal, factored": BlockTridiagonal(),
    }
    return {name: _solver(c, c.estimate(e, Exact(), Rng(0))) for name, c in curvatures.items()}


def _exact_solver(e: Evaluation) -> Solver:
    """(F + γ²I)⁻¹ v with the exact F, eigendecomposed once for all γ."""
    matrix = FullMatrix().matrix(FullMatrix().estimate(e, Exact(2**24), Rng(0)), e.params)
    values, vectors = np.linalg.eigh(to_numpy(matrix.to_dense()))

    def solve(gamma: float, gradient: Tree) -> Tree:
        v = vectors.T @ trees.ravel(gradient)
        return trees.unravel(vectors @ (v / (np.maximum(values, 0.0) + gamma**2)), gradient)

    return solve


def _solver(curvature: Curvature, moments: Any) -> Solver:
    def solve(gamma: float, gradient: Tree) -> Tree:
        factors, _ = curvature.factorise(moments, gamma**2)
        return curvature.solve(factors, gradient)

    return solve


def _gains(e: Evaluation, gradient: Tree, update: Tree, truth: Tree) -> tuple[float, ...]:
    """Norm, cosines, and decreases of the loss without and with the best α."""
    slope = float(trees.inner(gradient, update))
    bend = float(quadratic_forms(e, [update])[0, 0])
    alpha = -slope / bend
    # The model is ½α²·bend + α·slope, least at this α.
    promised = 0.5 * slope**2 / bend
    return (
        float(trees.squared_norm(update)) ** 0.5,
        _cosine(trees.scale(-1.0, gradient), update),
        _cosine(truth, update),
        _decrease(e, update),
        alpha,
        _decrease(e, trees.scale(alpha, update)),
        promised,
    )


def _decrease(e: Evaluation, update: Tree) -> float:
    moved = trees.axpy(1.0, update, e.params)
    return e.value - e.objective.value(moved, e.inputs, e.targets)


def _cosine(u: Tree, v: Tree) -> float:
    norms = float(trees.squared_norm(u)) ** 0.5 * float(trees.squared_norm(v)) ** 0.5
    return float(trees.inner(u, v)) / norms


def _partly_trained(quick: bool) -> Evaluation:
    """The autoencoder 64-20-10-4 on 500 digits, trained by full-batch K-FAC."""
    examples, steps = (100, 5) if quick else (500, 30)
    backend = get_backend("numpy", "float64")
    x = backend.asarray(digits().x_train[:examples].astype(np.float64))
    kfac = as_in_the_paper(autoencoder(_SIZES[quick], Tanh(), glorot), 0.1)
    state = trained(kfac, x, x, examples, steps)
    return kfac.objective.evaluate(state.params, x, x)
