"""Rates in fresh processes that differ by environment variables: as it is, and as it might be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from kfac_np.doctor.machine import KERNELS, THREADS, Cores

__all__ = ["AS_IT_IS", "ONE_THREAD", "Trial", "alternatives", "carry_out", "on_gpu", "start"]

SIZES, GPU_SIZES = (250, 500, 1000), (1000, 2000, 4000)
_ROUNDS = 2
_TIMEOUT = 100.0
_PROGRAM = """\
import json, sys
from kfac_np.doctor.hardware import measure
print(json.dumps(measure(**json.loads(sys.argv[1]))))
"""
# The OpenBLAS kernels that a processor with these instruction sets should have, the best first.
_BEST = (
    (frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}), "SkylakeX"),
    (frozenset({"avx2", "fma"}), "Haswell"),
)
_AS_GOOD = {
    "SkylakeX": ("skylakex", "cooperlake", "sapphirerapids"),
    "Haswell": ("haswell", "zen", "skylakex", "cooperlake", "sapphirerapids"),
}


@final
@dataclass(frozen=True)
class Trial:
    """One way to run a program.

    Attributes
    ----------
    name : str
    changes : mapping from str to str or None
        Environment variables to set, or to remove.
    options : mapping
        Those of `kfac_np.doctor.hardware.measure` that differ from the usual ones.

    Examples
    --------
    >>> Trial("without OPENBLAS_CORETYPE", {"OPENBLAS_CORETYPE": None}).options
    {}
    """

    name: str
    changes: Mapping[str, str | None] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


AS_IT_IS = Trial("as it is")
ONE_THREAD = "1 thread"


def alternatives(
    found: Mapping[str, Any], cores: Cores, settings: Mapping[str, str], flags: frozenset[str]
) -> list[Trial]:
    """Return what is worth comparing with how it is.

    Parameters
    ----------
    found : mapping
        What was measured as it is.
    cores : Cores
    settings : mapping
        The environment variables that are set (`machine.settings`).
    flags : frozenset of str
        The processor's instruction sets.

    Examples
    --------
    >>> found = {"pools": [{"owner": "NumPy", "library": "openblas", "threads": 1,
    ...     "kernels": "Haswell"}]}
    >>> pinned = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1"}
    >>> trials = alternatives(found, Cores(2, 2, 2, None), pinned, frozenset())
    >>> [trial.name for trial in trials]
    ['2 threads', '1 thread, without OPENBLAS_CORETYPE']
    """
    pool = numpy_pool(found)
    threads = None if pool is None else pool["threads"]
    counts = {1, cores.usable, min(cores.physical or cores.usable, cores.usable)}
    trials = [_with_threads(n) for n in sorted(counts) if n != threads]
    pinned = [name for name in KERNELS if name in settings]
    trials += [_with_kernels(f"without {name}", {name: None}) for name in pinned]
    if pool is not None and pool["library"] == "openblas" and not pinned:
        best = next((core for needed, core in _BEST if needed <= flags), None)
        if best and (pool["kernels"] or "").lower() not in _AS_GOOD[best]:
            trials.append(_with_kernels(f"OPENBLAS_CORETYPE={best}", {"OPENBLAS_CORETYPE": best}))
    return trials


def on_gpu(settings: Mapping[str, str]) -> list[Trial]:
    """Return the trials of a GPU: as it is, and with the other choice about TF32.

    Examples
    --------
    >>> [trial.name for trial in on_gpu({})]
    ['GPU', 'GPU, CUPY_TF32=1']
    """
    other = "0" if settings.get("CUPY_TF32", "0") != "0" else "1"
    options = {"backend": "cupy", "sizes": GPU_SIZES}
    return [
        Trial("GPU", {}, options),
        Trial(f"GPU, CUPY_TF32={other}", {"CUPY_TF32": other}, options),
    ]


def numpy_pool(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return NumPy's BLAS among what was found, or else the only one; None if unknown.

    Examples
    --------
    >>> numpy_pool({"pools": None}) is None
    True
    """
    blas = [pool for pool in found.get("pools") or () if pool["library"] != "openmp"]
    own = [pool for pool in blas if pool["owner"] == "NumPy"]
    return own[0] if own else blas[0] if len(blas) == 1 else None


def carry_out(trials: Sequence[Trial], seconds: float) -> dict[str, dict[str, Any]]:
    """Make each trial, twice and by turns, and keep the better rates of each.

    Of sustained rates the mean is kept: what other programs take is meant to be in them.

    Parameters
    ----------
    trials : sequence of Trial
    seconds : float
        Of products, for all trials together.

    Returns
    -------
    dict
        Name -> what `measure` returned, or "failed" with a reason.

    Examples
    --------
    >>> sorted(carry_out([Trial("small", {}, {"sizes": [16]})], 0.01)["small"])
    ['error', 'pools', 'processors', 'rates', 'sustained']
    """
    share = seconds / (_ROUNDS * max(len(trials), 1))
    found: dict[str, dict[str, Any]] = {}
    for trial in [trial for _ in range(_ROUNDS) for trial in trials]:
        new = start(trial, share)
        old = found.get(trial.name)
        if old is not None and "rates" in old and "rates" in new:
            new["rates"] = {n: max(rate, old["rates"][n]) for n, rate in new["rates"].items()}
            both = new["sustained"], old["sustained"]
            new["sustained"] = {n: (both[0][n] + both[1][n]) / 2 for n in both[0]}
            for name, better in (("error", max), ("processors", max)):
                new[name] = better(new[name], old[name])
        found[trial.name] = new
    return found


def start(trial: Trial, seconds: float) -> dict[str, Any]:
    """Measure in a process of its own.

    Examples
    --------
    >>> start(Trial("none", {}, {"sizes": []}), 0.1)
    {'failed': '... measure: expected sizes and a time, got [] and 0.1'}
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name, value in trial.changes.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    options = {"sizes": SIZES, "seconds": seconds, **trial.options}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROGRAM, json.dumps(options)],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {_TIMEOUT:.0f} seconds"}
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    reason = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
    return {"failed": f"signal {-done.returncode}" if done.returncode < 0 else reason}


def _with_threads(n: int) -> Trial:
    return Trial(ONE_THREAD if n == 1 else f"{n} threads", dict.fromkeys(THREADS, str(n)))


def _with_kernels(name: str, changes: Mapping[str, str | None]) -> Trial:
    """Of one thread: other programs can then delay some products, but hardly the fastest one."""
    return Trial(f"{ONE_THREAD}, {name}", {**dict.fromkeys(THREADS, "1"), **changes})
