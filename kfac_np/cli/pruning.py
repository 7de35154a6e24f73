"""The command prune: a run's network made smaller, and a picture of what that costs."""

from __future__ import annotations

import argparse
import csv
import io
from dataclasses import dataclass
from functools import partial
from typing import final

from kfac_np.applications import FittedCurvature, Pruned, prune
from kfac_np.applications.pruning_round import Remove
from kfac_np.applications.saliency import Method
from kfac_np.applications.shrinking import chains, find_links
from kfac_np.backend import Array
from kfac_np.cli.commands import title_of, try_to_draw
from kfac_np.cli.progress import Shown, require_extras
from kfac_np.cli.runs import FISHERS, TrainedRun, fitted
from kfac_np.errors import InputError
from kfac_np.layers import FixedNorm, Layer
from kfac_np.training import checkpoint, plots
from kfac_np.training.files import write_atomically
from kfac_np.training.lock import locked
from kfac_np.training.metrics import Metrics, evaluate

__all__ = ["prune_run"]

PRUNED, NUMBERS, PICTURE = "pruned.npz", "pruning.csv", "pruning.png"
_LINES = ("weights", "units", "inputs")
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# What the chosen network may lose on the test examples: accuracy, or a part of the loss.
_ACCURACY, _LOSS = 0.01, 0.02


def prune_run(flags: argparse.Namespace) -> int:
    """Make a run's network smaller and leave it, with numbers and a picture, in the run.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> prune_run(make_parser().parse_args(["prune", "no/such/run"]))
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: no/such/run: expected a run directory, found no such directory
    """
    require_extras()
    run = TrainedRun.read(flags.directory)
    fit = fitted(run, flags.curvature, flags.fisher, flags.batch_size)
    remove: Remove = "inputs" if find_links(run.objective.network) else "rank"
    remove = flags.remove or remove
    job = _Job(run, fit, remove, flags.rounds)
    before = job.measured(None)
    shares = _SHARES if flags.share is None else tuple(sorted({*_SHARES, flags.share}))
    rows = [row for share in Shown("pruning", shares) if (row := job.row(share)) is not None]
    if not rows:
        job.pruned(shares[0], "obs")  # raises what is wrong
    if flags.share is None:
        kept = [row for row in rows if _as_good(row.test, before.test)]
        chosen = kept[-1] if kept else rows[0]
        if not kept:
            print("Every share that was tried costs more than it should; this is the smallest:")
    else:
        job.pruned(flags.share, "obs")  # raises if so much cannot go
        chosen = next(row for row in rows if row.share == flags.share)
    with locked(run.directory):
        job.save(chosen)
        write_atomically(
            run.directory / NUMBERS, lambda file: file.write(_table(before, rows).encode())
        )
    try_to_draw(PICTURE, partial(_draw, run, before, rows, chosen, remove))
    print(chosen.result)
    for name, was, now in (
        ("training", before.training, chosen.training),
        ("test", before.test, chosen.test),
    ):
        quantity = "loss" if was.accuracy is None else "accuracy"
        print(f"{name} {quantity} {_value(was):.4g} before, {_value(now):.4g} after")
    print(f"The smaller network is in {run.directory / PRUNED}, the whole curve in {PICTURE}")
    return 0


@final
@dataclass(frozen=True)
class _Row:
    """What is left after a share of the parameters has gone."""

    share: float
    result: Pruned | None
    training: Metrics
    test: Metrics
    magnitude: Metrics | None  # on the test set, where weights' sizes had decided


