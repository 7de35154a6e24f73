"""Initial weights; biases start at zero."""

from __future__ import annotations

from collections.abc import Callable

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.validation import require_sizes

__all__ = ["Initializer", "fan_in_normal", "glorot", "he", "sparse"]

Initializer = Callable[[Rng, int, int, Backend], Array]
"""(rng, fan_in, fan_out, backend) -> weights of shape (fan_out, fan_in)."""


def glorot(rng: Rng, fan_in: int, fan_out: int, backend: Backend) -> Array:
    """Normal weights of variance 2 / (fan_in + fan_out).

    References
    ----------
    Glorot & Bengio 2010, eq. 12 (as variance).

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> glorot(Rng(0), 3, 2, get_backend()).shape
    (2, 3)
    """
    return rng.normal((fan_out, fan_in), backend) * (2.0 / (fan_in + fan_out)) ** 0.5


def he(rng: Rng, fan_in: int, fan_out: int, backend: Backend) -> Array:
    """Normal weights of variance 2 / fan_in, for ReLU-like units.

    References
    ----------
    He et al. 2015, arXiv:1502.01852, eq. 10.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> he(Rng(0), 3, 2, get_backend()).shape
    (2, 3)
    """
    return rng.normal((fan_out, fan_in), backend) * (2.0 / fan_in) ** 0.5


def fan_in_normal(rng: Rng, fan_in: int, fan_out: int, backend: Backend) -> Array:
    """Normal weights of variance 1 / fan_in.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> fan_in_normal(Rng(0), 3, 2, get_backend()).shape
    (2, 3)
    """
    return rng.normal((fan_out, fan_in), backend) * (1.0 / fan_in) ** 0.5


def sparse(
    rng: Rng, fan_in: int, fan_out: int, backend: Backend, *, connections: int = 15
) -> Array:
    """Each unit gets `connections` standard normal incoming weights, the rest are zero.

    With fewer inputs than that, all are drawn.

    References
    ----------
    Martens 2010, "Deep learning via Hessian-free optimization", §5; used by Martens & Grosse 2015.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import get_backend
    >>> W = sparse(Rng(0), 40, 3, get_backend())
    >>> np.count_nonzero(W, axis=1)
    array([15, 15, 15])
    """
    require_sizes("sparse", connections=connections)
    xp = backend.xp
    # Rank random numbers in each row: a unit keeps its first `connections` inputs.
    order = xp.argsort(rng.uniform((fan_out, fan_in), backend), axis=1, stable=True)
    rank = xp.argsort(order, axis=1, stable=True)
    weights = rng.normal((fan_out, fan_in), backend)
    keep = rank < connections
    return array_namespace(weights).where(keep, weights, backend.zeros((fan_out, fan_in)))
