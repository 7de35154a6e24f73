"""Checks of plain arguments: instances, flags, numbers, functions, names.

What is wrong raises `ConfigError`, which is an `InputError`. The message says whose argument it is,
what was expected and what came: "Dense d_in: expected an integer > 0, got 0". Checks of arrays are
those of `kfac_np.backend`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any, TypeGuard

from kfac_np.errors import ConfigError

__all__ = [
    "did_you_mean",
    "is_integer",
    "is_number",
    "listed",
    "plain_fields",
    "require_callable",
    "require_flag",
    "require_fraction",
    "require_in",
    "require_instance",
    "require_integer",
    "require_number",
    "require_one_of",
    "require_positive",
    "require_sizes",
]


def is_integer(value: object) -> TypeGuard[int]:
    """Tell whether `value` is an integer, of Python or of NumPy; no bool.

    Examples
    --------
    >>> import numpy as np
    >>> is_integer(3), is_integer(np.uint8(3)), is_integer(3.0), is_integer(True)
    (True, True, False, False)
    """
    return isinstance(value, int | numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether `value` is a real number, of Python or of NumPy; no bool.

    Examples
    --------
    >>> import numpy as np
    >>> is_number(0.5), is_number(np.float32(0.5)), is_number("0.5"), is_number(True)
    (True, True, False, False)
    """
    return isinstance(value, float | int | numbers.Real) and not isinstance(value, bool)


def plain_fields(settings: Any) -> None:
    """Make NumPy's numbers Python's own, and lists tuples, in the fields of a frozen dataclass.

    To be called first in `__post_init__`. Settings are then equal, printed and saved alike
    wherever they came from, and a `float64` rate does not turn `float32` parameters into doubles.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Conv
    >>> Conv(np.int64(3), 8, [5, np.int8(5)])
    Conv(3, 8, (5, 5))
    """
    for field in dataclasses.fields(settings):
        object.__setattr__(settings, field.name, _plain(getattr(settings, field.name)))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if is_integer(value):
        return operator.index(value)
    if is_number(value):
        return float(value)  # NumPy's double is a float to Python, too, but not a plain one
    if getattr(value, "shape", None) == () and str(getattr(value, "dtype", "")) == "bool":
        return bool(value)
    return value


def require_instance(what: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Raise `ConfigError` unless `value` is a `kind` (or None, if that may be).

    Examples
    --------
    >>> require_instance("Residual inner", 3, str, optional=True)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: Residual inner: expected a str or None, got 3
    """
    if not isinstance(value, kind) and not (optional and value is None):
        article = "an" if kind.__name__[0] in "AEIOaeio" else "a"
        none = " or None" if optional else ""
        raise ConfigError(f"{what}: expected {article} {kind.__name__}{none}, got {value!r}")


def require_flag(what: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is True or False.

    Examples
    --------
    >>> require_flag("Dense bias", "no")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: Dense bias: expected True or False, got 'no'
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{what}: expected True or False, got {value!r}")


def require_callable(what: str, value: object) -> None:
    """Raise `ConfigError` unless `value` can be called and is no class.

    Examples
    --------
    >>> require_callable("Conv initializer", "he")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: Conv initializer: expected a function, got 'he'
    """
    if not callable(value) or isinstance(value, type):
        raise ConfigError(f"{what}: expected a function, got {value!r}")


def require_integer(what: str, value: object, *, zero: bool = False) -> None:
    """Raise `ConfigError` unless `value` is a positive (or zero, if allowed) integer; no bool.

    Examples
    --------
    >>> require_integer("Refresh interval", 2.5)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: Refresh interval: expected an integer > 0, got 2.5
    """
    if not is_integer(value) or value < (0 if zero else 1):
        raise ConfigError(f"{what}: expected an integer {'>=' if zero else '>'} 0, got {value!r}")


def require_sizes(name: str, **sizes: object) -> None:
    """Raise `ConfigError` unless every size is a positive integer; no bool.

    Examples
    --------
    >>> require_sizes("Dense", d_in=3, d_out=0)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: Dense d_out: expected an integer > 0, got 0
    """
    for option, size in sizes.items():
        require_integer(f"{name} {option}", size)


def require_number(what: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a number; no bool.

    Examples
    --------
    >>> require_number("Cosine warmup", None)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: Cosine warmup: expected a number, got None
    """
    if not is_number(value):
        raise ConfigError(f"{what}: expected a number, got {value!r}")


def require_positive(what: str, value: float, *, zero: bool = False) -> None:
    """Raise `ConfigError` unless `value` is a positive (or zero, if allowed) finite number.

    Examples
    --------
    >>> require_positive("SGD rate", -1.0)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: SGD rate: expected a number > 0, got -1.0
    """
    if not is_number(value) or not (0 < value < math.inf or (zero and value == 0)):
        raise ConfigError(f"{what}: expected a number {'>=' if zero else '>'} 0, got {value!r}")


def require_in(what: str, value: object, interval: str) -> None:
    """Raise `ConfigError` unless `value` is a number in an interval such as "[0, 1)".

    Examples
    --------
    >>> require_in("Dropout rate", 1, "[0, 1)")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: Dropout rate: expected a number in [0, 1), got 1
    """
    low, high = map(float, interval[1:-1].split(","))
    ends = [
        end for end, closed in ((low, interval[0] == "["), (high, interval[-1] == "]")) if closed
    ]
    if not is_number(value) or not (low < value < high or value in ends):
        raise ConfigError(f"{what}: expected a number in {interval}, got {value!r}")


def require_fraction(what: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a number in (0, 1].

    Examples
    --------
    >>> require_fraction("QuadraticModel fraction", 2.0)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: QuadraticModel fraction: expected a number in (0, 1], got 2.0
    """
    require_in(what, value, "(0, 1]")


def require_one_of(what: str, value: object, names: Iterable[str]) -> None:
    """Raise `ConfigError` unless `value` is one of the names.

    Examples
    --------
    >>> require_one_of("pooling", "mean", ["max", "average"])
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: pooling: expected max or average, got 'mean'
    """
    known = list(names)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(
            f"{what}: expected {listed(known)}, got {value!r}{did_you_mean(value, known)}"
        )


def listed(names: Iterable[Any]) -> str:
    """List names in a sentence.

    Examples
    --------
    >>> listed(["a", "b", "c"])
    'a, b or c'
    """
    *most, last = [str(n) for n in names]
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(name: object, known: Iterable[Any]) -> str:
    """Return the end of a message about an unknown name: what may have been meant, or nothing.

    Examples
    --------
    >>> did_you_mean("adma", ["kfac", "sgd", "adam"]), did_you_mean("zzz", ["kfac"])
    ("; did you mean 'adam'?", '')
    """
    names = {str(each).lower().lstrip("-"): str(each) for each in known}
    found = difflib.get_close_matches(str(name).lower().lstrip("-"), names, n=1)
    return f"; did you mean {names[found[0]]!r}?" if found else ""
