"""FOOF: the gradient times the inverse second moment of the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, spd_inverse
from kfac_np.curvature import KFACBlock
from kfac_np.optimizers.family.base import Observation, Preconditioner, Slots, affine, mixed
from kfac_np.statistics import AffineStatistics, Statistics
from kfac_np.validation import plain_fields, require_in, require_integer, require_positive

__all__ = ["FOOF"]


@final
@dataclass(frozen=True)
class FOOF(Preconditioner):
    """D = g (A + λ I)⁻¹, A an average of the mean of ā āᵀ: K-FAC with G = I.

    Over the locations of a shared weight the mean is taken, too.

    Parameters
    ----------
    damping : float
        λ.
    decay : float
        Of A, in [0, 1); its first value is that of the first batch.
    interval : int
        Steps between two inverses; the first step has one.

    References
    ----------
    Benzing 2022, arXiv:2201.12250, §3.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.statistics import Scale
    >>> s = AffineStatistics(np.asarray([[[2.0]]]), np.asarray([[[3.0]]]))
    >>> foof = FOOF(damping=1.0)
    >>> foof.direction(foof.init(np.ones((1, 1))), Observation(s.gradient(), s, Scale(1, 1)), 1)[0]
    array([[1.2]])
    """

    damping: float = 0.1
    decay: float = 0.95
    interval: int = 10

    def __post_init__(self) -> None:
        plain_fields(self)
        require_positive("FOOF damping", self.damping)
        require_in("FOOF decay", self.decay, "[0, 1)")
        require_integer("FOOF interval", self.interval)

    def supports(self, statistics: Statistics) -> bool:
        return isinstance(statistics, AffineStatistics)

    def factorises(self, k: int) -> bool:
        return (k - 1) % self.interval == 0

    def init(self, p: Array) -> Slots:
        a = 0.0 * Backend.of(p).eye(p.shape[1])
        return {"A": a, "inverse": a}

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        now = KFACBlock().input_moments(*affine(self, seen))["A"]
        a = mixed(self.decay if k > 1 else 0.0, slots["A"], now)
        inverse = slots["inverse"]
        if self.factorises(k):
            inverse = spd_inverse(a + self.damping * Backend.of(a).eye(a.shape[0]))
        return seen.gradient @ inverse, {"A": a, "inverse": inverse}
