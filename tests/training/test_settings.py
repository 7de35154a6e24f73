"""TOML tables to composed dataclasses and back: every option reachable, every mistake named."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import tomli_w

from kfac_np.errors import ConfigError
from kfac_np.training.settings import build, dump
from kfac_np.training.tables import assign, merge, parse_assignment


class Rule:
    """A slot."""


@dataclass(frozen=True)
class Fixed(Rule):
    value: float = 1.0

    def __post_init__(self) -> None:
        if self.value <= 0:
            raise ConfigError(f"Fixed: expected value > 0, got {self.value}")


@dataclass(frozen=True)
class Adaptive(Rule):
    initial: float = 150.0
    period: int = 5
    limits: tuple[float, float] = (0.0, math.inf)


def trace(x: float) -> float:
    return x


def norm(x: float) -> float:
    return x


Pi = Callable[[float], float]


@dataclass(frozen=True)
class Cosine:
    steps: int
    peak: float = 1.0


@dataclass(frozen=True)
class Averaging:
    decay: float = 0.99


@dataclass(frozen=True)
class Optimizer:
    objective: object
    rate: float | Cosine
    damping: Rule = Adaptive(initial=10.0)
    pi: Pi = trace
    averaging: Averaging | None = field(default_factory=Averaging)
    l2: float = 1e-5
    seed: int = 0
    verbose: bool = False
    mode: Literal["full", "fast"] = "full"
    sizes: tuple[int, ...] = (3, 2)
    label: str | None = None
    pieces: tuple[tuple[int, float], ...] = ()
    overrides: Mapping[str, Rule] = field(default_factory=dict)
    chosen: tuple[int, ...] | None = None


CHOICES = {
    Rule: {"fixed": Fixed, "adaptive": Adaptive},
    Pi: {"trace": trace, "norm": norm},
    Cosine: {"cosine": Cosine},
}


def make(table: dict[str, Any]) -> Optimizer:
    built = build(Optimizer, table, CHOICES, path="optimizer", given={"objective": None})
    assert isinstance(built, Optimizer)
    return built


def test_omitted_options_take_the_defaults() -> None:
    assert make({"rate": 1}) == Optimizer(None, rate=1.0)
    assert type(make({"rate": 1}).rate) is float


def test_a_table_without_a_name_changes_the_default_part() -> None:
    assert make({"rate": 1.0, "damping": {"period": 7}}).damping == Adaptive(10.0, 7)


def test_naming_another_class_or_part() -> None:
    assert make({"rate": 1.0, "damping": {"name": "fixed", "value": 2}}).damping == Fixed(2.0)
    assert make({"rate": 1.0, "damping": "fixed"}).damping == Fixed()
    assert make({"rate": {"name": "cosine", "steps": 9}}).rate == Cosine(9)
    assert make({"rate": 1.0, "pi": "norm"}).pi is norm


def test_none_and_back() -> None:
    assert make({"rate": 1.0, "averaging": "none"}).averaging is None
    assert make({"rate": 1.0, "averaging": {"decay": 0.5}}).averaging == Averaging(0.5)
    assert make({"rate": 1.0, "label": "none"}).label is None
    assert make({"rate": 1.0, "label": "x"}).label == "x"


def test_mappings() -> None:
    table = {"rate": 1.0, "overrides": {"0.1": "fixed", "2": {"name": "adaptive", "period": 1}}}
    assert make(table).overrides == {"0.1": Fixed(), "2": Adaptive(period=1)}


def test_lists() -> None:
    assert make({"rate": 1.0, "sizes": [4, 5, 6]}).sizes == (4, 5, 6)
    assert make({"rate": 1.0, "pieces": [[0, 1], [5, 0.1]]}).pieces == ((0, 1.0), (5, 0.1))
    assert make({"rate": 1.0, "damping": {"limits": [1, 2]}}).damping == Adaptive(
        10.0, limits=(1.0, 2.0)
    )


@pytest.mark.parametrize(
    "table",
    [
        {"rate": 0.1},
        {"rate": {"name": "cosine", "steps": 3}, "averaging": "none", "damping": "fixed"},
        {"rate": 1.0, "overrides": {"0.1": "fixed", "2": {"name": "adaptive", "period": 1}}},
        {"rate": 1.0, "chosen": [3, 4]},
        {"rate": 1e-300, "pi": "norm", "sizes": [], "label": "é", "pieces": [[1, 0.1]]},
    ],
)
def test_what_is_written_rebuilds_the_same_object(table: dict[str, Any]) -> None:
    optimizer = make(table)
    written = tomli_w.dumps(dump(Optimizer, optimizer, CHOICES))
    assert "objective" not in written
    assert make(tomllib.loads(written)) == optimizer


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "optimizer.rate: expected a number or cosine, got nothing"),
        ({"rate": "fast"}, "optimizer.rate: expected a number or cosine, got 'fast'"),
        ({"rate": True}, "optimizer.rate: expected a number or cosine, got True"),
        ({"rate": {"name": "sine"}}, "optimizer.rate.name: expected cosine, got 'sine'"),
        ({"rate": "cosine"}, "optimizer.rate.steps: expected an integer, got nothing"),
        ({"rate": [1]}, r"optimizer.rate: expected a number or cosine, got \[1\]"),
        ({"rate": 1.0, "seed": 1.5}, "optimizer.seed: expected an integer, got 1.5"),
        ({"rate": 1.0, "seed": True}, "optimizer.seed: expected an integer, got True"),
        ({"rate": 1.0, "l2": "x"}, "optimizer.l2: expected a number, got 'x'"),
        ({"rate": 1.0, "verbose": 1}, "optimizer.verbose: expected true or false, got 1"),
        ({"rate": 1.0, "mode": "slow"}, "optimizer.mode: expected full or fast, got 'slow'"),
        ({"rate": 1.0, "sizes": 3}, "optimizer.sizes: expected a list, each entry an integer"),
        ({"rate": 1.0, "sizes": [3, "a"]}, r"optimizer.sizes\[1\]: expected an integer, got 'a'"),
        ({"rate": 1.0, "damping": {"limits": [1]}}, "limits: expected a list of 2 entries"),
        ({"rate": 1.0, "averaging": 3}, "optimizer.averaging: expected a table or 'none', got 3"),
        ({"rate": {"name": "cosine", "steps": [3]}}, "optimizer.rate.steps: expected an integer"),
        ({"rate": 1.0, "chosen": 3}, "optimizer.chosen: expected a list, each entry an integer or"),
        ({"rate": 1.0, "damping": 3}, "optimizer.damping: expected fixed or adaptive, got 3"),
        ({"rate": 1.0, "damping": "lm"}, "damping.name: expected fixed or adaptive, got 'lm'"),
        ({"rate": 1.0, "damping": {"name": 3}}, "damping.name: expected fixed or adaptive, got 3"),
        (
            {"rate": 1.0, "damping": {"begin": 3}},
            "optimizer.damping: unknown option 'begin', expected initial, period or limits",
        ),
        ({"rate": 1.0, "damping": {"name": "fixed", "value": 0}}, "optimizer.damping: Fixed: exp"),
        ({"rate": 1.0, "pi": {"name": "norm", "p": 2}}, "optimizer.pi: 'norm' has no options"),
        ({"rate": 1.0, "objective": 3}, "optimizer: unknown option 'objective'"),
        ({"rate": 1.0, "label": 3}, "optimizer.label: expected a string or 'none', got 3"),
        ({"rate": 1.0, "overrides": 3}, "optimizer.overrides: expected a table, got 3"),
        ({"rate": 1.0, "overrides": {"0": "x"}}, "overrides.0.name: expected fixed or adaptive"),
        ({"rate": 1.0, "overrides": {"0": {}}}, "overrides.0: expected a name, one of fixed"),
        ({"rate": 1.0, "l2": "none"}, "optimizer.l2: expected a number, got 'none'"),
    ],
)
def test_mistakes_are_named_with_what_was_expected(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as info:
        make(table)
    assert "\n" not in str(info.value)


def test_a_slot_without_default_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="optimizer: expected a name, one of fixed, adaptive"):
        build(Rule, {}, CHOICES, path="optimizer")


def test_a_part_without_a_name_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match="no name is known for"):
        dump(Optimizer, Optimizer(None, 1.0, pi=abs), CHOICES)
    with pytest.raises(ConfigError, match="no name is known for"):
        dump(Optimizer, Optimizer(None, Averaging()), CHOICES)  # type: ignore[arg-type]


def test_merging_keeps_what_is_not_mentioned_and_drops_what_no_longer_fits() -> None:
    base = {"optimizer": {"name": "kfac", "damping": {"initial": 1}}, "seed": 0}
    assert merge(base, {"optimizer": {"damping": {"period": 2}}}) == {
        "optimizer": {"name": "kfac", "damping": {"initial": 1, "period": 2}},
        "seed": 0,
    }
    assert merge(base, {"optimizer": {"name": "sgd"}})["optimizer"] == {"name": "sgd"}
    assert merge({"a": 3}, {"a": {"b": 1}}) == {"a": {"b": 1}}
    assert merge({"a": "cosine"}, {"a": {"b": 1}}) == {"a": {"name": "cosine", "b": 1}}
    assert base["optimizer"] == {"name": "kfac", "damping": {"initial": 1}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=1", 1),
        ("a.b = 1e-3", 1e-3),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b=kfac", "kfac"),
        ("a.b='kfac'", "kfac"),
        ("a.b={name='x', y=1}", {"name": "x", "y": 1}),
        ('a."b"=1', 1),
        ("a.b=inf", math.inf),
        ("a.b=x=y", "x=y"),
    ],
)
def test_assignments(text: str, value: Any) -> None:
    assert parse_assignment(text) == assign({}, "a.b", value) == {"a": {"b": value}}


@pytest.mark.parametrize("text", ["a", "=3", "a..b=3", "", "a=1\nb=2", "a b=3"])
def test_malformed_assignments(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set: expected path\.to\.option=value"):
        parse_assignment(text)


@pytest.mark.parametrize("text", [f"a={'[' * 9999}{']' * 9999}", f"{'a.' * 9999}a=1"])
def test_assignments_that_are_too_deep(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set a.{39}\.\.\.: expected tables and lists at most"):
        parse_assignment(text)
