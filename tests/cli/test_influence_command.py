"""The command influence: what it finds, and what it leaves in a run directory."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from kfac_np.applications import Influence, MeanEigenvalue
from kfac_np.cli import main
from kfac_np.cli.runs import TrainedRun, fitted

TRAIN = ["train", "--data", "digits", "--n-train", "90", "--n-test", "40", "--sizes", "6"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scores_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    directory = tmp_path / "run"
    assert main([*TRAIN, "--model", "mlp", "--steps", "5", "--out", str(directory)]) == 0
    capsys.readouterr()
    assert main(["influence", str(directory), "--batch-size", "40"]) == 0
    assert "influence.png, influence.csv and influence-self.csv" in capsys.readouterr().out
    assert (directory / "influence.png").read_bytes().startswith(b"\x89PNG")

    run = TrainedRun.read(directory)
    by = Influence(run.objective, fitted(run), MeanEigenvalue())
    scores, own = by.scores(run.test, run.training), by.self_influence(run.training)
    z, _ = run.objective.network.forward(run.params, run.test[0], None)
    losses = run.objective.loss.value(z, run.test[1])
    rows = rows_of(directory / "influence.csv")
    tested = list(dict.fromkeys(int(row["test"]) for row in rows))
    assert tested == np.argsort(-losses, kind="stable")[:6].tolist()
    for test in tested:
        order = np.argsort(-scores[test])
        for kind, expected in (("helpful", order[:4]), ("harmful", order[::-1][:4])):
            some = [r for r in rows if (int(r["test"]), r["kind"]) == (test, kind)]
            assert [int(r["training"]) for r in some] == expected.tolist()
            found = [float(r["change of the loss without it"]) for r in some]
            np.testing.assert_allclose(found, scores[test, expected] / 90, rtol=1e-4)
            assert [int(r["its class"]) for r in some] == run.training[1][expected].tolist()
    rows = rows_of(directory / "influence-self.csv")
    assert [int(row["training"]) for row in rows] == np.argsort(-own)[:50].tolist()


def test_an_autoencoder_and_other_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("matplotlib")
    directory = str(tmp_path / "run")
    assert main([*TRAIN, "--steps", "3", "--out", directory]) == 0
    words = ["--test", "7", "0", "--top", "2", "--damping", "0.1", "--curvature", "diagonal"]
    monkeypatch.setattr("kfac_np.cli.influence._PICTURED", 1)
    assert main(["influence", directory, *words]) == 0
    assert "influence.png shows the first 1 of 2 test examples" in capsys.readouterr().out
    rows = rows_of(tmp_path / "run" / "influence.csv")
    assert [row["test"] for row in rows] == 4 * ["7"] + 4 * ["0"]
    for words, message in [
        (["--queries", "41"], "--queries: expected at most 40 test examples, got 41"),
        (["--test", "40"], "--test: expected numbers below 40, got 40"),
        (["--top", "91"], "--top: expected at most 90 training examples, got 91"),
        (["--damping", "-1"], "damping: expected a finite number >= 0, got -1"),
    ]:
        assert main(["influence", directory, *words]) == 2
        assert message in capsys.readouterr().err
