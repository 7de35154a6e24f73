"""Muon: the polar factor of the momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

from kfac_np.backend import Array, array_namespace, combine
from kfac_np.errors import ConfigError
from kfac_np.optimizers.family.base import Observation, Preconditioner, Slots, as_matrix, mixed
from kfac_np.validation import (
    plain_fields,
    require_flag,
    require_in,
    require_integer,
    require_number,
    require_one_of,
    require_positive,
)

__all__ = ["Muon", "newton_schulz", "polar_factor"]

QUINTIC = (3.4445, -4.775, 2.0315)


def newton_schulz(
    m: Array,
    coefficients: tuple[float, float, float] = QUINTIC,
    steps: int = 5,
    epsilon: float = 1e-7,
) -> Array:
    """X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, from X = m / max(‖m‖, ε): all singular values go towards 1.

    With (1.5, -0.5, 0) they converge to 1, slowly where they are small. The usual coefficients
    bring small ones up fast, to somewhere between 0.7 and 1.2, and no closer.

    Parameters
    ----------
    m : Array, shape (d_out, d_in)
    coefficients : tuple of float
        a, b, c.
    steps : int
    epsilon : float

    Returns
    -------
    Array, shape (d_out, d_in)

    References
    ----------
    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".

    Examples
    --------
    >>> import numpy as np
    >>> newton_schulz(np.diag([3.0, 4.0]), (1.5, -0.5, 0.0), steps=10).round(6)
    array([[1., 0.],
           [0., 1.]])
    """
    xp = array_namespace(m)
    a, b, c = coefficients
    tall = m.shape[0] > m.shape[1]
    x = m.T if tall else m  # products of the smaller side
    norm = xp.linalg.vector_norm(x)
    x = x / xp.where(norm > epsilon, norm, epsilon * xp.ones_like(norm))
    for _ in range(steps):
        gram = x @ x.T
        x = combine(a, x, 1.0, combine(b, gram, c, gram @ gram) @ x)
    return x.T if tall else x


def polar_factor(m: Array) -> Array:
    """U Vᵀ of the singular value decomposition m = U Σ Vᵀ, over the singular values that are not 0.

    The nearest partial isometry. What is below rounding, max(d_out, d_in) eps ‖m‖₂, counts as 0.

    Parameters
    ----------
    m : Array, shape (d_out, d_in)

    Returns
    -------
    Array, shape (d_out, d_in)

    Examples
    --------
    >>> import numpy as np
    >>> polar_factor(np.diag([3.0, 0.0]))
    array([[1., 0.],
           [0., 0.]])
    """
    xp = array_namespace(m)
    u, s, vh = xp.linalg.svd(m, full_matrices=False)
    least = max(m.shape) * xp.finfo(m.dtype).eps * xp.max(s)
    return (u * xp.astype(s > least, m.dtype)[None, :]) @ vh


@final
@dataclass(frozen=True)
class Muon(Preconditioner):
    """D = s O((1 - μ) g + μ m), m ← μ m + (1 - μ) g: the momentum, orthogonalised.

    O is the polar factor, or what five steps of Newton and Schulz make of it. Convolutions are
    matrices like all others here, kernels as rows; groups have a matrix each.

    Parameters
    ----------
    momentum : float
        μ, in [0, 1).
    nesterov : bool
        Otherwise D = s O(m).
    polar : {"newton-schulz", "exact"}
        How O is computed. "exact" takes a singular value decomposition.
    coefficients : tuple of float
        Of `newton_schulz`.
    steps : int
        Of `newton_schulz`.
    scale : {"match-rms", "original"}
        s = 0.2 √max(d_out, d_in), so that entries of D have a root mean square of about 0.2, as
        those of Adam's have, and a rate of Adam's will do; or s = √max(1, d_out / d_in).
    epsilon : float
        Gradients of a smaller norm shrink instead.

    References
    ----------
    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025,
    arXiv:2502.16982, §2.2 (scale).

    Examples
    --------
    >>> import numpy as np
    >>> muon = Muon(polar="exact", scale="original")
    >>> muon.direction(muon.init(np.eye(2)), Observation(np.diag([5.0, 0.1])), 1)[0].round(6)
    array([[1., 0.],
           [0., 1.]])
    """

    momentum: float = 0.95
    nesterov: bool = True
    polar: Literal["newton-schulz", "exact"] = "newton-schulz"
    coefficients: tuple[float, float, float] = QUINTIC
    steps: int = 5
    scale: Literal["match-rms", "original"] = "match-rms"
    epsilon: float = 1e-7

    def __post_init__(self) -> None:
        plain_fields(self)
        require_in("Muon momentum", self.momentum, "[0, 1)")
        require_flag("Muon nesterov", self.nesterov)
        require_one_of("Muon polar", self.polar, ("newton-schulz", "exact"))
        require_one_of("Muon scale", self.scale, ("match-rms", "original"))
        require_integer("Muon steps", self.steps)
        require_positive("Muon epsilon", self.epsilon)
        if not isinstance(self.coefficients, tuple) or len(self.coefficients) != 3:
            raise ConfigError(f"Muon coefficients: expected three, got {self.coefficients!r}")
        for number in self.coefficients:
            require_number("Muon coefficients", number)

    def factorises(self, k: int) -> bool:
        return self.polar == "exact"

    def init(self, p: Array) -> Slots:
        return {"first": array_namespace(p).zeros_like(p)}

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        g = seen.gradient
        first = mixed(self.momentum, slots["first"], g)
        d = mixed(self.momentum, first, g) if self.nesterov else first
        return as_matrix(self._orthogonal, d), {"first": first}

    def _orthogonal(self, m: Array) -> Array:
        rows, columns = m.shape
        original = self.scale == "original"
        s = math.sqrt(max(1.0, rows / columns)) if original else 0.2 * math.sqrt(max(m.shape))
        if self.polar == "exact":
            return s * polar_factor(m)
        return s * newton_schulz(m, self.coefficients, self.steps, self.epsilon)
