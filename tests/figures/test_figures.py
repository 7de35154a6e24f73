"""The command figures: every picture, the numbers behind it, and what it says without data."""

from __future__ import annotations

import csv
import functools
import math
from pathlib import Path

import numpy as np
import pytest

from kfac_np.cli import main
from kfac_np.data import fashion_mnist
from kfac_np.errors import DataError
from kfac_np.figures import figures
from kfac_np.figures.autocorrelation import autocorrelation
from kfac_np.figures.faces import faces
from kfac_np.figures.racing import COLUMNS

pytest.importorskip("matplotlib")

MATRICES = {
    "fisher": ("network", "row_layer", "column_layer", "exact_norm", "difference_norm")
    + ("relative_error",),
    "fisher-pixels": ("network", "row", "column", "exact", "kronecker_factored", "difference"),
    "inverse": ("network", "gamma", "approximation", "relative_error"),
    "inverse-blocks": ("network", "approximation", "row_layer", "column_layer")
    + ("mean_absolute_entry", "exact_norm", "difference_norm", "relative_error"),
    "inverse-pixels": ("network", "row", "column", "exact", "diagonal", "tridiagonal"),
}
TABLES = {
    **MATRICES,
    "damping": ("method", "gamma", "lambda", "update_norm", "cosine_to_gradient")
    + ("cosine_to_exact", "loss_decrease", "alpha")
    + ("rescaled_loss_decrease", "rescaled_model_decrease"),
    "batch-size": ("method", "batch_size", "rate", "step", "loss"),
    "curves": COLUMNS,
    "fashion": COLUMNS,
    "faces": COLUMNS,
    "kfc-autocorrelation": ("quantity", "layer", "dy", "dx", "correlation"),
    "kfc-autocorrelation-locations": ("quantity", "layer", "y", "x", "second_moment"),
    "kfc-training": COLUMNS,
}
WORDS = {"network", "row_layer", "column_layer", "approximation", "method", "run", "quantity"}
MAY_BE_EMPTY = {"rate", "averaged_loss"}  # K-FAC has no rate, SGD keeps no average


@functools.cache
def fashion_is_here() -> bool:
    try:
        fashion_mnist()
    except DataError:
        return False
    return True


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures")
    assert main(["figures", "all", "--quick", "--out", str(out)]) == 0
    return out


def test_all_figures_are_drawn(drawn: Path) -> None:
    expected = set(figures()) - (set() if fashion_is_here() else {"fashion"})
    assert {path.stem for path in drawn.glob("*.png")} == expected
    for path in drawn.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    assert not list(drawn.glob(".*"))  # nothing half-written is left


@pytest.mark.parametrize("name", TABLES)
def test_numbers_are_finite(drawn: Path, name: str) -> None:
    if name == "fashion" and not fashion_is_here():
        pytest.skip("Fashion-MNIST is not on this machine")
    with (drawn / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == TABLES[name]
    for row in rows:
        for column, value in row.items():
            if column in WORDS or column == "layer" or (column in MAY_BE_EMPTY and not value):
                continue
            assert math.isfinite(float(value)), (column, row)


def test_the_tridiagonal_inverse_is_closer(drawn: Path) -> None:
    with (drawn / "inverse.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    errors = {(r["network"], r["gamma"], r["approximation"]): r["relative_error"] for r in rows}
    for (network, gamma, kind), error in errors.items():
        if kind == "tridiagonal":
            assert float(error) < float(errors[network, gamma, "diagonal"])


def test_the_same_numbers_again(drawn: Path, tmp_path: Path) -> None:
    assert main(["figures", "batch-size", "--quick", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"batch-size.png", "batch-size.csv"}
    written = (tmp_path / "batch-size.csv").read_text()
    assert written == (drawn / "batch-size.csv").read_text()


@pytest.mark.parametrize("words", [[], ["fischer"], ["fisher", "nothing"]])
def test_names_are_listed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", *words]) == 2
    printed = capsys.readouterr().err
    assert "expected fisher, inverse, damping, batch-size, curves, fashion, faces," in printed
    assert "or all, got" in printed


def test_without_fashion_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        raise DataError("fashion-mnist: expected files, found none")

    def only_fashion() -> dict[str, object]:
        return {"fashion": figures()["fashion"]}

    monkeypatch.setattr("kfac_np.figures.races.fashion_mnist", absent)
    assert main(["figures", "fashion", "--quick", "--out", str(tmp_path)]) == 2
    assert "fashion-mnist: expected files, found none" in capsys.readouterr().err
    monkeypatch.setattr("kfac_np.figures.figures", only_fashion)
    assert main(["figures", "all", "--quick", "--out", str(tmp_path)]) == 0
    assert "fashion: left out, fashion-mnist: expected files" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_faces_are_those_of_the_seed() -> None:
    few, more, other = faces(5, 2), faces(9, 1), faces(5, 2, seed=1)
    assert np.allclose(few.x_train, more.x_train[:5], atol=1e-6)
    assert not np.allclose(few.x_train, other.x_train)
    assert not np.allclose(few.x_train[:2], few.x_test)
    assert few.x_train.std() > 0.1


def test_autocorrelation_of_what_is_known() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4000, 6, 6, 2))
    found = autocorrelation(noise, 2)
    assert found[2, 2] == pytest.approx(1.0)
    assert np.abs(np.delete(found.ravel(), 12)).max() < 0.02
    smooth = noise[:, :-1] + noise[:, 1:]  # neighbours above each other share half
    found = autocorrelation(smooth, 2)
    assert found[1, 2] == pytest.approx(0.5, abs=0.02)
    assert found[3, 2] == pytest.approx(0.5, abs=0.02)
    assert found[2, 3] == pytest.approx(0.0, abs=0.02)
