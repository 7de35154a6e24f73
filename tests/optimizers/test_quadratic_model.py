"""The local model M(δ), the α and μ that minimise it, the reduction ratio, and invariance."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from dense_net import HostArray
from numerics import numbers
from optimizer_cases import CASES, Case, a_guard, case, flat

from kfac_np import trees
from kfac_np.backend import Backend, DeferredChecks, Rng, get_backend
from kfac_np.curvature import BlockDiagonal, KFACBlock
from kfac_np.errors import ConfigError, DivergenceError
from kfac_np.fisher import Exact, MonteCarlo
from kfac_np.layers import Dense, Sequential, Tanh
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers import (
    KFAC,
    Choice,
    ConstantDamping,
    CoupledGamma,
    GammaPolicy,
    GammaSearch,
    LevenbergMarquardt,
    QuadraticModel,
    Refresh,
    RelativeGammaSearch,
    StepReport,
    StepRule,
    practical,
    published,
)
from kfac_np.optimizers.quadratic_model import LocalModel
from kfac_np.optimizers.step_rules import require_finite_choice
from kfac_np.trees import Tree

NUMPY = get_backend("numpy", "float64")


def refuse_curvature(v: Tree) -> float:
    raise AssertionError("the approximate curvature is not needed")


def choose(k: int, model: LocalModel, proposal: Tree, **settings: Any) -> Choice:
    """The quadratic model's choice, as numbers on the host."""
    found = QuadraticModel(**settings).choose(k, model, proposal, refuse_curvature)
    assert found.decrease is not None
    return Choice(*numbers([found.alpha, found.mu, found.decrease]))


def model_on(c: Case, backend: Backend, damping: float) -> tuple[LocalModel, HostArray, HostArray]:
    """The library's local model at θ₀, and B = F + damping · I and the gradient, dense."""
    x, t, weights = c.batch_on(backend, 1)
    e = c.objective.evaluate(c.params(backend), x, t, weights)
    model = LocalModel(e, e.gradient(), damping)
    F = c.net.fisher(c.host()[0], *c.batch_at(1))
    return model, F + damping * np.eye(len(F)), flat(model.gradient)


def directions(c: Case, count: int) -> list[HostArray]:
    return list(np.random.default_rng(c.seed + 1).standard_normal((count, c.net.num_parameters)))


@pytest.mark.parametrize("c", CASES, ids=str)
def test_model_agrees_with_the_dense_one(c: Case, backend: Backend) -> None:
    model, B, slope = model_on(c, backend, damping=0.37)
    V = directions(c, 3)
    bend, along = model.forms([c.to_tree(backend, v) for v in V])
    assert np.asarray(numbers(bend)) == pytest.approx(np.stack(V) @ B @ np.stack(V).T)
    assert numbers(along) == pytest.approx([slope @ v for v in V])
    for v in V:
        expected = 0.5 * v @ B @ v + slope @ v
        assert float(model.decrease(c.to_tree(backend, v))) == pytest.approx(expected)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_alpha_and_mu_minimise(c: Case, backend: Backend) -> None:
    """M rises whichever of the two is moved, and its value is the reported one."""
    model, B, slope = model_on(c, backend, damping=0.02)
    delta, previous = directions(c, 2)
    trees_ = [c.to_tree(backend, v) for v in (delta, previous)]
    pair = dataclasses.replace(model, previous=trees_[1])
    choice = choose(2, pair, trees_[0])

    def M(alpha: float, mu: float) -> float:
        v = alpha * delta + mu * previous
        return float(0.5 * v @ B @ v + slope @ v)

    least = M(choice.alpha, choice.mu)
    assert choice.decrease == pytest.approx(least)
    assert least < 0
    for shift in (1e-3, -1e-3):
        assert M(choice.alpha + shift, choice.mu) > least
        assert M(choice.alpha, choice.mu + shift) > least
        assert M(choice.alpha + shift, choice.mu - shift) > least

    alone = choose(1, model, trees_[0])
    assert alone.alpha == pytest.approx(-(slope @ delta) / (delta @ B @ delta))
    assert (alone.mu, alone.decrease) == (0, pytest.approx(M(alone.alpha, 0)))
    assert least < M(alone.alpha, 0)


