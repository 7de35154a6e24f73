"""Where a run is: links, folders that one leaves, names that are no text, things in its way."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import assert_same_run, experiment

from kfac_np.errors import CheckpointError, ConfigError
from kfac_np.training.experiment import Experiment
from kfac_np.training.loop import Step
from kfac_np.training.run import Observer, new_directory, read_config, run


def test_a_run_stays_where_it_began(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "run").symlink_to("../real/run")
    monkeypatch.chdir(tmp_path / "here")

    def leave(_: Step) -> None:
        (tmp_path / "here" / "run").unlink(missing_ok=True)
        os.chdir(tmp_path / "there")

    run(experiment(), "run", observer=Observer(stepped=leave))
    assert_same_run(tmp_path / "real" / "run", whole_run)
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("option", ["name", "directory"])
def test_data_stay_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """Also in a folder whose name is not UTF-8."""
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3073), np.uint8)
    pixels[:, 0] %= 10
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / name).write_bytes(pixels.tobytes())
    named = {"name": f"cifar:{folder.name}"}
    if option == "directory":
        named = {"name": "cifar", "directory": folder.name}
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {"data": named, "optimizer": "sgd", "batch": {"size": 4}}
    run(experiment(**changes, run={"steps": 1}), "run")
    monkeypatch.chdir("/")
    config = read_config(tmp_path / "run")
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2))
    assert run(Experiment.of(longer), tmp_path / "run", resume=True)[0].step == 2


def test_an_older_run_is_moved_out_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    Path(".config.toml.part").write_text("a run killed at once")
    assert new_directory(".") is None
    Path("config.toml").write_text("seed = 1")
    assert new_directory(".") == tmp_path / "run.1"
    assert not list(Path().iterdir())
    assert (tmp_path / "run.1" / "config.toml").read_text() == "seed = 1"


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    assert new_directory(tmp_path / "link") is None
    (tmp_path / "real" / "config.toml").write_text("seed = 1")
    assert new_directory(tmp_path / "link") == tmp_path / "real.1"
    assert (tmp_path / "link").is_symlink()
    assert not list((tmp_path / "real").iterdir())
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="cannot be used as a run directory"):
        new_directory(tmp_path / "loop")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("elsewhere", path)])
def test_what_is_no_lock_is_an_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / ".lock")
    with pytest.raises(ConfigError, match=r"\.lock: expected a file, found something else"):
        run(experiment(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "junk",
    [
        '{"step": 0}',
        '{"step": 0, "seconds": "x", "current": {"loss": 1.0}}',
        '{"step": 0, "seconds": 0.0, "current": {}}',
        '{"step": 0, "seconds": 0.0, "current": [1]}',
        '{"step": 0, "seconds": 0.0, "current": {"loss": 1.0}, "averaged": {"loss": "x"}}',
        "[" * 9999,
    ],
)
def test_junk_among_evaluations_is_an_error(tmp_path: Path, junk: str) -> None:
    run(experiment(run={"steps": 1}), tmp_path)
    (tmp_path / "evaluations.jsonl").write_text(junk + '\n{"step": 1}\n')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"evaluations\.jsonl.*: expected a"):
        run(experiment(run={"steps": 1}), tmp_path, resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
