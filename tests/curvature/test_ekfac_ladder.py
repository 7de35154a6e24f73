"""EKFAC: what happens on failure, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import pytest
from cases import networks
from curvature_cases import estimate
from numerics import assert_close, flat, host

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    DiagonalBlock,
    ExactBlock,
    LadderEvent,
    describe,
    reduce,
)
from kfac_np.curvature.networks.ekfac_moments import resolve
from kfac_np.errors import ConfigError, CurvatureError, DivergenceError, FactorizationError
from kfac_np.fisher import Exact, FisherType, InputOnly
from kfac_np.layers import Conv, Dense, Flatten, LayerNorm, Logistic, Sequential
from kfac_np.losses import SigmoidCrossEntropy
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers import KFAC, LevenbergMarquardt, Refresh
from kfac_np.statistics import Statistics

NETWORK = Sequential(Dense(8, 6), Logistic(), Dense(6, 8))
OBJECTIVE = Objective(NETWORK, SigmoidCrossEntropy())


def small(backend: Backend) -> Evaluation:
    return networks(name="tanh_squared")[0].build(backend).evaluate()


def failing(m: Array) -> Any:
    """What LAPACK may do, if never on a matrix that one could write down."""
    raise FactorizationError("no convergence")


def test_the_first_basis_fails(backend: Backend, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kfac_np.curvature.factors.resolved_eigh", failing)
    with pytest.raises(FactorizationError, match="layer 0: factors A, G: no convergence"):
        estimate(EKFAC(), small(backend))


def test_a_later_basis_fails(backend: Backend, monkeypatch: pytest.MonkeyPatch):
    """The last one is kept, and told; S and its averages go on, and the next estimate tries."""
    e, curvature = small(backend), EKFAC(basis_interval=2)
    first = estimate(curvature, e)
    second = curvature.mix(first, curvature.estimate(e, Exact(), Rng(0), first), 0.5)
    assert curvature.factorise(second, 0.1)[1] == []
    monkeypatch.setattr("kfac_np.curvature.factors.resolved_eigh", failing)
    third = curvature.mix(second, curvature.estimate(e, Exact(), Rng(0), second), 0.5)
    monkeypatch.undo()
    for path, m in third.items():
        assert float(m["age"]) == 2.0
        for name, x in m.items():
            if name != "age":
                assert_close(x, first[path][name], 1e-14)
    factors, events = curvature.factorise(third, 0.1)
    assert events == [LadderEvent(path, "A, G", "kept the last basis", 0.1) for path in third]
    assert all(np.all(np.isfinite(host(x))) for x in trees.leaves(factors))
    fourth = curvature.estimate(e, Exact(), Rng(0), third)
    assert {float(m["age"]) for m in fourth.values()} == {0.0}
    assert curvature.factorise(fourth, 0.1)[1] == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["S", "U_A", "U_G"])
def test_moments_that_are_not_finite_keep_the_last_factors(backend: Backend, name: str, bad: float):
    curvature = EKFAC()
    good = estimate(curvature, small(backend))
    spoiled = host(good["2"][name]).copy()
    spoiled[0, 0] = bad
    moments = {**good, "2": {**good["2"], name: backend.asarray(spoiled)}}
    with pytest.raises(FactorizationError, match="layer 2: factor S is not finite"):
        curvature.factorise(moments, 0.25)
    old, _ = curvature.factorise(good, 0.5)
    new, events = curvature.factorise(moments, 0.25, old)
    assert events == [LadderEvent("2", "S", "kept the last inverse", 0.25)]
    np.testing.assert_array_equal(flat(new["2"]), flat(old["2"]))
    assert np.max(np.abs(flat(new["0"]) - flat(old["0"]))) > 0


def test_eigenvalues_that_are_zero_or_negative_are_clipped(backend: Backend):
    m = {
        "A": np.eye(3),
        "G": np.eye(2),
        "U_A": np.eye(3),
        "U_G": np.eye(2),
        "S": np.asarray([[2.0, 0.0, 1.0], [1.0, -1e-20, 3.0]]),
        "age": np.zeros(()),
    }
    moments = {"0": {name: backend.asarray(x) for name, x in m.items()}}
    with pytest.raises(FactorizationError, match="layer 0: factor S is singular; give a damping"):
        EKFAC().factorise(moments, 0.0)
    factors, events = EKFAC().factorise(moments, 1e-30)
    least = 3.0 * float(np.finfo(float).eps)
    assert events == [LadderEvent("0", "S", "eigenvalues clipped", least)]
    expected = 1 / np.asarray([[2.0, least, 1.0], [1.0, least, 3.0]])
    assert_close(factors["0"]["inverse_values"], expected)
    factors, events = EKFAC().factorise(moments, 0.5)
    assert not events
    assert_close(factors["0"]["inverse_values"], 1 / (m["S"] + 0.5))
    # of grouped layers, each has its own least
    both = {name: backend.asarray(np.stack([x, 8.0 * x])) for name, x in m.items() if name != "age"}
    moments = {"0": both | {"age": moments["0"]["age"]}}
    _, events = EKFAC().factorise(moments, 1e-30)
    assert [(event.layer, event.damping) for event in events] == [
        ("0[group 0]", least),
        ("0[group 1]", 8.0 * least),
    ]


def test_what_overflows_is_not_rounding(backend: Backend):
    found = host(resolve(backend.asarray(np.asarray([[1.0, np.inf, 2.0]]))))
    assert not np.all(np.isfinite(found))


@final
@dataclass(frozen=True)
class Spoiled(FisherType):
    """Exact vectors, of one step times Inf."""

    step: int

    def vectors(self, e: Evaluation, rng: Rng) -> Iterator[Array]:
        for v in Exact().vectors(e, rng):
            yield v * math.inf if rng.keys[-1] == self.step else v


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_batch_whose_moments_are_not_finite(backend: Backend):
    """Rejected, the basis and its age as before; at the first step an error names the layer."""
    curvature = EKFAC(basis_interval=4)
    optimizer = KFAC(
        OBJECTIVE,
        curvature=curvature,
        fisher=Spoiled(3),
        damping=LevenbergMarquardt(1.0),
        refresh=Refresh(1),
    )
    x = Rng(1).uniform((64, 8), backend)
    states = [optimizer.init(NETWORK.init(Rng(0), backend))]
    for k in range(1, 7):
        state, report = optimizer.step(states[-1], x, x)
        states.append(state)
        assert bool(report.events) == (k == 3)
        if k == 3:
            assert {event.rung for event in report.events} == {"moments rejected"}
    ages = [float(state.moments["0"]["age"]) for state in states[1:]]
    assert ages == [0.0, 1.0, 1.0, 2.0, 3.0, 0.0]
    assert_close(states[3].moments, states[2].moments)
    optimizer = replace(optimizer, fisher=Spoiled(1))
    with pytest.raises(
        DivergenceError, match=r"step 1: layer 0: the moments A, G, S, .* not finite"
    ):
        optimizer.step(states[0], x, x)


# ------------------------------------------------------------------------ what is said and refused


def test_inputs_without_vectors_are_refused(backend: Backend):
    for name, layer in (("tanh_squared", "0"), ("layer_norm_softmax", "0")):
        e = networks(name=name)[0].build(backend).evaluate()
        match = rf"layer {layer}: EKFAC: expected a Fisher type with vectors, got InputOnly"
        with pytest.raises(CurvatureError, match=match):
            estimate(EKFAC(), e, InputOnly())


def test_reduce_is_refused_where_it_is_not_defined(backend: Backend):
    e = networks(name="positions_softmax")[0].build(backend).evaluate()
    with pytest.raises(CurvatureError, match="layer 0: reduce: expected one loss term an example"):
        estimate(EKFAC(reduce), e)


def test_moments_of_another_curvature_are_refused(backend: Backend):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    old = estimate(BlockDiagonal(), e)
    match = r"layer 0: EKFAC expected moments of its own, got those of KFACBlock \(A, G\)"
    with pytest.raises(CurvatureError, match=match):
        EKFAC().estimate(e, Exact(), Rng(0), old)


@pytest.mark.parametrize("interval", [0, -1, 2.5, True])
def test_intervals_that_make_no_sense_are_refused(interval: Any):
    with pytest.raises(ConfigError, match="basis_interval: expected an integer > 0"):
        EKFAC(basis_interval=interval)


def test_blocks_of_scale_and_shift_can_be_chosen(backend: Backend):
    case = networks(name="layer_norm_softmax")[0]
    e = case.build(backend).evaluate()
    for block in (DiagonalBlock(), ExactBlock()):
        curvature = EKFAC(elementwise=block)
        moments, expected = estimate(curvature, e), estimate(BlockDiagonal(block), e)
        matrix = curvature.matrix(moments, e.params)
        paths = [path for path, m in moments.items() if "S" not in m]
        assert paths
        (factors, _), (others, _) = (
            c.factorise(m, 0.1) for c, m in ((curvature, moments), (BlockDiagonal(block), expected))
        )
        for path in paths:
            assert_close(moments[path], expected[path])
            assert_close(factors[path], others[path])
        solved = curvature.solve(factors, e.gradient())
        assert_close(flat(solved), flat(matrix.solve(e.gradient(), 0.1)))


def test_the_table(backend: Backend):
    net = Sequential(Conv(2, 4, (3,), groups=2), LayerNorm(4), Flatten(), Dense(16, 3))
    table = describe(net, net.init(Rng(0), backend), EKFAC(), (6, 2))
    assert "EKFAC      2 × A 4×4, G 2×2, S 2×2×4" in table
    assert "UnitBlock" in table
    assert "EKFAC      A 17×17, G 3×3, S 3×17" in table


def test_parameters_that_it_does_not_know_are_refused(backend: Backend):
    @dataclass(frozen=True, eq=False)
    class Unknown(Statistics):
        num_examples = num_vectors = 1
        parameter_shape = ()

        def gradient(self) -> Array:
            return backend.ones((1,))

        per_example = gradient

    e = small(backend)
    with pytest.raises(CurvatureError, match="layer 0: EKFAC does not support Unknown; expected"):
        EKFAC().input_moments((Unknown(),), e.scale)
