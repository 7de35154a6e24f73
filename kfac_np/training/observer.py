"""Who watches a run, and may stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from kfac_np.training.loop import Step

__all__ = ["Observer"]


def _nothing(_: Any) -> None:
    """Watch, and do nothing."""


def _never() -> bool:
    """Go on to the end."""
    return False


@final
@dataclass(frozen=True)
class Observer:
    """What to call while a run goes on.

    Attributes
    ----------
    stepped : callable
        Gets each `Step`, as soon as its numbers are there.
    evaluated : callable
        Gets each record of an evaluation.
    should_stop : callable
        Asked after each step; when it says so, the run saves a checkpoint and ends.
    troubled : callable
        Gets the `OSError` when records or a checkpoint cannot be written. The run goes on and
        tries again; what cannot be written at its end is its error.

    Examples
    --------
    >>> Observer().should_stop()
    False
    """

    stepped: Callable[[Step], None] = _nothing
    evaluated: Callable[[Mapping[str, Any]], None] = _nothing
    should_stop: Callable[[], bool] = _never
    troubled: Callable[[OSError], None] = _nothing
