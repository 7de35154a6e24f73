"""The practical variant: given rates, momentum, KL clip; against a dense reference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from dense_reference import Practical, Record
from optimizer_cases import Case, case, flat

from kfac_np.backend import Backend
from kfac_np.optimizers import (
    KFAC,
    ConstantDamping,
    Exponential,
    FixedRate,
    Inverse,
    LevenbergMarquardt,
    MovingAverage,
    Piecewise,
    Refresh,
    kfc_pre,
    practical,
)

STEPS = 45


@dataclass(frozen=True, eq=False)
class Variant:
    """The library's settings, and the same in the reference's words."""

    name: str
    case: Case
    settings: dict[str, Any]
    rate: Callable[[int], float]
    momentum: Callable[[int], float] = lambda k: 0.9
    clip: float | None = None
    damping: Callable[[int], float] | float = lambda k: 0.01
    eta: float = 1e-5
    refresh: tuple[int, int] = (10, 1)
    statistics: tuple[int, int] = (1, 3)
    preset: Callable[..., KFAC] = practical

    def __str__(self) -> str:
        return self.name

    @functools.cache  # noqa: B019 - the table lives as long as the tests
    def reference(self) -> list[Record]:
        """All steps of the dense reference."""
        c = self.case
        dense = Practical(
            c.net,
            c.host()[0],
            c.sampler,
            self.rate,
            self.momentum,
            self.clip,
            self.damping,
            self.eta,
            self.refresh,
            self.statistics,
        )
        return [dense.step(*c.batch_at(k)) for k in range(1, STEPS + 1)]

    def optimizer(self) -> KFAC:
        changes = {"fisher": self.case.fisher, "guard": None, **self.settings}
        kfac = self.preset(self.case.objective, **changes)
        if isinstance(self.damping, float):
            adapted = LevenbergMarquardt(self.damping, decay=19 / 20, floor=0.0)
            kfac = dataclasses.replace(kfac, damping=adapted)
        return kfac


VARIANTS = [
    Variant(
        "fixed",
        case("tanh_squared"),
        {"rate": 0.05, "kl_clip": None},
        rate=lambda k: 0.05,
    ),
    Variant(
        "no_momentum",
        case("relu_softmax"),
        {"rate": 0.2, "momentum": 0.0, "kl_clip": None, "damping": 0.1},
        rate=lambda k: 0.2,
        momentum=lambda k: 0.0,
        damping=lambda k: 0.1,
    ),
    Variant(
        "scheduled",
        case("logistic_sigmoid"),
        {
            "rate": Exponential(0.3, decay=0.5, every=20),
            "damping": Inverse(1.0, halving=10),
            "kl_clip": None,
            "l2": 1e-3,
        },
        rate=lambda k: 0.3 * 0.5 ** ((k - 1) / 20),
        damping=lambda k: 1.0 / (1.0 + (k - 1) / 10),
        eta=1e-3,
    ),
    Variant(
        "scheduled_momentum",
        case("softplus_poisson"),
        {"step_rule": FixedRate(0.05, Piecewise((0.5, 0.0, 0.95), (10, 20))), "damping": 0.1},
        rate=lambda k: 0.05,
        momentum=lambda k: 0.5 if k <= 10 else 0.0 if k <= 20 else 0.95,
        damping=lambda k: 0.1,
    ),
    Variant(
        "clip",
        case("weighted_sigmoid"),
        {"rate": 0.3, "kl_clip": 1e-3},
        rate=lambda k: 0.3,
        clip=1e-3,
    ),
    Variant(
        "no_l2_other_refresh",
        case("no_bias_softmax"),
        {"rate": 0.1, "kl_clip": 0.01, "l2": 0.0, "refresh": Refresh(7, first=1), "damping": 0.05},
        rate=lambda k: 0.1,
        clip=0.01,
        damping=lambda k: 0.05,
        eta=0.0,
        refresh=(7, 1),
    ),
    Variant(
        "levenberg_marquardt",
        case("tanh_squared"),
        {"rate": 1.0, "momentum": 0.0, "kl_clip": None},
        rate=lambda k: 1.0,
        momentum=lambda k: 0.0,
        damping=1.0,
    ),
    Variant(
        "levenberg_marquardt_too_small",
        case("relu_softmax"),
        {"rate": 0.6, "momentum": 0.5, "kl_clip": None},
        rate=lambda k: 0.6,
        momentum=lambda k: 0.5,
        damping=1e-3,
    ),
    Variant(
        "kfc_pre",
        case("logistic_sigmoid"),
        {"rate": 0.1, "momentum": 0.8, "damping": 0.05},
        rate=lambda k: 0.1,
        momentum=lambda k: 0.8,
        damping=lambda k: 0.05,
        statistics=(5, 3),
        preset=kfc_pre,
    ),
    Variant(
        "statistics_now_and_then",
        case("relu_softmax"),
        {
            "rate": 0.1,
            "kl_clip": 0.01,
            "moving_average": MovingAverage(interval=4),
            "refresh": Refresh(6, 1),
        },
        rate=lambda k: 0.1,
        clip=0.01,
        statistics=(4, 3),
        refresh=(6, 1),
    ),
]


@pytest.mark.alike("variant")  # test_optimizer_laws.py compares the paths of the backends
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_step(variant: Variant, backend: Backend) -> None:
    close = functools.partial(pytest.approx, rel=1e-7, abs=1e-7)
    kfac = variant.optimizer()
    state = kfac.init(variant.case.params(backend))
    for k, expected in enumerate(variant.reference(), start=1):
        state, report = kfac.step(state, *variant.case.batch_on(backend, k))
        assert flat(state.params) == close(expected.theta)
        assert flat(state.average) == close(expected.average)
        assert report.objective == close(expected.objective)
        assert report.alpha == close(expected.alpha)
        assert report.mu == expected.mu
        assert report.damping == pytest.approx(expected.damping, rel=1e-12)
        assert float(state.damping) == pytest.approx(expected.next_damping, rel=1e-12)
        assert report.gamma == pytest.approx(expected.gamma, rel=1e-12)
        assert bool(report.refreshed) == expected.refreshed
        assert (report.rho is None) == (expected.rho is None) == (report.model_decrease is None)
        if expected.rho is not None:
            assert report.rho == pytest.approx(expected.rho, rel=1e-4)
            assert report.model_decrease == close(expected.model_decrease)


def test_variants_visit_every_branch() -> None:
    """The clip was active and inactive, λ rose and fell, rates and damping moved."""
    by_name = {v.name: v.reference() for v in VARIANTS}
    clipped = [r.alpha < 0.3 for r in by_name["clip"]]
    assert 5 < sum(clipped) < STEPS - 5
    damping = {
        np.sign(r.next_damping - r.damping)
        for name in ("levenberg_marquardt", "levenberg_marquardt_too_small")
        for r in by_name[name]
        if r.rho is not None
    }
    assert damping >= {-1, 1}
    gammas = [r.gamma for r in by_name["levenberg_marquardt"]]
    assert len(set(gammas)) == 1 + STEPS // 10  # moves with λ, at refreshes only
    assert len({r.alpha for r in by_name["scheduled"]}) == STEPS


@pytest.mark.parametrize("kappa", [1e-4, 1e-3])
def test_clip_bounds_the_predicted_change(kappa: float, backend: Backend) -> None:
    """Where it acts, α² Δᵀ F̂ Δ = κ; a bound that is wide enough changes nothing."""
    c = case("tanh_squared")
    tight, loose, none = (
        practical(c.objective, 0.1, momentum=0.0, kl_clip=clip, fisher=c.fisher)
        for clip in (kappa, 1e9, None)
    )
    start = tight.init(c.params(backend))
    batch = c.batch_on(backend, 1)
    after, report = tight.step(start, *batch)
    delta = np.asarray(flat(after.params) - flat(start.params))
    F = tight.curvature.matrix(after.moments, after.params)
    change = delta @ flat(F.matvec(c.to_tree(backend, delta)))
    assert change == pytest.approx(kappa)
    assert report.alpha is not None
    assert report.alpha < 0.1
    assert (
        flat(loose.step(start, *batch)[0].params) == flat(none.step(start, *batch)[0].params)
    ).all()


def test_practical_is_composed_of_replaceable_parts() -> None:
    c = case("tanh_squared")
    kfac = practical(c.objective, 0.3, momentum=0.5, damping=0.2, kl_clip=None, l2=0.0)
    assert kfac.step_rule == FixedRate(0.3, 0.5, None)
    assert kfac.damping == ConstantDamping(0.2)
    assert kfac.gamma.candidates(5, 123.0, 4.0) == (2.0,)
    assert not any(kfac.gamma.searches(k) for k in range(1, 100))
    assert not any(kfac.damping.measures(k) for k in range(1, 100))
    assert (kfac.statistics_fraction, kfac.l2) == (1.0, 0.0)


def test_gamma_follows_damping_at_refreshes_only() -> None:
    c = case("tanh_squared")
    kfac = practical(
        c.objective, 0.01, damping=Inverse(1.0, halving=1), refresh=Refresh(5, first=1)
    )
    state = kfac.init(c.params(Backend.of(np.zeros(1))))
    for k in range(1, 16):
        state, report = kfac.step(state, *c.batch_on(Backend.of(np.zeros(1)), k))
        refreshed_at = 1 if k < 5 else k - k % 5
        assert report.damping == 1.0 / k
        assert report.gamma == pytest.approx(math.sqrt(1.0 / refreshed_at + 1e-5))
