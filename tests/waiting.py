"""What a GPU would do with the host, on array_api_strict: work ahead of it, and be waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import array_api_strict
import pytest

from kfac_np.backend import Array

CONVERSIONS = ("__bool__", "__float__", "__int__", "__index__", "__complex__")
_ARRAY = type(array_api_strict.zeros(1))


@contextmanager
def no_sync() -> Iterator[None]:
    """Within it, making a Python number of an array is an error."""

    def wait(self, *_):
        raise AssertionError("the host waits for the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in CONVERSIONS:
            patch.setattr(_ARRAY, name, wait)
        yield


@contextmanager
def working_ahead() -> Iterator[None]:
    """Within it, arrays of array_api_strict are taken for those of a device that works ahead."""

    def works_ahead(x: Array) -> bool:
        return isinstance(x, _ARRAY)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("kfac_np.backend.scalars", "kfac_np.objective"):
            patch.setattr(f"{module}.works_ahead", works_ahead)
        yield
