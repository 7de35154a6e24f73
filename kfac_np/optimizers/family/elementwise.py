"""First-order methods, entry by entry: what is grafted, and what vectors fall back on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, array_namespace, combine
from kfac_np.optimizers.family.base import Observation, Preconditioner, Slots, debiased, mixed
from kfac_np.validation import plain_fields, require_in, require_positive

__all__ = ["AdamScaling", "FirstMoment", "NAdamScaling", "SignMomentum"]


class _Elementwise(Preconditioner):
    """Any parameter is a list of numbers."""

    def supports(self, statistics: object) -> bool:
        return True


@final
@dataclass(frozen=True)
class FirstMoment(_Elementwise):
    """D = m / (1 - β^k), m ← β m + (1 - β) g: a mean of past gradients, for β = 0 the gradient.

    Parameters
    ----------
    beta : float
        In [0, 1).

    Examples
    --------
    >>> import numpy as np
    >>> FirstMoment().direction({}, Observation(np.ones(1)), 1)
    (array([1.]), {})
    """

    beta: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        require_in("FirstMoment beta", self.beta, "[0, 1)")

    def init(self, p: Array) -> Slots:
        return {"first": array_namespace(p).zeros_like(p)} if self.beta else {}

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        if not self.beta:
            return seen.gradient, {}
        first = mixed(self.beta, slots["first"], seen.gradient)
        return debiased(self.beta, k) * first, {"first": first}


@final
@dataclass(frozen=True)
class AdamScaling(_Elementwise):
    """D = m̂ / (√v̂ + ε), m̂ and v̂ unbiased moving averages of g and g².

    With β₂ = 1 the squares are summed, v ← v + g², and not debiased: Adagrad.

    Parameters
    ----------
    beta1 : float
        In [0, 1).
    beta2 : float
        In [0, 1].
    epsilon : float

    References
    ----------
    Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; Duchi, Hazan & Singer 2011 (Adagrad).

    Examples
    --------
    >>> import numpy as np
    >>> adam = AdamScaling()
    >>> adam.direction(adam.init(np.ones(1)), Observation(np.full((1,), -3.0)), 1)[0].round(6)
    array([-1.])
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        plain_fields(self)
        require_in("AdamScaling beta1", self.beta1, "[0, 1)")
        require_in("AdamScaling beta2", self.beta2, "[0, 1]")
        require_positive("AdamScaling epsilon", self.epsilon)

    def init(self, p: Array) -> Slots:
        zeros = array_namespace(p).zeros_like(p)
        return {"first": zeros, "second": zeros}

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        g = seen.gradient
        first = mixed(self.beta1, slots["first"], g)
        second = mixed(self.beta2, slots["second"], g * g)
        root = array_namespace(g).sqrt(second * debiased(self.beta2, k))
        d = debiased(self.beta1, k) * first / (root + self.epsilon)
        return d, {"first": first, "second": second}


@final
@dataclass(frozen=True)
class NAdamScaling(_Elementwise):
    """Adam with Nesterov's momentum: D = (m̂ + ĝ) / (√v̂ + ε).

    m̂ = μ_{k+1} m / (1 - Π_{i≤k+1} μ_i) and ĝ = (1 - μ_k) g / (1 - Π_{i≤k} μ_i), with the momentum
    μ_k = β₁ (1 - 0.96^{kψ}/2), which rises to β₁.

    Parameters
    ----------
    beta1, beta2 : float
        In [0, 1).
    epsilon : float
    decay : float
        ψ; with 0 the momentum is β₁/2.

    References
    ----------
    Dozat 2016, "Incorporating Nesterov Momentum into Adam", algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> nadam = NAdamScaling()
    >>> d, _ = nadam.direction(nadam.init(np.ones(1)), Observation(np.ones(1)), 1)
    >>> float(d[0].round(3))
    1.056
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    decay: float = 0.004

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("beta1", "beta2"):
            require_in(f"NAdamScaling {name}", getattr(self, name), "[0, 1)")
        require_positive("NAdamScaling epsilon", self.epsilon)
        require_positive("NAdamScaling decay", self.decay, zero=True)

    def init(self, p: Array) -> Slots:
        zeros = array_namespace(p).zeros_like(p)
        return {"first": zeros, "second": zeros, "product": 1.0}

    def _momentum(self, k: int) -> float:
        return self.beta1 * (1.0 - 0.5 * 0.96 ** (k * self.decay))

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        g = seen.gradient
        now, later = self._momentum(k), self._momentum(k + 1)
        product = slots["product"] * now
        first = mixed(self.beta1, slots["first"], g)
        second = mixed(self.beta2, slots["second"], g * g)
        root = array_namespace(g).sqrt(second * debiased(self.beta2, k))
        ahead = combine((1.0 - now) / (1.0 - product), g, later / (1.0 - product * later), first)
        d = ahead / (root + self.epsilon)
        return d, {"first": first, "second": second, "product": product}


@final
@dataclass(frozen=True)
class SignMomentum(_Elementwise):
    """Lion: D = sign(β₁ m + (1 - β₁) g), then m ← β₂ m + (1 - β₂) g.

    Parameters
    ----------
    beta1, beta2 : float
        In [0, 1).

    References
    ----------
    Chen et al. 2023, arXiv:2302.06675, algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> lion = SignMomentum()
    >>> lion.direction(lion.init(np.ones(2)), Observation(np.asarray([0.1, -7.0])), 1)[0]
    array([ 1., -1.])
    """

    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("beta1", "beta2"):
            require_in(f"SignMomentum {name}", getattr(self, name), "[0, 1)")

    def init(self, p: Array) -> Slots:
        return {"first": array_namespace(p).zeros_like(p)}

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        g, m = seen.gradient, slots["first"]
        d = array_namespace(g).sign(mixed(self.beta1, m, g))
        return d, {"first": mixed(self.beta2, m, g)}
