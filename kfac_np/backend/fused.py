"""Elementwise kernels: one pass over memory with CuPy, few temporaries elsewhere.

Every kernel has a twin `..._generic` in Array API calls alone, which other backends run and
which a test compares it with. Nothing here is compiled before its first use on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import array_api_compat

from kfac_np.backend.array import Array, array_namespace

__all__ = [
    "bernoulli",
    "bernoulli_generic",
    "clip",
    "combine",
    "combine_generic",
    "factor_of",
    "leaky_vjp",
    "leaky_vjp_generic",
    "logistic",
    "logistic_generic",
    "logistic_vjp",
    "logistic_vjp_generic",
    "rectify",
    "rectify_generic",
    "sigmoid_cross_entropy",
    "sigmoid_cross_entropy_generic",
    "softplus",
    "softplus_generic",
    "tanh_vjp",
    "tanh_vjp_generic",
]


@functools.cache
def _kernel(inputs: str, outputs: str, operation: str, name: str) -> Any:
    """A kernel that CuPy compiles when it is first called; T is the dtype of all T arguments."""
    import cupy

    return cupy.ElementwiseKernel(inputs, outputs, operation, f"kfac_np_{name}")


def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x)), elementwise.

    Written as (1 + tanh(x/2)) / 2, which neither overflows nor branches.

    Examples
    --------
    >>> import numpy as np
    >>> logistic(np.asarray([-1000.0, 0.0, 1000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    if array_api_compat.is_cupy_array(x):
        return _kernel("T x", "T y", "y = T(0.5) * tanh(T(0.5) * x) + T(0.5)", "logistic")(x)
    return logistic_generic(x)


def logistic_generic(x: Array) -> Array:
    """`logistic`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> logistic_generic(np.zeros(1))
    array([0.5])
    """
    y = array_namespace(x).tanh(0.5 * x)
    y *= 0.5
    y += 0.5
    return y


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), elementwise, as max(x, 0) + log1p(exp(-abs(x))).

    Examples
    --------
    >>> import numpy as np
    >>> softplus(np.asarray([-1000.0, 1000.0])).tolist()
    [0.0, 1000.0]
    """
    if array_api_compat.is_cupy_array(x):
        operation = "y = log1p(exp(-abs(x))) + (x > T(0) ? x : T(0))"
        return _kernel("T x", "T y", operation, "softplus")(x)
    return softplus_generic(x)


def softplus_generic(x: Array) -> Array:
    """`softplus`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> softplus_generic(np.zeros(1))
    array([0.69314718])
    """
    xp = array_namespace(x)
    y = xp.log1p(xp.exp(-xp.abs(x)))
    y += rectify_generic(x)
    return y


def tanh_vjp(g: Array, y: Array) -> Array:
    """g (1 - y²): a derivative with respect to y = tanh(x) made one with respect to x.

    Parameters
    ----------
    g : Array, shape (..., *shape)
    y : Array, shape `shape`

    Returns
    -------
    Array, shape of g

    Examples
    --------
    >>> import numpy as np
    >>> tanh_vjp(np.asarray([2.0]), np.asarray([0.5]))
    array([1.5])
    """
    if array_api_compat.is_cupy_array(y):
        return _kernel("T g, T y", "T out", "out = g * (T(1) - y * y)", "tanh_vjp")(g, y)
    return tanh_vjp_generic(g, y)


def tanh_vjp_generic(g: Array, y: Array) -> Array:
    """`tanh_vjp`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> tanh_vjp_generic(np.asarray([2.0]), np.asarray([0.5]))
    array([1.5])
    """
    slope = y * y
    slope *= -1.0
    slope += 1.0
    return _times_own(g, slope)


def logistic_vjp(g: Array, y: Array) -> Array:
    """g y (1 - y): a derivative with respect to y = 1 / (1 + exp(-x)) made one with respect to x.

    Examples
    --------
    >>> import numpy as np
    >>> logistic_vjp(np.asarray([2.0]), np.asarray([0.5]))
    array([0.5])
    """
    if array_api_compat.is_cupy_array(y):
        return _kernel("T g, T y", "T out", "out = g * (y * (T(1) - y))", "logistic_vjp")(g, y)
    return logistic_vjp_generic(g, y)


