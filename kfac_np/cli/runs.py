"""What a run left in its directory, for the commands that begin where training ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

from kfac_np import trees
from kfac_np.applications import FittedCurvature, fit_curvature
from kfac_np.backend import Array, array_namespace
from kfac_np.cli.progress import Shown
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    Curvature,
    DiagonalBlock,
    FullMatrix,
)
from kfac_np.errors import CheckpointError
from kfac_np.fisher import Empirical, Exact, FisherType, MonteCarlo
from kfac_np.objective import Objective
from kfac_np.training import checkpoint
from kfac_np.training.config import fingerprint
from kfac_np.training.experiment import Experiment
from kfac_np.training.lock import locked
from kfac_np.training.metrics import chunk_size
from kfac_np.training.restoring import restore
from kfac_np.training.run import CHECKPOINTS, read_config
from kfac_np.trees import Tree
from kfac_np.validation import listed

__all__ = ["CURVATURE", "CURVATURES", "FISHERS", "TrainedRun", "described", "fitted"]

CURVATURES: dict[str, Curvature] = {
    "kfac": BlockDiagonal(),
    "ekfac": EKFAC(),
    "diagonal": BlockDiagonal(DiagonalBlock()),
    "block-tridiagonal": BlockTridiagonal(split=True),
    "full": FullMatrix(),
}
FISHERS: dict[str, FisherType] = {
    "exact": Exact(),
    "monte-carlo": MonteCarlo(),
    "empirical": Empirical(),
}
CURVATURE = "curvature.npz"
_SUMS = "curvature.sums.npz"  # of a fit that is not complete
_MOST_EXACT = 100  # outputs; each costs the exact Fisher a backward pass


@final
@dataclass(frozen=True, eq=False)
class TrainedRun:
    """The newest checkpoint of a run, with the data and the network that it belongs to.

    Attributes
    ----------
    directory : Path
    experiment : Experiment
        Data on the device: `experiment.supply.x`, `experiment.supply.t`, `experiment.test`, and
        on the host, with the shape of the images: `experiment.dataset`.
    step : int
    parameters : str
        "current" or "averaged": those with less training loss, as in the run's summary.
    params : tree of Array
    objective : Objective
        As it is used after training, batch statistics frozen.

    Examples
    --------
    >>> TrainedRun.read("no/such/run")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: no/such/run: expected a run directory, found no such directory
    """

    directory: Path
    experiment: Experiment
    step: int
    parameters: str
    params: Tree
    objective: Objective

    @classmethod
    def read(cls, directory: str | Path) -> TrainedRun:
        """Read the newest checkpoint of a run directory.

        Raises
        ------
        ConfigError
            It is not the directory of one run.
        CheckpointError
            There is no checkpoint, or it is damaged, of another configuration or of other data.
        """
        directory = Path(directory)
        config = read_config(directory)
        # Without a budget no step is tried from the checkpoint: none will be done.
        config = replace(config, run=replace(config.run, steps=0, seconds=None))
        experiment = Experiment.of(config)
        made_with = {
            "configuration": fingerprint(config),
            "data": experiment.dataset.fingerprint(),
        }
        _, position, _ = checkpoint.load_latest(
            directory / CHECKPOINTS,
            backend=experiment.backend,
            restore=partial(restore, experiment, made_with),
        )
        found = position.parameters
        names = list(found)
        if len(names) > 1:
            names.sort(key=lambda name: experiment.evaluate(found[name]).loss)
        params = found[names[0]]
        return cls(
            directory, experiment, position.step, names[0], params, experiment.frozen(params)
        )

    @property
    def training(self) -> tuple[Array, Array]:
        """Inputs and targets."""
        return self.experiment.supply.x, self.experiment.supply.t

    @property
    def test(self) -> tuple[Array, Array]:
        """Inputs and targets."""
        return self.experiment.test

    def batches(self, size: int | None = None) -> list[tuple[Array, Array]]:
        """The training examples in their order, so many at a time as memory is kind to."""
        x, t = self.training
        size = size or chunk_size(self.objective.network, x.shape[1:])
        starts = range(0, x.shape[0], size)
        return [(x[i : i + size, ...], t[i : i + size, ...]) for i in starts]


def fitted(
    run: TrainedRun,
    curvature: str | None = None,
    fisher: str | None = None,
    batch_size: int | None = None,
) -> FittedCurvature:
    """The curvature of a run's training data: what RUN/curvature.npz has, or else fitted now.

    A fit that was interrupted goes on. A file of other parameters (the run was resumed since) or
    of another curvature than is asked for gives way to a new one.

    Parameters
    ----------
    run : TrainedRun
    curvature : str, optional
        Of `CURVATURES`. When omitted: what is there, or else "kfac".
    fisher : str, optional
        Of `FISHERS`. When omitted: what is there, or else "exact", but "monte-carlo" for more
        than 100 outputs.
    batch_size : int, optional

    Raises
    ------
    ConfigError
        Another command is writing to the run directory.
    CheckpointError
        A file there is damaged, or no fitted curvature.
    CurvatureError
        The curvature is not defined for the network.
    """
    path = run.directory / CURVATURE
    with locked(run.directory):
        there = _read(path, run)
        kind = curvature or (there and _name_of(CURVATURES, there.curvature)) or "kfac"
        outputs = math.prod(run.objective.network.output_shape(run.training[0].shape[1:]))
        sampled = "exact" if outputs <= _MOST_EXACT else "monte-carlo"
        type_ = fisher or (there and _name_of(FISHERS, there.fisher)) or sampled
        wanted = (repr(CURVATURES[kind]), repr(FISHERS[type_]))
        if there is not None and (repr(there.curvature), there.fisher) == wanted:
            return there
        fit = fit_curvature(
            run.objective,
            run.params,
            Shown(f"fitting {kind}", run.batches(batch_size)),
            CURVATURES[kind],
            FISHERS[type_],
            rng=run.experiment.config.seed,
            resume=path.with_name(_SUMS),
        )
        fit.save(path)
    return fit


def described(run: TrainedRun, fit: FittedCurvature) -> str:
    """What was fitted, in a line."""
    kind, fisher = _name_of(CURVATURES, fit.curvature), _name_of(FISHERS, fit.fisher)
    return (
        f"{kind}, {fisher} Fisher, {fit.examples} training examples, "
        f"{run.parameters} parameters of step {run.step}, mean loss {fit.loss / fit.terms:.5g}"
    )


def _read(path: Path, run: TrainedRun) -> FittedCurvature | None:
    """The fit in a file, if there is one and it is of the run's present parameters."""
    if not path.exists():
        return None
    metadata = checkpoint.load(path)[1]
    name = _name_of(CURVATURES, metadata.get("curvature"))
    if name is None:
        raise CheckpointError(
            f"{path}: expected a fit of {listed(CURVATURES)}, got {metadata.get('curvature')}; "
            "move it elsewhere"
        )
    fit = FittedCurvature.load(path, CURVATURES[name], run.experiment.backend)
    return fit if _same(fit.params, run.params) else None


def _same(one: Tree, other: Tree) -> bool:
    a, b = (dict(trees.items(tree)) for tree in (one, other))
    return a.keys() == b.keys() and all(
        a[path].shape == b[path].shape
        and a[path].dtype == b[path].dtype
        and bool(array_namespace(b[path]).all(a[path] == b[path]))
        for path in a
    )


def _name_of(choices: Mapping[str, object], value: object) -> str | None:
    return next((name for name, one in choices.items() if str(value) == repr(one)), None)
