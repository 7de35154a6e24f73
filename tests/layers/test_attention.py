"""Attention: what positions see, errors, and its place among the curvatures."""

from __future__ import annotations

import numpy as np
import pytest
from cases import generator, networks, to_backend
from numerics import assert_close, host
from references.dense import dense

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import BlockDiagonal, ExactBlock
from kfac_np.errors import InputError, ShapeError
from kfac_np.fisher import Exact
from kfac_np.layers import MultiHeadAttention


def built(backend: Backend, layer: MultiHeadAttention, shape: tuple[int, ...]):
    x = backend.asarray(generator("attention").standard_normal(shape))
    return layer.init(Rng(3), backend), x


def test_parameters_are_four_projections(backend: Backend):
    params, _ = built(backend, MultiHeadAttention(4, 2), (1, 2, 4))
    assert [(path, p.shape) for path, p in trees.items(params)] == [
        (name, (4, 5)) for name in ("query", "key", "value", "output")
    ]
    flat = [host(p)[:, :-1] for p in trees.leaves(params)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(flat) for b in flat[:i])


def test_a_causal_position_does_not_see_later_ones(backend: Backend):
    layer = MultiHeadAttention(4, 2, causal=True)
    params, x = built(backend, layer, (2, 5, 4))
    y = host(layer.forward(params, x)[0])
    moved = host(x).copy()
    moved[:, 3, :] += 1.0
    z = host(layer.forward(params, backend.asarray(moved))[0])
    assert np.array_equal(y[:, :3], z[:, :3])
    assert np.all(np.max(np.abs(y - z)[:, 3:], axis=-1) > 0.0)


def test_permuted_positions_give_permuted_outputs(backend: Backend):
    layer = MultiHeadAttention(4, 2)
    params, x = built(backend, layer, (2, 5, 4))
    order = [3, 0, 4, 1, 2]
    y = host(layer.forward(params, x)[0])
    z = layer.forward(params, backend.asarray(host(x)[:, order]))[0]
    assert_close(z, y[:, order])


def test_large_scores_do_not_overflow(backend: Backend):
    layer = MultiHeadAttention(2, 1)
    params, x = built(backend, layer, (1, 3, 2))
    y, cache = layer.forward(params, 1e6 * x)
    dx, _ = layer.backward(params, cache, backend.ones((1, 3, 2)))
    assert np.all(np.isfinite(host(y)))
    assert np.all(np.isfinite(host(dx)))


@pytest.mark.parametrize("name", ["attention_averaged", "attention_positions"])
def test_every_projection_has_its_exact_block(backend: Backend, name: str):
    """Peers fail on attention's projections, or leave them out without a word."""
    (case,) = networks(name=name)
    e = case.build(backend).evaluate()
    exact = BlockDiagonal(ExactBlock())
    moments = exact.estimate(e, Exact(), Rng(0))
    projections = [path for path in moments if path.split(".")[-1] in {"query", "output"}]
    assert len(projections) == 2
    start, fisher = 0, dense(case).fisher
    for path, p in trees.items(e.params):
        rows = slice(start, start + int(np.prod(p.shape)))
        assert_close(moments[path]["block"], fisher[rows, rows])
        start = rows.stop


@pytest.mark.parametrize("sizes", [(4, 3), (3, 6), (0, 1), (4, 0), (4.0, 2), (4, True)])
def test_heads_divide_the_model(sizes):
    integers = r"MultiHeadAttention (heads|d_model): expected an integer > 0"
    with pytest.raises(InputError, match=rf"{integers}|MultiHeadAttention: expected heads to"):
        MultiHeadAttention(*sizes)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4), (0, 4)])
def test_inputs_of_another_shape(shape, backend: Backend):
    layer = MultiHeadAttention(4, 2)
    params, _ = built(backend, layer, (1, 2, 4))
    with pytest.raises(ShapeError, match=r"MultiHeadAttention\(4, 2\): expected inputs"):
        layer.forward(params, backend.zeros((1, *shape)))


def test_parameters_of_another_layer(backend: Backend):
    layer = MultiHeadAttention(4, 2)
    params, x = built(backend, layer, (1, 2, 4))
    other = {**params, "key": to_backend(backend, np.zeros((4, 4)))}
    for wrong in (other, {"query": params["query"]}, (), params["query"]):
        with pytest.raises(ShapeError, match=r"\): expected parameters query, key, value, output"):
            layer.forward(wrong, x)


def test_representation():
    layer = MultiHeadAttention(4, 2, bias=False, causal=True)
    assert repr(layer) == "MultiHeadAttention(4, 2, bias=False, causal=True)"
    assert eval(repr(layer)) == layer
