"""The command influence: which training examples the worst predictions of a run come from."""

from __future__ import annotations

import argparse
from typing import Any

from kfac_np.applications import Influence, MeanEigenvalue, extremes
from kfac_np.backend import Array, array_namespace, to_numpy
from kfac_np.cli.commands import title_of
from kfac_np.cli.progress import Shown, require_extras
from kfac_np.cli.runs import TrainedRun, described, fitted
from kfac_np.errors import ConfigError
from kfac_np.figures.drawing import Drawing, HostArray, Table, save
from kfac_np.figures.influential import Panel, Row, draw_influential
from kfac_np.training.lock import locked

__all__ = ["influence"]

_COLUMNS = ("test", "class", "predicted", "loss", "kind", "rank", "training", "its class")
_SELF = 50  # training examples with the largest self-influence
_PICTURED = 20  # test examples in the picture


def influence(flags: argparse.Namespace) -> int:
    """Score all training examples on some test examples; print, draw and write the extremes.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> influence(make_parser().parse_args(["influence", "no/such/run"]))
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: no/such/run: expected a run directory, found no such directory
    """
    require_extras()
    run = TrainedRun.read(flags.directory)
    x, t = run.test
    losses, predicted = _tested(run)
    chosen = _chosen(flags, losses)
    if flags.top > run.training[0].shape[0]:
        raise ConfigError(
            f"--top: expected at most {run.training[0].shape[0]} training examples, got {flags.top}"
        )
    fit = fitted(run, flags.curvature, flags.fisher, flags.batch_size)
    damping = MeanEigenvalue() if flags.damping is None else flags.damping
    by = Influence(run.objective, fit, damping)
    xp = array_namespace(x)
    rows = xp.asarray(chosen, device=x.device)
    queries = xp.take(x, rows, axis=0), xp.take(t, rows, axis=0)
    scores, own = _scored(run, by, queries, flags.batch_size)
    found = [to_numpy(each) for each in extremes(scores, flags.top)]
    changes = to_numpy(scores) / fit.terms

    labels = run.experiment.dataset.t_train, run.experiment.dataset.t_test
    table: list[tuple[Any, ...]] = []
    pictured: list[Row] = []
    for q, test in enumerate(chosen):
        about = (test, _label(labels[1], test), _label(predicted, test), losses[test])
        for kind, which in zip(("helpful", "harmful"), found, strict=True):
            table += [
                (*about, kind, rank, i, _label(labels[0], i), changes[q, i])
                for rank, i in enumerate(which[q].tolist(), 1)
            ]
        if len(pictured) < _PICTURED:
            pictured.append(_row(run, about, [which[q].tolist() for which in found], changes[q]))
    order = to_numpy(extremes(own, min(_SELF, own.shape[0])).helpful).tolist()
    most = [(i, _label(labels[0], i), to_numpy(own)[i] / fit.terms) for i in order]
    drawing = Drawing(
        draw_influential(
            pictured, f"{title_of(run.experiment.config)}: where test losses come from"
        ),
        Table((*_COLUMNS, "change of the loss without it"), table),
        {"self": Table(("training", "class", "change of its loss without it"), most)},
    )
    with locked(run.directory):
        save(drawing, run.directory, "influence")
    print(described(run, fit))
    _print(table, most)
    if len(pictured) < len(chosen):
        print(f"influence.png shows the first {len(pictured)} of {len(chosen)} test examples")
    print(f"influence.png, influence.csv and influence-self.csv are in {run.directory}")
    return 0


def _tested(run: TrainedRun) -> tuple[HostArray, HostArray | None]:
    """The loss of each test example, and the class that it is taken for."""
    x, t = run.test
    loss, losses, classes = run.objective.loss, [], []
    xp = array_namespace(x)
    for start in range(0, x.shape[0], 500):
        part = x[start : start + 500, ...]
        z, _ = run.objective.network.forward(run.params, part, None)
        values = loss.value(z, t[start : start + 500, ...])
        losses.append(xp.sum(xp.reshape(values, (part.shape[0], -1)), axis=1))
        classes.append(xp.argmax(z, axis=-1))
    found = to_numpy(xp.concat(classes)) if run.experiment.task == "classification" else None
    return to_numpy(xp.concat(losses)), found


def _chosen(flags: argparse.Namespace, losses: HostArray) -> list[int]:
    """Numbers of test examples: those that were asked for, or those with the largest losses."""
    if not flags.test:
        if flags.queries > len(losses):
            raise ConfigError(
                f"--queries: expected at most {len(losses)} test examples, got {flags.queries}"
            )
        return (-losses).argsort(kind="stable")[: flags.queries].tolist()
    if outside := [i for i in flags.test if i >= len(losses)]:
        raise ConfigError(f"--test: expected numbers below {len(losses)}, got {outside[0]}")
    return list(dict.fromkeys(flags.test))


def _scored(
    run: TrainedRun, by: Influence, queries: tuple[Array, Array], size: int | None
) -> tuple[Array, Array]:
    scores, own = [], []
    for batch in Shown("scoring", run.batches(size)):
        scores.append(by.scores(queries, batch))
        own.append(by.self_influence(batch))
    xp = array_namespace(queries[0])
    return xp.concat(scores, axis=1), xp.concat(own)


def _label(labels: HostArray | None, i: int) -> int | str:
    return "" if labels is None else int(labels[i])


def _row(
    run: TrainedRun, about: tuple[Any, ...], found: list[list[int]], changes: HostArray
) -> Row:
    test, label, predicted, loss = about
    data = run.experiment.dataset
    of_class = f"{label}, taken for {predicted}\n" if label != "" else ""
    query = Panel(data.x_test[test].reshape(data.image_shape), f"{of_class}loss {loss:.3g}")

    def panels(which: list[int]) -> list[Panel]:
        each = []
        for i in which:
            named = f"{_label(data.t_train, i)}:  " if data.t_train is not None else ""
            each.append(
                Panel(data.x_train[i].reshape(data.image_shape), f"{named}{changes[i]:+.2g}")
            )
        return each

    return Row(query, *(panels(which) for which in found))


def _print(table: list[tuple[Any, ...]], most: list[tuple[Any, ...]]) -> None:
    """For each query the first of its helpful and harmful examples."""
    print("test  class  taken for     loss  without   it changes by   class")
    for test, label, predicted, loss, _, rank, i, its, change in table:
        if rank == 1:
            print(
                f"{test:4}  {label!s:>5}  {predicted!s:>9}  {loss:7.3g}  {i:7}  {change:+14.3g}"
                f"   {its!s:>5}"
            )
    shown = ", ".join(f"{i} ({label})" if label != "" else str(i) for i, label, _ in most[:8])
    print(f"Training examples with the largest self-influence: {shown}")
