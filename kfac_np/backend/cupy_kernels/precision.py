"""TF32: ten instead of 23 bits of each factor of a product, on GPUs that have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import array_api_compat

from kfac_np.backend.array import Backend
from kfac_np.errors import ConfigError
from kfac_np.validation import require_flag

__all__ = ["tf32"]


@contextmanager
def tf32(backend: Backend, enabled: bool = True) -> Iterator[None]:
    """Within it, CuPy's products of two float32 matrices may (not) use TF32.

    Sums are still made in float32; a product is off by some 5e-4 instead of 6e-8 of the size of
    its terms. It concerns `@` of arrays with at most two axes: forward and backward passes of
    affine layers and convolutions, second moments, and products with inverses. Factors are
    inverted and decomposed without it in any case, products of stacked matrices never have it,
    and float64 is not affected. The switch belongs to the process, not to a device or a thread;
    without it CuPy goes by the environment variable CUPY_TF32 (off unless 1).

    Parameters
    ----------
    backend : Backend
    enabled : bool

    Raises
    ------
    ConfigError
        Enabled for a backend other than CuPy; disabling does nothing there.

    Warns
    -----
    UserWarning
        By CuPy, where the GPU has no TF32 (compute capability below 8.0): it stays off.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> with tf32(get_backend("numpy"), enabled=False):
    ...     pass
    >>> with tf32(get_backend("numpy")):
    ...     pass
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: tf32: expected a backend of cupy, got numpy
    """
    require_flag("tf32 enabled", enabled)
    if not array_api_compat.is_cupy_namespace(backend.xp):
        if enabled:
            raise ConfigError(f"tf32: expected a backend of cupy, got {backend.name}")
        yield
        return
    # No other way: CuPy reads its environment variable once, when it makes the first product.
    from cupy._core import _routines_linalg as products

    wanted = products.COMPUTE_TYPE_TF32 if enabled else products.COMPUTE_TYPE_DEFAULT
    before = products.get_compute_type("f")
    with backend.device:
        products.set_compute_type("f", wanted)
    try:
        yield
    finally:
        with backend.device:
            products.set_compute_type("f", before)
