"""Single numbers and conditions: 0-d arrays, on the device of what they were computed from.

Reading a number of a GPU makes the host wait until everything queued before it is done, and
the GPU idle while the host queues the next. So a loss, a norm, a damping stay 0-d arrays, on every
backend, and become Python's own in the report of a step. An error that depends on such a number is
a deferred check: it is raised when the number has arrived, which is at once where nothing is
asynchronous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, final

import array_api_compat

from kfac_np.backend.array import Array, array_namespace
from kfac_np.backend.cupy_kernels.transfer import Later, later

__all__ = [
    "DeferredChecks",
    "Scalar",
    "is_asynchronous",
    "on_host",
    "scalar",
    "select",
]

Scalar = Array
"""A 0-d array: a number in float64, or a condition."""


def is_asynchronous(x: object) -> bool:
    """Tell whether calls on `x` return before the work is done, so that reading numbers waits.

    Examples
    --------
    >>> import numpy as np
    >>> is_asynchronous(np.ones(1))
    False
    """
    return array_api_compat.is_cupy_array(x)


def scalar(x: Array | float, like: Array | None = None) -> Scalar:
    """Take a 0-d array as a number, or make one of Python's that is where `like` is.

    Examples
    --------
    >>> import numpy as np
    >>> scalar(np.float32(0.5)).dtype, scalar(0.5, like=np.ones(2)).shape
    (dtype('float64'), ())
    """
    if hasattr(x, "dtype"):
        xp = array_namespace(x)  # type: ignore[arg-type]
        return x if x.dtype == xp.float64 else xp.astype(x, xp.float64)  # type: ignore[return-value]
    assert like is not None, "a number needs a device"
    xp = array_namespace(like)
    return xp.full((), x, dtype=xp.float64, device=like.device)


def select(condition: Scalar | bool, yes: Scalar | float, no: Scalar | float) -> Scalar:
    """`yes` where the condition holds, else `no`; all of them may be Python's own.

    Examples
    --------
    >>> import numpy as np
    >>> float(select(np.float64(2.0) > 1.0, 0.5, 3.0))
    0.5
    """
    if isinstance(condition, bool):
        return yes if condition else no  # type: ignore[return-value]
    if not is_asynchronous(condition):
        return scalar(yes if condition else no, condition)
    xp = array_namespace(condition)
    if not array_api_compat.is_cupy_namespace(xp):  # which takes numbers as they are
        yes, no = scalar(yes, condition), scalar(no, condition)
    return xp.where(condition, yes, no)


def on_host(*conditions: Scalar | bool) -> list[bool]:
    """Conditions as Python's own; the host waits for the device once, and not for each.

    Examples
    --------
    >>> import numpy as np
    >>> on_host(True, np.bool_(False))
    [True, False]
    """
    arrays: list[Any] = [x for x in conditions if is_asynchronous(x)]
    arrived = iter(later(array_namespace(*arrays).stack(arrays)).numpy().tolist() if arrays else ())
    return [next(arrived) if is_asynchronous(x) else bool(x) for x in conditions]


@final
class DeferredChecks:
    """Conditions that must hold, and what is raised when one does not.

    Those that can be looked at are looked at once; those on an asynchronous device wait for
    `wait`, which reads them all in one transfer.

    Examples
    --------
    >>> import numpy as np
    >>> checks = DeferredChecks()
    >>> checks.require(np.float64(1.0) > 0.5, lambda: ValueError("never"))
    >>> checks.require(np.float64(1.0) > 2.0, lambda: ValueError("expected more"))
    Traceback (most recent call last):
    ValueError: expected more
    """

    def __init__(self) -> None:
        self._open: list[tuple[Scalar, Callable[[], Exception]]] = []
        self._sent: Later | None = None

    def require(self, condition: Scalar | bool, error: Callable[[], Exception]) -> None:
        """Raise `error()` unless the condition holds: now, or in `wait`."""
        if is_asynchronous(condition):
            self._open.append((condition, error))  # type: ignore[arg-type]
            self._sent = None
        elif not condition:
            raise error()

    @staticmethod
    def all_hold(each: Sequence[DeferredChecks]) -> list[bool]:
        """Whether all conditions hold, for each; all of them are read in one transfer.

        Examples
        --------
        >>> DeferredChecks.all_hold([DeferredChecks(), DeferredChecks()])
        [True, True]
        """
        found = iter(on_host(*(condition for checks in each for condition, _ in checks._open)))
        return [all([*islice(found, len(checks._open))]) for checks in each]

    @property
    def hold(self) -> Scalar | None:
        """Whether all conditions hold; None if there is none to wait for."""
        if not self._open:
            return None
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
