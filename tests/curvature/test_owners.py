"""Moments of one curvature given to another: an error that names both, and never a wrong step."""

from __future__ import annotations

import itertools
import re

import pytest
from cases import networks
from curvature_cases import estimate

from kfac_np.backend import Backend
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    Curvature,
    DiagonalBlock,
    ExactBlock,
    FullKronecker,
    FullMatrix,
)
from kfac_np.errors import CurvatureError

OWNERS: dict[str, Curvature] = {
    "KFACBlock": BlockDiagonal(),
    "DiagonalBlock": BlockDiagonal(DiagonalBlock()),
    "ExactBlock": BlockDiagonal(ExactBlock()),
    "EKFAC": EKFAC(),
    "FullMatrix": FullMatrix(),
    "FullKronecker": FullKronecker(),
    "BlockTridiagonal": BlockTridiagonal(),
}


@pytest.mark.parametrize(("maker", "taker"), list(itertools.permutations(OWNERS, 2)))
def test_moments_of_another_curvature_are_refused(backend: Backend, maker: str, taker: str):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    strange, curvature = estimate(OWNERS[maker], e), OWNERS[taker]
    own = estimate(curvature, e)
    match = re.compile(rf"layer \w+: {taker}.* expected moments of its own, got those of {maker} ")
    for action in (
        lambda: curvature.factorise(strange, 0.1),
        lambda: curvature.matrix(strange, e.params),
        lambda: curvature.diagonal(strange, e.params),
        lambda: curvature.block_traces(strange, e.params),
        lambda: curvature.mix(strange, own, 0.5),
    ):
        with pytest.raises(CurvatureError, match=match):
            action()


def test_the_block_of_an_override_counts(backend: Backend):
    e = networks(name="layer_norm_softmax")[0].build(backend).evaluate()
    moments = estimate(BlockDiagonal(), e)
    other = BlockDiagonal(overrides={"1": DiagonalBlock()})
    with pytest.raises(CurvatureError, match=r"layer 1: DiagonalBlock\(\) expected .* \(units\)"):
        other.factorise(moments, 0.1)
    for curvature in (BlockDiagonal(), other):
        curvature.factorise(estimate(curvature, e), 0.1)
