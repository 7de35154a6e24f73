"""What a GPU would do with the host, on array_api_strict: work ahead of it, and be waited for."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import array_api_strict
import pytest

from kfac_np.backend import Array, Later

_ARRAY = type(array_api_strict.zeros(1))
NUMBERS = ("__bool__", "__float__", "__int__", "__index__", "__complex__")
COPIES = ("__array__", "__buffer__")  # what `to_numpy` ends in
CONVERSIONS = [name for name in (*NUMBERS, *COPIES) if hasattr(_ARRAY, name)]


@contextmanager
def no_sync(late_reads: bool = False) -> Iterator[None]:
    """Within it, making a Python number or a NumPy array of an array is an error.

    With `late_reads`, what was sent by `later` may be read: a step reads the numbers of the last.
    """
    reading = []

    def waiting(convert: Any) -> Any:
        def wait(self, *args, **kwargs):
            if not reading:
                raise AssertionError("the host waits for the device")
            return convert(self, *args, **kwargs)

        return wait

    def numpy(self: Later) -> Any:
        reading.append(self)
        try:
            return read(self)
        finally:
            reading.pop()

    read = Later.numpy
    with pytest.MonkeyPatch.context() as patch:
        for name in CONVERSIONS:
            patch.setattr(_ARRAY, name, waiting(getattr(_ARRAY, name)))
        if late_reads:
            patch.setattr(Later, "numpy", numpy)
        yield


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """Within it, such conversions are counted, each at the line of the package that asks for it."""
    found: Counter[str] = Counter()

    def counting(convert: Any) -> Any:
        def converted(self, *args, **kwargs):
            frames = [f for f in traceback.extract_stack() if "kfac_np" in f.filename]
            found[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""] += 1
            return convert(self, *args, **kwargs)

        return converted

    with pytest.MonkeyPatch.context() as patch:
        for name in CONVERSIONS:
            patch.setattr(_ARRAY, name, counting(getattr(_ARRAY, name)))
        yield found


@contextmanager
def asynchronous() -> Iterator[None]:
    """Within it, arrays of array_api_strict are taken for those of an asynchronous device."""

    def is_asynchronous(x: Array) -> bool:
        return isinstance(x, _ARRAY)

    with pytest.MonkeyPatch.context() as patch:
        for module in (
            "backend.scalars",
            "curvature.base",
            "curvature.ladder",
            "optimizers.reports",
            "trees",
        ):
            patch.setattr(f"kfac_np.{module}.is_asynchronous", is_asynchronous)
        yield
