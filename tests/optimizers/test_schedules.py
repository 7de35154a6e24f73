"""Schedules and policies: their values, above all at the borders, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
from optimizer_cases import case

from kfac_np.errors import ConfigError
from kfac_np.optimizers import (
    KFAC,
    SGD,
    Adam,
    Constant,
    ConstantDamping,
    Cosine,
    CoupledGamma,
    Exponential,
    FixedRate,
    GammaSearch,
    Inverse,
    IterateAverage,
    LevenbergMarquardt,
    MovingAverage,
    Piecewise,
    QuadraticModel,
    Refresh,
    RelativeGammaSearch,
    Shrinking,
    practical,
)


def test_constant() -> None:
    assert [Constant(0.3)(k) for k in (1, 10**9)] == [0.3, 0.3]


def test_exponential() -> None:
    s = Exponential(8.0, decay=0.5, every=10, minimum=0.75)
    assert [s(1), s(11), s(21), s(31)] == [8.0, 4.0, 2.0, 1.0]
    assert s(6) == pytest.approx(8 * 0.5**0.5)
    assert s(41) == s(10**6) == 0.75
    assert Exponential(1.0, decay=2.0)(4) == 8.0


def test_inverse() -> None:
    s = Inverse(6.0, halving=4)
    assert [s(1), s(5), s(9), s(13)] == [6.0, 3.0, 2.0, 1.5]


def test_cosine() -> None:
    s = Cosine(2.0, steps=110, warmup=10, final=0.5)
    assert [s(k) for k in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])
    assert s(11) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 100)))
    assert s(60) == pytest.approx(1.25)
    assert s(110) == s(111) == s(10**6) == pytest.approx(0.5)
    fall = [s(k) for k in range(10, 111)]
    assert fall == sorted(fall, reverse=True)
    assert Cosine(2.0, steps=1)(1) == 0.0


def test_piecewise() -> None:
    s = Piecewise((1.0, 0.1, 0.0), boundaries=(10, 20))
    assert [s(k) for k in (1, 10, 11, 20, 21, 10**6)] == [1.0, 1.0, 0.1, 0.1, 0.0, 0.0]
    assert Piecewise((0.5,), boundaries=())(1) == 0.5


def test_moving_average_weights() -> None:
    m = MovingAverage()
    assert [m.epsilon(k) for k in (1, 2, 4, 20, 21, 10**6)] == [0, 0.5, 0.75, 0.95, 0.95, 0.95]
    assert MovingAverage(0.0).epsilon(7) == 0.0


def test_refresh() -> None:
    assert [k for k in range(1, 31) if Refresh(10, first=2).due(k)] == [1, 2, 10, 20, 30]
    assert all(Refresh(1).due(k) for k in range(1, 20))
    assert [k for k in range(1, 8) if Refresh(100, first=5).due(k)] == [1, 2, 3, 4, 5]


def test_levenberg_marquardt_borders() -> None:
    lm = LevenbergMarquardt(1.0, decay=0.5, interval=2)
    assert lm.start(lambda: 7.0) == 1.0
    assert lm.at(9, 0.3) == 0.3
    with pytest.raises(ConfigError, match="expected a λ carried over"):
        lm.at(1, None)
    automatic = LevenbergMarquardt()
    assert [automatic.start(lambda m=m: m) for m in (0.1, 0.3, 0.0)] == [0.1, 0.3, 1.0]
    assert [lm.measures(k) for k in (1, 2, 3, 4)] == [False, True, False, True]

    def update(current: float, rho: float, eigenvalue: float = 0.0, **more: Any) -> Any:
        return lm.update(current, rho, lambda: eigenvalue, **more)

    assert update(1.0, 0.75) == update(1.0, 0.25) == 1.0
    assert update(1.0, math.nextafter(0.75, 1)) == 0.25
    assert update(1.0, math.nextafter(0.25, 0)) == 4.0
    assert update(1.0, math.inf) == 0.25
    assert update(1.0, -math.inf) == 4.0
    assert update(1.0, 1.0, eigenvalue=2.0) == pytest.approx(0.6)  # the floor
    assert update(0.3, 0.5, eigenvalue=2.0) == pytest.approx(0.6)
    assert update(1.0, 1.0, eigenvalue=2.0, noisy=False) == 0.25  # there is none
    assert update(1.0, 0.0, eigenvalue=2.0) == 4.0
    assert update(1.0, 1.0, eigenvalue=1e3) == pytest.approx(300.0)
    never = LevenbergMarquardt(floor=0.0)
    assert never.update(1.0, 1.0, _not_asked) == pytest.approx(0.5)


def test_levenberg_marquardt_where_the_ratio_says_nothing() -> None:
    """λ comes down to a typical eigenvalue, by ω₁ at a time, and stays where it is less."""
    lm = LevenbergMarquardt(1.0, decay=0.5, interval=2)
    assert [lm.update(x, math.nan, lambda: 0.4) for x in (8.0, 1.0, 0.4, 0.2)] == [2, 0.4, 0.4, 0.2]
    never = LevenbergMarquardt(1.0, floor=0.0)
    assert never.update(1.0, math.nan, _not_asked) == 1.0


def test_levenberg_marquardt_has_a_ceiling() -> None:
    """A multiple of a typical eigenvalue, however bad ρ is; from beyond it λ falls by ω₁."""
    lm = LevenbergMarquardt(1.0, decay=0.5, interval=2)
    assert [lm.update(x, 0.0, lambda: 1e-8) for x in (0.1, 0.5, 8.0)] == [0.4, 1.0, 2.0]
    assert lm.update(1.0, 0.0, lambda: 0.0) == 4.0  # there is none where F̂ is 0


def test_damping_of_updates_that_were_taken_back() -> None:
    """4ⁿ times as much, and a number at all events."""
    for policy in (LevenbergMarquardt(), ConstantDamping(0.1)):
        assert [policy.rejected(0.5, n) for n in (1, 2, 8)] == [2.0, 8.0, 2.0**15]
        assert policy.rejected(1e20, 1000) <= policy.rejected(1e30, 1) < math.inf


def _not_asked() -> float:
    raise AssertionError("F̂ is not needed")


def test_constant_damping() -> None:
    assert ConstantDamping(0.1).at(3, 7.0) == ConstantDamping(0.1).update(0.1, 0.0, _not_asked)
    assert ConstantDamping(0.1).at(3, 7.0) == 0.1
    assert ConstantDamping(Inverse(6.0, halving=4)).at(5, 7.0) == 3.0
    assert not any(ConstantDamping(0.1).measures(k) for k in range(1, 50))


def test_gamma_search_candidates() -> None:
    search = GammaSearch(interval=2, decay=0.5)
    assert search.candidates(1, None, 9.0) == (3.0,)
    assert search.candidates(1, 5.0, 9.0) == (5.0,)
    assert search.candidates(2, 5.0, 9.0) == (5.0, 1.25, 20.0)
    assert search.candidates(2, None, 9.0) == (3.0, 0.75, 12.0)
    assert CoupledGamma().candidates(2, 5.0, 9.0) == (3.0,)
    bounded = GammaSearch(interval=1, decay=0.5, minimum=0.1, maximum=2.0)
    assert bounded.candidates(1, 1.5, 9.0) == (1.5, 0.75, 2.0)
    assert bounded.candidates(1, 0.15, 9.0) == (0.15, 0.1, 0.3)
    assert bounded.candidates(1, None, 9.0) == (3.0, 1.5, 2.0)  # γ itself may be out of bounds
    guess = RelativeGammaSearch(interval=4)
    assert [k for k in range(1, 10) if guess.searches(k)] == [3, 4, 8]
    assert guess.candidates(1, None, 16.0) == pytest.approx((1.2,))
    assert guess.candidates(3, 0.4, 16.0) == pytest.approx((0.4, 0.8))  # the smaller is γ itself
    narrow = GammaSearch(interval=2, decay=0.5, minimum=2.0, maximum=2.0)
    assert narrow.candidates(2, 1.0, 9.0) == (1.0, 2.0)
    assert guess.candidates(3, 0.6, 16.0) == pytest.approx((0.6, 1.2, 0.4))
    assert guess.candidates(4, 30.0, 16.0) == pytest.approx((30.0, 15.0, 40.0))
    assert guess.candidates(4, 6.0, 0.0) == pytest.approx((6.0, 3.0, 12.0))  # relative to nothing


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (Constant, {"value": -1.0}, "Constant value: expected a number >= 0, got -1.0"),
    (Exponential, {"initial": 0.0, "decay": 0.5}, "Exponential initial: expected a number > 0"),
    (Shrinking, {"to": 0.0}, r"Shrinking to: expected a number in \(0, 1\], got 0.0"),
    (Exponential, {"initial": 1.0, "decay": 0.0}, "Exponential decay: expected a number > 0"),
    (Exponential, {"initial": 1.0, "decay": 0.5, "every": 0}, "Exponential every: expected a numb"),
    (
        Exponential,
        {"initial": 1.0, "decay": 0.5, "minimum": -1.0},
        "Exponential minimum: expected a number >= 0, got -1.0",
    ),
    (Inverse, {"initial": math.inf, "halving": 1}, "Inverse initial: expected a number > 0, got i"),
    (Inverse, {"initial": 1.0, "halving": -2}, "Inverse halving: expected a number > 0, got -2"),
    (Cosine, {"initial": True, "steps": 5}, "Cosine initial: expected a number > 0, got True"),
    (Cosine, {"initial": 1.0, "steps": 0}, "Cosine steps: expected"),
    (Cosine, {"initial": 1.0, "steps": 5, "final": -1}, "Cosine final: expected a number >= 0"),
    (Cosine, {"initial": 1.0, "steps": 5, "warmup": 5}, "Cosine warmup: expected 0 <= warmup < s"),
    (Piecewise, {"values": (1.0,), "boundaries": (5,)}, "Piecewise: expected one value more than"),
    (
        Piecewise,
        {"values": (1.0, 2.0, 3.0), "boundaries": (5, 5)},
        r"Piecewise boundaries: expected to rise, got \(5, 5\)",
    ),
    (Piecewise, {"values": (1.0, math.nan), "boundaries": (5,)}, "Piecewise values: expected a nu"),
    (
        IterateAverage,
        {"decay": 1.0},
        r"IterateAverage decay: expected a number in \[0, 1\), got 1.0",
    ),
    (
        MovingAverage,
        {"decay": -0.1},
        r"MovingAverage decay: expected a number in \[0, 1\), got -0.1",
    ),
    (Refresh, {"interval": 0}, "Refresh interval: expected an integer > 0, got 0"),
    (Refresh, {"interval": 2.5}, "Refresh interval: expected an integer > 0, got 2.5"),
    (Refresh, {"first": 0}, "Refresh first: expected an integer > 0, got 0"),
    (LevenbergMarquardt, {"initial": 0.0}, "LevenbergMarquardt initial: expected a number > 0"),
    (LevenbergMarquardt, {"initial": "150"}, "LevenbergMarquardt initial: expected a number > 0"),
    (LevenbergMarquardt, {"floor": -0.1}, "LevenbergMarquardt floor: expected a number >= 0"),
    (LevenbergMarquardt, {"interval": 0}, "LevenbergMarquardt interval: expected an integer >"),
    (LevenbergMarquardt, {"interval": 0.5}, "LevenbergMarquardt interval: expected an integer"),
    (
        LevenbergMarquardt,
        {"decay": 1.0},
        r"LevenbergMarquardt decay: expected a number in \(0, 1\), got 1.0",
    ),
    (GammaSearch, {"interval": 0}, "GammaSearch interval: expected an integer > 0, got 0"),
    (GammaSearch, {"decay": 0.0}, r"GammaSearch decay: expected a number in \(0, 1\), got 0.0"),
    (
        GammaSearch,
        {"minimum": 2.0, "maximum": 1.0},
        "GammaSearch: expected 0 <= minimum <= maximum, got 2.0 and 1.0",
    ),
    (ConstantDamping, {"value": -1e-9}, "ConstantDamping value: expected a number >= 0, got -1e-0"),
    (FixedRate, {"rate": 0.0}, "FixedRate rate: expected a number > 0, got 0.0"),
    (FixedRate, {"rate": "fast"}, "FixedRate rate: expected a number > 0, got 'fast'"),
    (
        FixedRate,
        {"rate": lambda k: 0.1},
        "FixedRate rate: expected a number > 0 or a Schedule, got a function",
    ),
    (FixedRate, {"momentum": 1.0}, r"FixedRate momentum: expected a number in \[0, 1\), got 1.0"),
    (FixedRate, {"kl_clip": 0.0}, "FixedRate kl_clip: expected a number > 0, got 0.0"),
    (FixedRate, {"fraction": 1.5}, r"FixedRate fraction: expected a number in \(0, 1\], got 1.5"),
    (
        QuadraticModel,
        {"fraction": 0.0},
        r"QuadraticModel fraction: expected a number in \(0, 1\], got 0.0",
    ),
    (
        QuadraticModel,
        {"least_examples": 0},
        "QuadraticModel least_examples: expected an integer >",
    ),
    (QuadraticModel, {"interval": 0}, "QuadraticModel interval: expected an integer >"),
    (QuadraticModel, {"fraction": 2}, r"QuadraticModel fraction: expected a number in \(0, 1\], g"),
]
OBJECTIVE = case("tanh_squared").objective
WRONG_OPTIMIZERS: list[tuple[Any, dict[str, Any], str]] = [
    (KFAC, {"statistics_fraction": 0}, "KFAC statistics_fraction: expected a number > 0, got 0"),
    (KFAC, {"statistics_fraction": 1.1}, r"KFAC statistics_fraction: expected a number in \(0, 1"),
    (KFAC, {"l2": -1e-5}, "KFAC l2: expected a number >= 0, got -1e-05"),
    (KFAC, {"seed": -1}, "KFAC seed: expected an integer >= 0, got -1"),
    (KFAC, {"seed": 0.5}, "KFAC seed: expected an integer >= 0, got 0.5"),
    (
        KFAC,
        {"step_rule": FixedRate()},
        (
            "KFAC gamma: RelativeGammaSearch expected a step rule that evaluates the quadratic "
            r"model \(QuadraticModel\), got FixedRate; use CoupledGamma with it"
        ),
    ),
    (practical, {"gamma": GammaSearch()}, "KFAC gamma: GammaSearch expected a step rule"),
    (practical, {"rate": -1.0}, "FixedRate rate: expected a number > 0, got -1.0"),
    (practical, {"damping": -1.0}, "ConstantDamping value: expected a number >= 0, got -1.0"),
    (SGD, {"rate": 0}, "SGD rate: expected a number > 0, got 0"),
    (SGD, {"momentum": 1.0}, r"SGD momentum: expected a number in \[0, 1\), got 1.0"),
    (SGD, {"l2": math.nan}, "SGD l2: expected a number >= 0, got nan"),
    (Adam, {"rate": -0.1}, "Adam rate: expected a number > 0, got -0.1"),
    (Adam, {"beta1": 1.0}, r"Adam beta1: expected a number in \[0, 1\), got 1.0"),
    (Adam, {"beta2": -0.5}, r"Adam beta2: expected a number in \[0, 1\), got -0.5"),
    (Adam, {"epsilon": 0.0}, "Adam epsilon: expected a number > 0, got 0.0"),
    (Adam, {"l2": -1}, "Adam l2: expected a number >= 0, got -1"),
]


@pytest.mark.parametrize(("make", "settings", "message"), WRONG)
def test_wrong_setting_of_a_part(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        make(**settings)


@pytest.mark.parametrize(("make", "settings", "message"), WRONG_OPTIMIZERS)
def test_wrong_setting_of_an_optimizer(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        make(OBJECTIVE, **settings)


def test_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="momentun"):
        practical(OBJECTIVE, momentun=0.5)
