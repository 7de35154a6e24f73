"""Transposed convolutions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.convolution import Conv
from kfac_np.layers.initializers import Initializer, he
from kfac_np.layers.spatial import (
    check_axes,
    check_budget,
    check_channels,
    check_padding,
    padding_pairs,
    per_axis,
    require_channels,
)
from kfac_np.statistics import AffineStatistics, GroupedStatistics
from kfac_np.trees import Tree
from kfac_np.validation import is_integer, plain_fields

__all__ = ["ConvTranspose"]


@final
@dataclass(frozen=True, repr=False)
class ConvTranspose(Layer):
    """The transposed convolution ("deconvolution"): the adjoint of a strided one, with weights.

    Zeros are put between the pixels of the input (stride - 1 of them) and a convolution of stride 1
    runs over the result, which is how its parameters enter: s_t = W̄ ā_t at every pixel t of the
    output, ā_t the patch of the stuffed input. Along each axis an input of n gives

        (n - 1) · stride + dilation · (kernel - 1) + 1 + output_padding - padding on both sides.

    Parameters have the shape of those of `Conv`. The convolution that this is the adjoint of goes
    from c_out channels to c_in; entry (o, (tap, i)) here is its entry (i, (tap', o)), tap' being
    the tap counted from the other end of each axis of the kernel. (`torch.nn.ConvTranspose2d`
    stores that convolution's entry as weight[i, o, tap'].)

    Parameters
    ----------
    c_in, c_out, kernel, stride, dilation, groups, bias, initializer, budget_bytes
        As for `Conv`.
    padding : int or tuple
        Of the convolution that this is the adjoint of: it makes the output smaller.
    output_padding : int or tuple of int
        Pixels added at the end of each axis; less than the stride.

    References
    ----------
    Dumoulin & Visin 2016, arXiv:1603.07285, §4.

    Examples
    --------
    >>> layer = ConvTranspose(8, 3, (4, 4), stride=2, padding=1)
    >>> layer.output_shape((7, 7, 8))
    (14, 14, 3)
    """

    c_in: int
    c_out: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | tuple[tuple[int, int], ...] = 0
    output_padding: int | tuple[int, ...] = 0
    groups: int = 1
    bias: bool = True
    initializer: Initializer = field(default=he, repr=False)
    budget_bytes: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        plain_fields(self)
        name, axes = "ConvTranspose", len(self.kernel) if isinstance(self.kernel, tuple) else 0
        check_axes(name, self.kernel, stride=self.stride, dilation=self.dilation)
        check_channels(name, self)
        check_padding(name, self.padding, axes, ())
        check_budget(name, self.budget_bytes)
        given: Any = self.output_padding
        extra = given if isinstance(given, tuple) else (given,) * axes
        stride = per_axis(self.stride, axes)
        if not (
            all(map(is_integer, extra))
            and len(extra) == axes
            and all(0 <= o < s for o, s in zip(extra, stride, strict=True))
        ):
            raise InputError(
                f"{name}: expected output_padding to be at least 0 and less than the stride "
                f"{self.stride}, got {self.output_padding!r}"
            )

    @cached_property
    def _conv(self) -> Conv:
        """The convolution that runs over the stuffed input."""
        axes = len(self.kernel)
        extent = [
            d * (k - 1) for k, d in zip(self.kernel, per_axis(self.dilation, axes), strict=True)
        ]
        pairs = padding_pairs(self.padding, axes)
        padding = tuple((e - low, e - high) for e, (low, high) in zip(extent, pairs, strict=True))
        return Conv(
            self.c_in,
            self.c_out,
            self.kernel,
            dilation=self.dilation,
            padding=padding,
            groups=self.groups,
            bias=self.bias,
            initializer=self.initializer,
            budget_bytes=self.budget_bytes,
        )

    def init(self, rng: Rng | int, backend: Backend) -> Array:
        return self._conv.init(rng, backend)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        require_channels(self, len(self.kernel), self.c_in, shape)
        try:
            return self._conv.output_shape((*self._stuffed_size(shape[:-1]), self.c_in))
        except ShapeError:
            raise self.wrong_inputs("of which padding leaves something", shape) from None

    def forward(self, params: Array, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        return self._conv.forward(params, self._stuff(x))

    def backward(
        self, params: Array, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, AffineStatistics | GroupedStatistics]:
        dx, statistics = self._conv.backward(params, cache, g, wrt_input)
        return (None if dx is None else self._pick(dx)), statistics

    def jvp(self, params: Array, cache: Tree, dx: Array | None, dparams: Array) -> Array:
        return self._conv.jvp(params, cache, None if dx is None else self._stuff(dx), dparams)

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array, Array]:
        dx = None if dx is None else self._stuff(dx)
        ddx, dgradient = self._conv.backward_jvp(params, cache, g, dx, dparams, dg)
        return self._pick(ddx), dgradient

    def take(self, cache: Tree, rows: slice) -> Tree:
        return self._conv.take(cache, rows)

    def _stuffed_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        stride = per_axis(self.stride, len(self.kernel))
        extra = per_axis(self.output_padding, len(self.kernel))
        return tuple((n - 1) * s + 1 + o for n, s, o in zip(size, stride, extra, strict=True))

    def _steps(self) -> tuple[slice, ...]:
        """Where the pixels of the input are in the stuffed one."""
        return tuple(slice(None, None, s) for s in per_axis(self.stride, len(self.kernel)))

    def _stuff(self, x: Array) -> Array:
        """Put stride - 1 zeros between pixels, and output_padding after the last one."""
        shape = (x.shape[0], *self._stuffed_size(x.shape[1:-1]), self.c_in)
        out = array_namespace(x).zeros(shape, dtype=x.dtype, device=x.device)
        out[:, *self._steps(), :] = x
        return out

    def _pick(self, x: Array) -> Array:
        """The adjoint of `_stuff`."""
        return x[..., *self._steps(), :]
