"""The `Array` protocol and the `Backend`: namespace, device and dtype, resolved once."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Protocol, final

import array_api_compat
import numpy as np

from kfac_np.backend.quiet import quiet
from kfac_np.errors import ConfigError

__all__ = ["Array", "Backend", "array_namespace", "get_backend", "to_numpy"]


_HOST = (np.ndarray, np.generic)


class Array(Protocol):
    """What the library asks of an array: the operators of the Array API standard.

    Axes are stated in docstrings and in comments where they change, not in the type.

    Examples
    --------
    >>> import numpy as np
    >>> x: Array = np.ones((2, 3))
    >>> (x @ x.T).shape
    (2, 2)
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def device(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def T(self) -> Array: ...
    def __getitem__(self, key: Any, /) -> Array: ...
    def __setitem__(self, key: Any, value: Any, /) -> None: ...
    def __add__(self, other: Any, /) -> Array: ...
    def __radd__(self, other: Any, /) -> Array: ...
    def __iadd__(self, other: Any, /) -> Array: ...
    def __sub__(self, other: Any, /) -> Array: ...
    def __rsub__(self, other: Any, /) -> Array: ...
    def __mul__(self, other: Any, /) -> Array: ...
    def __rmul__(self, other: Any, /) -> Array: ...
    def __truediv__(self, other: Any, /) -> Array: ...
    def __rtruediv__(self, other: Any, /) -> Array: ...
    def __pow__(self, other: Any, /) -> Array: ...
    def __matmul__(self, other: Any, /) -> Array: ...
    def __neg__(self) -> Array: ...
    def __invert__(self) -> Array: ...
    def __abs__(self) -> Array: ...
    def __and__(self, other: Any, /) -> Array: ...
    def __lt__(self, other: Any, /) -> Array: ...
    def __le__(self, other: Any, /) -> Array: ...
    def __gt__(self, other: Any, /) -> Array: ...
    def __ge__(self, other: Any, /) -> Array: ...
    def __float__(self) -> float: ...
    def __int__(self) -> int: ...
    def __bool__(self) -> bool: ...


def array_namespace(first: Array, *others: Array) -> Any:
    """Return the Array API namespace common to some arrays.

    NumPy follows the standard itself. The wrapper that array-api-compat has for it would import
    the whole of NumPy, its test tools and Fortran compiler among it: a third of a first step.

    Examples
    --------
    >>> import numpy as np
    >>> array_namespace(np.ones(2)).__name__
    'numpy'
    """
    kind = type(first)
    for x in (first, *others):
        if not (isinstance(x, _HOST) or (type(x) is kind and array_api_compat.is_torch_array(x))):
            return array_api_compat.array_namespace(first, *others)
    return np if isinstance(first, _HOST) else _torch()


@functools.cache
def _torch() -> Any:
    return importlib.import_module(_MODULES["torch"])


def to_numpy(x: Any) -> np.ndarray[Any, Any]:
    """Copy an array of any backend to the host as a NumPy array (a NumPy array is returned as is).

    Examples
    --------
    >>> to_numpy(get_backend("numpy").ones((2,)))
    array([1., 1.], dtype=float32)
    """
    if isinstance(x, np.ndarray):
        return x
    if array_api_compat.is_cupy_array(x):
        return np.asarray(x.get())
    if array_api_compat.is_torch_array(x):
        return np.asarray(x.detach().cpu().numpy())
    xp = array_api_compat.array_namespace(x)
    info = xp.__array_namespace_info__()
    return np.asarray(xp.asarray(x, device=info.default_device()))


@final
@dataclass(frozen=True)
class Backend:
    """An array namespace, a device in it and a floating dtype.

    Attributes
    ----------
    xp : namespace
        An Array API namespace: NumPy, or one of array-api-compat.
    device : object
        A device of that namespace.
    dtype : object
        The floating dtype of parameters and statistics.

    Examples
    --------
    >>> b = get_backend("numpy", "float64")
    >>> b.zeros((2, 2)).dtype
    dtype('float64')
    >>> b.name
    'numpy'
    """

    xp: Any
    device: Any
    dtype: Any

    @classmethod
    def of(cls, x: Array) -> Backend:
        """Return the backend that `x` lives on.

        Examples
        --------
        >>> import numpy as np
        >>> Backend.of(np.ones(2, dtype=np.float32)).dtype
        dtype('float32')
        """
        return cls(array_namespace(x), x.device, x.dtype)

    @property
    def name(self) -> str:
        """Name of the library behind the namespace: numpy, cupy, torch, ..."""
        return str(self.xp.__name__).rpartition(".")[2]

    @quiet
    def asarray(self, values: Any, dtype: Any = None) -> Array:
        """Put host values on the device; floats get the backend's dtype, others keep theirs.

        What is too large for single precision becomes Inf, which whatever takes it refuses.

        Parameters
        ----------
        values : NumPy array, scalar or nested list
        dtype : dtype, optional
            Overrides the rule above.

        Examples
        --------
        >>> b = get_backend("numpy", "float32")
        >>> b.asarray([1.5]).dtype, b.asarray([1]).dtype.kind
        (dtype('float32'), 'i')
        """
        host = np.asarray(values)
        if dtype is None and host.dtype.kind == "f":
            dtype = self.dtype
        if self.name == "torch" and not host.flags.writeable:
            host = host.copy()  # torch warns about memory it could corrupt
        if dtype is None:
            return self.xp.asarray(host, device=self.device)
        if _makes_arrays_in_one_go(self.xp):
            return self.xp.asarray(host, dtype=dtype, device=self.device)
        return self.xp.astype(self.xp.asarray(host, device=self.device), dtype)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Return an array of zeros.

        Examples
        --------
        >>> get_backend().zeros((2,))
        array([0., 0.], dtype=float32)
        """
        return self.xp.zeros(shape, dtype=self.dtype, device=self.device)

    def ones(self, shape: tuple[int, ...]) -> Array:
        """Return an array of ones.

        Examples
        --------
        >>> get_backend().ones((2,))
        array([1., 1.], dtype=float32)
        """
        return self.xp.ones(shape, dtype=self.dtype, device=self.device)

    def eye(self, n: int) -> Array:
        """Return the identity matrix, shape (n, n).

        Examples
        --------
        >>> get_backend().eye(2)
        array([[1., 0.],
               [0., 1.]], dtype=float32)
        """
        return self.xp.eye(n, dtype=self.dtype, device=self.device)


def _makes_arrays_in_one_go(xp: Any) -> bool:
    """Whether `asarray` converts the dtype and moves to the device, both at once."""
    return array_api_compat.is_numpy_namespace(xp) or array_api_compat.is_cupy_namespace(xp)


_MODULES = {
    "numpy": "numpy",
    "cupy": "array_api_compat.cupy",
    "torch": "array_api_compat.torch",
    "array_api_strict": "array_api_strict",
}


def get_backend(name: str = "numpy", dtype: Any = "float32", device: Any = None) -> Backend:
    """Resolve a backend by name.

    Parameters
    ----------
    name : {"numpy", "cupy", "torch", "array_api_strict"}
    dtype : {"float32", "float64"}
        Or what NumPy or the library has for them.
    device : object, optional
        A device of that library; its default device when omitted.

    Returns
    -------
    Backend

    Raises
    ------
    ConfigError
        Unknown name or dtype, or a library that is not installed.

    Examples
    --------
    >>> get_backend("numpy", "float64").dtype
    dtype('float64')
    >>> get_backend("fortran")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: backend: expected one of numpy, cupy, torch, ...; got 'fortran'
    """
    if not isinstance(name, str) or name not in _MODULES:
        raise ConfigError(f"backend: expected one of {', '.join(_MODULES)}; got {name!r}")
    # A name, a class of NumPy, or what calls itself by a name: torch.float32
    kind = getattr(dtype, "__name__", str(dtype)).rpartition(".")[2]
    if kind not in ("float32", "float64"):
        raise ConfigError(f"dtype: expected float32 or float64, got {dtype!r}")
    try:
        xp = importlib.import_module(_MODULES[name])
    except ImportError as error:
        wheels = "pip install 'cupy-cuda12x[ctk]' or 'cupy-cuda13x[ctk]'"
        hint = f" ({wheels})" if name == "cupy" else ""
        raise ConfigError(f"backend {name!r} is not installed{hint}: {error}") from error
    try:
        sample = xp.zeros(1, dtype=getattr(xp, kind), device=device)
    except Exception as error:  # every library refuses in its own way
        raise ConfigError(f"device: {name} cannot make arrays on {device!r} ({error})") from error
    return Backend(xp, array_api_compat.device(sample), sample.dtype)
