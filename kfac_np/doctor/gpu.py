"""Which GPU CuPy computes on, and which one it could."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from typing import Any

__all__ = ["driver_cuda", "gpu"]


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version that the NVIDIA driver supports; None without a driver.

    Examples
    --------
    >>> version = driver_cuda()
    >>> version is None or version > (0, 0)
    True
    """
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value // 1000, version.value % 1000 // 10
    return None


def gpu() -> dict[str, Any]:
    """Return what CuPy says of its current device, JSON-able.

    Returns
    -------
    dict
        Only "missing" (a reason) where CuPy is not installed, only "error" where it is and does
        not work: no device, or a product or a kernel fails; else names, versions and memory in
        bytes.

    Examples
    --------
    >>> found = gpu()
    >>> "missing" in found or "error" in found or found["memory"] > 0
    True
    """
    if importlib.util.find_spec("cupy") is None:
        return {"missing": "CuPy is not installed"}
    try:
        cupy = importlib.import_module("cupy")
        device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(device.id)
        free, total = cupy.cuda.runtime.memGetInfo()
        name = properties["name"]
        _try_out(cupy)
        return {
            "cupy": cupy.__version__,
            "name": name.decode() if isinstance(name, bytes) else str(name),
            "devices": cupy.cuda.runtime.getDeviceCount(),
            "compute_capability": f"{properties['major']}.{properties['minor']}",
            "memory": total,
            "memory_free": free,
            "driver": _version(cupy.cuda.runtime.driverGetVersion()),
            "runtime": _version(cupy.cuda.runtime.runtimeGetVersion()),
        }
    except Exception as error:  # a driver too old, no device, a library not found, ...
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _try_out(cupy: Any) -> None:
    """Make a product and compile a kernel, which load CUDA's libraries: CuPy starts without."""
    ones = cupy.ones((2, 2), dtype=cupy.float32)
    (ones @ ones).get()
    cupy.ElementwiseKernel("T x", "T y", "y = x + T(1)", "kfac_np_try_out")(ones).get()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
