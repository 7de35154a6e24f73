"""Every layer's map, from its definition, for autograd."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive
from toys import LinearOverPositions, MaskedDropout, Scaling

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
    if layer.shortcut is None:
        return x + apply(layer.inner, params, x)
    return apply(layer.shortcut, params[1], x) + apply(layer.inner, params[0], x)


@apply.register
def _(layer: layers.Flatten, params: Any, x: Any) -> Any:
    return anp.reshape(x, (x.shape[0], -1))


@apply.register
def _(layer: layers.Conv, params: Any, x: Any) -> Any:
    # One output pixel at a time, from the definition: a slice of the padded input, the weights.
    axes = len(layer.kernel)
    stride, dilation = each(layer.stride, axes), each(layer.dilation, axes)
    extent = [d * (k - 1) + 1 for k, d in zip(layer.kernel, dilation, strict=True)]
    pads = pad_widths(layer.padding, x.shape[1:-1], extent, stride)
    x = pad(x, pads)
    sizes = [(n - e) // s + 1 for n, e, s in zip(x.shape[1:-1], extent, stride, strict=True)]
    weights = params if layer.groups > 1 else params[None]
    c = layer.c_in // layer.groups
    pixels = []
    for location in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(i * s, i * s + e, d)
            for i, s, e, d in zip(location, stride, extent, dilation, strict=True)
        )
        patch = x[(slice(None), *window, slice(None))]
        groups = []
        for i in range(layer.groups):
            a = anp.reshape(patch[..., i * c : (i + 1) * c], (x.shape[0], -1))
            w = weights[i]
            y = anp.matmul(a, w[:, : a.shape[1]].T)
            groups.append(y + w[:, -1] if layer.bias else y)
        pixels.append(anp.concatenate(groups, axis=-1))
    return anp.reshape(anp.stack(pixels, axis=1), (x.shape[0], *sizes, layer.c_out))


@apply.register
def _(layer: layers.ConvTranspose, params: Any, x: Any) -> Any:
    # Each input pixel puts its kernel, turned round, into the output.
    axes = len(layer.kernel)
    stride, dilation = each(layer.stride, axes), each(layer.dilation, axes)
    extent = [d * (k - 1) + 1 for k, d in zip(layer.kernel, dilation, strict=True)]
    pads = pad_widths(layer.padding, (), extent, stride)
    extra = each(layer.output_padding, axes)
    size = x.shape[1:-1]
    whole = [
        (n - 1) * s + e + max(o, 0) for n, s, e, o in zip(size, stride, extent, extra, strict=True)
    ]
    c, c_out = layer.c_in // layer.groups, layer.c_out // layer.groups
    weights = params if layer.groups > 1 else params[None]
    outputs = []
    for i in range(layer.groups):
        w, b = (weights[i][:, :-1], weights[i][:, -1]) if layer.bias else (weights[i], 0.0)
        kernel = anp.reshape(w, (c_out, *layer.kernel, c))
        kernel = kernel[(slice(None), *[slice(None, None, -1)] * axes, slice(None))]
        y = 0.0
        for tap in itertools.product(*map(range, layer.kernel)):
            part = anp.matmul(x[..., i * c : (i + 1) * c], kernel[(slice(None), *tap)].T)
            # spread by the stride, then moved to where the tap is
            for axis, (s, d, t, n) in enumerate(zip(stride, dilation, tap, whole, strict=True)):
                spread = np.zeros((n, part.shape[axis + 1]))
                for p in range(part.shape[axis + 1]):
                    spread[p * s + t * d, p] = 1.0
                part = anp.moveaxis(anp.tensordot(spread, part, axes=(1, axis + 1)), 0, axis + 1)
            y = y + part
        outputs.append(pad(y, [(-low, -high) for low, high in pads]) + b)
    return anp.concatenate(outputs, axis=-1)


@apply.register
def _(layer: layers.Reshape, params: Any, x: Any) -> Any:
    return anp.reshape(x, (x.shape[0], *layer.shape))


@apply.register
def _(layer: layers.MultiHeadAttention, params: Any, x: Any) -> Any:
    # One head of one example at a time.
    def project(name: str, x: Any) -> Any:
        w = params[name]
        y = anp.matmul(x, w[:, : layer.d_model].T)
        return y + w[:, -1] if layer.bias else y

    d = layer.d_model // layer.heads
    unseen = np.triu(np.ones((x.shape[1], x.shape[1])), 1) if layer.causal else 0.0
    examples = []
    for n in range(x.shape[0]):
        q, k, v = (project(name, x[n]) for name in ("query", "key", "value"))
        heads = []
        for h in range(layer.heads):
            part = slice(h * d, (h + 1) * d)
            e = anp.exp(anp.matmul(q[:, part], k[:, part].T) / math.sqrt(d)) * (1.0 - unseen)
            heads.append(anp.matmul(e / anp.sum(e, axis=1, keepdims=True), v[:, part]))
        examples.append(project("output", anp.concatenate(heads, axis=1)))
    return anp.stack(examples)


@apply.register
def _(layer: layers.Tied, params: Any, x: Any) -> Any:
    for i in layer.order:
        x = apply(layer.layers[i], params[i], x)
    return x


@apply.register
def _(layer: layers.Recurrent, params: Any, x: Any) -> Any:
    states = [np.zeros((x.shape[0], layer.d_state))]
    for s in range(x.shape[1]):
        z = anp.concatenate([x[:, s], states[-1]], axis=1)
        states.append(apply(layer.cell, params, z))
    return anp.stack(states[1:], axis=1)


@apply.register
def _(layer: layers.MaxPool, params: Any, x: Any) -> Any:
    return over_windows(layer, x, anp.max, -np.inf)


@apply.register
def _(layer: layers.AveragePool, params: Any, x: Any) -> Any:
    return over_windows(layer, x, anp.mean, 0.0)


@apply.register
def _(layer: layers.AdaptiveAveragePool, params: Any, x: Any) -> Any:
    pixels = []
    for place in itertools.product(*map(range, layer.output)):
        bins = tuple(
            slice(math.floor(i * n / o), math.ceil((i + 1) * n / o))
            for i, n, o in zip(place, x.shape[1:-1], layer.output, strict=True)
        )
        pixels.append(anp.mean(x[(slice(None), *bins)], axis=tuple(range(1, x.ndim - 1))))
    return anp.reshape(anp.stack(pixels, axis=1), (x.shape[0], *layer.output, x.shape[-1]))


@apply.register
def _(layer: layers.GlobalAveragePool, params: Any, x: Any) -> Any:
    return anp.mean(x, axis=tuple(range(1, x.ndim - 1)))


@apply.register
def _(layer: layers.GlobalMaxPool, params: Any, x: Any) -> Any:
    return anp.max(x, axis=tuple(range(1, x.ndim - 1)))


def over_windows(layer: Any, x: Any, function: Any, border: float) -> Any:
    """One window at a time, from the definition."""
    axes = len(layer.window)
    stride = layer.window if layer.stride is None else each(layer.stride, axes)
    x = pad(x, pad_widths(layer.padding, (), layer.window, stride), border)
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], layer.window, stride, strict=True)]
    pixels = []
    for place in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(i * s, i * s + k) for i, s, k in zip(place, stride, layer.window, strict=True)
        )
        pixels.append(function(x[(slice(None), *window)], axis=tuple(range(1, axes + 1))))
    return anp.reshape(anp.stack(pixels, axis=1), (x.shape[0], *sizes, x.shape[-1]))


def each(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else value


def pad_widths(padding: Any, size: Any, extent: Any, stride: Any) -> list[tuple[int, int]]:
    """Zeros before and after on each axis."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        widths = []
        for n, e, s in zip(size, extent, stride, strict=True):
            total = max((-(-n // s) - 1) * s + e - n, 0)
            widths.append((total // 2, total - total // 2))
        return widths
    return [(p, p) if isinstance(p, int) else p for p in each(padding, len(extent))]


def pad(x: Any, widths: Any, border: float = 0.0) -> Any:
    """A border around the spatial axes; what a negative width names is cut off."""
    for axis, (low, high) in enumerate(widths, start=1):
        shape = list(x.shape)
        before, after = [*shape], [*shape]
        before[axis], after[axis] = max(low, 0), max(high, 0)
        x = anp.concatenate([np.full(before, border), x, np.full(after, border)], axis=axis)
        inner = [slice(None)] * x.ndim
        inner[axis] = slice(max(-low, 0), x.shape[axis] - max(-high, 0))
        x = x[tuple(inner)]
    return x


@apply.register
def _(layer: layers.LayerNorm, params: Any, x: Any) -> Any:
    return normalised(layer, params, x, (-1,))


@apply.register
def _(layer: layers.BatchNorm, params: Any, x: Any) -> Any:
    return normalised(layer, params, x, tuple(range(x.ndim - 1)))


@apply.register
def _(layer: layers.RMSNorm, params: Any, x: Any) -> Any:
    x = x / anp.sqrt(anp.mean(x**2, axis=-1, keepdims=True) + layer.epsilon)
    return x * params[0] if layer.affine else x


@apply.register
def _(layer: layers.GroupNorm, params: Any, x: Any) -> Any:
    bare = layers.GroupNorm(layer.groups, layer.channels, layer.epsilon, affine=False)
    c, axes = layer.channels // layer.groups, tuple(range(1, x.ndim))
    parts = [normalised(bare, (), x[..., i * c : (i + 1) * c], axes) for i in range(layer.groups)]
    x = anp.concatenate(parts, axis=-1)
    return x * params[0] + params[1] if layer.affine else x


def normalised(layer: Any, params: Any, x: Any, axes: tuple[int, ...]) -> Any:
    c = x - anp.mean(x, axis=axes, keepdims=True)
    x = c / anp.sqrt(anp.mean(c**2, axis=axes, keepdims=True) + layer.epsilon)
    return x * params[0] + params[1] if layer.affine else x


@apply.register
def _(layer: layers.Dropout, params: Any, x: Any) -> Any:
    return 1.0 * x


@apply.register
def _(layer: MaskedDropout, params: Any, x: Any) -> Any:
    return np.where(layer.kept(x.shape), 1.0 / (1.0 - layer.rate), 0.0) * x


@apply.register
def _(layer: layers.Embedding, params: Any, x: Any) -> Any:
    one_hot = 1.0 * (x[..., None] == np.arange(layer.size))
    return anp.matmul(one_hot, params.T)


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
