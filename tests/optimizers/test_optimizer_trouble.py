"""Degenerate batches are trained on; what overflows is rejected or an error, and said."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pytest
from optimizer_cases import case, flat

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, get_backend, to_numpy
from kfac_np.curvature import BlockDiagonal
from kfac_np.errors import (
    DivergenceError,
    FactorizationError,
    InputError,
)
from kfac_np.fisher import Exact, FisherType
from kfac_np.layers import Dense, ReLU, Sequential, Tanh
from kfac_np.losses import PoissonLogRate, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers import (
    KFAC,
    SGD,
    Adam,
    Choice,
    ConstantDamping,
    CoupledGamma,
    FixedRate,
    GammaSearch,
    Guard,
    LevenbergMarquardt,
    Optimizer,
    QuadraticModel,
    Refresh,
    StepRule,
    practical,
    published,
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


def batch() -> tuple[Any, Any]:
    return SQUARED.batch_at(3)[:2]


NETWORK = Sequential(Dense(3, 4), ReLU(), Dense(4, 2))
DAMPED: dict[str, Callable[[Objective], Optimizer]] = {
    "published": lambda o: published(o, damping=LevenbergMarquardt(1.0, floor=0.0)),
    "tiny": lambda o: KFAC(o, damping=LevenbergMarquardt(1e-12)),
    "undamped": lambda o: KFAC(
        o, damping=ConstantDamping(0.0), gamma=CoupledGamma(), l2=0.0, fisher=Exact()
    ),
    "practical": lambda o: practical(o, 0.05),
    "practical_undamped": lambda o: practical(o, 0.05, damping=0.0, l2=0.0),
    "sgd": lambda o: SGD(o, rate=0.02),
    "adam": Adam,
}


def degenerate_params(kind: str) -> list[Any]:
    draws = np.random.default_rng(1)
    first, last = draws.standard_normal((4, 4)), draws.standard_normal((2, 5))
    if kind == "dead units":
        first[:2, -1] = -50.0
    if kind == "all units dead":
        first[:, -1] = -50.0
    if kind == "zero parameters":
        first, last = 0 * first, 0 * last
    return [first, last]


def degenerate_batch(kind: str) -> tuple[Any, Any]:
    draws = np.random.default_rng(2)
    x, t = draws.standard_normal((24, 3)), draws.standard_normal((24, 2))
    if kind == "one example":
        x, t = x[:1], t[:1]
    if kind == "feature without variance":
        x[:, 1] = 3.0
    if kind == "feature always zero":
        x[:, 1] = 0.0
    if kind == "equal features":
        x[:, 1] = x[:, 0]
    if kind == "all inputs zero":
        x[:] = 0.0
    if kind == "equal examples":
        x[:], t[:] = x[0], t[0]
    return x, t


DEGENERATE = [
    "one example",
    "feature without variance",
    "feature always zero",
    "equal features",
    "all inputs zero",
    "equal examples",
    "dead units",
    "all units dead",
    "zero parameters",
]


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("name", DAMPED)
def test_degenerate_batches_are_trained_on(name: str, kind: str, backend: Backend) -> None:
    """Singular factors and zero gradients: finite parameters, and the loss does not rise.

    Without any damping there is no step, and an error says what to do.
    """
    optimizer = DAMPED[name](Objective(NETWORK, SquaredError()))
    first, last = map(backend.asarray, degenerate_params(kind))
    x, t = map(backend.asarray, degenerate_batch(kind))
    state = optimizer.init((first, (), last))
    losses = []
    if "undamped" in name:
        with pytest.raises(FactorizationError, match=r"^layer \d: .* singular; give a damping > 0"):
            optimizer.step(state, x, t)
        return
    for _ in range(10):
        state, report = optimizer.step(state, x, t)
        losses.append(report.loss)
        assert np.isfinite(flat(state.params)).all()
    if name != "tiny":  # it may overshoot: damping is for that
        assert losses[-1] <= losses[0]


@pytest.mark.parametrize("name", [name for name in DAMPED if "undamped" not in name])
def test_at_the_optimum_nothing_moves(name: str, backend: Backend) -> None:
    """Zero gradient: α stays finite, nothing is measured, and λ is not changed by 0/0."""
    optimizer = DAMPED[name](Objective(Dense(3, 2), SquaredError()))
    x, t = backend.asarray(np.ones((8, 3))), backend.zeros((8, 2))
    state = optimizer.init(backend.zeros((2, 4)))
    for k in range(1, 23):
        state, report = optimizer.step(state, x, t)
        assert (report.loss, report.update_norm) == (0, 0)
        assert not flat(state.params).any()
        if report.alpha is not None:
            assert math.isfinite(report.alpha)
        assert report.rho is None
        if name == "published":
            assert state.damping == 1.0
        assert state.step == k


def test_singular_factors_with_hardly_any_damping_are_reported(backend: Backend) -> None:
    """A feature twice, λ → 0: the failure ladder is walked, and says so."""
    kfac = DAMPED["tiny"](Objective(NETWORK, SquaredError()))
    kfac = dataclasses.replace(kfac, damping=ConstantDamping(1e-40), l2=0.0)
    x, t = map(backend.asarray, degenerate_batch("equal features"))
    first, last = map(backend.asarray, degenerate_params(""))
    _, report = kfac.step(kfac.init((first, (), last)), x, t)
    assert ("0", "A", "more damping") in [(e.layer, e.factor, e.rung) for e in report.events]
    assert report.as_dict()["events"][0].startswith("0.A: more damping (damping ")


# --------------------------------------------------------------------------------- divergence

overflows = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's own, besides the error


@overflows
@pytest.mark.parametrize("loss", [PoissonLogRate(), SquaredError()])
def test_overflowing_loss(
    loss: Any, make: Callable[[Objective], Optimizer], backend: Backend
) -> None:
    """DivergenceError before anything changes; the state goes on with another batch.

    The last update is not to blame, and no guard takes it back.
    """
    optimizer = make(Objective(Dense(2, 1), loss))
    state = optimizer.init(backend.ones((1, 3)))
    x, t = backend.ones((16, 2)), backend.ones((16, 1))
    state, _ = optimizer.step(state, x, t)
    message = r"step 2: the loss is inf .*parameters are unchanged"
    for _ in range(2):
        with pytest.raises(DivergenceError, match=message):
            optimizer.step(state, 1e200 * x, t)[0].wait()
    state, report = optimizer.step(state, x, t)
    assert report.step == state.step == 2
    assert np.isfinite(flat(state.params)).all()


@overflows
@pytest.mark.parametrize(
    "make_wild",
    [
        lambda o: SGD(o, rate=1e308),
        lambda o: Adam(o, rate=1e308),
        lambda o: practical(o, 1e308, kl_clip=None, guard=None),
    ],
)
def test_overflowing_update(make_wild: Callable[[Objective], Optimizer], backend: Backend) -> None:
    optimizer = make_wild(Objective(Dense(2, 1), SquaredError()))
    state = optimizer.init(backend.ones((1, 3)))
    x, t = backend.ones((16, 2)), 100 * backend.ones((16, 1))
    with pytest.raises(DivergenceError, match=r"step 1: the update's norm is .*are unchanged"):
        optimizer.step(state, x, t)[0].wait()
    assert (flat(state.params) == 1).all()


def test_a_gradient_whose_square_overflows(
    make: Callable[[Objective], Optimizer], backend: Backend
) -> None:
    """In single precision; it is finite, and so are its norm and the step."""
    narrow = dataclasses.replace(backend, dtype=backend.xp.float32)
    optimizer = make(Objective(Dense(2, 1), SquaredError()))
    state = optimizer.init(narrow.zeros((1, 3)))
    x, t = 1e10 * narrow.ones((16, 2)), 1e10 * narrow.ones((16, 1))
    state, report = optimizer.step(state, x, t)
    state.wait()
    assert report.gradient_norm == pytest.approx(2**0.5 * 1e20, rel=1e-6)
    assert np.isfinite(flat(state.params)).all()


@overflows
def test_a_rule_that_never_chooses_a_number(backend: Backend) -> None:
    """No λ helps: after twenty updates taken back in a row it is an error, and names the update."""

    @final
    class Own(StepRule):
        compares = False
        fraction = 1.0

        def choose(self, *args: Any) -> Choice:
            return Choice(math.nan, 0.0, None)

    kfac = KFAC(SQUARED.objective, step_rule=Own(), gamma=CoupledGamma())
    state = kfac.init(SQUARED.params(backend))
    for k in range(1, 21):
        state, _ = kfac.step(state, *SQUARED.batch_on(backend, k))
    with pytest.raises(DivergenceError, match="step 21: the update's norm is nan"):
        kfac.step(state, *SQUARED.batch_on(backend, 21))[0].wait()


@overflows
def test_a_guard_copes_with_an_absurd_rate(backend: Backend) -> None:
    """λ, a given one too, grows until the updates are of use; then it comes down again."""
    objective = Objective(Dense(2, 1), SquaredError())
    kfac = practical(objective, 1e6, momentum=0.0, kl_clip=None)
    state = kfac.init(backend.ones((1, 3)))
    x, t = backend.ones((16, 2)), 100 * backend.ones((16, 1))
    states, reports = [state], []
    for _ in range(20):
        state, report = kfac.step(states[-1], x, t)
        states.append(state)
        reports.append(report)
    kept = [r for r in reports if "update taken back" not in [e.rung for e in r.events]]
    losses = [report.objective for report in kept]
    assert [e.rung for e in reports[0].events] == ["update rejected"]
    assert (flat(states[1].params) == 1).all()
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    dampings = [report.damping for report in reports]
    assert dampings[:4] == pytest.approx([0.01 * 4.0 ** (n * (n + 1) / 2) for n in range(4)])


@final
@dataclass(frozen=True)
class SpoiledVectors(FisherType):
    """Exact vectors, but Inf among them in some steps."""

    steps: tuple[int, ...]

    def vectors(self, e: Evaluation, rng: Rng) -> Iterator[Array]:
        for v in Exact().vectors(e, rng):
            yield v * math.inf if rng.keys[-1] in self.steps else v


@overflows
def test_moments_that_are_not_finite_are_rejected(backend: Backend) -> None:
    """Named in the report; the old moments stay, and training goes on."""
    kfac = KFAC(
        SQUARED.objective,
        fisher=SpoiledVectors((3, 4)),
        damping=LevenbergMarquardt(1.0),
        refresh=Refresh(1),
    )
    states, reports = [kfac.init(SQUARED.params(backend))], []
    for k in range(1, 7):
        state, report = kfac.step(states[-1], *SQUARED.batch_on(backend, k))
        states.append(state)
        reports.append(report)
    for k in (3, 4):
        assert [str(e) for e in reports[k - 1].events] == [
            "0.A, G: moments rejected (damping 0)",
            "2.A, G: moments rejected (damping 0)",
        ]
        for new, old in zip(
            trees.leaves(states[k].moments), trees.leaves(states[k - 1].moments), strict=True
        ):
            assert to_numpy(new) == pytest.approx(to_numpy(old), rel=1e-14)
    assert [r.events for r in reports if r.step not in (3, 4)] == [()] * 4
    assert reports[-1].loss < reports[0].loss


@overflows
def test_first_moments_that_are_not_finite(backend: Backend) -> None:
    """There is nothing to fall back on: an error that names the layer, and no state."""
    kfac = KFAC(SQUARED.objective, fisher=SpoiledVectors((1,)))
    with pytest.raises(DivergenceError, match="step 1: layer 0: the moments A, G are not finite"):
        kfac.step(kfac.init(SQUARED.params(backend)), *SQUARED.batch_on(backend, 1))


@overflows
def test_proposals_that_are_not_finite(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates for γ whose proposal overflows are passed over; if all do, that is an error."""
    kfac = published(SQUARED.objective, gamma=GammaSearch(interval=1, decay=0.5))
    state = kfac.init(SQUARED.params(backend))
    solve = BlockDiagonal.solve
    calls: list[float] = []

    def solve_at_last(self: BlockDiagonal, factors: Any, v: Tree) -> Tree:
        calls.append(1.0)
        return trees.scale(1.0 if len(calls) % 3 == 0 else math.inf, solve(self, factors, v))

    monkeypatch.setattr(BlockDiagonal, "solve", solve_at_last)
    after, report = kfac.step(state, *SQUARED.batch_on(backend, 1))
    assert len(calls) == 3
    assert report.gamma == kfac.gamma.candidates(1, None, 150 + 1e-5)[2]
    assert np.isfinite(flat(after.params)).all()

    monkeypatch.setattr(BlockDiagonal, "solve", lambda self, factors, v: trees.scale(math.inf, v))
    with pytest.raises(DivergenceError, match="step 1: no proposal is finite for gamma in"):
        kfac.step(state, *SQUARED.batch_on(backend, 1))


