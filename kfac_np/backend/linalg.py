"""Linear algebra of symmetric positive definite matrices, by the Array API standard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import array_api_compat

from kfac_np.backend.array import Array, Backend, array_namespace
from kfac_np.backend.checks import all_finite
from kfac_np.backend.precision import tf32
from kfac_np.errors import FactorizationError

__all__ = ["cholesky", "eigh", "eigh_many", "spd_inverse", "spectral_norm", "symmetrize"]

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
    with _failures_raise(xp, f"a {n}×{n} matrix is not positive definite"):
        factor = xp.linalg.cholesky(m)
    if not all_finite(factor):
        raise FactorizationError(f"a {n}×{n} matrix is not positive definite")
    return factor


def spd_inverse(m: Array) -> Array:
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
    if not all_finite(m):
        raise FactorizationError(f"a {m.shape[0]}×{m.shape[0]} matrix has NaN or Inf: no inverse")
    xp = array_namespace(m)
    if array_api_compat.is_cupy_namespace(xp):
        with tf32(Backend.of(m), enabled=False):
            half = _inverse_factor_cupy(xp, m)
            inverse = symmetrize(half.T @ half)
    else:
        half = xp.zeros_like(m)
        _inverse_factor(m, half)
        inverse = _gram_of_lower(half)
    # A factor may overflow, which is no error by itself, but NaN and Inf stay in products.
    if not all_finite(inverse):
        raise FactorizationError(f"a {m.shape[0]}×{m.shape[0]} matrix is not positive definite")
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
    with _failures_raise(xp, f"a {n}×{n} matrix is not positive definite"):
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


def _inverse_factor_cupy(xp: Any, m: Any) -> Any:
    """L⁻¹ with m = L Lᵀ, by one factorisation and one triangular solution."""
    from cupyx.scipy.linalg import solve_triangular

    n = m.shape[0]
    with _failures_raise(xp, f"a {n}×{n} matrix is not positive definite"):
        factor = xp.linalg.cholesky(m)
    return solve_triangular(factor, Backend.of(m).eye(n), lower=True)


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
    with _failures_raise(xp, f"the eigendecomposition of a {n}×{n} matrix failed"):
        values, vectors = xp.linalg.eigh(m)
    if not all_finite(values, vectors):
        raise FactorizationError(f"the eigendecomposition of a {n}×{n} matrix is not finite")
    return values, _row_major(vectors)


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
        values, vectors = _eigh_stack([matrices[i] for i in places])
        found |= {i: (values[k, :], vectors[k, :, :]) for k, i in enumerate(places)}
    return [found[i] if i in found else eigh(m) for i, m in enumerate(matrices)]


def _eigh_stack(matrices: Sequence[Array]) -> tuple[Array, Array]:
    xp, n = array_namespace(*matrices), matrices[0].shape[0]
    stack = xp.stack(list(matrices))
    if not all_finite(stack):
        raise FactorizationError(f"a {n}×{n} matrix has NaN or Inf: no eigendecomposition")
    zero = ~xp.any(xp.not_equal(stack, 0), axis=(1, 2), keepdims=True)  # as in `eigh`
    eye = Backend.of(stack).eye(n)
    with _failures_raise(xp, f"the eigendecomposition of a {n}×{n} matrix failed"):
        values, vectors = xp.linalg.eigh(xp.where(zero, eye, stack))
    if not all_finite(values, vectors):
        raise FactorizationError(f"the eigendecomposition of a {n}×{n} matrix is not finite")
    nothing = xp.zeros_like(values)
    return xp.where(zero[:, :, 0], nothing, values), _row_major(xp.where(zero, eye, vectors))


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
