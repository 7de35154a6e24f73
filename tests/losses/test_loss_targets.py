"""Targets that a loss refuses, each with a message that says what was expected."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kfac_np.backend import Backend, get_backend
from kfac_np.errors import DivergenceError, InputError, TargetError
from kfac_np.losses import PoissonLogRate, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.testing._tools import check_targets

SQUARED, SIGMOID = SquaredError(), SigmoidCrossEntropy()
SOFTMAX, POISSON = SoftmaxCrossEntropy(), PoissonLogRate()
REAL = (SQUARED, SIGMOID, POISSON)
ALL = (*REAL, SOFTMAX)
OUTPUTS = np.zeros((2, 3))


def refused(loss, backend: Backend, t, *, move: bool = True) -> tuple[type, str]:
    """Class and message of the error for targets from the host, or for `t` as it is."""
    z = backend.asarray(OUTPUTS)
    t = backend.asarray(t) if move else t
    with pytest.raises(InputError) as error:
        check_targets(loss, z, t)
    assert "\n" not in str(error.value)
    return type(error.value), str(error.value)


@pytest.mark.parametrize("loss", REAL, ids=repr)
def test_shape(loss, backend: Backend):
    kind, message = refused(loss, backend, np.zeros((2, 2)))
    assert kind is TargetError
    assert message.startswith(f"{type(loss).__name__} targets: expected shape")
    # (2,) or (3,) would have been broadcast against (2, 3) without a word.
    for shape in ((3,), (2, 1), (1, 3), (2, 3, 1), ()):
        assert refused(loss, backend, np.zeros(shape))[0] is TargetError


@pytest.mark.parametrize("loss", REAL, ids=repr)
def test_integers_where_floats_are_needed(loss, backend: Backend):
    _, message = refused(loss, backend, np.zeros((2, 3), dtype=int))
    assert f"{type(loss).__name__} targets: expected an array of floats, got dtype" in message


@pytest.mark.parametrize("loss", ALL, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(loss, bad: float, backend: Backend):
    t = np.full((2, 3), 1 / 3)
    t[1, 2] = bad
    _, message = refused(loss, backend, t)
    assert message == (
        f"{type(loss).__name__} targets: expected finite values, got 1 of 6 that are NaN or Inf"
    )


@pytest.mark.parametrize("loss", ALL, ids=repr)
@pytest.mark.parametrize("t", [None, 3.0, (0, 1), "labels"])
def test_not_an_array(loss, t, backend: Backend):
    _, message = refused(loss, backend, t, move=False)
    name = f"{type(loss).__name__} targets"
    assert message == f"{name}: expected an array, got {type(t).__name__}"


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_other_precision(loss, backend: Backend):
    t = backend.xp.astype(backend.asarray(np.full((2, 3), 1 / 3)), backend.xp.float32)
    _, message = refused(loss, backend, t, move=False)
    assert f"{type(loss).__name__} targets: expected dtype" in message
    assert "as the outputs have, got" in message


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_other_library(loss, backend: Backend):
    other = get_backend("array_api_strict" if backend.name == "numpy" else "numpy", "float64")
    t = other.asarray(np.full((2, 3), 1 / 3))
    _, message = refused(loss, backend, t, move=False)
    assert "targets: expected an array of" in message


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_other_device(loss):
    xp = pytest.importorskip("array_api_strict")
    z = xp.zeros((2, 3), device=xp.Device("device1"))
    with pytest.raises(InputError, match=r"targets: expected device .*device1.* got .*CPU_DEVICE"):
        check_targets(loss, z, xp.ones((2, 3)) / 3)


@pytest.mark.parametrize("bad", [-1e-9, 1.0 + 1e-9, 255.0])
def test_probabilities(bad: float, backend: Backend):
    t = np.full((2, 3), 0.5)
    t[0, 1] = bad
    kind, message = refused(SIGMOID, backend, t)
    assert kind is TargetError
    low, high = min(bad, 0.5), max(bad, 0.5)
    assert message == (
        f"SigmoidCrossEntropy targets: expected values in [0, 1], got [{low:g}, {high:g}]"
    )


def test_ends_of_the_range_are_valid(backend: Backend):
    z = backend.asarray(OUTPUTS)
    check_targets(SIGMOID, z, backend.asarray([[0.0, 1.0, 0.5], [1.0, 0.0, 1.0]]))
    check_targets(POISSON, z, backend.asarray([[0.0, 1e6, 0.5], [0.0, 0.0, 0.0]]))
    check_targets(SOFTMAX, z, backend.asarray([0, 2]))
    check_targets(SOFTMAX, z, backend.asarray([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))


def test_negative_counts(backend: Backend):
    kind, message = refused(POISSON, backend, np.asarray([[0.0, 1.0, 2.0], [3.0, -1.0, 0.0]]))
    assert kind is TargetError
    assert message == "PoissonLogRate targets: expected values >= 0, got -1"


@pytest.mark.parametrize(("classes", "range_"), [([0, 3], "0..3"), ([-1, 2], "-1..2")])
def test_class_numbers_out_of_range(classes, range_: str, backend: Backend):
    # CuPy would wrap them around.
    kind, message = refused(SOFTMAX, backend, classes)
    assert kind is TargetError
    assert message == f"SoftmaxCrossEntropy targets: expected class numbers 0..2, got {range_}"


@pytest.mark.parametrize("bad", [2**64 - 1, 2**63, 3])
def test_class_numbers_without_a_sign(bad: int, backend: Backend):
    """-1 stored unsigned is the largest number of all."""
    kind, message = refused(SOFTMAX, backend, np.asarray([2, bad], dtype=np.uint64))
    assert kind is TargetError
    assert message.startswith("SoftmaxCrossEntropy targets: expected class numbers 0..2, got ")
    check_targets(
        SOFTMAX, backend.asarray(OUTPUTS), backend.asarray(np.asarray([2, 0], dtype=np.uint64))
    )


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 3), ()])
def test_class_numbers_of_the_wrong_shape(shape, backend: Backend):
    kind, message = refused(SOFTMAX, backend, np.zeros(shape, dtype=int))
    assert kind is TargetError
    assert message.startswith("SoftmaxCrossEntropy targets: expected class numbers of shape")


def test_distributions(backend: Backend):
    kind, message = refused(SOFTMAX, backend, [[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]])
    assert kind is TargetError
    assert message == (
        "SoftmaxCrossEntropy targets: expected distributions (>= 0, sum 1); smallest entry 0, "
        "largest deviation of a sum from 1 0.5"
    )
    assert (
        "smallest entry -0.5" in refused(SOFTMAX, backend, [[-0.5, 1.5, 0.0], [1.0, 0.0, 0.0]])[1]
    )
    assert "expected distributions" in refused(SOFTMAX, backend, np.ones((2, 2)))[1]
    assert "expected distributions" in refused(SOFTMAX, backend, np.zeros(2))[1]


def test_booleans_are_not_class_numbers(backend: Backend):
    kind, message = refused(SOFTMAX, backend, np.asarray([True, False]))
    assert kind is TargetError
    assert "SoftmaxCrossEntropy targets: expected integers or floats, got dtype" in message


def test_rates_too_large_to_draw_from(backend: Backend, rng):
    with pytest.raises(DivergenceError, match="PoissonLogRate: expected rates up to"):
        POISSON.sample_targets(rng, backend.asarray([[0.0, 50.0]]))
    with pytest.raises(DivergenceError, match=r"PoissonLogRate: expected rates up to .* nan"):
        POISSON.sample_targets(rng, backend.asarray([[0.0, math.nan]]))
