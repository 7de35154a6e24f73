"""What a configuration leaves open: an optimiser, layer sizes, batches and rates by the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kfac_np.errors import ConfigError
from kfac_np.layers import Identity
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, Optimizer, presets
from kfac_np.optimizers.family import METHODS
from kfac_np.training.parts import choices
from kfac_np.training.settings import dump
from kfac_np.training.tables import Table, merge

__all__ = [
    "STAND_IN",
    "complete",
    "default_optimizer",
    "presets_by_name",
    "set_optimizer",
    "variants",
]

STAND_IN = Objective(Identity(), SquaredError())
"""What an optimiser is composed with until the data, and with them the network, are there."""

_IMAGE_MODELS = ("convnet", "resnet")

# Rates of the family, on labels, as autoencoders of digits, and of other images: of two or three
# each, in steps of about three, the one of least training loss after 0.8, 2 and 12 s with seed 0.
_FAMILY = {
    "adamw": (3e-3, 0.02, 3e-3),
    "nadam": (3e-3, 0.02, 3e-3),
    "lion": (2e-3, 0.01, 1e-3),
    "muon": (0.01, 0.05, 0.02),
    "shampoo": (0.01, 0.02, 0.01),
    "kl-shampoo": (0.01, 0.05, 0.01),
    "soap": (0.01, 0.05, 0.03),
    "eva": (0.1, 0.1, 0.1),
    "foof": (0.3, 0.3, 0.3),
    "singd": (0.1, 0.1, 0.1),
    "gram": (0.3, 0.3, 10.0),
}
# Their steps take little more than a gradient.
_SMALL_BATCHES = ("sgd", "adam", "adamw", "nadam", "lion", "eva", "gram")


def complete(table: Mapping[str, Any]) -> Table:
    """Lay what the user says over the defaults for that data set, model and optimiser.

    Examples
    --------
    >>> table = complete({"data": "digits", "optimizer": "sgd"})
    >>> table["model"]["sizes"], table["optimizer"]["name"]
    ([32, 16, 6], 'sgd')
    """
    data = _named(table, "data", "curves")
    model = _named(table, "model", "autoencoder")
    optimizer = _named(table, "optimizer", default_optimizer(table))
    name = optimizer["name"]
    said = {**table, "data": data, "model": model, "optimizer": optimizer}
    chosen = _defaults(data["name"], model["name"], name)
    if isinstance(name, str) and name in presets_by_name():
        chosen["optimizer"] = {**_table_of(name), **chosen["optimizer"]}
    batch = said.get("batch")
    if isinstance(batch, Mapping):
        if "size" in batch:  # only a constant batch has one
            said["batch"] = {"name": "constant", **batch}
        if said["batch"].get("name") == "growing":  # the user's own: no cap is left of the default
            chosen.pop("batch")
    return merge(chosen, said)


def default_optimizer(table: Mapping[str, Any]) -> str:
    """Name the optimiser that a configuration gets if it says none.

    "kfac" is `KFAC(objective)`. Where the optimiser of a model and its data is another one it has
    another name: "kfac-autoencoder" for autoencoders of images in batches of 500 and more (layers
    balanced by fewer examples fit their noise), "kfac-convolutional" for convolutional networks.

    Examples
    --------
    >>> default_optimizer({"data": "curves"}), default_optimizer({"batch": {"size": 100}})
    ('kfac-autoencoder', 'kfac')
    """
    model = _named(table, "model", "autoencoder")["name"]
    if model in _IMAGE_MODELS:
        return "kfac-convolutional"
    batch = table.get("batch")
    size = batch.get("size", batch.get("first", 500)) if isinstance(batch, Mapping) else 500
    small = not isinstance(size, int) or size < 500
    digits = _named(table, "data", "curves")["name"] == "digits"
    return "kfac-autoencoder" if model == "autoencoder" and not (digits or small) else "kfac"


def variants() -> dict[str, Callable[[Objective], KFAC]]:
    """Return compositions of K-FAC that have a name of their own beside "kfac".

    Examples
    --------
    >>> list(variants())
    ['kfac-autoencoder', 'kfac-convolutional', 'kfac-fixed', 'kfc-pre']
    """
    return {
        "kfac-autoencoder": presets.kfac_autoencoder,
        "kfac-convolutional": presets.kfac_convolutional,
        "kfac-fixed": presets.practical,
        "kfc-pre": presets.kfc_pre,
    }


def presets_by_name() -> dict[str, Callable[[Objective], Optimizer]]:
    """Return all optimisers that a name stands for: `variants`, and the methods of the family.

    Examples
    --------
    >>> presets_by_name()["muon"](STAND_IN).preconditioner.steps
    5
    """
    return {**variants(), **METHODS}


def _table_of(preset: str) -> Table:
    """All settings of a preset, but its seed, which is the run's."""
    table: Table = dump(Optimizer, presets_by_name()[preset](STAND_IN), choices())
    del table["seed"]
    return {**table, "name": preset}


