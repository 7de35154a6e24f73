"""Files that are either whole or not there: written beside their place and renamed into it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["naming", "write_atomically", "write_text"]


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside `path`, make it durable, and rename it to `path`.

    A process killed at any moment leaves either the old file or the new one, and perhaps a
    forgotten ``.NAME.part``, which the next call replaces.

    Parameters
    ----------
    path : path
        Its directory is created when missing. A symbolic link is written through.
    write : callable
        Gets the open binary file.

    Raises
    ------
    OSError
        The directory cannot be written to, the disk is full, or `path` is something else than a
        file; it is as it was.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory) / "new" / "a.txt"
    ...     write_atomically(path, lambda file: file.write(b"whole"))
    ...     path.read_text()
    'whole'
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "expected a file, found something else", os.fspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # it may be a link, which is not to be followed
        with naming(path), part.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors of the system say which file they are about: those of a full disk do not.

    Examples
    --------
    >>> with naming("a.txt"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'a.txt'
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as a whole (see `write_atomically`).

    Names of files that are not UTF-8 keep their bytes.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_text(f"{directory}/a.txt", "whole")
    """
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def _sync_directory(directory: Path) -> None:
    """Make the renaming itself durable, where the system lets a directory be opened."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
