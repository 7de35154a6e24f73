"""EKFAC: its definition, what it approximates, and its scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, networks, to_backend
from curvature_cases import CURVATURES, FISHERS, estimate, supported
from numerics import EPS, assert_close, flat, frobenius_distance, host

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    DiagonalBlock,
    ExactBlock,
    KFACBlock,
    expand,
    reduce,
)
from kfac_np.curvature.networks.ekfac_moments import rotated_squares
from kfac_np.errors import FactorizationError
from kfac_np.fisher import Empirical, Exact
from kfac_np.layers import Dense
from kfac_np.losses import SquaredError
from kfac_np.matrices import KroneckerSpectral
from kfac_np.objective import Objective
from kfac_np.statistics import AffineStatistics, EmbeddingStatistics, GroupedStatistics, Scale
from kfac_np.testing import CURVATURE_LAWS, check_curvature

HostArray = np.ndarray[Any, Any]
EXACT = BlockDiagonal(ExactBlock())
SHARINGS = {"ekfac": expand, "ekfac reduce": reduce}
DEFINED = [
    (name, case) for name in SHARINGS for case in NETWORKS if supported(CURVATURES[name], case)
]

# ------------------------------------------------------------------------------------ definition


def orthogonal(n: int, seed: int) -> HostArray:
    """Far from symmetric: a transpose that is forgotten is an error of order one."""
    u = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    u[:, 0] *= np.sign(np.linalg.det(u))  # a turn: a reflection of the plane is symmetric
    assert n == 1 or np.linalg.norm(u - u.T) > 1.0
    return u


@pytest.mark.parametrize("shape", [(3, 3), (4, 4), (2, 5), (5, 2)])
def test_products_transpose_where_they_should(backend: Backend, shape: tuple[int, int]):
    """U_G [S ∘ (U_Gᵀ V U_A)] U_Aᵀ, of square parameters too, where any transpose fits."""
    rng = np.random.default_rng(5)
    u_g, u_a = orthogonal(shape[0], 1), orthogonal(shape[1], 2)
    s, v = rng.uniform(0.1, 2.0, shape), rng.standard_normal(shape)
    u = np.kron(u_g, u_a)
    dense = (u * s.ravel()) @ u.T
    a, g = (q @ np.diag(rng.uniform(1, 2, len(q))) @ q.T for q in (u_a, u_g))
    arrays = {"A": a, "G": g, "S": s, "U_A": u_a, "U_G": u_g, "age": np.zeros(())}
    moments = {"": to_backend(backend, arrays)}
    given = backend.asarray(v)
    matrix = EKFAC().matrix(moments, given)
    assert_close(matrix.to_dense(), dense)
    assert_close(matrix.matvec(given), (dense @ v.ravel()).reshape(shape))
    factors, events = EKFAC().factorise(moments, 0.3)
    expected = np.linalg.solve(dense + 0.3 * np.eye(len(dense)), v.ravel()).reshape(shape)
    assert not events
    assert_close(EKFAC().solve(factors, given), expected)
    assert_close(matrix.solve(given, 0.3), expected)


@pytest.mark.parametrize("at_once", [1, 2, 100])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("t", [1, 2, 9])
@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2)])
def test_squares_in_any_basis(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, shape, t: int, k: int, at_once: int
):
    """Any two orthogonal matrices; few and many locations, all examples at once or one by one."""
    monkeypatch.setattr(
        "kfac_np.curvature.networks.ekfac_moments.patch_budget",
        lambda _: 8 * math.prod(shape) * at_once,
    )
    rng, n = np.random.default_rng(0), 5
    a, g = rng.standard_normal((n, t, shape[1])), rng.standard_normal((k, n, t, shape[0]))
    u_g, u_a = orthogonal(shape[0], 1), orthogonal(shape[1], 2)
    u = np.einsum("knto,nti->knoi", g, a)
    s = AffineStatistics(backend.asarray(a), backend.asarray(g))
    bases = backend.asarray(u_a), backend.asarray(u_g)
    expected = np.einsum("op,knoi,ij->knpj", u_g, u, u_a) ** 2
    assert_close(rotated_squares(s, Scale(7, n), *bases), expected.sum((0, 1)) / 7)
    # the sum over examples first, where these are one
    expected = np.einsum("op,knoi,ij->kpj", u_g, u, u_a) ** 2
    assert_close(rotated_squares(s, Scale(7, n, coupled=True), *bases), expected.sum(0) / 7)
    without_k = AffineStatistics(s.inputs, s.g[0, ...])
    expected = np.einsum("op,noi,ij->npj", u_g, u[0], u_a) ** 2
    assert_close(rotated_squares(without_k, Scale(7, n), *bases), expected.sum(0) / 7)


@pytest.mark.parametrize("grouped", [False, True])
def test_squares_of_any_kind_of_statistics(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, grouped: bool
):
    """A kind without a form of its own has its derivatives of examples rotated."""
    rng, n, t, k, shape = np.random.default_rng(0), 4, 3, 2, (3, 4)
    s = [
        AffineStatistics(
            backend.asarray(rng.standard_normal((n, t, shape[1]))),
            backend.asarray(rng.standard_normal((k, n, t, shape[0]))),
        )
        for _ in range(2)
    ]
    u_a, u_g = (backend.asarray(np.stack([orthogonal(d, i) for i in (1, 2)])) for d in shape[::-1])
    arguments = (
        (GroupedStatistics(tuple(s)), Scale(n, n), u_a, u_g)
        if grouped
        else (s[0], Scale(n, n), u_a[0, ...], u_g[0, ...])
    )
    expected = rotated_squares(*arguments)
    monkeypatch.setattr("kfac_np.curvature.networks.ekfac_moments._FASTER", {})
    assert_close(rotated_squares(*arguments), expected)


@pytest.mark.parametrize("coupled", [False, True])
def test_squares_of_an_embedding_are_those_of_one_hot_inputs(backend: Backend, coupled: bool):
    rng, n, t, k, size, d = np.random.default_rng(0), 4, 6, 2, 7, 3
    indices, g = rng.integers(0, 5, (n, t)), rng.standard_normal((k, n, t, d))
    u_g, scale = backend.asarray(orthogonal(d, 1)), Scale(n, n, coupled=coupled)
    found = rotated_squares(
        EmbeddingStatistics(backend.asarray(indices), backend.asarray(g), size), scale, None, u_g
    )
    hot = AffineStatistics(backend.asarray(np.eye(size)[indices]), backend.asarray(g))
    assert_close(found, rotated_squares(hot, scale, backend.eye(size), u_g))
    np.testing.assert_array_equal(host(found)[:, 5:], 0.0)


def parts(
    moments: dict[str, Any],
) -> list[tuple[HostArray, HostArray, HostArray, HostArray, HostArray]]:
    """A, G, U_A, U_G and S of each group; of plain parameters there is one."""
    m = {name: host(x) for name, x in moments.items()}
    a, u_a = m["A"], m.get("U_A")
    if a.ndim == 1:
        a, u_a = np.diag(a), np.eye(len(a))
    five = (a, m["G"], u_a, m["U_G"], m["S"])
    return [five] if m["S"].ndim == 2 else list(zip(*five, strict=True))


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(("name", "case"), DEFINED, ids=str)
def test_s_is_the_diagonal_of_the_exact_block_in_the_eigenbasis(
    backend: Backend, name: str, case: NetworkCase, fisher: str
):
    e = case.build(backend).evaluate()
    moments = estimate(EKFAC(SHARINGS[name]), e, FISHERS[fisher])
    plain = estimate(BlockDiagonal(KFACBlock(SHARINGS[name])), e, FISHERS[fisher])
    exact = estimate(EXACT, e, FISHERS[fisher])
    for path, m in moments.items():
        if "S" not in m:
            np.testing.assert_array_equal(host(m["units"]), host(plain[path]["units"]))
            continue
        np.testing.assert_array_equal(host(m["A"]), host(plain[path]["A"]))
        np.testing.assert_array_equal(host(m["G"]), host(plain[path]["G"]))
        block, start = host(exact[path]["block"]), 0
        for a, g, u_a, u_g, s in parts(m):
            for factor, u in ((a, u_a), (g, u_g)):
                assert_close(u.T @ u, np.eye(len(u)), 1e-14)
                values = u.T @ factor @ u
                assert_close(np.diag(np.diag(values)), values)
            u, rows = np.kron(u_g, u_a), slice(start, start + s.size)
            expected = np.sum(u * (block[rows, rows] @ u), axis=0).reshape(s.shape)
            assert np.max(np.abs(s - expected)) <= 1e-13 * np.max(np.abs(block))
            start += s.size


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(("name", "case"), DEFINED, ids=str)
def test_nearer_to_the_exact_block_than_kfac_and_of_its_trace(
    backend: Backend, name: str, case: NetworkCase, fisher: str
):
    """Of every parameter; and exact where K-FAC is."""
    e = case.build(backend).evaluate()
    ekfac, kfac, exact = (
        [
            (host(block.to_dense()), float(block.trace()))
            for block in trees.leaves(c.matrix(estimate(c, e, FISHERS[fisher]), e.params).blocks)
        ]
        for c in (EKFAC(SHARINGS[name]), BlockDiagonal(KFACBlock(SHARINGS[name])), EXACT)
    )
    for (ours, trace), (kronecker, _), (block, exact_trace) in zip(ekfac, kfac, exact, strict=True):
        rounding = 1e-14 * float(np.linalg.norm(block))
        distance = np.linalg.norm(ours - block)
        assert distance <= np.linalg.norm(kronecker - block) + rounding
        assert trace == pytest.approx(exact_trace, rel=1e-13, abs=1e-300)
        if fisher == "exact" and SHARINGS[name].__name__ in case.kfac_exact:
            assert distance <= rounding


def test_how_much_nearer():
    """Not by rounding: an eighth less, or more, on half of the networks; on NumPy alone."""
    backend, gains = get_backend("numpy", "float64"), []
    for case in networks(kfac_exact=()):
        e = case.build(backend).evaluate()
        exact = host(EXACT.matrix(estimate(EXACT, e), e.params).to_dense())
        ours, plain = (
            frobenius_distance(c.matrix(estimate(c, e), e.params).to_dense(), exact)
            for c in (EKFAC(), BlockDiagonal())
        )
        gains.append(1 - ours / plain)
    assert len(gains) > 20
    assert float(np.median(gains)) > 0.125


@pytest.mark.parametrize(("name", "case"), DEFINED, ids=str)
def test_the_same_batch_again_in_the_same_basis(backend: Backend, name: str, case: NetworkCase):
    """One pass with a basis given has the moments of two passes, whether it is renewed or not."""
    e = case.build(backend).evaluate()
    for interval, age in ((1, 0.0), (5, 1.0)):
        curvature = EKFAC(SHARINGS[name], basis_interval=interval)
        first = estimate(curvature, e)
        second = curvature.estimate(e, Exact(), Rng(0), first)
        for path, m in second.items():
            assert m.keys() == first[path].keys()
            assert float(m.get("age", age)) == age
            for key, x in m.items():
                if key != "age":
                    assert_close(x, first[path][key], 1e-14)


# ----------------------------------------------------------------------------------------- scale

UNCOUPLED = [(name, case) for name, case in DEFINED if not case.weighted and not case.coupled]


def at(backend: Backend, name: str, case: NetworkCase, rows: Any, weights: Any) -> tuple[Any, Any]:
    """Moments and matrix on these rows of the batch."""
    params, x, t, _ = case.host()
    e = Objective(case.network, case.loss).evaluate(
        to_backend(backend, params),
        backend.asarray(x[rows]),
        backend.asarray(t[rows]),
        None if weights is None else backend.asarray(np.asarray(weights, dtype=float)),
    )
    curvature = EKFAC(SHARINGS[name])
    moments = estimate(curvature, e)
    return moments, curvature.matrix(moments, e.params)


def unique(moments: dict[str, Any]) -> bool:
    """Whether eigenvalues are apart, or have no curvature along their eigenvectors."""
    for m in moments.values():
        for a, g, _, _, s in parts(m) if "S" in m else ():
            for factor, seen in ((a, s), (g, s.T)):
                values = np.linalg.eigvalsh(factor)
                close = np.diff(values) < 1e-6 * values[-1]
                if np.any(seen[:, :-1][:, close]) or np.any(seen[:, 1:][:, close]):
                    return False
    return True


def test_most_networks_have_one_basis(backend: Backend):
    """Under `reduce`, that is, where a batch of four has few averaged inputs."""
    reduced = [case for name, case in UNCOUPLED if name == "ekfac reduce"]
    found = [unique(estimate(EKFAC(reduce), c.build(backend).evaluate())) for c in reduced]
    assert len(found) / 3 < sum(found) < len(found)


@pytest.mark.parametrize(("name", "case"), UNCOUPLED, ids=str)
def test_repetitions_weights_and_order(backend: Backend, name: str, case: NetworkCase):
    """A batch twice is the batch; a weight is a repetition, up to M; weights N make sums.

    Traces always; matrices where the basis is not a matter of choice, which rounding makes.
    """
    n, every = case.shape[0], np.arange(case.shape[0])
    counts = np.resize([2, 0, 1, 3], n)
    once, repeated = every, np.repeat(every, counts)
    for rows, weights, factor, others in (
        (np.tile(every, 2), None, 1.0, once),
        (every[::-1], None, 1.0, once),
        (every, np.full(n, n), n, once),
        (every, counts, counts.sum() / n, repeated),
    ):
        _, found = at(backend, name, case, rows, weights)
        moments, expected = at(backend, name, case, others, None)
        assert float(found.trace()) == pytest.approx(factor * float(expected.trace()), rel=1e-12)
        if unique(moments):
            assert_close(found.to_dense(), factor * host(expected.to_dense()), 1e-11)


def test_the_undamped_step_does_not_notice_the_scale_of_the_loss(backend: Backend):
    case = networks(name="tanh_squared")[0]
    rng = np.random.default_rng(1)
    x, t = (
        rng.standard_normal((40, *case.shape[1:])),
        rng.standard_normal((40, *case.output_shape[1:])),
    )
    steps = []
    for weight in (1.0, 1e4):
        e = Objective(case.network, case.loss).evaluate(
            to_backend(backend, case.host()[0]),
            backend.asarray(x),
            backend.asarray(t),
            weight * backend.ones((40,)),
        )
        factors, events = EKFAC().factorise(estimate(EKFAC(), e), 0.0)
        assert not events
        steps.append(flat(EKFAC().solve(factors, e.gradient())))
    assert_close(steps[1], steps[0], 1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_rotated_inputs_rotate_the_step(backend: Backend, damping: float):
    """An eigenbasis turns with the coordinates, and damping is the same in all directions."""
    rng, turn = np.random.default_rng(0), orthogonal(4, 3)
    x, w, t = (rng.standard_normal(shape) for shape in ((30, 4), (3, 4), (30, 3)))

    def step(curvature: Any, x: HostArray, w: HostArray) -> HostArray:
        e = Objective(Dense(4, 3, bias=False), SquaredError()).evaluate(
            backend.asarray(w), backend.asarray(x), backend.asarray(t)
        )
        factors, _ = curvature.factorise(estimate(curvature, e, Empirical()), damping)
        return host(curvature.solve(factors, e.gradient()))

    assert_close(step(EKFAC(), x @ turn, w @ turn), step(EKFAC(), x, w) @ turn)
    diagonal = BlockDiagonal(DiagonalBlock())
    assert (
        frobenius_distance(step(diagonal, x @ turn, w @ turn), step(diagonal, x, w) @ turn) > 0.05
    )


def test_the_laws_of_curvatures(backend: Backend):
    """But those of moments that are plain means: S is one in its own basis only.

    "chunks" compares bases, whose signs are free.
    """
    case = networks(name="tanh_squared")[0]
    rng = np.random.default_rng(2)
    n = 60
    x = backend.asarray(rng.standard_normal((n, *case.shape[1:])))
    t = backend.asarray(rng.standard_normal((n, *case.output_shape[1:])))
    laws = [law for law in CURVATURE_LAWS if law not in ("means", "chunks")]
    for fisher in FISHERS.values():
        check_curvature(
            EKFAC(),
            Objective(case.network, SquaredError()),
            to_backend(backend, case.host()[0]),
            x,
            t,
            fisher=fisher,
            exact_damping=True,
            laws=laws,
        )


@pytest.mark.parametrize(("name", "case"), DEFINED, ids=str)
def test_single_columns_or_all_at_once(backend: Backend, name: str, case: NetworkCase):
    e = case.build(backend).evaluate()
    curvature = EKFAC(SHARINGS[name])
    first = estimate(curvature, e)
    ours = curvature.estimate(e, Exact(budget_bytes=1), Rng(0), first)
    for path, m in ours.items():
        for key in m.keys() - {"age"}:
            assert_close(m[key], first[path][key], 1e-13)


def test_no_eigenvalue_is_made_of_rounding(backend: Backend):
    """Directions that A or G does not have: S is zero there, and there is no undamped inverse."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 3)) @ np.diag([1.0, 1e-3, 1e-5]) @ rng.standard_normal((3, 6))
    e = Objective(Dense(6, 2), SquaredError()).evaluate(
        backend.asarray(rng.standard_normal((2, 7))),
        backend.asarray(x),
        backend.asarray(rng.standard_normal((30, 2))),
    )
    moments = estimate(EKFAC(), e)
    s = host(moments[""]["S"])
    assert np.sum(s == 0.0) == 2 * 3
    assert np.min(s[s > 0]) > EPS * 1e3 * np.max(s)
    assert isinstance(EKFAC().matrix(moments, e.params).blocks, KroneckerSpectral)
    assert float(EKFAC().matrix(moments, e.params).logdet()) == -math.inf
    with pytest.raises(FactorizationError, match="layer : factor S is singular"):
        EKFAC().factorise(moments, 0.0)
