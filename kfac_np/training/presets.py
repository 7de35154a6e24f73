"""What a configuration leaves open: layer sizes, batches and rates that suit the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfac_np.errors import ConfigError
from kfac_np.training.tables import Table, merge

__all__ = ["complete", "set_optimizer", "variants"]


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
    optimizer = _named(table, "optimizer", "kfac")
    name = optimizer["name"]
    said = {**table, "data": data, "model": model, "optimizer": optimizer}
    chosen = _defaults(str(data["name"]), str(model["name"]), str(name))
    if isinstance(name, str) and name in variants():
        own = {k: v for k, v in chosen["optimizer"].items() if k != "name"}
        chosen["optimizer"] = merge(variants()[name], own)
        said["optimizer"] = {**optimizer, "name": chosen["optimizer"]["name"]}
    batch = said.get("batch")
    if isinstance(batch, Mapping):
        if "size" in batch:  # only a constant batch has one
            said["batch"] = {"name": "constant", **batch}
        if said["batch"].get("name") == "growing":  # the user's own: no cap is left of the default
            chosen.pop("batch")
        size = said["batch"].get("size", said["batch"].get("first", 500))
        if not isinstance(size, int) or size < 500:  # balanced layers would fit the noise
            chosen["optimizer"].pop("balance", None)
    return merge(chosen, said)


def variants() -> dict[str, Table]:
    """Return optimisers that have a name of their own, but are another's with other parts.

    "kfac-fixed" is K-FAC with given rate, momentum and damping and a KL clip, for small batches;
    "kfc-pre" is SGD with K-FAC as a preconditioner (`kfac_np.optimizers.kfc_pre`).

    References
    ----------
    Ba, Grosse & Martens 2017, §5; Grosse & Martens 2016, §4.

    Examples
    --------
    >>> list(variants())
    ['kfac-fixed', 'kfc-pre']
    """
    given = {
        "name": "kfac",
        "gamma": "coupled",
        "statistics_fraction": 1.0,
        "l2": 1e-5,
        "relative": False,
    }
    return {
        "kfac-fixed": {
            **given,
            "step_rule": {"name": "fixed-rate", "rate": 0.1, "momentum": 0.9, "kl_clip": 1e-2},
            "damping": {"name": "constant", "value": 1e-2},
        },
        "kfc-pre": {
            **given,
            "step_rule": {"name": "fixed-rate", "rate": 0.01, "momentum": 0.9, "kl_clip": "none"},
            "damping": {"name": "constant", "value": 0.03},
            "moving_average": {"interval": 5},
        },
    }


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
    if optimizer["name"] == "kfac":
        changes = _kfac_changes(optimizer, rate, momentum, damping)
    else:
        if damping is not None:
            raise ConfigError(f"--damping: expected with kfac only, got {optimizer['name']!r}")
        if momentum is not None and optimizer["name"] == "adam":
            raise ConfigError("--momentum: expected with kfac or sgd, got 'adam' (it has beta1)")
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
        # A given rate leaves nothing to compare values of γ by.
        changes["step_rule"] = {
            "name": "fixed-rate",
            **{k: v for k, v in given.items() if v is not None},
        }
        changes["gamma"] = {"name": "coupled"}
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


def _defaults(data: str, model: str, optimizer: str) -> Table:
    """Defaults that depend on what is trained with what.

    Chosen by hand from runs of equal processor time with seed 0 (`benchmarks/sweep.py`), by the
    training loss at their end. SGD and Adam: rates in steps of about two and three, batches of 50,
    100 and 500; 40 s on curves (rates 0.005 to 0.1 and 0.0003 to 0.006), 2.5 s on digits (0.003 to
    0.3 and 0.001 to 0.02; on the labels, where all larger rates fit the training set, a middle
    one). Images of other data sets have the rates of curves. K-FAC on curves: batches of 250,
    500, 1000, 2000, 300:1500 and 500:2000, 25 and 40 s; elsewhere its settings are the defaults.
    """
    digits = data == "digits"
    if model in ("convnet", "resnet"):
        return _image_defaults(digits, model, optimizer)
    if model == "mlp":
        sizes = [32] if digits else [256, 128]
        rates = {"sgd": 0.1, "adam": 3e-3}
    elif digits:
        sizes = [32, 16, 6]
        rates = {"sgd": 0.05, "adam": 0.02}
    else:
        sizes = [400, 200, 100, 50, 25, 6] if data == "curves" else [1000, 500, 250, 30]
        rates = {"sgd": 0.01, "adam": 3e-3}
    rate = {"rate": rates[optimizer]} if optimizer in rates else {}
    # The statistics of K-FAC want more examples than a gradient does, and more as it converges.
    batch: Table = {"name": "constant", "size": 100 if optimizer in rates else 500}
    settings: Table = {"name": optimizer, **rate}
    if optimizer == "kfac" and model == "autoencoder" and not digits:
        # An image that is reconstructed tells more of F than a label: a quarter of 500 will do.
        settings["step_rule"] = {"name": "quadratic-model", "least_examples": 125}
        settings["balance"] = {}
        batch = {"name": "growing", "first": 500}
        batch |= {"full_at": 2000} if data == "curves" else {"full_at": 200, "most": 4000}
    return {"model": {"name": model, "sizes": sizes}, "optimizer": settings, "batch": batch}


def _image_defaults(digits: bool, model: str, optimizer: str) -> Table:
    """Defaults of convolutional networks: those of their papers, smaller ones for the digits.

    Chosen from single runs on Fashion-MNIST of 20 to 50 processor seconds with the convolutional
    network, by the training loss on the way. SGD: rates 0.01 to 0.1, batches 32, 64, 128; Adam:
    0.0005 to 0.002, the same batches. K-FAC with a given rate: rates 0.003 to 0.3, λ from 0.001 to
    1, momentum 0.5 to 0.9, KL clip 0.0003 to 0.01 or none (without one small λ diverges), batches
    64 and 128; adaptive: λ₀ in 1, 0.1, 0.03, 0.01, batches 128, 256, 512, τ₂ in 1/4 and 1.
    """
    network: Table = {"name": model}
    if digits:
        small = {"channels": [16, 16, 32], "kernel": 3}
        network |= small if model == "convnet" else {"widths": [8, 16]}
    rates = {"sgd": 0.02, "adam": 3e-3 if digits else 1e-3}
    settings: Table = {"name": optimizer}
    if optimizer in rates:
        settings["rate"] = rates[optimizer]
    else:  # locations are examples, too: part of the batch is enough for statistics
        settings |= {"statistics_fraction": 0.25, "refresh": {"interval": 5}}
        settings["averaging"] = {"decay": 0.97}
    if optimizer == "kfac-fixed":
        settings["step_rule"] = {"momentum": 0.8, "kl_clip": 1e-3}
        settings["damping"] = {"value": 3e-3}
    size = 64 if optimizer in rates else 128
    return {"model": network, "optimizer": settings, "batch": {"name": "constant", "size": size}}
