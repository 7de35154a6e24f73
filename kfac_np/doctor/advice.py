"""What to change, from what was measured. Nothing is advised that did not make a difference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from kfac_np.doctor.machine import THREADS
from kfac_np.doctor.trials import AS_IT_IS, ONE_THREAD, numpy_pool

__all__ = ["Advice", "advise", "busy"]

Report = Mapping[str, Any]

_GAIN = 1.15  # less may be chance
_TOLERATED_ERROR = 30.0
_SLOW = 10.0  # GFLOP/s of one thread: any BLAS with kernels for its processor is faster
_VARIABLES = {"openblas": THREADS[0], "mkl": "MKL_NUM_THREADS", "blis": "BLIS_NUM_THREADS"}


@final
@dataclass(frozen=True)
class Advice:
    """Something to do, why, and whether nothing works without it.

    Examples
    --------
    >>> Advice("pip install threadpoolctl", "how many threads there are is unknown").broken
    False
    """

    change: str
    reason: str
    broken: bool = False


def advise(report: Report) -> list[Advice]:
    """Return what to change; what is broken comes first.

    Parameters
    ----------
    report : mapping
        As `kfac_np.doctor.examine` makes it.

    Examples
    --------
    >>> pool = {"owner": "NumPy", "library": "openblas", "threads": 1, "kernels": "Haswell"}
    >>> slow = {"rates": {"1000": 60.0}, "sustained": {"1000": 58.0}, "error": 0.5,
    ...     "processors": 1.0, "pools": [pool]}
    >>> fast = {**slow, "rates": {"1000": 120.0}, "pools": [{**pool, "kernels": "SkylakeX"}]}
    >>> report = {"trials": {"as it is": slow, "1 thread, without OPENBLAS_CORETYPE": fast},
    ...     "environment": {"OPENBLAS_CORETYPE": "Haswell"}, "backend": "numpy", "gpu": {},
    ...     "processor": {"allowed": 1, "quota": None}}
    >>> for advice in advise(report):
    ...     print(f"{advice.change}: {advice.reason}")
    unset OPENBLAS_CORETYPE: it pins slower kernels: one thread reaches 120 instead of 60 ...
    """
    rules = (_broken, _threads, _kernels, _slow_library, _two_pools, _gpu, _unknown)
    found = [advice for rule in rules for advice in rule(report)]
    return sorted(found, key=lambda advice: not advice.broken)


def busy(report: Report) -> float | None:
    """Return the share of its processors that a trial had, if other programs took some.

    Examples
    --------
    >>> trial = {"rates": {}, "processors": 0.5, "pools": None}
    >>> busy({"trials": {"1 thread": trial}, "processor": {"allowed": 2, "quota": None}})
    0.5
    """
    processor = report["processor"]
    most = min(processor["allowed"], processor["quota"] or processor["allowed"])
    shares = []
    for name, trial in _host_trials(report).items():
        pool = numpy_pool(trial)
        threads = 1 if name.startswith(ONE_THREAD) else pool["threads"] if pool else None
        if threads is not None:
            shares.append(trial["processors"] / min(threads, most))
    least = min(shares, default=1.0)
    return least if least < 0.8 else None


def _broken(report: Report) -> list[Advice]:
    found = []
    for name, trial in report["trials"].items():
        if "failed" in trial:
            expected = name != AS_IT_IS.name and not name.startswith("GPU")
            if not expected:
                change = (
                    "find out why products fail" if name == AS_IT_IS.name else f"mend the {name}"
                )
                found.append(Advice(change, trial["failed"], broken=True))
        elif not trial["error"] < _TOLERATED_ERROR:  # NaN, too
            reason = f"{name}: float32 products are wrong by {trial['error']:.3g} times rounding"
            found.append(Advice("replace the BLAS", reason, broken=True))
    return found


def _threads(report: Report) -> list[Advice]:
    """Compare what the machine can do; on a busy one, what there is left of it."""
    share, usual = busy(report), report["trials"].get(AS_IT_IS.name, {})
    others = {n: t for n, t in _host_trials(report).items() if re.fullmatch(r"\d+ threads?", n)}
    kind = "sustained" if share else "rates"
    best = max(others, key=lambda name: _rate(others[name], kind), default=None)
    if best is None or "rates" not in usual:
        return []
    now, then = _rate(usual, kind), _rate(others[best], kind)
    if then < _GAIN * now:
        return []
    pool, number = numpy_pool(usual), int(best.split(" ")[0])
    responsible = [name for name in THREADS if name in report["environment"]]
    if responsible and number == report["processor"]["usable"]:
        change = f"unset {', '.join(responsible)}"
    else:
        variable = _VARIABLES.get(pool["library"] if pool else "", "OMP_NUM_THREADS")
        change = f"set {variable}={number}"
    today = f"{pool['threads']}" if pool else "as many as now"
    quota = report["processor"]["quota"]
    limit = f"; the container allows {quota:g} processors" if quota else ""
    n = max(usual["rates"], key=int)
    reason = f"{n}×{n} products run at {then:.3g} instead of {now:.3g} GFLOP/s"
    reason += f" with {best} instead of {today}{limit}"
    if share:
        change += " while other programs are busy"
        reason += f"; they leave {share:.0%} of the processors (train and compare look themselves)"
    return [Advice(change, reason)]


def _kernels(report: Report) -> list[Advice]:
    """Compare the fastest products of one thread, which a busy machine leaves as they are."""
    trials, found = _host_trials(report), []
    usual = trials.get(ONE_THREAD, trials.get(AS_IT_IS.name))
    for name, trial in trials.items():
        variable = name.removeprefix(f"{ONE_THREAD}, ")
        if variable == name or usual is None or _peak(trial) < _GAIN * _peak(usual):
            continue
        pools = [numpy_pool(trial), numpy_pool(usual)]
        names = " instead of ".join(str(pool["kernels"]) for pool in pools if pool)
        reason = f"one thread reaches {_peak(trial):.0f} instead of {_peak(usual):.0f} GFLOP/s"
        reason += f" with kernels for {names}" if names else ""
        if variable.startswith("without "):
            change = f"unset {variable.removeprefix('without ')}"
            reason = f"it pins slower kernels: {reason}"
        else:
            change = f"set {variable}"
        found.append(Advice(change, reason))
    return found


def _slow_library(report: Report) -> list[Advice]:
    trials = _host_trials(report)
    known = any(numpy_pool(trial) for trial in trials.values())
    rates = [rate for trial in trials.values() for rate in trial["rates"].values()]
    if known or not rates or busy(report) or max(rates) >= _SLOW:
        return []
    reason = f"products run at {max(rates):.2g} GFLOP/s: its BLAS seems to have no fast kernels"
    return [Advice("install NumPy's own wheel (pip install --force-reinstall numpy)", reason)]


def _two_pools(report: Report) -> list[Advice]:
    ratio = report["trials"].get("with SciPy", {}).get("switching")
    if ratio is None or ratio < _GAIN or busy(report):
        return []
    reason = (
        f"SciPy brings a BLAS with threads of its own: products by NumPy and SciPy in turn take "
        f"{ratio:.2g} times as long as each by itself (kfac_np calls NumPy's alone)"
    )
    return [Advice("use numpy.linalg instead of scipy.linalg in your own code", reason)]


def _unknown(report: Report) -> list[Advice]:
    trial = report["trials"].get(AS_IT_IS.name, {})
    if "rates" not in trial or trial["pools"] is not None:
        return []
    reason = "without it kernels and the number of threads are unknown"
    return [Advice("pip install threadpoolctl", reason)]


def _gpu(report: Report) -> list[Advice]:
    gpu, wanted = report["gpu"], report["backend"] == "cupy"
    if "error" in gpu:
        change = "mend CuPy or the driver"
        if re.search(r"ImportError|OSError|lib(cublas|cudart|nvrtc)|CUDA_PATH", gpu["error"]):
            twelve = (report.get("driver_cuda") or (13, 0))[0] == 12
            wheel = (
                "pip install 'cupy-cuda12x[ctk]'" if twelve else "pip install 'cupy-cuda13x[ctk]'"
            )
            change = f"install CUDA's libraries: {wheel}"
        return [Advice(change, gpu["error"], broken=wanted)]
    if "missing" in gpu:
        driver = report.get("driver_cuda")
        if driver is None:
            reason = f"{gpu['missing']}, and there is no NVIDIA driver"
            return [Advice("choose another backend", reason, broken=True)] if wanted else []
        if driver[0] < 12:
            reason = (
                f"it supports CUDA {driver[0]}.{driver[1]}, and CuPy's packages need 12 or more"
            )
            return [Advice("update the NVIDIA driver", reason, broken=wanted)]
        wheel = "cupy-cuda12x" if driver[0] == 12 else "cupy-cuda13x"
        reason = f"{gpu['missing']}; the NVIDIA driver supports CUDA {driver[0]}.{driver[1]}"
        return [Advice(f"pip install '{wheel}[ctk]'", reason, broken=wanted)]
    trials = report["trials"]
    usual, other = trials.get("GPU", {}), trials.get("GPU, CUPY_TF32=1", {})
    if "rates" not in usual or "rates" not in other or _rate(other) < _GAIN * _rate(usual):
        return []
    reason = (
        f"products run at {_rate(other):.0f} instead of {_rate(usual):.0f} GFLOP/s, "
        "if 10 bits of each factor are enough"
    )
    return [Advice("consider CUPY_TF32=1", reason)]


def _host_trials(report: Report) -> dict[str, Any]:
    """Those on the processor that came to an end; SciPy's is about something else."""
    return {
        name: trial
        for name, trial in report["trials"].items()
        if "rates" in trial and not name.startswith("GPU") and name != "with SciPy"
    }


def _rate(trial: Mapping[str, Any], kind: str = "rates") -> float:
    """Of the largest size: a step's time is there."""
    rates: Mapping[str, float] = trial[kind]
    return rates[max(rates, key=int)]


def _peak(trial: Mapping[str, Any]) -> float:
    return float(max(trial["rates"].values()))
