"""The tridiagonal inverse in trouble: never NaN, always positive definite, always recorded."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from curvature_cases import estimate
from numerics import EPS, assert_close, flat, host

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import BlockDiagonal, BlockTridiagonal, FullKronecker
from kfac_np.errors import FactorizationError
from kfac_np.layers import Dense, Sequential, Tanh
from kfac_np.losses import SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.trees import Tree

CURVATURE = BlockTridiagonal()
NETWORK = Sequential(Dense(3, 4), Tanh(), Dense(4, 3), Tanh(), Dense(3, 2))
PATHS = ("0", "2", "4")


def evaluate(backend: Backend, seed: int = 0, n: int = 20) -> Evaluation:
    rng = np.random.default_rng(seed)
    params = trees.tree_map(
        lambda p: backend.asarray(rng.standard_normal(p.shape)), NETWORK.init(Rng(0), backend)
    )
    x, t = rng.standard_normal((n, 3)), rng.standard_normal((n, 2))
    return Objective(NETWORK, SquaredError()).evaluate(
        params, backend.asarray(x), backend.asarray(t)
    )


def with_bad(moments: Any, path: str, name: str, value: float) -> Any:
    m = moments[path][name]
    bad = 1.0 * m
    bad[0, 1] = value
    return {**moments, path: {**moments[path], name: bad}}


def dense_inverse(factors: Any, like: Tree) -> np.ndarray:
    size = len(flat(trees.ravel(like)))
    backend = Backend.of(trees.leaves(like)[0])
    columns = []
    for row in np.eye(size):
        v = trees.unravel(backend.asarray(row), like)
        columns.append(flat(trees.ravel(CURVATURE.solve(factors, v))))
    return np.stack(columns, axis=1)


def require_definite(factors: Any, like: Tree) -> np.ndarray:
    inverse = dense_inverse(factors, like)
    assert np.all(np.isfinite(inverse))
    assert np.linalg.eigvalsh(0.5 * (inverse + inverse.T))[0] > 0
    return inverse


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["A", "G", "A_next", "G_next"])
def test_moments_that_are_not_finite_keep_the_last_factors(backend: Backend, name: str, bad):
    e = evaluate(backend)
    moments = estimate(CURVATURE, e)
    old, events = CURVATURE.factorise(estimate(CURVATURE, evaluate(backend, 1)), 0.1)
    assert not events
    new, events = CURVATURE.factorise(with_bad(moments, "2", name, bad), 0.1, old)
    assert {event.rung for event in events} == {"kept the last inverse"}
    # A of layer 2 goes into its own inverse, and into the couplings on both sides of it.
    found = {(event.layer, event.factor) for event in events}
    both = {("2", "A_next, G_next")}
    assert found == (both if "next" in name else both | {("2", name), ("0", "A_next, G_next")})
    for key in ("K_A", "K_G", "Psi_A", "Psi_G", "inverse_gaps"):
        np.testing.assert_array_equal(host(new["2"][key]), host(old["2"][key]))
    fresh, _ = CURVATURE.factorise(moments, 0.1)
    for key in ("A_inverse", "G_inverse"):
        np.testing.assert_array_equal(host(new["4"][key]), host(fresh["4"][key]))
    require_definite(new, e.params)


@pytest.mark.parametrize("name", ["A", "G", "A_next", "G_next"])
def test_without_last_factors_the_error_names_the_layer(backend: Backend, name: str):
    moments = with_bad(estimate(CURVATURE, evaluate(backend)), "2", name, np.nan)
    match = f"layer 2: factor .*{name}.* is not finite and there is no earlier inverse"
    with pytest.raises(FactorizationError, match=match):
        CURVATURE.factorise(moments, 0.1)


def test_all_moments_bad_keeps_everything(backend: Backend):
    moments = estimate(CURVATURE, evaluate(backend))
    old, _ = CURVATURE.factorise(moments, 0.1)
    new, events = CURVATURE.factorise(trees.scale(np.nan, moments), 0.1, old)
    np.testing.assert_array_equal(flat(trees.ravel(new)), flat(trees.ravel(old)))
    assert {event.layer for event in events} == set(PATHS)


def test_layers_that_determine_each_other_have_no_gap(backend: Backend):
    """Deep linear, hardly damped: a_{i+1} is a map of a_i, and g_i of g_{i+1}: 1 - s s = 0."""
    network = Sequential(Dense(2, 2), Dense(2, 2), Dense(2, 2))
    rng = np.random.default_rng(0)
    params = tuple(backend.asarray(rng.standard_normal((2, 3))) for _ in range(3))
    x = backend.asarray(rng.standard_normal((30, 2)))
    e = Objective(network, SquaredError()).evaluate(params, x, x)
    moments = estimate(CURVATURE, e)
    with pytest.raises(FactorizationError, match="layer 0: factor Sigma is singular"):
        CURVATURE.factorise(moments, 0.0)
    factors, events = CURVATURE.factorise(moments, 1e-40)
    assert [(event.layer, event.factor, event.rung) for event in events] == [
        ("0", "Sigma", "eigenvalues clipped"),
        ("1", "Sigma", "eigenvalues clipped"),
    ]
    assert all(3 * EPS <= event.damping < 1e-12 for event in events)
    for path in ("0", "1"):
        gaps = 1.0 / host(factors[path]["inverse_gaps"])
        assert np.all(gaps >= 3 * EPS)
        assert np.all(gaps < 1e-12)
    assert np.all(np.isfinite(dense_inverse(factors, e.params)))
    # With the least damping worth its name nothing is clipped.
    _, events = CURVATURE.factorise(moments, 1e-8)
    assert not events


@pytest.mark.parametrize("excess", [1e-9, 0.05, 3.0])
def test_moments_that_contradict_each_other(backend: Backend, excess: float):
    """|A_{i,i+1}| larger than A_i and A_{i+1} allow, as averages of other batches may be."""
    e = evaluate(backend)
    eye = backend.eye
    moments = {
        "0": {"A": eye(4), "A_next": eye(5)[:4, :], "G": eye(4), "G_next": eye(4)[:, :3]},
        "2": {"A": eye(5), "G": eye(3)},
    }
    moments["0"]["A_next"] = (1.0 + excess) ** 0.5 * moments["0"]["A_next"]
    factors, events = CURVATURE.factorise(moments, 1e-40)
    assert [(event.layer, event.factor, event.rung) for event in events] == [
        ("0", "Sigma", "eigenvalues clipped")
    ]
    assert events[0].damping == pytest.approx(excess, rel=1e-5)
    require_definite(factors, (e.params[0], (), e.params[2]))


def test_a_coupling_that_overflows_is_left_out(backend: Backend):
    """Finite moments with no finite product: what remains is the block-diagonal step."""
    e = evaluate(backend)
    moments = estimate(CURVATURE, e)
    huge = {**moments, "0": {**moments["0"], "A_next": 1e307 * moments["0"]["A_next"]}}
    with np.errstate(over="ignore", invalid="ignore"):
        factors, events = CURVATURE.factorise(huge, 1e-6)
    assert [(event.layer, event.factor, event.rung) for event in events] == [
        ("0", "A_next, G_next", "left uncoupled")
    ]
    plain, _ = BlockDiagonal().factorise(estimate(BlockDiagonal(), e), 1e-6)
    v = e.gradient()
    ours = CURVATURE.solve(factors, v)[0]
    assert_close(ours, BlockDiagonal().solve(plain, v)[0], 1e-14)
    require_definite(factors, e.params)
    good, _ = CURVATURE.factorise(moments, 1e-6)
    with np.errstate(over="ignore", invalid="ignore"):
        factors, events = CURVATURE.factorise(huge, 1e-6, good)
    assert [event.rung for event in events] == ["kept the last inverse"]
    np.testing.assert_array_equal(host(factors["0"]["Psi_A"]), host(good["0"]["Psi_A"]))


def test_a_root_of_an_inverse_that_is_barely_definite(backend: Backend, monkeypatch):
    """Where Cholesky's method fails an eigendecomposition does not."""
    e = evaluate(backend)
    moments = estimate(CURVATURE, e)
    expected, _ = CURVATURE.factorise(moments, 0.1)

    def failing(m: Any, checks: Any) -> Any:
        raise FactorizationError("not positive definite")

    monkeypatch.setattr("kfac_np.curvature.networks.tridiagonal_factors.cholesky", failing)
    found, events = CURVATURE.factorise(moments, 0.1)
    assert not events
    assert_close(dense_inverse(found, e.params), dense_inverse(expected, e.params))


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("damping", [1e-30, 1e-8, 1e-2])
def test_moving_averages_in_any_precision(backend: Backend, precision: str, damping: float):
    """Averages of singular batches of three examples, as a run makes them."""
    if precision == "float32":
        backend = dataclasses.replace(backend, dtype=backend.xp.float32)
    moments: Any = None
    for seed in range(6):
        e = evaluate(backend, seed, n=3)
        new = estimate(CURVATURE, e)
        moments = new if moments is None else trees.axpy(0.3, new, trees.scale(0.7, moments))
        factors, events = CURVATURE.factorise(moments, damping)
        solution = flat(trees.ravel(CURVATURE.solve(factors, e.gradient())))
        assert np.all(np.isfinite(solution))
        assert flat(trees.ravel(e.gradient())) @ solution > 0
        assert not (events and damping == 1e-2)


def test_the_whole_matrix_keeps_its_inverse_too(backend: Backend):
    curvature = FullKronecker()
    moments = estimate(curvature, evaluate(backend))
    old, _ = curvature.factorise(moments, 0.1)
    bad = with_bad(moments, "0", "A_later", np.nan)
    new, events = curvature.factorise(bad, 0.1, old)
    assert [event.rung for event in events] == ["kept the last inverse"]
    np.testing.assert_array_equal(flat(trees.ravel(new)), flat(trees.ravel(old)))
    with pytest.raises(FactorizationError, match="layer full: factor matrix is not finite"):
        curvature.factorise(bad, 0.1)
