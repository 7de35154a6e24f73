"""Every layer's map, from its definition, for autograd."""

from __future__ import annotations

import functools
import math
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive
from toys import LinearOverPositions, Scaling

from kfac_np import layers


@primitive
def erf(x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[float])(x)


defvjp(erf, lambda _, x: lambda g: g * (2.0 / math.sqrt(math.pi)) * anp.exp(-x * x))


def logistic(x: Any) -> Any:
    return 1.0 / (1.0 + anp.exp(-x))


@functools.singledispatch
def apply(layer: Any, params: Any, x: Any) -> Any:
    """y = layer(params, x)."""
    raise NotImplementedError(f"write the reference of {layer!r}")


@apply.register
def _(layer: layers.Dense, params: Any, x: Any) -> Any:
    if layer.bias:
        return anp.matmul(x, params[:, :-1].T) + params[:, -1]
    return anp.matmul(x, params.T)


@apply.register
def _(layer: layers.Sequential, params: Any, x: Any) -> Any:
    for part, p in zip(layer.layers, params, strict=True):
        x = apply(part, p, x)
    return x


@apply.register
def _(layer: layers.Residual, params: Any, x: Any) -> Any:
    return x + apply(layer.inner, params, x)


@apply.register
def _(layer: layers.Flatten, params: Any, x: Any) -> Any:
    return anp.reshape(x, (x.shape[0], -1))


@apply.register
def _(layer: layers.Identity, params: Any, x: Any) -> Any:
    return 1.0 * x


@apply.register
def _(layer: layers.Tanh, params: Any, x: Any) -> Any:
    return anp.tanh(x)


@apply.register
def _(layer: layers.Logistic, params: Any, x: Any) -> Any:
    return logistic(x)


@apply.register
def _(layer: layers.ReLU, params: Any, x: Any) -> Any:
    return anp.where(x > 0, x, 0.0)


@apply.register
def _(layer: layers.LeakyReLU, params: Any, x: Any) -> Any:
    return anp.where(x > 0, x, layer.slope * x)


@apply.register
def _(layer: layers.Softplus, params: Any, x: Any) -> Any:
    return anp.log(1.0 + anp.exp(x))


@apply.register
def _(layer: layers.SiLU, params: Any, x: Any) -> Any:
    return x * logistic(x)


@apply.register
def _(layer: layers.GELU, params: Any, x: Any) -> Any:
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


@apply.register
def _(layer: Scaling, params: Any, x: Any) -> Any:
    return params["gain"] * params["scale"] * x


@apply.register
def _(layer: LinearOverPositions, params: Any, x: Any) -> Any:
    m = np.asarray(layer.rows(x.shape[1]))
    y = anp.einsum("sr,nrd->nsd", m, x)
    return anp.reshape(y, (x.shape[0], *layer.shape_after(x.shape[1]), x.shape[2]))
