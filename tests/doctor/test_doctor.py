"""The command doctor: what it measures, concludes and prints, here and on machines made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kfac_np.cli import main
from kfac_np.doctor import gpu as gpus
from kfac_np.doctor import hardware, machine, report, trials
from kfac_np.doctor.advice import advise
from kfac_np.doctor.machine import Cores
from kfac_np.doctor.trials import AS_IT_IS, Trial, alternatives, on_gpu, start

AVX512 = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
NO_GPU: dict[str, Any] = {"missing": "CuPy is not installed"}
GPU: dict[str, Any] = {
    "cupy": "13.6.0",
    "name": "NVIDIA H100",
    "devices": 1,
    "compute_capability": "9.0",
    "memory": 80 * 2**30,
    "memory_free": 79 * 2**30,
    "driver": "12.8",
    "runtime": "12.9",
}

World = Callable[[Mapping[str, str]], dict[str, Any]]


def measured(
    rate: float,
    threads: int = 1,
    kernels: str = "SkylakeX",
    *,
    processors: float | None = None,
    known: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """What a process would have found."""
    pool = {
        "owner": "NumPy",
        "library": "openblas",
        "version": "0.3.30",
        "kernels": kernels,
        "threading": "pthreads",
        "threads": threads,
        "file": "libopenblas.so",
    }
    return {
        "rates": {"250": 0.5 * rate, "1000": rate},
        "sustained": {"250": 0.4 * rate, "1000": 0.8 * rate},
        "error": 0.5,
        "processors": float(threads) if processors is None else processors,
        "pools": [pool] if known else None,
        **more,
    }


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make up a machine: what its processes measure, given their environment, and the rest."""

    def pretend_(
        world: World,
        cores: Cores,
        environment: Mapping[str, str] | None = None,
        gpu: Mapping[str, Any] = NO_GPU,
        cuda: tuple[int, int] | None = None,
    ) -> None:
        for name in {*machine.settings(), *machine.THREADS, "CUPY_TF32"}:
            monkeypatch.delenv(name, raising=False)
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)

        def start_(trial: Trial, seconds: float) -> dict[str, Any]:
            changed = {**os.environ, **trial.changes}
            variables = {name: value for name, value in changed.items() if value is not None}
            return world({**variables, "backend": trial.options.get("backend", "numpy")})

        monkeypatch.setattr(trials, "start", start_)
        monkeypatch.setattr(report, "start", start_)
        monkeypatch.setattr(machine, "cores", lambda: cores)
        monkeypatch.setattr(machine, "instructions", lambda: AVX512)
        monkeypatch.setattr(report, "gpu", lambda: gpu)
        monkeypatch.setattr(report, "driver_cuda", lambda: cuda)
        monkeypatch.setattr(report, "_version", lambda name: None if name == "scipy" else "1.0")

    return pretend_


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[tuple[str, str]]]:
    """Exit code, and what is to be changed with its reason."""
    code = main(["doctor", *words, "--json"])
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert code == any(one["broken"] for one in advice)
    return code, [(one["change"], one["reason"]) for one in advice]


def threads_of(environment: Mapping[str, str], usual: int) -> int:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    return int(next((environment[name] for name in names if name in environment), usual))


def test_a_real_machine() -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "kfac_np", "doctor", "--seconds", "0.1", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert all(rate > 0.0 for rate in found["trials"]["as it is"]["rates"].values())
    assert found["environment"]["OPENBLAS_NUM_THREADS"] == "1"
    assert str(Path.home()) not in done.stdout
    text = "\n".join(report.written(found))
    assert "GFLOP/s" in text
    assert text.splitlines()[text.splitlines().index("What to change") + 1 :]


def test_a_child_obeys_its_environment() -> None:
    pytest.importorskip("threadpoolctl")
    found = start(Trial("one", dict.fromkeys(machine.THREADS, "1"), {"sizes": [16]}), 0.01)
    pool = trials.numpy_pool(found)
    assert pool is None or pool["threads"] == 1


