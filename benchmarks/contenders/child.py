"""What every contender's process does: read commands, take steps, time them, answer.

One JSON object a line. Commands on standard input:

    {"do": "setup", "workload": {...}, "method": ..., "device": ..., "dtype": ..., ...}
    {"do": "step", "count": n}      {"do": "save", "path": ...}      {"do": "close"}

The answer to each comes on what was standard output; what libraries print goes to standard error.
NumPy and everything else that is timed is imported after the command `setup`.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.workloads import Network, Workload


@dataclass
class Setup:
    """What the parent asks for."""

    workload: Workload
    method: str
    device: str
    dtype: str
    threads: int
    tf32: bool
    options: dict[str, Any]

    @classmethod
    def of(cls, message: dict[str, Any]) -> Setup:
        """From a command."""
        table = dict(message["workload"])
        network = {k: tuple(v) if isinstance(v, list) else v for k, v in table["network"].items()}
        table["network"] = Network(**network)
        names = ("method", "device", "dtype", "threads", "tf32", "options")
        return cls(Workload(**table), *(message[name] for name in names))


@dataclass
class Running:
    """A contender ready to take steps.

    Attributes
    ----------
    step : callable
        Take one step and wait until it is done; return what kind of step it was ("" for the usual
        one, "refresh" where factors were inverted), so that rare kinds are weighted rightly.
    layers : callable or None
        The parameters as NumPy arrays, in the form of `benchmarks.problems`.
    result : callable or None
        Anything else worth recording at the end.
    """

    step: Callable[[], str]
    layers: Callable[[], Any] | None = None
    result: Callable[[], dict[str, Any]] | None = None


class Unsupported(Exception):  # noqa: N818
    """The library cannot do this workload; the message says why."""


def serve(
    libraries: dict[str, str], build: Callable[[Setup], Running], distributions: str = ""
) -> None:
    """Answer commands until there are no more.

    Parameters
    ----------
    libraries : dict
        Modules to import, in order, each with the command that installs it.
    build : callable
    distributions : str
        Packages whose versions are recorded, separated by spaces.
    """
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    running: Running | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            match message["do"]:
                case "setup":
                    setup = Setup.of(message)
                    limit_cores(setup.threads)
                    running, answer = _start(setup, libraries, build)
                    answer["versions"] = versions(distributions)
                case "step":
                    answer = take_steps(running, message["count"])
                case "save":
                    answer = _save(running, message["path"])
                case "close":
                    answer = {"peak_bytes": peak_bytes(), "device_bytes": device_bytes()}
                    if running is not None and running.result is not None:
                        answer["result"] = running.result()
        except Unsupported as error:
            answer = {"unsupported": str(error)}
        except Exception as error:  # whatever a library raises is reported, and ends the contender
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=answers)
        if message["do"] == "close" or answer.keys() & {"unsupported", "error", "missing"}:
            return


def _end_with_parent() -> None:
    """A stopped process would not notice that its parent is gone: let Linux end it."""
    if sys.platform == "linux":
        import ctypes
        import signal

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)


def limit_cores(threads: int) -> None:
    """Keep to the first of the cores this process may use: libraries size their pools by that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _start(
    setup: Setup, libraries: dict[str, str], build: Callable[[Setup], Running]
) -> tuple[Running | None, dict[str, Any]]:
    began = time.perf_counter()
    for name, command in libraries.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            return None, {"missing": f"{error}; {command}"}
    import_seconds = time.perf_counter() - began
    began = time.perf_counter()
    running = build(setup)
    setup_seconds = time.perf_counter() - began
    ready_bytes = peak_bytes()
    began = time.perf_counter()
    running.step()
    first = time.perf_counter() - began
    return running, {
        "import_seconds": import_seconds,
        "setup_seconds": setup_seconds,
        "first_step_seconds": first,
        "ready_bytes": ready_bytes,
        "blas": blas(),
    }


def take_steps(running: Running, count: int) -> dict[str, Any]:
    """Seconds of the clock and of the processor, and seconds spent waiting for a core."""
    return {"steps": [timed(running.step) for _ in range(count)]}


def timed(function: Callable[[], str]) -> dict[str, Any]:
    """Times of one call, which tells what kind of step it was."""
    waited, cpu, began = waiting(), time.process_time(), time.perf_counter()
    kind = function()
    wall = time.perf_counter() - began
    cpu, now = time.process_time() - cpu, waiting()
    wait = None if waited is None or now is None else now - waited
    return {"wall": wall, "cpu": cpu, "wait": wait, "kind": kind}


def waiting() -> float | None:
    """Seconds for which threads of this process were ready to run and had no core (Linux)."""
    total = 0
    try:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/schedstat") as file:
                total += int(file.read().split()[1])
    except (OSError, IndexError):
        return None
    return 1e-9 * total


def peak_bytes() -> int:
    """The most memory that this program has held; `ru_maxrss` would count its parent's, too."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_bytes() -> int | None:
    """The most memory of a GPU that the library in use has held, as it tells itself."""
    modules = sys.modules
    if "jax" in modules:
        devices = modules["jax"].devices()
        return (devices[0].memory_stats() or {}).get("peak_bytes_in_use")
    if "torch" in modules and modules["torch"].cuda.is_available():
        return int(modules["torch"].cuda.max_memory_allocated())
    if "cupy" in modules:
        return int(modules["cupy"].get_default_memory_pool().total_bytes())
    return None


def blas() -> list[str] | None:
    """Thread pools in this process: library, version, kernels' architecture, threads."""
    found = []
    if torch := sys.modules.get("torch"):
        # Its BLAS is linked into it, where threadpoolctl does not see it.
        linked = torch.__config__.show().partition("BLAS_INFO=")[2].partition(",")[0]
        kernels = torch.backends.cpu.get_cpu_capability()
        found.append(f"PyTorch's own {linked} {kernels}, {torch.get_num_threads()} threads")
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return found or None
    for pool in threadpool_info():
        keys = ("internal_api", "version", "architecture", "threading_layer")
        words = [str(pool[key]) for key in keys if pool.get(key)]
        found.append(f"{' '.join(words)}, {pool['num_threads']} threads")
    return found


def versions(distributions: str) -> dict[str, str]:
    """Of Python and of packages."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in distributions.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _save(running: Running | None, path: str) -> dict[str, Any]:
    import numpy as np

    if running is None or running.layers is None:
        raise Unsupported("has no parameters to save")
    arrays = {}
    for i, (weights, bias) in enumerate(running.layers()):
        arrays[f"{i}.W"], arrays[f"{i}.b"] = np.asarray(weights), np.asarray(bias)
    np.savez(path, **arrays)
    return {"saved": path}
