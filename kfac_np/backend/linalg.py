"""Linear algebra of symmetric positive definite matrices, by the Array API standard."""

from __future__ import annotations

import array_api_compat

from kfac_np.backend.array import Array, Backend, array_namespace
from kfac_np.backend.checks import all_finite
from kfac_np.errors import FactorizationError

__all__ = ["cholesky", "eigh", "spd_inverse", "spectral_norm", "symmetrize"]

_LEAF = 96  # below this a Cholesky factorisation and a small inverse beat more recursion


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


def cholesky(m: Array) -> Array:
    """Lower triangular L with L Lᵀ = m.

    Parameters
    ----------
    m : Array, shape (n, n)
        Symmetric positive definite.

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
    xp, n = array_namespace(m), m.shape[0]
    if not all_finite(m):
        raise FactorizationError(f"a {n}×{n} matrix has NaN or Inf: no Cholesky factor")
    try:
        factor = xp.linalg.cholesky(m)
    except Exception as error:  # every library has a class of its own for this
        if not _is_linalg_error(error):
            raise
        raise FactorizationError(f"a {n}×{n} matrix is not positive definite") from None
    # cuSOLVER reports failure through a flag that CuPy ignores
    if not (all_finite(factor) and bool(xp.all(xp.linalg.diagonal(factor) > 0))):
        raise FactorizationError(f"a {n}×{n} matrix is not positive definite")
    return factor


def spd_inverse(m: Array) -> Array:
    """Invert a symmetric positive definite matrix.

    By halves: with M = [[P, Qᵀ], [Q, S]] and P = L Lᵀ, the Schur complement S - K Kᵀ with
    K = Q L⁻ᵀ has the rest of the Cholesky factor, whose inverse follows by matrix products alone.
    Products are what every backend does fastest, with one thread pool. That the factor is
    inverted, and not P itself, keeps the error at that of Cholesky's method, condition · eps:
    Schur complements formed with P⁻¹ would lose the square of the condition.

    Parameters
    ----------
    m : Array, shape (n, n)
        Only its symmetric part is meant; it is not checked.

    Returns
    -------
    Array, shape (n, n)
        Symmetric.

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
    if not all_finite(m):
        raise FactorizationError(f"a {m.shape[0]}×{m.shape[0]} matrix has NaN or Inf: no inverse")
    half = _inverse_factor(m)
    inverse = symmetrize(half.T @ half)
    # CuPy's Cholesky does not raise by default: it leaves NaN, which every later product keeps.
    if not all_finite(inverse):
        raise FactorizationError(f"a {m.shape[0]}×{m.shape[0]} matrix is not positive definite")
    return inverse


def _inverse_factor(m: Array) -> Array:
    """L⁻¹ with m = L Lᵀ, lower triangular."""
    n = m.shape[0]
    if n <= _LEAF:
        return _inverse_factor_by_cholesky(m)
    h = n // 2
    p = _inverse_factor(m[:h, :h])
    k = m[h:, :h] @ p.T
    s = _inverse_factor(m[h:, h:] - k @ k.T)
    out = array_namespace(m).zeros_like(m)
    out[:h, :h] = p
    out[h:, :h] = -(s @ (k @ p))
    out[h:, h:] = s
    return out


def _inverse_factor_by_cholesky(m: Array) -> Array:
    xp = array_namespace(m)
    n = m.shape[0]
    try:
        factor = xp.linalg.cholesky(m)
        half = xp.linalg.inv(factor)
    except Exception as error:  # every library has a class of its own for this
        if not _is_linalg_error(error):
            raise
        raise FactorizationError(f"a {n}×{n} matrix is not positive definite") from None
    if array_api_compat.is_cupy_namespace(xp):
        # cuSOLVER reports failure through a flag that CuPy ignores; a failed factor is not
        # always NaN, but then its diagonal is not positive.
        bad = ~xp.all(xp.linalg.diagonal(factor) > 0)
        half = xp.where(bad, xp.nan, half)
    return half


def _is_linalg_error(error: Exception) -> bool:
    return "LinAlgError" in type(error).__name__ or "linalg" in str(error).lower()


def eigh(m: Array) -> tuple[Array, Array]:
    """Eigenvalues (ascending) and eigenvectors (columns) of a symmetric matrix.

    Parameters
    ----------
    m : Array, shape (n, n)

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
    n = m.shape[0]
    if not all_finite(m):
        raise FactorizationError(f"a {n}×{n} matrix has NaN or Inf: no eigendecomposition")
    xp = array_namespace(m)
    if not bool(xp.any(xp.not_equal(m, 0))):
        backend = Backend.of(m)  # CuPy returns NaN for the zero matrix
        return backend.zeros((n,)), backend.eye(n)
    try:
        values, vectors = xp.linalg.eigh(m)
    except Exception as error:
        if not _is_linalg_error(error):
            raise
        raise FactorizationError(f"the eigendecomposition of a {n}×{n} matrix failed") from error
    if not all_finite(values, vectors):
        raise FactorizationError(f"the eigendecomposition of a {n}×{n} matrix is not finite")
    return values, vectors


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
