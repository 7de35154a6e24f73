"""A small run, and what it leaves: for tests of runs that are to leave the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kfac_np.training import checkpoint
from kfac_np.training.config import from_table, read_table
from kfac_np.training.experiment import Experiment
from kfac_np.training.records import read_records

KFAC = {
    "name": "kfac",
    "damping": {"initial": 10.0},
    "refresh": {"interval": 5},
    "gamma": {"interval": 5},
    "statistics_fraction": 0.5,
}


def table(**changes: Any) -> dict[str, Any]:
    return {
        "data": {"name": "digits", "n_train": 120, "n_test": 40},
        "model": {"sizes": [8, 3]},
        "optimizer": KFAC,
        "batch": {"name": "growing", "first": 30, "full_at": 30},
        "run": {"steps": 23, "evaluations": 5, "checkpoint_every": 6},
        **changes,
    }


def experiment(**changes: Any) -> Experiment:
    return Experiment.of(from_table(table(**changes)))


def without_seconds(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(path)]


def arrays_of(directory: Path) -> list[bytes]:
    _, tree, _ = checkpoint.load_latest(directory / "checkpoints")
    found: list[bytes] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for key in node:
                if key != "seconds":
                    walk(node[key])
        elif isinstance(node, (tuple, list)):
            for child in node:
                walk(child)
        else:
            found.append(node.tobytes() if isinstance(node, np.ndarray) else repr(node).encode())

    walk(tree)
    return found


def assert_same_run(directory: Path, reference: Path) -> None:
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert without_seconds(directory / name) == without_seconds(reference / name)
    assert arrays_of(directory) == arrays_of(reference)
    assert read_table(directory / "config.toml") == read_table(reference / "config.toml")
