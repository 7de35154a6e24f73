"""The report: how fast arrays are computed with here, and what to change."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from kfac_np.doctor import hardware, machine
from kfac_np.doctor.advice import advise, busy
from kfac_np.doctor.gpu import driver_cuda, gpu
from kfac_np.doctor.trials import (
    AS_IT_IS,
    Trial,
    alternatives,
    carry_out,
    numpy_pool,
    on_gpu,
    start,
)
from kfac_np.validation import require_one_of

__all__ = ["examine", "written"]

_INDENT: dict[str, Any] = dict.fromkeys(("initial_indent", "subsequent_indent"), " " * 4)
_PACKAGES = ("kfac_np", "numpy", "scipy", "array-api-compat", "threadpoolctl", "torch")


def examine(backend: str = "numpy", seconds: float = 2.0) -> dict[str, Any]:
    """Look at this machine and measure; the result is JSON-able and names no directory.

    Parameters
    ----------
    backend : {"numpy", "cupy"}
        With cupy the GPU is measured as well.
    seconds : float
        Of products, for all trials together.

    Raises
    ------
    ConfigError
        Another backend.

    Examples
    --------
    >>> examine("torch")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: examine backend: expected numpy or cupy, got 'torch'
    """
    require_one_of("examine backend", backend, ("numpy", "cupy"))
    cores, settings = machine.cores(), machine.settings()
    first = start(AS_IT_IS, 0.01)
    trials = [AS_IT_IS]
    if "failed" not in first:
        trials += alternatives(first, cores, settings, machine.instructions())
    versions = {name: _version(name) for name in _PACKAGES}
    if versions["scipy"] is not None:
        trials.append(Trial("with SciPy", {}, {"scipy": True, "sizes": [250]}))
    device = gpu()
    if backend == "cupy" and "name" in device:
        trials += on_gpu(settings)
    report: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "processor": {
            "name": machine.processor(),
            **asdict(cores),
            "usable": cores.usable,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "environment": settings,
        "blas": hardware.built_with(),
        "denormals": hardware.denormal_slowdown(),
        "backend": backend,
        "gpu": device,
        "driver_cuda": driver_cuda(),
        "trials": carry_out(trials, seconds),
    }
    return {**report, "advice": [asdict(one) for one in advise(report)]}


def written(report: Mapping[str, Any]) -> Iterator[str]:
    r"""Write a report out, line by line.

    Examples
    --------
    >>> failed = {"as it is": {"failed": "no such library"}}
    >>> versions = {"numpy": "2.4", "scipy": None}
    >>> report = {"versions": versions, "platform": "Linux", "trials": failed,
    ...     "processor": {"name": "x", "allowed": 1, "installed": 2, "physical": 1, "quota": None,
    ...         "load": None},
    ...     "blas": "openblas", "environment": {}, "denormals": 1.0, "gpu": {"missing": "no CuPy"},
    ...     "driver_cuda": None, "advice": []}
    >>> print("\n".join(written(report)))
    numpy 2.4
    ...
    processor    x: 1 of 2 cores may be used
    NumPy        built with openblas; kernels and threads unknown
    ...
    as it is  failed: no such library
    ...
    """
    versions = {name: version for name, version in report["versions"].items() if version}
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    yield report["platform"]
    yield ""
    yield f"processor    {_processor(report['processor'])}"
    yield from _libraries(report)
    names = " ".join(f"{name}={value}" for name, value in report["environment"].items())
    yield f"environment  {names or 'nothing set'}"
    slower = report["denormals"]
    said = "become zero" if slower is None else f"take {slower:.2g} times as long as usual ones"
    yield f"denormals    float32 numbers below 1.2e-38 {said}"
    yield f"GPU          {_gpu(report)}"
    yield ""
    yield from _rates(report["trials"], busy(report))
    yield ""
    yield "What to change"
    for one in report["advice"]:
        yield f"  {'BROKEN: ' if one['broken'] else ''}{one['change']}"
        yield textwrap.fill(f"because {one['reason']}", 96, **_INDENT)
    if not report["advice"]:
        yield "  nothing"


def _processor(found: Mapping[str, Any]) -> str:
    text = f"{found['name']}: {found['allowed']} of {found['installed']} cores may be used"
    if found["physical"] is not None and found["physical"] < found["allowed"]:
        text += f", which are {found['physical']} with arithmetic units of their own"
    if found["quota"] is not None:
        text += f", for {found['quota']:g} processor seconds a second"
    return text if found["load"] is None else f"{text}; load {found['load']:.1f}"


def _libraries(report: Mapping[str, Any]) -> Iterator[str]:
    """NumPy's BLAS, and SciPy's where it is installed."""
    trials = report["trials"]
    trial = trials.get("with SciPy", trials[AS_IT_IS.name])
    if "failed" in trial:
        trial = trials[AS_IT_IS.name]
    if trial.get("pools") is None or numpy_pool(trials[AS_IT_IS.name]) is None:
        yield f"NumPy        built with {report['blas']}; kernels and threads unknown"
    for pool in sorted(trial.get("pools") or (), key=lambda pool: str(pool["owner"])):
        kernels = f"{pool['kernels']} kernels, " if pool["kernels"] else ""
        version = f" {pool['version']}" if pool["version"] else ""
        place = f"{pool['owner']:12} {pool['library']}{version}"
        yield f"{place}, {kernels}{_count(pool)} ({pool['threading'] or pool['file']})"
    if report["versions"]["scipy"] is None:
        yield "SciPy        not installed (not needed): no second BLAS"
    elif trial.get("switching") is not None and not busy(report):
        yield f"SciPy        products in turn with NumPy's: ×{trial['switching']:.2f} the time"


def _rates(trials: Mapping[str, Any], share: float | None) -> Iterator[str]:
    kind = "sustained" if share else "rates"
    width = max(map(len, trials))
    header: list[str] = []
    for name, trial in trials.items():
        if "failed" in trial:
            yield f"{name:{width}}  failed: {trial['failed']}"
        elif name != "with SciPy":
            if list(trial[kind]) != header:
                header = list(trial[kind])
                yield f"{'GFLOP/s':{width}}" + "".join(f"{f'{n}×{n}':>12}" for n in header)
            rates = "".join(f"{rate:12.1f}" for rate in trial[kind].values())
            blas = "" if name.startswith("GPU") else _blas(trial)
            yield f"{name:{width}}{rates}  {blas}".rstrip()
    if share:
        yield f"of all products together: other programs left {share:.0%} of the processors"


def _blas(trial: Mapping[str, Any]) -> str:
    pool = numpy_pool(trial)
    if pool is None:
        return ""
    return f"{pool['kernels'] or pool['library']}, {_count(pool)}"


def _count(pool: Mapping[str, Any]) -> str:
    return f"{pool['threads']} thread{'s' * (pool['threads'] != 1)}"


def _gpu(report: Mapping[str, Any]) -> str:
    device, driver = report["gpu"], report["driver_cuda"]
    if "name" not in device:
        reason = device.get("missing") or device["error"]
        supports = f"a driver for CUDA {driver[0]}.{driver[1]}" if driver else "no NVIDIA driver"
        return f"{reason}; {supports}"
    tf32 = "allowed" if report["environment"].get("CUPY_TF32", "0") != "0" else "not allowed"
    return (
        f"{device['name']} (1 of {device['devices']}), {device['memory'] / 2**30:.1f} GiB, "
        f"{device['memory_free'] / 2**30:.1f} free; CuPy {device['cupy']}, "
        f"CUDA {device['runtime']}, driver for CUDA {device['driver']}; TF32 {tf32}"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
