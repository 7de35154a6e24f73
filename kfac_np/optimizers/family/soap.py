"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, array_namespace, eigh
from kfac_np.optimizers.family.base import (
    Observation,
    Preconditioner,
    Slots,
    between,
    debiased,
    mixed,
    sides,
)
from kfac_np.validation import (
    plain_fields,
    require_flag,
    require_in,
    require_integer,
    require_positive,
)

__all__ = ["SOAP"]

Basis = dict[str, Array]


@final
@dataclass(frozen=True)
class SOAP(Preconditioner):
    """D = U [ m̂' / (√v + ε) ] Vᵀ: Adam on g' = Uᵀ g V, for the eigenvectors U of L and V of R.

    L and R are averages of g gᵀ and gᵀ g. m is averaged in the parameter's own coordinates, and
    m' = Uᵀ m V; v is averaged in those of the basis. The first step finds a basis and moves
    nothing. Later bases follow by one step of orthogonal iteration, U ← qr(L U), with columns in
    descending order, and v in the order of the columns.

    Parameters
    ----------
    beta1, beta2 : float
        Of m and v, in [0, 1).
    beta_basis : float
        Of L and R, in [0, 1).
    epsilon : float
        Beside √v, before the averages are debiased.
    interval : int
        Steps between two bases.
    largest : int
        A side of more rows keeps its own coordinates.
    correct_bias : bool
        Debias the averages of g and g'².

    References
    ----------
    Vyas et al. 2024, arXiv:2409.11321, algorithm 3.

    Examples
    --------
    >>> import numpy as np
    >>> soap = SOAP()
    >>> g = Observation(np.diag([5.0, 0.1]))
    >>> d, slots = soap.direction(soap.init(np.eye(2)), g, 1)
    >>> soap.direction(slots, g, 2)[0].round(5)
    array([[1., 0.],
           [0., 1.]])
    """

    beta1: float = 0.95
    beta2: float = 0.95
    beta_basis: float = 0.95
    epsilon: float = 1e-8
    interval: int = 10
    largest: int = 4096
    correct_bias: bool = True

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("beta1", "beta2", "beta_basis"):
            require_in(f"SOAP {name}", getattr(self, name), "[0, 1)")
        require_positive("SOAP epsilon", self.epsilon)
        for name in ("interval", "largest"):
            require_integer(f"SOAP {name}", getattr(self, name))
        require_flag("SOAP correct_bias", self.correct_bias)

    def factorises(self, k: int) -> bool:
        return (k - 1) % self.interval == 0

    def init(self, p: Array) -> Slots:
        zeros, backend = array_namespace(p).zeros_like(p), Backend.of(p)
        basis = {name: backend.eye(n) for name, n in sides(p, self.largest).items()}
        moments = {name: 0.0 * m for name, m in basis.items()}
        return {"first": zeros, "second": zeros, "moments": moments, "basis": basis}

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        xp, shape = array_namespace(seen.gradient), seen.gradient.shape
        g = xp.reshape(seen.gradient, (shape[0], -1))
        squares = {"L": g @ g.T, "R": g.T @ g}
        moments = {n: mixed(self.beta_basis, m, squares[n]) for n, m in slots["moments"].items()}
        if k == 1:
            basis = {n: xp.flip(eigh(m)[1], axis=1) for n, m in moments.items()}
            return xp.zeros_like(seen.gradient), {**slots, "moments": moments, "basis": basis}

        basis, steps = slots["basis"], k - 1
        first = mixed(self.beta1, slots["first"], seen.gradient)
        rotated, mean = _into(basis, g), _into(basis, xp.reshape(first, g.shape))
        second = mixed(self.beta2, xp.reshape(slots["second"], g.shape), rotated * rotated)
        d = _out_of(basis, mean / (xp.sqrt(second) + self.epsilon))
        if self.correct_bias:
            d = d * (debiased(self.beta1, steps) / debiased(self.beta2, steps) ** 0.5)
        if self.factorises(k):
            basis, second = _renewed(basis, moments, second)
        new = {"first": first, "second": xp.reshape(second, shape)}
        return xp.reshape(d, shape), {**new, "moments": moments, "basis": basis}


def _into(basis: Basis, m: Array) -> Array:
    """Uᵀ m V."""
    return between({n: u.T if n == "L" else u for n, u in basis.items()}, m)


def _out_of(basis: Basis, m: Array) -> Array:
    """U m Vᵀ."""
    return between({n: u if n == "L" else u.T for n, u in basis.items()}, m)


def _renewed(basis: Basis, moments: Basis, second: Array) -> tuple[Basis, Array]:
    """Columns in descending order of uᵀ L u, one step of orthogonal iteration; v likewise."""
    xp, new = array_namespace(second), {}
    for name, u in basis.items():
        product = moments[name] @ u
        order = xp.argsort(-xp.sum(u * product, axis=0))
        second = xp.take(second, order, axis=0 if name == "L" else 1)
        new[name] = xp.linalg.qr(xp.take(product, order, axis=1))[0]
    return new, second