def test_the_best_proposal_is_taken_whole(backend: Backend) -> None:
    """-B⁻¹∇h minimises M over all δ: α = 1, nothing of the previous update, none does better."""
    c = case("tanh_squared")
    model, B, slope = model_on(c, backend, damping=0.02)
    *others, previous = directions(c, 6)
    model = dataclasses.replace(model, previous=c.to_tree(backend, previous))
    best = -np.linalg.solve(B, slope)
    choice = choose(1, model, c.to_tree(backend, best))
    assert choice.alpha == pytest.approx(1)
    assert choice.mu == pytest.approx(0, abs=1e-9)
    assert choice.decrease == pytest.approx(0.5 * slope @ best)
    for v in others:
        other = choose(1, model, c.to_tree(backend, v))
        assert other.decrease > choice.decrease


@pytest.mark.parametrize("factor", [1.0, -3.0, 1e-8, 1e8])
def test_previous_update_parallel_to_the_proposal(factor: float, backend: Backend) -> None:
    """The 2×2 system is singular: μ = 0, and α as if the proposal were alone."""
    c = case("tanh_squared")
    model, B, slope = model_on(c, backend, damping=0.02)
    (delta,) = directions(c, 1)
    proposal = c.to_tree(backend, delta)
    pair = dataclasses.replace(model, previous=c.to_tree(backend, factor * delta))
    choice = choose(2, pair, proposal)
    assert choice.mu == 0
    assert choice.alpha == pytest.approx(-(slope @ delta) / (delta @ B @ delta))


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_nearly_parallel_is_never_worse_than_alone(apart: float, backend: Backend) -> None:
    c = case("tanh_squared")
    model, B, slope = model_on(c, backend, damping=0.02)
    delta, other = directions(c, 2)
    previous = delta + apart * other
    pair = dataclasses.replace(model, previous=c.to_tree(backend, previous))
    choice = choose(2, pair, c.to_tree(backend, delta))
    v = choice.alpha * delta + choice.mu * previous
    alone = -0.5 * (slope @ delta) ** 2 / (delta @ B @ delta)
    assert 0.5 * v @ B @ v + slope @ v <= alone * (1 - 1e-6)


@pytest.mark.parametrize("previous_too", [False, True])
def test_nothing_to_gain(previous_too: bool, backend: Backend) -> None:
    """A zero proposal (the gradient is zero): α = 0, and nothing is divided by zero."""
    c = case("tanh_squared")
    model, _, _ = model_on(c, backend, damping=0.0)
    zero = trees.zeros_like(model.gradient)
    previous = c.to_tree(backend, directions(c, 1)[0]) if previous_too else None
    still = dataclasses.replace(model, gradient=zero, previous=previous)
    choice = choose(2, still, zero)
    assert (choice.alpha, choice.mu, choice.decrease) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, besides the error
def test_a_proposal_that_overflows_promises_nothing(backend: Backend) -> None:
    """So that any other is better; if there is no other, that is told."""
    c = case("tanh_squared")
    model, _, _ = model_on(c, backend, damping=0.02)
    (delta,) = directions(c, 1)
    model = dataclasses.replace(model, previous=c.to_tree(backend, delta))
    huge = c.to_tree(backend, 1e200 * delta)
    choice = choose(7, model, huge)
    assert choice.decrease == math.inf
    found = QuadraticModel().choose(7, model, huge, refuse_curvature)

    def told() -> None:
        checks = DeferredChecks()
        require_finite_choice(found, 7, checks)
        checks.wait()

    with pytest.raises(DivergenceError, match="step 7: the quadratic model is not finite"):
        told()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("thorough", [True, False])
