"""Multipliers of the layers' proposals: what they aim at, and what they leave alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from numerics import numbers
from optimizer_cases import case, flat

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import EKFAC, BlockTridiagonal, Curvature, FullKronecker
from kfac_np.errors import ConfigError
from kfac_np.fisher import Exact, InputOnly
from kfac_np.layers import Dense, Identity, Sequential
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, Balance
from kfac_np.optimizers.quadratic_model import LocalModel
from kfac_np.trees import Tree

C = case("logistic_sigmoid")


def model_and_proposal(backend: Backend) -> tuple[LocalModel, Tree]:
    """A model on a batch, and minus the gradient, each layer's part of which is far off."""
    e = C.objective.evaluate(C.params(backend), *C.batch_on(backend, 1))
    gradient = e.gradient()
    factors = {path: -(10.0**i) for i, (path, _) in enumerate(trees.items(gradient))}
    proposal = trees.map_named(lambda path, v: factors[path] * v, gradient)
    return LocalModel(e, gradient, 0.05), proposal


def rates(model: LocalModel, proposal: Tree) -> dict[str, float]:
    """The best step of each layer, were it alone, from the model itself."""
    found = {}
    for path, _ in trees.items(proposal):
        alone = trees.map_named(lambda p, v, path=path: v if p == path else 0.0 * v, proposal)
        bend, slope = model.forms([alone])
        found[path] = float(-slope[0] / bend[0][0])
    return found


def test_the_first_measurement_makes_all_layers_equal(backend: Backend) -> None:
    """Afterwards each layer on its own would go equally far, and the multipliers have mean 1."""
    model, proposal = model_and_proposal(backend)
    balance = Balance(fisher=Exact(), limit=1e6)
    multipliers = balance.update(None, model, proposal, Rng(0))
    assert np.mean(numbers([*multipliers.values()])) == pytest.approx(1)
    before, after = rates(model, proposal), rates(model, balance.apply(multipliers, proposal))
    assert max(before.values()) > 50 * min(before.values())
    assert list(after.values()) == pytest.approx([after["0"]] * len(after))


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_measurements_are_averaged_geometrically(memory: float, backend: Backend) -> None:
    """log m moves the part 1 - memory of the way to what would make all layers equal."""
    model, proposal = model_and_proposal(backend)
    balance = Balance(fisher=Exact(), limit=1e6, memory=memory)
    old = {path: 1.0 + i for i, (path, _) in enumerate(trees.items(proposal))}
    new = numbers(balance.update(old, model, balance.apply(old, proposal), Rng(0)))
    goal = numbers(balance.update(None, model, proposal, Rng(0)))
    expected = {path: old[path] ** memory * goal[path] ** (1 - memory) for path in old}
    scale = np.mean(list(expected.values()))
    assert new == pytest.approx({path: m / scale for path, m in expected.items()})


def test_a_measurement_changes_multipliers_by_so_much_at_most(backend: Backend) -> None:
    model, proposal = model_and_proposal(backend)
    free, tight = (
        Balance(fisher=Exact(), limit=limit).update(None, model, proposal, Rng(0))
        for limit in (1e6, 1.5)
    )
    assert max(free.values()) / min(free.values()) > 1.5**2
    assert 1 < max(tight.values()) / min(tight.values()) <= 1.5**2 * (1 + 1e-12)


def test_layers_without_a_descent_keep_theirs(backend: Backend) -> None:
    """Nothing is divided by zero where a proposal is zero, leads uphill, or overflows."""
    model, proposal = model_and_proposal(backend)
    old = {path: 1.0 for path, _ in trees.items(proposal)}
    for factor in (0.0, -1.0, math.inf, math.nan):
        spoiled = trees.map_named(lambda p, v, f=factor: f * v if p == "0" else v, proposal)
        with np.errstate(all="ignore"):
            found = Balance(fisher=Exact(), memory=0.0).update(old, model, spoiled, Rng(0))
            others = {p: m for p, m in found.items() if p != "0"}
            assert all(math.isfinite(float(m)) for m in found.values())
            # "0" has the ratio 1: where the other layers are on the whole.
            assert min(others.values()) < found["0"] < max(others.values())
    nothing = trees.zeros_like(proposal)
    assert Balance().update(None, model, nothing, Rng(0)) == old


