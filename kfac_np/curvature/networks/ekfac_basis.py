"""Eigenbases of Kronecker factors that are kept for a while, as entries of moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from kfac_np.backend import Array, all_finite, array_namespace, to_numpy
from kfac_np.curvature.base import Moments
from kfac_np.curvature.blocks.spectral import eigenvectors
from kfac_np.curvature.factors import Factor, factor
from kfac_np.errors import FactorizationError

__all__ = ["first_basis", "next_bases"]


def first_basis(path: str, m: Moments, *, unit_free: bool = False) -> Moments:
    """The eigenbasis of the A and G at hand, of age 0.

    Parameters
    ----------
    path : str
        Of the parameter, for errors.
    m : dict
        "A" and "G", as `kfac_np.curvature.factors` stores them, of all groups.
    unit_free : bool
        Take A and G in units of their own diagonals: D_A⁻¹ᐟ² A D_A⁻¹ᐟ² = U Λ Uᵀ, and the basis is
        D_A⁻¹ᐟ² U. One-hot inputs have no other units than 1.

    Returns
    -------
    dict
        "U_A" (unless A is diagonal) and "U_G", eigenvectors as columns; "age", a 0-d array;
        "absent", shape ([groups,] d_out, d_in + 1), is true where A or G has no eigenvalue. Factors
        that are not finite have the identity as basis: moments that are not finite are the
        business of who uses them.

    Raises
    ------
    FactorizationError
        A finite factor has no eigendecomposition.

    Examples
    --------
    >>> import numpy as np
    >>> basis = first_basis("0", {"A": np.ones((2, 2)), "G": np.eye(1)})
    >>> (basis["U_A"] ** 2).round(12), basis["absent"]
    (array([[0.5, 0.5],
           [0.5, 0.5]]), array([[ True, False]]))
    """
    if not all_finite(m["A"], m["G"]):
        m = {name: array_namespace(m[name]).zeros_like(m[name]) for name in ("A", "G")}
    try:
        return _new(m, unit_free)
    except FactorizationError as error:
        raise FactorizationError(f"layer {path}: factors A, G: {error}") from error


def next_bases(
    old: Mapping[str, Moments], interval: int, *, unit_free: bool = False
) -> dict[str, Moments]:
    """Bases for the estimate after `old`: one estimate older, or new, of the averages in `old`.

    `old` has those parameters only that have a basis.

    A basis that should be new, and whose factors have no eigendecomposition, is kept. Its age says
    so, and it is tried again at the next estimate.

    Examples
    --------
    >>> import numpy as np
    >>> m = {"A": np.eye(2), "G": np.eye(1)}
    >>> old = {"0": m | first_basis("0", m)}
    >>> [float(next_bases(old, interval)["0"]["age"]) for interval in (1, 2)]
    [0.0, 1.0]
    """
    ages = _to_host([m["age"] for m in old.values()])
    bases: dict[str, Moments] = {}
    for (path, m), age in zip(old.items(), ages, strict=True):
        bases[path] = {**eigenvectors(m), "age": _number(age + 1.0, m["G"])}
        if age + 1.0 >= interval:
            with suppress(FactorizationError):
                bases[path] = _new(m, unit_free)
    return bases


def _new(m: Moments, unit_free: bool) -> Moments:
    (a, u_a), (g, u_g) = (_eigh(factor(m[name]), unit_free) for name in "AG")
    absent = array_namespace(g).logical_or((g <= 0)[..., :, None], (a <= 0)[..., None, :])
    basis = {"U_G": u_g, "age": _number(0.0, m["G"]), "absent": absent}
    return basis if u_a is None else {"U_A": u_a, **basis}


def _eigh(m: Factor, unit_free: bool) -> tuple[Array, Any]:
    """`Factor.eigh`, or that in own units, from which the vectors are brought back."""
    if not unit_free:
        return m.eigh()
    scaled, unit = m.in_own_units()
    values, u = scaled.eigh()
    return values, u if u is None else unit[..., :, None] * u


def _number(value: float, like: Array) -> Array:
    """A 0-d array of the dtype of the moments: it is stored, moved and checked like them."""
    return array_namespace(like).asarray(value, dtype=like.dtype, device=like.device)


def _to_host(numbers: Iterable[Array]) -> list[float]:
    """0-d arrays as numbers, moved at once."""
    found = list(numbers)
    return [float(x) for x in to_numpy(array_namespace(*found).stack(found))] if found else []
