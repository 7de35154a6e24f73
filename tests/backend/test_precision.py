"""TF32: what the switch does to CuPy, and that there is none elsewhere."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from kfac_np.backend import Backend
from kfac_np.backend.cupy_kernels.precision import tf32
from kfac_np.errors import ConfigError

DEFAULT, TF32 = 1, 7


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The state of a stand-in for CuPy, which has what `tf32` calls and nothing more."""
    state = [DEFAULT]

    def set_compute_type(dtype: str, value: int):
        assert dtype == "f"
        state[0] = value

    products = SimpleNamespace(
        COMPUTE_TYPE_DEFAULT=DEFAULT,
        COMPUTE_TYPE_TF32=TF32,
        get_compute_type=lambda dtype: state[0],
        set_compute_type=set_compute_type,
    )
    core = ModuleType("cupy._core")
    core._routines_linalg = products
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy._core", core)
    return state


CUPY = Backend(ModuleType("cupy"), nullcontext(), np.dtype("float32"))


def test_it_is_on_within_and_as_it_was_afterwards(switch: list[int]):
    with tf32(CUPY):
        assert switch == [TF32]
        with tf32(CUPY, enabled=False):
            assert switch == [DEFAULT]
        assert switch == [TF32]
    assert switch == [DEFAULT]
    with pytest.raises(ZeroDivisionError), tf32(CUPY):
        _ = 1 / 0
    assert switch == [DEFAULT]


def test_what_the_environment_asked_for_comes_back(switch: list[int]):
    switch[0] = TF32
    with tf32(CUPY, enabled=False):
        assert switch == [DEFAULT]
    assert switch == [TF32]


def test_it_does_what_it_says_on_a_gpu(backend: Backend):
    if backend.name != "cupy":
        with tf32(backend, enabled=False):
            pass
        with (
            pytest.raises(
                ConfigError, match=f"tf32: expected a backend of cupy, got {backend.name}"
            ),
            tf32(backend),
        ):
            pass
        return
    draw = np.random.default_rng(0).standard_normal((2, 512, 512)).astype(np.float32)
    a, b = (backend.asarray(m, backend.xp.float32) for m in draw)
    exact = draw[0].astype(np.float64) @ draw[1]

    def error() -> float:
        return float(np.abs((a @ b).get() - exact).max() / np.abs(exact).max())

    with tf32(backend, enabled=False):
        assert error() < 1e-5
    with tf32(backend):
        assert error() < 1e-2
