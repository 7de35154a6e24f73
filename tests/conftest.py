"""Fixtures that every test may use: the backends it runs on, and random numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import array_api_strict
import hypothesis
import pytest

from kfac_np.backend import Backend, Rng, get_backend

# The real CuPy on the CPU: programs of another environment, which its `run` starts.
collect_ignore = ["cuda_on_cpu"]

# The same examples in every run: a failure on one machine is a failure on all.
hypothesis.settings.register_profile(
    "kfac_np", derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile("kfac_np")


def _numpy() -> Backend:
    return get_backend("numpy", "float64")


def _array_api_strict() -> Backend:
    # Its second, pretended device refuses arrays of the first and conversions to NumPy: it finds
    # on any machine what otherwise only a GPU would.
    return get_backend("array_api_strict", "float64", array_api_strict.Device("device1"))


def _torch() -> Backend:
    import torch

    torch.set_num_threads(1)  # its threads would fight over the tiny matrices of the tests
    return get_backend("torch", "float64", "cpu")


def _cupy() -> Backend:
    return get_backend("cupy", "float64")


def _missing_torch() -> str:
    return "" if importlib.util.find_spec("torch") else "not installed"


def _missing_cupy() -> str:
    if not importlib.util.find_spec("cupy"):
        return "not installed"
    import cupy

    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "no GPU"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no GPU ({error})"


MAKERS: dict[str, Callable[[], Backend]] = {
    "numpy": _numpy,
    "array_api_strict": _array_api_strict,
    "torch": _torch,
    "cupy": _cupy,
}
MISSING = {"torch": _missing_torch(), "cupy": _missing_cupy()}
AVAILABLE = [name for name in MAKERS if not MISSING.get(name)]


def pytest_report_header() -> list[str]:
    """Say on which backends the tests run, and why not on the others."""
    missing = [f"{name} ({why})" for name, why in MISSING.items() if why]
    return [
        f"backends: {', '.join(AVAILABLE)}"
        + (f"; not collected: {', '.join(missing)}" if missing else "")
    ]


@pytest.fixture(scope="session", params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each available backend in turn, in float64."""
    return MAKERS[request.param]()


@pytest.fixture
def rng() -> Rng:
    """Random numbers, the same in every run and on every backend."""
    return Rng(0)
