"""Configurations: complete when written, and every setting of every part reachable."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kfac_np import curvature, fisher, optimizers
from kfac_np.data import ConstantBatch, GrowingBatch
from kfac_np.errors import ConfigError
from kfac_np.optimizers import (
    KFAC,
    Balance,
    family,
    kfac_autoencoder,
    kfac_convolutional,
    kfc_pre,
    practical,
)
from kfac_np.training.config import (
    _MOVED,
    RunSettings,
    from_table,
    read_table,
    to_table,
    toml,
    write,
)
from kfac_np.training.defaults import STAND_IN, complete, set_optimizer, variants
from kfac_np.training.parts import choices
from kfac_np.training.tables import assign


def table(**changes: Any) -> dict[str, Any]:
    return {"data": "digits", "run": {"steps": 3}, **changes}


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fixed": {"optimizer": "kfac-fixed"},
    "sgd": {"optimizer": {"name": "sgd", "rate": {"name": "cosine", "initial": 0.1, "steps": 9}}},
    "adam": {"optimizer": {"name": "adam", "averaging": {"decay": 0.5}}},
    "mlp": {"model": {"name": "mlp", "sizes": [5], "activation": "gelu", "initializer": "he"}},
    "convnet": {"model": "convnet", "data": "digits"},
    "resnet": {"model": {"name": "resnet", "normalization": "none", "widths": [3]}},
    "pre": {"optimizer": "kfc-pre"},
    "growing": {"batch": {"name": "growing", "first": 8}},
    "slope": {"model": {"activation": {"name": "leaky-relu", "slope": 0.2}}},
    "squared": {"model": {"loss": "squared-error"}},
    "many": {
        "optimizer": {
            "curvature": {
                "block": {"rule": "pi-spectral", "sharing": "reduce"},
                "overrides": {"0": "diagonal", "2": {"name": "kfac", "exact_damping": True}},
            },
            "fisher": "exact",
            "averaging": "none",
            "refresh": {"interval": 2},
        }
    },
    "schedules": {
        "optimizer": {
            "name": "kfac-fixed",
            "step_rule": {
                "rate": {"name": "piecewise", "values": [0.1, 0.01], "boundaries": [5]},
                "momentum": {"name": "exponential", "initial": 0.9, "decay": 0.99},
                "kl_clip": "none",
            },
            "damping": {"value": {"name": "inverse", "initial": 1.0, "halving": 10}},
        }
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_written_is_complete_and_gives_the_same_again(case: dict[str, Any]) -> None:
    config = from_table(table(**case))
    written = to_table(config)
    again = from_table(tomllib.loads(toml(written)))
    assert again == config
    assert to_table(again) == written
    for f in dataclasses.fields(config.optimizer):
        assert f.name in ("objective", "penalty") or f.name in written["optimizer"]


def test_every_optimiser_part_has_a_name() -> None:
    # A part that is exported but has no name could not be configured.
    slots = choices()
    for module, slot in [
        (optimizers, optimizers.Optimizer),
        (family, family.Preconditioner),
        (optimizers, optimizers.Schedule),
        (optimizers, optimizers.StepRule),
        (optimizers, optimizers.DampingPolicy),
        (optimizers, optimizers.GammaPolicy),
        (fisher, fisher.FisherType),
        (curvature, curvature.Curvature),
        (curvature, curvature.Block),
    ]:
        found = [getattr(module, name) for name in module.__all__]
        if module is optimizers:
            found += [getattr(family, name) for name in family.__all__]
        parts = {c for c in found if isinstance(c, type) and issubclass(c, slot) and c is not slot}
        assert parts == set(slots[slot].values()), slot


def test_every_setting_of_kfac_is_reachable() -> None:
    written = to_table(from_table(table()))["optimizer"]

    def paths(node: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
        found = []
        for key, value in node.items():
            if isinstance(value, dict):
                found += paths(value, f"{prefix}.{key}")
            elif key != "name":
                found.append((f"{prefix}.{key}", value))
        return found

    reachable = paths(written, "optimizer")
    assert len(reachable) > 15
    for path, value in reachable:
        changed = {str: value, float: 0.5, int: 3, bool: True, list: [7]}[type(value)]
        if path == "optimizer.damping.ceiling":
            changed = 1000.0
        if path == "optimizer.gamma.bound":
            changed = 20.0
        config = from_table(assign(table(), path, changed))
        node: Any = to_table(config)
        for key in path.split("."):
            node = node[key]
        assert node == changed, path


def test_the_seed_is_one_unless_said_otherwise() -> None:
    assert from_table(table(seed=5)).optimizer.seed == 5
    assert from_table(table(seed=5, optimizer={"seed": 7})).optimizer.seed == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dta": 1}, "configuration: unknown option 'dta', expected model, optimizer, batch"),
        ({"data": 3}, "data: expected a table or a name, got 3"),
        ({"data": {"name": 3}}, "data.name: expected a string, got 3"),
        ({"run": {}}, "run: expected a budget, steps or seconds, got neither"),
        ({"run": {"steps": -1}}, "run: steps: expected an integer >= 0, got -1"),
        (
            {"run": {"seconds": float("nan")}},
            "run: seconds: expected a number in [0, inf], got nan",
        ),
        ({"run": {"steps": 1, "evaluations": -1}}, "run: evaluations: expected an integer >= 0"),
        (
            {"run": {"steps": 1, "keep_checkpoints": 0}},
            "run: keep_checkpoints: expected an integer > 0",
        ),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"model": "cnn"}, "model.name: expected autoencoder, mlp, convnet or resnet, got 'cnn'"),
        (
            {"model": {"name": "resnet", "normalization": "x"}},
            "model.normalization: expected none, batch, group or layer, got 'x'",
        ),
        (
            {"model": {"name": "convnet", "sizes": [3]}},
            "model: unknown option 'sizes', expected channels, kernel, pooling, window, hidden",
        ),
        (
            {"run": {"steps": 1, "statistics_examples": 0}},
            "statistics_examples: expected an integer",
        ),
        ({"model": {"activation": "sin"}}, "model.activation.name: expected logistic, tanh"),
        ({"model": {"sizes": "x"}}, "model.sizes: expected a list, each entry an integer"),
        (
            {"optimizer": "lbfgs"},
            (
                "optimizer.name: expected kfac, sgd, adam, gram, preconditioned, kfac-autoencoder, "
                "kfac-convolutional, kfac-fixed, kfc-pre, adamw, nadam, lion, muon, shampoo, "
                "kl-shampoo, soap, eva, foof or singd, got 'lbfgs'"
            ),
        ),
        (
            {"optimizer": {"name": 3}},
            (
                "optimizer.name: expected kfac, sgd, adam, gram, preconditioned, kfac-autoencoder, "
                "kfac-convolutional, kfac-fixed, kfc-pre, adamw, nadam, lion, muon, shampoo, "
                "kl-shampoo, soap, eva, foof or singd, got 3"
            ),
        ),
        ({"optimizer": {"rate": 1}}, "optimizer: unknown option 'rate', expected curvature"),
        (
            {"optimizer": {"statistics": {"interval": 3}}},
            "optimizer.statistics: no option any more; it is optimizer.moving_average.interval",
        ),
        (
            {"optimizer": {"step_rule": {"balance": {}}}},
            "optimizer.step_rule.balance: no option any more; it is optimizer.balance",
        ),
        (
            {"optimizer": {"name": "kfac", "gamma": {"within": 3.0}}},
            "optimizer.gamma.within: no option any more; it is optimizer.gamma.maximum of",
        ),
        ({"optimizer": {"damping": {"initial": -1}}}, "optimizer.damping: LevenbergMarquardt"),
        ({"optimizer": {"step_rule": "fixed-rate"}}, "optimizer: KFAC"),
        ({"optimizer": {"refresh": 3}}, "optimizer.refresh: expected a table, got 3"),
        ({"batch": {"size": 0}}, "batch: ConstantBatch size: expected an integer > 0, got 0"),
        ({"batch": 3}, "batch: expected constant or growing, got 3"),
        ({"backend": {"name": "jax"}}, "backend.name: expected numpy, cupy, torch"),
        ({"run": {"steps": 1, "threads": 0}}, "run: threads: expected an integer > 0, got 0"),
        (
            {"run": {"steps": 1, "threads": 10**30}},
            "run: threads: expected at most 65536, got 1000",
        ),
        (
            {"run": {"steps": 1, "threads": 2}, "backend": {"name": "torch"}},
            "run.threads: expected with the backend numpy, got torch, whose threads are its own",
        ),
        ({"backend": {"dtype": "float16"}}, "backend.dtype: expected float32 or float64"),
        (
            {"optimizer": {"statistics_fraction": {"name": [1]}}},
            "optimizer.statistics_fraction.name: expected constant, exponential, inverse",
        ),
        ({"optimizer": {"l2": 10**400}}, "optimizer.l2: expected a number, got 1000"),
        ({"data": {"name": "idx:\0"}}, "data: expected a path without null characters"),
    ],
)
def test_mistakes_are_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        from_table(table(**changes))
    assert message in str(info.value)
    assert "\n" not in str(info.value)


def test_defaults_follow_data_model_and_optimiser() -> None:
    assert complete({})["model"]["sizes"] == [400, 200, 100, 50, 25, 6]
    assert complete({"data": "fashion-mnist"})["model"]["sizes"] == [1000, 500, 250, 30]
    assert complete({"data": "idx:/x"})["model"]["sizes"] == [1000, 500, 250, 30]
    assert complete({"model": {"name": "mlp", "sizes": [3]}})["model"]["sizes"] == [3]
    assert complete({"optimizer": {"name": "sgd", "rate": 5.0}})["optimizer"]["rate"] == 5.0
    assert complete({"batch": "growing"})["batch"] == "growing"
    once = complete({"optimizer": {"name": "kfac-fixed", "refresh": {"interval": 2}}})
    assert once["optimizer"]["name"] == "kfac-fixed"
    assert once["optimizer"]["step_rule"]["kl_clip"] == practical(STAND_IN).step_rule.kl_clip
    assert complete(once) == once
    small = complete({"data": "digits", "model": "convnet", "optimizer": "adam"})
    assert small["model"] == {"name": "convnet", "channels": [16, 16, 32], "kernel": 3}
    large = complete({"data": "cifar10", "model": {"name": "resnet", "blocks": 3}})
    assert large["model"] == {"name": "resnet", "blocks": 3}
    assert large["batch"]["size"] > small["batch"]["size"]
    assert complete(small) == small


PRESETS = {
    "kfac": KFAC,
    "kfac-autoencoder": kfac_autoencoder,
    "kfac-convolutional": kfac_convolutional,
    "kfac-fixed": practical,
    "kfc-pre": kfc_pre,
}


@pytest.mark.parametrize("model", ["autoencoder", "mlp", "convnet", "resnet"])
@pytest.mark.parametrize("data", ["curves", "digits", "fashion-mnist"])
def test_optimisers_by_name_are_those_of_the_library(data: str, model: str) -> None:
    assert list(PRESETS) == ["kfac", *variants()]
    for name, preset in PRESETS.items():
        config = from_table(table(data=data, model=model, optimizer=name))
        assert config.optimizer == preset(STAND_IN)
        written = to_table(config)
        assert written["optimizer"]["name"] == name
        assert from_table(written) == config


@pytest.mark.parametrize("name", family.METHODS)
def test_methods_of_the_family_by_name(name: str) -> None:
    """What the library has by that name, at a rate for the data; flags and all settings over it."""
    config = from_table(table(data="digits", optimizer=name))
    made = dataclasses.replace(family.METHODS[name](STAND_IN), rate=config.optimizer.rate)
    assert config.optimizer == made
    written = to_table(config)
    assert written["optimizer"]["name"] == name
    assert from_table(written) == config
    said = {"name": name, "fallback": {"beta1": 0.5}, "overrides": {"2": "muon"}, "seed": 3}
    config = from_table(table(optimizer=said))
    assert config.optimizer.overrides == {"2": family.Muon()}
    assert from_table(to_table(config)) == config
    with pytest.raises(ConfigError, match=f"--momentum: expected with kfac or sgd, got '{name}'"):
        set_optimizer({"optimizer": {"name": name}}, momentum=0.5)


def test_a_variant_with_other_settings_keeps_its_name_and_its_other_settings() -> None:
    said = {"name": "kfac-autoencoder", "balance": {"first": 7}, "averaging": "none", "seed": 3}
    config = from_table(table(optimizer=said))
    assert config.optimizer == kfac_autoencoder(
        STAND_IN, balance=Balance(first=7), averaging=None, seed=3
    )
    assert to_table(config)["optimizer"]["name"] == "kfac-autoencoder"
    assert from_table(to_table(config)) == config


def test_options_that_moved_are_where_it_is_said() -> None:
    """What is named in their place is an option of some optimiser; they themselves are none."""
    others = {"name": "kfac", "gamma": "search", "curvature": "ekfac"}
    options = set()
    for said in ("kfac", others):
        options |= set(paths_of(to_table(from_table(table(optimizer=said)))))
    for path, place in _MOVED.items():
        assert path not in options
        words = place.replace(";", "").split()
        assert options.issuperset(word for word in words if word.startswith("optimizer."))


def paths_of(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from paths_of(value, f"{path}{key}.")


def test_the_name_of_a_variant_is_no_setting_of_its_own() -> None:
    with pytest.raises(ConfigError, match="configuration: unknown option 'variant'"):
        from_table(table(variant="kfac-fixed"))


def test_short_names_find_their_place() -> None:
    def optimizer(said: Any, **short: float) -> Any:
        return from_table(set_optimizer(complete(table(optimizer=said)), **short)).optimizer

    assert optimizer("kfac", damping=3.0).damping.initial == 3.0
    assert optimizer("kfac-fixed", damping=3.0).damping.value == 3.0
    assert optimizer({"damping": "constant"}, damping=3.0).damping.value == 3.0
    fixed = optimizer("kfac", rate=0.5, momentum=0.1)
    assert (fixed.step_rule.rate, fixed.step_rule.momentum) == (0.5, 0.1)
    assert type(fixed.gamma) is optimizers.CoupledGamma
    balanced = optimizer("kfac-autoencoder", rate=0.5)
    assert (balanced.step_rule.rate, balanced.balance) == (0.5, None)
    clipped = optimizer("kfac-fixed", rate=0.5).step_rule
    assert (clipped.rate, clipped.kl_clip) == (0.5, practical(STAND_IN).step_rule.kl_clip)
    assert optimizer("sgd", rate=0.5, momentum=0.1, l2=1e-3).l2 == 1e-3
    assert optimizer("adam", rate=0.5).rate == 0.5
    assert optimizer("kfac", l2=0.0).l2 == 0.0
    with pytest.raises(ConfigError, match="--damping: expected with kfac only, got 'sgd'"):
        optimizer("sgd", damping=1.0)
    with pytest.raises(ConfigError, match="--momentum: expected with kfac or sgd"):
        optimizer("adam", momentum=0.5)


@pytest.mark.parametrize(
    ("data", "optimizer", "size"),
    [
        ("curves", "kfac", 60_000),
        ("curves", "kfac-autoencoder", 60_000),
        ("fashion-mnist", "kfac", 4000),
        ("fashion-mnist", "kfac-autoencoder", 4000),
        ("digits", "kfac", 500),
        ("fashion-mnist", "kfac-fixed", 500),
        ("fashion-mnist", "adam", 100),
    ],
)
def test_batches_grow_by_default_where_adaptive_kfac_sees_images(
    data: str, optimizer: str, size: int
) -> None:
    settings = {"data": data, "optimizer": optimizer, "run": {"steps": 3}}
    assert from_table(settings).batch(10**6, 60_000) == size
    said = {**settings, "batch": {"name": "constant", "size": 300}}
    assert from_table(said).batch(10**6, 60_000) == 300


@pytest.mark.parametrize(
    ("said", "batch"),
    [
        ({"size": 100}, ConstantBatch(100)),
        ({"name": "constant", "size": 100}, ConstantBatch(100)),
        ({"first": 300}, GrowingBatch(300, 200, 4000)),
        ({"most": "none"}, GrowingBatch(500, 200)),
        ({"name": "growing", "first": 5000}, GrowingBatch(5000)),
        ("growing", GrowingBatch()),
    ],
)
def test_nothing_is_left_of_default_batches_that_does_not_fit(said: Any, batch: Any) -> None:
    settings = {"data": "fashion-mnist", "batch": said, "run": {"steps": 3}}
    assert from_table(settings).batch == batch


def test_growing_batches_are_a_choice() -> None:
    assert from_table(table(batch={"name": "growing", "first": 8})).batch == GrowingBatch(8)


def test_evaluations_are_spread_over_the_budget() -> None:
    by_steps = RunSettings(steps=100, evaluations=4)
    due = [k for k in range(1, 101) if by_steps.evaluation_due((k - 1, 0.0), (k, 0.0))]
    assert due == [25, 50, 75, 100]
    by_time = RunSettings(seconds=10.0, evaluations=5)
    assert by_time.evaluation_due((3, 1.9), (4, 2.1))
    assert not by_time.evaluation_due((3, 2.1), (4, 3.9))
    assert not RunSettings(steps=0).evaluation_due((0, 0.0), (0, 0.0))
    assert RunSettings(seconds=1e-320).evaluation_due((0, 0.0), (1, 0.1))
    both = RunSettings(steps=10, seconds=1.0)
    assert [both.finished(10, 0.0), both.finished(0, 1.0), both.finished(9, 0.9)] == [1, 1, 0]


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    write(path, {"seed": 3})
    assert read_table(path) == {"seed": 3}
    path.write_text("seed =")
    with pytest.raises(ConfigError, match=r"config\.toml: expected a TOML file \("):
        read_table(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="expected a TOML file"):
        read_table(path)
    path.write_text("seed = 3", encoding="utf-8-sig")
    assert read_table(path) == {"seed": 3}
    for deep in (f"a = {'[' * 9999}{']' * 9999}", f"{'a.' * 9999}a = 1", f"[{'a.' * 40}a]\nb = 1"):
        path.write_text(deep)
        with pytest.raises(ConfigError, match=r"toml: expected a TOML file \(expected tables and"):
            read_table(path)
    with pytest.raises(ConfigError, match="expected a TOML file"):
        read_table("\0")
    with pytest.raises(ConfigError, match="expected a TOML file"):
        read_table(tmp_path)


def test_relative_paths_of_data_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for data, expected in (
        ("idx:a/../b", {"name": f"idx:{tmp_path}/b"}),
        ({"name": "cifar", "directory": "b"}, {"name": "cifar", "directory": f"{tmp_path}/b"}),
        ("cifar:/c", {"name": "cifar:/c"}),
        ("idx:", {"name": "idx:"}),
        ("digits", {"name": "digits", "directory": "none"}),
    ):
        found = to_table(from_table({"data": data, "run": {"steps": 1}}))["data"]
        assert found == found | expected


def test_without_tomli_w(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tomli_w", None)
    with pytest.raises(ConfigError, match="config files need tomli-w: pip install tomli-w"):
        toml({})


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({}, "kfac-autoencoder"),
        ({"data": "curves"}, "kfac-autoencoder"),
        ({"data": "idx:/x"}, "kfac-autoencoder"),
        ({"batch": "growing"}, "kfac-autoencoder"),
        ({"batch": {"size": 500}}, "kfac-autoencoder"),
        ({"batch": {"first": 800, "full_at": 9}}, "kfac-autoencoder"),
        ({"optimizer": {"damping": {"initial": 3.0}}}, "kfac-autoencoder"),
        ({"batch": {"size": 100}}, "kfac"),
        ({"batch": {"first": 100}}, "kfac"),
        ({"data": "digits"}, "kfac"),
        ({"model": "mlp"}, "kfac"),
        ({"model": "convnet"}, "kfac-convolutional"),
        ({"model": "resnet", "data": "digits"}, "kfac-convolutional"),
        ({"optimizer": "kfac"}, "kfac"),
        ({"batch": {"size": 100}, "optimizer": "kfac-autoencoder"}, "kfac-autoencoder"),
        ({"optimizer": "adam"}, "adam"),
    ],
)
def test_defaults_choose_the_name_of_the_optimiser(more: dict[str, Any], name: str) -> None:
    config = from_table({"data": "fashion-mnist", "run": {"steps": 1}, **more})
    assert to_table(config)["optimizer"]["name"] == name
    if name in PRESETS and "optimizer" not in more:
        assert config.optimizer == PRESETS[name](STAND_IN)


def test_settings_of_variants_follow_the_seed_of_the_run() -> None:
    assert from_table(table(optimizer="kfc-pre", seed=5)).optimizer.seed == 5
