"""Damping: what each rule inverts, what it is invariant to, and how far it is from C + λI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, networks
from curvature_cases import CURVATURES, estimate, in_units, solve_in_own_units, supported
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, flat, frobenius_distance, host

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, get_backend
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    DampingRule,
    KFACBlock,
    Ladder,
    Moments,
    no_pi,
    pi_frobenius,
    pi_spectral,
    pi_trace,
    plain,
)
from kfac_np.errors import CurvatureError, InputError
from kfac_np.fisher import Exact

HostArray = np.ndarray[Any, Any]
PI_RULES = {"trace": pi_trace, "frobenius": pi_frobenius, "spectral": pi_spectral}
RULES: dict[str, DampingRule] = {**PI_RULES, "no pi": no_pi, "plain": plain}
DAMPINGS = (1e-4, 0.1, 150.0)


def split(rule: str, A: HostArray, G: HostArray, damping: float) -> tuple[Any, Any]:
    """(γ_A, γ_G) again, on the host, from the definitions."""
    if rule == "plain":
        return damping, damping
    gamma = np.sqrt(damping)
    norms = {
        "no pi": lambda m: 1.0,
        "trace": lambda m: np.trace(m) / len(m),
        "frobenius": lambda m: np.linalg.norm(m) / np.sqrt(len(m)),
        "spectral": lambda m: np.linalg.norm(m, 2),
    }
    pi = np.sqrt(norms[rule](A) / norms[rule](G))
    return pi * gamma, gamma / pi


def second_moment(n: int, seed: int, rank: int | None = None) -> HostArray:
    rows = np.random.default_rng(seed).standard_normal((rank or 3 * n, n))
    return rows.T @ rows / len(rows)


def solved(
    backend: Backend, block: KFACBlock, A: HostArray, G: HostArray, V: HostArray, damping: float
) -> HostArray:
    """(block + damping)⁻¹ V by way of `factorise` and `solve`."""
    moments = {"0": {"A": backend.asarray(A), "G": backend.asarray(G)}}
    curvature = BlockDiagonal(block)
    factors, events = curvature.factorise(moments, damping)
    assert not events
    return host(curvature.solve(factors, (backend.asarray(V),))[0])


A, G = 3.0 * second_moment(5, 0), 0.1 * second_moment(3, 1)
V = np.random.default_rng(2).standard_normal((3, 5))


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("rule", RULES)
def test_factored_damping_is_the_inverse_of_two_damped_factors(backend, rule: str, damping: float):
    damping_a, damping_g = split(rule, A, G, damping)
    dense = np.kron(G + damping_g * np.eye(3), A + damping_a * np.eye(5))
    expected = np.linalg.solve(dense, V.reshape(-1))
    actual = solved(backend, KFACBlock(rule=RULES[rule]), A, G, V, damping)
    assert_close(flat(actual), expected)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("a", [A, second_moment(5, 0, rank=2)], ids=["regular", "singular"])
def test_exact_damping_is_the_inverse_of_the_damped_product(backend, a, damping: float):
    expected = np.linalg.solve(np.kron(G, a) + damping * np.eye(15), V.reshape(-1))
    actual = solved(backend, KFACBlock(exact_damping=True), a, G, V, damping)
    # Rounding is relative to the largest eigenvalue: 1e-16 of it, over the damping.
    condition = np.linalg.norm(np.kron(G, a), 2) / damping
    assert_close(flat(actual), expected, 1e-12 + 1e-15 * condition)


SOME_OF_EACH_KIND = [
    networks(name=name)[0]
    for name in (
        "relu_softmax",
        "mean_pooled",
        "conv1d_depthwise_squared",
        "group_norm_sigmoid",
        "batch_norm_softmax",
        "embedding_linear",
        "recurrent_sigmoid",
    )
]


IN_UNITS = ["kfac exactly damped", "diagonal", "exact blocks", "full", "ekfac"]


@pytest.mark.parametrize("name", IN_UNITS)
@pytest.mark.parametrize("network", SOME_OF_EACH_KIND, ids=str)
def test_damping_in_own_units_is_relative(backend: Backend, name: str, network: NetworkCase):
    """(F + λ diag(u)⁻²) x = v, and what is factorised is diag(u) F diag(u)."""
    curvature, damping = CURVATURES[name].curvature, 0.05
    e, v = network.build(backend).evaluate(), network.tangent(backend)
    moments = curvature.estimate(e, Exact(), Rng(0), in_own_units=True)
    units = curvature.units(moments, e.params)
    matrix, inner = (
        curvature.matrix(m, e.params) for m in (moments, curvature.in_units(moments, units))
    )
    x, events = solve_in_own_units(curvature, e, v, damping, measured=True)
    assert not events
    u = flat(in_units(units, trees.tree_map(backend.xp.ones_like, v)))
    assert_close(flat(matrix.matvec(x)) + damping * flat(x) / u**2, flat(v), 1e-11)
    assert_close(inner.to_dense(), u[:, None] * host(matrix.to_dense()) * u, 1e-12)
    traces = curvature.block_traces(moments, e.params, units)
    assert_close(sum(traces.values()) if traces else inner.trace(), inner.trace(), 1e-12)


def test_ekfac_in_units_it_was_not_measured_in(backend: Backend):
    """Until the next estimate its eigenvalues are those of K-FAC; undamped it is that."""
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    ekfac = EKFAC()
    moments = estimate(ekfac, e)
    units = ekfac.units(moments, e.params)
    found = ekfac.matrix(ekfac.in_units(moments, units), e.params).to_dense()
    kfac = BlockDiagonal()
    expected = kfac.matrix(kfac.in_units(estimate(kfac, e), units), e.params).to_dense()
    assert_close(found, expected)
    again = ekfac.mix(moments, ekfac.estimate(e, Exact(), Rng(0), moments, in_own_units=True), 0.5)
    measured = ekfac.estimate(e, Exact(), Rng(0), in_own_units=True)
    assert_close(again["0"]["S"], measured["0"]["S"], 1e-10)
    with pytest.raises(CurvatureError, match=r"give them to EKFAC\.in_units first"):
        ekfac.factorise(measured, 0.1)


def in_own_units(backend: Backend, block: KFACBlock, moments: Moments, w: HostArray, v: HostArray):
    """u ∘ (block in units + 0.01)⁻¹ (u ∘ v) for a layer with weights w."""
    m = {name: backend.asarray(x) for name, x in moments.items()}
    s, x = block.units(m, backend.asarray(w))
    factors = block.factorise(block.in_units(m, (s, x)), 0.01, Ladder("0"))
    return host(s * x * block.solve(factors, s * x * backend.asarray(v)))


@pytest.mark.parametrize(
    "block", [KFACBlock(rule=no_pi), KFACBlock(exact_damping=True)], ids=["factored", "exact"]
)
@pytest.mark.parametrize("shape", ["dense", "one-hot"])
def test_entries_without_a_scale(backend: Backend, block: KFACBlock, shape: str):
    """Features never seen and dead units change nothing for the others, and take short steps.

    They are damped like an input or output with the largest scale of the layer.
    """
    a, g = (np.zeros((m.shape[0] + 1,) * 2) for m in (A, G))
    a[:-1, :-1], g[1:, 1:] = A, G
    alone, v = A, np.ones((4, 6))
    if shape == "one-hot":
        a, alone = np.diag(a), np.diag(A)
    w = np.zeros((4, 6))
    w[1:] = np.random.default_rng(5).standard_normal((3, 6))
    x = in_own_units(backend, block, {"A": a, "G": g}, w, v)
    others = in_own_units(backend, block, {"A": alone, "G": G}, w[1:, :-1], v[1:, :-1])
    assert_close(x[1:, :-1], others)
    rows = w[1:, :-1]
    outputs = np.einsum("ij,jk,ik->i", rows, A if shape == "dense" else np.diag(np.diag(A)), rows)
    largest = np.max(outputs) / np.max(np.diag(A))
    assert x[0, -1] == pytest.approx(largest / 0.01, rel=1e-12)


@pytest.mark.parametrize("unit", [1e-13, 1e13])
def test_damping_in_extreme_units(unit: float):
    """Second moments of 1e±26 in single precision: no rung is needed, and no digit lost."""
    backend, block, scale = get_backend("numpy", "float32"), KFACBlock(), np.ones(5)
    scale[2:] = unit
    w = np.random.default_rng(5).standard_normal((3, 5))
    expected = in_own_units(backend, block, {"A": A, "G": G}, w, V)
    a = A * scale[:, None] * scale
    found = in_own_units(backend, block, {"A": a, "G": G}, w / scale, V * scale) * scale
    assert_close(found, expected, 1e-5)


# The rules differ in what they add to the factors alone, which a few networks show.
FEW = ("relu_softmax", "residual_nested", "mean_pooled", "positions_mixed_softmax")


@pytest.mark.parametrize(
    ("name", "network"),
    [
        (name, case)
        for name, curvature in CURVATURES.items()
        for case in NETWORKS
        if supported(curvature, case)
        and (case.name in FEW or name in ("kfac", "kfac reduce", "diagonal", "exact blocks"))
    ],
    ids=str,
)
def test_solve_is_the_inverse_of_the_matrix_damped(backend, name: str, network: NetworkCase):
    """Of matrix + λI itself where the case says so, else of something larger, and near it."""
    case, damping = CURVATURES[name], 0.05
    e = network.build(backend).evaluate()
    v = network.tangent(backend)
    moments = estimate(case.curvature, e)
    factors, events = case.curvature.factorise(moments, damping)
    solution = case.curvature.solve(factors, v)
    expected = case.curvature.matrix(moments, e.params).solve(v, damping)
    assert {event.rung for event in events} <= {"zero up to rounding"}
    if case.exact_damping:
        assert_close(trees.ravel(solution), trees.ravel(expected))
    elif name != "kfac plain":
        ours, exact = float(trees.inner(v, solution)), float(trees.inner(v, expected))
        assert 0.1 * exact < ours <= exact * (1 + 1e-12)


@pytest.mark.parametrize("rule", PI_RULES)
@given(log_c=st.floats(-6, 6), log_damping=st.floats(-4, 2))
def test_pi_does_not_notice_how_scale_is_split(
    backend: Backend, rule: str, log_c: float, log_damping: float
):
    """A → cA, G → G/c changes neither the product nor the update."""
    c, damping = 10.0**log_c, 10.0**log_damping
    block = KFACBlock(rule=PI_RULES[rule])
    expected = solved(backend, block, A, G, V, damping)
    assert_close(solved(backend, block, c * A, G / c, V, damping), expected)


@given(log_c=st.floats(-6, 6))
def test_exact_damping_does_not_notice_how_scale_is_split(backend: Backend, log_c: float):
    c, block = 10.0**log_c, KFACBlock(exact_damping=True)
    expected = solved(backend, block, A, G, V, 0.1)
    assert_close(solved(backend, block, c * A, G / c, V, 0.1), expected)


@pytest.mark.parametrize("rule", ["no pi", "plain"])
@pytest.mark.parametrize("c", [0.01, 100.0])
def test_rules_without_pi_do_notice(backend: Backend, rule: str, c: float):
    block = KFACBlock(rule=RULES[rule])
    original = solved(backend, block, A, G, V, 0.1)
    rescaled = solved(backend, block, c * A, G / c, V, 0.1)
    assert frobenius_distance(rescaled, original) > 0.3


@pytest.mark.parametrize("name", CURVATURES)
def test_scaling_the_objective_and_the_damping_together(backend: Backend, name: str):
    """Twice the loss with twice the damping has half the inverse; rules without π err."""
    network = networks(name="tanh_squared")[0]
    problem = network.build(backend)
    weights = 100.0 * backend.ones(network.shape[:1])
    v, curvature = network.tangent(backend), CURVATURES[name].curvature

    def update(weights: Array | None, damping: float) -> HostArray:
        e = problem.objective.evaluate(problem.params, problem.x, problem.t, weights)
        factors, _ = curvature.factorise(estimate(curvature, e), damping)
        return flat(curvature.solve(factors, v))

    once, scaled = update(None, 0.1), 100.0 * update(weights, 10.0)
    if name in ("kfac no pi", "kfac plain"):
        assert frobenius_distance(scaled, once) > 0.3
    else:
        assert_close(scaled, once)


@pytest.mark.parametrize("rule", PI_RULES)
@pytest.mark.parametrize(
    ("a", "g"), [(0 * A, G), (A, 0 * G), (0 * A, 0 * G)], ids=["A zero", "G zero", "both zero"]
)
def test_pi_is_one_where_a_factor_is_zero(backend: Backend, rule: str, a, g):
    parts = PI_RULES[rule](backend.asarray(a), backend.asarray(g), 0.25)
    assert [float(part) for part in parts] == [0.25, 0.25]
    expected = np.linalg.solve(g + 0.25 * np.eye(3), V) @ np.linalg.inv(a + 0.25 * np.eye(5))
    actual = solved(backend, KFACBlock(rule=PI_RULES[rule]), a, g, V, 0.0625)
    assert_close(actual, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rule", PI_RULES)
def test_pi_is_one_where_a_factor_is_not_finite(backend: Backend, rule: str, bad: float):
    """So that the other factor, which is good, is damped as it should be."""
    a = A.copy()
    a[0, 0] = bad
    parts = PI_RULES[rule](backend.asarray(a), backend.asarray(G), 0.25)
    assert [float(part) for part in parts] == [0.25, 0.25]


# What factored damping adds to λI: (G + γ_G I) ⊗ (A + γ_A I) = G ⊗ A + λI + γ_G I ⊗ A + γ_A G ⊗ I.


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("rule", [*PI_RULES, "no pi"])
@pytest.mark.parametrize("seed", range(3))
def test_factored_damping_is_more_damping_than_exact(backend, rule: str, damping: float, seed):
    """The two further terms are positive: vᵀ(factored)v ≤ vᵀ(exact)v for every v."""
    v = np.random.default_rng(seed).standard_normal((3, 5))
    factored = solved(backend, KFACBlock(rule=RULES[rule]), A, G, v, damping)
    exact = solved(backend, KFACBlock(exact_damping=True), A, G, v, damping)
    assert np.sum(v * factored) < np.sum(v * exact)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("rule", [*PI_RULES, "no pi"])
def test_gap_between_factored_and_exact_damping(backend: Backend, rule: str, damping: float):
    """The inverse of their inverses differs by γ_G I ⊗ A + γ_A G ⊗ I, and by nothing else."""
    columns = np.eye(15).reshape(15, 3, 5)

    def inverse(block: KFACBlock) -> HostArray:
        return np.stack([solved(backend, block, A, G, v, damping).reshape(-1) for v in columns])

    factored = inverse(KFACBlock(rule=RULES[rule]))
    exact = inverse(KFACBlock(exact_damping=True))
    damping_a, damping_g = split(rule, A, G, damping)
    gap = damping_g * np.kron(np.eye(3), A) + damping_a * np.kron(G, np.eye(5))
    # Undoing an inverse of condition κ loses κ roundings; both are below 1e5 here.
    assert_close(np.linalg.inv(factored) - np.linalg.inv(exact), gap, 1e-10)
    assert frobenius_distance(factored, exact) > 0.005


@pytest.mark.parametrize("c", [0.03, 1.0, 40.0])
def test_pi_by_trace_balances_the_two_further_terms(backend: Backend, c: float):
    """tr(γ_G I ⊗ A) = tr(γ_A G ⊗ I), and hence their sum is the least that any π attains."""
    a, g = c * A, G

    def excess(damping_a: float, damping_g: float) -> tuple[float, float]:
        return damping_g * 3 * np.trace(a), damping_a * 5 * np.trace(g)

    chosen = [float(x) for x in pi_trace(backend.asarray(a), backend.asarray(g), 0.5)]
    first, second = excess(*chosen)
    assert first == pytest.approx(second, rel=1e-14)
    for pi in np.geomspace(1e-3, 1e3, 61):
        assert first + second <= sum(excess(0.5 * pi, 0.5 / pi)) * (1 + 1e-14)


@pytest.mark.parametrize("name", ["kfac", "full"])
@pytest.mark.parametrize("damping", [-1.0, np.nan, np.inf])
def test_damping_that_makes_no_sense_is_refused(backend: Backend, name: str, damping: float):
    curvature = CURVATURES[name].curvature
    moments = estimate(curvature, networks(name="dense_alone")[0].build(backend).evaluate())
    with pytest.raises(InputError, match=f"damping: expected a finite number >= 0, got {damping}"):
        curvature.factorise(moments, damping)


@pytest.mark.parametrize("rule", PI_RULES)
@pytest.mark.parametrize("c", [1e-24, 1e24])
def test_pi_of_factors_whose_squares_overflow(rule: str, c: float) -> None:
    """In single precision the square of 1e-24 is 0, and π would be 1."""
    a, g = (x.astype(np.float32) for x in (c * A, G))
    expected = np.asarray(split(rule, c * A, G, 0.01))
    assert np.asarray(PI_RULES[rule](a, g, 0.1)) == pytest.approx(expected, rel=1e-5)


def test_pi_of_factors_whose_quotient_overflows() -> None:
    """In single precision 1 / 1e-40 is infinite, its root is not."""
    tiny = np.float32(1e-40) * np.eye(2, dtype=np.float32)
    damping_a, damping_g = pi_trace(np.eye(3, dtype=np.float32), tiny, 0.1)
    assert 0.1 * float(damping_a) * float(damping_g) == pytest.approx(1e-3, rel=1e-4)
    assert float(damping_a) == pytest.approx(1e19, rel=1e-2)
