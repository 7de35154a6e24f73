"""Run directories: what they hold, and that an interrupted run goes on to the same numbers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import KFAC, assert_same_run, experiment, table

from kfac_np import trees
from kfac_np.backend.numpy_kernels import threads
from kfac_np.errors import CheckpointError, ConfigError, DivergenceError
from kfac_np.training import checkpoint
from kfac_np.training.config import from_table
from kfac_np.training.experiment import Experiment
from kfac_np.training.lock import locked
from kfac_np.training.loop import Position, Step
from kfac_np.training.records import read_records
from kfac_np.training.run import Observer, new_directory, read_config, run


class Killed(BaseException):
    """Not an error that anybody handles."""


def killed_after(step: int) -> Observer:
    def stepped(done: Step) -> None:
        if done.report.step == step:
            raise Killed

    return Observer(stepped=stepped)


def test_a_run_directory_holds_everything(whole_run: Path) -> None:
    metrics = read_records(whole_run / "metrics.jsonl")
    assert [r["step"] for r in metrics] == list(range(1, 24))
    assert {"seconds", "loss", "damping", "gamma", "alpha", "mu", "rho", "refreshed", "events"} <= (
        metrics[0].keys()
    )
    assert sorted(r["seconds"] for r in metrics) == [r["seconds"] for r in metrics]
    evaluations = read_records(whole_run / "evaluations.jsonl")
    assert [r["step"] for r in evaluations] == [0, 5, 10, 14, 19, 23]
    assert evaluations[-1]["averaged"].keys() == {"loss", "reconstruction_error"}
    saved = [int(p.stem[5:]) for p in checkpoint.checkpoints(whole_run / "checkpoints")]
    assert saved == [18, 23]
    summary = json.loads((whole_run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 23)
    assert summary["training_loss"] == min(
        evaluations[-1][kind]["loss"] for kind in ("current", "averaged")
    )
    assert summary["training_loss"] < evaluations[0]["current"]["loss"]
    assert read_config(whole_run) == experiment().config


def test_the_written_configuration_suffices_to_rerun(whole_run: Path, tmp_path: Path) -> None:
    run(Experiment.of(read_config(whole_run)), tmp_path)
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("step", [1, 5, 6, 7, 12, 17, 22, 23])
def test_killed_and_resumed_is_the_same_run(whole_run: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(Killed):
        run(experiment(), tmp_path, observer=killed_after(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # the line that was being written
    run(Experiment.of(read_config(tmp_path)), tmp_path, resume=True)
    assert_same_run(tmp_path, whole_run)


def test_killed_again_and_again(whole_run: Path, tmp_path: Path) -> None:
    for k, step in enumerate((3, 8, 9, 20)):
        with pytest.raises(Killed):
            run(experiment(), tmp_path, resume=k > 0, observer=killed_after(step))
    run(experiment(), tmp_path, resume=True)
    assert_same_run(tmp_path, whole_run)


def test_seconds_continue_from_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(experiment(), tmp_path, observer=killed_after(14))
    saved = checkpoint.load_latest(tmp_path / "checkpoints")[1]["seconds"]
    run(experiment(), tmp_path, resume=True)
    seconds = [r["seconds"] for r in read_records(tmp_path / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert seconds[11] == saved < seconds[12]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_other_optimisers_resume_too(tmp_path: Path, name: str) -> None:
    optimizer = {"name": name, "averaging": {"decay": 0.9}}
    run(experiment(optimizer=optimizer), tmp_path / "whole")
    with pytest.raises(Killed):
        run(experiment(optimizer=optimizer), tmp_path / "cut", observer=killed_after(10))
    run(experiment(optimizer=optimizer), tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("backend", ["torch", "array_api_strict"])
def test_other_backends_resume_too(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    changes = {"backend": {"name": backend}, "run": {"steps": 9, "checkpoint_every": 4}}
    run(experiment(**changes), tmp_path / "whole")
    with pytest.raises(Killed):
        run(experiment(**changes), tmp_path / "cut", observer=killed_after(6))
    run(experiment(**changes), tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


IMAGE_MODELS: dict[str, dict[str, Any]] = {
    "dropout": {"name": "convnet", "channels": [2, 2], "hidden": [5], "dropout": 0.3},
    "batch": {"name": "resnet", "widths": [2, 3], "normalization": "batch"},
    "group": {"name": "resnet", "widths": [4], "normalization": "group"},
}


@pytest.mark.parametrize("optimizer", ["kfac", "adam"])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_networks_for_images_resume_too(tmp_path: Path, name: str, optimizer: str) -> None:
    changes: dict[str, Any] = {
        "model": IMAGE_MODELS[name],
        "optimizer": KFAC if optimizer == "kfac" else {"name": "adam", "rate": 0.01},
        "run": {"steps": 9, "checkpoint_every": 4, "evaluations": 3},
    }
    run(experiment(**changes), tmp_path / "whole")
    with pytest.raises(Killed):
        run(experiment(**changes), tmp_path / "cut", observer=killed_after(6))
    run(Experiment.of(read_config(tmp_path / "cut")), tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_batch_statistics_are_those_of_the_same_examples_whatever_is_evaluated() -> None:
    one = experiment(
        model=IMAGE_MODELS["batch"],
        run={"steps": 1, "statistics_examples": 50, "evaluation_examples": 50},
    )
    params = one.start().state.params
    objective = one.optimizer.objective
    x, t = one.supply.x[:50], one.supply.t[:50]
    assert one.evaluate(params).loss == pytest.approx(objective.value(params, x, t), rel=1e-5)
    z, _ = one.frozen(params).network.forward(params, one.test[0])
    correct = np.mean(z.argmax(axis=1) == one.test[1])
    assert one.evaluate_test(params).accuracy == pytest.approx(float(correct))
    other = experiment(model=IMAGE_MODELS["batch"], run={"steps": 1, "statistics_examples": 60})
    assert other.evaluate_test(params) != one.evaluate_test(params)
    plain = experiment(model={"name": "mlp", "sizes": [3]})
    assert plain.frozen(plain.start().state.params) is plain.optimizer.objective


def test_an_interrupted_run_saves_and_goes_on(whole_run: Path, tmp_path: Path) -> None:
    stops = iter([False] * 8 + [True])
    _, summary = run(experiment(), tmp_path, observer=Observer(should_stop=lambda: next(stops)))
    assert (summary["status"], summary["steps"]) == ("interrupted", 9)
    _, summary = run(experiment(), tmp_path, resume=True)
    assert summary["status"] == "finished"
    assert_same_run(tmp_path, whole_run)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = run(experiment(), tmp_path)[1]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run(experiment(), tmp_path, resume=True)[1] == first
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_an_error_unless_falling_back(
    whole_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(experiment(), tmp_path, observer=killed_after(20))
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"damaged.*an older one is there"):
        run(experiment(), tmp_path, resume=True)
    assert len(read_records(tmp_path / "metrics.jsonl")) == 20  # nothing is lost by trying
    run(experiment(), tmp_path, resume=True, fall_back=True)
    assert_same_run(tmp_path, whole_run)


def test_missing_records_are_an_error(tmp_path: Path) -> None:
    run(experiment(), tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(CheckpointError, match="expected a record of each step up to 23"):
        run(experiment(), tmp_path, resume=True)


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path: Path) -> None:
    run(experiment(optimizer="sgd"), tmp_path)
    with pytest.raises(CheckpointError, match=r"step-0*23\.npz: expected the configuration that"):
        run(experiment(), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="expected a state of Adam"):
        Position.from_tree(3, experiment(optimizer="adam").optimizer)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"batch": {"name": "constant", "size": 30}}, {"backend": {"dtype": "float64"}}],
)
def test_only_the_budget_of_a_run_may_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    run(experiment(run={"steps": 2}), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"the configuration that the run began with.*edited"):
        run(experiment(run={"steps": 3}, **changes), tmp_path, resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert run(experiment(run={"steps": 3}), tmp_path, resume=True)[0].step == 3
    assert run(experiment(run={"seconds": 1e-9}), tmp_path, resume=True)[0].step == 3


def test_a_run_has_the_threads_it_says_and_may_go_on_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 4)
    seen: list[int] = []
    observer = Observer(stepped=lambda _: seen.append(threads.count()))
    for steps, number in ((2, 3), (4, 2)):
        changed = experiment(run={"steps": steps, "threads": number})
        run(changed, tmp_path, resume=steps > 2, observer=observer)
    assert seen == [3, 3, 2, 2]
    assert read_config(tmp_path).run.threads == 2


@pytest.mark.parametrize("part", ["x_train", "t_train", "x_test", "t_test"])
def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, part: str) -> None:
    """One pixel or label is enough to notice, and nothing is written then."""
    first = experiment(run={"steps": 2})
    run(first, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    changed = np.array(getattr(first.dataset, part))
    changed.flat[-1] = 1 - (changed.flat[-1] > 0)
    dataset = dataclasses.replace(first.dataset, **{part: changed})
    other = Experiment.of(from_table(table(run={"steps": 3})), dataset)
    expected = r"step-0*2\.npz: expected the data that the run began with \(120 of 8×8×1, .*digits"
    with pytest.raises(CheckpointError, match=expected):
        run(other, tmp_path, resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert run(experiment(run={"steps": 3}), tmp_path, resume=True)[0].step == 3


def test_resuming_needs_a_directory() -> None:
    with pytest.raises(ConfigError, match="expected a run directory, got none"):
        run(experiment(), resume=True)


def test_a_diverging_run_keeps_its_last_good_state(tmp_path: Path) -> None:
    wild = {"name": "sgd", "rate": 1e38, "momentum": 0.0}
    with pytest.raises(DivergenceError, match="step"):
        run(experiment(optimizer=wild), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "parameters are unchanged" in summary["error"]
    _, tree, metadata = checkpoint.load_latest(tmp_path / "checkpoints")
    assert metadata["step"] == summary["steps"]
    assert all(np.isfinite(W).all() for W in trees.leaves(tree["optimizer"]["params"]))


def test_without_a_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    position, summary = run(experiment())
    assert position.step == summary["steps"] == 23
    assert not list(tmp_path.iterdir())


def test_training_stops_after_the_seconds_asked_for() -> None:
    _, summary = run(experiment(run={"seconds": 0.05, "evaluations": 3}))
    assert 0.05 <= summary["seconds"] < 5.0
    assert summary["steps"] >= 1


def test_zero_steps_still_say_where_training_would_begin(tmp_path: Path) -> None:
    _, summary = run(experiment(run={"steps": 0}), tmp_path)
    assert summary["steps"] == 0
    assert [r["step"] for r in read_records(tmp_path / "evaluations.jsonl")] == [0]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_classifier_reports_accuracy() -> None:
    changes: dict[str, Any] = {
        "model": {"name": "mlp", "sizes": [16]},
        "optimizer": {"name": "adam", "rate": 0.01},
        "run": {"steps": 60},
    }
    _, summary = run(experiment(**changes))
    assert summary["training_accuracy"] > 0.8
    assert summary["test"]["accuracy"] > 0.5


def test_a_classifier_needs_labels() -> None:
    with pytest.raises(ConfigError, match="expected data with labels for an mlp, got 'curves'"):
        experiment(model={"name": "mlp"}, data={"name": "curves", "n_train": 2, "n_test": 1})
    for name in ("convnet", "resnet"):
        with pytest.raises(ConfigError, match=f"labels for a {name}"):
            experiment(model={"name": name}, data={"name": "curves", "n_train": 2, "n_test": 1})


def test_an_older_run_is_moved_aside(tmp_path: Path) -> None:
    place = tmp_path / "a" / "run"
    assert new_directory(place) is None
    for number in (1, 2):
        (place / "config.toml").write_text(f"seed = {number}")
        assert new_directory(place) == tmp_path / "a" / f"run.{number}"
        assert not list(place.iterdir())
    assert (tmp_path / "a" / "run.2" / "config.toml").read_text() == "seed = 2"


def _a_file(place: Path) -> Path:
    place.write_text("")
    return place


def _other_things(place: Path) -> Path:
    place.mkdir()
    (place / "thesis.tex").write_text("")
    return place


def _below_a_file(place: Path) -> Path:
    place.write_text("")
    return place / "run"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_a_file, "expected a directory, found a file"),
        (_other_things, "expected a new or empty directory or an older run, found other files"),
        (_below_a_file, "cannot be used as a run directory"),
    ],
)
def test_places_that_cannot_be_a_run_directory(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        new_directory(make(tmp_path / "place"))


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_cannot_write_to_one_directory(tmp_path: Path, resume: bool) -> None:
    place = tmp_path / "run"

    def second(_: Step) -> None:
        with pytest.raises(ConfigError, match="another run is writing to"):
            run(experiment(), place, resume=resume)
        with pytest.raises(ConfigError, match="another run is writing to"):
            new_directory(place)

    run(experiment(run={"steps": 2}), place, observer=Observer(stepped=second))
    assert [r["step"] for r in read_records(place / "metrics.jsonl")] == [1, 2]
    assert new_directory(place) == tmp_path / "run.1"
    assert not list(tmp_path.rglob(".lock"))


def test_the_lock_of_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    (place / ".lock").touch()
    assert new_directory(place) is None
    run(experiment(run={"steps": 1}), place)


def test_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(tmp_path), locked(tmp_path):
        assert not list(tmp_path.iterdir())