def test_a_search_leaves_out_what_overflows(
    thorough: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case("tanh_squared")
    search = GammaSearch(1, decay=0.5) if thorough else RelativeGammaSearch(1)
    kfac = KFAC(c.objective, damping=LevenbergMarquardt(0.1), gamma=search, l2=1e-5)
    solve, calls = BlockDiagonal.solve, []

    def huge_at_first(self: BlockDiagonal, factors: Any, v: Tree) -> Tree:
        calls.append(1)
        return trees.scale(1e200 if len(calls) == 1 else 1.0, solve(self, factors, v))

    monkeypatch.setattr(BlockDiagonal, "solve", huge_at_first)
    state, report = kfac.step(kfac.init(c.params(backend)), *c.batch_on(backend, 1))
    candidates = search.candidates(1, None, 0.1 + kfac.l2)
    assert report.gamma in candidates[1:]
    assert len(calls) == (3 if thorough else 2)
    assert np.isfinite(flat(state.params)).all()


@pytest.mark.parametrize(
    ("made_for", "changes"),
    [
        ((1, 4, 8, 12), {}),
        ((1, 3, 4, 6, 8, 9, 12), {"refresh": Refresh(3, first=1)}),
        ((1, 3, 4, 6, 8, 9, 12), {"damping": LevenbergMarquardt(0.1, interval=3)}),
        ((1, 2, 3, 4, 8, 12), {"guard": a_guard(settling=12), "damping": ConstantDamping(10.0)}),
        (tuple(range(1, 13)), {"step_rule": QuadraticModel(least_examples=1)}),
    ],
    ids=["interval", "new factors", "ρ is measured", "λ settles", "no interval"],
)
def test_a_choice_holds_until_there_is_a_reason_for_another(
    made_for: tuple[int, ...], changes: dict[str, Any], backend: Backend
) -> None:
    """Between models δ = αΔ + μδ₀ with the last α and μ, and no tangent is formed."""
    c = case("tanh_squared")
    settings: dict[str, Any] = {
        "step_rule": QuadraticModel(least_examples=1, interval=4),
        "damping": ConstantDamping(0.1),
        "gamma": CoupledGamma(),
        "refresh": Refresh(100, first=1),
        "relative": False,
        "guard": None,
    }
    kfac = KFAC(c.objective, **{**settings, **changes})
    state, last = kfac.init(c.params(backend)), None
    for k in range(1, 13):
        before = state
        with pytest.MonkeyPatch.context() as patch:
            if k not in made_for:
                patch.setattr(Evaluation, "jvp", refuse_curvature)
            state, report = kfac.step(before, *c.batch_on(backend, k))
        assert (report.model_decrease is None) == (k not in made_for)
        if k not in made_for:
            assert last is not None
            assert (report.alpha, report.mu) == (last.alpha, last.mu)
            gradient = c.objective.evaluate(before.params, *c.batch_on(backend, k)).gradient()
            delta = trees.scale(-1.0, kfac.curvature.solve(state.factors, gradient))
            expected = trees.combine(report.alpha, delta, report.mu, before.update)
            assert flat(state.update) == pytest.approx(flat(expected))
        last = report


def test_a_choice_does_not_outlive_a_shorter_update_or_one_taken_back() -> None:
    c = case("tanh_squared")
    rule = QuadraticModel(least_examples=1, interval=100)
    guard = a_guard(settling=100)
    kfac = KFAC(c.objective, step_rule=rule, guard=guard, refresh=Refresh(100, first=1))
    state, _ = kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))
    assert state.choice is not None
    high = dataclasses.replace(state, objective=-1e9, error=0.0)  # the last update did harm
    state, report = kfac.step(high, *c.batch_on(NUMPY, 2))
    assert [e.rung for e in report.events] == ["update taken back"]
    _, report = kfac.step(state, *c.batch_on(NUMPY, 3))
    assert report.model_decrease is not None


# --------------------------------------------------------------------------- reduction ratio


def least_squares(seed: int = 0) -> tuple[Objective, Tree, HostArray, HostArray]:
    draws = np.random.default_rng(seed)
    x, t = draws.standard_normal((40, 4)), draws.standard_normal((40, 3))
    return Objective(Dense(4, 3), SquaredError()), draws.standard_normal((3, 5)), x, t


@pytest.mark.parametrize("fisher", [Exact(), MonteCarlo(1)])
def test_model_of_a_quadratic_problem_is_exact(fisher: Any) -> None:
    """One linear layer and squared error: F is the Hessian, so that ρ = 1 at every step."""
    objective, W, x, t = least_squares()
    kfac = KFAC(
        objective,
        fisher=fisher,
        damping=LevenbergMarquardt(1e-13, interval=1, floor=0.0),
        step_rule=QuadraticModel(1.0, least_examples=1),
        gamma=CoupledGamma(),
        statistics_fraction=0.125,
        l2=0.0,
    )
    state = kfac.init(W)
    for _ in range(2):
        state, report = kfac.step(state, x, t)
        assert report.rho == pytest.approx(1, abs=1e-6)
    assert state.damping < 1e-13


