"""Dense gradients, Jacobians and curvature matrices of the network cases.

Parameters are one vector: all arrays in order, each flattened row-major. Everything is a mean
over the M loss terms, each multiplied by its example's weight.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import autograd
import numpy as np
from cases import NetworkCase

from references.losses import term
from references.networks import apply

HostArray = np.ndarray[Any, Any]


def vector(tree: Any) -> HostArray:
    """A tree of tuples and dicts of host arrays as one vector."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple):
        return np.concatenate([np.zeros(0), *(vector(branch) for branch in tree)])
    return np.ravel(tree)


def unflatten(theta: Any, like: Any) -> Any:
    """The inverse of `vector`, also for the boxes that autograd follows."""
    if isinstance(like, dict):
        return dict(zip(like, unflatten(theta, tuple(like.values())), strict=True))
    if not isinstance(like, tuple):
        return theta.reshape(like.shape)
    branches, start = [], 0
    for branch in like:
        size = len(vector(branch))
        branches.append(unflatten(theta[start : start + size], branch))
        start += size
    return tuple(branches)


@dataclass(frozen=True, eq=False)
class Dense:
    """All that there is to know about a network case, by automatic differentiation.

    Attributes
    ----------
    case : NetworkCase
    value : float
    outputs : array, shape (M, C)
    weights : array, shape (M,)
    gradient : array, shape (P,)
    jacobians : array, shape (M, C, P)
    output_gradients : array, shape (M, C)
    output_hessians : array, shape (M, C, C)
    hessian : array, shape (P, P)
    """

    case: NetworkCase
    value: float
    outputs: HostArray
    weights: HostArray
    gradient: HostArray
    jacobians: HostArray
    output_gradients: HostArray
    output_hessians: HostArray
    hessian: HostArray

    @property
    def terms(self) -> int:
        """M."""
        return len(self.outputs)

    @property
    def fisher(self) -> HostArray:
        """(1/M) Σ w J^T (∂²ℓ/∂z²) J: the exact Fisher, which is the GGN."""
        return self.curvature(self.output_hessians)

    @property
    def empirical(self) -> HostArray:
        """(1/M) Σ w J^T (∂ℓ/∂z) (∂ℓ/∂z)^T J."""
        g = self.output_gradients
        return self.curvature(g[:, :, None] * g[:, None, :])

    def output_gradients_at(self, targets: HostArray) -> HostArray:
        """∂ℓ/∂z of each term at other targets, shape (M, C)."""
        rows = term_targets(self.case, targets)
        gradient = autograd.grad(functools.partial(term, self.case.loss))
        return np.stack([gradient(*row) for row in zip(self.outputs, rows, strict=True)])

    def curvature(self, inner: HostArray) -> HostArray:
        """(1/M) Σ w J^T B J for matrices B (M, C, C) of the terms."""
        j = self.jacobians
        return np.einsum("m,mcp,mcd,mdq->pq", self.weights, j, inner, j, optimize=True) / self.terms


def term_targets(case: NetworkCase, t: HostArray) -> HostArray:
    """Targets with the terms on the first axis: (M,) class numbers or (M, C)."""
    return t.reshape(case.terms, *t.shape[len(case.output_shape) - 1 :])


@functools.cache
def dense(case: NetworkCase) -> Dense:
    """The references of a case, computed once."""
    params, x, t, weights = case.host()
    theta = vector(params)
    c = case.output_shape[-1]
    targets = term_targets(case, t)
    w = np.ones(case.shape[0]) if weights is None else weights
    w = np.repeat(w, case.terms // case.shape[0])

    def outputs(theta: Any) -> Any:
        return apply(case.network, unflatten(theta, params), x).reshape(case.terms, c)

    def objective(theta: Any) -> Any:
        z = outputs(theta)
        values = [w[m] * term(case.loss, z[m], targets[m]) for m in range(case.terms)]
        return sum(values) / case.terms

    z = outputs(theta)
    rows = [(z[m], targets[m]) for m in range(case.terms)]
    loss = functools.partial(term, case.loss)
    return Dense(
        case=case,
        value=float(objective(theta)),
        outputs=z,
        weights=w,
        gradient=autograd.grad(objective)(theta),
        jacobians=autograd.jacobian(outputs)(theta),
        output_gradients=np.stack([autograd.grad(loss)(*row) for row in rows]),
        output_hessians=np.stack([autograd.hessian(loss)(*row) for row in rows]),
        hessian=autograd.hessian(objective)(theta),
    )