def set_optimizer(
    table: Mapping[str, Any],
    *,
    rate: float | None = None,
    momentum: float | None = None,
    damping: float | None = None,
    l2: float | None = None,
) -> Table:
    """Set options by their short names, wherever the optimiser of a complete table keeps them.

    Examples
    --------
    >>> table = set_optimizer({"optimizer": {"name": "kfac"}}, damping=10.0)
    >>> table["optimizer"]["damping"]
    {'name': 'levenberg-marquardt', 'initial': 10.0}
    """
    optimizer: Table = dict(table["optimizer"])
    if optimizer["name"] in ["kfac", *variants()]:
        changes = _kfac_changes(optimizer, rate, momentum, damping)
    else:
        if damping is not None:
            raise ConfigError(f"--damping: expected with kfac only, got {optimizer['name']!r}")
        if momentum is not None and optimizer["name"] != "sgd":
            raise ConfigError(
                f"--momentum: expected with kfac or sgd, got {optimizer['name']!r} (which has its "
                "own: beta1 or the like, by --set)"
            )
        changes = {"rate": rate, "momentum": momentum}
    changes["l2"] = l2
    changes = {k: v for k, v in changes.items() if v is not None}
    return {**table, "optimizer": merge(optimizer, changes)}


def _kfac_changes(
    optimizer: Table, rate: float | None, momentum: float | None, damping: float | None
) -> Table:
    changes: Table = {}
    if rate is not None or momentum is not None:
        given = {"rate": rate, "momentum": momentum}
        # A given rate leaves no quadratic model, to compare values of γ and balance layers by.
        changes["step_rule"] = {
            "name": "fixed-rate",
            **{k: v for k, v in given.items() if v is not None},
        }
        changes |= {"gamma": {"name": "coupled"}, "balance": "none"}
    if damping is not None:
        rule = _named(optimizer, "damping", "levenberg-marquardt")["name"]
        option = "initial" if rule == "levenberg-marquardt" else "value"
        changes["damping"] = {"name": rule, option: damping}
    return changes


def _named(table: Mapping[str, Any], key: str, default: str) -> Table:
    """A table for `key` with a name in it, from a table, a bare name, or nothing."""
    value = table.get(key, {})
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: expected a table or a name, got {value!r}")
    return {"name": default, **value}


def _defaults(data: Any, model: Any, optimizer: Any) -> Table:
    """Layer sizes, batches, and rates of SGD and Adam.

    Chosen by hand from runs of equal CPU time with seed 0 (`benchmarks/sweep.py`), by the training
    loss at their end. SGD and Adam: rates in steps of about two and three, batches of 50, 100 and
    500; 40 s on curves (rates 0.005 to 0.1 and 0.0003 to 0.006), 2.5 s on digits (0.003 to 0.3 and
    0.001 to 0.02; on the labels, where all larger rates fit the training set, a middle one).
    Images of other data sets have the rates of curves. K-FAC on curves: batches of 250, 500, 1000,
    2000, 300:1500 and 500:2000, 25 and 40 s.
    """
    digits, curves = data == "digits", data == "curves"
    if model in _IMAGE_MODELS:
        return _image_defaults(digits, model, optimizer)
    if model == "mlp":
        sizes = [32] if digits else [256, 128]
        rates = {"sgd": 0.1, "adam": 3e-3, **_family_rates(0)}
    elif digits:
        sizes = [32, 16, 6]
        rates = {"sgd": 0.05, "adam": 0.02, **_family_rates(1)}
    else:
        sizes = [400, 200, 100, 50, 25, 6] if curves else [1000, 500, 250, 30]
        rates = {"sgd": 0.01, "adam": 3e-3, **_family_rates(2)}
    # The statistics of K-FAC want more examples than a gradient does, and more as it converges.
    small = optimizer in _SMALL_BATCHES or (digits and optimizer in [*METHODS])
    batch: Table = {"name": "constant", "size": 100 if small else 500}
    if optimizer in ("kfac", "kfac-autoencoder") and model == "autoencoder" and not digits:
        batch = {"name": "growing", "first": 500}
        batch |= {"full_at": 2000} if curves else {"full_at": 200, "most": 4000}
    return {
        "model": {"name": model, "sizes": sizes},
        "optimizer": _rated(optimizer, rates),
        "batch": batch,
    }


def _image_defaults(digits: bool, model: str, optimizer: Any) -> Table:
    """The same for convolutional networks; docs/results.md says what was tried."""
    network: Table = {"name": model}
    if digits:
        small = {"channels": [16, 16, 32], "kernel": 3}
        network |= small if model == "convnet" else {"widths": [8, 16]}
    rates = {"sgd": 0.02, "adam": 3e-3 if digits else 1e-3, **_family_rates(0)}
    size = 64 if optimizer in _SMALL_BATCHES else 128
    return {
        "model": network,
        "optimizer": _rated(optimizer, rates),
        "batch": {"name": "constant", "size": size},
    }


def _family_rates(task: int) -> dict[str, float]:
    return {name: rates[task] for name, rates in _FAMILY.items()}


def _rated(optimizer: Any, rates: Mapping[str, float]) -> Table:
    """A table of an optimiser, with a rate if it needs one."""
    rated = isinstance(optimizer, str) and optimizer in rates
    return {"name": optimizer, "rate": rates[optimizer]} if rated else {"name": optimizer}
