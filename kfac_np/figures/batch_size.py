"""Progress per iteration against the size of the mini-batch, for K-FAC and for SGD."""

from __future__ import annotations

from typing import Any

from kfac_np.backend import Array, get_backend
from kfac_np.data import ConstantBatch, digits
from kfac_np.figures.drawing import (
    Drawing,
    Table,
    label_axes,
    line_style,
    log_axis,
    new_figure,
)
from kfac_np.figures.networks import as_in_the_paper
from kfac_np.figures.racing import Racer, race
from kfac_np.layers import Tanh, glorot
from kfac_np.objective import Objective
from kfac_np.optimizers import SGD, Optimizer
from kfac_np.training.models import autoencoder

__all__ = ["draw", "steps_to"]

_COLUMNS = ("method", "batch_size", "rate", "step", "loss")
_RATES = (0.02, 0.05, 0.1, 0.2, 0.5)  # of SGD: for each batch size the best of them is drawn


def draw(quick: bool = False) -> Drawing:
    """Training loss per iteration for mini-batches from small to everything, and steps to a loss.

    The autoencoder 64-32-16-6 on digits, tanh units. K-FAC adapts itself; SGD (Nesterov) has for
    each batch size the rate that is best after as many steps.

    References
    ----------
    Martens & Grosse 2015, §13 (the experiment about mini-batch size).
    """
    sizes = (20, 80) if quick else (25, 50, 100, 250, 500, 1500)
    steps = 10 if quick else 400
    layers = (64, 8, 3) if quick else (64, 32, 16, 6)
    objective = autoencoder(layers, Tanh(), glorot)
    x = get_backend("numpy", "float32").asarray(digits().x_train[: sizes[-1]])
    kfac = as_in_the_paper(objective, 1.0)
    runs: dict[str, dict[int, list[Any]]] = {"K-FAC": {}, "SGD": {}}
    for size in sizes:
        runs["K-FAC"][size] = _run("K-FAC", "", kfac, size, steps, x)
        runs["SGD"][size] = _best_sgd(objective, size, steps, x, _RATES[1:3] if quick else _RATES)
    losses = [row[4] for own in runs.values() for rows in own.values() for row in rows]
    figure = new_figure(11.0, 4.2)
    figure.suptitle(f"digits, autoencoder {'-'.join(map(str, layers))}, tanh", fontsize=10)
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    for ax, (method, own) in zip(axes, runs.items(), strict=False):
        for i, (size, rows) in enumerate(own.items()):
            rate = f", rate {rows[0][2]:g}" if method == "SGD" else ""
            steps_done, values = [row[3] for row in rows], [row[4] for row in rows]
            ax.plot(steps_done, values, label=f"{size}{rate}", **line_style(i, len(rows)))
        label_axes(ax, f"{method}: batches of", "iterations", "training loss")
        ax.legend(fontsize=7)
    log_axis(axes[0], "y", losses)
    _draw_steps(axes[2], runs)
    rows = [row for own in runs.values() for each in own.values() for row in each]
    return Drawing(figure, Table(_COLUMNS, rows))


def steps_to(rows: list[Any], loss: float) -> float:
    """The first step at which a run is evaluated and is at a loss or below; NaN if there is none.

    Examples
    --------
    >>> steps_to([("K-FAC", 9, "", 0, 5.0), ("K-FAC", 9, "", 10, 2.0)], 3.0)
    10.0
    """
    return next((float(row[3]) for row in rows if row[4] <= loss), float("nan"))


def _draw_steps(axes: Any, runs: dict[str, dict[int, list[Any]]]) -> None:
    """Steps to a loss that every run reaches, against batch size."""
    lowest = [min(row[4] for row in rows) for own in runs.values() for rows in own.values()]
    target, every = 1.01 * max(lowest), []
    for i, (method, own) in enumerate(runs.items()):
        needed = [steps_to(rows, target) for rows in own.values()]
        axes.plot(list(own), needed, label=method, **line_style(i))
        every += needed
    label_axes(axes, f"iterations to a loss of {target:.3g}", "size of the batches", "")
    axes.set_xscale("log")
    log_axis(axes, "y", every)
    sizes = list(runs["K-FAC"])
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.legend(fontsize=7)


def _best_sgd(
    objective: Objective, size: int, steps: int, x: Array, rates: tuple[float, ...]
) -> list[Any]:
    runs = [_run("SGD", rate, SGD(objective, rate=rate), size, steps, x) for rate in rates]
    return min(runs, key=lambda rows: rows[-1][4])


def _run(
    method: str, rate: object, optimizer: Optimizer, size: int, steps: int, x: Array
) -> list[Any]:
    racer = Racer(method, optimizer, ConstantBatch(size), steps)
    rows = race([racer], x, x, evaluations=min(steps, 100), examples=1500)
    return [(method, size, rate, step, loss) for _, step, _, loss, _ in rows]
