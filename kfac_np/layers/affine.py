"""What affine layers share: matrices drawn and checked, products with them, statistics."""

from __future__ import annotations

import math
from typing import Any

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.statistics import AffineStatistics
from kfac_np.validation import plain_fields, require_callable, require_flag, require_sizes

__all__: list[str] = []  # to be used as affine.draw, affine.product, ...


def check(layer: Any, *sizes: str) -> None:
    """Check the settings of a layer: the sizes of these names, its initializer, its bias if any."""
    plain_fields(layer)
    name = type(layer).__name__
    require_sizes(name, **{size: getattr(layer, size) for size in sizes})
    require_flag(f"{name} bias", getattr(layer, "bias", False))
    require_callable(f"{name} initializer", layer.initializer)


def draw(
    layer: Any, rng: Rng | int, shape: tuple[int, int], backend: Backend, bias: bool = False
) -> Array:
    """Draw weights (d_out, d_in) by the layer's initializer; a bias is a last column of zeros."""
    d_out, d_in = shape
    if d_out * d_in >= 2**60:  # more bytes than any machine addresses
        raise InputError(f"{layer!r}: expected fewer than 2^60 parameters, got {d_out} · {d_in}")
    weights = layer.initializer(Rng.of(rng), d_in, d_out, backend)
    if weights.shape != shape:
        raise ShapeError(
            f"{layer!r}: expected the initializer to return shape {shape}, "
            f"got {tuple(weights.shape)}"
        )
    return backend.xp.concat([weights, backend.zeros((d_out, 1))], axis=1) if bias else weights


def require(layer: object, params: Any, expected: tuple[int, ...]) -> None:
    """Raise `ShapeError` unless the parameters are one array of the expected shape."""
    if getattr(params, "shape", None) != expected:
        came = tuple(params.shape) if hasattr(params, "shape") else type(params).__name__
        raise ShapeError(f"{layer!r}: expected parameters {expected}, got {came}")


def product(x: Array, m: Array) -> Array:
    """x @ m on the last axis, as one matrix product, however many axes x has."""
    if x.ndim == 2:
        return x @ m
    xp = array_namespace(x, m)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    return xp.reshape(rows @ m, (*x.shape[:-1], m.shape[1]))


def statistics(a: Array, g: Array) -> AffineStatistics:
    """Statistics of an affine map on the last axis: the axes after N become locations.

    Parameters
    ----------
    a : Array, shape (N, ..., d_in + 1)
    g : Array, shape ([K,] N, ..., d_out)
    """
    xp = array_namespace(a, g)
    n, t = a.shape[0], math.prod(a.shape[1:-1])
    vectors = g.shape[: g.ndim - a.ndim]  # (K,) or ()
    return AffineStatistics(
        xp.reshape(a, (n, t, a.shape[-1])), xp.reshape(g, (*vectors, n, t, g.shape[-1]))
    )
