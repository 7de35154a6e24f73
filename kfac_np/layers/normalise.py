"""Mean 0 and mean square 1 over some axes, with derivatives: what normalisation layers share."""

from __future__ import annotations

import math

from kfac_np.backend import Array, array_namespace

__all__ = ["mean_over", "normalise", "normalise_bend", "normalise_jvp"]


def normalise(
    x: Array, axes: tuple[int, ...], centred: bool, epsilon: float
) -> tuple[Array, Array]:
    """x̂ = r (x - mean x), r = (mean (x - mean x)² + ε)^(-½); without the mean unless `centred`.

    The mean is subtracted before squares are taken, and what rounding left of it subtracted
    once more, so that single precision holds wherever the mean is. Squares are taken of numbers in
    a larger unit, so that they overflow with far larger ones; where they do, x̂ is NaN.

    Returns
    -------
    x_hat : Array
        In the shape of x.
    rate : Array
        r, with axes of length 1 where means were taken.

    Examples
    --------
    >>> import numpy as np
    >>> x_hat, rate = normalise(np.asarray([[1.0, 3.0]]), (-1,), True, 1e-5)
    >>> x_hat.round(4), rate.round(4)
    (array([[-1.,  1.]]), array([[1.]]))
    """
    xp = array_namespace(x)
    if centred:
        x = x - mean_over(x, axes)
        x = x - mean_over(x, axes)
    unit = _unit(x, epsilon)
    square = x * unit
    square *= square
    square = mean_over(square, axes)
    rate = unit / xp.sqrt(square + epsilon * unit * unit)
    rate = xp.where(xp.isfinite(square), rate, xp.nan)  # rather than 0
    return rate * x, rate


def _unit(x: Array, epsilon: float) -> float:
    """A power of two to multiply by before squares are taken: no digit depends on it.

    It is 2⁻⁴⁰ in single precision and 2⁻³²⁰ in double, or as small as leaves squares that count
    beside ε above the smallest number.
    """
    info = array_namespace(x).finfo(x.dtype)
    largest, digits = math.log2(float(info.max)), 1 - math.log2(float(info.eps))
    least = 0.5 * (2 - largest + digits - math.log2(epsilon))
    return 2.0 ** min(0, math.ceil(max(-5 / 16 * largest, least)))


def normalise_jvp(
    x_hat: Array, rate: Array, dx: Array, axes: tuple[int, ...], centred: bool
) -> Array:
    """dx̂ = r (dx - mean dx - x̂ mean(x̂ dx)).

    As a matrix this is r (I - 1 1ᵀ/m - x̂ x̂ᵀ/m) for the m numbers that share a mean: symmetric, and
    so the way back, too. `dx` may have leading axes more than x̂.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[1.0, 2.0, 4.0]])
    >>> x_hat, rate = normalise(x, (-1,), True, 1e-5)
    >>> normalise_jvp(x_hat, rate, np.ones((1, 3)), (-1,), True).round(12)  # the mean moves along
    array([[0., 0., 0.]])
    """
    c = dx - mean_over(dx, axes) if centred else dx
    return rate * (c - x_hat * mean_over(x_hat * c, axes))


def normalise_bend(
    x_hat: Array, rate: Array, u: Array, dx: Array, axes: tuple[int, ...], centred: bool
) -> Array:
    """Directional derivative along dx of J u, J = r (I - 1 1ᵀ/m - x̂ x̂ᵀ/m) as `normalise_jvp`.

    d(J u) = -r mean(x̂ dx) J u - r (dx̂ mean(x̂ u) + x̂ mean(dx̂ u)), since dr = -r² mean(x̂ dx).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[1.0, 2.0, 4.0]])
    >>> x_hat, rate = normalise(x, (-1,), True, 1e-30)
    >>> ju = normalise_jvp(x_hat, rate, np.eye(3)[:1], (-1,), True)
    >>> bent = normalise_bend(x_hat, rate, np.eye(3)[:1], x, (-1,), True)
    >>> bool(np.allclose(bent, -ju))  # twice the input: half the derivative
    True
    """
    ju = normalise_jvp(x_hat, rate, u, axes, centred)
    dx_hat = normalise_jvp(x_hat, rate, dx, axes, centred)
    # x̂ has mean 0 where means are subtracted, and so has dx̂: those of u and dx drop out.
    along, turned = mean_over(x_hat * u, axes), mean_over(dx_hat * u, axes)
    return -rate * (mean_over(x_hat * dx, axes) * ju + dx_hat * along + x_hat * turned)


def mean_over(x: Array, axes: tuple[int, ...]) -> Array:
    """Mean over axes that stay, with length 1: one axis after the other.

    Sums of sums lose fewer digits than one long sum, which NumPy adds up number by number unless
    they lie side by side.

    Examples
    --------
    >>> import numpy as np
    >>> mean_over(np.ones((2, 3, 4)), (-3, -2)).shape
    (1, 1, 4)
    """
    xp = array_namespace(x)
    for axis in reversed(axes):
        x = xp.mean(x, axis=axis, keepdims=True)
    return x
