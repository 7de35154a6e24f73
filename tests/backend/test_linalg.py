"""Inverses and eigendecompositions, and how they fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kfac_np.backend import (
    Backend,
    DeferredChecks,
    Rng,
    eigh,
    get_backend,
    spd_inverse,
    spectral_norm,
    symmetrize,
    to_numpy,
)
from kfac_np.backend.linalg import (
    _gram_of_lower,
    _lower_times,
    _times_lower,
    cholesky,
    eigh_many,
)
from kfac_np.errors import FactorizationError

EPS = float(np.finfo(np.float64).eps)


def spd(n: int, condition: float = 1e4) -> np.ndarray:
    """A positive definite matrix with eigenvalues from 1/condition to 1."""
    q, _ = np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))
    m = (q * np.geomspace(1.0, 1.0 / condition, n)) @ q.T
    return (m + m.T) / 2


# All sizes around which the recursion splits once or twice, and those in between.
@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 64, 95, 96, 97, 150, 191, 192, 193, 255, 300])
def test_inverse(n: int, backend: Backend):
    m = spd(n)
    found = to_numpy(spd_inverse(backend.asarray(m)))
    expected = np.linalg.inv(m)
    # Both are off by condition · ε times a modest factor, relative to the inverse's norm.
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=50 * 1e4 * EPS * np.abs(expected).max()
    )
    np.testing.assert_array_equal(found, found.T)


def test_inverse_of_all_small_sizes():
    backend = get_backend("numpy", "float64")
    for n in range(1, 130):
        m = spd(n, 100.0)
        np.testing.assert_allclose(m @ spd_inverse(backend.asarray(m)), np.eye(n), atol=1e-11)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 129, 257, 300])
def test_products_that_leave_out_zeros(n: int, backend: Backend, rng: Rng):
    lower = np.tril(to_numpy(rng.normal((n, n), backend)))
    wide = to_numpy(rng.child(1).normal((n, 5), backend))
    on_device, right = backend.asarray(lower), backend.asarray(wide)
    close = {"rtol": 1e-12, "atol": 1e-12 * n}
    np.testing.assert_allclose(to_numpy(_lower_times(on_device, right)), lower @ wide, **close)
    np.testing.assert_allclose(to_numpy(_times_lower(right.T, on_device)), wide.T @ lower, **close)
    gram = to_numpy(_gram_of_lower(on_device))
    np.testing.assert_allclose(gram, lower.T @ lower, **close)
    np.testing.assert_array_equal(gram, gram.T)


@pytest.mark.parametrize("n", [2, 97, 200])
def test_inverse_of_scaled_matrices(n: int, backend: Backend):
    for scale in (1e-100, 1e100):
        m = backend.asarray(scale * spd(n))
        product = to_numpy(spd_inverse(m)) @ to_numpy(m)
        np.testing.assert_allclose(product, np.eye(n), atol=1e-8)


@pytest.mark.parametrize("n", [2, 97, 200])
def test_inverse_in_single_precision(n: int, backend: Backend):
    xp = backend.xp
    found = spd_inverse(xp.astype(backend.asarray(spd(n, 100.0)), xp.float32))
    assert found.dtype == xp.float32
    expected = np.linalg.inv(spd(n, 100.0))
    np.testing.assert_allclose(
        to_numpy(found), expected, rtol=0, atol=50 * 100 * 6e-8 * np.abs(expected).max()
    )


def test_the_argument_is_left_alone(backend: Backend):
    m = backend.asarray(spd(150))
    before = np.array(to_numpy(m))
    spd_inverse(m)
    eigh(m)
    np.testing.assert_array_equal(to_numpy(m), before)


# A negative eigenvalue in the first half, in the second, or only in the Schur complement.
@pytest.mark.parametrize("n", [1, 2, 96, 97, 200, 300])
@pytest.mark.parametrize("where", ["first", "last", "everywhere"])
def test_not_positive_definite(n: int, where: str, backend: Backend):
    m = spd(n)
    if where == "everywhere":
        values, vectors = np.linalg.eigh(m)
        m = (vectors * np.where(np.arange(n) == 0, -0.5, values)) @ vectors.T
    else:
        i = 0 if where == "first" else n - 1
        m[i, i] = -1.0
    with pytest.raises(FactorizationError, match="matrix is not positive definite"):
        spd_inverse(backend.asarray(m))


@pytest.mark.parametrize("n", [1, 3, 97, 200])
def test_singular(n: int, backend: Backend):
    for m in (np.zeros((n, n)), np.diag(np.arange(float(n)))):
        with pytest.raises(FactorizationError, match="is not positive definite"):
            spd_inverse(backend.asarray(m))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 5, 200])
def test_not_finite(n: int, bad: float, backend: Backend):
    m = spd(n)
    m[n - 1, 0] = bad
    with pytest.raises(FactorizationError, match=f"a {n}×{n} matrix has NaN or Inf: no inverse"):
        spd_inverse(backend.asarray(m))
    with pytest.raises(FactorizationError, match=f"a {n}×{n} matrix has NaN or Inf: no eigen"):
        eigh(backend.asarray(m))


@pytest.mark.parametrize("n", [1, 5, 60])
@pytest.mark.parametrize("name", ["inverse", "cholesky", "eigh"])
def test_deferred_checks_are_what_would_have_been_raised(name: str, n: int, backend: Backend):
    """The same result, and the same error: at once, or when the checks are waited for."""
    function = {"inverse": spd_inverse, "cholesky": cholesky, "eigh": eigh}[name]

    def late(m):
        checks = DeferredChecks()
        found = function(m, checks)
        checks.wait()
        return found

    indefinite, unknown = spd(n), spd(n)
    indefinite[n - 1, n - 1], unknown[0, 0] = -1.0, math.nan
    for m in map(backend.asarray, (spd(n), indefinite, unknown)):
        try:
            expected = function(m)
        except FactorizationError as error:
            with pytest.raises(FactorizationError, match=str(error)):
                late(m)
        else:
            both = zip(*(x if name == "eigh" else (x,) for x in (late(m), expected)), strict=True)
            for found, wanted in both:
                np.testing.assert_array_equal(to_numpy(found), to_numpy(wanted))


@pytest.mark.parametrize("up_to", [0, 32])
def test_eigenvectors_are_stored_as_checkpoints_bring_them_back(up_to: int, backend: Backend):
    """By rows: the same numbers stored by columns round differently in products."""
    for _, vectors in eigh_many([backend.asarray(spd(7)), backend.asarray(2.0 * spd(7))], up_to):
        shown = np.asarray(vectors) if backend.name == "numpy" else vectors
        strides = getattr(shown, "strides", None) or getattr(shown, "stride", lambda: None)()
        assert strides in (None, (7, 1), (56, 8))


def test_an_inverse_that_overflows(backend: Backend):
    # Positive definite in exact arithmetic, but 1/1e-320 is no double.
    with pytest.raises(FactorizationError), np.errstate(all="ignore"):
        spd_inverse(backend.asarray([[1e-320]]))


@pytest.mark.parametrize("n", [1, 2, 30, 150])
def test_eigh(n: int, backend: Backend, rng: Rng):
    m = to_numpy(symmetrize(rng.normal((n, n), backend)))
    values, vectors = (to_numpy(a) for a in eigh(backend.asarray(m)))
    assert np.all(np.diff(values) >= 0)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(m), atol=20 * n * EPS)
    np.testing.assert_allclose((vectors * values) @ vectors.T, m, atol=20 * n * EPS)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=20 * n * EPS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batched_up_to", [0, 32, 64])
def test_eigh_many(batched_up_to: int, dtype: str, backend: Backend, rng: Rng):
    """One by one or together: in order, orthogonal, and the matrices again."""
    sizes = [3, 40, 3, 1, 40, 1, 7, 3]
    matrices = [
        backend.xp.astype(symmetrize(rng.child(k).normal((n, n), backend)), backend.xp.float64)
        for k, n in enumerate(sizes)
    ]
    matrices[2] = backend.zeros((3, 3))
    matrices[5] = backend.zeros((1, 1))
    eps = float(np.finfo(dtype).eps)
    given = [backend.xp.astype(m, getattr(backend.xp, dtype)) for m in matrices]
    found = eigh_many(given, batched_up_to)
    assert len(found) == len(sizes)
    for m, (values, vectors), n in zip(given, found, sizes, strict=True):
        assert Backend.of(values) == Backend.of(vectors) == Backend.of(m)
        host, u, v = (to_numpy(a).astype(np.float64) for a in (m, vectors, values))
        assert np.all(np.diff(v) >= 0)
        np.testing.assert_allclose(u.T @ u, np.eye(n), atol=20 * n * eps)
        np.testing.assert_allclose((u * v) @ u.T, host, atol=20 * n * eps)
    np.testing.assert_array_equal(to_numpy(found[2][0]), np.zeros(3))
    np.testing.assert_array_equal(to_numpy(found[2][1]), np.eye(3))
    assert eigh_many([]) == []


def test_eigh_many_that_fails(backend: Backend, monkeypatch: pytest.MonkeyPatch):
    good, bad = backend.eye(3), math.nan * backend.eye(3)
    for up_to in (0, 32):
        with pytest.raises(FactorizationError, match="a 3×3 matrix has NaN or Inf: no eigen"):
            eigh_many([good, bad], up_to)

    def fails(m):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(backend.xp.linalg, "eigh", fails)
    with pytest.raises(FactorizationError, match="the eigendecomposition of a 3×3 matrix failed"):
        eigh_many([good, good])


@pytest.mark.parametrize("n", [1, 4])
def test_eigh_of_zero(n: int, backend: Backend):
    # CuPy's own answer is NaN.
    values, vectors = eigh(backend.zeros((n, n)))
    np.testing.assert_array_equal(to_numpy(values), np.zeros(n))
    np.testing.assert_array_equal(to_numpy(vectors), np.eye(n))
    assert Backend.of(values) == Backend.of(vectors) == backend


def test_eigh_that_does_not_converge(backend: Backend, monkeypatch: pytest.MonkeyPatch):
    def fails(m):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(backend.xp.linalg, "eigh", fails)
    with pytest.raises(FactorizationError, match="the eigendecomposition of a 3×3 matrix failed"):
        eigh(backend.eye(3))

    def another(m):
        raise RuntimeError("out of memory")

    # What is no failure of the mathematics must not be taken for one.
    monkeypatch.setattr(backend.xp.linalg, "eigh", another)
    with pytest.raises(RuntimeError, match="out of memory"):
        eigh(backend.eye(3))
    monkeypatch.setattr(backend.xp.linalg, "cholesky", another)
    monkeypatch.setattr("kfac_np.backend.linalg._cholesky_cupy", another)
    with pytest.raises(RuntimeError, match="out of memory"):
        spd_inverse(backend.eye(3))


def test_eigh_that_returns_nan(backend: Backend, monkeypatch: pytest.MonkeyPatch):
    # cuSOLVER reports some failures in this way only.
    monkeypatch.setattr(
        backend.xp.linalg, "eigh", lambda m: (math.nan * backend.ones((3,)), backend.eye(3))
    )
    with pytest.raises(FactorizationError, match="of a 3×3 matrix is not finite"):
        eigh(backend.eye(3))


def test_cholesky_that_returns_nan(backend: Backend, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend.xp.linalg, "cholesky", lambda m: math.nan * m)
    monkeypatch.setattr(backend.xp.linalg, "inv", lambda m: m)
    cusolver = "kfac_np.backend.linalg._cholesky_cupy"
    monkeypatch.setattr(cusolver, lambda m: (math.nan * m, backend.xp.asarray(True)))
    with pytest.raises(FactorizationError, match="a 3×3 matrix is not positive definite"):
        spd_inverse(backend.eye(3))


def test_spectral_norm(backend: Backend):
    assert float(spectral_norm(backend.asarray([[-3.0, 0.0], [0.0, 2.0]]))) == 3.0
    assert float(spectral_norm(backend.zeros((2, 2)))) == 0.0


def test_symmetrize(backend: Backend, rng: Rng):
    m = rng.normal((4, 4), backend)
    found = to_numpy(symmetrize(m))
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_array_equal(found, (to_numpy(m) + to_numpy(m).T) / 2)