@pytest.mark.parametrize("name", ["tanh_squared", "relu_softmax", "softplus_poisson"])
def test_short_steps_are_predicted(name: str) -> None:
    """ρ → 1 as the step becomes short, and the distance from 1 shrinks with its length."""
    c = case(name)
    off = []
    for rate in (1e-3, 1e-4):
        kfac = dataclasses.replace(
            practical(c.objective, rate, kl_clip=None, momentum=0.0),
            damping=LevenbergMarquardt(0.5, interval=1),
        )
        _, report = kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))
        off.append(abs((report.rho or 0) - 1))
    assert off[0] < 0.02
    assert off[1] == pytest.approx(off[0] / 10, rel=0.05)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_ratio_of_a_fixed_rate_step(momentum: float) -> None:
    """ρ of the step really taken, momentum included, by the exact model on the whole batch."""
    c = case("tanh_squared")
    kfac = dataclasses.replace(
        practical(c.objective, 0.3, kl_clip=1e-2, momentum=momentum, guard=None),
        damping=LevenbergMarquardt(0.1, interval=2),
    )
    before, _ = kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))
    after, report = kfac.step(before, *c.batch_on(NUMPY, 2))
    theta, delta = flat(before.params), flat(after.params) - flat(before.params)
    batch = c.batch_at(2)
    B = c.net.fisher(theta, *batch) + (0.1 + 1e-5) * np.eye(len(theta))
    slope = flat(c.objective.evaluate(before.params, *batch[:2]).gradient()) + 1e-5 * theta

    def h(v: HostArray) -> float:
        return float(c.net.value(v, *batch)) + 0.5e-5 * float(v @ v)

    decrease = 0.5 * delta @ B @ delta + slope @ delta
    assert report.model_decrease == pytest.approx(decrease)
    assert report.rho == pytest.approx((h(theta + delta) - h(theta)) / decrease)


# ------------------------------------------------------------------- exactness, in one step


@pytest.mark.parametrize("bias", [True, False])
def test_one_step_solves_least_squares(bias: bool, backend: Backend) -> None:
    """λ = η = 0 and the exact Fisher: K-FAC is exact for one layer, and α = 1."""
    _, W, x, t = least_squares(1)
    kfac = KFAC(
        Objective(Dense(4, 3, bias=bias), SquaredError()),
        fisher=Exact(),
        statistics_fraction=1.0,
        step_rule=QuadraticModel(1.0),
        damping=ConstantDamping(0.0),
        gamma=CoupledGamma(),
        l2=0.0,
    )
    start = kfac.init(backend.asarray(W if bias else W[:, :4]))
    state, report = kfac.step(start, backend.asarray(x), backend.asarray(t))
    inputs = np.concatenate([x, np.ones((40, 1))], axis=1) if bias else x
    solution = np.linalg.lstsq(inputs, t, rcond=None)[0].T
    assert flat(state.params) == pytest.approx(solution.ravel())
    assert report.alpha == pytest.approx(1)
    state, report = kfac.step(state, backend.asarray(x), backend.asarray(t))
    assert flat(state.params) == pytest.approx(solution.ravel())


def test_small_damping_nearly_solves_least_squares() -> None:
    """As published but for λ₀ → 0: Monte-Carlo factors and a quarter of the batch for α, too."""
    objective, W, x, t = least_squares(2)
    kfac = published(objective, damping=LevenbergMarquardt(1e-10), statistics_fraction=1.0, l2=0.0)
    state = kfac.init(W)
    state, _ = kfac.step(state, x, t)
    _, report = kfac.step(state, x, t)
    inputs = np.concatenate([x, np.ones((40, 1))], axis=1)
    best = 0.5 * np.linalg.lstsq(inputs, t, rcond=None)[1].sum() / 40
    first = objective.value(W, x, t)
    assert report.loss - best < 0.3 * (first - best)


def test_a_search_between_refreshes_makes_factors_of_its_own(backend: Backend) -> None:
    """The factors always belong to the γ that is reported, whatever the two intervals are."""
    c = case("tanh_squared")
    kfac = KFAC(
        c.objective,
        damping=LevenbergMarquardt(0.1),
        gamma=GammaSearch(interval=2, decay=0.5),
        refresh=Refresh(5, first=1),
        step_rule=QuadraticModel(least_examples=1),
        relative=False,
        guard=None,
    )
    state, gammas = kfac.init(c.params(backend)), set()
    for k in range(1, 12):
        state, report = kfac.step(state, *c.batch_on(backend, k))
        assert bool(report.refreshed) == (k in (1, 2, 4, 5, 6, 8, 10))
        gammas.add(report.gamma)
        if report.refreshed:
            factors, _ = kfac.curvature.factorise(state.moments, state.gamma**2)
            assert flat(state.factors) == pytest.approx(flat(factors))
    assert len(gammas) > 2