def logistic_vjp_generic(g: Array, y: Array) -> Array:
    """`logistic_vjp`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> logistic_vjp_generic(np.asarray([2.0]), np.asarray([0.5]))
    array([0.5])
    """
    slope = 1.0 - y
    slope *= y
    return _times_own(g, slope)


def rectify(x: Array) -> Array:
    """max(x, 0), elementwise; NaN stays.

    Examples
    --------
    >>> import numpy as np
    >>> rectify(np.asarray([-1.0, 2.0, np.nan]))
    array([ 0.,  2., nan])
    """
    xp = array_namespace(x)
    if array_api_compat.is_numpy_namespace(xp) or array_api_compat.is_cupy_namespace(xp):
        y: Array = xp.maximum(x, 0.0)  # an array of zeros would take three times as long
        return y
    if array_api_compat.is_torch_namespace(xp):
        return xp.relu(x)
    return rectify_generic(x)


def rectify_generic(x: Array) -> Array:
    """`rectify`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> rectify_generic(np.asarray([-1.0, 2.0]))
    array([0., 2.])
    """
    xp = array_namespace(x)
    y: Array = xp.maximum(x, xp.zeros_like(x))
    return y


def clip(x: Array, low: float | None = None, high: float | None = None) -> Array:
    """x, but no less than `low` and no more than `high`, elementwise; NaN stays.

    Examples
    --------
    >>> import numpy as np
    >>> clip(np.asarray([-3.0, 0.5, np.nan]), low=0.0), clip(np.asarray([-3.0, 0.5]), -1.0, 0.0)
    (array([0. , 0.5, nan]), array([-1.,  0.]))
    """
    xp = array_namespace(x)
    if not array_api_compat.is_cupy_namespace(xp):
        return xp.clip(x, min=low, max=high)
    # The wrapper's `clip` of CuPy selects by masks, and waits for each of them.
    y = x if low is None else xp.maximum(x, low)
    return y if high is None else xp.minimum(y, high)


def leaky_vjp(g: Array, x: Array, slope: float = 0.0) -> Array:
    """g where x > 0, slope · g elsewhere: through max(x, slope · x).

    Examples
    --------
    >>> import numpy as np
    >>> leaky_vjp(np.asarray([3.0, 3.0]), np.asarray([-1.0, 1.0]))
    array([0., 3.])
    """
    if array_api_compat.is_cupy_array(x):
        operation = "out = g * (x > T(0) ? T(1) : slope)"
        return _kernel("T g, T x, T slope", "T out", operation, "leaky_vjp")(g, x, slope)
    if array_api_compat.is_torch_array(x):
        import torch

        out: Array = torch.ops.aten.leaky_relu_backward(g, x, slope, False)
        return out
    return leaky_vjp_generic(g, x, slope)


def leaky_vjp_generic(g: Array, x: Array, slope: float = 0.0) -> Array:
    """`leaky_vjp`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> leaky_vjp_generic(np.asarray([3.0, 3.0]), np.asarray([-1.0, 1.0]), 0.5)
    array([1.5, 3. ])
    """
    on = array_namespace(x).astype(x > 0, x.dtype)
    if slope:
        on *= 1.0 - slope
        on += slope
    return _times_own(g, on)


def _times_own(g: Array, own: Array) -> Array:
    """The product, in the memory of `own` where that has the shape of the result."""
    if g.shape != own.shape:
        return g * own
    own *= g
    return own


