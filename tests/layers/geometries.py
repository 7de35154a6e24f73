"""Random convolutions of every geometry, for hypothesis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.errors import ShapeError
from kfac_np.layers import Conv, ConvTranspose

HostArray = np.ndarray[Any, Any]
LARGEST = 3000
"""Numbers in an input or output: hundreds of examples are drawn."""


@dataclass(frozen=True)
class Drawn:
    """A layer with parameters and inputs on the host."""

    layer: Conv | ConvTranspose
    params: HostArray
    x: HostArray

    def build(self, backend: Backend) -> tuple[Any, Any]:
        """Parameters and inputs on a backend."""
        return backend.asarray(self.params), backend.asarray(self.x)

    def g(self, vectors: int | None = None, seed: int = 1) -> HostArray:
        """Derivatives of the shape of the output."""
        lead = () if vectors is None else (vectors,)
        out = self.layer.output_shape(self.x.shape[1:])
        return np.random.default_rng(seed).standard_normal((*lead, len(self.x), *out))


def per_axis(draw: Any, axes: int, values: st.SearchStrategy[int]) -> int | tuple[int, ...]:
    """One number, or one for each axis."""
    if draw(st.booleans()):
        return draw(values)
    return tuple(draw(values) for _ in range(axes))


def each(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else value


def pairs(padding: Any, axes: int) -> list[tuple[int, int]]:
    """(before, after) for each axis, of what is no name."""
    return [(p, p) if isinstance(p, int) else p for p in each(padding, axes)]


def parameters(layer: Conv | ConvTranspose) -> HostArray:
    shape = layer.init(Rng(0), get_backend("numpy", "float64")).shape
    return np.random.default_rng(2).standard_normal(shape)


@st.composite
def paddings(draw: Any, axes: int, names: tuple[str, ...]) -> Any:
    """A name, a number, one for each axis, or (before, after) for each; some cut off."""
    width = st.integers(-1, 3)
    kind = draw(st.sampled_from(["number", "each", "pairs", *names]))
    if kind in names:
        return kind
    if kind == "number":
        return draw(width)
    if kind == "each":
        return tuple(draw(width) for _ in range(axes))
    return tuple((draw(width), draw(width)) for _ in range(axes))


@st.composite
def convolutions(draw: Any, channels: int = 3) -> Drawn:
    """Any `Conv` with an input that it fits into, odd sizes and unused edges included."""
    axes = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    kernel = tuple(draw(st.integers(1, 4 if axes < 3 else 2)) for _ in range(axes))
    stride = per_axis(draw, axes, st.integers(1, 3))
    dilation = per_axis(draw, axes, st.integers(1, 3 if axes < 3 else 2))
    padding = draw(paddings(axes, ("same", "valid")))
    groups = draw(st.integers(1, channels))
    layer = Conv(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=groups,
        bias=draw(st.booleans()),
        budget_bytes=draw(st.sampled_from([None, 1, 100, 777, 5001])),
    )
    size = []
    known = [(0, 0)] * axes if isinstance(padding, str) else pairs(padding, axes)
    for k, d, (before, after) in zip(kernel, each(dilation, axes), known, strict=True):
        cut = max(-before, 0) + max(-after, 0)
        fits = 1 if padding == "same" else d * (k - 1) + 1 - before - after
        size.append(max(fits, cut + 1, 1) + draw(st.integers(0, 3)))
    n = draw(st.integers(1, 3))
    x = np.random.default_rng(0).standard_normal((n, *size, layer.c_in))
    if max(x.size, n * math.prod(layer.output_shape(x.shape[1:]))) > LARGEST:
        return Drawn(layer, parameters(layer), x[:1])
    return Drawn(layer, parameters(layer), x)


@st.composite
def transposed(draw: Any) -> Drawn:
    """Any `ConvTranspose` with an input whose output is not empty."""
    axes = draw(st.sampled_from([1, 1, 2, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3 if axes < 3 else 2)) for _ in range(axes))
    stride = per_axis(draw, axes, st.integers(1, 3))
    dilation = per_axis(draw, axes, st.integers(1, 2))
    strides = each(stride, axes)
    if draw(st.booleans()):
        output_padding: Any = draw(st.integers(0, min(strides) - 1))
    else:
        output_padding = tuple(draw(st.integers(0, s - 1)) for s in strides)
    padding = draw(paddings(axes, ()))
    groups = draw(st.integers(1, 2))
    layer = ConvTranspose(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        output_padding=output_padding,
        groups=groups,
        bias=draw(st.booleans()),
        budget_bytes=draw(st.sampled_from([None, 1, 777])),
    )
    size = []
    for s, (before, after) in zip(strides, pairs(padding, axes), strict=True):
        size.append(1 + -(-max(before + after, 0) // s) + draw(st.integers(0, 2)))
    try:
        layer.output_shape((*size, layer.c_in))
    except ShapeError:  # padding may leave nothing
        reject()
    x = np.random.default_rng(0).standard_normal((draw(st.integers(1, 2)), *size, layer.c_in))
    return Drawn(layer, parameters(layer), x)
