"""Commands that begin with a trained run: what they find in its directory, and leave there."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from kfac_np import layers, trees
from kfac_np.cli import main
from kfac_np.cli.runs import CURVATURES, TrainedRun, fitted
from kfac_np.figures.calibration import Reliability, coverage
from kfac_np.training import checkpoint
from kfac_np.training.records import read_evaluations

TRAIN = ["train", "--data", "digits", "--n-train", "120", "--n-test", "40", "--sizes", "6"]


def trained(directory: Path, *words: str) -> Path:
    assert main([*TRAIN, "--model", "mlp", "--steps", "5", *words, "--out", str(directory)]) == 0
    return directory


def test_a_run_is_read_as_it_was_left(tmp_path: Path) -> None:
    """The better of current and averaged parameters, and all of the data."""
    run = TrainedRun.read(trained(tmp_path / "run"))
    last = read_evaluations(tmp_path / "run" / "evaluations.jsonl")[-1]
    assert run.step == last["step"] == 5
    assert run.parameters == min(("current", "averaged"), key=lambda name: last[name]["loss"])
    assert run.experiment.evaluate(run.params).loss == last[run.parameters]["loss"]
    batches = run.batches(50)
    assert [len(x) for x, _ in batches] == [50, 50, 20]
    for whole, parts in zip(run.training, zip(*batches, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_fit_is_kept_until_it_is_outdated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directory = str(trained(tmp_path / "run"))
    file = tmp_path / "run" / "curvature.npz"
    contents = []
    for words, expected in [
        ([], "kfac, exact"),
        (["--curvature", "ekfac", "--fisher", "empirical"], "ekfac, empirical"),
        (["--batch-size", "7"], "ekfac, empirical"),  # what is there
        (["--fisher", "exact"], "ekfac, exact"),
    ]:
        capsys.readouterr()
        assert main(["fit", directory, *words]) == 0
        assert capsys.readouterr().out.startswith(f"{expected} Fisher, 120 training examples")
        contents.append(file.read_bytes())
    assert [a == b for a, b in itertools.pairwise(contents)] == [False, True, False]
    run = TrainedRun.read(directory)
    assert fitted(run).curvature == CURVATURES["ekfac"]
    assert main(["train", "--resume", directory, "--steps", "6"]) == 0
    assert fitted(TrainedRun.read(directory)).curvature == CURVATURES["kfac"]


def test_what_is_no_fit_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = trained(tmp_path / "run")
    (directory / "curvature.npz").write_bytes(b"mine")
    assert main(["fit", str(directory)]) == 2
    assert "curvature.npz: not a checkpoint, or a damaged one" in capsys.readouterr().err
    assert (directory / "curvature.npz").read_bytes() == b"mine"
    assert main(["fit", str(tmp_path)]) == 2
    assert "expected a run directory, found no config.toml in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("training", "words", "columns"),
    [
        (["--model", "mlp"], [], ["nll", "accuracy", "calibration_error"]),
        (["--model", "mlp"], ["--prior", "2", "--last-layer"], None),
        (["--model", "autoencoder"], ["--tune", "evidence"], ["nll", "calibration_error"]),
        (
            ["--model", "autoencoder", "--set", "model.loss=squared-error"],
            ["--curvature", "ekfac", "--examples", "30"],
            ["nll", "coverage_error"],
        ),
    ],
    ids=["classes", "last layer", "pixels", "regression"],
)
def test_uncertainty(
    training: list[str],
    words: list[str],
    columns: list[str] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = trained(tmp_path / "run", *training)
    assert main(["uncertainty", str(directory), *words]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((directory / "uncertainty.json").read_text())
    assert summary["network"].keys() == summary["posterior"].keys()
    if columns is not None:
        assert list(summary["posterior"]) == columns
    assert f"{summary['posterior']['nll' if columns is None else columns[0]]:.4g}" in printed
    assert (directory / "uncertainty.png").read_bytes().startswith(b"\x89PNG")
    # Of half the test set where the other half is tuned on, of all of it elsewhere.
    tuned_on_half = "--prior" not in words and "evidence" not in words
    whole = int(words[words.index("--examples") + 1]) if "--examples" in words else 40
    assert summary["test_examples"] == (whole // 2 if tuned_on_half else whole)
    run = TrainedRun.read(directory)
    if columns == ["nll", "accuracy", "calibration_error"]:
        x, t = (a[20:] for a in run.test)
        assert summary["network"]["nll"] == pytest.approx(run.objective.value(run.params, x, t))
    if "--last-layer" in words:
        assert (summary["layers"], summary["prior_precision"]) == (["2"], 2.0)
        assert "posterior of layers 2, prior precision as given" in printed
        assert main(["uncertainty", str(directory), "--examples", "41"]) == 2
        assert "--examples: expected at most 40 test examples, got 41" in capsys.readouterr().err


def test_coverage_of_what_is_drawn_from_the_bands() -> None:
    """And of bands that are twice as wide as they should be."""
    z = np.random.default_rng(0).standard_normal(100_000)
    levels, shares = coverage(3.0 * z, np.full(z.shape, 3.0))
    np.testing.assert_allclose(shares, levels, atol=0.005)
    assert (coverage(z, np.full(z.shape, 2.0))[1] > levels).all()
    p = np.random.default_rng(1).random(100_000)
    came_true = np.random.default_rng(2).random(p.shape) < p
    assert Reliability.of(p, came_true).error < 0.01
    assert Reliability.of(p, came_true < 0).error == pytest.approx(0.5, abs=0.01)


def test_a_run_is_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without flags: numbers, a picture, and a smaller network that computes what they say."""
    pytest.importorskip("matplotlib")
    directory = trained(tmp_path / "run", "--sizes", "20,10")
    capsys.readouterr()
    assert main(["prune", str(directory)]) == 0
    told = capsys.readouterr().out
    names = ("pruning.csv", "pruning.png", "pruned.npz", "curvature.npz")
    assert all((directory / name).stat().st_size > 100 for name in names)
    rows = (directory / "pruning.csv").read_text().splitlines()
    assert rows[0].startswith("share,parameters,predicted_increase,training_loss")
    assert len(rows) > 4
    tree, metadata = checkpoint.load(directory / "pruned.npz")
    network = eval(metadata["network"], vars(layers))
    x, t = TrainedRun.read(directory).test
    right = np.mean(np.argmax(network.forward(tree["params"], x)[0], axis=1) == t)
    assert f"{right:.4g} after" in told
    assert sum(p.size for p in trees.leaves(tree["params"])) < 1620
    assert main(["prune", str(directory), "--share", "0.6", "--remove", "weights"]) == 0
    tree, metadata = checkpoint.load(directory / "pruned.npz")
    assert metadata["share"] >= 0.6
    assert not tree["params"][0][~tree["masks"]["0"]].any()
    before = (directory / "pruned.npz").read_bytes()
    assert main(["prune", str(directory), "--share", "0.999"]) == 2
    assert re.search(r"share: expected at most 0\.\d+, .*, got 0\.999$", capsys.readouterr().err)
    assert (directory / "pruned.npz").read_bytes() == before
