"""One writer to a run directory at a time."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kfac_np.errors import ConfigError

__all__ = ["LOCK", "locked"]

LOCK = ".lock"


@contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[Callable[[], None]]:
    """Be the only one who writes to a run directory, as long as the context lasts.

    The system lets go of the lock when the process dies, whatever kills it. Where the system has
    no such locks (Windows), nothing is locked.

    Parameters
    ----------
    directory : path
        Created when missing.

    Yields
    ------
    callable
        To be called before writing: raises `FileNotFoundError` if the directory has been removed,
        or has another one in its place.

    Raises
    ------
    ConfigError
        Another run, in this process or in another one, is writing there, or something else than
        a file has the lock's name.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with locked(directory), locked(directory):
    ...         pass
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: another run is writing to ...
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield lambda: _require(directory.is_dir(), directory)
        return
    path = directory / LOCK
    if path.is_symlink() or (path.exists() and not path.is_file()):  # to open a FIFO is to wait
        raise ConfigError(f"{path}: expected a file, found something else; remove it")
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another run is writing to {directory}") from error
        except OSError:  # a file system without locks
            yield lambda: _require(_is(path, file.fileno()), directory)
            return
        # Between opening and locking, the directory may have been moved aside or the lock freed.
        if not _is(path, file.fileno()):
            raise ConfigError(f"another run is writing to {directory}")
        try:
            yield lambda: _require(_is(path, file.fileno()), directory)
        finally:
            with contextlib.suppress(OSError):
                if _is(path, file.fileno()):  # the directory may have been removed
                    path.unlink()


def _require(held: bool, directory: Path) -> None:
    if not held:
        raise FileNotFoundError(
            errno.ENOENT, "the run's directory has been removed or replaced", os.fspath(directory)
        )


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
