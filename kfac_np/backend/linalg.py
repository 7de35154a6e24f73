"""Linear algebra of symmetric positive definite matrices, by the Array API standard."""

from __future__ import annotations

import array_api_compat

from kfac_np.backend.array import Array, Backend, array_namespace
from kfac_np.backend.checks import all_finite
from kfac_np.errors import FactorizationError

__all__ = ["eigh", "spd_inverse", "spectral_norm", "symmetrize"]

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


def spd_inverse(m: Array) -> Array:
    """Invert a symmetric positive definite matrix.

    By halves: with M = [[P, Q], [Qᵀ, S]] and the Schur complement Z = S - Qᵀ P⁻¹ Q, both P and
    Z are positive definite exactly if M is, and M⁻¹ follows from P⁻¹ and Z⁻¹ by matrix products
    alone. Products are what every backend does fastest, with one thread pool.

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
    inverse = symmetrize(_inverse_by_halves(m))
    # CuPy's Cholesky does not raise by default: it leaves NaN, which every later product keeps.
    if not all_finite(inverse):
        raise FactorizationError(f"a {m.shape[0]}×{m.shape[0]} matrix is not positive definite")
    return inverse


def _inverse_by_halves(m: Array) -> Array:
    n = m.shape[0]
    xp = array_namespace(m)
    if n <= _LEAF:
        return _inverse_by_cholesky(m)
    h = n // 2
    p, q, s = m[:h, :h], m[:h, h:], m[h:, h:]
    p_inv = _inverse_by_halves(p)
    t = p_inv @ q
    z_inv = _inverse_by_halves(symmetrize(s - q.T @ t))
    tz = t @ z_inv
    out = xp.empty_like(m)
    out[:h, :h] = p_inv + tz @ t.T
    out[:h, h:] = -tz
    out[h:, :h] = -tz.T
    out[h:, h:] = z_inv
    return out


def _inverse_by_cholesky(m: Array) -> Array:
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
    return half.T @ half


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
