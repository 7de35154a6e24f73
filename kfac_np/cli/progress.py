"""Telling how far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, final

from kfac_np.errors import ConfigError
from kfac_np.training import checkpoint
from kfac_np.training.config import RunSettings
from kfac_np.training.lock import locked
from kfac_np.training.loop import Step
from kfac_np.training.run import CHECKPOINTS, Observer

__all__ = [
    "Shown",
    "announce_restart",
    "interruptible",
    "observing",
    "require_extras",
]

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 2.0


def require_extras() -> None:
    """Raise `ConfigError` now, not after an hour, if a library that a run needs is missing.

    Examples
    --------
    >>> require_extras()
    """
    names = {"tomli_w": "tomli-w", "matplotlib": "matplotlib", "tqdm": "tqdm"}
    missing = [names[module] for module in names if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: pip install {' '.join(missing)}")


def announce_restart(directory: Path) -> None:
    """Say so where a run that is resumed has no checkpoint yet, and so begins again.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     announce_restart(Path(directory))
    No checkpoint in ...: the run starts again from step 0
    """
    if checkpoint.latest(directory / CHECKPOINTS) is None:
        with locked(directory):  # it may be another run that has not saved one yet
            pass
        print(f"No checkpoint in {directory}: the run starts again from step 0")


@contextmanager
def observing(
    label: str, settings: RunSettings, should_stop: Callable[[], bool]
) -> Iterator[Observer]:
    """Show a run's progress on standard error while the context lasts.

    Parameters
    ----------
    label : str
        The optimiser's name.
    settings : RunSettings
        The budget.
    should_stop : callable
        Handed on to the observer.

    Examples
    --------
    >>> with observing("sgd", RunSettings(steps=3), lambda: False) as observer:
    ...     observer.should_stop()
    False
    """
    told = set()

    def troubled(error: OSError) -> None:
        kind = (error.errno, Path(error.filename or "").suffix)  # records or checkpoints
        if kind not in told:
            told.add(kind)
            print(f"kfac-np: {error}; the run goes on, and tries again", file=sys.stderr)

    if sys.stderr.isatty():
        with _bar(label, settings) as (stepped, evaluated):
            yield Observer(stepped, evaluated, should_stop, troubled)
    else:
        yield Observer(*_lines(label), should_stop, troubled)


Callbacks = tuple[Callable[[Step], None], Callable[[Mapping[str, Any]], None]]


@contextmanager
def _bar(label: str, settings: RunSettings) -> Iterator[Callbacks]:
    from tqdm import tqdm

    by_steps = settings.steps is not None
    total = float((settings.steps if by_steps else settings.seconds) or 0.0)
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} " + ("steps" if by_steps else "s") + "{postfix}"
    with tqdm(
        total=total,
        desc=f"{label:12}",
        bar_format=form,
        leave=True,
        file=sys.stderr,
    ) as bar:
        shown: dict[str, str] = {}

        def stepped(step: Step) -> None:
            now = step.report.step if by_steps else step.position.seconds
            bar.update(min(now, total) - bar.n)
            shown["step"] = str(step.report.step)
            bar.set_postfix(shown, refresh=False)

        def evaluated(record: Mapping[str, Any]) -> None:
            shown["loss"] = _losses(record)
            bar.set_postfix(shown, refresh=False)

        yield stepped, evaluated


def _lines(label: str) -> Callbacks:
    last_line = 0.0

    def say(position: str, what: str) -> None:
        print(f"{label:12} {position}  {what}", file=sys.stderr, flush=True)

    def stepped(step: Step) -> None:
        nonlocal last_line
        now = time.monotonic()
        if now - last_line >= _SECONDS_BETWEEN_LINES:
            last_line = now
            report = step.report
            damping = "" if report.damping is None else f"  damping {report.damping:.4g}"
            say(
                f"step {report.step:6d}  {step.position.seconds:7.1f} s",
                f"minibatch loss {report.loss:.5g}{damping}",
            )

    def evaluated(record: Mapping[str, Any]) -> None:
        nonlocal last_line
        now = time.monotonic()
        if record["step"] == 0 or now - last_line >= _SECONDS_BETWEEN_LINES:
            last_line = now
            say(
                f"step {record['step']:6d}  {record['seconds']:7.1f} s",
                f"training loss {_losses(record)}",
            )

    return stepped, evaluated


def _losses(record: Mapping[str, Any]) -> str:
    text = f"{record['current']['loss']:.5g}"
    if "averaged" in record:
        text += f" (averaged {record['averaged']['loss']:.5g})"
    return text


@final
@dataclass(frozen=True)
class Shown(Generic[T]):
    """A sequence that shows on standard error how far somebody is who goes through it.

    Parameters
    ----------
    label : str
    items : sequence

    Examples
    --------
    >>> list(Shown("fitting", [1, 2])), list(Shown("fitting", []))
    ([1, 2], [])
    """

    label: str
    items: Sequence[T]

    def __iter__(self) -> Iterator[T]:
        if sys.stderr.isatty():
            from tqdm import tqdm

            yield from tqdm(self.items, self.label, file=sys.stderr)
            return
        last = time.monotonic()
        for number, item in enumerate(self.items):
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print(f"{self.label:12} {number} of {len(self.items)}", file=sys.stderr, flush=True)
            yield item


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first interrupt, SIGTERM or SIGHUP into a flag that is asked for after each step.

    A second one interrupts at once; but not a SIGHUP, of which a terminal that is closed may send
    two. After a SIGTERM or SIGHUP the program exits with code 143 or 129 as soon as the context
    ends. Where SIGHUP is ignored (nohup), it still is.

    Examples
    --------
    >>> with interruptible() as interrupted:
    ...     interrupted()
    False
    """
    seen: list[int] = []
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1 and number == hangup:
            return
        if len(seen) > 1:
            signal.default_int_handler(number, frame)
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # amid another line, say
            print("kfac-np: finishing this step (interrupt again to stop at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if seen and seen[0] != signal.SIGINT:
        raise SystemExit(128 + seen[0])