class Counted(BlockDiagonal):
    """Remembers the dampings that it was factorised with."""

    def __init__(self) -> None:
        super().__init__(KFACBlock())
        object.__setattr__(self, "dampings", [])

    def factorise(self, moments: Any, damping: float, previous: Any = None) -> Any:
        self.dampings.append(damping)
        return super().factorise(moments, damping, previous)


@dataclass(frozen=True)
class Search(GammaPolicy):
    """The paper's, that may stop early."""

    thorough: bool
    all = GammaSearch(interval=2, decay=0.5)

    def candidates(self, k: int, current: float | None, damping: float) -> tuple[float, ...]:
        return self.all.candidates(k, current, damping)

    def searches(self, k: int) -> bool:
        return self.all.searches(k)


@pytest.mark.parametrize("name", ["tanh_squared", "relu_softmax"])
@pytest.mark.parametrize("initial", [1e-2, 1e-1, 1.0])
def test_a_search_that_is_not_thorough(name: str, initial: float, backend: Backend) -> None:
    """It takes what a thorough one takes, and tries γ / ω₂ only where ω₂ γ is no better than γ."""
    c = case(name)
    states, gammas, tried = [], [], []
    for thorough in (True, False):
        curvature = Counted()
        kfac = KFAC(
            c.objective,
            curvature=curvature,
            damping=LevenbergMarquardt(initial),
            gamma=Search(thorough),
            step_rule=QuadraticModel(momentum=False),
            refresh=Refresh(2, first=1),
            relative=False,
            guard=None,
        )
        state, mine = kfac.init(c.params(backend)), []
        for k in range(1, 9):
            state, report = kfac.step(state, *c.batch_on(backend, k))
            mine.append(report.gamma)
        states.append(flat(state.params))
        gammas.append(mine)
        tried.append(curvature.dampings)
    assert gammas[0] == gammas[1]
    assert np.array_equal(states[0], states[1])
    assert len(tried[0]) == 1 + 4 * 3
    smaller = sum(new < old for old, new in itertools.pairwise(gammas[1]))
    assert len(tried[1]) == len(tried[0]) - smaller


def test_candidates_that_cannot_be_compared() -> None:
    class Several(GammaPolicy):
        def candidates(self, k: int, current: float | None, damping: float) -> tuple[float, ...]:
            return (1.0, 2.0)

        def searches(self, k: int) -> bool:
            return True

    c = case("tanh_squared")
    kfac = practical(c.objective, gamma=Several())
    with pytest.raises(ConfigError, match="several candidates from Several expected a step rule"):
        kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((), r"KFAC gamma: expected a tuple of candidates in step 1, got \(\)"),
        (None, "KFAC gamma: expected a tuple of candidates in step 1, got None"),
        ((1.0, -1.0), "KFAC gamma: a candidate in step 1: expected a number >= 0, got -1.0"),
        (("a",), "KFAC gamma: a candidate in step 1: expected a number"),
        ((1e300,), "KFAC gamma: a candidate in step 1: .* square is finite, got 1e\\+300"),
    ],
)
def test_candidates_of_a_policy_of_ones_own(found: Any, message: str) -> None:
    class Own(GammaPolicy):
        def candidates(self, k: int, current: float | None, damping: float) -> Any:
            return found

        def searches(self, k: int) -> bool:
            return True

    c = case("tanh_squared")
    kfac = KFAC(c.objective, gamma=Own())
    with pytest.raises(ConfigError, match=message):
        kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))


