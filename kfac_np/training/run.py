"""A training run with its directory: configuration, records, checkpoints, summary, pictures.

Nothing in the directory is ever half-written, and a run that was killed at any moment goes on
from its last checkpoint to the same numbers as if it had not been.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from kfac_np.backend.numpy_kernels.threads import limited
from kfac_np.errors import ConfigError
from kfac_np.training.config import Config, from_table, read_table
from kfac_np.training.experiment import Experiment
from kfac_np.training.lock import LOCK, locked
from kfac_np.training.loop import Position, advance, completed
from kfac_np.training.observer import Observer
from kfac_np.training.recorder import CHECKPOINTS, CONFIG, SUMMARY, Recorder

__all__ = ["CHECKPOINTS", "CONFIG", "SUMMARY", "Observer", "new_directory", "read_config", "run"]


def run(
    experiment: Experiment,
    directory: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    fall_back: bool = False,
    observer: Observer | None = None,
) -> tuple[Position, dict[str, Any]]:
    """Train until the budget is used up.

    Parameters
    ----------
    experiment : Experiment
    directory : path, optional
        Run directory (see `new_directory`), resolved once; nothing is written without.
    resume : bool
        Go on from the directory's newest checkpoint; from the beginning if there is none yet.
    fall_back : bool
        When the newest checkpoint cannot be read or gone on from, go on from the one before.
    observer : Observer, optional

    Returns
    -------
    position : Position
        The last one.
    summary : dict
        As in summary.json.

    Raises
    ------
    KfacError
        A step failed: the loss diverged, for example. Whatever ends a run, an interrupt too, the
        last position at which a finite loss was seen has a checkpoint.
    OSError
        The directory has been removed, or at the end something could not be written to it.
    ConfigError
        Another run is writing to the directory.
    CheckpointError
        On resuming: the checkpoint is damaged, or of another configuration (the budget, steps
        and seconds, may change) or other data.

    Examples
    --------
    >>> table = {"data": {"name": "digits"}, "model": {"sizes": [8]}, "run": {"steps": 2}}
    >>> position, summary = run(Experiment.of(from_table(table)))
    >>> summary["status"], summary["steps"]
    ('finished', 2)
    """
    observer = observer or Observer()
    place = None if directory is None else _resolved(directory)
    alone = contextlib.nullcontext(_no_directory) if place is None else locked(place)
    # What overflows is found and reported as a divergence: NumPy's warnings would say less.
    quietly = np.errstate(over="ignore", invalid="ignore", divide="ignore")
    with alone as require, quietly, limited(experiment.config.run.threads):
        recorder = Recorder(experiment, place, require, observer)
        trail = [recorder.resume(fall_back) if resume else recorder.begin()]
        try:
            status = _train(experiment, recorder, trail)
            return trail[-1], recorder.finish(trail[-1], status)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            _rescue(recorder, trail, error)
            raise


def _train(experiment: Experiment, recorder: Recorder, trail: list[Position]) -> str:
    """Do the steps; `trail` keeps the last positions, so many that one of them is good."""
    settings, observer = experiment.config.run, recorder.observer
    if recorder.lacks_evaluation(trail[-1]):
        observer.evaluated(recorder.evaluate(trail[-1]))
    while not settings.finished(trail[-1].step, trail[-1].seconds):
        before = (trail[-1].step, trail[-1].seconds)
        step = advance(experiment.optimizer, experiment.supply, trail[-1])
        after = (step.position.step, step.position.seconds)
        evaluates = settings.evaluation_due(before, after)
        saves = recorder.owed or settings.checkpoint_due(step.position.step)
        if evaluates or saves or settings.finished(*after):
            step = completed(step)  # elsewhere nobody waits for an asynchronous device
        position = step.position
        trail.append(position)
        recorder.record(step)
        del trail[: -3 if step.under_way else -2]
        if evaluates:
            observer.evaluated(recorder.evaluate(position))
        if saves:
            recorder.try_to_save(position)
        if observer.should_stop() and not settings.finished(position.step, position.seconds):
            trail[-1] = completed(step).position
            return "interrupted"
    return "finished"


def _rescue(recorder: Recorder, trail: list[Position], failure: BaseException) -> None:
    """Save the last good position of a run that fails, and say where that is."""
    good = recorder.newest_good(trail)
    if good is not None and recorder.directory is not None:
        try:
            recorder.catch_up(until=good)
            recorder.save(good)
            failure.add_note(f"the last good position, that of step {good.step}, is saved")
        except OSError as error:
            if str(error) != str(failure):
                failure.add_note(f"the last good position could not be saved: {error}")
    if isinstance(failure, Exception):  # of an interrupt nobody waits for an evaluation
        with contextlib.suppress(Exception):
            recorder.summarise(good or trail[0], "failed", failure)


def _no_directory() -> None:
    """There is nothing that could be removed."""


def _resolved(directory: str | os.PathLike[str]) -> Path:
    """The directory that a path leads to now, whatever becomes of links and of where we are."""
    try:
        return Path(directory).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise _unusable(directory, error) from error


def _unusable(directory: str | os.PathLike[str], error: Exception) -> ConfigError:
    return ConfigError(f"{directory}: cannot be used as a run directory ({error})")


def new_directory(directory: str | os.PathLike[str]) -> Path | None:
    """Make room for a new run: an older run there is moved aside, never written over.

    Returns
    -------
    Path or None
        Where the older run is now.

    Raises
    ------
    ConfigError
        The directory holds something else, cannot be made, or another run is writing to it.

    Examples
    --------
    >>> import tempfile
    >>> from kfac_np.training.config import write
    >>> with tempfile.TemporaryDirectory() as place:
    ...     write(f"{place}/run/config.toml", {"seed": 0})
    ...     new_directory(f"{place}/run").name, sorted(p.name for p in Path(place).iterdir())
    ('run.1', ['run', 'run.1'])
    """
    place = _resolved(directory)
    try:
        if place.exists() and not place.is_dir():
            raise ConfigError(f"{directory}: expected a directory, found a file")
        left = {LOCK, f".{CONFIG}.part"}  # by a run that was killed at once
        if not place.is_dir() or {p.name for p in place.iterdir()} <= left:
            place.mkdir(parents=True, exist_ok=True)
            return None
        if not (place / CONFIG).exists():
            raise ConfigError(
                f"{directory}: expected a new or empty directory or an older run, found other files"
            )
        with locked(place):
            names = (f"{place.name}.{number}" for number in itertools.count(1))
            old = next(p for p in map(place.with_name, names) if not p.exists())
            old.mkdir()
            # What is in it moves, and not the directory: somebody may be in it. What makes it a
            # run moves last, so that the rest of one that moved by half is moved aside, too.
            for path in sorted(place.iterdir(), key=lambda path: path.name == CONFIG):
                if path.name != LOCK:
                    path.rename(old / path.name)
    except OSError as error:
        raise _unusable(directory, error) from error
    return old


def read_config(directory: str | os.PathLike[str]) -> Config:
    """Read the configuration of a run directory.

    Raises
    ------
    ConfigError
        It is not a run directory, or its configuration has been damaged.

    Examples
    --------
    >>> read_config("no/such/run")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: no/such/run: expected a run directory, found no such directory
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        found = f"no {CONFIG} in it" if Path(directory).is_dir() else "no such directory"
        raise ConfigError(f"{directory}: expected a run directory, found {found}")
    table = read_table(path)
    if "compare" in table:
        raise ConfigError(
            f"{directory}: expected the directory of one run, found a comparison; "
            f"use {directory}/NAME, or compare --resume"
        )
    return from_table(table)
