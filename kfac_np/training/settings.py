"""TOML tables to composed frozen dataclasses and back, by looking at the dataclasses' fields.

Nothing here knows what is being built: a new setting of an optimiser, or a new part, is reachable
from configuration files and flags as soon as it is a field. Where a field may hold one of several
classes (a slot), the table's key ``name`` says which; `Choices` lists them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from kfac_np.errors import ConfigError

__all__ = ["Choices", "assign", "build", "dump", "merge", "parse_assignment"]

Choices = Mapping[Any, Mapping[str, Any]]
"""For each slot, by its annotation: what it may hold, classes and plain functions, by name."""

Table = dict[str, Any]


def build(
    annotation: Any,
    value: Any,
    choices: Choices | None = None,
    *,
    path: str = "",
    default: Any = None,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Make an object of type `annotation` from a TOML value.

    Parameters
    ----------
    annotation : type or slot
        A dataclass, a slot of `choices`, bool, int, float, str, a Literal, or a tuple, a mapping
        from str or a union of these. The string ``"none"`` stands for None, which TOML lacks.
    value : TOML value
        For a dataclass a table; a slot's table has the key ``name``, and the name alone will do.
    choices : mapping, optional
        The slots.
    path : str
        Where in the configuration this is, for messages.
    default : object, optional
        What the place holds if nothing is said: a table that does not name another class changes
        this object's fields.
    given : mapping, optional
        Fields that the configuration does not set, by name, of whichever dataclass has them.

    Raises
    ------
    ConfigError
        An unknown option or name, a wrong type, or a value that the dataclass refuses.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Damping:
    ...     initial: float = 150.0
    ...     period: int = 5
    >>> build(Damping, {"initial": 10})
    Damping(initial=10.0, period=5)
    >>> build(Damping, {"begin": 10}, path="damping")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: damping: unknown option 'begin', expected initial or period
    """
    choices = choices or {}
    if annotation in choices:
        return _build_slot(annotation, value, choices, path, default, given)
    if _is_union(annotation):
        return _build_union(annotation, value, choices, path, default, given)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, value, choices, path, default, given)  # type: ignore[arg-type]
    if typing.get_origin(annotation) is tuple:
        return _build_tuple(annotation, value, choices, path, given)
    if _is_mapping(annotation):
        return _build_mapping(annotation, value, choices, path, default, given)
    if _accepts(annotation, value):
        return float(value) if annotation is float else value
    raise _mismatch(annotation, value, choices, path)


def dump(annotation: Any, value: Any, choices: Choices | None = None) -> Any:
    """Return the complete TOML value from which `build` makes `value` again.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Damping:
    ...     initial: float = 150.0
    ...     limit: float | None = None
    >>> dump(Damping, Damping())
    {'initial': 150.0, 'limit': 'none'}
    """
    choices = choices or {}
    if annotation in choices:
        name = _name_in(choices[annotation], value)
        if not dataclasses.is_dataclass(value):
            return name
        return {"name": name, **_dump_fields(value, choices)}
    if value is None:
        return "none"
    if _is_union(annotation):
        member = _member_holding(annotation, value, choices)
        return dump(member, value, choices)
    if dataclasses.is_dataclass(annotation):
        return _dump_fields(value, choices)
    if _is_mapping(annotation):
        item = typing.get_args(annotation)[1]
        return {k: dump(item, v, choices) for k, v in value.items()}
    if isinstance(value, tuple):
        items = _tuple_items(annotation, len(value))
        return [dump(a, v, choices) for a, v in zip(items, value, strict=True)]
    return value


def _dump_fields(value: Any, choices: Choices) -> Table:
    hints = typing.get_type_hints(type(value))
    return {
        f.name: dump(hints[f.name], getattr(value, f.name), choices)
        for f in dataclasses.fields(value)
        if f.init and _is_settable(hints[f.name], choices)
    }


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


def _build_slot(
    slot: Any,
    value: Any,
    choices: Choices,
    path: str,
    default: Any,
    given: Mapping[str, Any] | None,
) -> Any:
    names = choices[slot]
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        raise _mismatch(slot, value, choices, path)
    table = dict(table)
    default_name = None if default is None else _name_in(names, default)
    name = table.pop("name", default_name)
    if name is None:
        raise ConfigError(f"{path or 'table'}: expected a name, one of {', '.join(names)}")
    if not isinstance(name, str) or name not in names:
        raise ConfigError(f"{_dot(path, 'name')}: expected {_list(names)}, got {name!r}")
    choice = names[name]
    if not dataclasses.is_dataclass(choice):
        if table:
            raise ConfigError(f"{path}: {name!r} has no options, got {', '.join(table)}")
        return choice
    start = default if name == default_name else None
    return _build_dataclass(choice, table, choices, path, start, given)  # type: ignore[arg-type]


