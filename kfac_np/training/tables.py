"""Nested TOML tables laid over each other, and single options in them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from kfac_np.errors import ConfigError

__all__ = ["Table", "assign", "merge", "parse_assignment"]

Table = dict[str, Any]


def merge(base: Table, override: Mapping[str, Any]) -> Table:
    """Lay `override` over `base`, table by table.

    A table that names another class replaces the one below it: its options would not fit.

    Examples
    --------
    >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    >>> merge({"a": {"name": "kfac", "y": 2}}, {"a": {"name": "sgd"}})
    {'a': {'name': 'sgd'}}
    """
    if "name" in override and "name" in base and override["name"] != base["name"]:
        return dict(override)
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        if isinstance(value, Mapping):
            below = {"name": below} if isinstance(below, str) else below
            merged[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def assign(table: Mapping[str, Any], path: str, value: Any) -> Table:
    """Return `table` with the option at a dotted path set.

    Examples
    --------
    >>> assign({"optimizer": {"name": "kfac"}}, "optimizer.damping.initial", 10)
    {'optimizer': {'name': 'kfac', 'damping': {'initial': 10}}}
    """
    nested: Any = value
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return merge(dict(table), nested)


def parse_assignment(text: str) -> Table:
    """Turn ``path.to.option=value`` into a nested table; the value is TOML, or a plain string.

    Examples
    --------
    >>> parse_assignment("optimizer.rate=1e-3"), parse_assignment("optimizer.name=sgd")
    ({'optimizer': {'rate': 0.001}}, {'optimizer': {'name': 'sgd'}})
    """
    path, equals, value = (part.strip() for part in text.partition("="))
    for candidate in (value, json.dumps(value)):
        if equals and "\n" not in text:
            try:
                return tomllib.loads(f"{path} = {candidate}")
            except tomllib.TOMLDecodeError:
                continue
    raise ConfigError(f"--set: expected path.to.option=value, got {text!r}")
