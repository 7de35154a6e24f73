"""SINGD: natural gradient by Kronecker factors of the inverse, without inverting anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from kfac_np.backend import Array, Backend, array_namespace, sum_by_index
from kfac_np.curvature import KFACBlock
from kfac_np.optimizers.family.base import Observation, Preconditioner, Slots, affine
from kfac_np.statistics import AffineStatistics, Statistics
from kfac_np.validation import (
    plain_fields,
    require_flag,
    require_in,
    require_integer,
    require_one_of,
    require_positive,
)

__all__ = ["SINGD", "Structure", "project"]

Structure = Literal["dense", "diagonal", "block-diagonal", "hierarchical", "toeplitz"]
STRUCTURES = ("dense", "diagonal", "block-diagonal", "hierarchical", "toeplitz")


def project(m: Array, structure: Structure, block: int = 3) -> Array:
    """Project a symmetric matrix onto the logarithm's space of a class of matrices.

    What a class leaves out above the diagonal is added below it, so that the derivative stays that
    along the class.

    Parameters
    ----------
    m : Array, shape (d, d)
    structure : str
        "block-diagonal" has blocks of `block` rows; "hierarchical" two full rows, a diagonal and a
        last row; "toeplitz" is lower triangular with constant diagonals.
    block : int

    Returns
    -------
    Array, shape (d, d)

    References
    ----------
    Lin et al. 2023, arXiv:2312.05705, §3.2 and table 1.

    Examples
    --------
    >>> import numpy as np
    >>> project(np.asarray([[1.0, 2.0], [2.0, 3.0]]), "toeplitz")
    array([[2., 0.],
           [4., 2.]])
    """
    xp, d = array_namespace(m), m.shape[0]
    if structure == "dense":
        return m
    index = xp.arange(d, device=m.device)
    i, j = index[:, None], index[None, :]
    if structure == "toeplitz":
        below = i - j
        place = xp.where(below >= 0, below, d + 0 * below)
        sums = sum_by_index(xp.reshape(m, (-1, 1)), xp.reshape(place, (-1,)), d + 1)[:d, 0]
        lengths = xp.astype(d - index, m.dtype)
        doubled = xp.astype(xp.where(index > 0, 2 + 0 * index, 1 + 0 * index), m.dtype)
        means = xp.concat([sums / lengths * doubled, xp.zeros_like(m[0, :1])])
        return xp.reshape(xp.take(means, xp.reshape(place, (-1,))), (d, d))
    if structure == "diagonal":
        once, twice = i == j, i != i
    elif structure == "block-diagonal":
        once, twice = i // block == j // block, i != i
    else:
        last, top = d - 1, i < 2
        once = (top & (j < 2)) | (i == j)
        twice = (top & (j >= 2)) | ((i == last) & (i > 1) & (j >= 2) & (j < last))
    mask = xp.astype(once & ~twice, m.dtype) + 2.0 * xp.astype(twice, m.dtype)
    return mask * m


@final
@dataclass(frozen=True)
class SINGD(Preconditioner):
    """D = C Cᵀ ∇ K Kᵀ, K Kᵀ ≈ (A + λ I)⁻¹ and C Cᵀ ≈ (G + λ I)⁻¹ followed by products alone.

    With H_K = Kᵀ A K and H_C = Cᵀ G C for the second moments A and G of the batch, and tr̄ the
    trace over the dimension,

        m_K ← α₁ m_K + ½ P(tr̄(H_C) H_K + λ tr̄(Cᵀ C) Kᵀ K - I),  K ← K (I - β m_K),

    and the same for C. G is that of the loss's own derivatives, the empirical Fisher.

    Parameters
    ----------
    damping : float
        λ.
    rate : float
        β, of the factors; the parameters' is `Preconditioned.rate`.
    momentum : float
        α₁, in [0, 1), of the factors.
    structures : tuple of str
        The classes of K and of C, as `project` knows them; all are stored dense.
    block : int
        Rows of a block of "block-diagonal".
    interval : int
        Steps between two updates of the factors; the first step has one.
    normalized : bool
        β / max(1, largest entry of m), and ½ (1 - α₁) in place of ½: no factor moves too far.
    kfac_like : bool
        Without the traces, and without momentum: K-FAC's factors, each for itself.

    References
    ----------
    Lin et al. 2023, arXiv:2312.05705, figure 3.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.statistics import Scale
    >>> s = AffineStatistics(np.asarray([[[1.0]]]), np.asarray([[[1.0]]]))
    >>> singd = SINGD(damping=1.0, normalized=False, rate=0.5)
    >>> slots = singd.init(np.ones((1, 1)))
    >>> singd.direction(slots, Observation(s.gradient(), s, Scale(1, 1)), 1)[0]
    array([[0.31640625]])
    """

    damping: float = 1e-2
    rate: float = 0.1
    momentum: float = 0.5
    structures: tuple[Structure, Structure] = ("dense", "dense")
    block: int = 3
    interval: int = 1
    normalized: bool = True
    kfac_like: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        require_positive("SINGD damping", self.damping, zero=True)
        require_positive("SINGD rate", self.rate)
        require_in("SINGD momentum", self.momentum, "[0, 1)")
        for structure in self.structures:
            require_one_of("SINGD structures", structure, STRUCTURES)
        for name in ("block", "interval"):
            require_integer(f"SINGD {name}", getattr(self, name))
        for name in ("normalized", "kfac_like"):
            require_flag(f"SINGD {name}", getattr(self, name))

    def supports(self, statistics: Statistics) -> bool:
        return isinstance(statistics, AffineStatistics)

    def init(self, p: Array) -> Slots:
        c, k = (Backend.of(p).eye(n) for n in p.shape)
        return {"K": k, "C": c, "m_K": 0.0 * k, "m_C": 0.0 * c}

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        pair = affine(self, seen)
        if (k - 1) % self.interval == 0:
            moments = {**_BLOCK.input_moments(*pair), **_BLOCK.moments(*pair)}
            slots = self._followed(slots, moments["A"], moments["G"])
        c, k_ = slots["C"], slots["K"]
        return c @ (c.T @ seen.gradient @ k_) @ k_.T, slots

    def _followed(self, slots: Slots, a: Array, g: Array) -> Slots:
        """Both factors, moved by the moments that they have not met yet."""
        alpha = 0.0 if self.kfac_like else self.momentum
        half = 0.5 * (1.0 - alpha) if self.normalized else 0.5
        names = dict(zip("KC", self.structures, strict=True))
        moments = {"K": a, "C": g}
        h = {n: project(_inside(slots[n], moments[n]), p, self.block) for n, p in names.items()}
        s = {n: project(slots[n].T @ slots[n], p, self.block) for n, p in names.items()}
        new: Slots = {}
        for name, other in ("KC", "CK"):
            xp, factor = array_namespace(a), slots[name]
            identity = Backend.of(factor).eye(factor.shape[0])
            if self.kfac_like:
                target = h[name] + self.damping * s[name] - identity
            else:
                target = _mean_trace(h[other]) * h[name] - identity
                target = target + self.damping * _mean_trace(s[other]) * s[name]
            m = alpha * slots[f"m_{name}"] + half * target
            step = m
            if self.normalized:
                size = xp.max(xp.abs(m))
                step = m / xp.where(size > 1.0, size, xp.ones_like(size))
            new |= {name: factor - self.rate * (factor @ step), f"m_{name}": m}
        return new


_BLOCK = KFACBlock()


def _inside(factor: Array, moment: Array) -> Array:
    """Kᵀ A K."""
    return factor.T @ moment @ factor


def _mean_trace(m: Array) -> Array:
    return array_namespace(m).linalg.trace(m) / m.shape[0]
