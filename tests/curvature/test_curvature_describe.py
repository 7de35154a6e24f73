"""The layer table, blocks chosen by path, and errors that name the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pytest
from cases import networks
from curvature_cases import estimate
from numerics import assert_close, host

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, get_backend
from kfac_np.curvature import (
    Block,
    BlockDiagonal,
    DiagonalBlock,
    ExactBlock,
    FullMatrix,
    KFACBlock,
    describe,
    reduce,
)
from kfac_np.errors import CurvatureError, ShapeError
from kfac_np.layers import Dense, Layer, Residual, Sequential, Tanh
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.trees import Tree

NESTED = Sequential(
    Dense(5, 4),
    Residual(Sequential(Tanh(), Dense(4, 4), Residual(Dense(4, 4, bias=False)))),
    Sequential(Tanh(), Sequential(Dense(4, 2))),
)

TABLE = """\
path   layer                    parameters  block          factors       factorise  solve
0      Dense(5, 4)              4×6 = 24    KFACBlock      A 6×6, G 4×4  560        480
1.1    Dense(4, 4)              4×5 = 20    DiagonalBlock  diagonal 20   20         20
1.2    Dense(4, 4, bias=False)  4×4 = 16    KFACBlock      A 4×4, G 4×4  256        256
2.1.0  Dense(4, 2)              2×5 = 10    ExactBlock     block 10×10   2000       200
total                           70                                       2836       956"""


def parameters(network: Layer) -> Tree:
    return network.init(Rng(0), get_backend("numpy", "float32"))


def test_table_of_nested_containers():
    curvature = BlockDiagonal(overrides={"1.1": DiagonalBlock(), "2.1.0": ExactBlock()})
    assert describe(NESTED, parameters(NESTED), curvature, (5,)) == TABLE


def test_table_of_a_layer_alone_and_of_a_residual_at_the_top():
    alone = describe(Dense(3, 2), parameters(Dense(3, 2)), BlockDiagonal(), (3,))
    assert alone.splitlines()[1].split() == (
        ["Dense(3,", "2)", "2×4", "=", "8", "KFACBlock", "A", "4×4,", "G", "2×2", "144", "96"]
    )
    network = Residual(Sequential(Tanh(), Dense(3, 3)))
    table = describe(network, parameters(network), BlockDiagonal(), (3,))
    assert table.splitlines()[1].split()[:3] == ["1", "Dense(3,", "3)"]


def test_exact_damping_costs_more():
    network = Dense(3, 2)
    exact = BlockDiagonal(KFACBlock(exact_damping=True))
    line = describe(network, parameters(network), exact, (3,)).splitlines()[1]
    assert line.split()[-2:] == ["648", "192"]  # 9 (4³ + 2³), 4 · 2 · 4 (2 + 4)


def test_the_full_matrix_is_listed_by_its_diagonal_blocks():
    lines = describe(NESTED, parameters(NESTED), FullMatrix(), (5,)).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["0", "1.1", "1.2", "2.1.0"]
    assert all("ExactBlock" in line for line in lines[1:-1])


@pytest.mark.parametrize(
    ("d_in", "d_out", "factorise", "solve"),
    [
        (1, 1, "18", "12"),
        (20, 20, "34.5k", "34.4k"),
        (1000, 1000, "4.01G", "4.01G"),
        (20_000, 20, "16T", "16G"),
        (100_000, 2, "2e+15", "40G"),
    ],
)
def test_costs_are_short(d_in: int, d_out: int, factorise: str, solve: str):
    """2 (d_out³ + (d_in + 1)³) and 2 d_out (d_in + 1) (d_out + d_in + 1)."""
    shape = np.broadcast_to(np.float32(0), (d_out, d_in + 1))  # nothing is stored
    line = describe(Dense(d_in, d_out), shape, BlockDiagonal(), (d_in,)).splitlines()[1]
    assert line.split()[-2:] == [factorise, solve]


def test_a_wrong_input_shape_is_refused():
    with pytest.raises(ShapeError, match=r"layer 0: Dense\(5, 4\): expected inputs"):
        describe(NESTED, parameters(NESTED), BlockDiagonal(), (6,))


def test_overrides_reach_nested_parameters(backend: Backend):
    case = networks(name="residual_nested")[0]
    e = case.build(backend).evaluate()
    curvature = BlockDiagonal(
        overrides={"1.1": DiagonalBlock(), "2.1": ExactBlock(), "0": KFACBlock(sharing=reduce)}
    )
    moments = estimate(curvature, e)
    assert {path: set(m) for path, m in moments.items()} == {
        "0": {"A", "G"},
        "1.1": {"diagonal"},
        "1.2": {"A", "G"},
        "2.1": {"block"},
    }
    factors, events = curvature.factorise(moments, 0.1)
    assert not events
    # Every block solves as it does alone.
    v = case.tangent(backend)
    mixed = dict(trees.items(curvature.solve(factors, v)))
    for path, block in {"1.1": DiagonalBlock(), "2.1": ExactBlock(), "1.2": KFACBlock()}.items():
        alone = BlockDiagonal(block)
        alone_factors, _ = alone.factorise(estimate(alone, e), 0.1)
        solution = dict(trees.items(alone.solve(alone_factors, v)))
        assert_close(mixed[path], solution[path])


def test_an_override_for_no_parameter_is_refused(backend: Backend):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    curvature = BlockDiagonal(
        overrides={"1": DiagonalBlock(), "2": DiagonalBlock(), "x": KFACBlock()}
    )
    with pytest.raises(CurvatureError, match="overrides: expected paths among 0, 2; got 1, x"):
        estimate(curvature, e)
    with pytest.raises(CurvatureError, match="overrides: expected paths among 0, 2; got 1, x"):
        describe(e.objective.network, e.params, curvature, (3,))


# A layer whose statistics no block knows.


@final
@dataclass(frozen=True, eq=False)
class ScaleStatistics:
    """What the layer below returns."""

    x: Array
    g: Array


@final
@dataclass(frozen=True)
class Scaling(Layer):
    """y = w x, elementwise."""

    d: int

    def init(self, rng: Rng, backend: Backend) -> Array:
        return backend.ones((self.d,))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def forward(self, params: Array, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        return x * params, x

    def backward(
        self, params: Array, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Any]:
        return g * params, ScaleStatistics(cache, g)

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return cache * dparams if dx is None else cache * dparams + dx * params


@pytest.mark.parametrize("block", [KFACBlock(), DiagonalBlock(), ExactBlock()], ids=repr)
def test_statistics_that_a_block_does_not_support(backend: Backend, block):
    network = Sequential(Dense(3, 2), Sequential(Tanh(), Scaling(2)))
    params = network.init(Rng(0), backend)
    e = Objective(network, SquaredError()).evaluate(
        params, backend.ones((4, 3)), backend.zeros((4, 2))
    )
    match = r"layer 1\.1: .*does not support ScaleStatistics; name another block .*overrides"
    with pytest.raises(CurvatureError, match=match):
        estimate(BlockDiagonal(block), e)
    match = r"layer 1\.1: FullMatrix expected Statistics, got ScaleStatistics"
    with pytest.raises(CurvatureError, match=match):
        estimate(FullMatrix(), e)


@final
@dataclass(frozen=True)
class Silent(Block):
    """The diagonal block, of which nobody told what it costs."""

    inner: Block = DiagonalBlock()

    def supports(self, statistics):
        return self.inner.supports(statistics)

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


def test_a_block_need_not_know_its_cost(backend: Backend):
    network = Sequential(Dense(3, 2), Tanh(), Dense(2, 1))
    curvature = BlockDiagonal(overrides={"0": Silent()})
    lines = describe(network, network.init(Rng(0), backend), curvature, (3,)).splitlines()
    assert lines[1].split()[-3:] == ["Silent", "diagonal", "2×4"]
    assert lines[2].split()[-2:] == lines[3].split()[-2:]  # all that is known is the sum


@final
@dataclass(frozen=True)
class UnitBlock(DiagonalBlock):
    """The identity, for the layer that nothing else supports."""

    def supports(self, statistics: object) -> bool:
        return isinstance(statistics, ScaleStatistics)

    def moments(self, s, scale):
        return {"diagonal": 0.0 * s.x[0, :] + 1.0}


def test_the_remedy_that_the_error_names(backend: Backend):
    network = Sequential(Dense(3, 2), Scaling(2))
    params = network.init(Rng(0), backend)
    e = Objective(network, SquaredError()).evaluate(
        params, backend.ones((4, 3)), backend.zeros((4, 2))
    )
    curvature = BlockDiagonal(overrides={"1": UnitBlock()})
    factors, _ = curvature.factorise(estimate(curvature, e), 1.0)
    solution = curvature.solve(factors, (params[0], 2.0 * params[1]))
    assert_close(host(solution[1]), np.ones(2))