def sigmoid_cross_entropy(z: Array, t: Array) -> Array:
    """max(z, 0) - t z + log(1 + exp(-abs(z))), elementwise: -log p(t | z) of a Bernoulli variable.

    Written as (abs(z)/2 + z (1/2 - t)) + log1p(exp(-abs(z))), where for t = 0 and 1 the bracket is
    exact, so that small losses keep their digits.

    Examples
    --------
    >>> import numpy as np
    >>> sigmoid_cross_entropy(np.asarray([0.0, 50.0]), np.asarray([1.0, 1.0]))
    array([6.93147181e-01, 1.92874985e-22])
    """
    if array_api_compat.is_cupy_array(z):
        operation = "out = (T(0.5) * abs(z) + z * (T(0.5) - t)) + log1p(exp(-abs(z)))"
        return _kernel("T z, T t", "T out", operation, "sigmoid_cross_entropy")(z, t)
    return sigmoid_cross_entropy_generic(z, t)


def sigmoid_cross_entropy_generic(z: Array, t: Array) -> Array:
    """`sigmoid_cross_entropy`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> sigmoid_cross_entropy_generic(np.zeros(1), np.ones(1))
    array([0.69314718])
    """
    xp = array_namespace(z, t)
    size = xp.abs(z)
    tail = xp.log1p(xp.exp(-size))
    size *= 0.5
    rest = 0.5 - t
    rest *= z
    size += rest
    size += tail
    return size


def bernoulli(p: Array, coarse: Array, fine: Array) -> Array:
    """1 where (coarse + fine) / 2¹⁶ < p, 0 elsewhere.

    Parameters
    ----------
    p : Array
        Probabilities.
    coarse : Array of int16, shape of p
        Uniform over all values of that type.
    fine : Array, broadcast to p
        In the dtype of p: 2¹⁵ + a number in [0, 1).

    Returns
    -------
    Array, shape and dtype of p

    Examples
    --------
    >>> import numpy as np
    >>> coarse, fine = np.asarray([-32768, 0, 32767], dtype=np.int16), np.asarray([32768.25])
    >>> bernoulli(np.asarray([0.5, 0.5, 0.5]), coarse, fine)
    array([1., 0., 0.])
    """
    if array_api_compat.is_cupy_array(p):
        operation = "out = T(coarse) + fine < T(65536) * p ? T(1) : T(0)"
        inputs = "T p, int16 coarse, T fine"
        return _kernel(inputs, "T out", operation, "bernoulli")(p, coarse, fine)
    return bernoulli_generic(p, coarse, fine)


def bernoulli_generic(p: Array, coarse: Array, fine: Array) -> Array:
    """`bernoulli`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> bernoulli_generic(np.ones(1), np.asarray([32767], dtype=np.int16), np.asarray([32768.5]))
    array([1.])
    """
    xp = array_namespace(p)
    u = xp.astype(coarse, p.dtype)
    u += fine
    u *= 2.0**-16
    return xp.astype(u < p, p.dtype)


def combine(a: Any, x: Array, b: Any, y: Array) -> Array:
    """a · x + b · y, as a new array: of averages over steps, momentum and updates.

    Parameters
    ----------
    a, b : Scalar
        Float, or 0-d Array on the device of x: neither widens the dtype of x.
    x, y : Array
        Of one shape and dtype.

    Examples
    --------
    >>> import numpy as np
    >>> combine(0.75, np.asarray([2.0]), 0.25, np.asarray([4.0]))
    array([2.5])
    """
    if array_api_compat.is_cupy_array(x):
        operation = "out = T(a) * x + T(b) * y"
        return _kernel("float64 a, T x, float64 b, T y", "T out", operation, "combine")(a, x, b, y)
    return combine_generic(a, x, b, y)


def combine_generic(a: Any, x: Array, b: Any, y: Array) -> Array:
    """`combine`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> combine_generic(0.75, np.asarray([2.0]), 0.25, np.asarray([4.0]))
    array([2.5])
    """
    out = factor_of(a, x) * x
    out += y if type(b) is float and b == 1.0 else factor_of(b, y) * y
    return out


def factor_of(number: Any, like: Array) -> Any:
    """A number, or a 0-d array, as a factor that does not widen the dtype of `like`.

    NumPy's own numbers and arrays of no axes would.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones(1, dtype=np.float32)
    >>> (factor_of(np.float64(0.5), x) * x).dtype
    dtype('float32')
    """
    if isinstance(number, int | float):
        return float(number)
    return array_namespace(number).astype(number, like.dtype)
