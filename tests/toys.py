"""Layers that the library does not have, for tests that need them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, Backend, Rng, array_namespace, get_backend, to_numpy
from kfac_np.errors import ShapeError
from kfac_np.layers import Activation, Dropout, Layer
from kfac_np.trees import Tree


@dataclass(frozen=True)
class LinearOverPositions(Layer):
    """y[n, s] = Σ_r m[s, r] x[n, r]: a fixed linear map over the axis after N."""

    def rows(self, positions: int) -> list[list[float]]:
        """The matrix m for so many positions."""
        raise NotImplementedError

    def shape_after(self, positions: int) -> tuple[int, ...]:
        """What becomes of the axis of positions."""
        raise NotImplementedError

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return ()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 2:
            raise ShapeError(f"{self!r}: expected inputs (N, S, d), got {('N', *shape)}")
        return (*self.shape_after(shape[0]), shape[1])

    def _apply(self, x: Array, positions: int, *, transpose: bool) -> Array:
        xp = array_namespace(x)
        m = xp.asarray(self.rows(positions), dtype=x.dtype, device=x.device)
        return (m.T if transpose else m) @ x

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        shape = self.output_shape(x.shape[1:])
        y = self._apply(x, x.shape[1], transpose=False)
        return array_namespace(x).reshape(y, (x.shape[0], *shape)), x.shape[1:]

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        if not wrt_input:
            return None, ()
        out = self.shape_after(cache[0])
        lead = g.shape[: g.ndim - len(out) - 1]  # ([K,] N)
        g = array_namespace(g).reshape(g, (*lead, math.prod(out), cache[1]))
        return self._apply(g, cache[0], transpose=True), ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return None if dx is None else self.forward((), dx)[0]

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        return (None, ()) if dg is None else self.backward((), cache, dg)

    def take(self, cache: Tree, rows: slice) -> Tree:
        return cache


@final
@dataclass(frozen=True)
class MixPositions(LinearOverPositions):
    """Every position sees every other one, unequally: what attention does, without its weights."""

    def rows(self, positions: int) -> list[list[float]]:
        return [
            [math.cos(1.0 + 2.0 * s + 0.7 * r) for r in range(positions)] for s in range(positions)
        ]

    def shape_after(self, positions: int) -> tuple[int, ...]:
        return (positions,)


@final
@dataclass(frozen=True)
class MeanOverPositions(LinearOverPositions):
    """Mean pooling, (N, S, d) to (N, d)."""

    def rows(self, positions: int) -> list[list[float]]:
        return [[1.0 / positions] * positions]

    def shape_after(self, positions: int) -> tuple[int, ...]:
        return ()


@final
@dataclass(frozen=True, eq=False)
class PerExample:
    """Statistics that are the per-example gradients themselves, shape ([K,] N, *parameter)."""

    u: Array
    examples_axis: int

    def gradient(self) -> Array:
        return array_namespace(self.u).sum(self.u, axis=self.examples_axis)

    def per_example(self) -> Array:
        return self.u


@final
@dataclass(frozen=True)
class Softsign(Activation):
    """φ(x) = x / (1 + |x|), an activation in as few lines as one takes: it has no φ″."""

    def value(self, x: Array) -> Array:
        return x / (1.0 + abs(x))

    def derivative(self, x: Array, y: Array) -> Array:
        return (1.0 - abs(y)) ** 2


@final
@dataclass(frozen=True)
class Scaling(Layer):
    """y = gain · scale · x on the last axis: parameters in a dict, a vector and a number."""

    d: int

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return {"scale": backend.ones((self.d,)), "gain": backend.ones(())}

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        return params["gain"] * params["scale"] * x, x

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        scale, gain = params["scale"], params["gain"]
        examples_axis = g.ndim - cache.ndim
        xp, shared = array_namespace(g), tuple(range(examples_axis + 1, g.ndim - 1))
        each = xp.sum(g * cache, axis=shared)  # over positions: ([K,] N, d)
        statistics = {
            "scale": PerExample(gain * each, examples_axis),
            "gain": PerExample(xp.sum(scale * each, axis=-1), examples_axis),
        }
        return (gain * scale * g if wrt_input else None), statistics

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array:
        scale, gain = params["scale"], params["gain"]
        dy = (dparams["gain"] * scale + gain * dparams["scale"]) * cache
        return dy if dx is None else dy + gain * scale * dx


@final
@dataclass(frozen=True)
class MaskedDropout(Layer):
    """`Dropout` with the same mask in every forward pass, whatever the dtype: for the laws."""

    rate: float

    def kept(self, shape: tuple[int, ...]) -> Any:
        """Which numbers stay, on the host."""
        return to_numpy(self._mask(get_backend("numpy", "float64").ones(shape))) > 0

    def _mask(self, x: Array) -> Array:
        xp = array_namespace(x)
        ones = xp.ones(x.shape, dtype=xp.float64, device=x.device)
        mask = Dropout(self.rate).forward((), ones, Rng(3))[1]
        return xp.astype(mask, x.dtype)

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return ()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        mask = self._mask(x)
        return x * mask, mask

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        return Dropout(self.rate).backward(params, cache, g, wrt_input)

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return Dropout(self.rate).jvp(params, cache, dx, dparams)

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        return Dropout(self.rate).backward_jvp(params, cache, g, dx, dparams, dg)
