"""The loop: steps with a clock that stands still between them."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kfac_np.backend import get_backend, to_numpy
from kfac_np.data import BatchState, ConstantBatch, GrowingBatch, MiniBatches
from kfac_np.optimizers import SGD
from kfac_np.training.loop import Supply, start, train
from kfac_np.training.models import mlp


@pytest.mark.parametrize("name", ["numpy", "torch", "array_api_strict"])
def test_supply_takes_the_minibatches_of_the_seed(name: str) -> None:
    pytest.importorskip(name)
    backend = get_backend(name)
    x = np.arange(20.0).reshape(10, 2)
    supply = Supply(backend.asarray(x), backend.asarray(np.arange(10)), GrowingBatch(3, 9), seed=4)
    state, inputs, targets = supply.next(BatchState(), 1)
    expected_state, indices = MiniBatches(10, 4).next(BatchState(), 3)
    assert state == expected_state
    assert to_numpy(inputs).tolist() == x[indices].tolist()
    assert to_numpy(targets).tolist() == indices.tolist()
    assert supply.next(state, 9)[1].shape == (10, 2)


def test_inputs_that_are_their_own_targets_are_taken_once() -> None:
    x = np.zeros((4, 2))
    _, inputs, targets = Supply(x, x, ConstantBatch(2)).next(BatchState(), 1)
    assert inputs is targets


def test_the_clock_stands_still_while_the_caller_works() -> None:
    sgd = SGD(mlp((2, 2)))
    supply = Supply(np.zeros((4, 2), np.float32), np.zeros(4, np.int64), ConstantBatch(4))
    steps = train(sgd, supply, start(sgd, get_backend()))
    for _ in range(3):
        step = next(steps)
        time.sleep(0.1)
    assert 0.0 < step.position.seconds < 0.1
    assert step.record()["step"] == step.position.step == 3
    assert list(step.record())[:3] == ["step", "seconds", "batch_size"]
