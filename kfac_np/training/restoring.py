"""From what a checkpoint holds to a position that a run can go on from, or a `CheckpointError`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import array_api_compat

from kfac_np import trees
from kfac_np.backend import Array, all_finite, array_namespace
from kfac_np.errors import CheckpointError, InputError, KfacError, ShapeError
from kfac_np.optimizers import Optimizer
from kfac_np.training.experiment import Experiment
from kfac_np.training.loop import Position, train
from kfac_np.trees import Tree

__all__ = ["check_position", "restore"]


def restore(
    experiment: Experiment,
    made_with: Mapping[str, str | None],
    path: Path,
    tree: Tree,
    metadata: Mapping[str, Any],
) -> Position:
    """Make a position of a checkpoint, check it, and try a step from it.

    Parameters
    ----------
    experiment : Experiment
    made_with : mapping
        "configuration" and "data": fingerprints that the checkpoint's must equal. Checkpoints of
        older versions have none.
    path : Path
        Where the run keeps it, for messages.
    tree : tree
        What `Position.to_tree` made.
    metadata : mapping
        Of the checkpoint.

    Raises
    ------
    CheckpointError
        It was made with something else, its state is none of this optimiser and network, or no
        step can be done from it.

    Examples
    --------
    >>> from kfac_np.training.config import from_table
    >>> table = {"data": "digits", "optimizer": "sgd", "run": {"steps": 2}}
    >>> experiment = Experiment.of(from_table(table))
    >>> tree = experiment.start().to_tree(experiment.optimizer)
    >>> restore(experiment, {}, Path("a.npz"), tree, {"step": 0}).step
    0
    >>> tree["optimizer"]["step"] = 1
    >>> restore(experiment, {}, Path("a.npz"), tree, {"step": 0})
    Traceback (most recent call last):
    kfac_np.errors.CheckpointError: a.npz: expected a position of step 0, got one of step 1
    """
    ours = made_with.get("configuration")
    if metadata.get("configuration", ours) != ours:
        raise CheckpointError(
            f"{path}: expected the configuration that the run began with, got another one: has "
            f"{path.parent.parent / 'config.toml'} been edited, or was it written by another "
            "version, whose defaults were others?"
        )
    ours = made_with.get("data")
    if (began_with := metadata.get("data", ours)) != ours:
        raise CheckpointError(
            f"{path}: expected the data that the run began with ({began_with}), got others "
            f"({ours}): have the files of {experiment.config.data.name} changed?"
        )
    position = Position.from_tree(tree, experiment.optimizer, str(path))
    try:
        check_position(experiment.optimizer, position, experiment.start())
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if position.step != metadata["step"]:
        raise CheckpointError(
            f"{path}: expected a position of step {metadata['step']}, got one of step "
            f"{position.step}"
        )
    if not experiment.config.run.finished(position.step, position.seconds):
        _try(experiment, position, path)
    return position


def _try(experiment: Experiment, position: Position, path: Path) -> None:
    """What else an optimiser's state must be like is known to the optimiser's step alone."""
    try:
        next(train(experiment.optimizer, experiment.supply, position))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected a position to go on from, but the next step fails "
            f"({type(error).__name__}: {error})"
        ) from error
    except KfacError:
        return  # a step that diverges, for the run to report


def check_position(optimizer: Optimizer, position: Position, first: Position) -> None:
    """Raise `InputError` unless steps may have led from the first position to this one.

    Parameters and what is like them (`State.like_params`) must have the structure, shapes and
    dtypes of the first ones; everything must be a finite number or an array of such.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import get_backend
    >>> from kfac_np.optimizers import SGD
    >>> from kfac_np.training.loop import start
    >>> from kfac_np.training.models import mlp
    >>> sgd = SGD(mlp((3, 2)))
    >>> other = Position(sgd.init((np.ones((2, 3), np.float32),)))
    >>> check_position(sgd, other, start(sgd, get_backend()))
    Traceback (most recent call last):
    kfac_np.errors.ShapeError: params.0: expected shape (2, 4) of float32, got shape (2, 3) of ...
    """
    state = position.state
    if state.checks is not None:
        raise InputError(f"checks: expected none, got {state.checks!r}")
    before = optimizer.state_to_tree(first.state)
    for name, field in optimizer.state_to_tree(state).items():
        if name in state.like_params and (field is not None or before[name] is not None):
            trees.map_named(_check_parameter, first.state.params, field, path=name)
        elif isinstance(before[name], dict) and not isinstance(field, dict):
            raise InputError(f"{name}: expected a dict, got {field!r}")
        for path, leaf in trees.items(field, name):
            _check_leaf(path, leaf)
    counts: dict[str, object] = {"step": state.step, "seconds": position.seconds}
    for name, count in counts.items():
        number = isinstance(count, int if name == "step" else int | float)
        if not number or isinstance(count, bool) or not 0 <= count < math.inf:  # type: ignore[operator]
            raise InputError(f"{name}: expected a finite number >= 0, got {count!r}")


def _check_parameter(path: str, expected: Array, got: Any) -> None:
    if not array_api_compat.is_array_api_obj(got):
        came = f"a {type(got).__name__}"
    elif (got.shape, got.dtype) != (expected.shape, expected.dtype):
        came = f"shape {tuple(got.shape)} of {got.dtype}"
    else:
        return
    raise ShapeError(
        f"{path}: expected shape {tuple(expected.shape)} of {expected.dtype}, got {came}"
    )


def _check_leaf(path: str, leaf: Any) -> None:
    if array_api_compat.is_array_api_obj(leaf):
        xp = array_namespace(leaf)
        finite = not xp.isdtype(leaf.dtype, "real floating") or all_finite(leaf)
    elif leaf is None or isinstance(leaf, int | float):
        finite = leaf is None or math.isfinite(leaf)
    else:
        raise InputError(f"{path}: expected a number or an array, got {leaf!r}")
    if not finite:
        raise InputError(f"{path}: expected finite values, got NaN or Inf")
