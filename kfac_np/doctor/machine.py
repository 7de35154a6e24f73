"""What this process may use of the machine, and the environment variables that say otherwise."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from kfac_np.backend.numpy_kernels.threads import VARIABLES

__all__ = ["KERNELS", "THREADS", "Cores", "cores", "instructions", "processor", "quota", "settings"]

THREADS = VARIABLES
KERNELS = (
    "OPENBLAS_CORETYPE",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "BLIS_ARCH_TYPE",
)
_OTHERS = (
    "OPENBLAS_THREAD_TIMEOUT",
    "NPY_DISABLE_CPU_FEATURES",
    "NPY_ENABLE_CPU_FEATURES",
    "MKL_DYNAMIC",
    "MKL_THREADING_LAYER",
    "OMP_DYNAMIC",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "OMP_THREAD_LIMIT",
    "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "CUPY_ACCELERATORS",
    "CUPY_GPU_MEMORY_LIMIT",
    "CUPY_TF32",
    "NVIDIA_TF32_OVERRIDE",
    "PYTHONDONTWRITEBYTECODE",
)


@final
@dataclass(frozen=True)
class Cores:
    """Processors, as the operating system counts them.

    Attributes
    ----------
    installed : int
    allowed : int
        Those that this process may run on (affinity).
    physical : int or None
        Allowed ones that do not share their arithmetic units with another; None if unknown.
    quota : float or None
        Processor seconds a second that a container allows.

    Examples
    --------
    >>> Cores(installed=64, allowed=8, physical=4, quota=2.5).usable
    3
    """

    installed: int
    allowed: int
    physical: int | None
    quota: float | None

    @property
    def usable(self) -> int:
        """How many threads can run at the same time."""
        return self.allowed if self.quota is None else min(self.allowed, math.ceil(self.quota))


def cores() -> Cores:
    """Count the processors of this process.

    Examples
    --------
    >>> 1 <= cores().usable <= cores().installed
    True
    """
    installed = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        mine = os.sched_getaffinity(0)
        return Cores(installed, len(mine), _physical(mine), quota())
    return Cores(installed, installed, None, quota())


def _physical(mine: Iterable[int]) -> int | None:
    place = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    found = [_read(Path(place.format(i))) for i in mine]
    return None if None in found else len(set(found))


def quota(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Return the processors that the control groups of this process allow, or None.

    Parameters
    ----------
    groups, own : path
        Where Linux mounts control groups, version 1 or 2, and tells those of the process.

    Examples
    --------
    >>> quota() is None or quota() > 0.0
    True
    """
    limits = []
    for line in (_read(own) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [groups / "cpu", groups / controllers] if controllers else [groups]
        inner = Path(path.lstrip("/"))
        for place in (mount / part for mount in mounts for part in (inner, *inner.parents)):
            words = (_read(place / "cpu.max") or "").split()
            if not words:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                words = [_read(place / name) or "" for name in names]
            if all(word.isdigit() for word in words) and int(words[1]) > 0:  # max or -1: no limit
                limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def processor() -> str:
    """Return the processor's name.

    Examples
    --------
    >>> processor() != ""
    True
    """
    return _from_cpuinfo("model name") or platform.processor() or platform.machine() or "unknown"


def instructions() -> frozenset[str]:
    """Return the instruction sets that Linux names on x86; nothing elsewhere.

    Examples
    --------
    >>> all(name.islower() for name in instructions())
    True
    """
    return frozenset(_from_cpuinfo("flags").split())


def settings() -> dict[str, str]:
    """Return those environment variables that are set and change speed, pin kernels or threads.

    Examples
    --------
    >>> set(settings()) <= set(os.environ)
    True
    """
    return {k: os.environ[k] for k in (*THREADS, *KERNELS, *_OTHERS) if k in os.environ}


def _from_cpuinfo(name: str) -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
