"""Matrices of parameters: drawn, and checked, alike by every layer that has one."""

from __future__ import annotations

from typing import Any

from kfac_np.backend import Array, Backend, Rng
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.initializers import Initializer

__all__ = ["draw_matrix", "require_parameters"]


def draw_matrix(
    layer: object,
    initializer: Initializer,
    rng: Rng | int,
    shape: tuple[int, int],
    backend: Backend,
    *,
    bias: bool,
) -> Array:
    """Draw weights (d_out, d_in); with a bias append it as last column, zeros.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> from kfac_np.layers.initializers import glorot
    >>> draw_matrix("a layer", glorot, Rng(0), (2, 3), get_backend(), bias=True).shape
    (2, 4)
    """
    d_out, d_in = shape
    if d_out * d_in >= 2**60:  # more bytes than any machine addresses
        raise InputError(f"{layer!r}: expected fewer than 2^60 parameters, got {d_out} · {d_in}")
    weights = initializer(Rng.of(rng), d_in, d_out, backend)
    if weights.shape != shape:
        raise ShapeError(
            f"{layer!r}: expected the initializer to return shape {shape}, "
            f"got {tuple(weights.shape)}"
        )
    return backend.xp.concat([weights, backend.zeros((d_out, 1))], axis=1) if bias else weights


def require_parameters(layer: object, params: Any, expected: tuple[int, ...]) -> None:
    """Raise `ShapeError` unless the parameters are one array of the expected shape.

    Examples
    --------
    >>> require_parameters("a layer", (), (2, 4))
    Traceback (most recent call last):
    kfac_np.errors.ShapeError: 'a layer': expected parameters (2, 4), got tuple
    """
    if getattr(params, "shape", None) != expected:
        came = tuple(params.shape) if hasattr(params, "shape") else type(params).__name__
        raise ShapeError(f"{layer!r}: expected parameters {expected}, got {came}")
