"""The inverse of a difference of two Kronecker products."""

from __future__ import annotations

from kfac_np.backend import Array, DeferredChecks, clip, eigh

__all__ = ["difference_inverse"]


def difference_inverse(
    root_a: Array,
    root_g: Array,
    cross_a: Array,
    cross_g: Array,
    checks: DeferredChecks | None = None,
) -> tuple[Array, Array, Array]:
    """(G ⊗ A - Y Yᵀ ⊗ X Xᵀ)⁻¹ = (K_G ⊗ K_A) diag(1 / gaps) (K_G ⊗ K_A)ᵀ.

    A and G are positive definite and given by roots of their inverses, A⁻¹ = H Hᵀ. Where
    Hᵀ X Xᵀ H = E diag(s) Eᵀ, K = H E makes both terms diagonal: Kᵀ A K = I and
    Kᵀ X Xᵀ K = diag(s). The gaps are 1 - s^G s^Aᵀ, and the difference is positive definite if and
    only if all of them are positive. (The paper has the symmetric root A^{-1/2} for H; any other
    does, and its Cholesky factor costs less.)

    Parameters
    ----------
    root_a, root_g : Array, shapes (d_in, d_in) and (d_out, d_out)
        Any H with H Hᵀ = A⁻¹, and of G⁻¹.
    cross_a, cross_g : Array, shapes (d_in, anything) and (d_out, anything)
        X and Y.
    checks : DeferredChecks, optional
        As with `kfac_np.backend.eigh`.

    Returns
    -------
    K_A, K_G : Array
        In the shapes of the roots.
    gaps : Array, shape (d_out, d_in)
        Of either sign, by rounding or because the difference is not positive definite.

    Raises
    ------
    FactorizationError
        Something is not finite.

    References
    ----------
    Martens & Grosse 2015, appendix B.

    Examples
    --------
    >>> import numpy as np
    >>> K_A, K_G, gaps = difference_inverse(
    ...     0.5 * np.eye(1), np.eye(1), np.ones((1, 1)), np.ones((1, 1)))
    >>> K_A * K_G / gaps * K_A * K_G  # 1 / (4 · 1 - 1 · 1)
    array([[0.33333333]])
    """
    k_a, s_a = _diagonalised(root_a, cross_a, checks)
    k_g, s_g = _diagonalised(root_g, cross_g, checks)
    return k_a, k_g, 1.0 - s_g[:, None] * s_a[None, :]


def _diagonalised(root: Array, cross: Array, checks: DeferredChecks | None) -> tuple[Array, Array]:
    c = root.T @ cross
    values, vectors = eigh(c @ c.T, checks)
    return root @ vectors, clip(values, low=0.0)
