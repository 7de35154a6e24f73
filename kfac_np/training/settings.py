"""TOML tables to composed frozen dataclasses and back, by looking at the dataclasses' fields.

Nothing here knows what is being built: a new setting of an optimiser, or a new part, is reachable
from configuration files and flags as soon as it is a field. Where a field may hold one of several
classes (a slot), the table's key ``name`` says which; `Choices` lists them.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from kfac_np.errors import ConfigError
from kfac_np.training.annotations import (
    Choices,
    accepts,
    describe_expected,
    holds,
    is_mapping,
    is_settable,
    is_union,
    name_in,
    names_of,
    tuple_items,
)
from kfac_np.training.tables import Table
from kfac_np.validation import did_you_mean, listed, require_one_of

__all__ = ["build", "dump"]


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
    if is_union(annotation):
        return _build_union(annotation, value, choices, path, default, given)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, value, choices, path, default, given)  # type: ignore[arg-type]
    if typing.get_origin(annotation) is tuple:
        return _build_tuple(annotation, value, choices, path, given)
    if is_mapping(annotation):
        return _build_mapping(annotation, value, choices, path, default, given)
    if accepts(annotation, value):
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
        name = name_in(choices[annotation], value)
        if not dataclasses.is_dataclass(value):
            return name
        return {"name": name, **_dump_fields(value, choices)}
    if value is None:
        return "none"
    if is_union(annotation):
        member = _member_holding(annotation, value, choices)
        return dump(member, value, choices)
    if dataclasses.is_dataclass(annotation):
        return _dump_fields(value, choices)
    if is_mapping(annotation):
        item = typing.get_args(annotation)[1]
        return {k: dump(item, v, choices) for k, v in value.items()}
    if isinstance(value, tuple):
        items = tuple_items(annotation, len(value))
        return [dump(a, v, choices) for a, v in zip(items, value, strict=True)]
    return value


def _dump_fields(value: Any, choices: Choices) -> Table:
    hints = typing.get_type_hints(type(value))
    return {
        f.name: dump(hints[f.name], getattr(value, f.name), choices)
        for f in dataclasses.fields(value)
        if f.init and is_settable(hints[f.name], choices)
    }


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
    default_name = None if default is None else name_in(names, default)
    name = table.pop("name", default_name)
    if name is None:
        raise ConfigError(f"{path or 'table'}: expected a name, one of {', '.join(names)}")
    require_one_of(_dot(path, "name"), name, names)
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
    settable = [n for n in fields if n not in arguments and is_settable(hints[n], choices)]
    for key in value:
        if key not in settable:
            expected = listed(settable) if settable else "none: it has no options"
            raise ConfigError(
                f"{path or 'configuration'}: unknown option {key!r}, expected {expected}"
                f"{did_you_mean(key, settable)}"
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
            expected = describe_expected(hints[name], choices)
            raise ConfigError(f"{_dot(path, name)}: expected {expected}, got nothing")
        else:
            arguments[name] = inherited
    try:
        return cls(**arguments)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path or 'configuration'}: {error}") from error


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
    simple = [m for m in members if m not in choices and accepts(m, value)]
    if simple:  # an integer is also a number: take the member that changes nothing
        exact = [m for m in simple if m is type(value)]
        return build((exact or simple)[0], value, choices, path=path)
    structured = [m for m in members if m in choices or dataclasses.is_dataclass(m)]
    if isinstance(value, str):
        structured = [m for m in structured if value in choices.get(m, ())]
    elif isinstance(value, Mapping):
        name = value.get("name")
        named = [m for m in structured if name is None or _may_be_named(m, name, choices)]
        structured = named or structured
    else:
        structured = [
            m for m in members if typing.get_origin(m) is tuple and isinstance(value, list)
        ]
    if not structured:
        raise _mismatch(annotation, value, choices, path)
    holder = structured[0]
    fits = default is not None and holds(holder, default, choices)
    return build(holder, value, choices, path=path, default=default if fits else None, given=given)


def _may_be_named(annotation: Any, name: Any, choices: Choices) -> bool:
    return annotation not in choices or (isinstance(name, str) and name in choices[annotation])


def _build_tuple(
    annotation: Any, value: Any, choices: Choices, path: str, given: Mapping[str, Any] | None
) -> Any:
    if not isinstance(value, list | tuple):
        raise _mismatch(annotation, value, choices, path)
    items = tuple_items(annotation, len(value))
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


def _member_holding(annotation: Any, value: Any, choices: Choices) -> Any:
    for member in typing.get_args(annotation):
        if holds(member, value, choices):
            return member
    raise ConfigError(
        f"no name is known for {value!r} where {describe_expected(annotation, choices)} goes"
    )


def _mismatch(annotation: Any, value: Any, choices: Choices, path: str) -> ConfigError:
    expected = describe_expected(annotation, choices)
    meant = did_you_mean(value, names_of(annotation, choices)) if isinstance(value, str) else ""
    return ConfigError(f"{path or 'value'}: expected {expected}, got {value!r}{meant}")


def _dot(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
