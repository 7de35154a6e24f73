"""Multi-head self-attention, of four affine projections."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

from kfac_np.backend import Array, Backend, Rng, append_ones, array_namespace, softmax
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import affine
from kfac_np.layers.base import Layer
from kfac_np.layers.initializers import Initializer, glorot
from kfac_np.trees import Tree
from kfac_np.validation import require_flag

__all__ = ["MultiHeadAttention"]

PROJECTIONS = "query", "key", "value", "output"


@final
@dataclass(frozen=True, repr=False)
class MultiHeadAttention(Layer):
    """y = W̄_o [c; 1], c = softmax(q kᵀ / √d_head) v in each head, on sequences (N, S, d_model).

    q, k and v are W̄_q x̄, W̄_k x̄ and W̄_v x̄ with x̄ = [x; 1] at every position; head h sees the
    h-th d_head = d_model / heads of their rows. Parameters are a dict of four matrices, "query",
    "key", "value" and "output", each (d_model, d_model + 1) with the bias as last column. Each is
    an affine layer used at S positions, and its statistics say so: every curvature that takes a
    dense layer takes these.

    Parameters
    ----------
    d_model : int
    heads : int
        Divides d_model.
    bias : bool
    causal : bool
        Whether a position sees only itself and those before it.
    initializer : callable
        (rng, d_in, d_out, backend) -> weights, for each projection; biases start at zero.

    References
    ----------
    Vaswani et al. 2017, arXiv:1706.03762, §3.2. Eschenhagen et al. 2023, arXiv:2311.00636, §2.2
    (attention as layers that share weights).

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import get_backend
    >>> layer = MultiHeadAttention(4, heads=2)
    >>> params = layer.init(Rng(0), get_backend("numpy", "float64"))
    >>> y, cache = layer.forward(params, np.ones((3, 5, 4)))
    >>> dx, statistics = layer.backward(params, cache, y)
    >>> y.shape, statistics["key"].num_locations, statistics["key"].gradient().shape
    ((3, 5, 4), 5, (4, 5))
    """

    d_model: int
    heads: int
    bias: bool = True
    causal: bool = False
    initializer: Initializer = field(default=glorot, repr=False)

    def __post_init__(self) -> None:
        affine.check(self, "d_model", "heads")
        require_flag("MultiHeadAttention causal", self.causal)
        if self.d_model % self.heads:
            raise InputError(
                f"MultiHeadAttention: expected heads to divide d_model, got {self.heads} heads "
                f"for {self.d_model} numbers"
            )

    def init(self, rng: Rng | int, backend: Backend) -> Tree:
        shape, streams = (self.d_model, self.d_model), Rng.of(rng).spawn()
        return {
            name: affine.draw(self, streams.child(name), shape, backend, self.bias)
            for name in PROJECTIONS
        }

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 2 or shape[1] != self.d_model or 0 in shape:
            raise self.wrong_inputs(f"(N, S, {self.d_model})", shape)
        return shape

    def backward_size(self, shape: tuple[int, ...]) -> int:
        s, d = shape
        return 4 * s * d + self.heads * s * s

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        self._require_parameters(params)
        a = self._homogeneous(x)
        q, k, v = (self._split(affine.product(a, params[name].T)) for name in PROJECTIONS[:3])
        xp = array_namespace(x)
        scores = (q @ xp.matrix_transpose(k)) * self._scale
        if self.causal:
            s = xp.arange(x.shape[1], device=x.device)
            never = xp.asarray(-math.inf, dtype=x.dtype, device=x.device)
            scores = xp.where(s[None, :] <= s[:, None], scores, never)
        p = softmax(scores)
        c = self._homogeneous(self._merge(p @ v))
        cache = {"a": a, "q": q, "k": k, "v": v, "p": p, "c": c}
        return affine.product(c, params["output"].T), cache

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        derivatives = self._derivatives(params, cache, g)
        statistics = {
            name: affine.statistics(cache["a"], derivatives[name]) for name in PROJECTIONS[:3]
        }
        statistics["output"] = affine.statistics(cache["c"], g)
        return (self._to_input(params, derivatives) if wrt_input else None), statistics

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array:
        dc = self._merge(self._tangents(params, cache, dx, dparams)["o"])
        moved = affine.product(cache["c"], dparams["output"].T)
        return moved + affine.product(dc, self._weights(params, "output").T)

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array, Tree]:
        t = self._tangents(params, cache, dx, dparams)
        first = self._derivatives(params, cache, g)
        second = self._second_derivatives(params, cache, g, t, dparams, dg)
        # Derivatives with respect to the input are sums of products with the projections ...
        ddx = self._to_input(params, second) + self._to_input(dparams, first)
        # ... and gradients products with their inputs, whose appended 1 does not move.
        dgradient = {}
        for name in PROJECTIONS:
            inputs, d_inputs = cache["a"], dx
            if name == "output":
                inputs, d_inputs = cache["c"], self._merge(t["o"])
            dgradient[name] = affine.statistics(inputs, second[name]).gradient()
            if d_inputs is not None:
                moved = affine.statistics(d_inputs, first[name]).gradient()
                dgradient[name][:, : self.d_model] += moved
        return ddx, dgradient

    @property
    def _scale(self) -> float:
        return (self.d_model // self.heads) ** -0.5

    def _derivatives(self, params: Tree, cache: Tree, g: Array) -> dict[str, Array]:
        """Derivatives with respect to the outputs of the projections, ([K,] N, S, d_model)."""
        xp = array_namespace(g)
        q, k, v, p = (cache[name] for name in ("q", "k", "v", "p"))
        go = self._split(affine.product(g, self._weights(params, "output")))
        gs = _softmax_product(p, go @ xp.matrix_transpose(v)) * self._scale
        each = {
            "query": gs @ k,
            "key": xp.matrix_transpose(gs) @ q,
            "value": xp.matrix_transpose(p) @ go,
        }
        return {**{name: self._merge(d) for name, d in each.items()}, "output": g}

    def _tangents(
        self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree
    ) -> dict[str, Array]:
        """Tangents of q, k, v, of the attention p and of the heads' outputs o."""
        xp = array_namespace(cache["a"])
        t = {}
        for short, name in zip("qkv", PROJECTIONS[:3], strict=True):
            moved = affine.product(cache["a"], dparams[name].T)
            if dx is not None:
                moved += affine.product(dx, self._weights(params, name).T)
            t[short] = self._split(moved)
        ds = t["q"] @ xp.matrix_transpose(cache["k"]) + cache["q"] @ xp.matrix_transpose(t["k"])
        t["p"] = _softmax_product(cache["p"], ds * self._scale)
        t["o"] = t["p"] @ cache["v"] + cache["p"] @ t["v"]
        return t

    def _second_derivatives(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        t: dict[str, Array],
        dparams: Tree,
        dg: Array | None,
    ) -> dict[str, Array]:
        """How `_derivatives` move with the tangents t, dparams and dg."""
        xp = array_namespace(g)
        q, k, v, p = (cache[name] for name in ("q", "k", "v", "p"))
        go = self._split(affine.product(g, self._weights(params, "output")))
        dg = xp.zeros_like(g) if dg is None else dg
        moved = affine.product(g, self._weights(dparams, "output"))
        dgo = self._split(moved + affine.product(dg, self._weights(params, "output")))
        gp = go @ xp.matrix_transpose(v)
        dgp = dgo @ xp.matrix_transpose(v) + go @ xp.matrix_transpose(t["v"])
        gs = _softmax_product(p, gp) * self._scale
        # p ∘ (gp - Σ p gp), differentiated in p and in gp
        dgs = t["p"] * (gp - xp.sum(p * gp, axis=-1, keepdims=True))
        dgs = dgs - p * xp.sum(t["p"] * gp, axis=-1, keepdims=True)
        dgs = (dgs + _softmax_product(p, dgp)) * self._scale
        each = {
            "query": dgs @ k + gs @ t["k"],
            "key": xp.matrix_transpose(dgs) @ q + xp.matrix_transpose(gs) @ t["q"],
            "value": xp.matrix_transpose(t["p"]) @ go + xp.matrix_transpose(p) @ dgo,
        }
        return {**{name: self._merge(d) for name, d in each.items()}, "output": dg}

    def _to_input(self, params: Tree, derivatives: dict[str, Array]) -> Array:
        """Sum over q, k and v of their derivatives, backpropagated to the input."""
        q, k, v = (
            affine.product(derivatives[name], self._weights(params, name))
            for name in PROJECTIONS[:3]
        )
        return q + k + v

    def _weights(self, params: Tree, name: str) -> Array:
        """A projection without its bias."""
        return params[name][:, : self.d_model]

    def _homogeneous(self, x: Array) -> Array:
        return append_ones(x) if self.bias else x

    def _split(self, x: Array) -> Array:
        """([K,] N, S, d_model) to ([K,] N, heads, S, d_head)."""
        xp = array_namespace(x)
        x = xp.reshape(x, (*x.shape[:-1], self.heads, self.d_model // self.heads))
        return xp.moveaxis(x, -2, -3)

    def _merge(self, x: Array) -> Array:
        """The inverse of `_split`."""
        xp = array_namespace(x)
        x = xp.moveaxis(x, -3, -2)
        return xp.reshape(x, (*x.shape[:-2], self.d_model))

    def _require_parameters(self, params: Tree) -> None:
        expected = (self.d_model, self.d_model + self.bias)
        came = (
            {name: tuple(getattr(p, "shape", ())) for name, p in params.items()}
            if isinstance(params, dict)
            else type(params).__name__
        )
        if came != dict.fromkeys(PROJECTIONS, expected):
            raise ShapeError(
                f"{self!r}: expected parameters {', '.join(PROJECTIONS)} of shape {expected}, "
                f"got {came}"
            )


def _softmax_product(p: Array, v: Array) -> Array:
    """(diag(p) - p pᵀ) v for each row p: the derivative of a softmax, which is symmetric."""
    xp = array_namespace(p, v)
    return p * (v - xp.sum(p * v, axis=-1, keepdims=True))
