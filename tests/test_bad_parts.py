"""Parts of a wrong kind are refused where they are given, not where they are first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    DiagonalBlock,
    KFACBlock,
    Ladder,
    convolution_block,
)
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import BatchNorm, Conv, Dense, Dropout, Identity, LeakyReLU, Residual, Tanh
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.statistics import AffineStatistics, Scale

ONES = np.ones((2, 1, 3))

CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: KFACBlock(sharing="reduce"), r"KFACBlock sharing: expected a function, got 'reduce'"),
    (lambda: KFACBlock(rule=Ladder), r"KFACBlock rule: expected a function, got <class"),
    (lambda: KFACBlock(exact_damping=1), r"KFACBlock exact_damping: expected True or False, got 1"),
    (lambda: KFACBlock(elementwise=3), r"KFACBlock elementwise: expected a Block, got 3"),
    (lambda: BlockDiagonal(KFACBlock), r"BlockDiagonal block: expected a Block, got <class"),
    (lambda: BlockDiagonal(EKFAC()), r"BlockDiagonal block: expected a Block, got EKFAC"),
    (
        lambda: BlockDiagonal(overrides={0: DiagonalBlock()}),
        r"BlockDiagonal overrides: path: expected a str, got 0",
    ),
    (
        lambda: BlockDiagonal(overrides={"0": DiagonalBlock}),
        r"BlockDiagonal overrides\['0'\]: expected a Block, got <class",
    ),
    (lambda: EKFAC(sharing="expand"), r"EKFAC sharing: expected a function"),
    (
        lambda: convolution_block(AffineStatistics(ONES, ONES), Scale(2, 2), "IAD"),
        r"convolution_block assumptions: expected an Assumption, got 'IAD'",
    ),
    (lambda: Residual(Tanh), r"Residual inner: expected a Layer, got <class"),
    (lambda: Residual(Tanh(), 3), r"Residual shortcut: expected a Layer or None, got 3"),
    (lambda: Dropout("0.5"), r"Dropout rate: expected a number in \[0, 1\), got '0.5'"),
    (lambda: Dropout(None), r"Dropout rate: expected a number in \[0, 1\), got None"),
    (lambda: LeakyReLU("x"), r"LeakyReLU slope: expected a number in \[0, 1\], got 'x'"),
    (lambda: LeakyReLU(True), r"LeakyReLU slope: expected a number"),
    (lambda: BatchNorm(3, epsilon=None), r"BatchNorm: expected epsilon .* got None"),
    (lambda: BatchNorm(3, epsilon=True), r"BatchNorm: expected epsilon .* got True"),
    (lambda: Dense(True, 3), r"Dense d_in: expected an integer > 0, got True"),
    (lambda: Dense(3, 3, bias="no"), r"Dense bias: expected True or False, got 'no'"),
    (lambda: Conv(2, 2, (3,), bias=2.5), r"Conv bias: expected True or False, got 2.5"),
    (lambda: Conv(2, 2, (3,), initializer="he"), r"Conv initializer: expected a function"),
]


@pytest.mark.parametrize(("make", "match"), CASES, ids=[match for _, match in CASES])
def test_parts(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()


def test_masks_are_not_lost() -> None:
    objective = Objective(Identity(), SquaredError())
    z = np.ones((2, 3))
    for x, t in ((np.ma.masked_array(z, z > 0), z), (z, np.ma.masked_array(z, z > 0))):
        with pytest.raises(InputError, match=r"expected an array without a mask, got MaskedArray"):
            objective.evaluate((), x, t)


def test_half_precision() -> None:
    x = np.ones((2, 3), dtype=np.float16)
    with pytest.raises(InputError, match=r"expected an array of float32 or float64, got .*float16"):
        Objective(Identity(), SquaredError()).evaluate((), x, x)


def test_no_positions() -> None:
    x = np.ones((2, 0, 3))
    with pytest.raises(ShapeError, match=r"x: expected no axis to be empty, got shape \(2, 0, 3\)"):
        Objective(Identity(), SquaredError()).evaluate((), x, x)
