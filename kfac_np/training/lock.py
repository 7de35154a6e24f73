"""One writer to a run directory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kfac_np.errors import ConfigError

__all__ = ["LOCK", "locked"]

LOCK = ".lock"


@contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only one who writes to a run directory, as long as the context lasts.

    The system lets go of the lock when the process dies, whatever kills it. Where the system has
    no such locks (Windows), nothing is locked.

    Parameters
    ----------
    directory : path
        Created when missing.

    Raises
    ------
    ConfigError
        Another run, in this process or in another one, is writing there.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with locked(directory), locked(directory):
    ...         pass
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: another run is writing to ...
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = Path(directory) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another run is writing to {directory}") from error
        except OSError:  # a file system without locks
            yield
            return
        # Between opening and locking, the directory may have been moved aside or the lock freed.
        if not _is(path, file.fileno()):
            raise ConfigError(f"another run is writing to {directory}")
        try:
            yield
        finally:
            if _is(path, file.fileno()):  # the directory may have been moved aside by us
                path.unlink()


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
