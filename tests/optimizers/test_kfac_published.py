"""The K-FAC optimiser against algorithm 2 written out densely, step by step.

Rounding is amplified: α and μ come from ratios of small numbers, and the dynamics are sensitive.
45 steps multiply it by up to a million in the runs chosen here, and `TOLERANCE` leaves room for
another library's rounding; a wrong constant shows in the second digit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from dense_defaults import Defaults, own_units
from dense_net import Net
from dense_reference import (
    ExactlyDamped,
    KroneckerFactored,
    Published,
    Record,
    Whole,
    growing_batch_size,
)
from optimizer_cases import Case, a_guard, case, flat

from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.curvature import BlockDiagonal, Curvature, FullMatrix, KFACBlock
from kfac_np.data import GrowingBatch
from kfac_np.fisher import Exact, MonteCarlo
from kfac_np.optimizers import (
    KFAC,
    Balance,
    GammaSearch,
    Guard,
    IterateAverage,
    LevenbergMarquardt,
    QuadraticModel,
    StepReport,
    published,
)

STEPS = 45
TOLERANCE = 1e-6
CURVATURES: dict[type[KroneckerFactored], Curvature] = {
    KroneckerFactored: BlockDiagonal(KFACBlock()),
    ExactlyDamped: BlockDiagonal(KFACBlock(exact_damping=True)),
    Whole: FullMatrix(),
}


def as_published(initial: float) -> LevenbergMarquardt:
    """λ with another start than 150."""
    return LevenbergMarquardt(initial, decay=19 / 20, floor=0.0)


@dataclass(frozen=True)
class Run:
    """A case, where λ starts, and how the Fisher matrix is approximated."""

    case: Case
    lambda0: float | None
    approximation: type[KroneckerFactored] = KroneckerFactored
    bounded: bool = False
    balanced_from: int | None = None
    model_examples: int = 256
    guard: tuple[float, int] = (4.0, 50)

    def __str__(self) -> str:
        kind = "" if self.approximation is KroneckerFactored else f"-{self.approximation.__name__}"
        kind += "-bounded" if self.bounded else ""
        kind += f"-balanced from {self.balanced_from}" if self.balanced_from else ""
        kind += f"-{self.model_examples} examples" if self.model_examples != 256 else ""
        kind += f"-guard {self.guard}" if self.guard != (4.0, 50) else ""
        return f"{self.case}-{self.lambda0 or 'defaults'}{kind}"

    @functools.cache  # noqa: B019 - the table lives as long as the tests
    def reference(self) -> list[Record]:
        """All steps of the dense reference."""
        c = self.case
        start = c.net, c.host()[0], c.sampler
        dense: Published
        if self.lambda0 is None:
            dense = Defaults(*start, self.model_examples, self.balanced_from, self.guard)
        else:
            dense = Published(*start, self.lambda0, self.approximation)
        if self.bounded:
            dense.bounds, dense.power = (math.sqrt(1e-5), 1.0), 0.0
            dense.promises_bounded = True
        return [dense.step(*c.batch_at(k)) for k in range(1, STEPS + 1)]

    def optimizer(self) -> KFAC:
        """Everything but λ₀ and the targets as published; or without λ₀ the defaults."""
        changes: dict[str, Any] = {"fisher": self.case.fisher}
        if self.lambda0 is None:
            if self.balanced_from is not None:
                changes["balance"] = Balance(first=self.balanced_from, fisher=Exact())
            rule = QuadraticModel(least_examples=self.model_examples)
            if rule != QuadraticModel():
                changes["step_rule"] = rule
            if self.guard != (4.0, 50):
                errors, settling = self.guard
                changes["guard"] = a_guard(errors=errors, settling=settling)
            return KFAC(self.case.objective, **changes)
        if self.lambda0 != 150:
            changes["damping"] = as_published(self.lambda0)
        if self.approximation is not KroneckerFactored:
            changes["curvature"] = CURVATURES[self.approximation]
        if self.bounded:  # what the paper's companion code has, and a bound on promises
            changes["gamma"] = GammaSearch(minimum=math.sqrt(1e-5), maximum=1.0)
            changes["averaging"] = IterateAverage(power=0.0)
            changes["step_rule"] = QuadraticModel(least_examples=1)
        return published(self.case.objective, **changes)


RUNS = [
    Run(case("tanh_squared"), 150),
    Run(case("tanh_squared"), 0.1),
    Run(case("logistic_sigmoid"), 0.01),
    Run(case("relu_softmax"), 150),
    Run(case("relu_softmax"), 1),
    Run(case("softplus_poisson"), 0.01),
    Run(case("no_bias_softmax"), 1),
    Run(case("weighted_sigmoid"), 1),
    Run(case("positions_squared"), 0.01),
    Run(case("linear_squared"), 0.01),
    Run(case("growing_softmax"), 150),
    Run(case("growing_softmax"), 1),
    Run(case("logistic_sigmoid"), 1, ExactlyDamped),
    Run(case("weighted_sigmoid"), 1, Whole),
    Run(case("relu_softmax"), 150, bounded=True),
    Run(case("growing_softmax"), 0.3, bounded=True),
    Run(case("linear_squared"), 1e-5, bounded=True),
]
INCOMMENSURATE = Case("incommensurate", Net((3, 4, 2), "relu", "squared"), spread=(1.0, 0.1, 1e3))
BATCHES = Case("batches", Net((3, 3, 2), "tanh", "sigmoid"), weighted=True, batch=16)
LARGE = Case("large_inputs_3", Net((3, 4, 2), "relu", "squared"), spread=(9.0, 9.0, 9.0))
OUTLIER = Case("relu_softmax_outlier", Net((3, 5, 3), "relu", "softmax"), batch=16, outlier=12)
DEFAULTS = [
    *(Run(case(name), None) for name in ("tanh_squared", "weighted_sigmoid", "no_bias_softmax")),
    Run(case("growing_softmax"), None, model_examples=128),
    Run(INCOMMENSURATE, None),
    Run(LARGE, None),
    Run(OUTLIER, None),
    Run(BATCHES, None, model_examples=7, guard=(0.5, 2)),
    Run(case("weighted_sigmoid"), None, model_examples=7),
    Run(case("positions_squared"), None, balanced_from=5),
    Run(case("weighted_sigmoid"), None, balanced_from=20),
]


def assert_same_step(report: StepReport, state: Any, expected: Record) -> None:
    """Everything that a step did and hands on, against the reference."""
    close = functools.partial(pytest.approx, rel=TOLERANCE, abs=TOLERANCE)
    assert flat(state.params) == close(expected.theta)
    assert flat(state.average) == close(expected.average)
    assert report.loss == close(expected.loss)
    assert report.objective == close(expected.objective)
    assert report.damping == pytest.approx(expected.damping, rel=1e-11)
    assert float(state.damping) == pytest.approx(expected.next_damping, rel=1e-11)
    assert report.gamma == state.gamma == pytest.approx(expected.gamma, rel=1e-11)
    for name in ("alpha", "mu", "model_decrease"):
        found, wanted = getattr(report, name), getattr(expected, name)
        assert found == (wanted if wanted is None else close(wanted)), name
    assert (report.rho is None) == (expected.rho is None)
    if expected.rho is not None:
        assert report.rho == pytest.approx(expected.rho, rel=1e-3, abs=1e-3)
    assert bool(report.refreshed) == expected.refreshed
    assert report.batch_size == expected.batch_size
    assert [event.rung for event in report.events] == list(expected.events)


@pytest.mark.alike("run")  # test_optimizer_laws.py compares the paths of the backends
@pytest.mark.parametrize("run", RUNS + DEFAULTS, ids=str)
def test_every_step_as_published(run: Run, backend: Backend) -> None:
    optimizer = run.optimizer()
    state = optimizer.init(run.case.params(backend))
    theta = flat(state.params)
    for k, expected in enumerate(run.reference(), start=1):
        state, report = optimizer.step(state, *run.case.batch_on(backend, k))
        assert report.step == state.step == k
        assert_same_step(report, state, expected)
        moved = 0.0 if expected.alpha is None else float(np.linalg.norm(expected.theta - theta))
        assert report.update_norm == pytest.approx(moved, rel=1e-5, abs=TOLERANCE)
        theta = expected.theta


def test_runs_visit_every_branch() -> None:
    """The comparison above means something: λ rose, fell and stayed, γ rose, fell and stayed."""
    damping, gamma = set(), set()
    for run in RUNS:
        records = run.reference()
        damping |= {np.sign(r.next_damping - r.damping) for r in records if r.rho is not None}
        gamma |= {np.sign(b.gamma - a.gamma) for a, b in itertools.pairwise(records)}
        changed = [k for k in range(2, STEPS + 1) if records[k - 1].gamma != records[k - 2].gamma]
        assert set(changed) <= {20, 40}
        refreshed = [k for k, r in enumerate(records, start=1) if r.refreshed]
        assert refreshed == [1, 2, 3, 20, 40]
        assert sum(r.rho is not None for r in records) == 9
    assert damping == gamma == {-1, 0, 1}
    bounded = [r.gamma for run in RUNS if run.bounded for r in run.reference()]
    assert {1.0, math.sqrt(1e-5)} <= set(bounded)
    sizes = [r.batch_size for r in Run(case("growing_softmax"), 1).reference()]
    assert len(set(sizes)) > 20
    assert max(sizes) == sizes[39] == sizes[-1] == 96 > sizes[38] > sizes[0] == 16


def test_defaults_visit_every_branch() -> None:
    """Updates rejected and taken back, an outlier, λ up and down; μ chosen, given, and 0."""
    records = [r for run in DEFAULTS for r in run.reference()]
    assert {event for r in records for event in r.events} == {
        "update rejected",
        "update shortened",
        "update taken back",
        "moments out of proportion",
    }
    assert {np.sign(r.next_damping - r.damping) for r in records} == {-1, 0, 1}
    assert {r.next_damping / r.damping for r in records} >= {0.5, 2.0, 4.0}
    for run in DEFAULTS:
        mu = [r.mu for r in run.reference()[2:]]
        if run.case.batch == 16 and run.model_examples == 256:
            assert not any(mu)
        else:
            assert any(mu)
    given = [r.mu for run in DEFAULTS for r in run.reference()]
    assert 0.5 in given
    x = np.c_[INCOMMENSURATE.host()[1], np.ones(64)]
    units = own_units(x.T @ x, np.ones((4, 4)))
    assert units.max() > 1e3 * units.min()


def test_all_refreshed_layers_are_named(backend: Backend) -> None:
    c = case("logistic_sigmoid")
    kfac = published(c.objective)
    _, report = kfac.step(kfac.init(c.params(backend)), *c.batch_on(backend, 1))
    assert report.refreshed == ("0", "2", "4")


@pytest.mark.alike("name")
@pytest.mark.parametrize("name", ["tanh_squared", "relu_softmax", "weighted_sigmoid"])
def test_default_targets_are_the_documented_stream(name: str, backend: Backend) -> None:
    """`MonteCarlo(1)` on the first ⌈N/8⌉ examples, from Rng(seed).child("targets", k)."""
    c = case(name)
    loss = c.objective.loss
    host = get_backend("numpy", "float64")

    def sampler(z: Any, k: int) -> Any:
        assert len(z) == 8
        return to_numpy(loss.sample_targets(Rng(11, "targets", k, 0), host.asarray(z)))

    dense = Published(c.net, c.host()[0], sampler, 1.0)
    kfac = published(c.objective, damping=as_published(1.0), seed=11)
    assert kfac.fisher == MonteCarlo(1)
    state = kfac.init(c.params(backend))
    for k in range(1, 26):
        state, report = kfac.step(state, *c.batch_on(backend, k))
        assert_same_step(report, state, dense.step(*c.batch_at(k)))


def test_published_constants() -> None:
    """As numbers, where a change of a default would be seen at once."""
    kfac = published(case("tanh_squared").objective)
    assert (kfac.gamma.minimum, kfac.gamma.maximum) == (0, math.inf)
    defaults = KFAC(case("tanh_squared").objective)
    names = ["gamma", "averaging", "step_rule", "damping", "refresh", "statistics_fraction"]
    names += ["l2", "relative", "guard"]
    changes = {name: getattr(kfac, name) for name in names}
    assert (kfac.step_rule, defaults.step_rule) == (
        QuadraticModel(bounded=False, least_examples=1),
        QuadraticModel(),
    )
    assert dataclasses.replace(defaults, **changes) == kfac
    assert defaults.averaging == IterateAverage(0.99, power=19.0)
    assert (kfac.gamma.minimum, kfac.gamma.maximum) == (0, math.inf)
    assert (kfac.l2, kfac.relative, kfac.guard) == (1e-5, False, None)
    assert (defaults.l2, defaults.relative, defaults.guard) == (0.0, True, Guard())
    assert (kfac.damping.initial, kfac.damping.interval) == (150, 5)
    updates = [kfac.damping.update(1.0, rho, lambda: 1e6) for rho in (0.7501, 0.75, 0.25, 0.2499)]
    assert updates == pytest.approx([0.95**5, 1.0, 1.0, 0.95**-5])
    assert kfac.gamma.candidates(1, None, 150 + 1e-5) == (math.sqrt(150 + 1e-5),)
    assert kfac.gamma.candidates(20, 1.0, 7.0) == pytest.approx((1.0, 0.95**10, 0.95**-10))
    assert [k for k in range(1, 61) if kfac.gamma.searches(k)] == [20, 40, 60]
    assert [k for k in range(1, 61) if kfac.refresh.due(k)] == [1, 2, 3, 20, 40, 60]
    assert kfac.moving_average.decay == 0.95
    assert kfac.averaging is not None
    assert kfac.averaging == IterateAverage(0.99, power=None)
    assert kfac.statistics_fraction == 1 / 8
    assert kfac.step_rule.fraction == 1 / 4
    assert (GrowingBatch().first, GrowingBatch().full_at) == (1000, 500)


def test_growing_batches_as_published() -> None:
    for n in (1500, 20_000, 60_000):
        expected = [growing_batch_size(k, 1000, n, 500) for k in range(1, 600)]
        assert [GrowingBatch()(k, n) for k in range(1, 600)] == expected
        assert expected[0] == 1000
        assert expected[498] < expected[499] == expected[500] == n
