"""What ends a run, what does not, and what is saved then."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import KFAC, arrays_of, assert_same_run, experiment, without_seconds
from waiting import asynchronous

from kfac_np.errors import DivergenceError
from kfac_np.training import checkpoint
from kfac_np.training.experiment import Experiment
from kfac_np.training.loop import Position, Step, advance
from kfac_np.training.records import RecordFile, read_records
from kfac_np.training.run import Observer, run

# The loss of the second position is inf; the first update is.
WILD: dict[str, dict[str, Any]] = {
    "loss": {
        "model": {"sizes": [8], "loss": "squared-error"},
        "optimizer": {"name": "sgd", "rate": 10.0, "momentum": 0.0},
    },
    "update": {"optimizer": {"name": "sgd", "rate": 1e38, "momentum": 0.0}},
}


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("name", WILD)
def test_only_positions_with_a_finite_loss_are_saved(
    tmp_path: Path, name: str, ahead: bool
) -> None:
    changes = {**WILD[name], "run": {"steps": 30, "checkpoint_every": 1}}
    changes |= {"backend": {"name": "array_api_strict"}} if ahead else {}
    one = experiment(**changes)
    for resume in (False, True):
        device = asynchronous() if ahead else nullcontext()
        with device, pytest.raises(DivergenceError) as info:
            run(one, tmp_path, resume=resume)
        assert "last good position" in info.value.__notes__[0]
        path, tree, _ = checkpoint.load_latest(tmp_path / "checkpoints", backend=one.backend)
        position = Position.from_tree(tree, one.optimizer)
        assert math.isfinite(one.loss_at(position))
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert (summary["status"], summary["steps"]) == ("failed", position.step)
        assert path.name == f"step-{position.step:012d}.npz"
    # It was the last good one: the next step fails, or leads to a bad one.
    with np.errstate(all="ignore"), suppress(DivergenceError):
        after = advance(one.optimizer, one.supply, position).position
        assert not math.isfinite(one.loss_at(after))


def test_a_last_position_without_a_finite_loss_is_no_success(tmp_path: Path) -> None:
    one = experiment(**{**WILD["loss"], "run": {"steps": 2}})
    with pytest.raises(DivergenceError, match=r"step 2: the loss is (inf|nan) at the parameters"):
        run(one, tmp_path)
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "checkpoints")] == [
        "step-000000000001.npz"
    ]


def test_a_position_that_the_next_step_may_undo_is_passed_over(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints do not change what a run does: the next good position is saved instead."""
    loss_at = Experiment.loss_at

    def bad(one: Experiment, position: Position) -> float:
        return math.inf if position.step in (18, 19) else loss_at(one, position)

    monkeypatch.setattr(Experiment, "loss_at", bad)
    run(experiment(), tmp_path)
    saved = [int(p.stem[5:]) for p in checkpoint.checkpoints(tmp_path / "checkpoints")]
    assert saved == [20, 23]
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("where", ["stepped", "evaluated", "should_stop"])
@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_run_saves_first(
    whole_run: Path, tmp_path: Path, kind: type[BaseException], where: str
) -> None:
    calls = iter(range(100))

    def end(*_: object) -> bool:
        if next(calls) == 4:
            raise kind("the end")
        return False

    with pytest.raises(kind, match="the end"):
        run(experiment(), tmp_path, observer=Observer(**{where: end}))
    last = len(read_records(tmp_path / "metrics.jsonl"))
    assert checkpoint.load_latest(tmp_path / "checkpoints")[2]["step"] == last > 4
    run(experiment(), tmp_path, resume=True)
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_removed_during_a_run_is_an_error(tmp_path: Path, replaced: bool) -> None:
    place = tmp_path / "run"

    def remove(step: Step) -> None:
        if step.report.step == 3:
            shutil.rmtree(place)
            if replaced:
                place.mkdir()

    with pytest.raises(FileNotFoundError, match=r"has been removed or replaced: '.*run'"):
        run(experiment(), place, observer=Observer(stepped=remove))
    assert place.exists() == replaced
    assert not list(place.rglob("*"))


@pytest.mark.parametrize("part", ["records", "checkpoints"])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_full_disk_does_not_end_a_run(
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    lasting: bool,
) -> None:
    """It goes on and tries again; what cannot be written at the end is an error, which is said."""
    steps, told = [], []

    def full(*arguments: Any, **options: Any) -> Any:
        if steps and steps[-1] >= 3 and (lasting or steps[-1] < 16):
            raise OSError(28, "full", "x")
        return write(*arguments, **options)

    target, name = (RecordFile, "flush") if part == "records" else (checkpoint, "save_step")
    write = getattr(target, name)
    monkeypatch.setattr(target, name, full)
    watch = Observer(stepped=lambda s: steps.append(s.report.step), troubled=told.append)
    with pytest.raises(OSError, match="full") if lasting else nullcontext():
        run(experiment(), tmp_path, observer=watch)
    assert steps == list(range(1, 24))
    assert 1 <= len(told) <= 16
    monkeypatch.undo()
    if not lasting:
        assert_same_run(tmp_path, whole_run)
        return
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    _, summary = run(experiment(), tmp_path, resume=True)
    assert (summary["status"], summary["steps"]) == ("finished", 23)
    assert arrays_of(tmp_path) == arrays_of(whole_run)


def test_a_run_that_was_to_do_nothing_yet_is_evaluated_once(tmp_path: Path) -> None:
    run(experiment(run={"steps": 0}), tmp_path)
    run(experiment(run={"steps": 2}), tmp_path, resume=True)
    assert [r["step"] for r in read_records(tmp_path / "evaluations.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("name", ["kfac", "sgd"])
def test_a_device_that_works_ahead_is_waited_for_where_it_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Records come a step late, and are the same."""
    waits = []
    monkeypatch.setattr("kfac_np.training.loop._wait_for", waits.append)
    one = experiment(
        optimizer=KFAC if name == "kfac" else "sgd",
        backend={"name": "array_api_strict", "dtype": "float64"},
        run={"steps": 12, "evaluations": 2, "checkpoint_every": 4},
    )
    run(one, tmp_path / "plain")
    waits.clear()
    with asynchronous():
        run(one, tmp_path / "ahead")
    assert len(waits) == 4  # 4, 6, 8, 12
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        assert without_seconds(tmp_path / "ahead" / file) == without_seconds(
            tmp_path / "plain" / file
        )
