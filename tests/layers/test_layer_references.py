"""Layers against their definitions, differentiated automatically."""

from __future__ import annotations

from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from cases import LAYERS, LayerCase, generator
from references.dense import unflatten, vector
from references.networks import apply

from kfac_np import trees
from kfac_np.backend import Backend, to_numpy
from kfac_np.layers import (
    Flatten,
    MultiHeadAttention,
    Recurrent,
    Reshape,
    Residual,
    Sequential,
    Tied,
)
from kfac_np.trees import Tree

# Two programs for the same sums: some hundred roundings of 1.1e-16 each.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def host(tree: Tree) -> Tree:
    return trees.tree_map(to_numpy, tree)


def defined(case: LayerCase, params: Tree, x: Any) -> Any:
    """The layer by its definition."""
    return apply(case.layer, params, x) if case.definition is None else case.definition(params, x)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_outputs_and_derivatives(case: LayerCase, backend: Backend):
    params, x = case.host()
    theta = vector(params)
    split = len(theta)
    moving = np.zeros(0) if case.classes else x  # integers do not
    point = np.concatenate([theta, moving.ravel()])
    seed = generator(f"{case.name} tangents")
    outputs = defined(case, params, x)
    g = seed.standard_normal(outputs.shape)
    direction = seed.standard_normal(point.shape)
    v, dx = direction[:split], direction[split:].reshape(moving.shape)

    def along(point):
        inputs = x if case.classes else point[split:].reshape(x.shape)
        y = defined(case, unflatten(point[:split], params), inputs)
        # The second term is 0, and keeps the derivatives of linear layers on autograd's tape.
        return anp.sum(g * y) + 0.0 * anp.sum(point**2)

    expected = autograd.grad(along)(point)

    device_params, device_x = case.build(backend)
    y, cache = case.layer.forward(device_params, device_x)
    np.testing.assert_allclose(to_numpy(y), outputs, **CLOSE)
    input_derivative, statistics = case.layer.backward(device_params, cache, backend.asarray(g))
    gradient = host(trees.tree_map(lambda s: s.gradient(), statistics))
    np.testing.assert_allclose(vector(gradient), expected[:split], **CLOSE)
    if case.classes:
        assert input_derivative is None
    else:
        np.testing.assert_allclose(to_numpy(input_derivative).ravel(), expected[split:], **CLOSE)

    if not case.has_hessian:
        return
    # Second derivatives: those of the slope of ⟨g, y⟩ along (v, dx).
    bent = autograd.grad(lambda point: anp.sum(autograd.grad(along)(point) * direction))(point)
    tangent = trees.tree_map(backend.asarray, unflatten(v, params))
    device_dx = None if case.classes else backend.asarray(dx)
    ddx, dgradient = case.layer.backward_jvp(
        device_params, cache, backend.asarray(g), device_dx, tangent, None
    )
    np.testing.assert_allclose(vector(host(dgradient)), bent[:split], **CLOSE)
    ddx = np.zeros(moving.shape) if ddx is None else to_numpy(ddx)
    np.testing.assert_allclose(ddx.ravel(), bent[split:], **CLOSE)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_output_shape(case: LayerCase):
    assert case.layer.output_shape(case.shape[1:]) == defined(case, *case.host()).shape[1:]


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_backward_size_counts_what_a_backward_pass_makes(case: LayerCase):
    # The sum over the innermost layers of the sizes of their outputs, flattening apart (a view).
    def count(layer, params, x):
        if isinstance(layer, Residual):
            if layer.shortcut is None:
                return count(layer.inner, params, x)
            return count(layer.inner, params[0], x) + count(layer.shortcut, params[1], x)
        if isinstance(layer, Sequential):
            total = 0
            for part, p in zip(layer.layers, params, strict=True):
                total += count(part, p, x)
                x = apply(part, p, x)
            return total
        if isinstance(layer, Tied):
            total = 0
            for i in layer.order:
                total += count(layer.layers[i], params[i], x)
                x = apply(layer.layers[i], params[i], x)
            return total
        if isinstance(layer, Recurrent):
            z = np.zeros((x.shape[0], x.shape[2] + layer.d_state))
            return x.shape[1] * count(layer.cell, params, z)
        if isinstance(layer, MultiHeadAttention):  # four projections, and how positions see others
            s, d = x.shape[1:]
            return 4 * s * d + layer.heads * s * s
        if isinstance(layer, Flatten | Reshape):
            return 0
        y = defined(case, params, x) if layer is case.layer else apply(layer, params, x)
        return y[0].size

    assert case.layer.backward_size(case.shape[1:]) == count(case.layer, *case.host())
