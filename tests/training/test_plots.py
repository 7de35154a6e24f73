"""Pictures are drawn without a display, whatever there is to draw."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfac_np.errors import ConfigError
from kfac_np.training import plots
from kfac_np.training.plots import Curve, plot_curves, plot_factors, plot_images, read_curves
from kfac_np.training.records import append_record

pytest.importorskip("matplotlib")


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


@pytest.mark.parametrize(
    "curves",
    [
        [],
        [Curve("a", [], [], [])],
        [Curve("a", [0], [0.0], [3.0])],
        [Curve("a", [0, 9], [0.0, 1.0], [3.0, 2.0]), Curve("b", [0, 900], [0.0, 1.0], [3e5, 2e-2])],
        [Curve("a", [0, 1, 2], [0.0, 1.0, 2.0], [math.inf, math.nan, -1.0])],
        [Curve(str(i), [0, 1], [0.0, 1.0], [3.0, 2.0 + i]) for i in range(8)],
    ],
)
def test_curves(tmp_path: Path, curves: list[Curve]) -> None:
    plot_curves(tmp_path / "curves.png", curves)
    assert is_picture(tmp_path / "curves.png")


def test_curves_are_read_from_a_run(tmp_path: Path) -> None:
    for step, loss in enumerate((3.0, math.nan, 1.0)):
        record = {"step": step, "seconds": 0.5 * step, "current": {"loss": loss}}
        append_record(
            tmp_path / "evaluations.jsonl",
            {**record, "averaged": {"loss": 2.0}} if step else record,
        )
    current, averaged = read_curves(tmp_path, "kfac")
    assert current == Curve("kfac", [0, 2], [0.0, 1.0], [3.0, 1.0])
    assert averaged == Curve("kfac, averaged", [1, 2], [0.5, 1.0], [2.0, 2.0], averaged=True)


def test_what_a_picture_of_curves_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It names what is drawn; every label is there as it is; small values are not all 0.000."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    small = [1.0, 3e-9]
    names = ["a", "a, averaged", "$b", "_c"]
    curves = [Curve(n, [0, 1], [0.0, 1.0], small, n.endswith("averaged")) for n in names]
    plot_curves("", curves, title="digits, mlp 32")
    (figure,) = figures
    figure.savefig(tmp_path / "curves.png")
    assert figure.get_suptitle() == "digits, mlp 32"
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert [text.strip().replace("\\$", "$") for text in texts] == names
    for axes in figure.axes:
        current, averaged, other, _ = axes.lines
        assert averaged.get_color() == current.get_color() != other.get_color()
        assert averaged.get_zorder() < current.get_zorder()
        assert averaged.get_linewidth() > 2 * current.get_linewidth()
        labels = [label.get_text() for label in axes.yaxis.get_majorticklabels()]
        assert len(set(labels)) == len(labels)
        assert any("e-0" in label for label in labels)


def test_images_of_different_numbers(tmp_path: Path) -> None:
    rows = {"data": np.zeros((3, 6)), "one": np.ones((1, 6))}
    for shape in ((2, 3, 1), (1, 2, 3), (3, 1, 2)):  # grey, coloured, neither
        plot_images(tmp_path / "images.png", rows, shape)
        assert is_picture(tmp_path / "images.png")


def test_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = {
        "0": {"A": np.eye(4, dtype=np.float32), "G": np.zeros((2, 2)), "count": np.ones(())},
        "2": {"squares": np.ones((3, 2))},
    }
    plot_factors(tmp_path / "factors.png", moments, "step 3")
    assert is_picture(tmp_path / "factors.png")
    figures: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(plots, "_save", lambda figure, path: figures.append(figure))
        plot_factors("", moments, "digits, mlp 32, step 3")
    assert figures[0].get_suptitle() == "Kronecker factors: digits, mlp 32, step 3"
    assert figures[0].axes[-1].get_ylabel() == "entry / largest entry of its factor"
    with pytest.raises(ConfigError, match="expected square matrices among the moments, found none"):
        plot_factors(tmp_path / "none.png", {"2": moments["2"]})


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pictures need matplotlib: pip install matplotlib"):
        plot_curves(tmp_path / "curves.png", [])