def steps(kfac: KFAC, backend: Backend, count: int = 8) -> tuple[list[Any], list[Any]]:
    states, reports = [kfac.init(C.params(backend))], []
    for k in range(1, count + 1):
        state, report = kfac.step(states[-1], *C.batch_on(backend, k))
        states.append(state)
        reports.append(report)
    return states, reports


def balanced(**settings: Any) -> Balance:
    return Balance(first=4, interval=2, **settings)


def test_when_it_begins(backend: Backend) -> None:
    """Measured at the end of steps 4, 6, 8; until then nothing is different."""
    states, reports = steps(KFAC(C.objective, balance=balanced()), backend)
    _, plain = steps(KFAC(C.objective), backend)
    assert [s.multipliers is None for s in states] == [True] * 4 + [False] * 5
    assert reports[:4] == plain[:4]
    assert reports[4].alpha != plain[4].alpha
    changed = [a.multipliers != b.multipliers for a, b in itertools.pairwise(states[4:])]
    assert changed == [False, True, False, True]


@pytest.mark.parametrize("curvature", [BlockTridiagonal(), FullKronecker()])
def test_coupled_layers_are_left_alone(curvature: Curvature, backend: Backend) -> None:
    states, _ = steps(KFAC(C.objective, curvature=curvature, balance=balanced()), backend)
    plain, _ = steps(KFAC(C.objective, curvature=curvature), backend)
    assert states[-1].multipliers is None
    assert np.array_equal(flat(states[-1].params), flat(plain[-1].params))


def test_separate_layers_are_balanced(backend: Backend) -> None:
    states, _ = steps(KFAC(C.objective, curvature=EKFAC(), balance=balanced()), backend)
    assert states[-1].multipliers.keys() == {path for path, _ in trees.items(states[-1].params)}


def test_a_single_layer_has_nothing_to_balance(backend: Backend) -> None:
    objective = Objective(Sequential(Dense(3, 2), Identity()), SquaredError())
    x, t = Rng(0).normal((20, 3), backend), Rng(1).normal((20, 2), backend)
    params = objective.network.init(Rng(2), backend)
    one, other = KFAC(objective, balance=Balance(first=1, interval=1)), KFAC(objective)
    state, plain = one.init(params), other.init(params)
    for _ in range(4):
        state, _ = one.step(state, x, t)
        plain, _ = other.step(plain, x, t)
        assert state.multipliers == {"0": 1.0}
    assert np.array_equal(flat(state.params), flat(plain.params))


def test_sampled_measurements_are_those_of_the_seed(backend: Backend) -> None:
    kfac = KFAC(C.objective, balance=balanced())
    (*_, first), _ = steps(kfac, backend)
    (*_, again), _ = steps(kfac, backend)
    (*_, other), _ = steps(dataclasses.replace(kfac, seed=1), backend)
    assert first.multipliers == again.multipliers != other.multipliers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "Balance interval: expected an integer > 0, got 0"),
        ({"first": 2.5}, "Balance first: expected an integer > 0, got 2.5"),
        ({"memory": 1.0}, r"Balance memory: expected a number in \[0, 1\), got 1.0"),
        ({"memory": "x"}, r"Balance memory: expected a number in \[0, 1\), got 'x'"),
        ({"limit": 1.0}, r"Balance limit: expected a number in \(1, 1e6\], got 1.0"),
        ({"limit": 10**400}, r"Balance limit: expected a number in \(1, 1e6\], got 1000"),
        ({"limit": math.nan}, r"Balance limit: expected a number in \(1, 1e6\], got nan"),
        ({"fisher": "exact"}, "Balance fisher: expected MonteCarlo, .* got 'exact'"),
        ({"fisher": InputOnly()}, r"Balance fisher: expected MonteCarlo, .* got InputOnly\(\)"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Balance(**settings)


def test_what_is_no_balance() -> None:
    for wrong in (True, {}):
        with pytest.raises(ConfigError, match=r"KFAC balance: expected a Balance or None"):
            KFAC(C.objective, balance=wrong)  # type: ignore[arg-type]
