"""Every error this library raises on purpose, each a subclass of `KfacError`, and checks.

A message is one line that names the layer or argument, what was expected, and what came.
"""

from __future__ import annotations

import dataclasses
import numbers
import operator
from typing import Any, TypeGuard

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CurvatureError",
    "DataError",
    "DivergenceError",
    "FactorizationError",
    "InputError",
    "KfacError",
    "ShapeError",
    "TargetError",
    "is_integer",
    "is_number",
    "plain_fields",
    "require_callable",
    "require_count",
    "require_in",
    "require_instance",
    "require_sizes",
]


class KfacError(Exception):
    """Base class: catch this to catch everything the library raises on purpose.

    Examples
    --------
    >>> issubclass(ShapeError, KfacError) and issubclass(ShapeError, ValueError)
    True
    """

    def within(self, place: str) -> KfacError:
        """Return the same error with the enclosing `place` put before its message.

        Containers use it so that the message says which of their layers failed.

        Examples
        --------
        >>> print(ShapeError("Dense(3, 2): expected 3 inputs, got 4").within("layer 1"))
        layer 1: Dense(3, 2): expected 3 inputs, got 4
        """
        return type(self)(f"{place}: {self}")


class InputError(KfacError, ValueError):
    """An argument has the wrong value, dtype or device, or is not finite.

    Examples
    --------
    >>> raise InputError("x: expected finite values, got 2 NaN")
    Traceback (most recent call last):
    kfac_np.errors.InputError: x: expected finite values, got 2 NaN
    """


class ShapeError(InputError):
    """An array has the wrong shape.

    Examples
    --------
    >>> issubclass(ShapeError, InputError)
    True
    """


class TargetError(InputError):
    """Targets are out of range, or of the wrong kind for the loss.

    Examples
    --------
    >>> issubclass(TargetError, InputError)
    True
    """


class CurvatureError(KfacError, ValueError):
    """A parameter has no curvature, or a combination is not defined by the theory.

    Examples
    --------
    >>> issubclass(CurvatureError, ValueError)
    True
    """


class FactorizationError(KfacError, ArithmeticError):
    """A matrix could not be factorised: not positive definite, or not finite.

    Examples
    --------
    >>> issubclass(FactorizationError, ArithmeticError)
    True
    """


class DivergenceError(KfacError, ArithmeticError):
    """Training produced a non-finite loss, gradient or update; the state is untouched.

    Examples
    --------
    >>> issubclass(DivergenceError, ArithmeticError)
    True
    """


class ConfigError(KfacError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one.

    Examples
    --------
    >>> issubclass(ConfigError, ValueError)
    True
    """


class DataError(KfacError):
    """A data set is absent, truncated, or not of the expected format.

    Examples
    --------
    >>> issubclass(DataError, KfacError)
    True
    """


class CheckpointError(KfacError):
    """A checkpoint is absent, damaged, or written by something else.

    Examples
    --------
    >>> issubclass(CheckpointError, KfacError)
    True
    """


def is_integer(value: object) -> TypeGuard[int]:
    """Tell whether `value` is an integer, of Python or of NumPy; no bool.

    Examples
    --------
    >>> import numpy as np
    >>> is_integer(3), is_integer(np.uint8(3)), is_integer(3.0), is_integer(True)
    (True, True, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether `value` is a real number, of Python or of NumPy; no bool.

    Examples
    --------
    >>> import numpy as np
    >>> is_number(0.5), is_number(np.float32(0.5)), is_number("0.5"), is_number(True)
    (True, True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


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
    """Raise `InputError` unless `value` is a `kind` (or None, if that may be).

    Examples
    --------
    >>> require_instance("Residual inner", 3, str)
    Traceback (most recent call last):
    kfac_np.errors.InputError: Residual inner: expected a str, got 3
    """
    if not isinstance(value, kind) and not (optional and value is None):
        article = "an" if kind.__name__[0] in "AEIOaeio" else "a"
        raise InputError(f"{what}: expected {article} {kind.__name__}, got {value!r}")


def require_count(what: str, value: object) -> None:
    """Raise `InputError` unless `value` is an integer >= 1; no bool.

    Examples
    --------
    >>> require_count("MonteCarlo: expected samples", 0)
    Traceback (most recent call last):
    kfac_np.errors.InputError: MonteCarlo: expected samples >= 1, got 0
    """
    if not is_integer(value) or value < 1:
        raise InputError(f"{what} >= 1, got {value!r}")


def require_sizes(name: str, **sizes: object) -> None:
    """Raise `InputError` unless every size is a positive integer; no bool.

    Examples
    --------
    >>> require_sizes("Dense", d_in=3, d_out=0)
    Traceback (most recent call last):
    kfac_np.errors.InputError: Dense: expected d_out to be a positive integer, got 0
    """
    for option, size in sizes.items():
        if not is_integer(size) or size < 1:
            raise InputError(f"{name}: expected {option} to be a positive integer, got {size!r}")


def require_callable(what: str, value: object) -> None:
    """Raise `InputError` unless `value` can be called.

    Examples
    --------
    >>> require_callable("Conv initializer", "he")
    Traceback (most recent call last):
    kfac_np.errors.InputError: Conv initializer: expected a function, got 'he'
    """
    if not callable(value) or isinstance(value, type):
        raise InputError(f"{what}: expected a function, got {value!r}")


def require_in(what: str, value: object, low: float, high: float, interval: str) -> None:
    """Raise `InputError` unless `value` is a number with low <= value < high; no bool.

    Examples
    --------
    >>> require_in("Dropout rate", "0.5", 0.0, 1.0, "[0, 1)")
    Traceback (most recent call last):
    kfac_np.errors.InputError: Dropout rate: expected a number in [0, 1), got '0.5'
    """
    if not is_number(value) or not low <= value < high:
        raise InputError(f"{what}: expected a number in {interval}, got {value!r}")
