"""Shampoo and KL-Shampoo: inverse roots of the gradient's second moments by rows and by columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, array_namespace, eigh, rounding_error
from kfac_np.optimizers.family.base import (
    Observation,
    Preconditioner,
    Slots,
    as_matrix,
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

__all__ = ["Shampoo", "inverse_root"]


def inverse_root(m: Array, exponent: float, epsilon: float) -> Array:
    """(m + ε I)^(-e) of a symmetric positive semi-definite matrix, by its eigendecomposition.

    Eigenvalues that rounding made smaller than n · eps · ‖m‖₂, or negative, become that: without
    it directions that are never seen would be taken for well-known ones.

    Parameters
    ----------
    m : Array, shape (n, n)
    exponent : float
        e.
    epsilon : float
        ε, positive.

    Returns
    -------
    Array, shape (n, n)

    Raises
    ------
    FactorizationError
        `m` is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> inverse_root(np.diag([16.0, 81.0]), 0.25, 1e-12).round(4)
    array([[0.5   , 0.    ],
           [0.    , 0.3333]])
    """
    values, u = eigh(m)
    least = rounding_error(values, m.shape[0])
    powers = (array_namespace(m).maximum(values, least) + epsilon) ** -exponent
    return (u * powers[None, :]) @ u.T


@final
@dataclass(frozen=True)
class Shampoo(Preconditioner):
    """D = L^(-e) m̂ R^(-e): L and R are averages of g gᵀ and of gᵀ g, m̂ one of g.

    KL-Shampoo (`kl`) averages g R⁻¹ gᵀ and gᵀ L⁻¹ g instead, e = 1/2: the Kronecker product that is
    nearest to the second moment of g in the sense of the Kullback-Leibler divergence.

    Parameters
    ----------
    beta1 : float
        Of m, in [0, 1), which is debiased; 0 for the gradient itself.
    beta2 : float
        Of L and R, in [0, 1], debiased; with 1 they are sums.
    epsilon : float
        Added to their eigenvalues.
    exponent : float, optional
        e. Without it 1/4 with two factors, 1/2 with one; 1/2 for `kl`.
    interval, start : int
        Roots are taken in step `start`, and then in steps that the interval divides. Before, they
        are the identity, and a method that is grafted moves alone.
    largest : int
        A side of more rows has no factor (an embedding's, for example).
    kl : bool

    References
    ----------
    Gupta, Koren & Singer 2018, arXiv:1802.09568, algorithm 1; Shi et al. 2023, arXiv:2309.06497
    (averages, grafting); Lin et al. 2025, arXiv:2509.03378 (KL-Shampoo).

    Examples
    --------
    >>> import numpy as np
    >>> shampoo = Shampoo(beta1=0.0)
    >>> shampoo.direction(shampoo.init(np.eye(2)), Observation(np.diag([5.0, 0.1])), 1)[0].round(6)
    array([[1., 0.],
           [0., 1.]])
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-10
    exponent: float | None = None
    interval: int = 10
    start: int = 1
    largest: int = 4096
    kl: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        require_in("Shampoo beta1", self.beta1, "[0, 1)")
        require_in("Shampoo beta2", self.beta2, "[0, 1]")
        require_positive("Shampoo epsilon", self.epsilon)
        if self.exponent is not None:
            require_positive("Shampoo exponent", self.exponent, zero=True)
        for name in ("interval", "start", "largest"):
            require_integer(f"Shampoo {name}", getattr(self, name))
        require_flag("Shampoo kl", self.kl)

    def ready(self, k: int) -> bool:
        return k >= self.start

    def factorises(self, k: int) -> bool:
        return k == self.start or (k > self.start and k % self.interval == 0)

    def init(self, p: Array) -> Slots:
        backend = Backend.of(p)
        identity = {name: backend.eye(n) for name, n in sides(p, self.largest).items()}
        moments = {name: 0.0 * m for name, m in identity.items()}
        first = {"first": array_namespace(p).zeros_like(p)} if self.beta1 else {}
        return {**first, "moments": moments, "roots": identity}

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        g, roots = seen.gradient, slots["roots"]
        d, first = g, {}
        if self.beta1:
            first = {"first": mixed(self.beta1, slots["first"], g)}
            d = debiased(self.beta1, k) * first["first"]
        squares = self._squares(roots, array_namespace(g).reshape(g, (g.shape[0], -1)))
        moments = {n: mixed(self.beta2, m, squares[n]) for n, m in slots["moments"].items()}
        if self.factorises(k):
            roots = self._roots(moments, k)
        d = as_matrix(lambda m: between(roots, m), d)
        return d, {**first, "moments": moments, "roots": roots}

    def _squares(self, roots: Mapping[str, Array], g: Array) -> dict[str, Array]:
        """g gᵀ and gᵀ g; with `kl` of gradients that the other side's root was applied to."""
        rows = columns = g
        if self.kl:
            rows = between({name: r for name, r in roots.items() if name == "R"}, g)
            columns = between({name: r for name, r in roots.items() if name == "L"}, g)
        return {"L": rows @ rows.T, "R": columns.T @ columns}

    def _roots(self, moments: Mapping[str, Array], k: int) -> dict[str, Array]:
        e = self.exponent
        if e is None:
            e = 0.5 if self.kl else 0.5 / max(1, len(moments))
        scale = debiased(self.beta2, k)
        return {n: inverse_root(scale * m, e, self.epsilon) for n, m in moments.items()}
