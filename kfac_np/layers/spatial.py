"""What convolutions and pools share: reading and checking their hyper-parameters."""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

from kfac_np.backend import Array, Backend, Rng
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.initializers import Initializer
from kfac_np.layers.parameters import draw_matrix, require_parameters
from kfac_np.validation import is_integer, require_callable, require_flag, require_sizes

__all__ = ["Padding", "padding_pairs", "per_axis"]

Padding = int | tuple[int, ...] | tuple[tuple[int, int], ...] | Literal["same", "valid"]
"""Zeros on both sides: a number, one for each axis, (before, after) for each axis, or a name.

Negative numbers cut off.
"""


class Kernel(Protocol):
    """A layer with a kernel."""

    @property
    def c_in(self) -> int: ...
    @property
    def c_out(self) -> int: ...
    @property
    def kernel(self) -> tuple[int, ...]: ...
    @property
    def groups(self) -> int: ...
    @property
    def bias(self) -> bool: ...
    @property
    def initializer(self) -> Initializer: ...


def per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """One number for each axis.

    Examples
    --------
    >>> per_axis(2, 3), per_axis((1, 2), 2)
    ((2, 2, 2), (1, 2))
    """
    return (value,) * axes if is_integer(value) else tuple(value)  # type: ignore[arg-type]


def padding_pairs(padding: Padding, axes: int) -> tuple[tuple[int, int], ...]:
    """(before, after) for each axis; "same" needs to know the size and is not for this function.

    Examples
    --------
    >>> padding_pairs(1, 2), padding_pairs((1, 2), 2), padding_pairs("valid", 1)
    (((1, 1), (1, 1)), ((1, 1), (2, 2)), ((0, 0),))
    """
    if padding == "valid":
        return ((0, 0),) * axes
    if is_integer(padding):
        return ((padding, padding),) * axes
    pairs: Any = padding
    return tuple((p, p) if is_integer(p) else (p[0], p[1]) for p in pairs)


def check_axes(
    name: str, kernel: Any, *, argument: str = "kernel", free: bool = False, **options: Any
) -> None:
    """Raise `InputError` unless a kernel is a tuple of sizes, and each option has one for each.

    A kernel that is `free` may be one size for all spatial axes, however many there are.
    """
    sizes = (kernel,) if free and is_integer(kernel) else kernel
    if not isinstance(sizes, tuple) or not sizes or not all(map(_is_positive, sizes)):
        raise InputError(
            f"{name}: expected {argument} to be {'a positive integer, or ' if free else ''}a tuple "
            f"of positive integers, one for each spatial axis, got {kernel!r}"
        )
    for option, value in options.items():
        each = (value,) * len(sizes) if is_integer(value) else value
        if not (
            isinstance(each, tuple) and len(each) == len(sizes) and all(map(_is_positive, each))
        ):
            raise InputError(
                f"{name}: expected {option} to be a positive integer, or {len(sizes)} of them, "
                f"got {value!r}"
            )


def check_padding(name: str, padding: Any, axes: int, names: tuple[str, ...]) -> None:
    """Raise `InputError` unless padding is of one of the forms of `Padding`."""
    if is_integer(padding) or (isinstance(padding, str) and padding in names):
        return
    if isinstance(padding, tuple) and len(padding) == axes:
        pairs = [p if isinstance(p, tuple) else (p, p) for p in padding]
        if all(len(p) == 2 and all(map(is_integer, p)) for p in pairs):
            return
    named = "".join(f", {n!r}" for n in names)
    raise InputError(
        f"{name}: expected padding to be an integer, {axes} of them, {axes} pairs of them{named}; "
        f"got {padding!r}"
    )


def check_channels(name: str, layer: Kernel) -> None:
    """Raise `InputError` unless channels and groups fit together."""
    require_sizes(name, c_in=layer.c_in, c_out=layer.c_out, groups=layer.groups)
    require_flag(f"{name} bias", layer.bias)
    require_callable(f"{name} initializer", layer.initializer)
    if layer.c_in % layer.groups or layer.c_out % layer.groups:
        raise InputError(
            f"{name}: expected groups to divide c_in and c_out, got {layer.groups} groups for "
            f"{layer.c_in} and {layer.c_out} channels"
        )


def check_budget(name: str, budget_bytes: Any) -> None:
    """Raise `InputError` unless a budget is a positive number of bytes, or None."""
    if not (budget_bytes is None or _is_positive(budget_bytes)):
        raise InputError(
            f"{name}: expected budget_bytes to be a positive integer or None, got {budget_bytes!r}"
        )


def require_channels(
    layer: object, axes: int, channels: int | None, shape: tuple[int, ...]
) -> None:
    """Raise `ShapeError` unless an example's shape is (*spatial, channels), nothing empty."""
    wrong_channels = channels is not None and shape[-1:] != (channels,)
    if len(shape) != axes + 1 or wrong_channels or 0 in shape:
        came = ", ".join(map(str, ("N", *shape)))
        expected = f"{axes} spatial axes, {'C' if channels is None else channels}"
        raise ShapeError(f"{layer!r}: expected inputs (N, {expected}), got ({came})")


def kernel_shape(layer: Kernel) -> tuple[int, ...]:
    """Shape of W̄."""
    d_in = math.prod(layer.kernel) * (layer.c_in // layer.groups) + layer.bias
    if layer.groups == 1:
        return (layer.c_out, d_in)
    return (layer.groups, layer.c_out // layer.groups, d_in)


def require_kernel(layer: Kernel, params: Any) -> None:
    """Raise `ShapeError` unless the parameters have the layer's shape."""
    require_parameters(layer, params, kernel_shape(layer))


def init_kernel(layer: Kernel, rng: Rng | int, backend: Backend) -> Array:
    """Draw W̄, group by group; the bias starts at zero."""
    *_, d_out, d_in = kernel_shape(layer)
    shape, draw, bias = (d_out, d_in - layer.bias), layer.initializer, layer.bias
    if layer.groups == 1:
        return draw_matrix(layer, draw, rng, shape, backend, bias=bias)
    streams = Rng.of(rng).spawn()
    children = [streams.child(i) for i in range(layer.groups)]
    return backend.xp.stack(
        [draw_matrix(layer, draw, child, shape, backend, bias=bias) for child in children]
    )


def options(layer: object, **defaults: Any) -> list[str]:
    """The options that differ from their defaults, for a `repr`."""
    values = [(name, getattr(layer, name), default) for name, default in defaults.items()]
    return [f"{name}={value!r}" for name, value, default in values if value != default]


def _is_positive(value: object) -> bool:
    return is_integer(value) and value > 0
