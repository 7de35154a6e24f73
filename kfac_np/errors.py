"""Every error this library raises on purpose, each a subclass of `KfacError`.

A message is one line that names the layer or argument, what was expected, and what came.
"""

from __future__ import annotations

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


class ConfigError(InputError):
    """A setting is unknown, has the wrong type or value, or contradicts another one.

    Examples
    --------
    >>> issubclass(ConfigError, InputError)
    True
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
