"""What a type annotation accepts from a configuration, and how to say so."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from kfac_np.errors import ConfigError
from kfac_np.validation import listed

__all__ = [
    "Choices",
    "accepts",
    "describe_expected",
    "has_default",
    "holds",
    "is_mapping",
    "is_settable",
    "is_union",
    "name_in",
    "names_of",
    "tuple_items",
]

Choices = Mapping[Any, Mapping[str, Any]]
"""For each slot, by its annotation: what it may hold, classes and plain functions, by name."""


def tuple_items(annotation: Any, length: int) -> tuple[Any, ...]:
    """Return the annotation of each of `length` entries of a tuple.

    Examples
    --------
    >>> tuple_items(tuple[int, ...], 2)
    (<class 'int'>, <class 'int'>)
    """
    arguments = typing.get_args(annotation)
    return arguments[:1] * length if arguments[-1:] == (...,) else arguments


def accepts(annotation: Any, value: Any) -> bool:
    """Tell whether a plain TOML value is one of a plain annotation.

    Examples
    --------
    >>> accepts(float, 3), accepts(int, True)
    (True, False)
    """
    if typing.get_origin(annotation) is Literal:
        return value in typing.get_args(annotation) and not isinstance(value, bool)
    if annotation is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (isinstance(value, float) or abs(value) <= sys.float_info.max)
    return annotation in (bool, int, str) and type(value) is annotation


def holds(annotation: Any, value: Any, choices: Choices) -> bool:
    """Tell whether an object can be what an annotation stands for.

    Examples
    --------
    >>> holds(float, 1, {}), holds(float, None, {})
    (True, False)
    """
    if annotation in choices:
        return any(c is value or c is type(value) for c in choices[annotation].values())
    if dataclasses.is_dataclass(annotation) or annotation is types.NoneType:
        return isinstance(value, annotation)  # type: ignore[arg-type]
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple)
    return accepts(annotation, value)


def name_in(names: Mapping[str, Any], value: Any) -> str:
    """Return the name of a part, or of an object's class, among the choices of a slot.

    Examples
    --------
    >>> name_in({"big": max, "number": int}, 3)
    'number'
    """
    for name, choice in names.items():
        if choice is value or choice is type(value):
            return name
    raise ConfigError(f"no name is known for {value!r}; known are {', '.join(names)}")


def is_union(annotation: Any) -> bool:
    """Tell whether an annotation is a union.

    Examples
    --------
    >>> is_union(int | None)
    True
    """
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def is_mapping(annotation: Any) -> bool:
    """Tell whether an annotation is a mapping from names.

    Examples
    --------
    >>> is_mapping(dict[str, int])
    True
    """
    return typing.get_origin(annotation) in (Mapping, dict)


def is_settable(annotation: Any, choices: Choices) -> bool:
    """Tell whether a configuration can set such a field (a network, for example, it cannot).

    Examples
    --------
    >>> is_settable(float | None, {}), is_settable(object, {})
    (True, False)
    """
    if annotation in choices:
        return True
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        needed = [f for f in dataclasses.fields(annotation) if f.init and not has_default(f)]
        return all(is_settable(hints[f.name], choices) for f in needed)
    arguments = typing.get_args(annotation)
    if is_union(annotation) or typing.get_origin(annotation) is tuple:
        return all(is_settable(m, choices) for m in arguments if m is not ...)
    if is_mapping(annotation):
        return is_settable(arguments[1], choices)
    plain = (bool, int, float, str, types.NoneType)
    return annotation in plain or typing.get_origin(annotation) is Literal


def has_default(field: dataclasses.Field[Any]) -> bool:
    """Tell whether a dataclass field may be left out.

    Examples
    --------
    >>> @dataclasses.dataclass
    ... class Point:
    ...     x: int
    ...     y: int = 0
    >>> [has_default(field) for field in dataclasses.fields(Point)]
    [False, True]
    """
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def describe_expected(annotation: Any, choices: Choices) -> str:
    """Say in words what a place of the configuration takes.

    Examples
    --------
    >>> describe_expected(float | None, {}), describe_expected(tuple[int, ...], {})
    ("a number or 'none'", 'a list, each entry an integer')
    """
    if annotation in choices:
        return listed(choices[annotation])
    if is_union(annotation):
        return " or ".join(describe_expected(m, choices) for m in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return listed(typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        items = typing.get_args(annotation)
        if items[-1:] == (...,):
            return f"a list, each entry {describe_expected(items[0], choices)}"
        return f"a list of {len(items)} entries"
    if dataclasses.is_dataclass(annotation) or is_mapping(annotation):
        return "a table"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return words.get(annotation, "'none'")


def names_of(annotation: Any, choices: Choices) -> list[str]:
    """Return the names that a place of the configuration takes, apart from other values.

    Examples
    --------
    >>> names_of(Literal["float32", "float64"] | int, {})
    ['float32', 'float64']
    """
    if annotation in choices:
        return list(choices[annotation])
    if typing.get_origin(annotation) is Literal:
        return [str(name) for name in typing.get_args(annotation)]
    members = typing.get_args(annotation) if is_union(annotation) else ()
    return [name for member in members for name in names_of(member, choices)]