@final
@dataclass(frozen=True)
class _Job:
    run: TrainedRun
    fit: FittedCurvature
    remove: Remove
    rounds: int

    def pruned(self, share: float, method: Method) -> Pruned:
        # The sizes of weights need no curvature, products know one round only.
        again = self.rounds if self.remove in _LINES and method == "obs" else 1
        return prune(
            self.run.objective,
            self.fit,
            share,
            remove=self.remove,
            method=method,
            rounds=again,
            batches=self.run.batches() if again > 1 else None,
            fisher=next(f for f in FISHERS.values() if repr(f) == self.fit.fisher),
        )

    def row(self, share: float) -> _Row | None:
        """None where so much cannot go."""
        try:
            row = self.measured(self.pruned(share, "obs"), share)
        except InputError:
            return None
        if self.remove not in _LINES:
            return row
        plain = self.pruned(share, "magnitude")
        return _Row(share, row.result, row.training, row.test, self.measured(plain).test)

    def measured(self, result: Pruned | None, share: float = 0.0) -> _Row:
        objective = self.run.objective if result is None else result.objective
        params = self.run.params if result is None else result.params
        task = self.run.experiment.task
        training = evaluate(objective, params, *self.run.training, task)
        test = evaluate(objective, params, *self.run.test, task)
        return _Row(share, result, training, test, None)

    def save(self, row: _Row) -> None:
        assert row.result is not None
        network = row.result.objective.network
        tree = {"params": row.result.params, "masks": row.result.masks, "norms": _norms(network)}
        metadata = {
            "kind": "pruned network",
            "network": repr(network),
            "step": self.run.step,
            "parameters": self.run.parameters,
            "remove": self.remove,
            "share": row.result.share,
        }
        checkpoint.save(self.run.directory / PRUNED, tree, metadata)


def _norms(network: Layer) -> dict[str, tuple[Array, Array]]:
    """Mean and rate of frozen batch statistics, which `repr` does not show."""
    found = (pair for chain in chains(network) for pair in chain)
    return {path: (x.mean, x.rate) for path, x in found if isinstance(x, FixedNorm)}


def _as_good(now: Metrics, was: Metrics) -> bool:
    if was.accuracy is not None and now.accuracy is not None:
        return now.accuracy >= was.accuracy - _ACCURACY
    return now.loss <= (1.0 + _LOSS) * was.loss


def _value(metrics: Metrics) -> float:
    return metrics.loss if metrics.accuracy is None else metrics.accuracy


def _table(before: _Row, rows: list[_Row]) -> str:
    """The curve as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(before.test.as_dict())
    whole = next(row.result.total[0] for row in rows if row.result)
    writer.writerow(
        ["share", "parameters", "predicted_increase"]
        + [f"training_{name}" for name in names]
        + [f"test_{name}" for name in names]
        + [f"test_{name}_by_magnitude" for name in names]
    )
    for row in [before, *rows]:
        result = row.result
        left = result.total[1] if result else whole
        plain = row.magnitude.as_dict().values() if row.magnitude else [""] * len(names)
        writer.writerow(
            [result.share if result else 0.0, left, result.predicted if result else 0.0]
            + [*row.training.as_dict().values(), *row.test.as_dict().values(), *plain]
        )
    return text.getvalue()


def _draw(run: TrainedRun, before: _Row, rows: list[_Row], chosen: _Row, remove: str) -> None:
    assert chosen.result is not None
    shares = [0.0, *(row.result.share for row in rows if row.result)]
    lines = {"by curvature": (shares, [_value(before.test), *(_value(r.test) for r in rows)])}
    plain = [row for row in rows if row.magnitude is not None and row.result is not None]
    if plain:
        lines["by magnitude"] = (
            [0.0, *(row.result.share for row in plain if row.result)],
            [_value(before.test), *(_value(row.magnitude) for row in plain if row.magnitude)],
        )
    quantity = "test loss" if before.test.accuracy is None else "test accuracy"
    plots.plot_lines(
        run.directory / PICTURE,
        lines,
        ("share of the parameters removed", quantity),
        f"{title_of(run.experiment.config)}: {remove} removed, no training after",
        level=("before", _value(before.test)),
        mark=(f"in {PRUNED}", chosen.result.share, _value(chosen.test)),
    )
