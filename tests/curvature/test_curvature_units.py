"""Scale and shift: which blocks cover them, and the 2×2 blocks of `UnitBlock`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from cases import NetworkCase, networks
from curvature_cases import dense, estimate, layer_slices
from numerics import assert_close, flat, host
from references.dense import dense as reference_of

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import (
    Block,
    BlockDiagonal,
    DiagonalBlock,
    ExactBlock,
    KFACBlock,
    Ladder,
    UnitBlock,
    describe,
)
from kfac_np.errors import CurvatureError
from kfac_np.fisher import Empirical, Exact, InputOnly, MonteCarlo
from kfac_np.statistics import AffineStatistics, ElementwiseStatistics, Scale

# The path of the scale and shift in each of them.
NORMALISED = {
    "layer_norm_softmax": "1",
    "rms_norm_positions": "1",
    "group_norm_sigmoid": "1",
    "batch_norm_softmax": "1",
    "batch_norm_positions": "1",
}


@pytest.fixture(params=NORMALISED)
def case(request: pytest.FixtureRequest) -> NetworkCase:
    return networks(name=request.param)[0]


def of_units(block: np.ndarray, rows: int) -> np.ndarray:
    """A block without what couples channels."""
    channels = len(block) // rows
    m = block.reshape(rows, channels, rows, channels)
    return (m * np.eye(channels)[None, :, None, :]).reshape(block.shape)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_unit_blocks_are_those_of_the_fisher(case: NetworkCase, fisher: str, backend: Backend):
    """Against automatic differentiation, of coupled examples, too: the whole batch is squared."""
    e, path = case.build(backend).evaluate(), NORMALISED[case.name]
    kind = Exact() if fisher == "exact" else Empirical()
    expected = getattr(reference_of(case), "fisher" if fisher == "exact" else "empirical")
    place = dict(layer_slices(e.params))[path]
    rows = dict(trees.items(e.params))[path].shape[0]
    for curvature in (BlockDiagonal(), BlockDiagonal(overrides={path: UnitBlock()})):
        found = dense(curvature, e, kind)[place, place]
        assert_close(found, of_units(expected[place, place], rows))
    for elementwise, whole in (
        (ExactBlock(), expected[place, place]),
        (DiagonalBlock(), np.diag(np.diag(expected[place, place]))),
    ):
        curvature = BlockDiagonal(KFACBlock(elementwise=elementwise))
        assert_close(dense(curvature, e, kind)[place, place], whole)


def test_what_couples_channels_is_left_out(case: NetworkCase):
    """By how much: the distance to the exact block, relative to it."""
    reference, path = reference_of(case), NORMALISED[case.name]
    place = dict(layer_slices(case.host()[0]))[path]
    block = reference.fisher[place, place]
    rows = dict(trees.items(case.host()[0]))[path].shape[0]
    lost = np.linalg.norm(block - of_units(block, rows)) / np.linalg.norm(block)
    assert 0.05 < lost < 0.95


def test_the_damping_is_exact(case: NetworkCase, backend: Backend):
    e, path = case.build(backend).evaluate(), NORMALISED[case.name]
    p = dict(trees.items(e.params))[path]
    moments = estimate(BlockDiagonal(), e)[path]
    v = Rng(3).normal(p.shape, backend)
    for damping in (1e-3, 1.0, 1e4):
        factors = UnitBlock().factorise(moments, damping, Ladder(path))
        solution = flat(UnitBlock().solve(factors, v))
        matrix = host(UnitBlock().matrix(moments, p.shape).to_dense())
        expected = np.linalg.solve(matrix + damping * np.eye(len(matrix)), flat(v))
        assert_close(solution, expected)


def test_without_damping_singular_units_go_through_the_ladder(backend: Backend):
    """One example makes rank one: of the two directions of a unit one has no curvature."""
    s = ElementwiseStatistics(Rng(0).normal((1, 1, 3), backend), backend.ones((1, 1, 3)), True)
    moments = UnitBlock().moments(s, Scale(1, 1))
    ladder = Ladder("1")
    factors = UnitBlock().factorise(moments, 0.0, ladder)
    assert [(event.factor, event.rung) for event in ladder.events] == [
        ("units", "eigenvalues clipped")
    ]
    gradient = s.gradient()  # lies where there is curvature
    assert np.all(np.isfinite(flat(UnitBlock().solve(factors, gradient))))
    step = UnitBlock().solve(factors, gradient)
    assert_close(UnitBlock().matrix(moments, (2, 3)).matvec(step), gradient, 1e-10)
    bad = {"units": float("nan") * moments["units"]}
    kept = UnitBlock().factorise(bad, 0.1, ladder, factors)
    assert kept is factors
    assert ladder.events[-1].rung == "kept the last inverse"


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 0.0]])
def test_input_only_squares_what_is_scaled(weights, backend: Backend):
    """The mean over examples and locations of (x̂, 1)(x̂, 1)ᵀ, as A is elsewhere; G = I."""
    x = Rng(1).normal((4, 3, 2), backend)
    for shift in (True, False):
        s = ElementwiseStatistics(x, backend.zeros((0, 4, 3, 2)), shift)
        w = None if weights is None else backend.asarray(weights)
        found = UnitBlock().moments(s, Scale(4, 4, w))["units"]
        each = np.repeat(np.ones(4) if weights is None else weights, 3)
        rows = host(x).reshape(12, 2)
        u = np.stack([rows, np.ones_like(rows)])[: 1 + shift]
        assert_close(found, np.einsum("r,irc,jrc->cij", each, u, u) / each.sum())


def test_a_network_with_normalisation_has_input_only_curvature(case: NetworkCase, backend: Backend):
    e = case.build(backend).evaluate()
    curvature = BlockDiagonal()
    factors, events = curvature.factorise(estimate(curvature, e, InputOnly()), 0.1)
    assert not events
    assert float(trees.inner(curvature.solve(factors, e.gradient()), e.gradient())) > 0


# ------------------------------------------------------------------------- what is not covered


@dataclass(frozen=True)
class AffineOnly(Block):
    """A block that knows dense layers alone, as one of a user might."""

    inner: DiagonalBlock = DiagonalBlock()

    def supports(self, statistics):
        return isinstance(statistics, AffineStatistics)

    def input_moments(self, s, scale):
        return self.inner.input_moments(s, scale)

    def moments(self, s, scale):
        return self.inner.moments(s, scale)

    def matrix(self, moments, shape):
        return self.inner.matrix(moments, shape)

    def factorise(self, moments, damping, ladder, previous=None):
        return self.inner.factorise(moments, damping, ladder, previous)

    def solve(self, factors, v):
        return self.inner.solve(factors, v)

    def cost(self, shape, kind=AffineStatistics):
        return self.inner.cost(shape, kind)


@pytest.mark.parametrize("fisher", [Exact(), MonteCarlo(1), Empirical()], ids=repr)
def test_a_parameter_that_no_block_covers_is_an_error(fisher, backend: Backend):
    e = networks(name="layer_norm_softmax")[0].build(backend).evaluate()
    match = (
        r"^layer 1: AffineOnly\(.*\) does not support ElementwiseStatistics; name another block "
        "for it in `overrides`$"
    )
    for curvature in (
        BlockDiagonal(AffineOnly()),
        BlockDiagonal(AffineOnly(), overrides={"0": DiagonalBlock()}),
    ):
        with pytest.raises(CurvatureError, match=match):
            estimate(curvature, e, fisher)
    with pytest.raises(
        CurvatureError, match=r"layer 1: KFACBlock\(.*\) does not support Elementwise"
    ):
        estimate(BlockDiagonal(KFACBlock(elementwise=AffineOnly())), e, fisher)
    with pytest.raises(CurvatureError, match=r"layer 0: UnitBlock\(\) does not support Affine"):
        estimate(BlockDiagonal(UnitBlock()), e, fisher)
    named = BlockDiagonal(AffineOnly(), overrides={"1": UnitBlock()})
    assert set(estimate(named, e, fisher)["1"]) == {"units"}


@pytest.mark.parametrize(
    ("name", "path", "layer", "factors"),
    [
        ("batch_norm_softmax", "1", "BatchNorm(3)", "3 blocks 2×2"),
        ("embedding_flattened", "0", "Embedding(4, 2)", "A diagonal 4, G 2×2"),
        ("rms_norm_positions", "1", "RMSNorm(3)", "3 blocks 1×1"),
    ],
)
def test_the_layer_table_knows_them(
    name: str, path: str, layer: str, factors: str, backend: Backend
):
    case = networks(name=name)[0]
    table = describe(case.network, case.build(backend).params, BlockDiagonal(), case.shape[1:])
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert layer in lines[path]
    assert factors in lines[path]
