"""Tables of numbers as people have them at hand, in several units.

`load` gives a table by name in the units asked for: six that come with scikit-learn and three that
are generated. Nothing is held back; what is measured is training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SHIPPED = ("breast_cancer", "wine", "diabetes", "digits", "iris", "linnerud")
UNITS = ("standardised", "raw", "features", "targets")


@dataclass(frozen=True)
class Table:
    """Features (N, d), and targets: numbers (N, C), or labels (N,), of `classes` classes."""

    x: np.ndarray
    t: np.ndarray
    classes: int = 0


def collinear() -> Table:
    """Eight features that are three, but for a thousandth; a curved target with noise."""
    draws = np.random.default_rng(1)
    hidden = draws.standard_normal((500, 3))
    x = hidden @ draws.standard_normal((3, 8)) + 1e-3 * draws.standard_normal((500, 8))
    noise = draws.standard_normal(500)
    t = hidden[:, 0] + np.sin(2 * hidden[:, 1]) + hidden[:, 2] ** 2 + 0.1 * noise
    return Table(20 + 3 * x, 1000 + 50 * t[:, None])


def heavy_tailed() -> Table:
    """Features of infinite variance, and targets with such noise (Student's t, 1.5 and 2)."""
    draws = np.random.default_rng(2)
    x = draws.standard_t(1.5, (500, 8))
    t = np.arctan(x[:, 0]) + np.abs(np.arctan(x[:, 1])) + 0.2 * draws.standard_t(2, 500)
    return Table(x, 10 * t[:, None])


def one_in_a_hundred() -> Table:
    """Two classes, ten examples of the second among a thousand, which overlap with the first."""
    draws = np.random.default_rng(3)
    t = (np.arange(1000) % 100 == 0).astype(np.int64)
    x = draws.standard_normal((1000, 10))
    x[:, :3] += 1.5 * t[:, None]
    return Table(x * np.geomspace(0.1, 100, 10) + 5, t, 2)


GENERATED: dict[str, Callable[[], Table]] = {
    "collinear": collinear,
    "heavy_tailed": heavy_tailed,
    "one_in_a_hundred": one_in_a_hundred,
}
TABLES = (*SHIPPED, *GENERATED)
CLASSES = ("breast_cancer", "wine", "digits", "iris", "one_in_a_hundred")
SIZES = dict(zip(TABLES, (569, 178, 442, 1797, 150, 20, 500, 500, 1000), strict=True))


def raw(name: str) -> Table:
    """A table as it comes."""
    if name in GENERATED:
        return GENERATED[name]()
    from sklearn import datasets

    x, t = getattr(datasets, f"load_{name}")(return_X_y=True)
    if name in CLASSES:
        return Table(x, t.astype(np.int64), int(t.max()) + 1)
    return Table(x, t.reshape(len(t), -1).astype(np.float64))


def load(name: str, units: str, seed: int = 0) -> Table:
    """A table in one of `UNITS`.

    "standardised": mean 0 and deviation 1, of features and of targets that are numbers. "raw": as
    it comes. "features": standardised, then each feature times 10^U(-6, 6), drawn by `seed`.
    "targets": standardised, then targets times 100, plus 500; only where they are numbers.
    """
    table = raw(name)
    if units == "raw":
        return table
    x, t = _standardised(table.x), table.t
    if not table.classes:
        t = _standardised(t)
    if units == "features":
        x = x * 10 ** np.random.default_rng(seed).uniform(-6, 6, x.shape[1])
    elif units == "targets":
        t = 100 * t + 500
    return Table(x, t, table.classes)


def _standardised(x: np.ndarray) -> np.ndarray:
    deviation = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
