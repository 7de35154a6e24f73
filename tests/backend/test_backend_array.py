"""Namespaces, devices and dtypes: resolved once, and nothing moved or cast unasked."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from kfac_np.backend import Backend, array_namespace, get_backend, to_numpy
from kfac_np.backend.checks import all_finite, require_finite, require_float, require_same_place
from kfac_np.errors import ConfigError, InputError

NAN, INF = float("nan"), float("inf")


def test_names(backend: Backend):
    assert backend.name in ("numpy", "array_api_strict", "torch", "cupy")
    assert get_backend("numpy").name == "numpy"
    assert get_backend().dtype == np.float32


def test_backend_of_an_array_is_where_it_was_made(backend: Backend):
    for array in (
        backend.zeros((2, 3)),
        backend.ones((2, 3)),
        backend.eye(3),
        backend.asarray([[1.0, 2.0]]),
        backend.asarray(np.ones((2, 3), dtype=np.float32)),
        backend.ones((2, 3)) @ backend.ones((3, 2)),
    ):
        assert Backend.of(array) == backend
        assert array_namespace(array) is backend.xp


def test_asarray_gives_floats_the_backends_dtype_and_leaves_others(backend: Backend):
    xp = backend.xp
    single = Backend(xp, backend.device, xp.float32)
    host = np.asarray([1.5, 2.5])
    assert single.asarray(host).dtype == xp.float32
    assert backend.asarray(host.astype(np.float32)).dtype == xp.float64
    assert backend.asarray(1.5).shape == ()
    for dtype in ("int8", "uint8", "int32", "int64"):
        found = backend.asarray(np.asarray([1, 2], dtype=dtype))
        assert found.dtype == getattr(xp, dtype)
        assert to_numpy(found).tolist() == [1, 2]
    assert backend.asarray(np.asarray([True, False])).dtype == xp.bool
    assert backend.asarray(np.asarray([3, 4]), dtype=xp.float32).dtype == xp.float32
    assert backend.asarray(np.asarray([3.0, 4.0]), dtype=xp.int64).dtype == xp.int64
    assert backend.asarray([[1, 2], [3, 4]]).shape == (2, 2)


def test_there_and_back(backend: Backend):
    host = np.arange(24.0).reshape(2, 3, 4)
    for view in (host, host[::2, :, ::3], host.T, host[:0], np.broadcast_to(host[:1], (5, 3, 4))):
        np.testing.assert_array_equal(to_numpy(backend.asarray(view)), view)
    assert to_numpy(host) is host
    assert isinstance(to_numpy(backend.ones((2,))), np.ndarray)


def test_read_only_memory_is_no_trouble(backend: Backend):
    host = np.arange(3.0)
    host.setflags(write=False)
    np.testing.assert_array_equal(to_numpy(backend.asarray(host)), host)


def test_constants(backend: Backend):
    np.testing.assert_array_equal(to_numpy(backend.zeros((2, 0))), np.zeros((2, 0)))
    np.testing.assert_array_equal(to_numpy(backend.ones((2, 3))), np.ones((2, 3)))
    np.testing.assert_array_equal(to_numpy(backend.eye(3)), np.eye(3))


@pytest.mark.parametrize("name", ["", "NumPy", "jax", "fortran"])
def test_unknown_names(name: str):
    with pytest.raises(ConfigError) as error:
        get_backend(name)
    assert str(error.value) == (
        f"backend: expected one of numpy, cupy, torch, array_api_strict; got {name!r}"
    )


@pytest.mark.parametrize("dtype", ["float16", "int64", "double", ""])
def test_unknown_dtypes(dtype: str):
    with pytest.raises(ConfigError, match=f"dtype: expected float32 or float64, got '{dtype}'"):
        get_backend("numpy", dtype)


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(
        ConfigError, match=r"backend 'cupy' is not installed \(pip install 'cupy-cuda12x"
    ):
        get_backend("cupy")
    with pytest.raises(ConfigError, match="backend 'torch' is not installed: No module"):
        get_backend("torch")


def test_finite(backend: Backend):
    good, bad = backend.ones((3,)), backend.asarray([1.0, NAN, INF, -INF])
    assert all_finite()
    assert all_finite(good, 2 * good, backend.zeros((0, 2)))
    assert not all_finite(good, bad)
    require_finite("x", good)
    with pytest.raises(InputError) as error:
        require_finite("x", bad)
    assert str(error.value) == "x: expected finite values, got 3 of 4 that are NaN or Inf"


def test_float(backend: Backend):
    require_float("x", backend.ones((2,)))
    require_float("x", backend.xp.astype(backend.ones((2,)), backend.xp.float32))
    for wrong in (np.ones(2, dtype=int), np.asarray([True])):
        with pytest.raises(InputError, match="x: expected an array of floats, got dtype"):
            require_float("x", backend.asarray(wrong))
    with pytest.raises(InputError, match="x: expected an array of floats, got dtype"):
        require_float("x", backend.xp.astype(backend.ones((2,)), backend.xp.complex128))
    for wrong, name in (([1.0], "list"), (1.0, "float"), (None, "NoneType")):
        with pytest.raises(InputError, match=f"x: expected an array, got {name}"):
            require_float("x", wrong)


def test_place(backend: Backend):
    xp, x = backend.xp, backend.ones((2,))
    require_same_place("x", x, backend.zeros((3, 3)))
    require_same_place("t", backend.asarray(np.asarray([1, 2])), x)  # integers have no precision
    with pytest.raises(
        InputError, match=r"x: expected dtype .*float64 as the parameters have, got"
    ):
        require_same_place("x", xp.astype(x, xp.float32), x)
    with pytest.raises(InputError, match=r"w: expected dtype .* as the inputs have"):
        require_same_place("w", xp.astype(x, xp.float32), x, "inputs")
    other = get_backend("numpy" if backend.name != "numpy" else "array_api_strict", "float64")
    with pytest.raises(InputError, match=r"x: expected an array of .* as the parameters are, got"):
        require_same_place("x", other.ones((2,)), x)
    with pytest.raises(InputError, match="x: expected an array, got list"):
        require_same_place("x", [1.0], x)


def test_device():
    xp = pytest.importorskip("array_api_strict")
    here, there = xp.ones(2), xp.ones(2, device=xp.Device("device1"))
    with pytest.raises(InputError, match=r"x: expected device .*device1.* as the parameters have"):
        require_same_place("x", here, there)
