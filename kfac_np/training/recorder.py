"""What a run leaves in its directory: records, evaluations, checkpoints, a summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

from kfac_np.errors import CheckpointError, ConfigError, DivergenceError, KfacError
from kfac_np.training import checkpoint
from kfac_np.training.config import fingerprint, to_table, write
from kfac_np.training.experiment import Experiment
from kfac_np.training.files import write_text
from kfac_np.training.loop import Position, Step
from kfac_np.training.observer import Observer
from kfac_np.training.records import (
    RecordFile,
    cut_after,
    read_evaluations,
    read_records,
    to_json,
)
from kfac_np.training.restoring import restore

__all__ = ["CHECKPOINTS", "CONFIG", "SUMMARY", "Recorder"]

CONFIG, METRICS, EVALUATIONS = "config.toml", "metrics.jsonl", "evaluations.jsonl"
CHECKPOINTS, SUMMARY = "checkpoints", "summary.json"


@final
class Recorder:
    """Keeps the run directory, if there is one, evaluates, and tells good positions from bad.

    A position is good when the loss that its next step finds is finite. Only such are saved.

    Parameters
    ----------
    experiment : Experiment
    directory : Path or None
        Absolute.
    require : callable
        Raises an error if the directory is no longer there (`kfac_np.training.lock.locked`).
    observer : Observer

    Attributes
    ----------
    owed : bool
        Whether a checkpoint was due, but the position was not good.

    Examples
    --------
    >>> from kfac_np.training.config import from_table
    >>> table = {"data": "digits", "model": {"sizes": [8]}, "run": {"steps": 2}}
    >>> recorder = Recorder(Experiment.of(from_table(table)), None, lambda: None, Observer())
    >>> position = recorder.begin()
    >>> recorder.newest_good([position]) is position
    True
    """

    def __init__(
        self,
        experiment: Experiment,
        directory: Path | None,
        require: Callable[[], None],
        observer: Observer,
    ) -> None:
        self.experiment = experiment
        self.directory = directory
        self.observer = observer
        self._require = require
        self._made_with = {
            "configuration": fingerprint(experiment.config),
            "data": None if directory is None else experiment.dataset.fingerprint(),
        }
        self._files: list[RecordFile] = []
        self._late: Step | None = None
        self._evaluated: tuple[int, float] | None = None  # step and seconds
        self._first: float | None = None  # training loss at the start
        self._evaluation: dict[str, Any] | None = None
        self.owed = False
        self._gaps = False  # whether records are missing for good
        self._saved = -1
        self._good = -1

    def begin(self) -> Position:
        """Start from the beginning."""
        if self.directory is not None:
            write(self.directory / CONFIG, to_table(self.experiment.config))
            for name in (METRICS, EVALUATIONS):
                cut_after(self.directory / name, -1)
                self._files.append(RecordFile(self.directory / name))
        return self.experiment.start()

    def resume(self, fall_back: bool) -> Position:
        """Go back to the last checkpoint, and cut off the records of what came after it."""
        if self.directory is None:
            raise ConfigError("resume: expected a run directory, got none")
        if checkpoint.latest(self.directory / CHECKPOINTS) is None:
            return self.begin()  # killed before the first checkpoint
        path, position, metadata = checkpoint.load_latest(
            self.directory / CHECKPOINTS,
            fall_back,
            self.experiment.backend,
            partial(restore, self.experiment, self._made_with),
        )
        metrics, evaluations = self.directory / METRICS, self.directory / EVALUATIONS
        steps = [r["step"] for r in read_records(metrics, position.step)]
        self._gaps = metadata.get("gaps") is True
        if not self._gaps and steps[: position.step] != list(range(1, position.step + 1)):
            raise CheckpointError(
                f"{metrics}: expected a record of each step up to {position.step}, where "
                f"{path.name} is"
            )
        evaluated = read_evaluations(evaluations, position.step)
        write(self.directory / CONFIG, to_table(self.experiment.config))
        for name in (METRICS, EVALUATIONS):
            cut_after(self.directory / name, position.step)
        for later in checkpoint.checkpoints(self.directory / CHECKPOINTS):
            if later > path:  # damaged, or else it would have been loaded
                later.unlink()
        last = -1
        if evaluated:
            self._first, last = evaluated[0]["current"]["loss"], evaluated[-1]["step"]
            self._evaluated = (last, evaluated[-1]["seconds"])
        self._files = [RecordFile(metrics, position.step), RecordFile(evaluations, last)]
        if last == position.step and position.parameters.keys() <= evaluated[-1].keys():
            self._evaluation = evaluated[-1]
        self._saved = self._good = position.step
        return position

    def record(self, step: Step) -> None:
        """Write down a step: at once, or when the next is under way and its numbers are there."""
        self.catch_up()
        self._late = step
        if not step.under_way:
            self.catch_up()

    def catch_up(self, until: Position | None = None) -> None:
        """Write down the last step, if it has not been; not if it is after `until`."""
        step = self._late
        if step is None or (until is not None and step.position.step > until.step):
            return
        self._append(0, step.record())
        self._late = None
        if math.isfinite(step.report.loss):  # that was where the step began
            self._good = max(self._good, step.position.step - 1)
        self.observer.stepped(step)

    def evaluate(self, position: Position, keep: bool = True) -> dict[str, Any]:
        """Evaluate a position, unless that was done last; it is written down only with `keep`."""
        record = self._evaluation
        if record is None or record["step"] != position.step:
            record = {"step": position.step, "seconds": position.seconds}
            for name, params in position.parameters.items():
                record[name] = self.experiment.evaluate(params).as_dict()
            self._evaluation = record
            if position.step == 0:
                self._first = record["current"]["loss"]
        if keep:
            self._append(1, record)
            self._evaluated = (position.step, position.seconds)
        return record

    def lacks_evaluation(self, position: Position) -> bool:
        """Tell whether a run that begins or goes on here is to evaluate first."""
        now = (position.step, position.seconds)
        due = self.experiment.config.run.evaluation_due
        return self._evaluated is None or due(self._evaluated, now)

    def _append(self, index: int, record: Mapping[str, Any]) -> None:
        if self.directory is not None:
            self._require()
            if (error := self._files[index].append(record)) is not None:
                self.observer.troubled(error)

    def require_good(self, position: Position, evaluated: bool = False) -> None:
        """Raise `DivergenceError` unless a position is good; with `evaluated`, by that, too."""
        loss, step = 0.0, position.step
        if step > self._good:
            loss = self.experiment.loss_at(position)
        if math.isfinite(loss) and evaluated:
            found = self._evaluation
            if found is not None and found["step"] == step:
                loss = _or_infinity(found["current"]["loss"])
        if not math.isfinite(loss):
            raise DivergenceError(
                f"step {step}: the loss is {loss:g} at the parameters that it led to, which are "
                "not saved. Use a smaller learning rate or more damping"
            )
        self._good = max(self._good, step)

    def newest_good(self, positions: Sequence[Position]) -> Position | None:
        """Return the last of some positions that is good, if there is one."""
        for position in reversed(positions):
            try:
                position.state.wait()
                self.require_good(position, evaluated=True)
            except Exception:  # whatever it is: a run could not go on from there
                continue
            return position
        return None

    def save(self, position: Position) -> None:
        """Save a checkpoint, if it is good and not there yet, behind all records up to it.

        Where these cannot be written, the checkpoint says that there are gaps.

        Raises
        ------
        DivergenceError
            It is not good.
        OSError
            It cannot be written.
        """
        if self.directory is None or position.step <= self._saved:
            return
        self.require_good(position)
        self._require()
        for file in self._files:
            try:
                file.flush(durably=True)
            except OSError as error:
                self.observer.troubled(error)
        gaps = self._gaps or not self._files[0].complete
        checkpoint.save_step(
            self.directory / CHECKPOINTS,
            position.step,
            position.to_tree(self.experiment.optimizer),
            {
                "seconds": position.seconds,
                **self._made_with,
                **({"gaps": True} if gaps else {}),
            },
            keep=self.experiment.config.run.keep_checkpoints,
        )
        self._saved = position.step

    def try_to_save(self, position: Position) -> None:
        """Save a checkpoint; what prevents it does not end the run.

        A full disk is told. A position that is not good is for the next step to undo or to fail
        at; until one is saved, a checkpoint is `owed`.
        """
        try:
            self.owed = True
            self.save(position)
            self.owed = False
        except OSError as error:
            self._require()
            self.owed = False  # when the next one is due, the disk may have room
            self.observer.troubled(error)
        except KfacError:
            return

    def finish(self, position: Position, status: str) -> dict[str, Any]:
        """Evaluate and save the last position, and sum up.

        Raises
        ------
        DivergenceError
            It is not good.
        OSError
            Something cannot be written.
        """
        self.catch_up()
        self.require_good(position)
        # A run that was stopped has no evaluation that it would not have if it had gone on.
        self.evaluate(position, keep=status == "finished")
        self.require_good(position, evaluated=True)
        self.save(position)
        summary = self.summarise(position, status)
        for file in self._files:
            file.flush()
        return summary

    def summarise(
        self, position: Position, status: str, failure: BaseException | None = None
    ) -> dict[str, Any]:
        """Write the summary of a run that ends at a position."""
        evaluation = self.evaluate(position, keep=False)
        failed = {} if failure is None else {"error": str(failure) or type(failure).__name__}
        summary = {"status": status, **failed, **self._figures(position, evaluation)}
        if self.directory is not None:
            self._require()
            write_text(self.directory / SUMMARY, to_json(summary, indent=2) + "\n")
        return summary

    def _figures(self, position: Position, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """Headline figures are of the parameters, current or averaged, with less training loss."""
        names = list(position.parameters)
        best = min(names, key=lambda n: _or_infinity(evaluation[n]["loss"]))
        train, test = evaluation[best], self.experiment.evaluate_test(position.parameters[best])
        figures = {f"training_{k}" if k != "reconstruction_error" else k: train[k] for k in train}
        return {
            "steps": position.step,
            "seconds": position.seconds,
            **figures,
            "training_loss_at_start": self._first,
            "parameters": best,
            "training": {name: evaluation[name] for name in names},
            "test": test.as_dict(),
            "training_examples_evaluated": self.experiment.evaluation_examples,
        }


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss
