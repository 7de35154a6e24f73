"""Special functions that the Array API standard lacks, in forms that do not overflow."""

from __future__ import annotations

import importlib
import math

import array_api_compat

from kfac_np.backend.array import Array, array_namespace

__all__ = ["erf", "erf_generic", "logsumexp", "softmax"]


def logsumexp(x: Array) -> Array:
    """Log of the sum of exponentials over the last axis, which is kept with length 1.

    Examples
    --------
    >>> import numpy as np
    >>> logsumexp(np.asarray([1000.0, 1000.0])) - 1000.0
    array([0.69314718])
    """
    xp = array_namespace(x)
    top = xp.max(x, axis=-1, keepdims=True)
    return top + xp.log(xp.sum(xp.exp(x - top), axis=-1, keepdims=True))


def softmax(x: Array) -> Array:
    """exp(x) normalised to sum 1 over the last axis.

    Examples
    --------
    >>> import numpy as np
    >>> softmax(np.asarray([1000.0, 1000.0]))
    array([0.5, 0.5])
    """
    xp = array_namespace(x)
    p = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    p /= xp.sum(p, axis=-1, keepdims=True)
    return p


def erf(x: Array) -> Array:
    """The error function 2/sqrt(pi) * integral of exp(-t^2) from 0 to x, elementwise.

    Examples
    --------
    >>> import numpy as np
    >>> erf(np.asarray([0.0, 1.0]))
    array([0.        , 0.84270079])
    """
    xp = array_namespace(x)
    if array_api_compat.is_cupy_namespace(xp):
        return importlib.import_module("cupyx.scipy.special").erf(x)
    if array_api_compat.is_torch_namespace(xp):
        return xp.erf(x)
    return erf_generic(x)


def erf_generic(x: Array) -> Array:
    """`erf` in Array API calls alone, within 1e-14 in double precision.

    Below 2 the series x exp(-x^2) 2/sqrt(pi) * sum (2 x^2)^n / (2n+1)!!, all of whose terms have
    one sign, so that nothing cancels [Abramowitz & Stegun 7.1.6]; above it the continued
    fraction of erfc [7.1.14], evaluated from the tail.

    Examples
    --------
    >>> import numpy as np
    >>> erf_generic(np.asarray([-0.5, 3.0]))
    array([-0.52049988,  0.99997791])
    """
    xp = array_namespace(x)
    magnitude = xp.abs(x)
    small = xp.clip(magnitude, max=2.0)
    term = xp.ones_like(x)
    total = xp.ones_like(x)
    twice_square = 2.0 * small * small
    for n in range(1, 45):  # at x = 2 the last term is below 1e-17 of the sum
        term = term * twice_square / (2 * n + 1)
        total = total + term
    series = (2 / math.sqrt(math.pi)) * small * xp.exp(-small * small) * total

    large = xp.clip(magnitude, min=2.0, max=30.0)  # where the tail is 0, before squares overflow
    fraction = xp.zeros_like(x)
    for n in range(60, 0, -1):
        fraction = (n / 2) / (large + fraction)
    tail = xp.exp(-large * large) / (math.sqrt(math.pi) * (large + fraction))
    return xp.sign(x) * xp.where(magnitude < 2.0, series, 1.0 - tail)
