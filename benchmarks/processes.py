"""Contenders as processes that take turns: one runs, the others are stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Variables that pin kernels of a BLAS, its precision, or the number of threads: a contender is
# measured as it is installed, with the number of threads asked for.
DISTORTING = re.compile(
    r"(OPENBLAS|GOTO|MKL|BLIS|NVPL|ATLAS|VECLIB|ARMPL|FLEXIBLAS|ONEDNN|DNNL|OMP|KMP|GOMP|XLA|JAX"
    r"|TF|CUPY|CUBLAS|NUMEXPR|NPY|ATEN|TORCH|PYTORCH)_|NPROC$|PJRT_NPROC$|NVIDIA_TF32"
    r"|GLIBC_TUNABLES$|MALLOC_"
)
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NPROC", "PJRT_NPROC",
)  # fmt: skip


class ContenderError(Exception):
    """A contender that does not go on, and why."""


def environment(threads: int, device: str = "cpu", tf32: bool = False) -> dict[str, str]:
    """For a child: the parent's without what distorts, and the thread count in every usual way."""
    env = {k: v for k, v in os.environ.items() if not DISTORTING.match(k)}
    if device == "cpu":
        env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        env |= {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        env |= {"CUPY_TF32": "1"} if tf32 else {"NVIDIA_TF32_OVERRIDE": "0"}
    env["PYTHONPATH"] = ""
    return env | dict.fromkeys(THREAD_VARIABLES, str(threads))


def removed() -> list[str]:
    """Variables of this process that its children do not get."""
    return sorted(k for k in os.environ if DISTORTING.match(k))


class Process:
    """A contender's process; stopped (SIGSTOP) except during its turns, so that no thread spins."""

    def __init__(self, python: str, program: str, env: dict[str, str], log: Path | None) -> None:
        self.program = program
        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(log.open("ab")) if log else subprocess.DEVNULL
            try:
                self.child = subprocess.Popen(
                    [python, "-m", f"benchmarks.contenders.{program}"],
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
            except OSError as error:
                raise ContenderError(f"cannot start {python}: {error}") from error
        self._buffer = b""
        self._log = log

    def ask(self, timeout: float = 600.0, **message: Any) -> dict[str, Any]:
        """Send a command, wait for its answer; the process runs only meanwhile."""
        assert self.child.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self.child.stdin.write(json.dumps(message).encode() + b"\n")
            self.child.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(timeout))
        except (BrokenPipeError, EOFError) as error:
            raise ContenderError(f"ended{self._last_words()}") from error
        self._signal(signal.SIGSTOP)
        for trouble in ("missing", "unsupported", "error"):
            if trouble in answer:
                raise ContenderError(f"{trouble}: {answer[trouble]}")
        return answer

    def processor_seconds(self) -> float:
        """All it has used so far (Linux; 0 elsewhere)."""
        try:
            fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))

    def close(self) -> dict[str, Any]:
        """Ask for its last words and end it."""
        try:
            if self.child.poll() is None:
                return self.ask(timeout=60.0, do="close")
        except ContenderError:
            pass
        finally:
            self.child.kill()
            self.child.wait()
            for stream in (self.child.stdin, self.child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        return {}

    def _line(self, timeout: float) -> bytes:
        assert self.child.stdout is not None
        until = time.monotonic() + timeout
        descriptor = self.child.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise ContenderError(f"gave no answer within {timeout:.0f} s")
            data = os.read(descriptor, 65536)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _signal(self, number: int) -> None:
        if self.child.poll() is None:
            self.child.send_signal(number)

    def _last_words(self) -> str:
        if self._log is None or not self._log.exists():
            return ""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""
