"""Linear algebra of symmetric positive definite matrices, by the Array API standard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import array_api_compat

from kfac_np.backend.array import Array, Backend, array_namespace
from kfac_np.backend.cupy_kernels.precision import tf32
from kfac_np.backend.reductions import are_finite
from kfac_np.backend.scalars import DeferredChecks
from kfac_np.errors import FactorizationError

__all__ = [
    "cholesky",
    "eigh",
    "eigh_many",
    "resolved_eigh",
    "rounding_error",
    "spd_inverse",
    "spectral_norm",
    "symmetrize",
]

# Sizes at which halving ends, and widths of strips; found by timing (docs/performance.md).
_LEAF = 48  # below this a Cholesky factorisation and a small inverse beat more recursion
_TRIANGLE = 128  # below this a product with the zeros beats two without
_STRIP = 64
_BATCHED = 32  # cuSOLVER's batched Jacobi method is made for matrices up to this size


def symmetrize(m: Array) -> Array:
    """Return (m + mᵀ) / 2.

    Examples
    --------
    >>> import numpy as np
    >>> symmetrize(np.asarray([[1.0, 2.0], [0.0, 1.0]]))
    array([[1., 1.],
           [1., 1.]])
    """
    return 0.5 * (m + m.T)


def cholesky(m: Array, checks: DeferredChecks | None = None) -> Array:
    """Lower triangular L with L Lᵀ = m.

    Parameters
    ----------
    m : Array, shape (n, n)
        Symmetric positive definite.
    checks : DeferredChecks, optional
        As with `spd_inverse`.

    Returns
    -------
    Array, shape (n, n)

    Raises
    ------
    FactorizationError
        `m` is not numerically positive definite, or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> cholesky(np.asarray([[4.0, 2.0], [2.0, 2.0]]))
    array([[2., 0.],
           [1., 1.]])
    """
    n = m.shape[0]
    own = DeferredChecks() if checks is None else checks
    own.require(are_finite(m), lambda: FactorizationError(f"{_nan(n)}: no Cholesky factor"))
    factor = _cholesky(m, own)
    own.require(are_finite(factor), lambda: _indefinite(n))
    if checks is None:
        own.wait()
    return factor


def _nan(n: int) -> str:
    return f"a {n}×{n} matrix has NaN or Inf"


def _indefinite(n: int) -> FactorizationError:
    return FactorizationError(f"a {n}×{n} matrix is not positive definite")


def _cholesky(m: Array, checks: DeferredChecks) -> Array:
    """The factor, and a condition that tells whether there is one."""
    xp, n = array_namespace(m), m.shape[0]
    if array_api_compat.is_cupy_namespace(xp):
        factor, found = _cholesky_cupy(m)
        checks.require(found, lambda: _indefinite(n))
        return factor
    with _failures_raise(xp, str(_indefinite(n))):
        plain: Array = xp.linalg.cholesky(m)
        return plain


def _cholesky_cupy(m: Any) -> tuple[Any, Any]:
    """The factor, and whether cuSOLVER found one, which CuPy's function ignores or waits for."""
    import cupy
    from cupy.cuda import device
    from cupy_backends.cuda.libs import cublas, cusolver

    n, single = m.shape[0], m.dtype == cupy.float32
    with m.device:
        factor, failed = m.astype(m.dtype, order="C"), cupy.zeros((), dtype=cupy.int32)
        if n:
            # What is upper by columns is lower by rows.
            where = device.get_cusolver_handle(), cublas.CUBLAS_FILL_MODE_UPPER, n, factor.data.ptr
            measure = cusolver.spotrf_bufferSize if single else cusolver.dpotrf_bufferSize
            factorise = cusolver.spotrf if single else cusolver.dpotrf
            size = measure(*where, n)
            room = cupy.empty(size, dtype=m.dtype)
            factorise(*where, n, room.data.ptr, size, failed.data.ptr)
        return cupy.tril(factor), failed == 0


