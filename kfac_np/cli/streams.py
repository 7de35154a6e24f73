"""Standard output and standard error that cannot end a run: not when closed, full or unread."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast, final

__all__ = ["Stream", "standard_streams"]


@final
class Stream(io.TextIOBase):
    """Hands on to another stream what is written, until that fails; from then on to nobody.

    Parameters
    ----------
    target : text stream or None
        None where the process was started without one.

    Attributes
    ----------
    failure : Exception or None
        Why nothing is written any more.

    Examples
    --------
    >>> closed = io.StringIO()
    >>> closed.close()
    >>> stream = Stream(closed)
    >>> print("hello", file=stream)
    >>> stream.failure
    ValueError('I/O operation on closed file')
    """

    def __init__(self, target: TextIO | None) -> None:
        self._target = target
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        """Write, if that is still possible."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is still possible."""
        self._try("flush")

    def isatty(self) -> bool:
        """Tell whether a person is reading."""
        return bool(self._try("isatty"))

    def fileno(self) -> int:
        """Return the descriptor of the stream underneath."""
        if self._target is None:
            raise io.UnsupportedOperation("fileno")
        return self._target.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream underneath."""
        return getattr(self._target, "encoding", None) or "utf-8"

    def _try(self, method: str, *arguments: Any) -> Any:
        if self._target is None or self.failure is not None:
            return None
        try:
            return getattr(self._target, method)(*arguments)
        except (OSError, ValueError) as error:
            self.failure = error
        # What is left in the buffer would fail again when the interpreter flushes it at its end.
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._target.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            if nowhere != descriptor:
                os.close(nowhere)
        return None


@contextmanager
def standard_streams() -> Iterator[tuple[Stream, Stream]]:
    """Put such streams in the place of standard output and error, as long as the context lasts.

    Yields
    ------
    output, errors : Stream

    Examples
    --------
    >>> with standard_streams() as (output, errors):
    ...     print("hello")
    hello
    >>> output.failure is None
    True
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console without λ and × shows ? for them
            stream.reconfigure(errors="replace")
    # A descriptor that is closed would be given to the next file that is opened.
    with contextlib.ExitStack() as held:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if stream is None:
                held.enter_context(open(os.devnull, "r+b"))
        output, errors = Stream(sys.stdout), Stream(sys.stderr)
        held.enter_context(contextlib.redirect_stdout(cast(TextIO, output)))
        held.enter_context(contextlib.redirect_stderr(cast(TextIO, errors)))
        try:
            yield output, errors
        finally:
            output.flush()
            errors.flush()
