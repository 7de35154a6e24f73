"""Activations at zero, at their ends, and where doubles end."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import ACTIVATIONS
from numerics import assert_close
from toys import Softsign

from kfac_np.backend import Backend, to_numpy
from kfac_np.errors import CurvatureError, InputError
from kfac_np.layers import (
    GELU,
    Activation,
    Identity,
    LeakyReLU,
    Logistic,
    ReLU,
    SiLU,
    Softplus,
    Tanh,
)

# (φ, φ′, φ″) at 0, in the limits -1e4 and 1e4 all in closed form.
LIMITS = {
    Identity(): {0.0: (0, 1, 0), -1e4: (-1e4, 1, 0), 1e4: (1e4, 1, 0)},
    Tanh(): {0.0: (0, 1, 0), -1e4: (-1, 0, 0), 1e4: (1, 0, 0)},
    Logistic(): {0.0: (0.5, 0.25, 0), -1e4: (0, 0, 0), 1e4: (1, 0, 0)},
    ReLU(): {0.0: (0, 0, 0), -1e4: (0, 0, 0), 1e4: (1e4, 1, 0)},
    LeakyReLU(0.3): {0.0: (0, 0.3, 0), -1e4: (-3e3, 0.3, 0), 1e4: (1e4, 1, 0)},
    Softplus(): {0.0: (math.log(2), 0.5, 0.25), -1e4: (0, 0, 0), 1e4: (1e4, 1, 0)},
    SiLU(): {0.0: (0, 0.5, 0.5), -1e4: (0, 0, 0), 1e4: (1e4, 1, 0)},
    GELU(): {
        0.0: (0, 0.5, math.sqrt(2 / math.pi)),
        -1e4: (0, 0, 0),
        1e4: (1e4, 1, 0),
    },
}


def three(activation: Activation, backend: Backend, x: float) -> tuple[float, ...]:
    a = backend.asarray([x])
    y = activation.value(a)
    return tuple(
        float(to_numpy(v)[0])
        for v in (y, activation.derivative(a, y), activation.second_derivative(a, y))
    )


def test_no_activation_is_forgotten():
    assert {type(a) for a in LIMITS} == {type(a) for a in ACTIVATIONS}


@pytest.mark.parametrize("x", [0.0, -1e4, 1e4])
@pytest.mark.parametrize("activation", LIMITS, ids=repr)
def test_limits(activation: Activation, x: float, backend: Backend):
    assert three(activation, backend, x) == pytest.approx(LIMITS[activation][x], rel=1e-15, abs=0)


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-300, 40.0, -40.0, 800.0, -800.0, 1e300, -1e300])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_never_nan(activation: Activation, x: float, backend: Backend):
    # NumPy's warnings of overflow are errors here, too.
    assert all(map(math.isfinite, three(activation, backend, x)))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_single_precision_in_the_tails(activation: Activation, backend: Backend):
    # Absolute, not relative: a logistic unit of 1e-9 may come out as 0 in single precision.
    xp = backend.xp
    x = backend.asarray(np.linspace(-30.0, 30.0, 601))
    low = xp.astype(x, xp.float32)
    y, z = activation.value(low), activation.value(x)
    for narrow, wide in (
        (y, z),
        (activation.derivative(low, y), activation.derivative(x, z)),
        (activation.second_derivative(low, y), activation.second_derivative(x, z)),
    ):
        assert narrow.dtype == xp.float32
        size = np.maximum(1.0, np.abs(to_numpy(x)))  # x itself is rounded by 6e-8 of it
        assert np.all(np.abs(to_numpy(narrow) - to_numpy(wide)) <= 1e-6 * size)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_nan_is_not_hidden(activation: Activation, backend: Backend):
    assert math.isnan(to_numpy(activation.value(backend.asarray([math.nan])))[0])


def test_a_value_and_a_derivative_are_enough_but_for_the_hessian(backend: Backend):
    x = backend.ones((2, 3))
    y, cache = Softsign().forward((), x)
    ddx, _ = Softsign().backward_jvp((), cache, y, None, (), x)
    assert_close(ddx, Softsign().jvp((), cache, x, ()))
    with pytest.raises(CurvatureError, match=r"^Softsign\(\): expected an activation with second"):
        Softsign().backward_jvp((), cache, y, x, (), None)


@pytest.mark.parametrize("slope", [-0.1, 1.1, math.nan])
def test_leaky_relu_slope(slope: float):
    with pytest.raises(InputError, match=r"LeakyReLU slope: expected a number in \[0, 1\], got"):
        LeakyReLU(slope)