def spd_inverse(m: Array, checks: DeferredChecks | None = None) -> Array:
    """Invert a symmetric positive definite matrix: m⁻¹ = L⁻ᵀ L⁻¹ with m = L Lᵀ.

    L⁻¹ is found by halves: with M = [[P, Qᵀ], [Q, S]] and P = L Lᵀ, the Schur complement S - K Kᵀ
    with K = Q L⁻ᵀ has the rest of the Cholesky factor, whose inverse follows by matrix products
    alone. Products are what every CPU library does fastest, with one thread pool; those with
    triangular factors leave out the zeros, block by block. That the factor is inverted, and not
    P itself, keeps the error at that of Cholesky's method, condition · eps: Schur complements
    formed with P⁻¹ would lose the square of the condition. On a GPU many small products would
    wait for each other: there it is one factorisation and one triangular solution.

    Parameters
    ----------
    m : Array, shape (n, n)
        Only its symmetric part is meant; it is not checked.
    checks : DeferredChecks, optional
        Where given, an asynchronous device is not waited for: the inverse is one if these turn
        out to be unfounded.

    Returns
    -------
    Array, shape (n, n)
        Symmetric, exactly.

    Raises
    ------
    FactorizationError
        `m` is not numerically positive definite, or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> spd_inverse(np.asarray([[2.0, 0.0], [0.0, 4.0]]))
    array([[0.5 , 0.  ],
           [0.  , 0.25]])
    >>> spd_inverse(np.asarray([[1.0, 2.0], [2.0, 1.0]]))
    Traceback (most recent call last):
    kfac_np.errors.FactorizationError: a 2×2 matrix is not positive definite
    """
    xp, n = array_namespace(m), m.shape[0]
    own = DeferredChecks() if checks is None else checks
    own.require(are_finite(m), lambda: FactorizationError(f"{_nan(n)}: no inverse"))
    if array_api_compat.is_cupy_namespace(xp):
        from cupyx.scipy.linalg import solve_triangular

        with tf32(Backend.of(m), enabled=False):
            half = solve_triangular(_cholesky(m, own), Backend.of(m).eye(n), lower=True)
            inverse = symmetrize(half.T @ half)
    else:
        half = xp.zeros_like(m)
        _inverse_factor(m, half)
        inverse = _gram_of_lower(half)
    # A factor may overflow, which is no error by itself, but NaN and Inf stay in products.
    own.require(are_finite(inverse), lambda: _indefinite(n))
    if checks is None:
        own.wait()
    return inverse


def _inverse_factor(m: Array, out: Array) -> None:
    """Write L⁻¹, where m = L Lᵀ, to the lower triangle of `out`."""
    n = m.shape[0]
    if n <= _LEAF:
        out[...] = _small_inverse_factor(m)
        return
    h = n // 2
    p, s = out[:h, :h], out[h:, h:]
    _inverse_factor(m[:h, :h], p)
    k = _lower_times(p, m[h:, :h].T).T
    _inverse_factor(m[h:, h:] - k @ k.T, s)
    r = _lower_times(s, _times_lower(k, p))
    r *= -1.0
    out[h:, :h] = r


def _small_inverse_factor(m: Array) -> Array:
    xp, n = array_namespace(m), m.shape[0]
    with _failures_raise(xp, str(_indefinite(n))):
        return xp.linalg.inv(xp.linalg.cholesky(m))


def _lower_times(lower: Array, x: Array) -> Array:
    """lower @ x, without the zeros above the diagonal."""
    n = lower.shape[0]
    if n <= _TRIANGLE:
        return lower @ x
    h = n // 2
    out = array_namespace(x).empty((n, x.shape[1]), dtype=x.dtype, device=x.device)
    out[:h, :] = _lower_times(lower[:h, :h], x[:h, :])
    out[h:, :] = lower[h:, :] @ x
    return out