@overflows
@pytest.mark.parametrize("guard", [Guard(), None])
@pytest.mark.parametrize("average", [True, False])
def test_update_to_where_the_objective_is_not_finite_is_rejected(
    average: bool, guard: Guard | None, backend: Backend
) -> None:
    """exp overflows at θ + δ: θ stays, the momentum is dropped, λ rises until a step succeeds."""
    kfac = KFAC(
        Objective(Dense(1, 1), PoissonLogRate()),
        fisher=Exact(),
        step_rule=FixedRate(1.0, 0.9),
        gamma=CoupledGamma(),
        damping=LevenbergMarquardt(1e-3, decay=0.01, interval=1, floor=0.0),
        guard=guard,
        refresh=Refresh(1),
        l2=0.0,
        **({} if average else {"averaging": None}),
    )
    x, t = backend.ones((4, 1)), 1e6 * backend.ones((4, 1))
    state = kfac.init(backend.zeros((1, 2)))
    rejected = 0
    for _ in range(8):
        before = state
        state, report = kfac.step(state, x, t)
        if not report.events:
            break
        rejected += 1
        damping = float(before.damping or 1e-3)
        assert [str(e) for e in report.events] == [
            f"all.update: update rejected (damping {damping:g})"
        ]
        assert (flat(state.params) == flat(before.params)).all()
        assert report.update_norm == 0
        assert not flat(state.update).any()
        factor = 100.0 if guard is None else 4.0**rejected
        assert float(state.damping) == pytest.approx(factor * damping)
        assert (state.average is None) != average
    assert 1 <= rejected < 8
    assert flat(state.params).all()


