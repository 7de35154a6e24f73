"""A layer used at every position of a sequence, with a state from the position before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.containers import inside
from kfac_np.layers.uses import merge_trees, require_uncoupled, sum_trees
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_sizes

__all__ = ["Recurrent"]


@final
@dataclass(frozen=True, repr=False)
class Recurrent(Layer):
    """h_s = cell([x_s, h_{s-1}]), h_0 = 0, over the positions of (N, S, d); returns all h.

    Outputs are (N, S, d_state). Parameters are those of the cell, used at every position: their
    statistics are merged over time (`merge_uses`).

    Parameters
    ----------
    cell : Layer
        From (N, d + d_state) to (N, d_state), without batch statistics; for example
        Sequential(Dense(d + d_state, d_state), Tanh()).
    d_state : int

    References
    ----------
    Martens, Ba & Johnson 2018, "Kronecker-factored Curvature Approximations for Recurrent Neural
    Networks".

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> layer = Recurrent(Dense(2, 1, bias=False), d_state=1)
    >>> layer.forward(np.asarray([[1.0, 0.5]]), np.ones((1, 3, 1)))[0][0, :, 0]
    array([1.  , 1.5 , 1.75])
    """

    cell: Layer
    d_state: int

    def __post_init__(self) -> None:
        plain_fields(self)
        if not isinstance(self.cell, Layer):
            raise InputError(f"Recurrent: expected a Layer as cell, got {type(self.cell).__name__}")
        require_sizes("Recurrent", d_state=self.d_state)
        require_uncoupled("Recurrent", self.cell, "many")

    @property
    def children(self) -> Layer:
        return self.cell

    def init(self, rng: Rng | int, backend: Backend) -> Tree:
        return self.cell.init(Rng.of(rng), backend)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 2 or 0 in shape:
            raise self.wrong_inputs("(N, S, d)", shape)
        with inside("Recurrent"):
            out = self.cell.output_shape((shape[1] + self.d_state,))
        if out != (self.d_state,):
            raise ShapeError(f"{self!r}: expected a cell with outputs ({self.d_state},), got {out}")
        return (shape[0], self.d_state)

    def backward_size(self, shape: tuple[int, ...]) -> int:
        return shape[0] * self.cell.backward_size((shape[1] + self.d_state,))

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        xp = array_namespace(x)
        streams = None if rng is None else rng.spawn()
        h = xp.zeros((x.shape[0], self.d_state), dtype=x.dtype, device=x.device)
        states, caches = [], []
        for s in range(x.shape[1]):
            stream = None if streams is None else streams.child(s)
            with inside("Recurrent"):
                h, cache = self.cell.forward(params, xp.concat([x[:, s, :], h], axis=1), stream)
            states.append(h)
            caches.append(cache)
        return xp.stack(states, axis=1), (tuple(caches), x.shape[2])

    def take(self, cache: Tree, rows: slice) -> Tree:
        caches, d = cache
        return tuple(self.cell.take(c, rows) for c in caches), d

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        caches, d = cache
        each = self._through_time(params, caches, g, wrt_input)
        statistics = merge_trees([s for _, _, s in each])
        if not wrt_input:
            return None, statistics
        dx = [dz[..., :d] for _, dz, _ in each if dz is not None]
        return array_namespace(g).stack(dx, axis=-2), statistics

    def _through_time(
        self, params: Tree, caches: Tree, g: Array, wrt_input: bool
    ) -> list[tuple[Array, Array | None, Tree]]:
        """At each position: derivatives with respect to h and to the cell's input; statistics."""
        each: list[tuple[Array, Array | None, Tree]] = []
        dz: Array | None = None
        for s in reversed(range(len(caches))):
            gh = g[..., s, :] if dz is None else g[..., s, :] + dz[..., -self.d_state :]
            dz, statistics = self.cell.backward(params, caches[s], gh, wrt_input or s > 0)
            each.append((gh, dz, statistics))
        return each[::-1]

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        _, states = self._tangents(params, cache, dx, dparams)
        known = [dh for dh in states if dh is not None]
        if not known:
            return None
        xp = array_namespace(known[0])
        return xp.stack([xp.zeros_like(known[0]) if dh is None else dh for dh in states], axis=1)

    def _tangents(
        self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree
    ) -> tuple[list[Array | None], list[Array | None]]:
        """Tangents of the cell's inputs, and of the states."""
        caches, d = cache
        inputs: list[Array | None] = []
        states: list[Array | None] = []
        dh: Array | None = None
        for s, c in enumerate(caches):
            inputs.append(_join(None if dx is None else dx[:, s, :], d, dh, self.d_state))
            dh = self.cell.jvp(params, c, inputs[-1], dparams)
            states.append(dh)
        return inputs, states

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array | None, Tree]:
        caches, d = cache
        inputs, _ = self._tangents(params, cache, dx, dparams)
        each = self._through_time(params, caches, g, True)
        ddz: Array | None = None
        ddx: list[Array | None] = []
        dgradients = []
        for s in reversed(range(len(caches))):
            dgh = None if dg is None else dg[..., s, :]
            if ddz is not None:
                moved = ddz[..., -self.d_state :]
                dgh = moved if dgh is None else dgh + moved
            gh = each[s][0]
            ddz, dgradient = self.cell.backward_jvp(params, caches[s], gh, inputs[s], dparams, dgh)
            ddx.append(None if ddz is None else ddz[..., :d])
            dgradients.append(dgradient)
        xp = array_namespace(g)
        nothing = xp.zeros((g.shape[0], d), dtype=g.dtype, device=g.device)
        parts = [nothing if part is None else part for part in reversed(ddx)]
        return xp.stack(parts, axis=-2), sum_trees(dgradients)


def _join(dx: Array | None, d: int, dh: Array | None, d_state: int) -> Array | None:
    """[dx, dh], of sizes d and d_state; zeros stand for what is None unless all is."""
    known = dx if dh is None else dh
    if known is None:
        return None
    xp = array_namespace(known)
    parts = [
        xp.zeros((known.shape[0], size), dtype=known.dtype, device=known.device)
        if part is None
        else part
        for part, size in ((dx, d), (dh, d_state))
    ]
    return xp.concat(parts, axis=1)
