"""What a weight used at T locations does to the factors: the only home of T.

Each rule turns statistics into rows: a of shape (R, d_in + 1) with R a multiple of N, whose mean
of squares is A, and g of shape (R', d_out), whose sum of squares over M is G.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kfac_np.backend import Array, array_namespace, sums_above_rounding
from kfac_np.errors import CurvatureError
from kfac_np.statistics import AffineStatistics, Scale

__all__ = ["Sharing", "expand", "reduce"]

Sharing = Callable[[AffineStatistics, Scale], tuple[Array, Array]]


def expand(s: AffineStatistics, scale: Scale) -> tuple[Array, Array]:
    """Every location is an example: A = mean over (n, t) of ā āᵀ, G = (1/M) Σ g gᵀ.

    For convolutions this is KFC as it is estimated in training: Ω = T·A and Γ = G/T have the same
    product. (Theorem 1's Ω, from means over the image, is `kfc_factors`.)

    Parameters
    ----------
    s : AffineStatistics
    scale : Scale

    Returns
    -------
    a : Array, shape (N · T, d_in + 1)
    g : Array, shape (K · N · T, d_out)

    References
    ----------
    Eschenhagen et al. 2023, arXiv:2311.00636, eq. 22; Grosse & Martens 2016, §3.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.ones((2, 3, 4)), np.ones((2, 3, 5)))
    >>> a, g = expand(s, Scale(terms=2, examples=2))
    >>> a.shape, g.shape
    ((6, 4), (6, 5))
    """
    a = s.a
    xp = array_namespace(a, s.g)
    return (
        xp.reshape(a, (s.num_examples * s.num_locations, a.shape[-1])),
        xp.reshape(s.g, (math.prod(s.g.shape[:-1]), s.g.shape[-1])),
    )


def reduce(s: AffineStatistics, scale: Scale) -> tuple[Array, Array]:
    """Locations are averaged before the loss: â = mean over t of ā, ĝ = Σ_t g.

    Where one of them vanishes, as Σ_t g does over the keys of an attention and over the pixels of a
    channel that is normalised on its own, what rounding leaves of it is made 0. G is 0 then, and
    says nothing of the layer; `expand` does. `KFACBlock.factorise` tells it.

    Parameters
    ----------
    s : AffineStatistics
    scale : Scale

    Returns
    -------
    a : Array, shape (N, d_in + 1)
    g : Array, shape (K · N, d_out)

    Raises
    ------
    CurvatureError
        A loss term at every position, or batch statistics: these factors are not defined then.

    References
    ----------
    Eschenhagen et al. 2023, arXiv:2311.00636, eq. 24.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.ones((2, 3, 4)), np.ones((2, 3, 5)))
    >>> a, g = reduce(s, Scale(terms=2, examples=2))
    >>> a.shape, g.shape, float(a[0, 0]), float(g[0, 0])
    ((2, 4), (2, 5), 1.0, 3.0)
    """
    if scale.positions > 1:
        raise CurvatureError(
            f"reduce: expected one loss term an example, got {scale.positions}; reduced factors "
            "are not defined for a loss at every position, use expand"
        )
    if scale.coupled:
        raise CurvatureError(
            "reduce: expected examples that do not influence each other, got batch statistics; "
            "use expand"
        )
    a, g = s.a, s.g
    xp = array_namespace(a, g)
    mean, total = xp.mean(a, axis=1), xp.sum(g, axis=-2)
    if s.num_locations > 1:
        # Σ |g| ≤ √(T Σ g²), which takes no array of the size of g.
        t = s.num_locations
        mean = sums_above_rounding(mean, xp.sqrt(xp.vecdot(a, a, axis=-2) / t))
        total = sums_above_rounding(total, xp.sqrt(t * xp.vecdot(g, g, axis=-2)))
    return mean, xp.reshape(total, (math.prod(total.shape[:-1]), total.shape[-1]))
