"""Training runs of several optimisers from one start, and their curves side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from kfac_np.backend import Array, Backend
from kfac_np.data import BatchSchedule
from kfac_np.figures.drawing import label_axes, line_style, log_axis, new_figure
from kfac_np.objective import Objective
from kfac_np.optimizers import Optimizer
from kfac_np.training.loop import Supply, start, train
from kfac_np.trees import Tree

__all__ = ["COLUMNS", "Racer", "draw_race", "race"]

COLUMNS = ("run", "step", "seconds", "loss", "averaged_loss")


@final
@dataclass(frozen=True)
class Racer:
    """An optimiser, its batches and its number of steps.

    Examples
    --------
    >>> from kfac_np.optimizers import SGD
    >>> from kfac_np.data import ConstantBatch
    >>> from kfac_np.training.models import mlp
    >>> Racer("SGD", SGD(mlp((2, 2))), ConstantBatch(10), 100).label
    'SGD'
    """

    label: str
    optimizer: Optimizer
    batch: BatchSchedule
    steps: int


def race(
    racers: Sequence[Racer],
    x: Array,
    t: Array,
    *,
    evaluations: int = 25,
    examples: int = 2000,
    seed: int = 0,
) -> list[tuple[Any, ...]]:
    """Train each from the same parameters; evaluate the training loss on the way.

    Steps, batches and parameters depend on the seed alone; only the clock, which runs during
    steps, is the machine's. Runs take turns, so that whatever else the machine does slows all.

    Parameters
    ----------
    racers : sequence of Racer
    x, t : Array
    evaluations : int
        How often, spread over the steps of the shortest run, and over those after it.
    examples : int
        The first ones, on which the loss is evaluated.
    seed : int

    Returns
    -------
    list of tuples
        As `COLUMNS`; the last entry is "" where an optimiser keeps no average.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> from kfac_np.optimizers import SGD
    >>> from kfac_np.data import ConstantBatch, digits
    >>> from kfac_np.training.models import autoencoder
    >>> x = get_backend().asarray(digits().x_train)
    >>> sgd = Racer("SGD", SGD(autoencoder((64, 3))), ConstantBatch(10), 4)
    >>> [row[:2] for row in race([sgd], x, x, evaluations=2)]
    [('SGD', 0), ('SGD', 2), ('SGD', 4)]
    """
    fewest = min(racer.steps for racer in racers)
    rows: dict[str, list[tuple[Any, ...]]] = {}
    runs = [_run(racer, x, t, fewest, evaluations, examples, seed) for racer in racers]
    for turn in itertools.zip_longest(*runs):
        for row in turn:
            if row is not None:
                rows.setdefault(row[0], []).append(row)
    return [row for own in rows.values() for row in own]


def _run(
    racer: Racer, x: Array, t: Array, fewest: int, evaluations: int, examples: int, seed: int
) -> Iterator[tuple[Any, ...]]:
    """One run, from evaluation to evaluation."""
    # densely where curves are compared per iteration, then over what remains
    early, late = max(1, fewest // evaluations), max(1, racer.steps // evaluations)
    position = start(racer.optimizer, Backend.of(x), seed)
    steps = train(racer.optimizer, Supply(x, t, racer.batch, seed), position)
    for step in itertools.chain([None], itertools.islice(steps, racer.steps)):
        position = position if step is None else step.position
        every = early if position.step <= fewest else late
        if position.step % every == 0 or position.step == racer.steps:
            losses = _losses(racer.optimizer.objective, position.parameters, x, t, examples)
            yield (racer.label, position.step, position.seconds, *losses)


def draw_race(rows: Sequence[tuple[Any, ...]], title: str, ylabel: str, steps: int) -> Any:
    """Curves per iteration (the first `steps`) and per second, on a logarithmic axis.

    Returns
    -------
    Figure

    Examples
    --------
    >>> rows = [("SGD", 0, 0.0, 9.0, ""), ("SGD", 5, 0.1, 3.0, "")]
    >>> len(draw_race(rows, "a title", "loss", steps=5).axes)
    2
    """
    figure = new_figure(10.0, 4.2)
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for i, label in enumerate(dict.fromkeys(row[0] for row in rows)):
        own = [row for row in rows if row[0] == label]
        losses = [row[3] for row in own]
        style = line_style(i, len(own))
        by_step.plot([row[1] for row in own], losses, label=label, **style)
        by_second.plot([row[2] for row in own], losses, label=label, **style)
    label_axes(by_step, "per iteration", "iterations", ylabel)
    label_axes(by_second, "per second", "seconds of optimisation", "")
    by_step.set_xlim(-0.02 * steps, 1.02 * steps)  # cheap steps go on, per second
    # the start may be far above: as much of the way down as is not a vertical line
    shown = [row[3] for row in rows if row[1]] or [row[3] for row in rows]
    log_axis(by_step, "y", shown)
    by_step.set_ylim(min(shown) / 1.1, 1.1 * max(shown))
    by_second.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def _losses(
    objective: Objective, parameters: dict[str, Tree], x: Array, t: Array, examples: int
) -> tuple[object, object]:
    """Training loss of the current parameters and of the averaged ones, if any."""
    found = {
        name: objective.value(params, x[:examples, ...], t[:examples, ...])
        for name, params in parameters.items()
    }
    assert np.isfinite(found["current"])
    return found["current"], found.get("averaged", "")
