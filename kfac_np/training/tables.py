"""Nested TOML tables laid over each other, and single options in them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from kfac_np.errors import ConfigError

__all__ = ["Table", "assign", "merge", "parse_assignment", "parse_toml"]

Table = dict[str, Any]

_DEEPEST = 30


def parse_toml(text: str) -> Table:
    """Read TOML text, with or without the byte order mark that some editors put before it.

    Raises
    ------
    tomllib.TOMLDecodeError
        It is not TOML.
    ConfigError
        Tables and lists are in each other more than 30 deep.

    Examples
    --------
    >>> parse_toml("a.b = [1, 2]")
    {'a': {'b': [1, 2]}}
    >>> parse_toml(f"a = {'[' * 99}{']' * 99}")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: expected tables and lists at most 30 deep, got deeper ones
    """
    too_deep = f"expected tables and lists at most {_DEEPEST} deep, got deeper ones"
    try:
        table = tomllib.loads(text.removeprefix("\ufeff"))
    except RecursionError as error:
        raise ConfigError(too_deep) from error
    level: list[Any] = [table]
    for _ in range(_DEEPEST):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [
            child for children in inner for child in children if isinstance(child, dict | list)
        ]
    if level:
        raise ConfigError(too_deep)
    return table


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
    if equals and "\n" not in text:
        for candidate in (value, json.dumps(value)):
            try:
                return parse_toml(f"{path} = {candidate}")
            except tomllib.TOMLDecodeError:
                continue
            except ConfigError as error:
                raise ConfigError(f"--set {text:.40}...: {error}") from error
    raise ConfigError(f"--set: expected path.to.option=value, got {text!r}")
