"""Own errors before NumPy's: what is not finite is told of by name, where it is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

__all__ = ["quiet", "quiet_methods"]

F = TypeVar("F", bound=Callable[..., Any])


def quiet(function: F) -> F:
    """Let NumPy compute NaN and Inf in it without a word, whatever `numpy.seterr` says.

    For the doors, functions that users call: they raise this library's errors about what is not
    finite, which NumPy's warnings, or errors under ``numpy.seterr(all="raise")``, would anticipate.

    Examples
    --------
    >>> @quiet
    ... def square(x):
    ...     return x * x
    >>> with np.errstate(all="raise"):
    ...     square(np.asarray([1e200]))
    array([inf])
    """
    return np.errstate(all="ignore")(function)


def quiet_methods(cls: type, *names: str) -> None:
    """Make those of the methods `quiet` that a class defines itself; for `__init_subclass__`.

    Examples
    --------
    >>> class Squares:
    ...     def of(self, x):
    ...         return x * x
    >>> quiet_methods(Squares, "of", "or_something_else")
    >>> with np.errstate(all="raise"):
    ...     Squares().of(np.asarray([1e200]))
    array([inf])
    """
    for name in names:
        if name in vars(cls):
            setattr(cls, name, quiet(vars(cls)[name]))