def _times_lower(x: Array, lower: Array) -> Array:
    """x @ lower, without the zeros above the diagonal."""
    n = lower.shape[0]
    if n <= _TRIANGLE:
        return x @ lower
    h = n // 2
    out = array_namespace(x).empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    out[:, :h] = x @ lower[:, :h]
    out[:, h:] = _times_lower(x[:, h:], lower[h:, h:])
    return out


def _gram_of_lower(lower: Array) -> Array:
    """lowerᵀ @ lower without the zeros above the diagonal, exactly symmetric."""
    n = lower.shape[0]
    out = array_namespace(lower).empty_like(lower)
    for start in range(0, n, _STRIP):
        stop = min(start + _STRIP, n)
        strip = lower[start:, start:stop].T @ lower[start:, :stop]
        out[start:stop, :start] = strip[:, :start]
        out[:start, start:stop] = strip[:, :start].T
        out[start:stop, start:stop] = symmetrize(strip[:, start:])
    return out


@contextmanager
def _failures_raise(xp: Any, message: str) -> Iterator[None]:
    """Within it, a factorisation that fails is a `FactorizationError`."""
    with ExitStack() as stack:
        if array_api_compat.is_cupy_namespace(xp):
            import cupyx  # cuSOLVER sets a flag, which CuPy looks at (and waits for) if asked

            stack.enter_context(cupyx.errstate(linalg="raise"))
        try:
            yield
        except Exception as error:  # every library has a class of its own for this
            if not _is_linalg_error(error):
                raise
            raise FactorizationError(message) from error


def _is_linalg_error(error: Exception) -> bool:
    return "LinAlgError" in type(error).__name__ or "linalg" in str(error).lower()


def eigh(m: Array, checks: DeferredChecks | None = None) -> tuple[Array, Array]:
    """Eigenvalues (ascending) and eigenvectors (columns) of a symmetric matrix.

    Parameters
    ----------
    m : Array, shape (n, n)
    checks : DeferredChecks, optional
        As with `spd_inverse`; but whether the iteration converged is waited for.

    Returns
    -------
    values : Array, shape (n,)
    vectors : Array, shape (n, n)

    Raises
    ------
    FactorizationError
        `m` is not finite, or the iteration did not converge.

    Examples
    --------
    >>> import numpy as np
    >>> eigh(np.asarray([[2.0, 0.0], [0.0, 1.0]]))[0]
    array([1., 2.])
    """
    return _eigh(m, checks)


def _row_major(x: Any) -> Any:
    """The array as a checkpoint would bring it back: products round by how operands are stored.

    CuPy and PyTorch keep eigenvectors by columns, as LAPACK has them.
    """
    xp = array_namespace(x)
    if array_api_compat.is_cupy_namespace(xp):
        return xp.ascontiguousarray(x)
    return x.contiguous() if array_api_compat.is_torch_namespace(xp) else x


def eigh_many(
    matrices: Sequence[Array], batched_up_to: int = _BATCHED
) -> list[tuple[Array, Array]]:
    """`eigh` of several symmetric matrices; small ones of one size are taken together.

    CuPy then has one call of cuSOLVER's Jacobi method for all of them, instead of one of the
    divide-and-conquer method for each, which is faster for single, large matrices.

    Parameters
    ----------
    matrices : sequence of Array, shape (n, n)
        Of any sizes.
    batched_up_to : int
        Largest n that is taken together; 0 for one matrix after another.

    Returns
    -------
    list of (values, vectors)
        In the order of `matrices`.

    Raises
    ------
    FactorizationError
        One of them is not finite, or the iteration did not converge.

    Examples
    --------
    >>> import numpy as np
    >>> [values for values, _ in eigh_many([np.eye(2), np.diag([3.0, 1.0])])]
    [array([1., 1.]), array([1., 3.])]
    """
    sizes = Counter(m.shape[0] for m in matrices)
    together = [n for n, count in sizes.items() if 0 < n <= batched_up_to and count > 1]
    found: dict[int, tuple[Array, Array]] = {}
    for n in together:
        places = [i for i, m in enumerate(matrices) if m.shape[0] == n]
        xp = array_namespace(matrices[places[0]])
        values, vectors = _eigh(xp.stack([matrices[i] for i in places]))
        found |= {i: (values[k, :], vectors[k, :, :]) for k, i in enumerate(places)}
    return [found[i] if i in found else eigh(m) for i, m in enumerate(matrices)]