def test_what_a_rule_of_ones_own_chooses() -> None:
    class Own(StepRule):
        compares = True
        fraction = 1.0

        def choose(self, *args: Any) -> Any:
            return 1.0, 0.0

    c = case("tanh_squared")
    kfac = KFAC(c.objective, step_rule=Own())
    with pytest.raises(ConfigError, match="KFAC step_rule: what it chose in step 1: expected a Ch"):
        kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuadraticModel(bounded="no"), "bounded: expected True or False, got 'no'"),
        (lambda: QuadraticModel(momentum=0.9), "momentum: expected True or False, got 0.9"),
    ],
)
def test_flags_are_flags(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# ------------------------------------------------------------- what the model may promise


def separable(backend: Backend) -> tuple[Objective, Any, Any, Any]:
    """Examples that a linear classifier separates: the loss can come as near to 0 as it likes."""
    x = Rng(1).normal((60, 3), backend)
    t = backend.xp.astype(x[:, 0] > 0.1, backend.xp.int64)
    network = Sequential(Dense(3, 8), Tanh(), Dense(8, 2))
    return Objective(network, SoftmaxCrossEntropy()), network.init(Rng(2), backend), x, t


def run_batches(kfac: KFAC, backend: Backend, steps: int) -> tuple[list[float], list[StepReport]]:
    """Loss on all examples after each step, of minibatches of 20."""
    objective, params, x, t = separable(backend)
    state, losses, reports = kfac.init(params), [], []
    for k in range(steps):
        rows = slice(20 * (k % 3), 20 * (k % 3) + 20)
        state, report = kfac.step(state, x[rows, ...], t[rows])
        losses.append(objective.value(state.params, x, t))
        reports.append(report)
    return losses, reports


def test_no_promise_below_the_lower_bound() -> None:
    backend = get_backend("numpy", "float64")
    objective, *_ = separable(backend)
    start = LevenbergMarquardt(initial=1.0)
    bounded, reports = run_batches(KFAC(objective, damping=start), backend, 300)
    unbounded, wild = run_batches(published(objective, damping=start), backend, 300)
    assert all(-r.model_decrease <= r.objective * (1 + 1e-12) for r in reports)
    assert any(-r.model_decrease > r.objective for r in wild)
    assert max(bounded[100:]) < 0.3
    assert max(unbounded[100:]) > 1.0  # and this is what the bound is for


def test_a_shortened_update_is_what_the_model_says() -> None:
    backend = get_backend("numpy", "float64")
    objective, params, x, t = separable(backend)
    e = objective.evaluate(params, x, t)
    gradient = e.gradient()
    downhill = trees.scale(-1.0, gradient)
    free = LocalModel(e, gradient, 1e-3)
    whole = choose(1, free, downhill)
    room = 0.3 * -whole.decrease
    tight = LocalModel(e, gradient, 1e-3, room)
    short = choose(1, tight, downhill)
    assert 0.0 < short.alpha < whole.alpha
    assert short.decrease == -room
    exact = free.decrease(trees.scale(short.alpha, downhill))
    assert exact == pytest.approx(-room, rel=1e-9)


@pytest.mark.parametrize("size", [0.0, 1e-3, -40.0])
def test_a_given_momentum(size: float, backend: Backend) -> None:
    """α is the best for μ = 1/2; where δ₀ leads uphill, or is 0, there is none."""
    objective, params, x, t = separable(backend)
    e = objective.evaluate(params, x, t)
    downhill = trees.scale(-1.0, e.gradient())
    some = trees.tree_map(lambda p: Rng(3).normal(p.shape, backend), params)
    sign = math.copysign(1.0, float(trees.inner(some, downhill)))
    previous = trees.scale(size * sign, some)
    model = LocalModel(e, e.gradient(), 1e-3, previous=previous, few=True)
    found = choose(1, model, downhill)
    if size <= 0.0:
        alone = choose(1, LocalModel(e, e.gradient(), 1e-3), downhill)
        assert (float(found.mu), float(found.alpha)) == (0.0, pytest.approx(float(alone.alpha)))
        return
    assert float(found.mu) == 0.5

    def promised(alpha: float) -> float:
        return float(model.decrease(trees.combine(alpha, downhill, 0.5, previous)))

    best = float(found.alpha)
    assert float(found.decrease) == pytest.approx(promised(best), rel=1e-9)
    assert promised(best) < min(promised(0.99 * best), promised(1.01 * best))
    room = -0.5 * float(found.decrease)
    short = choose(1, dataclasses.replace(model, bound=backend.asarray(room)), downhill)
    whole = trees.combine(short.alpha, downhill, short.mu, previous)
    assert float(model.decrease(whole)) == pytest.approx(-room, rel=1e-9)


def test_without_momentum(backend: Backend) -> None:
    objective, params, x, t = separable(backend)
    kfac = KFAC(objective, step_rule=QuadraticModel(momentum=False))
    state = kfac.init(params)
    for _ in range(3):
        state, report = kfac.step(state, x, t)
    assert report.mu == 0.0
    model = LocalModel(objective.evaluate(state.params, x, t), state.update, 1.0)
    alone = choose(1, model, state.update)
    pair = dataclasses.replace(model, previous=trees.scale(2.0, params))
    kept = choose(1, pair, state.update, momentum=False)
    assert kept == alone
