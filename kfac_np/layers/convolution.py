"""Convolutions in any number of dimensions, plain, strided, dilated and grouped.

Arrays are (N, *spatial, C), channels last: see `kfac_np.backend.patches` for why.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import final

from kfac_np.backend import (
    Array,
    Backend,
    Geometry,
    Patches,
    Rng,
    array_namespace,
    patch_budget,
    transposed_product,
)
from kfac_np.errors import ShapeError
from kfac_np.layers import affine
from kfac_np.layers.base import Layer
from kfac_np.layers.initializers import Initializer, he
from kfac_np.layers.spatial import (
    Padding,
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
from kfac_np.validation import plain_fields

__all__ = ["Conv"]


@final
@dataclass(frozen=True, repr=False)
class Conv(Layer):
    """s_t = W̄ ā_t at every location t, ā_t the patch of the input at t with a 1 appended.

    A cross-correlation, as everywhere in machine learning: the kernel is not flipped. Inputs are
    (N, *spatial, c_in), outputs (N, *spatial, c_out), with as many spatial axes as `kernel` has
    entries.

    Parameters are the one matrix W̄, shape (c_out, taps · c_in + 1) with the bias as last column;
    columns run over the taps (row-major), then over channels. With groups the shape is
    (groups, c_out / groups, taps · c_in / groups + 1): each group is an affine layer of its own.

    Parameters
    ----------
    c_in, c_out : int
        Channels.
    kernel : tuple of int
        One entry for each spatial axis.
    stride, dilation : int or tuple of int
    padding : int, tuple, "same" or "valid"
        Zeros on both sides: a number for all axes, one for each, or (before, after) for each.
        Negative numbers cut pixels off instead.
        "same" pads so that an axis of n has ⌈n / stride⌉ locations, the odd zero at the end;
        "valid" is 0.
    groups : int
        Divides c_in and c_out; c_in groups make a depthwise convolution.
    bias : bool
    initializer : callable
        (rng, fan_in, fan_out, backend) -> weights, with fan_in = taps · c_in / groups and
        fan_out = c_out / groups.
    budget_bytes : int, optional
        The most bytes of patches that are unfolded at once (one example at least), by each
        thread of `kfac_np.backend.numpy_kernels.threads`.

    References
    ----------
    Grosse & Martens 2016, arXiv:1602.01407, §2.2 and §3.1 (patches as inputs of an affine map).

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import get_backend
    >>> layer = Conv(3, 8, (5, 5), padding="same")
    >>> W = layer.init(Rng(0), get_backend())
    >>> y, cache = layer.forward(W, np.ones((2, 6, 7, 3), dtype=np.float32))
    >>> W.shape, y.shape
    ((8, 76), (2, 6, 7, 8))
    """

    c_in: int
    c_out: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    padding: Padding = 0
    groups: int = 1
    bias: bool = True
    initializer: Initializer = field(default=he, repr=False)
    budget_bytes: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        plain_fields(self)
        check_axes("Conv", self.kernel, stride=self.stride, dilation=self.dilation)
        check_channels("Conv", self)
        check_padding("Conv", self.padding, len(self.kernel), ("same", "valid"))
        check_budget("Conv", self.budget_bytes)

    def geometry(self, size: tuple[int, ...]) -> Geometry:
        """Where the kernel looks in an input of the given spatial size."""
        return _geometry(self.kernel, self.stride, self.dilation, self.padding, size)

    def init(self, rng: Rng | int, backend: Backend) -> Array:
        shape = self.c_out // self.groups, self.kernel_columns
        if self.groups == 1:
            return affine.draw(self, rng, shape, backend, self.bias)
        streams = Rng.of(rng).spawn()
        each = [
            affine.draw(self, streams.child(i), shape, backend, self.bias)
            for i in range(self.groups)
        ]
        return backend.xp.stack(each)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        require_channels(self, len(self.kernel), self.c_in, shape)
        try:
            out = self.geometry(shape[:-1]).output_size(shape[:-1])
        except ShapeError as error:
            raise error.within(repr(self)) from None
        return (*out, self.c_out)

    def forward(self, params: Array, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        groups = () if self.groups == 1 else (self.groups,)
        columns = self.kernel_columns + self.bias
        affine.require(self, params, (*groups, self.c_out // self.groups, columns))
        patches = self._patches(x, self.bias)
        return self._products(params, patches), (patches, x.shape[1:])

    def backward(
        self, params: Array, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, AffineStatistics | GroupedStatistics]:
        groups, shape = cache
        dx = self._transpose(params, g, shape) if wrt_input else None
        return dx, self._statistics(groups, g, shape)

    def jvp(self, params: Array, cache: Tree, dx: Array | None, dparams: Array) -> Array:
        groups, _ = cache
        dy = self._products(dparams, groups)
        if dx is not None:
            columns = self.kernel_columns
            dy += self._products(params[..., :columns], self._patches(dx, False))
        return dy

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array, Array]:
        # The input derivative is linear in g and in W̄, the gradient in g and in the patches.
        groups, shape = cache
        ddx = self._transpose(dparams, g, shape)
        dgradient = array_namespace(params).zeros_like(params)
        if dg is not None:
            ddx += self._transpose(params, dg, shape)
            dgradient += self._statistics(groups, dg, shape).gradient()
        if dx is not None:  # the appended 1 does not move
            moved = self._statistics(self._patches(dx, False), g, shape).gradient()
            dgradient[..., : self.kernel_columns] += moved
        return ddx, dgradient

    def take(self, cache: Tree, rows: slice) -> Tree:
        groups, shape = cache
        return tuple(patches.take(rows) for patches in groups), shape

    @property
    def kernel_columns(self) -> int:
        """Columns of W̄ without the bias: taps · c_in / groups."""
        return math.prod(self.kernel) * (self.c_in // self.groups)

    def _patches(self, x: Array, ones: bool) -> tuple[Patches, ...]:
        """The patches that each group sees."""
        geometry = self.geometry(x.shape[1:-1])
        budget = patch_budget(x) if self.budget_bytes is None else self.budget_bytes
        c = self.c_in // self.groups
        return tuple(
            Patches(x[..., i * c : (i + 1) * c], geometry, ones, budget) for i in range(self.groups)
        )

    def _products(self, params: Array, groups: tuple[Patches, ...]) -> Array:
        """W̄ ā for all groups, channels side by side."""
        if self.groups == 1:
            return groups[0].product(params.T)
        parts = [p.product(params[i, ...].T) for i, p in enumerate(groups)]
        return array_namespace(params).concat(parts, axis=-1)

    def _transpose(self, params: Array, g: Array, shape: tuple[int, ...]) -> Array:
        """Wᵀ g, added back to where the patches were taken from; shape ([K,] N, *shape)."""
        xp = array_namespace(params, g)
        spatial, columns = len(self.kernel), self.kernel_columns
        lead = g.shape[: g.ndim - spatial - 1]  # ([K,] N)
        g = xp.reshape(g, (math.prod(lead), *g.shape[len(lead) :]))
        if self.groups == 1:
            parts = [self._transpose_group(params[:, :columns], g, shape)]
        else:
            c = self.c_out // self.groups
            parts = [
                self._transpose_group(params[i, :, :columns], g[..., i * c : (i + 1) * c], shape)
                for i in range(self.groups)
            ]
        dx = parts[0] if self.groups == 1 else xp.concat(parts, axis=-1)
        return xp.reshape(dx, (*lead, *shape))

    def _transpose_group(self, w: Array, g: Array, shape: tuple[int, ...]) -> Array:
        budget = patch_budget(g) if self.budget_bytes is None else self.budget_bytes
        return transposed_product(g, w, self.geometry(shape[:-1]), shape[:-1], budget)

    def _statistics(
        self, groups: tuple[Patches, ...], g: Array, shape: tuple[int, ...]
    ) -> AffineStatistics | GroupedStatistics:
        xp = array_namespace(g)
        spatial = len(self.kernel)
        lead = g.shape[: g.ndim - spatial - 1]
        g = xp.reshape(g, (*lead, math.prod(g.shape[len(lead) : -1]), self.c_out))
        if self.groups == 1:
            return AffineStatistics(groups[0], g)
        c = self.c_out // self.groups
        return GroupedStatistics(
            tuple(AffineStatistics(p, g[..., i * c : (i + 1) * c]) for i, p in enumerate(groups))
        )


@functools.lru_cache(maxsize=1024)
def _geometry(
    kernel: tuple[int, ...],
    stride: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    padding: Padding,
    size: tuple[int, ...],
) -> Geometry:
    axes = len(kernel)
    stride, dilation = per_axis(stride, axes), per_axis(dilation, axes)
    free = Geometry(kernel, stride, dilation, ((0, 0),) * axes)
    if padding == "same":
        total = [
            max((math.ceil(n / s) - 1) * s + e - n, 0)
            for n, s, e in zip(size, stride, free.extent, strict=True)
        ]
        return replace(free, padding=tuple((p // 2, p - p // 2) for p in total))
    return replace(free, padding=padding_pairs(padding, axes))
