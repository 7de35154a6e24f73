"""Ψ and Σ⁻¹ of one layer given the next, in factored form."""

from __future__ import annotations

from kfac_np.backend import (
    Array,
    DeferredChecks,
    are_finite,
    array_namespace,
    clip,
    eigh,
    resolved_eigh,
    spd_inverse,
    symmetrize,
)
from kfac_np.backend.linalg import cholesky
from kfac_np.curvature.base import Factors
from kfac_np.curvature.ladder import Ladder
from kfac_np.errors import FactorizationError
from kfac_np.matrices import difference_inverse

__all__ = ["couple", "pull", "regression", "solve_coupled"]

_COUPLING = ("K_A", "K_G", "Psi_A", "Psi_G", "inverse_gaps")
_WELL_CONDITIONED = 1e6


def couple(
    cross: tuple[Array, Array],
    factors: tuple[Factors, Factors],
    damping: float,
    ladder: Ladder,
    previous: Factors | None,
    *,
    stale: bool = False,
) -> Factors:
    """Factors of a layer given the next: Ψ, and Σ⁻¹ = (K_G ⊗ K_A) diag(inverse_gaps) (...)ᵀ.

    Parameters
    ----------
    cross : pair of Array
        A_{i,i+1} and G_{i,i+1}.
    factors : pair of Factors
        Damped inverses "A_inverse", "G_inverse" of the layer and of the next.
    damping : float
        For the record.
    ladder : Ladder
    previous : Factors or None
        The last good ones, kept if the moments are not finite.
    stale : bool
        Whether one of the inverses is an earlier one, to which the moments do not belong.

    Returns
    -------
    Factors
        None at all (which means no coupling: Ψ = 0) if nothing finite can be had.

    Raises
    ------
    FactorizationError
        The moments are not finite and there are no previous factors.

    Examples
    --------
    >>> import numpy as np
    >>> own, half = {"A_inverse": np.eye(1), "G_inverse": np.eye(1)}, 0.5 * np.eye(1)
    >>> f = couple((half, half), (own, own), 0.0, Ladder("0"), None)
    >>> f["Psi_A"], f["inverse_gaps"]  # 1 / (1 - 0.25²)
    (array([[0.5]]), array([[1.06666667]]))
    """
    old = None
    if previous is not None and "Psi_A" in previous:
        old = {name: previous[name] for name in _COUPLING}
    cross_a, cross_g = cross
    if stale or not ladder.holds(are_finite(cross_a, cross_g)):
        return dict(ladder.keep("A_next, G_next", old, damping))
    (own, following), found = factors, {}
    try:
        root = {name: _root(own[f"{name}_inverse"], ladder.checks) for name in "AG"}
        after = {name: _root(following[f"{name}_inverse"], ladder.checks) for name in "AG"}
        found["K_A"], found["K_G"], gaps = difference_inverse(
            root["A"], root["G"], cross_a @ after["A"], cross_g @ after["G"], ladder.checks
        )
        found["Psi_A"] = cross_a @ following["A_inverse"]
        found["Psi_G"] = cross_g @ following["G_inverse"]
        if not ladder.holds(are_finite(*found.values(), gaps)):
            raise FactorizationError("overflow")
    except FactorizationError:
        if old is not None:
            return dict(ladder.keep("A_next, G_next", old, damping))
        ladder.note("A_next, G_next", "left uncoupled", damping)
        return {}
    return {**found, "inverse_gaps": _reciprocal(gaps, ladder)}


def solve_coupled(factors: Factors, v: Array) -> Array:
    """Σ⁻¹ v.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.ones((1, 1))
    >>> solve_coupled({"K_A": 2 * one, "K_G": one, "inverse_gaps": 3 * one}, one)
    array([[12.]])
    """
    k_a, k_g = factors["K_A"], factors["K_G"]
    return k_g @ (factors["inverse_gaps"] * (k_g.T @ v @ k_a)) @ k_a.T


def pull(factors: Factors, v: Array) -> Array:
    """Ψᵀ v, in the shape of the next parameter.

    Examples
    --------
    >>> import numpy as np
    >>> pull({"Psi_A": np.ones((2, 3)), "Psi_G": np.ones((1, 4))}, np.ones((1, 2))).shape
    (4, 3)
    """
    return factors["Psi_G"].T @ v @ factors["Psi_A"]


def regression(cross: Array, m: Array) -> Array:
    """C m⁺: what predicts one vector from another, C their moment and m that of the other.

    Where m is singular, C has nothing in its null space, and C m⁺ m = C still.

    Parameters
    ----------
    cross : Array, shape (n', n)
    m : Array, shape (n, n)

    Returns
    -------
    Array, shape (n', n)

    Examples
    --------
    >>> import numpy as np
    >>> regression(np.asarray([[1.0, 0.0]]), np.diag([2.0, 0.0]))
    array([[0.5, 0. ]])
    """
    try:
        inverse = spd_inverse(m)
        norm = array_namespace(m).linalg.matrix_norm
        if float(norm(m)) * float(norm(inverse)) < _WELL_CONDITIONED:
            return cross @ inverse
    except FactorizationError:
        pass
    xp = array_namespace(m)
    values, vectors = resolved_eigh(symmetrize(m))
    ones = xp.ones_like(values)
    inverse = xp.where(values > 0, ones / xp.where(values > 0, values, ones), 0.0 * ones)
    return (cross @ vectors * inverse[None, :]) @ vectors.T


def _root(inverse: Array, checks: DeferredChecks | None) -> Array:
    """H with H Hᵀ = the inverse of a damped factor, as the ladder made it."""
    try:
        return cholesky(inverse, checks)
    except FactorizationError:
        pass
    xp = array_namespace(inverse)
    values, vectors = eigh(inverse)
    least = float(xp.finfo(values.dtype).eps) * float(xp.max(values))
    return vectors * xp.sqrt(clip(values, low=least))[None, :]


def _reciprocal(gaps: Array, ladder: Ladder) -> Array:
    """1 / gaps; those that rounding, or moments that do not fit, made too small are clipped.

    To what rounding leaves of 1 - 1, or to as much above zero as the worst gap lies below.
    """
    xp = array_namespace(gaps)
    least = max(gaps.shape) * float(xp.finfo(gaps.dtype).eps)
    lowest = xp.min(gaps)
    if not ladder.holds(lowest > least):
        least = max(least, -float(lowest))
        ladder.note("Sigma", "eigenvalues clipped", least)
    return 1.0 / clip(gaps, low=least)
