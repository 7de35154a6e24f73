"""Single numbers and conditions, which stay on an asynchronous device.

Reading a number of a GPU makes the host wait until everything queued before it is done, and
the GPU idle while the host queues the next. So on such devices a loss, a norm, a damping stay 0-d
arrays, and errors that depend on them are raised when the numbers have arrived. Everywhere else
numbers are Python's own, and errors are raised at once. The functions here take either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, final

import array_api_compat
import numpy as np

from kfac_np.backend.array import Array, array_namespace
from kfac_np.backend.reductions import every_finite
from kfac_np.backend.transfer import Later, later

__all__ = [
    "DeferredChecks",
    "Scalar",
    "Truth",
    "absolute",
    "are_finite",
    "both",
    "is_asynchronous",
    "isfinite",
    "known",
    "negation",
    "scalar",
    "select",
    "sqrt",
    "truth",
]

Scalar = float | Array
"""A number, or a 0-d float64 array on an asynchronous device."""
Truth = bool | Array
"""A condition, or a 0-d boolean array on an asynchronous device."""

_NUMBERS, _TRUTHS = (int, float, np.number), (bool, np.bool_)  # of the host


def is_asynchronous(x: Array) -> bool:
    """Tell whether calls on `x` return before the work is done, so that reading numbers waits.

    Examples
    --------
    >>> import numpy as np
    >>> is_asynchronous(np.ones(1))
    False
    """
    return array_api_compat.is_cupy_array(x)


def scalar(x: Array) -> Scalar:
    """Take a 0-d array as a number.

    Examples
    --------
    >>> import numpy as np
    >>> scalar(np.float32(0.5))
    0.5
    """
    return array_namespace(x).astype(x, _float64(x), copy=False) if is_asynchronous(x) else float(x)


def truth(x: Truth) -> Truth:
    """Take a 0-d boolean array as a condition.

    Examples
    --------
    >>> import numpy as np
    >>> truth(np.bool_(True))
    True
    """
    return x if not isinstance(x, bool) and is_asynchronous(x) else bool(x)


def known(*conditions: Truth) -> list[bool]:
    """Conditions as Python's own; the host waits for the device once, and not for each.

    Examples
    --------
    >>> known(True, False)
    [True, False]
    """
    late = [x for x in conditions if not isinstance(x, bool)]
    arrived = iter(later(array_namespace(*late).stack(late)).numpy().tolist() if late else ())
    return [x if isinstance(x, bool) else next(arrived) for x in conditions]


def are_finite(*arrays: Array) -> Truth:
    """Tell whether every entry of every array is finite.

    Examples
    --------
    >>> import numpy as np
    >>> are_finite(np.ones(3), np.asarray([np.nan]))
    False
    """
    if not arrays:
        return True
    xp = array_namespace(*arrays)
    if not is_asynchronous(arrays[0]):
        # A sum of finite numbers is finite unless it overflows; no NaN and no Inf vanishes in it.
        with np.errstate(all="ignore"):
            total = sum(float(xp.sum(x)) for x in arrays)
        if math.isfinite(total):
            return True
    return truth(every_finite(*arrays))


def negation(condition: Truth) -> Truth:
    """Not `condition`.

    Examples
    --------
    >>> negation(True)
    False
    """
    return not condition if isinstance(condition, _TRUTHS) else ~condition


def both(first: Truth, second: Truth) -> Truth:
    """`first` and `second`.

    Examples
    --------
    >>> both(True, False)
    False
    """
    if isinstance(first, _TRUTHS):
        return second if first else False
    return both(second, first) if isinstance(second, _TRUTHS) else first & second


def absolute(x: Scalar) -> Scalar:
    """|x|.

    Examples
    --------
    >>> absolute(-2.0)
    2.0
    """
    return abs(x) if isinstance(x, int | float) else array_namespace(x).abs(x)


def isfinite(x: Scalar) -> Truth:
    """Tell whether a number is finite.

    Examples
    --------
    >>> isfinite(math.inf)
    False
    """
    return math.isfinite(x) if isinstance(x, _NUMBERS) else array_namespace(x).isfinite(x)


def sqrt(x: Scalar) -> Scalar:
    """√x of a number >= 0.

    Examples
    --------
    >>> sqrt(4.0)
    2.0
    """
    return math.sqrt(x) if isinstance(x, _NUMBERS) else array_namespace(x).sqrt(x)


def select(condition: Truth, yes: Scalar, no: Scalar) -> Scalar:
    """`yes` where the condition holds, else `no`.

    Examples
    --------
    >>> select(2.0 > 1.0, 0.5, 3.0)
    0.5
    """
    if isinstance(condition, _TRUTHS):
        return yes if condition else no
    xp = array_namespace(condition)
    dtype = _float64(condition)

    def array(x: Scalar) -> Scalar:
        if isinstance(x, _NUMBERS):
            if array_api_compat.is_cupy_namespace(xp):
                return float(x)  # CuPy takes numbers as they are: a kernel less for each
            return xp.full((), x, dtype=dtype, device=condition.device)
        return x

    return xp.where(condition, array(yes), array(no))


def _float64(x: Array) -> Any:
    return array_namespace(x).float64


@final
class DeferredChecks:
    """Conditions that must hold, and what is raised when one does not.

    Those that can be looked at are looked at once; those on an asynchronous device wait for
    `wait`, which reads them all in one transfer.

    Examples
    --------
    >>> checks = DeferredChecks()
    >>> checks.require(1.0 > 0.5, lambda: ValueError("never"))
    >>> checks.require(1.0 > 2.0, lambda: ValueError("expected more"))
    Traceback (most recent call last):
    ValueError: expected more
    """

    def __init__(self) -> None:
        self._open: list[tuple[Array, Callable[[], Exception]]] = []
        self._sent: Later | None = None

    def require(self, condition: Truth, error: Callable[[], Exception]) -> None:
        """Raise `error()` unless the condition holds: now if it is known, or in `wait`."""
        if not isinstance(condition, _TRUTHS):
            self._open.append((condition, error))
            self._sent = None
        elif not condition:
            raise error()

    @staticmethod
    def all_hold(each: Sequence[DeferredChecks]) -> list[bool]:
        """Whether each has none that is right; all of them are read in one transfer.

        Examples
        --------
        >>> DeferredChecks.all_hold([DeferredChecks(), DeferredChecks()])
        [True, True]
        """
        found = iter(known(*(condition for checks in each for condition, _ in checks._open)))
        return [all([*islice(found, len(checks._open))]) for checks in each]

    @property
    def hold(self) -> Truth:
        """Whether all conditions hold."""
        if not self._open:
            return True
        flags = self._flags()
        return array_namespace(flags).all(flags)

    def send(self) -> None:
        """Start the transfer that `wait` waits for."""
        if self._open and self._sent is None:
            self._sent = later(self._flags())

    def _flags(self) -> Array:
        flags = [condition for condition, _ in self._open]
        return array_namespace(*flags).stack(flags)

    def wait(self) -> None:
        """Read the conditions; raise the error of the first that does not hold."""
        self.send()
        if self._sent is None:
            return
        for holds, (_, error) in zip(self._sent.numpy().tolist(), self._open, strict=True):
            if not holds:
                raise error()
        self._open, self._sent = [], None
