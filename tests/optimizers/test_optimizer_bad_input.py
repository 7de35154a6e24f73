"""Bad input and trouble on the way: a clear error before anything changes, or a stated outcome."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import pytest
from optimizer_cases import case

from kfac_np import trees
from kfac_np.backend import Array, Backend, get_backend, to_numpy
from kfac_np.curvature import BlockDiagonal, KFACBlock
from kfac_np.errors import (
    ConfigError,
    CurvatureError,
    InputError,
    KfacError,
    ShapeError,
    TargetError,
)
from kfac_np.objective import Objective
from kfac_np.optimizers import (
    KFAC,
    SGD,
    Adam,
    Optimizer,
    practical,
)
from kfac_np.trees import Tree

NUMPY = get_backend("numpy", "float64")
OPTIMIZERS: dict[str, Callable[[Objective], Optimizer]] = {
    "kfac": KFAC,
    "practical": practical,
    "sgd": SGD,
    "adam": Adam,
}
SQUARED = case("tanh_squared")  # 64 examples of 3 inputs, 2 outputs


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Callable[[Objective], Optimizer]:
    """Each kind of optimiser in turn."""
    return OPTIMIZERS[request.param]


def after_two_steps(optimizer: Optimizer, backend: Backend) -> Any:
    state = optimizer.init(SQUARED.params(backend))
    for k in (1, 2):
        state, _ = optimizer.step(state, *SQUARED.batch_on(backend, k))
    return state


def spoiled(values: Any, value: float) -> Any:
    out = np.array(values)
    out.flat[-1] = value
    return out


def batch() -> tuple[Any, Any]:
    return SQUARED.batch_at(3)[:2]


BATCHES: dict[str, tuple[Callable[[Any, Any], tuple[Any, ...]], type[KfacError], str]] = {
    "nan in x": (lambda x, t: (spoiled(x, math.nan), t), InputError, "x: .*1 of 192 .* NaN or Inf"),
    "inf in x": (lambda x, t: (spoiled(x, math.inf), t), InputError, "x: .*finite"),
    "nan in t": (lambda x, t: (x, spoiled(t, math.nan)), InputError, "targets: .*finite"),
    "inf in t": (lambda x, t: (x, spoiled(t, -math.inf)), InputError, "targets: .*finite"),
    "too few inputs": (lambda x, t: (x[:, :2], t), ShapeError, r"Dense\(3, 4\): .*\(N, 2\)"),
    "x with one axis": (lambda x, t: (x[:, 0], t), ShapeError, "x: expected shape"),
    "no examples": (lambda x, t: (x[:0], t[:0]), ShapeError, "x: expected at least one example"),
    "too few targets": (lambda x, t: (x, t[:5]), TargetError, "targets: .*64, 2.*5, 2"),
    "too many outputs": (lambda x, t: (x, t[:, :1]), TargetError, "64, 2.*64, 1"),
    "integer x": (lambda x, t: (x.astype(int), t), InputError, "x: expected an array of floats"),
    "integer t": (lambda x, t: (x, t.astype(int)), InputError, "targets: .*floats"),
    "single x": (lambda x, t: (x.astype("f4"), t), InputError, "x: expected dtype .*64"),
    "single t": (lambda x, t: (x, t.astype("f4")), InputError, "targets: expected dtype .*64"),
    "wrong weights": (lambda x, t: (x, t, np.ones(3)), ShapeError, "weights: .*64.*3"),
    "negative weight": (
        lambda x, t: (x, t, spoiled(np.ones(64), -1.0)),
        InputError,
        "weights: expected values >= 0",
    ),
    "nan weight": (
        lambda x, t: (x, t, spoiled(np.ones(64), math.nan)),
        InputError,
        "weights: expected finite",
    ),
    "no weight": (lambda x, t: (x, t, np.zeros(64)), InputError, "weights: .*not all 0"),
    "integer weights": (lambda x, t: (x, t, np.ones(64, int)), InputError, "weights: .*floats"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_bad_batch(kind: str, make: Callable[[Objective], Optimizer], backend: Backend) -> None:
    """A clear error; the state is what it was, and the next good batch is taken."""
    spoil, error, message = BATCHES[kind]
    optimizer = make(SQUARED.objective)
    state = after_two_steps(optimizer, backend)
    before = [to_numpy(p).copy() for p in trees.leaves(state.params)]

    def move(values: Any) -> Array:
        kinds = {"float32": backend.xp.float32, "float64": backend.xp.float64}
        return backend.asarray(values, dtype=kinds.get(str(values.dtype)))

    with pytest.raises(error, match=message) as caught:
        optimizer.step(state, *map(move, spoil(*batch())))[0].wait()
    assert "\n" not in str(caught.value)
    for p, old in zip(trees.leaves(state.params), before, strict=True):
        assert (to_numpy(p) == old).all()
    after, _ = optimizer.step(state, *SQUARED.batch_on(backend, 3))
    assert after.step == 3


def test_lists_are_no_arrays(make: Callable[[Objective], Optimizer]) -> None:
    optimizer = make(SQUARED.objective)
    state = optimizer.init(SQUARED.params(NUMPY))
    x, t = batch()
    with pytest.raises(InputError, match="x: expected an array, got list"):
        optimizer.step(state, x.tolist(), t)
    with pytest.raises(InputError, match="targets: expected an array, got list"):
        optimizer.step(state, x, t.tolist())


def test_arrays_are_never_moved(make: Callable[[Objective], Optimizer]) -> None:
    optimizer = make(SQUARED.objective)
    strict = get_backend("array_api_strict", "float64", array_api_strict.Device("device1"))
    elsewhere = get_backend("array_api_strict", "float64")
    state = optimizer.init(SQUARED.params(strict))
    x, t = batch()
    with pytest.raises(InputError, match=r"x: expected device .*device1"):
        optimizer.step(state, elsewhere.asarray(x), strict.asarray(t))
    with pytest.raises(InputError, match=r"targets: expected device .*device1"):
        optimizer.step(state, strict.asarray(x), elsewhere.asarray(t))
    with pytest.raises(InputError, match="x: expected an array of array_api_strict"):
        optimizer.step(state, x, t)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ((), "at least one array"),
        ((np.ones((4, 4)), (), np.full((2, 5), math.nan)), "parameter .*: expected finite values"),
        ((np.ones((4, 4)), (), np.ones((2, 5), int)), "parameter 2: expected an array of floats"),
        ((np.ones((4, 4)), (), np.ones((2, 5), "f4")), "parameter 2: expected dtype float64"),
        ((np.ones((4, 4)), (), 1.0), "parameter 2: expected an array, got float"),
    ],
)
def test_bad_parameters(params: Tree, message: str, make: Callable[[Objective], Optimizer]) -> None:
    with pytest.raises(InputError, match=message):
        make(SQUARED.objective).init(params)


def test_parameters_of_another_network(make: Callable[[Objective], Optimizer]) -> None:
    optimizer = make(SQUARED.objective)
    state = optimizer.init((np.ones((4, 4)), (), np.ones((2, 7))))
    with pytest.raises(
        ShapeError, match=r"Dense\(4, 2\): expected parameters \(2, 5\), got \(2, 7"
    ):
        optimizer.step(state, *batch())


def test_curvature_that_names_no_layer() -> None:
    kfac = KFAC(SQUARED.objective, curvature=BlockDiagonal(overrides={"7": KFACBlock()}))
    with pytest.raises(CurvatureError, match="overrides: expected paths among 0, 2; got 7"):
        kfac.step(kfac.init(SQUARED.params(NUMPY)), *batch())


@pytest.mark.parametrize(
    "name", ["curvature", "fisher", "step_rule", "damping", "gamma", "refresh"]
)
def test_a_part_of_the_wrong_kind(name: str) -> None:
    """A part is checked where it is given, not where a step first uses it."""
    objective = case("tanh_squared").objective
    with pytest.raises(ConfigError, match=f"KFAC {name}: expected an? .*, got 0.5"):
        KFAC(objective, **{name: 0.5})


@pytest.mark.parametrize("optimizer", [KFAC, SGD, Adam])
def test_a_network_where_an_objective_belongs(optimizer: type) -> None:
    """The commonest slip of all."""
    network = case("tanh_squared").objective.network
    with pytest.raises(ConfigError, match="objective: expected an Objective, got Sequential"):
        optimizer(network)


def test_a_state_of_another_optimizer() -> None:
    """Said before anything happens."""
    c = case("tanh_squared")
    state = SGD(c.objective).init((np.ones((4, 4)), (), np.ones((2, 5))))
    with pytest.raises(InputError, match=r"state: expected a KFACState, .* got SGDState"):
        KFAC(c.objective).step(state, *c.batch_at(1)[:2])
