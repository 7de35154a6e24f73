"""One rule for random numbers: a stream goes on, whatever it is given to; a child starts anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numerics import flat

from kfac_np import products
from kfac_np.backend import Array, Backend, Rng, get_backend, to_numpy
from kfac_np.curvature import EKFAC, BlockDiagonal, BlockTridiagonal, quality
from kfac_np.errors import InputError
from kfac_np.fisher import MonteCarlo
from kfac_np.layers import (
    Conv,
    Dense,
    Dropout,
    Embedding,
    Layer,
    MultiHeadAttention,
    Recurrent,
    Residual,
    Sequential,
    Tanh,
    Tied,
)
from kfac_np.losses import SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.trees import Tree

WITH_PARAMETERS: list[Layer] = [
    Dense(3, 2),
    Conv(2, 2, (3,)),
    Conv(2, 2, (3,), groups=2),
    Embedding(4, 2),
    MultiHeadAttention(4, 2),
    Recurrent(Dense(3, 1), 1),
    Residual(Dense(3, 3)),
    Residual(Dense(3, 2), shortcut=Dense(3, 2)),
    Sequential(Dense(3, 2), Sequential(Dense(2, 2))),
    Tied((Dense(3, 3), Tanh()), order=(0, 1, 0)),
]
WITH_MASKS: list[Layer] = [
    Dropout(0.5),
    Residual(Dropout(0.5)),
    Sequential(Tanh(), Dropout(0.5)),
    Tied((Tanh(), Dropout(0.5)), order=(0, 1)),
]
NETWORK = Sequential(Dense(3, 6), Tanh(), Dropout(0.5), Dense(6, 2))


def problem(backend: Backend) -> tuple[Objective, Tree, Array, Array]:
    x, t = Rng(1).normal((40, 3), backend), Rng(2).normal((40, 2), backend)
    return Objective(NETWORK, SquaredError()), NETWORK.init(0, backend), x, t


def evaluation(backend: Backend) -> Evaluation:
    return problem(backend)[0].evaluate(*problem(backend)[1:])


def moments(curvature: Any) -> Callable[[Rng, Backend], Tree]:
    def draw(rng: Rng, backend: Backend) -> Tree:
        found = curvature.estimate(evaluation(backend), MonteCarlo(1), rng)
        return {path: m["G"] for path, m in found.items()}

    return draw


def sample(rng: Rng, backend: Backend) -> Tree:
    e, curvature = evaluation(backend), BlockDiagonal()
    return curvature.matrix(curvature.estimate(e, MonteCarlo(1), Rng(5)), e.params).sample(rng, 1.0)


def product(rng: Rng, backend: Backend) -> Tree:
    e = evaluation(backend)
    return products.fisher_product(e, e.params, MonteCarlo(1), rng)


def forms(rng: Rng, backend: Backend) -> Tree:
    e = evaluation(backend)
    found = products.block_forms(e, e.params, MonteCarlo(1), rng)
    return tuple(backend.asarray([float(number)]) for number in found.values())


def agreement(rng: Rng, backend: Backend) -> Tree:
    found = quality(evaluation(backend), BlockDiagonal(), draws=1, rng=rng)
    return backend.asarray([layer.cosine for layer in found.layers])


def value(rng: Rng, backend: Backend) -> Tree:
    objective, *batch = problem(backend)
    return backend.asarray([objective.value(*batch, rng=rng)])


def outputs(rng: Rng, backend: Backend) -> Tree:
    objective, *batch = problem(backend)
    return objective.evaluate(*batch, rng=rng).outputs


def masked(layer: Layer) -> Callable[[Rng, Backend], Tree]:
    params = layer.init(0, get_backend())
    return lambda rng, backend: layer.forward(params, backend.ones((30, 3)), rng)[0]


DRAWS: dict[str, Callable[[Rng, Backend], Tree]] = {
    **{f"init of {layer!r}": layer.init for layer in WITH_PARAMETERS},
    **{f"masks of {layer!r}": masked(layer) for layer in WITH_MASKS},
    **{f"{c!r}": moments(c) for c in (BlockDiagonal(), EKFAC(), BlockTridiagonal(split=True))},
    "normal": lambda rng, backend: rng.normal((9,), backend),
    "sample": sample,
    "targets": lambda rng, backend: SquaredError().sample_targets(rng, backend.ones((9, 2))),
    "fisher_product": product,
    "block_forms": forms,
    "quality": agreement,
    "evaluate": outputs,
    "value": value,
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_stream_goes_on_and_a_child_starts_anew(name: str, backend: Backend):
    draw, rng = DRAWS[name], Rng(7)
    first, second, third = (flat(draw(rng, backend)) for _ in range(3))
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    for stream in (Rng(7), rng.child()):
        np.testing.assert_array_equal(flat(draw(stream, backend)), first)
    again = [flat(draw(rng.child("again"), backend)) for _ in range(2)]
    np.testing.assert_array_equal(*again)


@pytest.mark.parametrize("layer", WITH_PARAMETERS, ids=repr)
def test_a_seed_is_a_stream(layer: Layer):
    backend = get_backend()
    np.testing.assert_array_equal(
        flat(layer.init(np.int64(3), backend)), flat(layer.init(Rng(3), backend))
    )
    with pytest.raises(InputError, match="rng: expected an Rng or a seed, got 'three'"):
        layer.init("three", backend)


def test_what_an_evaluation_drew_stays(backend: Backend):
    """It is forwarded again with the masks it had, as often as it is asked for."""
    objective, *batch = problem(backend)
    rng = Rng(7)
    first, second = (objective.evaluate(*batch, rng=rng) for _ in range(2))
    for e in (first, second):
        same = objective.evaluate(*batch, rng=e.rng.child())
        np.testing.assert_array_equal(to_numpy(same.outputs), to_numpy(e.outputs))
    assert first.value != second.value


def test_spawned_streams_are_all_different():
    rng, host = Rng(7), get_backend("numpy", "float64")
    streams = [rng.spawn().child(i) for i in (0, 1, 1)] + [rng.child("spawn", 0), rng.child(2)]
    numbers = {float(stream.normal((), host)) for stream in streams}
    assert len(numbers) == len(streams)