def _build_dataclass(
    cls: type[Any],
    value: Any,
    choices: Choices,
    path: str,
    default: Any,
    given: Mapping[str, Any] | None,
) -> Any:
    if not isinstance(value, Mapping):
        raise _mismatch(cls, value, choices, path)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    arguments = {name: v for name, v in (given or {}).items() if name in fields}
    settable = [n for n in fields if n not in arguments and _is_settable(hints[n], choices)]
    for key in value:
        if key not in settable:
            expected = _list(settable) if settable else "none: it has no options"
            raise ConfigError(
                f"{path or 'configuration'}: unknown option {key!r}, expected {expected}"
            )
    for name, field in fields.items():
        if name in arguments:
            continue
        inherited = getattr(default, name) if default is not None else _default_of(field)
        if name in value:
            start = None if inherited is dataclasses.MISSING else inherited
            arguments[name] = build(
                hints[name], value[name], choices, path=_dot(path, name), default=start, given=given
            )
        elif inherited is dataclasses.MISSING:
            raise ConfigError(
                f"{_dot(path, name)}: expected {_expected(hints[name], choices)}, got nothing"
            )
        else:
            arguments[name] = inherited
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path or 'configuration'}: {error}") from error


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _build_union(
    annotation: Any,
    value: Any,
    choices: Choices,
    path: str,
    default: Any,
    given: Mapping[str, Any] | None,
) -> Any:
    members = typing.get_args(annotation)
    if value == "none" and types.NoneType in members:
        return None
    simple = [m for m in members if m not in choices and _accepts(m, value)]
    if simple:  # an integer is also a number: take the member that changes nothing
        exact = [m for m in simple if m is type(value)]
        return build((exact or simple)[0], value, choices, path=path)
    structured = [m for m in members if m in choices or dataclasses.is_dataclass(m)]
    if isinstance(value, str):
        structured = [m for m in structured if value in choices.get(m, ())]
    elif isinstance(value, Mapping):
        name = value.get("name")
        named = [m for m in structured if name is None or name in choices.get(m, {name: m})]
        structured = named or structured
    else:
        structured = [
            m for m in members if typing.get_origin(m) is tuple and isinstance(value, list)
        ]
    if not structured:
        raise _mismatch(annotation, value, choices, path)
    holder = structured[0]
    fits = default is not None and _holds(holder, default, choices)
    return build(holder, value, choices, path=path, default=default if fits else None, given=given)


def _build_tuple(
    annotation: Any, value: Any, choices: Choices, path: str, given: Mapping[str, Any] | None
) -> Any:
    if not isinstance(value, list | tuple):
        raise _mismatch(annotation, value, choices, path)
    items = _tuple_items(annotation, len(value))
    if len(items) != len(value):
        raise _mismatch(annotation, value, choices, path)
    return tuple(
        build(a, v, choices, path=f"{path}[{i}]", given=given)
        for i, (a, v) in enumerate(zip(items, value, strict=True))
    )


def _build_mapping(
    annotation: Any,
    value: Any,
    choices: Choices,
    path: str,
    default: Any,
    given: Mapping[str, Any] | None,
) -> Any:
    if not isinstance(value, Mapping):
        raise _mismatch(annotation, value, choices, path)
    item = typing.get_args(annotation)[1]
    built = dict(default or {})
    for key, entry in value.items():
        below = built.get(key)
        built[key] = build(item, entry, choices, path=_dot(path, key), default=below, given=given)
    return built


def _tuple_items(annotation: Any, length: int) -> tuple[Any, ...]:
    arguments = typing.get_args(annotation)
    return arguments[:1] * length if arguments[-1:] == (...,) else arguments


def _accepts(annotation: Any, value: Any) -> bool:
    """Tell whether a plain TOML value is one of a plain annotation."""
    if typing.get_origin(annotation) is Literal:
        return value in typing.get_args(annotation) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return annotation in (bool, int, str) and type(value) is annotation


def _holds(annotation: Any, value: Any, choices: Choices) -> bool:
    if annotation in choices:
        return any(c is value or c is type(value) for c in choices[annotation].values())
    if dataclasses.is_dataclass(annotation) or annotation is types.NoneType:
        return isinstance(value, annotation)  # type: ignore[arg-type]
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple)
    return _accepts(annotation, value)


def _member_holding(annotation: Any, value: Any, choices: Choices) -> Any:
    for member in typing.get_args(annotation):
        if _holds(member, value, choices):
            return member
    raise ConfigError(f"no name is known for {value!r} where {_expected(annotation, choices)} goes")


def _name_in(names: Mapping[str, Any], value: Any) -> str:
    for name, choice in names.items():
        if choice is value or choice is type(value):
            return name
    raise ConfigError(f"no name is known for {value!r}; known are {', '.join(names)}")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Mapping, dict)


def _is_settable(annotation: Any, choices: Choices) -> bool:
    """Tell whether a configuration can set such a field (a network, for example, it cannot)."""
    if annotation in choices:
        return True
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        needed = [f for f in dataclasses.fields(annotation) if f.init and not _has_default(f)]
        return all(_is_settable(hints[f.name], choices) for f in needed)
    arguments = typing.get_args(annotation)
    if _is_union(annotation) or typing.get_origin(annotation) is tuple:
        return all(_is_settable(m, choices) for m in arguments if m is not ...)
    if _is_mapping(annotation):
        return _is_settable(arguments[1], choices)
    plain = (bool, int, float, str, types.NoneType)
    return annotation in plain or typing.get_origin(annotation) is Literal


def _expected(annotation: Any, choices: Choices) -> str:
    """Say in words what a place of the configuration takes."""
    if annotation in choices:
        return _list(choices[annotation])
    if _is_union(annotation):
        return " or ".join(_expected(m, choices) for m in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return _list(typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        items = typing.get_args(annotation)
        if items[-1:] == (...,):
            return f"a list, each entry {_expected(items[0], choices)}"
        return f"a list of {len(items)} entries"
    if dataclasses.is_dataclass(annotation) or _is_mapping(annotation):
        return "a table"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return words.get(annotation, "'none'")


def _mismatch(annotation: Any, value: Any, choices: Choices, path: str) -> ConfigError:
    came = "nan" if isinstance(value, float) and math.isnan(value) else repr(value)
    return ConfigError(f"{path or 'value'}: expected {_expected(annotation, choices)}, got {came}")


def _list(names: Any) -> str:
    *most, last = [str(n) for n in names]
    return f"{', '.join(most)} or {last}" if most else last


def _dot(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
