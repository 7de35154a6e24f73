"""`examples/00_kfac_in_one_file.py` takes the steps that the library takes."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfac_np import trees
from kfac_np.backend import Rng, get_backend
from kfac_np.layers import Dense, Sequential, Tanh
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, CoupledGamma, LevenbergMarquardt, published

PATH = Path(__file__).parent.parent / "examples" / "00_kfac_in_one_file.py"
SIZES = 144, 30, 3, 30, 144
STEPS = 45  # two renewals of the inverses, nine measurements of ρ


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("one_file", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LibraryDraws:
    """Standard normal numbers of the library's stream for the targets, a step after the other."""

    def __init__(self) -> None:
        self.step = 0

    def standard_normal(self, shape: tuple[int, ...]) -> Any:
        self.step += 1
        stream = Rng(0).child("targets", self.step).spawn().child(0)
        return stream.normal(shape, get_backend("numpy", "float64"))


def as_in_the_example(damping: float) -> KFAC:
    """The library's K-FAC as published, but for γ, the start of λ, and the average."""
    layers = [layer for m, n in itertools.pairwise(SIZES) for layer in (Dense(m, n), Tanh())]
    return published(
        Objective(Sequential(*layers[:-1]), SquaredError()),
        damping=LevenbergMarquardt(damping, decay=19 / 20, floor=0.0),
        gamma=CoupledGamma(),
        averaging=None,
    )


@pytest.mark.parametrize(
    ("damping", "changes"),
    [(150.0, {-1.0, 0.0}), (1e-3, {-1.0, 0.0, 1.0})],  # of λ: from 1e-3 it also rises
)
def test_the_steps_are_those_of_the_library(example: Any, damping: float, changes: set[float]):
    random = np.random.default_rng(0)
    W = [random.standard_normal((n, m + 1)) / math.sqrt(m) for m, n in itertools.pairwise(SIZES)]
    batches = [[example.spots(random, 203)] * 2 for _ in range(STEPS)]
    optimizer = as_in_the_example(damping)
    state = optimizer.init(tuple(p for w in W for p in (w, ()))[:-1])
    steps = example.kfac(W, batches, damping, LibraryDraws())
    seen = set()
    for (x, t), (W, h, new) in zip(batches, steps, strict=True):
        state, report = optimizer.step(state, x, t)
        assert h == pytest.approx(report.objective, rel=1e-9)
        assert new == pytest.approx(float(state.damping), rel=1e-9)
        for own, expected in zip(W, trees.leaves(state.params), strict=True):
            assert np.max(np.abs(own - expected)) < 1e-9 * np.max(np.abs(expected))
        seen.add(float(np.sign(new - damping)))
        damping = new
    assert seen == changes


def test_it_is_short_and_has_nothing_of_the_library():
    text = PATH.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "kfac_np" not in text