def test_examples_without_weight_in_the_statistics() -> None:
    """All weight beyond the part that the curvature looks at: said, not divided by."""
    x, t = batch()
    w = np.ones(64)
    w[:8] = 0.0  # ⌈64/8⌉ examples make the statistics, ⌈64/4⌉ the model
    kfac = published(SQUARED.objective)
    state = kfac.init(SQUARED.params(NUMPY))
    with pytest.raises(InputError, match=r"weights: expected .* first 8 of 64 examples"):
        kfac.step(state, x, t, w)
    w[0] = 1.0
    kfac.step(state, x, t, w)
    rule = QuadraticModel(1 / 64, least_examples=1)
    narrow = KFAC(SQUARED.objective, step_rule=rule, statistics_fraction=1.0)
    w[0] = 0.0
    with pytest.raises(InputError, match=r"weights: expected .* first 1 of 64 examples"):
        narrow.step(state, x, t, w)
    after, _ = practical(SQUARED.objective).step(state, x, t, w)
    assert np.isfinite(flat(after.params)).all()


@pytest.mark.parametrize("loss", [SigmoidCrossEntropy(), SoftmaxCrossEntropy()])
def test_saturated_outputs(loss: Any, backend: Backend) -> None:
    """Logits of ±1e4: no curvature is left, and the step is still finite."""
    network = Sequential(Dense(2, 3), Tanh(), Dense(3, 2))
    draws = np.random.default_rng(0)
    x = backend.asarray(draws.standard_normal((16, 2)))
    t = backend.asarray(
        draws.integers(0, 2, 16) if isinstance(loss, SoftmaxCrossEntropy) else np.ones((16, 2))
    )
    params = (
        backend.asarray(draws.standard_normal((3, 3))),
        (),
        backend.asarray(1e4 * draws.standard_normal((2, 4))),
    )
    for optimizer in (
        KFAC(Objective(network, loss), damping=LevenbergMarquardt(1.0)),
        dataclasses.replace(practical(Objective(network, loss)), fisher=Exact()),
    ):
        state = optimizer.init(params)
        for _ in range(8):
            state, report = optimizer.step(state, x, t)
            assert math.isfinite(report.loss)
            assert np.isfinite(flat(state.params)).all()
