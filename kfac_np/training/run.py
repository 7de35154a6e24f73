"""A training run with its directory: configuration, records, checkpoints, summary, pictures.

Nothing in the directory is ever half-written, and a run that was killed at any moment goes on
from its last checkpoint to the same numbers as if it had not been.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np

from kfac_np.backend.threads import limited
from kfac_np.errors import CheckpointError, ConfigError, KfacError
from kfac_np.training import checkpoint
from kfac_np.training.config import (
    Config,
    fingerprint,
    from_table,
    read_table,
    to_table,
    write,
)
from kfac_np.training.experiment import Experiment
from kfac_np.training.files import write_text
from kfac_np.training.lock import LOCK, locked
from kfac_np.training.loop import Position, Step, train
from kfac_np.training.records import append_record, cut_after, read_records, sync, to_json
from kfac_np.training.restoring import restore

__all__ = ["Observer", "new_directory", "read_config", "run"]

CONFIG, METRICS, EVALUATIONS = "config.toml", "metrics.jsonl", "evaluations.jsonl"
CHECKPOINTS, SUMMARY = "checkpoints", "summary.json"


def _nothing(_: Any) -> None:
    """Watch, and do nothing."""


def _never() -> bool:
    """Go on to the end."""
    return False


@final
@dataclass(frozen=True)
class Observer:
    """What to call while a run goes on.

    Attributes
    ----------
    stepped : callable
        Gets each `Step`.
    evaluated : callable
        Gets each record of an evaluation.
    should_stop : callable
        Asked after each step; when it says so, the run saves a checkpoint and ends.

    Examples
    --------
    >>> Observer().should_stop()
    False
    """

    stepped: Callable[[Step], None] = _nothing
    evaluated: Callable[[Mapping[str, Any]], None] = _nothing
    should_stop: Callable[[], bool] = _never


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
        Run directory (see `new_directory`); nothing is written without.
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
        A step failed: the loss diverged, for example. The last good position has a checkpoint,
        and the summary says what happened.
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
    recorder = _Recorder(experiment, None if directory is None else Path(directory))
    alone = contextlib.nullcontext() if directory is None else locked(directory)
    # What overflows is found and reported as a divergence: NumPy's warnings would say less.
    quietly = np.errstate(over="ignore", invalid="ignore", divide="ignore")
    with alone, quietly, limited(experiment.config.run.threads):
        return _run(experiment, recorder, resume, fall_back, observer or Observer())


def _run(
    experiment: Experiment, recorder: _Recorder, resume: bool, fall_back: bool, observer: Observer
) -> tuple[Position, dict[str, Any]]:
    position = recorder.resume(fall_back) if resume else recorder.begin()
    if position.step == 0:
        observer.evaluated(recorder.evaluate(position))
    settings = experiment.config.run
    status, failure = "finished", None
    steps = train(experiment.optimizer, experiment.supply, position)
    try:
        while not settings.finished(position.step, position.seconds):
            step = next(steps)
            before, position = (position.step, position.seconds), step.position
            recorder.record(step)
            observer.stepped(step)
            if settings.evaluation_due(before, (position.step, position.seconds)):
                observer.evaluated(recorder.evaluate(position))
            every = settings.checkpoint_every
            if every and position.step % every == 0:
                recorder.save(position)
            if observer.should_stop():
                status = "interrupted"
                break
    except KfacError as error:
        status, failure = "failed", error
    summary = recorder.finish(position, status, failure)
    if failure is not None:
        raise failure
    return position, summary


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
    >>> with tempfile.TemporaryDirectory() as place:
    ...     write(f"{place}/run/config.toml", {"seed": 0})
    ...     new_directory(f"{place}/run").name, sorted(p.name for p in Path(place).iterdir())
    ('run.1', ['run', 'run.1'])
    """
    directory = Path(directory)
    try:
        old = None
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"{directory}: expected a directory, found a file")
        if directory.is_dir() and any(p.name != LOCK for p in directory.iterdir()):
            if not (directory / CONFIG).exists():
                raise ConfigError(
                    f"{directory}: expected a new or empty directory or an older run, found "
                    "other files"
                )
            names = (f"{directory.name}.{number}" for number in itertools.count(1))
            with locked(directory):
                old = next(p for p in map(directory.with_name, names) if not p.exists())
                directory.rename(old)
                (old / LOCK).unlink(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be used as a run directory ({error})") from error
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
    if not path.exists():
        found = f"no {CONFIG} in it" if Path(directory).is_dir() else "no such directory"
        raise ConfigError(f"{directory}: expected a run directory, found {found}")
    table = read_table(path)
    if "compare" in table:
        raise ConfigError(
            f"{directory}: expected the directory of one run, found a comparison; "
            f"use {directory}/NAME, or compare --resume"
        )
    return from_table(table)


@final
class _Recorder:
    """Keeps the run directory, if there is one, and evaluates."""

    def __init__(self, experiment: Experiment, directory: Path | None) -> None:
        self.experiment = experiment
        self.directory = directory
        self.made_with = {
            "configuration": fingerprint(experiment.config),
            "data": None if directory is None else experiment.dataset.fingerprint(),
        }
        self.last_evaluation: dict[str, Any] | None = None
        self.last_saved: int | None = None

    def begin(self) -> Position:
        if self.directory is not None:
            write(self.directory / CONFIG, to_table(self.experiment.config))
            for name in (METRICS, EVALUATIONS):
                cut_after(self.directory / name, -1)
        return self.experiment.start()

    def resume(self, fall_back: bool) -> Position:
        """Go back to the last checkpoint, and cut off the records of what came after it."""
        if self.directory is None:
            raise ConfigError("resume: expected a run directory, got none")
        if checkpoint.latest(self.directory / CHECKPOINTS) is None:
            return self.begin()  # killed before the first checkpoint
        path, position, _ = checkpoint.load_latest(
            self.directory / CHECKPOINTS,
            fall_back,
            self.experiment.backend,
            partial(restore, self.experiment, self.made_with),
        )
        write(self.directory / CONFIG, to_table(self.experiment.config))
        steps = [r["step"] for r in read_records(self.directory / METRICS, position.step)]
        if steps[: position.step] != list(range(1, position.step + 1)):
            raise CheckpointError(
                f"{self.directory / METRICS}: expected a record of each step up to "
                f"{position.step}, where {path.name} is"
            )
        for name in (METRICS, EVALUATIONS):
            cut_after(self.directory / name, position.step)
        for later in checkpoint.checkpoints(self.directory / CHECKPOINTS):
            if later > path:  # damaged, or else it would have been loaded
                later.unlink()
        evaluations = read_records(self.directory / EVALUATIONS)
        if evaluations and evaluations[-1]["step"] == position.step:
            self.last_evaluation = evaluations[-1]
        self.last_saved = position.step
        return position

    def record(self, step: Step) -> None:
        if self.directory is not None:
            append_record(self.directory / METRICS, step.record())

    def evaluate(self, position: Position) -> dict[str, Any]:
        record: dict[str, Any] = {"step": position.step, "seconds": position.seconds}
        for name, params in position.parameters.items():
            record[name] = self.experiment.evaluate(params).as_dict()
        self.last_evaluation = record
        if self.directory is not None:
            append_record(self.directory / EVALUATIONS, record)
        return record

    def save(self, position: Position) -> None:
        if self.directory is None or self.last_saved == position.step:
            return
        for name in (METRICS, EVALUATIONS):
            sync(self.directory / name)
        checkpoint.save_step(
            self.directory / CHECKPOINTS,
            position.step,
            position.to_tree(self.experiment.optimizer),
            {"seconds": position.seconds, **self.made_with},
            keep=self.experiment.config.run.keep_checkpoints,
        )
        self.last_saved = position.step

    def finish(self, position: Position, status: str, failure: Exception | None) -> dict[str, Any]:
        evaluation = self.last_evaluation
        if evaluation is None or evaluation["step"] != position.step:
            evaluation = self.evaluate(position)
        self.save(position)
        summary = self._summary(position, evaluation)
        summary = {"status": status, **({"error": str(failure)} if failure else {}), **summary}
        if self.directory is not None:
            write_text(self.directory / SUMMARY, to_json(summary, indent=2) + "\n")
        return summary

    def _summary(self, position: Position, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """Headline figures are of the parameters, current or averaged, with less training loss."""
        names = list(position.parameters)
        best = min(names, key=lambda n: _or_infinity(evaluation[n]["loss"]))
        train, test = evaluation[best], self.experiment.evaluate_test(position.parameters[best])
        figures = {f"training_{k}" if k != "reconstruction_error" else k: train[k] for k in train}
        return {
            "steps": position.step,
            "seconds": position.seconds,
            **figures,
            "parameters": best,
            "training": {name: evaluation[name] for name in names},
            "test": test.as_dict(),
            "training_examples_evaluated": self.experiment.evaluation_examples,
        }


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss
