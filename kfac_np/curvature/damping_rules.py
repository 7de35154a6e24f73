"""Rules that split damping between two Kronecker factors: (A, G, γ) → (γ_A, γ_G).

What a rule gives is added to the diagonals of A and G. With γ = √λ the product
(G + γ_G I) ⊗ (A + γ_A I) approximates G ⊗ A + λI. The exact matrix G ⊗ A + λI is not a rule of this
kind: see ``KFACBlock(exact_damping=True)``.

A multiple of I depends on the units of features, hidden units and outputs. Where damping is to have
none, rules are given A and G in the layers' own units: see `kfac_np.curvature.Curvature.units`.

A is given by its diagonal alone where it has no other entries (embeddings).
"""

from __future__ import annotations

from collections.abc import Callable

from kfac_np.backend import Array, all_finite, array_namespace
from kfac_np.curvature.factors import factor
from kfac_np.matrices.base import norm

__all__ = [
    "DampingRule",
    "no_pi",
    "pi_frobenius",
    "pi_spectral",
    "pi_trace",
    "plain",
]

DampingRule = Callable[[Array, Array, float], tuple[Array | float, Array | float]]


def pi_trace(A: Array, G: Array, gamma: float) -> tuple[Array, Array]:
    """γ_A = π γ, γ_G = γ / π, π² = (tr A / dim A) / (tr G / dim G).

    A → cA, G → G/c leaves the damped product as it is. Where a trace is zero (dead units) or not
    finite, π = 1.

    References
    ----------
    Martens & Grosse 2015, §6.3.

    Examples
    --------
    >>> import numpy as np
    >>> a, g = pi_trace(4.0 * np.eye(2), np.eye(3), 0.1)
    >>> round(float(a), 12), round(float(g), 12)
    (0.2, 0.05)
    """
    xp = array_namespace(A, G)
    return _split(xp.mean(factor(A).diagonal()), xp.mean(factor(G).diagonal()), gamma)


def pi_frobenius(A: Array, G: Array, gamma: float) -> tuple[Array, Array]:
    """γ_A = π γ, γ_G = γ / π, π² = (‖A‖_F / √dim A) / (‖G‖_F / √dim G).

    Examples
    --------
    >>> import numpy as np
    >>> a, g = pi_frobenius(4.0 * np.eye(2), np.eye(3), 0.1)
    >>> round(float(a), 12), round(float(g), 12)
    (0.2, 0.05)
    """
    return _split(norm(A) / A.shape[0] ** 0.5, norm(G) / G.shape[0] ** 0.5, gamma)


def pi_spectral(A: Array, G: Array, gamma: float) -> tuple[Array | float, Array | float]:
    """γ_A = π γ, γ_G = γ / π, π² = ‖A‖₂ / ‖G‖₂ (two eigendecompositions).

    Where a factor is not finite and has no eigenvalues, π = 1.

    Examples
    --------
    >>> import numpy as np
    >>> a, g = pi_spectral(4.0 * np.eye(2), np.eye(3), 0.1)
    >>> round(float(a), 12), round(float(g), 12)
    (0.2, 0.05)
    """
    if not all_finite(A, G):
        return gamma, gamma
    return _split(factor(A).spectral_norm(), factor(G).spectral_norm(), gamma)


def no_pi(A: Array, G: Array, gamma: float) -> tuple[float, float]:
    """γ_A = γ_G = γ, that is π = 1: A → cA, G → G/c changes the damped product.

    Examples
    --------
    >>> import numpy as np
    >>> no_pi(np.eye(2), np.eye(3), 0.1)
    (0.1, 0.1)
    """
    return gamma, gamma


def plain(A: Array, G: Array, gamma: float) -> tuple[float, float]:
    """γ_A = γ_G = γ² = λ: each factor plus λI. A → cA, G → G/c changes the damped product.

    Examples
    --------
    >>> import numpy as np
    >>> plain(np.eye(2), np.eye(3), 0.5)
    (0.25, 0.25)
    """
    return gamma**2, gamma**2


def _split(norm_a: Array, norm_g: Array, gamma: float) -> tuple[Array, Array]:
    xp = array_namespace(norm_a, norm_g)
    both = (norm_a > 0) & (norm_g > 0) & xp.isfinite(norm_a) & xp.isfinite(norm_g)
    one = xp.ones_like(norm_a)
    # roots first: the quotient of a large and a tiny norm would overflow
    pi = xp.sqrt(xp.where(both, norm_a, one)) / xp.sqrt(xp.where(both, norm_g, one))
    return pi * gamma, gamma / pi
