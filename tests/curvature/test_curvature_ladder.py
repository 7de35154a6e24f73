"""The failure ladder: every rung reached, every step recorded, and nothing ever not finite."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import array_api_strict
import numpy as np
import pytest
from cases import networks
from curvature_cases import CURVATURES, estimate, solve_in_own_units
from numerics import EPS, assert_close, flat, host
from waiting import asynchronous, no_sync

from kfac_np import trees
from kfac_np.backend import Array, Backend, Later, Rng, get_backend
from kfac_np.curvature import (
    BlockDiagonal,
    DiagonalBlock,
    ExactBlock,
    FullMatrix,
    KFACBlock,
    LadderEvent,
    pi_frobenius,
    pi_spectral,
)
from kfac_np.curvature.ladder import Ladder
from kfac_np.errors import FactorizationError
from kfac_np.fisher import Exact
from kfac_np.layers import Dense, Layer, ReLU, Sequential
from kfac_np.losses import Loss, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective

HostArray = np.ndarray[Any, Any]
EPS32 = float(np.finfo(np.float32).eps)


def single(backend: Backend) -> Backend:
    return dataclasses.replace(backend, dtype=backend.xp.float32)


def invert(m: Array, damping: float = 0.0, previous: Array | None = None):
    ladder = Ladder("2.1")
    inverse = host(ladder.inverse("A", m, damping, previous)).astype(np.float64)
    assert np.all(np.isfinite(inverse))
    assert_close(inverse.T, inverse, 0.0 if previous is None else 1.0)
    return inverse, ladder.events


def test_no_step_for_a_matrix_that_is_positive_definite(backend: Backend):
    inverse, events = invert(backend.asarray(np.diag([1.0, 4.0])), 1.0)
    assert events == []
    assert_close(inverse, np.diag([0.5, 0.2]))


def test_more_damping_for_a_matrix_that_is_singular(backend: Backend):
    """Zero damping: rounding error of the mean diagonal is multiplied by 10, and by 100.

    Ten roundings leave less than a digit of the inverse, a hundred leave one.
    """
    inverse, events = invert(backend.asarray(np.ones((3, 3))))
    assert events == [LadderEvent("2.1", "A", "more damping", 100 * EPS)]
    # (11ᵀ + d I)⁻¹ = (I - 11ᵀ / 3) / d + ...
    projector = np.eye(3) - np.ones((3, 3)) / 3
    assert_close(inverse, projector / (100 * EPS), 0.02)


def test_more_damping_is_ten_or_a_hundred_times_what_was_asked(backend: Backend):
    for excess, times in ((5.0, 10.0), (50.0, 100.0)):
        m = np.diag([1.0, 1.0, -1e-6 * excess])
        inverse, events = invert(backend.asarray(m), 1e-6)
        assert [(e.rung, e.damping) for e in events] == [("more damping", times * 1e-6)]
        assert_close(inverse, np.linalg.inv(m + times * 1e-6 * np.eye(3)))


def test_double_precision_for_a_matrix_too_singular_for_single(backend: Backend):
    """The part that is singular exceeds the mean, whose rounding error the rungs before add."""
    m = np.diag(np.full(96, 1e-3))
    m[:60, :60] = 1.0
    inverse, events = invert(single(backend).asarray(m))
    damping = EPS32 * np.trace(m) / 96
    assert [(e.rung, e.factor) for e in events] == [("float64", "A")]
    assert events[0].damping == pytest.approx(damping, rel=1e-6)
    expected = np.linalg.inv(m.astype(np.float32) + damping * np.eye(96))
    assert_close(inverse, expected, 1e-6)


def test_eigenvalues_are_clipped_when_more_damping_does_not_help(backend: Backend):
    m = np.diag([2.0, 1.0, -0.5])
    inverse, events = invert(backend.asarray(m), 1e-4)
    assert [(e.layer, e.factor, e.rung) for e in events] == [("2.1", "A", "eigenvalues clipped")]
    assert_close(inverse, np.diag([1 / 2.0001, 1 / 1.0001, 1e4]))


def test_a_second_moment_made_indefinite_by_rounding(backend: Backend):
    """In single precision a moving average of a singular moment has eigenvalues around -1e-7."""
    rows = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32)
    rows[:, 0] = 1.0
    m = (rows.T @ rows) / np.float32(40)
    for _ in range(20):
        m = np.float32(0.95) * m + np.float32(0.05) * ((rows.T @ rows) / np.float32(40))
    values = np.linalg.eigvalsh(m.astype(np.float64))
    assert values[0] < 0.0
    inverse, events = invert(single(backend).asarray(m))
    assert len(events) == 1
    assert np.linalg.eigvalsh(inverse)[0] > 0.0


def test_what_passes_for_positive_definite_by_luck_steps_down_too(backend: Backend):
    """Cholesky factorises a fifth of singular Gram matrices; their inverses have no digit."""
    passed = 0
    for seed in range(30):
        rows = np.random.default_rng(seed).standard_normal((4, 5))
        m = rows.T @ rows
        try:
            np.linalg.cholesky(m)
            passed += 1
        except np.linalg.LinAlgError:
            pass
        _, events = invert(backend.asarray(m))
        assert len(events) == 1
    assert passed >= 3


def test_scales_of_coordinates_are_not_singularity(backend: Backend):
    """diag(1, 1e-30) is perfectly invertible: what counts is a pivot against its diagonal."""
    inverse, events = invert(backend.asarray(np.diag([1.0, 1e-30])))
    assert events == []
    assert_close(np.diag(inverse), np.asarray([1.0, 1e30]))


def test_a_matrix_too_small_to_invert_is_taken_as_zero(backend: Backend):
    for scale in (1e-30, 1e-37, 1e-40):
        m = scale * np.asarray([[1.0, -1.0], [-1.0, 1.0]])
        _, events = invert(single(backend).asarray(m))
        assert [e.rung for e in events] == ["more damping"]
        assert events[0].damping > 1e-37
        _, events = invert(single(backend).asarray(scale * np.eye(2)))
        assert len(events) == (0 if scale > 1e-38 else 1)


# Through a curvature: the last good inverse, and errors that name the layer.

GOOD = {"A": np.diag([1.0, 2.0]), "G": np.diag([3.0, 4.0])}


def kronecker_moments(backend: Backend, **bad: float) -> dict[str, dict[str, Array]]:
    found = {}
    for name, m in GOOD.items():
        m = m.copy()
        if name in bad:
            m[0, 1] = m[1, 0] = bad[name]
        found[name] = backend.asarray(m)
    return {"2.1": found}


BLOCKS = {
    "trace": KFACBlock(),
    "frobenius": KFACBlock(rule=pi_frobenius),
    "spectral": KFACBlock(rule=pi_spectral),
    "exact": KFACBlock(exact_damping=True),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["A", "G"])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_last_good_inverse_is_kept(backend: Backend, block: str, name: str, bad: float):
    curvature = BlockDiagonal(BLOCKS[block])
    old, events = curvature.factorise(kronecker_moments(backend), 0.25)
    assert not events
    new, events = curvature.factorise(kronecker_moments(backend, **{name: bad}), 0.25, old)
    factor = "A, G" if block == "exact" else name
    assert [(e.layer, e.factor, e.rung) for e in events] == [
        ("2.1", factor, "kept the last inverse")
    ]
    kept = old["2.1"] if block == "exact" else {f"{name}_inverse": old["2.1"][f"{name}_inverse"]}
    for key, value in kept.items():
        np.testing.assert_array_equal(host(new["2.1"][key]), host(value))
    assert all(np.all(np.isfinite(host(x))) for x in trees.leaves(new))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["A", "G"])
@pytest.mark.parametrize("block", BLOCKS)
def test_without_a_last_good_inverse_the_error_names_the_layer(backend, block, name, bad):
    moments = kronecker_moments(backend, **{name: bad})
    match = r"layer 2\.1: factor (A|G|A, G) is not finite and there is no earlier inverse"
    with pytest.raises(FactorizationError, match=match):
        BlockDiagonal(BLOCKS[block]).factorise(moments, 0.25)


@pytest.mark.parametrize(
    ("curvature", "path", "key", "shape"),
    [
        (BlockDiagonal(DiagonalBlock()), "3", "diagonal", (2, 2)),
        (BlockDiagonal(ExactBlock()), "3", "block", (4, 4)),
        (FullMatrix(), "full", "matrix", (4, 4)),
    ],
    ids=["diagonal", "exact", "full"],
)
def test_every_other_curvature_keeps_its_inverse_too(backend, curvature, path, key, shape):
    good = np.ones(shape) if key == "diagonal" else np.eye(4)
    bad = good.copy()
    bad[1, 1] = np.nan
    moments = {path: {key: backend.asarray(bad)}}
    with pytest.raises(FactorizationError, match=f"layer {path}: factor {key} is not finite"):
        curvature.factorise(moments, 0.25)
    old, _ = curvature.factorise({path: {key: backend.asarray(good)}}, 0.25)
    new, events = curvature.factorise(moments, 0.25, old)
    assert [(e.layer, e.factor, e.rung) for e in events] == [(path, key, "kept the last inverse")]
    np.testing.assert_array_equal(flat(trees.ravel(new)), flat(trees.ravel(old)))


def test_a_rule_that_gives_no_number_ends_on_the_last_rung(backend: Backend):
    block = KFACBlock(rule=lambda A, G, gamma: (np.nan, gamma))
    moments = kronecker_moments(backend)
    with pytest.raises(FactorizationError, match=r"layer 2\.1: factor A is not finite"):
        BlockDiagonal(block).factorise(moments, 0.25)
    old, _ = BlockDiagonal().factorise(moments, 0.25)
    new, events = BlockDiagonal(block).factorise(moments, 0.25, old)
    assert [(e.factor, e.rung) for e in events] == [("A", "kept the last inverse")]
    np.testing.assert_array_equal(host(new["2.1"]["A_inverse"]), host(old["2.1"]["A_inverse"]))


def test_an_eigendecomposition_that_fails_ends_on_the_last_rung(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
):
    """LAPACK may fail to converge, if never on a matrix that one could write down."""

    def failing(m: Array):
        raise FactorizationError("no convergence")

    monkeypatch.setattr("kfac_np.curvature.ladder.eigh", failing)
    indefinite = backend.asarray(np.diag([1.0, -1.0]))
    kept, events = invert(indefinite, 1e-4, previous=backend.eye(2))
    assert [e.rung for e in events] == ["kept the last inverse"]
    np.testing.assert_array_equal(kept, np.eye(2))
    with pytest.raises(FactorizationError, match=r"layer 2\.1: factor A"):
        invert(indefinite, 1e-4)


def test_events_read_well():
    event = LadderEvent("2.1", "A", "kept the last inverse", 0.25)
    assert str(event) == "2.1.A: kept the last inverse (damping 0.25)"


# Networks and data that make singular, zero or tiny factors, at every damping.


@dataclass(frozen=True)
class Hostile:
    """A problem whose factors are not what a factorisation would like."""

    network: Layer
    x: HostArray
    t: HostArray
    loss: Loss = SquaredError()
    bias: float = 0.0

    def evaluate(self, backend: Backend) -> Evaluation:
        rng = np.random.default_rng(1)

        def fresh(p: Array) -> Array:
            w = 0.5 * rng.standard_normal(p.shape)
            w[: max(1, p.shape[0] // 2), -1] += self.bias
            return backend.asarray(w)

        params = trees.tree_map(fresh, self.network.init(Rng(0), backend))
        t = backend.asarray(self.t)
        return Objective(self.network, self.loss).evaluate(params, backend.asarray(self.x), t)


def _hostile() -> dict[str, Hostile]:
    rng = np.random.default_rng(0)
    net = Sequential(Dense(3, 4), ReLU(), Dense(4, 3), ReLU(), Dense(3, 2))
    x, t = rng.standard_normal((20, 3)), rng.standard_normal((20, 2))
    flat_features, constant = x.copy(), x.copy()
    flat_features[:, 1] = 0.0
    constant[:, 1] = 5.0
    one_class = np.zeros(20, dtype=int)
    return {
        "dead units": Hostile(net, x, t, bias=-100.0),
        "a dead layer": Hostile(Sequential(Dense(3, 1), ReLU(), Dense(1, 2)), x, t, bias=-100.0),
        "a feature that is zero": Hostile(net, flat_features, t),
        "a feature that is constant": Hostile(net, constant, t),
        "a feature twice": Hostile(net, x[:, [0, 1, 1]], t),
        "features of very different scale": Hostile(net, x * [1e-6, 1.0, 1e4], t),
        "one example": Hostile(net, x[:1], t[:1]),
        "all inputs zero": Hostile(net, 0 * x, t),
        "no error left": Hostile(Dense(3, 2, bias=False), 0 * x, 0 * t),
        "one class of softmax certain": Hostile(
            Dense(3, 2), 0 * x, one_class, SoftmaxCrossEntropy(), bias=60.0
        ),
    }


HOSTILE = _hostile()
ALL = {name: case.curvature for name, case in CURVATURES.items()}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", HOSTILE)
def test_the_solution_is_finite_at_every_damping(backend: Backend, name: str, precision: str):
    """λ → 0, and huge λ; warnings, too, would be errors here."""
    e = HOSTILE[name].evaluate(backend if precision == "float64" else single(backend))
    gradient = e.gradient()
    for curvature in ALL.values():
        moments = estimate(curvature, e, Exact())
        for damping in (1e-300 if precision == "float64" else 1e-38, 1e-12, 1e30):
            factors, _ = curvature.factorise(moments, damping)
            solution = curvature.solve(factors, gradient)
            assert np.all(np.isfinite(flat(solution)))
            assert all(np.all(np.isfinite(host(f))) for f in trees.leaves(factors))
            if precision == "float32":
                solution, _ = solve_in_own_units(curvature, e, gradient, damping, measured=True)
                assert np.all(np.isfinite(flat(solution)))


@pytest.mark.parametrize("name", HOSTILE)
def test_enough_damping_needs_no_ladder(backend: Backend, name: str):
    e = HOSTILE[name].evaluate(backend)
    for curvature in ALL.values():
        _, events = curvature.factorise(estimate(curvature, e), 1e-3)
        assert [event for event in events if event.rung != "zero up to rounding"] == []


# On an asynchronous device: array_api_strict stands for it.


@pytest.fixture
def strict() -> Backend:
    return get_backend("array_api_strict", "float64", array_api_strict.Device("device1"))


WAITING = ("kfac spectral", "kfac exactly damped")
"""Whose eigendecompositions are looked at one by one."""


@pytest.mark.parametrize("name", [name for name in ALL if name != "kfac spectral"])
def test_factorising_waits_once(name: str, strict: Backend, monkeypatch: pytest.MonkeyPatch):
    """Whether all went well is read at the end, together."""
    e = networks(name="tanh_squared")[0].build(strict).evaluate()
    curvature, reads, numpy = ALL[name], [], Later.numpy
    moments = estimate(curvature, e)
    monkeypatch.setattr(Later, "numpy", lambda self: (reads.append(self), numpy(self))[1])
    with asynchronous(), no_sync(late_reads=True):
        _, events = curvature.factorise(moments, 1e-3)
    assert not events
    if name not in WAITING:
        assert len(reads) == 1


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("name", ["dead units", "one example", "no error left"])
def test_a_layer_whose_deferred_checks_fail_is_factorised_again(name: str, strict: Backend):
    """As a device would have it that does not work ahead; it does not warn, either."""
    e = HOSTILE[name].evaluate(strict)
    kinds = ("kfac", "kfac reduce", "diagonal", "exact blocks", "full", "ekfac", "tridiagonal")
    for curvature in (CURVATURES[kind].curvature for kind in kinds):
        moments = estimate(curvature, e)

        def outcome(damping: float, curvature=curvature, moments=moments) -> tuple[Any, str]:
            try:
                factors, events = curvature.factorise(moments, damping)
            except FactorizationError as error:
                return [], str(error)
            return flat(trees.ravel(factors)), str(events)

        for damping in (0.0, 1e-30, 1e-3):
            expected, said = outcome(damping)
            with asynchronous():
                found, happened = outcome(damping)
            assert happened == said
            assert damping or said.endswith("is singular; give a damping > 0")
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ALL)
def test_a_singular_curvature_has_no_inverse_without_damping(backend: Backend, name: str):
    """`factorise` says so, with earlier factors or without, and so does `solve` of the matrix."""
    e = HOSTILE["dead units"].evaluate(backend)
    curvature = ALL[name]
    moments = estimate(curvature, e)
    for old in (None, curvature.factorise(moments, 1.0)[0]):
        with pytest.raises(FactorizationError, match=r"^layer (0|2|4|full): factor .* is singular"):
            curvature.factorise(moments, 0.0, old)
    with pytest.raises(FactorizationError, match="numerically singular"):
        curvature.matrix(moments, e.params).solve(e.gradient())


@pytest.mark.parametrize("name", CURVATURES)
def test_huge_damping_makes_the_step_the_gradient(backend: Backend, name: str):
    """λ (C + λI)⁻¹ v → v, from below, with an error of ‖C‖/λ; of its root for two factors."""
    case = networks(name="tanh_squared")[0]
    e = case.build(backend).evaluate()
    v, curvature = case.tangent(backend), CURVATURES[name].curvature
    moments = estimate(curvature, e)
    damping = 1e16 if name != "kfac plain" else 1e8
    factors, _ = curvature.factorise(moments, damping)
    power = 2.0 if name == "kfac plain" else 1.0  # (λ + …)² there
    assert_close(damping**power * flat(curvature.solve(factors, v)), flat(v), 1e-6)


@pytest.mark.parametrize("name", CURVATURES)
def test_small_damping_tends_to_none(backend: Backend, name: str):
    e = networks(name="dense_alone")[0].build(backend).evaluate()
    v = networks(name="dense_alone")[0].tangent(backend)
    curvature = CURVATURES[name].curvature
    moments = estimate(curvature, e)
    limit, events = curvature.factorise(moments, 0.0)
    assert not events
    expected = flat(curvature.solve(limit, v))
    factors, _ = curvature.factorise(moments, 1e-12)
    assert_close(flat(curvature.solve(factors, v)), expected, 1e-4)
    factors, _ = curvature.factorise(moments, 1e-30)
    assert_close(flat(curvature.solve(factors, v)), expected)
