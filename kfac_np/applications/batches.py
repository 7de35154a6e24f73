"""Checks of batches of a data set: tuples of inputs and targets, one after the other."""

from __future__ import annotations

from collections.abc import Iterable

from kfac_np.errors import ConfigError, InputError

__all__ = ["require_batch", "require_batches"]


def require_batches(what: str, batches: object) -> None:
    """Raise `ConfigError` unless one can go through them.

    Examples
    --------
    >>> require_batches("tuned_on", None)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: tuned_on batches: expected tuples (x, t), ..., got None
    """
    if not isinstance(batches, Iterable):
        raise ConfigError(
            f"{what} batches: expected tuples (x, t), one after the other, got {batches!r}"
        )


def require_batch(batch: object, weights: bool = True) -> None:
    """Raise `InputError` unless it is (x, t), or with `weights` (x, t, weights).

    Examples
    --------
    >>> require_batch([1.0], weights=False)
    Traceback (most recent call last):
    kfac_np.errors.InputError: expected a tuple (x, t), got list of 1
    """
    if not isinstance(batch, tuple | list) or len(batch) not in ((2, 3) if weights else (2,)):
        size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
        alternative = " or (x, t, weights)" if weights else ""
        raise InputError(f"expected a tuple (x, t){alternative}, got {type(batch).__name__}{size}")
