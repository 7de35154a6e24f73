"""Small networks, densely: Jacobians of single examples by HIPS autograd, the exact Fisher.

Nothing of the library is used. θ is one vector: the layers' matrices [W b], row after row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd import grad

HostArray = np.ndarray[Any, Any]
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": anp.tanh,
    "logistic": lambda s: 1.0 / (1.0 + anp.exp(-s)),
    "relu": lambda s: anp.maximum(s, 0.0),
    "softplus": lambda s: anp.logaddexp(0.0, s),
    "identity": lambda s: s,
}


def _softmax_loss(z: Any, t: Any) -> Any:
    top = anp.max(z, axis=-1, keepdims=True)
    logs = z - top - anp.log(anp.sum(anp.exp(z - top), axis=-1, keepdims=True))
    return -anp.sum(logs * np.eye(z.shape[-1])[t], axis=-1)


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "squared": lambda z, t: 0.5 * anp.sum((z - t) ** 2, axis=-1),
    "sigmoid": lambda z, t: anp.sum(anp.logaddexp(0.0, z) - t * z, axis=-1),
    "softmax": _softmax_loss,
    "poisson": lambda z, t: anp.sum(anp.exp(z) - t * z, axis=-1),
}


def sample_targets(loss: str, z: HostArray, seed: int, k: int) -> HostArray:
    """Targets drawn from the model's distribution at outputs z; the draws depend on (seed, k)."""
    draws = np.random.default_rng([seed, k])
    if loss == "squared":
        return z + draws.standard_normal(z.shape)
    if loss == "sigmoid":
        return (draws.random(z.shape) < 1.0 / (1.0 + np.exp(-z))).astype(float)
    if loss == "poisson":
        return draws.poisson(np.exp(z)).astype(float)
    p = np.exp(z - z.max(-1, keepdims=True))
    passed = np.cumsum(p / p.sum(-1, keepdims=True), axis=-1) < draws.random((*z.shape[:-1], 1))
    return passed.sum(-1)


@dataclass(frozen=True)
class Net:
    """Dense layers with activations between them, and a loss."""

    sizes: tuple[int, ...]
    activation: str
    loss: str
    bias: bool = True

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(n, m + self.bias) for m, n in itertools.pairwise(self.sizes)]

    @property
    def num_parameters(self) -> int:
        return sum(n * m for n, m in self.shapes)

    def forward(self, theta: Any, x: Any, nudges: Any = None) -> tuple[Any, list[Any]]:
        """Outputs, and each layer's homogeneous inputs; `theta` (P,), or (N, P): one an example.

        `nudges`, added to what the layers give, are there to differentiate by.
        """
        h, inputs, start = anp.reshape(x, (len(x), -1, x.shape[-1])), [], 0  # (N, locations, d)
        for i, (n, m) in enumerate(self.shapes):
            W = anp.reshape(theta[..., start : start + n * m], (*theta.shape[:-1], n, m))
            start += n * m
            if i:
                h = ACTIVATIONS[self.activation](h)
            if self.bias:
                h = anp.concatenate([h, np.ones((*h.shape[:-1], 1))], axis=-1)
            inputs.append(h)
            h = anp.einsum("oi,nti->nto" if W.ndim == 2 else "noi,nti->nto", W, h)
            if nudges is not None:
                h = h + nudges[i]
        return anp.reshape(h, (*x.shape[:-1], self.sizes[-1])), inputs

    def value(self, theta: Any, x: HostArray, t: HostArray, w: HostArray) -> Any:
        """Mean over the terms of the weighted loss."""
        terms = LOSSES[self.loss](self.forward(theta, x)[0], t)
        return anp.sum(anp.reshape(w, (-1, *(1,) * (terms.ndim - 1))) * terms) / terms.size

    def jacobians(self, theta: HostArray, x: HostArray) -> HostArray:
        """∂z/∂θ of every term, (N, [S,] C, P): each example is given parameters of its own."""
        each = np.tile(theta, (len(x), 1))
        z, _ = self.forward(theta, x)
        rows = [
            grad(lambda th, i=i: anp.sum(self.forward(th, x)[0][(slice(None), *i)]))(each)
            for i in np.ndindex(*z.shape[1:])
        ]
        return np.moveaxis(np.array(rows), 0, 1).reshape((*z.shape, -1))

    def output_hessian(self, z: HostArray, t: HostArray) -> HostArray:
        """∂²ℓ/∂z² of every term, (N, [S,] C, C)."""
        first = grad(lambda y: anp.sum(LOSSES[self.loss](y, t)))
        columns = [grad(lambda y, c=c: anp.sum(first(y)[..., c]))(z) for c in range(z.shape[-1])]
        return np.stack(columns, axis=-1)

    def output_gradient(self, z: HostArray, t: HostArray) -> HostArray:
        """∂ℓ/∂z of every term."""
        return grad(lambda y: anp.sum(LOSSES[self.loss](y, t)))(z)

    def fisher(self, theta: HostArray, x: HostArray, t: HostArray, w: HostArray) -> HostArray:
        """Exact Fisher matrix (P, P): mean over the terms of w Jᵀ (∂²ℓ/∂z²) J."""
        z = self.forward(theta, x)[0]
        J, B = self.jacobians(theta, x), self.output_hessian(z, t)
        terms = math.prod(z.shape[:-1])
        return np.einsum("n,n...cp,n...cd,n...dq->pq", w, J, B, J, optimize=True) / terms

    def split(self, v: HostArray) -> list[HostArray]:
        """A vector's parts that belong to the layers, as matrices."""
        ends = np.cumsum([n * m for n, m in self.shapes])
        return [p.reshape(s) for p, s in zip(np.split(v, ends[:-1]), self.shapes, strict=True)]