def test_nothing_to_change(pretend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def world(environment: Mapping[str, str]) -> dict[str, Any]:
        threads = threads_of(environment, 2)
        return measured(100.0 * threads, threads)

    pretend(world, Cores(2, 2, 2, None))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["What to change", "  nothing"]
    assert "NumPy        openblas 0.3.30, SkylakeX kernels, 2 threads (pthreads)" in lines
    assert [line.split()[:2] for line in lines if line.startswith("1 thread")] == [["1", "thread"]]
    assert "SciPy        not installed (not needed): no second BLAS" in lines
    assert "environment  nothing set" in lines


@pytest.mark.parametrize("slower", [0.5, 0.95])
def test_pinned_kernels_matter_only_if_they_are_slower(
    pretend: Any, capsys: pytest.CaptureFixture[str], slower: float
) -> None:
    def world(environment: Mapping[str, str]) -> dict[str, Any]:
        threads, core = threads_of(environment, 2), environment.get("OPENBLAS_CORETYPE")
        return measured(100.0 * threads * (slower if core else 1.0), threads, core or "SkylakeX")

    pretend(world, Cores(2, 2, 2, None), {"OPENBLAS_CORETYPE": "Haswell"})
    reason = "one thread reaches 100 instead of 50 GFLOP/s with kernels for SkylakeX instead of "
    expected = [("unset OPENBLAS_CORETYPE", f"it pins slower kernels: {reason}Haswell")]
    assert run(capsys) == (0, expected if slower == 0.5 else [])


def test_older_kernels_than_the_processor_could_have(
    pretend: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def world(environment: Mapping[str, str]) -> dict[str, Any]:
        core = environment.get("OPENBLAS_CORETYPE", "Prescott")
        return measured(100.0 if core == "SkylakeX" else 25.0, 1, core)

    pretend(world, Cores(1, 1, 1, None))
    code, ((change, reason),) = run(capsys)
    assert (code, change) == (0, "set OPENBLAS_CORETYPE=SkylakeX")
    assert reason.startswith("one thread reaches 100 instead of 25 GFLOP/s")


def test_one_thread_of_two_cores(pretend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def world(environment: Mapping[str, str]) -> dict[str, Any]:
        threads = threads_of(environment, 2)
        return measured(100.0 * threads, threads)

    pretend(world, Cores(2, 2, 2, None), {"OMP_NUM_THREADS": "1"})
    reason = "1000×1000 products run at 200 instead of 100 GFLOP/s with 2 threads instead of 1"
    assert run(capsys) == (0, [("unset OMP_NUM_THREADS", reason)])


@pytest.mark.parametrize(
    ("cores", "best"),
    [
        (Cores(64, 64, 32, 2.0), 2),  # a container
        (Cores(64, 64, 32, None), 32),  # two threads a core
        (Cores(64, 4, 4, None), 4),  # more threads than cores to run on
    ],
)
def test_too_many_threads(
    pretend: Any, capsys: pytest.CaptureFixture[str], cores: Cores, best: int
) -> None:
    def world(environment: Mapping[str, str]) -> dict[str, Any]:
        threads = threads_of(environment, 64)
        rate = 10.0 * threads if threads <= best else 5.0
        most = min(cores.allowed, cores.quota or cores.allowed)
        return measured(rate, threads, processors=min(threads, most))

    pretend(world, cores)
    code, ((change, reason),) = run(capsys)
    assert (code, change) == (0, f"set OPENBLAS_NUM_THREADS={best}")
    assert f"with {best} threads instead of 64" in reason
    assert ("the container allows 2 processors" in reason) == (cores.quota is not None)


def test_without_threadpoolctl(pretend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def world(environment: Mapping[str, str]) -> dict[str, Any]:
        threads = threads_of(environment, 2)
        return measured(100.0 * threads, threads, known=False)

    pretend(world, Cores(2, 2, 2, None), {"OPENBLAS_NUM_THREADS": "1"})
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "kernels and threads unknown" in text
    assert "  unset OPENBLAS_NUM_THREADS\n" in text
    assert "  pip install threadpoolctl\n" in text


def test_threadpoolctl_missing_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert hardware.thread_pools() is None
    assert hardware.pool_switching(0.01) is None
    assert hardware.measure([8], 0.01)["pools"] is None
    assert gpus.gpu() == NO_GPU


@pytest.mark.parametrize("two", [3.0, 130.0])
def test_on_a_busy_machine_the_threads_that_are_faster_now_are_told(
    pretend: Any, capsys: pytest.CaptureFixture[str], two: float
) -> None:
    def world(environment: Mapping[str, str]) -> dict[str, Any]:
        threads = threads_of(environment, 2)
        found = measured(100.0 * threads, threads, processors=0.5)  # of the fastest product
        return {**found, "sustained": {"250": 1.0, "1000": 120.0 if threads == 1 else two}}

    pretend(world, Cores(2, 2, 2, None))
    change = "set OPENBLAS_NUM_THREADS=1 while other programs are busy"
    reason = "1000×1000 products run at 120 instead of 3 GFLOP/s with 1 thread instead of 2; they "
    reason += "leave 25% of the processors (train and compare look themselves)"
    assert run(capsys) == (0, [(change, reason)] if two == 3.0 else [])
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"{two:12.1f}  SkylakeX, 2 threads\n" in text
    assert "of all products together: other programs left 25% of the processors\n" in text


def test_two_pools(pretend: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    pretend(lambda _: measured(100.0, switching=1.6), Cores(1, 1, 1, None))
    monkeypatch.setattr(report, "_version", lambda name: "1.17")
    code, ((change, reason),) = run(capsys)
    assert (code, change) == (0, "use numpy.linalg instead of scipy.linalg in your own code")
    assert "1.6 times as long" in reason


def test_wrong_or_failing_products_are_broken(
    pretend: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(lambda _: measured(100.0, error=float("nan")), Cores(1, 1, 1, None))
    code, ((change, reason),) = run(capsys)
    assert (code, change) == (1, "replace the BLAS")
    assert "wrong" in reason
    pretend(lambda _: {"failed": "signal 4"}, Cores(1, 1, 1, None))
    assert run(capsys) == (1, [("find out why products fail", "signal 4")])
    assert main(["doctor"]) == 1
    assert "BROKEN: find out why products fail" in capsys.readouterr().out


def test_a_blas_without_kernels(pretend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(lambda _: {**measured(1.5), "pools": []}, Cores(1, 1, 1, None))
    code, ((change, _),) = run(capsys)
    assert code == 0
    assert "wheel" in change


@pytest.mark.parametrize(
    ("gpu", "cuda", "change"),
    [
        (NO_GPU, (12, 8), "pip install 'cupy-cuda12x[ctk]'"),
        (NO_GPU, (13, 0), "pip install 'cupy-cuda13x[ctk]'"),
        (NO_GPU, (11, 4), "update the NVIDIA driver"),
        (NO_GPU, None, "choose another backend"),
        ({"error": "CUDARuntimeError: no device"}, None, "mend CuPy or the driver"),
        (
            {"error": "ImportError: libcublas.so.12: cannot open shared object file"},
            (12, 8),
            "install CUDA's libraries: pip install 'cupy-cuda12x[ctk]'",
        ),
    ],
)
def test_no_gpu_is_broken_only_if_it_is_wanted(
    pretend: Any, capsys: pytest.CaptureFixture[str], gpu: Any, cuda: Any, change: str
) -> None:
    pretend(lambda _: measured(100.0), Cores(1, 1, 1, None), {}, gpu, cuda)
    code, advice = run(capsys)
    assert code == 0
    assert [c for c, _ in advice] == ([] if gpu == NO_GPU and cuda is None else [change])
    code, advice = run(capsys, "--backend", "cupy")
    assert (code, [c for c, _ in advice]) == (1, [change])


def test_a_gpu(pretend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def world(environment: Mapping[str, str]) -> dict[str, Any]:
        if environment["backend"] == "numpy":
            return measured(100.0)
        return measured(300e3 if environment.get("CUPY_TF32") == "1" else 50e3)

    pretend(world, Cores(1, 1, 1, None), {}, GPU, (12, 8))
    code, ((change, reason),) = run(capsys, "--backend", "cupy")
    assert (code, change) == (0, "consider CUPY_TF32=1")
    assert reason.startswith("products run at 300000 instead of 50000 GFLOP/s")
    assert main(["doctor", "--backend", "cupy"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H100 (1 of 1), 80.0 GiB, 79.0 free; CuPy 13.6.0, CUDA 12.9, driver for" in text
    assert [trial.name for trial in on_gpu({"CUPY_TF32": "1"})] == ["GPU", "GPU, CUPY_TF32=0"]


def test_what_cupy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(
        getDeviceProperties=lambda i: {"name": b"NVIDIA H100", "major": 9, "minor": 0},
        memGetInfo=lambda: (79 * 2**30, 80 * 2**30),
        getDeviceCount=lambda: 1,
        driverGetVersion=lambda: 12080,
        runtimeGetVersion=lambda: 12090,
    )
    cupy: Any = ModuleType("cupy")
    cupy.__version__ = "13.6.0"
    cupy.cuda = SimpleNamespace(Device=lambda: SimpleNamespace(id=0), runtime=runtime)
    tried: list[str] = []

    class Sample:
        def __matmul__(self, _: Any) -> Sample:
            tried.append("product")
            return self

        def get(self) -> None:
            tried.append("waited")

    def kernel(*_: str) -> Any:
        tried.append("kernel")
        return lambda x: x

    cupy.ones, cupy.float32, cupy.ElementwiseKernel = lambda *_, **__: Sample(), "float32", kernel
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: object())
    assert gpus.gpu() == GPU
    assert tried == ["product", "waited", "kernel", "waited"]
    cupy.ElementwiseKernel = lambda *_: 1 / 0  # without NVRTC
    assert gpus.gpu() == {"error": "ZeroDivisionError: division by zero"}
    cupy.ElementwiseKernel = kernel
    runtime.getDeviceProperties = lambda i: 1 / 0
    assert gpus.gpu() == {"error": "ZeroDivisionError: division by zero"}


def test_quotas_of_control_groups(tmp_path: Path) -> None:
    own, groups = tmp_path / "own", tmp_path / "groups"
    (groups / "a/b").mkdir(parents=True)
    own.write_text("0::/a/b\n")
    assert machine.quota(groups, own) is None
    (groups / "a/b/cpu.max").write_text("max 100000\n")
    assert machine.quota(groups, own) is None
    (groups / "a/cpu.max").write_text("150000 100000\n")  # of the group around it
    assert machine.quota(groups, own) == 1.5
    old = tmp_path / "old/cpu/c"
    old.mkdir(parents=True)
    own.write_text("4:memory:/x\n3:cpu,cpuacct:/c\n")
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.quota(tmp_path / "old", own) is None
    (old / "cpu.cfs_quota_us").write_text("50000\n")
    assert machine.quota(tmp_path / "old", own) == 0.5
    assert machine.quota(tmp_path / "old", tmp_path / "none") is None


def test_what_is_tried() -> None:
    names = [t.name for t in alternatives(measured(1.0, 8), Cores(8, 8, 4, 2.5), {}, AVX512)]
    assert names == ["1 thread", "3 threads"]
    unknown = measured(1.0, known=False)
    assert [t.name for t in alternatives(unknown, Cores(8, 8, 4, None), {}, AVX512)] == [
        "1 thread",
        "4 threads",
        "8 threads",
    ]


def test_children_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_PROGRAM", "import os; os.kill(os.getpid(), 4)")
    assert start(AS_IT_IS, 0.1) == {"failed": "signal 4"}
    monkeypatch.setattr(trials, "_PROGRAM", "raise SystemExit(3)")
    assert start(AS_IT_IS, 0.1) == {"failed": "ended with status 3"}
    monkeypatch.setattr(trials, "_PROGRAM", "import time; time.sleep(9)")
    monkeypatch.setattr(trials, "_TIMEOUT", 0.2)
    assert start(AS_IT_IS, 0.1)["failed"].startswith("not finished")


@pytest.mark.parametrize("words", [["--seconds", "0"], ["--seconds", "x"], ["--backend", "jax"]])
def test_bad_usage(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().err.startswith("kfac-np: error: argument --")


def test_advice_names_what_is_broken_first() -> None:
    report = {
        "trials": {"as it is": measured(99.0, known=False), "GPU": {"failed": "out of memory"}},
        "processor": {"allowed": 1, "usable": 1, "quota": None},
        "environment": {},
        "backend": "cupy",
        "gpu": GPU,
    }
    assert [one.broken for one in advise(report)] == [True, False]
