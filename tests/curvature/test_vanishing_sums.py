"""Rounding is not curvature: derivatives that add up to nothing, and inputs that average to it.

Σ_t g vanishes over the keys of an attention, since a softmax does not notice what is added to all
its inputs, and over the pixels of a channel that is normalised on its own. Rounding leaves 1e-16 of
it, and 1e-32 of its square.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from curvature_cases import CURVATURES, estimate, solve_in_own_units
from numerics import flat, host

from kfac_np import trees
from kfac_np.backend import Backend, Rng, above_rounding, get_backend, sums_above_rounding
from kfac_np.curvature import (
    BlockDiagonal,
    BlockTridiagonal,
    DiagonalBlock,
    ExactBlock,
    FullMatrix,
    KFACBlock,
    reduce,
)
from kfac_np.layers import (
    BatchNorm,
    Conv,
    Dense,
    GlobalAveragePool,
    GroupNorm,
    Layer,
    MultiHeadAttention,
    Sequential,
    Tanh,
)
from kfac_np.losses import SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers import KFAC


@dataclass(frozen=True)
class Case:
    """A network, and where derivatives vanish in it."""

    network: Layer
    shape: tuple[int, ...]
    reduced: tuple[str, ...] = ()  # paths of parameters whose Σ_t g vanishes altogether
    biases: tuple[str, ...] = ()  # paths of parameters whose bias has no derivative
    coupled: bool = False

    def evaluate(self, backend: Backend) -> Evaluation:
        params = self.network.init(Rng(0), backend)
        x = Rng(1).normal((16, *self.shape), backend)
        t = Rng(2).normal((16, *self.network.output_shape(self.shape)), backend)
        return Objective(self.network, SquaredError()).evaluate(params, x, t)


def instance_norm(channels: int) -> GroupNorm:
    return GroupNorm(channels, channels, affine=False)


HEAD = (GlobalAveragePool(), Dense(4, 3))
CONVOLUTIONS = Sequential(
    *(Conv(2, 4, (3, 3)), instance_norm(4), Tanh()),
    *(Conv(4, 4, (3, 3)), instance_norm(4), Tanh()),
    *HEAD,
)
CASES = {
    "attention": Case(
        Sequential(MultiHeadAttention(4, 2), *HEAD), (5, 4), reduced=("0.key",), biases=("0.key",)
    ),
    "convolutions": Case(CONVOLUTIONS, (6, 6, 2), reduced=("0", "3"), biases=("0", "3")),
    "grouped": Case(
        Sequential(Conv(4, 4, (3,), groups=2), instance_norm(4), Tanh(), *HEAD),
        (7, 4),
        reduced=("0",),
        biases=("0",),
    ),
    "batch norm": Case(
        Sequential(Dense(4, 4), BatchNorm(4), Tanh(), Dense(4, 3)),
        (4,),
        biases=("0",),
        coupled=True,
    ),
}
REDUCIBLE = [name for name, case in CASES.items() if not case.coupled]


def single(backend: Backend) -> Backend:
    return dataclasses.replace(backend, dtype=backend.xp.float32)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", REDUCIBLE)
def test_reduced_derivatives_that_vanish_are_no_curvature(
    backend: Backend, name: str, precision: str
):
    case = CASES[name]
    e = case.evaluate(backend if precision == "float64" else single(backend))
    block = KFACBlock(sharing=reduce)
    for curvature in (BlockDiagonal(block), BlockTridiagonal(block, split=True)):
        moments = estimate(curvature, e)
        traces = curvature.block_traces(moments, e.params)
        assert {path for path, trace in traces.items() if float(trace) == 0.0} == {*case.reduced}
        _, events = curvature.factorise(moments, 0.1)
        layers = {event.layer.split("[")[0]: (event.factor, event.rung) for event in events}
        assert layers == dict.fromkeys(case.reduced, ("G", "zero up to rounding"))


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_entries_that_vanish_are_no_curvature(backend: Backend, name: str, precision: str):
    """Of exact blocks, whatever makes them: a sum over locations, or over the batch."""
    case = CASES[name]
    e = case.evaluate(backend if precision == "float64" else single(backend))
    blocks = (BlockDiagonal(DiagonalBlock()), BlockDiagonal(ExactBlock()), FullMatrix())
    for curvature in blocks:
        diagonal = curvature.diagonal(estimate(curvature, e), e.params)
        for path, entries in trees.items(diagonal):
            bias, others = host(entries)[..., -1], host(entries)[..., :-1]
            assert np.all(bias == 0.0) if path in case.biases else np.all(bias > 0.0)
            assert np.all(others > 0.0)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_steps_in_own_units_where_derivatives_vanish(backend: Backend, name: str, precision: str):
    """A rounding error over the square of one would be 1e16, of single precision 1e7."""
    case = CASES[name]
    e = case.evaluate(backend if precision == "float64" else single(backend))
    gradient = e.gradient()
    for kind in ("kfac", "diagonal", "exact blocks", "full", "ekfac", "kfac reduce"):
        if kind == "kfac reduce" and case.coupled:
            continue
        step, events = solve_in_own_units(CURVATURES[kind].curvature, e, gradient, 0.1)
        assert not events or kind == "kfac reduce"
        assert np.max(np.abs(flat(step))) < 30.0


def test_inputs_whose_mean_vanishes(backend: Backend):
    """Each channel has the mean 0 over the pixels of every example; the bias has 1."""
    network = Sequential(instance_norm(3), Conv(3, 4, (1, 1)), Tanh(), *HEAD)
    e = Case(network, (6, 6, 3)).evaluate(backend)
    moments = estimate(BlockDiagonal(KFACBlock(sharing=reduce)), e)
    expected = np.zeros((4, 4))
    expected[3, 3] = 1.0
    np.testing.assert_array_equal(host(moments["1"]["A"]), expected)


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_a_sum_is_told_from_a_rounding_error(backend: Backend, unit: float):
    """Of 2¹⁶ numbers of random sign 1/2⁸ is left, far above any rounding in single precision."""
    narrow = single(backend)
    x = np.random.default_rng(0).choice([-1.0, 1.0], (1, 2**16, 3))
    x[..., 1] = x[..., 1] - np.mean(x[..., 1])
    g = narrow.asarray(unit * x)
    xp = narrow.xp
    sums, magnitudes = xp.sum(g, axis=-2), xp.sum(xp.abs(g), axis=-2)
    found = host(sums_above_rounding(sums, magnitudes))
    assert found[0, 1] == 0.0
    np.testing.assert_array_equal(found[:, ::2], host(sums)[:, ::2])
    assert np.all(found[:, ::2] != 0.0)


def test_what_is_not_finite_is_kept(backend: Backend):
    bad = backend.asarray(np.asarray([np.nan, np.inf, 0.0]))
    found = host(above_rounding(bad, bad, bad))
    np.testing.assert_array_equal(found, [np.nan, np.inf, 0.0])


def test_convolutions_before_instance_norm_train_by_reduce():
    """With rounding errors for curvature λ is small, and the loss 0.95 of what it was at first.

    One λ for all layers, and no guard that takes back what a small λ brings about.
    """
    backend = get_backend("numpy", "float64")
    e = CASES["convolutions"].evaluate(backend)
    curvature = BlockDiagonal(KFACBlock(sharing=reduce))
    kfac = KFAC(e.objective, curvature=curvature, relative=False, guard=None)
    state, losses = kfac.init(e.params), []
    for _ in range(20):
        state, report = kfac.step(state, e.inputs, e.targets)
        losses.append(report.loss)
    assert losses[-1] < 0.7 * losses[0]
    assert {event.layer for event in report.events} == {"0", "3"}