def _eigh(m: Array, checks: DeferredChecks | None = None) -> tuple[Array, Array]:
    """`eigh` of a matrix, or of a stack of them, which CuPy takes together."""
    xp, n = array_namespace(m), m.shape[-1]
    own = DeferredChecks() if checks is None else checks
    own.require(are_finite(m), lambda: FactorizationError(f"{_nan(n)}: no eigendecomposition"))
    with _failures_raise(xp, f"the eigendecomposition of a {n}×{n} matrix failed"):
        if array_api_compat.is_cupy_namespace(xp):
            values, vectors = _eigh_cupy(xp, m)
        else:
            values, vectors = xp.linalg.eigh(m)
    error = FactorizationError(f"the eigendecomposition of a {n}×{n} matrix is not finite")
    own.require(are_finite(values, vectors), lambda: error)
    if checks is None:
        own.wait()
    return values, _row_major(vectors)


def _eigh_cupy(xp: Any, m: Any) -> tuple[Any, Any]:
    """Zeros and the identity for a zero matrix, where CuPy returns NaN; the same where it is NaN.

    Whether it is that may not be known yet, and nobody says what cuSOLVER would do.
    """
    size = xp.max(xp.abs(m), axis=(-2, -1), keepdims=True)
    usable = (size > 0) & (size < xp.inf)
    values, vectors = xp.linalg.eigh(xp.where(usable, m, Backend.of(m).eye(m.shape[-1])))
    return xp.where(usable[..., 0], values, xp.zeros_like(values)), vectors


def rounding_error(values: Array, n: int) -> Array:
    """Rounding error of the eigenvalues of an n × n matrix, n · eps · max |values| (0-d array).

    Examples
    --------
    >>> import numpy as np
    >>> bool(rounding_error(np.asarray([0.0, 8.0]), 2) == 16 * np.finfo(float).eps)
    True
    """
    xp = array_namespace(values)
    return xp.finfo(values.dtype).eps * n * xp.max(xp.abs(values))


def resolved_eigh(m: Array) -> tuple[Array, Array]:
    """`eigh` of a symmetric matrix, eigenvalues within rounding error of 0 being made 0.

    Parameters
    ----------
    m : Array, shape (n, n) or (k, n, n)
        One matrix, or several.

    Returns
    -------
    values : Array, shape ([k,] n)
    vectors : Array, shape ([k,] n, n)

    Raises
    ------
    FactorizationError
        As `eigh`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[0.1, 0.7, 0.3]])
    >>> resolved_eigh(x.T @ x)[0].tolist()[:2]
    [0.0, 0.0]
    """
    if m.ndim == 2:
        return _resolved(*eigh(m))
    xp = array_namespace(m)
    pairs = [_resolved(*pair) for pair in eigh_many([m[i, ...] for i in range(m.shape[0])])]
    return xp.stack([values for values, _ in pairs]), xp.stack([vectors for _, vectors in pairs])


def _resolved(values: Array, vectors: Array) -> tuple[Array, Array]:
    xp = array_namespace(values)
    large = xp.abs(values) > rounding_error(values, values.shape[0])
    return xp.where(large, values, xp.zeros_like(values)), vectors


def spectral_norm(m: Array) -> Array:
    """Largest absolute eigenvalue of a symmetric matrix (0-d array).

    Examples
    --------
    >>> import numpy as np
    >>> float(spectral_norm(np.asarray([[0.0, 2.0], [2.0, 0.0]])))
    2.0
    """
    xp = array_namespace(m)
    return xp.max(xp.abs(eigh(m)[0]))
