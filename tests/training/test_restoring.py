"""Trees that have been tampered with: a `CheckpointError` that names the place, or a good step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfac_np.errors import CheckpointError
from kfac_np.training import checkpoint
from kfac_np.training.config import from_table
from kfac_np.training.experiment import Experiment
from kfac_np.training.loop import train
from kfac_np.training.records import read_records
from kfac_np.training.restoring import restore
from kfac_np.training.run import run

PATH = Path("step-000000000004.npz")


def experiment(optimizer: Any) -> Experiment:
    return Experiment.of(
        from_table(
            {
                "data": {"name": "digits", "n_train": 60, "n_test": 10},
                "model": {"sizes": [4, 2]},
                "optimizer": optimizer,
                "batch": {"name": "constant", "size": 30},
                "run": {"steps": 9, "checkpoint_every": 4},
            }
        )
    )


EXPERIMENTS = {
    "kfac": experiment({"name": "kfac", "refresh": {"interval": 2}}),
    "adam": experiment({"name": "adam", "averaging": {"decay": 0.9}}),
    "sgd": experiment("sgd"),
}


def tree_after_four_steps(name: str) -> dict[str, Any]:
    one = EXPERIMENTS[name]
    *_, last = islice(train(one.optimizer, one.supply, one.start()), 4)
    return last.position.to_tree(one.optimizer)


def replaced(tree: Any, path: str, value: Any) -> Any:
    """A tree with another value at the path, "optimizer.params.0"; a function gets the old one."""
    if not path:
        return value(tree) if callable(value) else value
    key, _, rest = path.partition(".")
    if isinstance(tree, dict):
        return {**tree, key: replaced(tree.get(key), rest, value)}
    children = [replaced(x, rest, value) if str(i) == key else x for i, x in enumerate(tree)]
    return type(tree)(children)


def places(tree: Any, path: str = "") -> Iterator[str]:
    if path:
        yield path
    children = tree if isinstance(tree, dict) else dict(enumerate(tree))
    for key, child in children.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(child, (dict, tuple, list)):
            yield from places(child, where)
        else:
            yield where


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_untouched_tree_is_restored(name: str) -> None:
    one, tree = EXPERIMENTS[name], tree_after_four_steps(name)
    position = restore(one, {}, PATH, tree, {"step": 4})
    assert position.to_tree(one.optimizer) == tree


def nan_in_front(x: Any) -> Any:
    return np.concatenate([np.full_like(x[:1], np.nan), x[1:]])


TAMPERED: list[tuple[str, str, Any, str]] = [
    (
        "kfac",
        "optimizer.params.0",
        lambda W: W[:-1],
        r"params\.0: expected shape \(4, 65\) of float32, got shape \(3, 65\) of float32",
    ),
    ("sgd", "optimizer.params.0", lambda W: W.astype("f8"), r"params\.0: .* of float64"),
    ("adam", "optimizer.params.0", lambda W: W.tolist(), r"params\.0: .* got a list"),
    ("kfac", "optimizer.params.0", nan_in_front, r"params\.0: expected finite values"),
    ("sgd", "optimizer.params", lambda p: p[1:], "tree at params: expected a tuple of"),
    ("kfac", "optimizer.average", None, "state: expected an average, which KFAC goes on with"),
    ("kfac", "optimizer.update.0", np.float32([1]), r"update\.0: expected shape \(4, 65\)"),
    ("sgd", "optimizer.velocity.0", np.float32([1]), r"velocity\.0: expected shape \(4, 65\)"),
    ("adam", "optimizer.second.0", nan_in_front, r"second\.0: expected finite values"),
    ("kfac", "optimizer.moments", 3, r"moments: expected those of .*, got 3"),
    ("kfac", "optimizer.moments.0.A", nan_in_front, r"moments\.0\.A: expected finite values"),
    (
        "kfac",
        "optimizer.moments.0",
        {},
        "moments: layer 0: KFACBlock.* expected moments of its own",
    ),
    ("kfac", "optimizer.moments.0.A", lambda A: A[:3, :3], "the next step fails"),
    ("kfac", "optimizer.damping", "1", "damping: expected a number or an array, got '1'"),
    ("kfac", "optimizer.damping", float("nan"), "damping: expected finite values"),
    ("kfac", "optimizer.damping", {}, "the next step fails"),
    ("kfac", "optimizer.checks", 3, "expected a state of KFAC .*with checks"),
    ("kfac", "optimizer.velocity", (), "expected a state of KFAC .*velocity"),
    ("sgd", "optimizer.step", 4.0, r"step: expected an integer >= 0, got 4\.0"),
    ("sgd", "optimizer.step", 3, "expected a position of step 4, got one of step 3"),
    ("sgd", "seconds", "1", "seconds: expected a finite number >= 0, got '1'"),
    ("sgd", "seconds", float("inf"), "seconds: expected a finite number >= 0, got inf"),
    ("sgd", "batches.position", -1, "expected a state of SGD .*position"),
    ("sgd", "batches.position", 60, "the next step fails .*another data set"),
    ("sgd", "batches", None, "expected a state of SGD"),
    ("sgd", "", [], "expected a state of SGD"),
]


@pytest.mark.parametrize(("name", "place", "value", "message"), TAMPERED)
def test_what_is_wrong_is_named(name: str, place: str, value: Any, message: str) -> None:
    tree = replaced(tree_after_four_steps(name), place, value)
    with pytest.raises(CheckpointError, match=rf"{PATH.stem}\.npz: .*{message}") as info:
        restore(EXPERIMENTS[name], {}, PATH, tree, {"step": 4})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("junk", [None, "x", -1, (), {}, {"0": 1.0}, np.float32([2.0, 3.0])])
def test_junk_anywhere_is_noticed_or_harmless(name: str, junk: Any) -> None:
    one, tree = EXPERIMENTS[name], tree_after_four_steps(name)
    noticed = 0
    for place in places(tree):
        try:
            restore(one, {}, PATH, replaced(tree, place, junk), {"step": 4})
        except CheckpointError:
            noticed += 1
    assert noticed > len(list(places(tree))) / 2


def test_a_run_falls_back_from_a_position_that_is_none(tmp_path: Path) -> None:
    one = EXPERIMENTS["kfac"]
    run(one, tmp_path)
    expected = read_records(tmp_path / "metrics.jsonl")
    directory = tmp_path / "checkpoints"
    _, tree, metadata = checkpoint.load_latest(directory)
    tampered = replaced(tree, "optimizer.params.0", nan_in_front)
    checkpoint.save_step(directory, step := metadata["step"], tampered, metadata)
    with pytest.raises(CheckpointError, match=rf"{step}\.npz: params\.0: expected finite"):
        run(one, tmp_path, resume=True)
    run(one, tmp_path, resume=True, fall_back=True)
    again = read_records(tmp_path / "metrics.jsonl")
    seconds = partial(dict.fromkeys, ["seconds"])
    assert [r | seconds() for r in again] == [r | seconds() for r in expected]
