"""What convolutions and pools share: reading and checking their hyper-parameters."""

from __future__ import annotations

from typing import Any, Literal

from kfac_np.errors import InputError
from kfac_np.layers import affine
from kfac_np.layers.base import Layer
from kfac_np.validation import is_integer

__all__ = ["Padding", "padding_pairs", "per_axis"]

Padding = int | tuple[int, ...] | tuple[tuple[int, int], ...] | Literal["same", "valid"]
"""Zeros on both sides: a number, one for each axis, (before, after) for each axis, or a name.

Negative numbers cut off.
"""


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


def check_channels(name: str, layer: Any) -> None:
    """Raise `InputError` unless channels and groups fit together."""
    affine.check(layer, "c_in", "c_out", "groups")
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


def require_channels(layer: Layer, axes: int, channels: int | None, shape: tuple[int, ...]) -> None:
    """Raise `ShapeError` unless an example's shape is (*spatial, channels), nothing empty."""
    wrong_channels = channels is not None and shape[-1:] != (channels,)
    if len(shape) != axes + 1 or wrong_channels or 0 in shape:
        last = "C" if channels is None else channels
        raise layer.wrong_inputs(f"(N, {axes} spatial axes, {last})", shape)


def _is_positive(value: object) -> bool:
    return is_integer(value) and value > 0
