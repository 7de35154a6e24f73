"""Chains with data, for the tests of the tridiagonal curvature."""

from __future__ import annotations

import numpy as np
from cases import real_targets

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.layers import Dense, Layer, LeakyReLU, Sequential, Tanh
from kfac_np.losses import (
    Loss,
    SquaredError,
)
from kfac_np.objective import Evaluation, Objective

REGULAR = Sequential(
    Dense(2, 3),
    Tanh(),
    Dense(3, 2, bias=False),
    Sequential(LeakyReLU(0.3), Sequential(Dense(2, 3), Tanh())),
    Dense(3, 2),
)


def regular(backend: Backend, positions: tuple[int, ...] = ()) -> Evaluation:
    """So many examples, and so large weights, that every factor has an inverse."""
    rng = np.random.default_rng(11)
    params = trees.tree_map(
        lambda p: backend.asarray(1.5 * rng.standard_normal(p.shape)), REGULAR.init(Rng(0), backend)
    )
    x, t = (backend.asarray(1.5 * rng.standard_normal((60, *positions, 2))) for _ in range(2))
    return Objective(REGULAR, SquaredError()).evaluate(params, x, t)


def batch(
    backend: Backend, network: Layer, loss: Loss, shape: tuple[int, ...], weighted: bool = False
) -> Evaluation:
    """An evaluation at random parameters, biases too, with targets sampled from the model."""
    rng = np.random.default_rng(7)
    start = network.init(Rng(0), backend)
    params = trees.tree_map(
        lambda p: backend.asarray(rng.standard_normal(p.shape) / np.sqrt(p.shape[-1])), start
    )
    x = backend.asarray(rng.standard_normal(shape))
    z, _ = network.forward(params, x)
    t = loss.sample_targets(Rng(1), z)
    if isinstance(loss, SquaredError):
        t = backend.asarray(real_targets(np.random.default_rng(8), tuple(z.shape)))
    w = backend.asarray(rng.uniform(0.3, 2.0, shape[0])) if weighted else None
    return Objective(network, loss).evaluate(params, x, t, w)
