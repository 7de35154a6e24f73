"""Eigenbases of Kronecker factors that are kept for a while, as entries of moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

from kfac_np.backend import Array, all_finite, array_namespace, to_numpy
from kfac_np.curvature.base import Moments, Units
from kfac_np.curvature.blocks.spectral import eigenbasis
from kfac_np.curvature.factors import factor, rescaled
from kfac_np.errors import FactorizationError

__all__ = ["BASIS", "first_basis", "next_bases"]

BASIS = ("U_A", "U_G", "unit_A", "unit_G")
"""Entries of moments that are of a basis, and are not averaged."""


def first_basis(path: str, m: Moments, units: Units | None = None) -> Moments:
    """The eigenbasis of the A and G at hand, of age 0.

    Parameters
    ----------
    path : str
        Of the parameter, for errors.
    m : dict
        "A" and "G", as `kfac_np.curvature.factors` stores them, of all groups.
    units : tuple of Array, optional
        Take A and G in these: the basis is that of diag(u) (G ⊗ A) diag(u).

    Returns
    -------
    dict
        "U_A" (unless A is diagonal) and "U_G", eigenvectors as columns; "age", a 0-d array;
        "absent", shape ([groups,] d_out, d_in + 1), is true where A or G has no eigenvalue;
        "unit_G" and "unit_A", shape ([groups,] d), where there are units. Factors that are not
        finite have the identity as basis: moments that are not finite are the business of who uses
        them.

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
        return _new(m, units)
    except FactorizationError as error:
        raise FactorizationError(f"layer {path}: factors A, G: {error}") from error


def next_bases(
    old: Mapping[str, Moments], interval: int, units: Mapping[str, Units] | None = None
) -> dict[str, Moments]:
    """Bases for the estimate after `old`: one estimate older, or new, of the averages in `old`.

    `old` has those parameters only that have a basis. One that was made in no units is renewed as
    soon as it has some.

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
        kept = {name: x for name, x in m.items() if name in BASIS}
        bases[path] = {**kept, "age": _number(age + 1.0, m["G"])}
        own = (units or {}).get(path)
        if age + 1.0 >= interval or (own is not None and "unit_G" not in m):
            with suppress(FactorizationError):
                bases[path] = _new(m, own)
    return bases


def _new(m: Moments, units: Units | None) -> Moments:
    own: Moments = {}
    if units is not None:
        s, x = units
        own = {"unit_G": s[..., :, 0], "unit_A": x[..., 0, :]}
        m = {"A": factor(m["A"]).rescaled(own["unit_A"]), "G": rescaled(m["G"], own["unit_G"])}
    a, g, basis = eigenbasis(m)
    absent = array_namespace(g).logical_or((g <= 0)[..., :, None], (a <= 0)[..., None, :])
    return {**basis, "age": _number(0.0, m["G"]), "absent": absent, **own}


def _number(value: float, like: Array) -> Array:
    """A 0-d array of the dtype of the moments: it is stored, moved and checked like them."""
    return array_namespace(like).asarray(value, dtype=like.dtype, device=like.device)


def _to_host(numbers: Iterable[Array]) -> list[float]:
    """0-d arrays as numbers, moved at once."""
    found = list(numbers)
    return [float(x) for x in to_numpy(array_namespace(*found).stack(found))] if found else []
