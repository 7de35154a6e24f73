"""What every optimiser keeps: purity, exact resumption, the same path on every backend, scale."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import AVAILABLE, MAKERS
from dense_net import HostArray
from optimizer_cases import Case, a_guard, case, flat

from kfac_np import trees
from kfac_np.backend import Array, Backend, get_backend, to_numpy
from kfac_np.curvature import EKFAC, BlockDiagonal, DiagonalBlock, FullMatrix, KFACBlock
from kfac_np.fisher import Empirical, Exact, InputOnly, MonteCarlo
from kfac_np.objective import Objective
from kfac_np.optimizers import (
    KFAC,
    SGD,
    Adam,
    Balance,
    ConstantDamping,
    Exponential,
    GammaSearch,
    IterateAverage,
    LevenbergMarquardt,
    Optimizer,
    QuadraticModel,
    Refresh,
    State,
    StepReport,
    practical,
    published,
)

NUMPY = get_backend("numpy", "float64")
Make = Callable[[Objective], Optimizer]
# Schedules short enough for each to fire several times in a few steps.
QUICK: dict[str, Any] = {
    "damping": LevenbergMarquardt(0.3, interval=3),
    "gamma": GammaSearch(interval=7),
    "refresh": Refresh(7, first=2),
}

OPTIMIZERS: dict[str, Make] = {
    "kfac": lambda o: KFAC(o, **QUICK),
    "kfac_defaults": KFAC,
    "kfac_balanced": lambda o: KFAC(
        o, balance=Balance(interval=2, first=2, fisher=Exact()), **QUICK
    ),
    "kfac_exact_fisher": lambda o: KFAC(o, fisher=Exact(), **QUICK),
    "kfac_empirical_full_matrix": lambda o: KFAC(
        o, fisher=Empirical(), curvature=FullMatrix(), averaging=None, **QUICK
    ),
    "kfac_exact_damping": lambda o: KFAC(
        o, curvature=BlockDiagonal(KFACBlock(exact_damping=True)), **QUICK
    ),
    "kfac_eigenbasis": lambda o: KFAC(o, curvature=EKFAC(basis_interval=4), **QUICK),
    "kfac_mixed_blocks": lambda o: KFAC(
        o, curvature=BlockDiagonal(overrides={"2": DiagonalBlock()}), **QUICK
    ),
    "kfac_input_only": lambda o: KFAC(o, fisher=InputOnly(), **QUICK),
    "kfac_in_trouble": lambda o: KFAC(
        o,
        damping=LevenbergMarquardt(1e-9, floor=0.0),
        step_rule=QuadraticModel(fraction=0.01, least_examples=1),
        guard=a_guard(settling=3),
    ),
    "practical": lambda o: practical(o, Exponential(0.1, decay=0.9), kl_clip=1e-3),
    "practical_adaptive": lambda o: dataclasses.replace(
        practical(o, 0.3), damping=LevenbergMarquardt(1.0)
    ),
    "sgd": lambda o: SGD(o, rate=0.05, averaging=IterateAverage()),
    "heavy_ball": lambda o: SGD(o, rate=0.05, nesterov=False, l2=1e-3),
    "adam": lambda o: Adam(o, rate=0.01, averaging=IterateAverage(0.9, power=0.0)),
}
CASE = case("relu_softmax")


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Make:
    """Each kind of optimiser in turn."""
    return OPTIMIZERS[request.param]


def arrays(state: State) -> list[Array]:
    """All arrays of a state, in order."""
    return [leaf for leaf in trees.leaves(dataclasses.asdict(state)) if hasattr(leaf, "shape")]


def bits(optimizer: Optimizer, state: State) -> list[tuple[str, Any]]:
    """Everything in a state: arrays as bytes."""
    return [
        (path, to_numpy(leaf).tobytes() if hasattr(leaf, "shape") else leaf)
        for path, leaf in trees.items(optimizer.state_to_tree(state))
    ]


def run(
    optimizer: Optimizer, c: Case, backend: Backend, steps: int
) -> tuple[list[State], list[StepReport]]:
    """States (the initial one first) and reports."""
    states, reports = [optimizer.init(c.params(backend))], []
    for k in range(1, steps + 1):
        state, report = optimizer.step(states[-1], *c.batch_on(backend, k))
        states.append(state)
        reports.append(report)
    return states, reports


def test_a_step_is_a_function(make: Make, backend: Backend) -> None:
    """Twice the same step from the same state: the same bits, and the old state as it was."""
    optimizer = make(CASE.objective)
    state = optimizer.init(CASE.params(backend))
    for k in range(1, 9):
        batch = CASE.batch_on(backend, k)
        before = bits(optimizer, state)
        first, report = optimizer.step(state, *batch)
        assert bits(optimizer, state) == before
        second, again = optimizer.step(state, *batch)
        assert bits(optimizer, first) == bits(optimizer, second)
        assert report == again
        state = first


def test_nothing_is_written_to(make: Make) -> None:
    """All arrays of the state and the batch may be read-only."""
    optimizer = make(CASE.objective)
    state = optimizer.init(CASE.params(NUMPY))
    for k in range(1, 9):
        batch = CASE.batch_on(NUMPY, k)
        for a in (*trees.leaves(optimizer.state_to_tree(state)), *batch):
            if isinstance(a, np.ndarray):
                a.flags.writeable = False
        state, _ = optimizer.step(state, *batch)


def test_resumes_bit_for_bit_at_every_step(make: Make, backend: Backend) -> None:
    """Also in the middle of an interval between two refreshes, measurements or searches."""
    optimizer = make(CASE.objective)
    states, reports = run(optimizer, CASE, backend, 15)

    def through_the_host(leaf: Any) -> Any:
        # The order of the axes in memory is kept, as npz files keep it: products round by it.
        return backend.asarray(np.copy(to_numpy(leaf))) if hasattr(leaf, "shape") else leaf

    for k, state in enumerate(states[:-1], start=1):
        tree = trees.tree_map(through_the_host, optimizer.state_to_tree(state))
        restored = make(CASE.objective).state_from_tree(copy.deepcopy(tree) if k % 2 else tree)
        resumed, report = optimizer.step(restored, *CASE.batch_on(backend, k))
        assert bits(optimizer, resumed) == bits(optimizer, states[k])
        assert report == reports[k - 1]


def test_trouble_is_met_on_the_way() -> None:
    """The laws above are about steps that take an update back, too, and about those after them."""
    reports = run(OPTIMIZERS["kfac_in_trouble"](CASE.objective), CASE, NUMPY, 15)[1]
    rungs = [event.rung for report in reports[:14] for event in report.events]
    assert {"update rejected", "update taken back"} <= set(rungs)


def test_state_as_tree_is_plain(make: Make) -> None:
    """Nested dicts and tuples of arrays, None, bool, int, float, str: what a checkpoint takes."""
    optimizer = make(CASE.objective)
    for state in run(optimizer, CASE, NUMPY, 3)[0]:
        tree = optimizer.state_to_tree(state)
        assert tree["step"] == state.step
        for leaf in trees.leaves(tree):
            assert leaf is None or isinstance(
                leaf, np.ndarray | np.bool_ | bool | int | float | str
            )


def test_report_is_plain(make: Make, backend: Backend) -> None:
    optimizer = make(CASE.objective)
    for report in run(optimizer, CASE, backend, 8)[1]:
        values = report.as_dict()
        assert json.loads(json.dumps(values)) == values
        assert list(values) == list(StepReport.FIELDS)


@functools.cache
def numpy_path(name: str) -> tuple[list[HostArray], list[StepReport]]:
    states, reports = run(OPTIMIZERS[name](CASE.objective), CASE, NUMPY, 16)
    return [flat(s.params) for s in states], reports


@pytest.mark.parametrize("other", [name for name in AVAILABLE if name != "numpy"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_path_on_every_backend(name: str, other: str) -> None:
    """The same seeds, 16 steps, past two refreshes: equal but for rounding."""
    states, reports = run(OPTIMIZERS[name](CASE.objective), CASE, MAKERS[other](), 16)
    expected, expected_reports = numpy_path(name)
    for state, theta in zip(states, expected, strict=True):
        assert flat(state.params) == pytest.approx(theta, rel=1e-7, abs=1e-8)
    for report, r in zip(reports, expected_reports, strict=True):
        assert report.loss == pytest.approx(r.loss)
        if r.damping is not None:
            found = (report.damping, report.gamma)
            assert found == pytest.approx((r.damping, r.gamma), rel=1e-12)
        assert report.refreshed == r.refreshed
        assert report.events == r.events


def test_single_precision_stays_single(make: Make, backend: Backend) -> None:
    """No array becomes double behind the user's back, and none leaves its device."""
    single, c = dataclasses.replace(backend, dtype=backend.xp.float32), CASE
    optimizer = make(c.objective)
    states, reports = run(optimizer, c, single, 8)
    for state in states:
        for a in arrays(state):
            number = a.shape == ()  # λ and such, in double precision
            assert number or Backend.of(a) == single
    if isinstance(optimizer, KFAC) and isinstance(optimizer.fisher, MonteCarlo):
        assert reports[-1].loss < reports[0].loss  # draws in single precision are other draws
    else:
        double = run(optimizer, c, NUMPY, 8)[1]
        assert [r.loss for r in reports] == pytest.approx([r.loss for r in double], rel=1e-3)


