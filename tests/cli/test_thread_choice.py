"""How many threads a run gets, who decides it, and what is said about it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kfac_np.backend.numpy_kernels import threads
from kfac_np.cli import main
from kfac_np.cli import thread_choice as choice
from kfac_np.doctor import machine
from kfac_np.doctor.machine import Cores
from kfac_np.errors import ConfigError
from kfac_np.training import plots
from kfac_np.training.config import Config, from_table
from kfac_np.training.run import read_config

BUSY, IDLE = {1: 139.0, 2: 2.3}, {1: 139.0, 2: 250.0}
SMALL = ["--data", "digits", "--n-train", "60", "--n-test", "9", "--sizes", "3", "--evaluations=0"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, float]]:
    """What products will be measured to run at, on two cores where nothing has been said."""
    found: list[dict[int, float]] = []
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    monkeypatch.setattr(machine, "cores", lambda: Cores(2, 2, 2, None))
    monkeypatch.setattr(choice, "rates", lambda counts: found.pop())
    monkeypatch.setattr(plots, "plot_curves", lambda *_: None)  # takes longer than these runs
    return found


def config(number: int | None = None, backend: str = "numpy") -> Config:
    run: dict[str, Any] = {"steps": 1, **({} if number is None else {"threads": number})}
    return from_table({"run": run, "backend": {"name": backend}})


@pytest.mark.parametrize(
    ("rates", "before", "asked", "environment", "number", "line"),
    [
        (BUSY, None, None, {}, 1, "1 thread: products run at 139 GFLOP/s now, 2.3 with 2 (--th"),
        (IDLE, None, None, {}, 2, "2 threads: products run at 250 GFLOP/s now, 139 with 1 (--th"),
        (None, None, None, {"OMP_NUM_THREADS": "1"}, 1, ""),
        (None, 1, None, {}, 1, "1 thread, as the run had so far (--threads N overrides)"),
        (None, 2, None, {}, 2, ""),
        (None, 2, 1, {}, 1, ""),
        (None, 1, 2, {"OMP_NUM_THREADS": "1"}, 2, ""),
        (None, 1, None, {"OMP_NUM_THREADS": "1"}, 1, ""),
        (None, 2, None, {"OMP_NUM_THREADS": "1"}, 1, "1 thread, as OMP_NUM_THREADS says; the run "),
    ],
)
def test_who_decides(
    measured: list[dict[int, float]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rates: dict[int, float] | None,
    before: int | None,
    asked: int | None,
    environment: Mapping[str, str],
    number: int,
    line: str,
) -> None:
    """Of two runs that go on (an older one has not said how many); products are measured once."""
    measured.extend([rates] if rates else [])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    flags = Namespace(resume="runs/before", threads=asked)
    found = choice.with_threads({"kfac": config(before), "sgd": config(before)}, flags)
    assert [one.run.threads for one in found.values()] == [number, number]
    assert measured == []
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(line)
    assert "".join(said).startswith(line)


def test_a_new_run_has_what_its_configuration_says(
    measured: list[dict[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = Namespace(resume=None, threads=None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choice.with_threads({"": config(2)}, flags)[""].run.threads == 2
    strict = config(backend="array_api_strict")  # no place for speed
    assert choice.with_threads({"": strict}, flags)[""] == strict
    monkeypatch.setattr(threads, "_blas", lambda: None)
    assert choice.with_threads({"": config()}, flags)[""].run.threads is None
    with pytest.raises(ConfigError, match="threads: 2 cannot be set: pip install threadpoolctl"):
        choice.with_threads({"": config(2)}, flags)


def test_a_run_remembers_its_threads(
    measured: list[dict[int, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    measured.append(BUSY)
    assert main(["train", *SMALL, "--steps", "1", "--out", str(out)]) == 0
    assert read_config(out).run.threads == 1
    assert main(["train", "--resume", str(out), "--steps", "2"]) == 0
    assert read_config(out).run.threads == 1
    assert main(["train", "--resume", str(out), "--steps", "3", "--threads", "2"]) == 0
    assert read_config(out).run.threads == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "1 thread" in line]
    assert [line.partition(" (")[0] for line in said] == [
        "1 thread: products run at 139 GFLOP/s now, 2.3 with 2",
        "1 thread, as the run had so far",
    ]


def test_a_comparison_measures_once(
    measured: list[dict[int, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both"
    measured.append(BUSY)
    words = ["--model", "mlp", "--optimizers", "sgd,adam", "--steps", "1", "--out", str(out)]
    assert main(["compare", *SMALL, *words]) == 0
    assert main(["compare", "--resume", str(out), "--steps", "2"]) == 0
    assert [read_config(out / name).run.threads for name in ("sgd", "adam")] == [1, 1]
    said = [line for line in capsys.readouterr().err.splitlines() if "1 thread" in line]
    assert ["as the run had so far" in line for line in said] == [False, True]


def test_each_number_of_threads_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def gemm_rates(n: int, seconds: float) -> tuple[float, float]:
        return 200.0, next(two) if threads.count() == 2 else 120.0

    monkeypatch.setattr(threads, "_cores", lambda: 2)
    monkeypatch.setattr(choice, "gemm_rates", gemm_rates)
    two = iter([10.0, 30.0])
    assert choice.rates([1, 2]) == pytest.approx({1: 120.0, 2: 15.0})  # of both rounds' time