# ------------------------------------------------------------------------------------- scale

WHOLE: dict[str, Any] = {
    "fisher": Exact(),
    "statistics_fraction": 1.0,
    "step_rule": QuadraticModel(1.0, least_examples=1),  # how many examples there are matters
}
SCALED = ["tanh_squared", "relu_softmax", "softplus_poisson", "positions_squared"]


def path_of(
    optimizer: Optimizer, c: Case, batch: Callable[[int], tuple[Any, Any, Any]], steps: int = 25
) -> list[HostArray]:
    state, path = optimizer.init(c.params(NUMPY)), []
    for k in range(1, steps + 1):
        state, _ = optimizer.step(state, *batch(k))
        path.append(flat(state.params))
    return path


def assert_same_path(one: list[HostArray], other: list[HostArray]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", SCALED)
def test_duplicated_batch_changes_nothing(name: str) -> None:
    """Losses, gradients and curvatures are means."""
    c = case(name)

    def twice(k: int) -> tuple[Any, Any, Any]:
        x, t, _ = c.batch_at(k)
        return np.concatenate([x, x]), np.concatenate([t, t]), None

    for optimizer in (KFAC(c.objective, **QUICK, **WHOLE), Adam(c.objective), SGD(c.objective)):
        assert_same_path(
            path_of(optimizer, c, twice), path_of(optimizer, c, lambda k: c.batch_on(NUMPY, k))
        )


@pytest.mark.parametrize("name", SCALED)
def test_order_of_examples_changes_nothing(name: str) -> None:
    c = case(name)

    def backwards(k: int) -> tuple[Any, Any, Any]:
        x, t, _ = c.batch_at(k)
        return x[::-1], t[::-1], None

    kfac = KFAC(c.objective, **QUICK, **WHOLE)
    assert_same_path(path_of(kfac, c, backwards), path_of(kfac, c, lambda k: c.batch_on(NUMPY, k)))


@pytest.mark.parametrize("name", SCALED)
def test_equal_weights_scale_the_objective(name: str) -> None:
    """Weights c everywhere multiply the loss by c; with λ and η times c the path is the same."""
    c, factor = case(name), 2.5

    def weighted(k: int) -> tuple[Any, Any, Any]:
        x, t, _ = c.batch_at(k)
        return x, t, np.full(len(x), factor)

    def plain(k: int) -> tuple[Any, Any, Any]:
        return c.batch_on(NUMPY, k)

    def kfac(s: float) -> KFAC:
        return published(
            c.objective,
            damping=LevenbergMarquardt(0.3 * s, interval=3),
            refresh=QUICK["refresh"],
            gamma=QUICK["gamma"],
            l2=1e-3 * s,
            **WHOLE,
        )

    assert_same_path(path_of(kfac(factor), c, weighted), path_of(kfac(1.0), c, plain))
    assert_same_path(
        path_of(SGD(c.objective, rate=0.01), c, weighted),
        path_of(SGD(c.objective, rate=0.01 * factor), c, plain),
    )
    state, report = kfac(factor).step(kfac(factor).init(c.params(NUMPY)), *weighted(1))
    _, report_plain = kfac(1.0).step(kfac(1.0).init(c.params(NUMPY)), *plain(1))
    assert report.loss == pytest.approx(factor * report_plain.loss)
    assert report.objective == pytest.approx(factor * report_plain.objective)
    assert report.gradient_norm == pytest.approx(factor * (report_plain.gradient_norm or 0))
    assert state.step == 1


@pytest.mark.parametrize("name", SCALED)
def test_a_weight_counts_how_often_an_example_is_there(name: str) -> None:
    """Up to M: the mean is over N terms with weights, over Σ w terms with repetitions."""
    c = case(name)
    weights = np.random.default_rng(5).integers(0, 3, c.batch).astype(float)
    weights[0] = 2.0
    factor = float(weights.mean())

    def weighted(k: int) -> tuple[Any, Any, Any]:
        x, t, _ = c.batch_at(k)
        return x, t, weights

    def repeated(k: int) -> tuple[Any, Any, Any]:
        x, t, _ = c.batch_at(k)
        times = weights.astype(int)
        return np.repeat(x, times, axis=0), np.repeat(t, times, axis=0), None

    def kfac(s: float) -> KFAC:
        return published(
            c.objective, damping=LevenbergMarquardt(0.3 * s, interval=3), l2=1e-3 * s, **WHOLE
        )

    assert_same_path(path_of(kfac(factor), c, weighted), path_of(kfac(1.0), c, repeated))
    assert_same_path(
        path_of(SGD(c.objective, rate=0.01), c, weighted),
        path_of(SGD(c.objective, rate=0.01 * factor), c, repeated),
    )


def test_constant_damping_hands_nothing_on() -> None:
    """A schedule is a function of the step: λ carried in the state does not matter."""
    kfac = KFAC(CASE.objective, damping=ConstantDamping(Exponential(1.0, decay=0.5)))
    _, reports = run(kfac, CASE, NUMPY, 4)
    assert [r.damping for r in reports] == [1.0, 0.5, 0.25, 0.125]


def test_seed_chooses_the_sampled_targets_only() -> None:
    ends = [
        flat(run(KFAC(CASE.objective, seed=s), CASE, NUMPY, 3)[0][-1].params) for s in (0, 0, 1)
    ]
    assert (ends[0] == ends[1]).all()
    assert not (ends[0] == ends[2]).all()
    exact = [
        flat(run(KFAC(CASE.objective, seed=s, fisher=Exact()), CASE, NUMPY, 3)[0][-1].params)
        for s in (0, 1)
    ]
    assert (exact[0] == exact[1]).all()
