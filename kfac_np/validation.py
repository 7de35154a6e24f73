"""Checks of plain arguments, and the words of their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["did_you_mean", "listed"]


def listed(names: Any) -> str:
    """List names in a sentence.

    Examples
    --------
    >>> listed(["a", "b", "c"])
    'a, b or c'
    """
    *most, last = [str(n) for n in names]
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(name: object, known: Iterable[Any]) -> str:
    """Return the end of a message about an unknown name: what may have been meant, or nothing.

    Examples
    --------
    >>> did_you_mean("adma", ["kfac", "sgd", "adam"]), did_you_mean("zzz", ["kfac"])
    ("; did you mean 'adam'?", '')
    """
    names = {str(each).lower().lstrip("-"): str(each) for each in known}
    found = difflib.get_close_matches(str(name).lower().lstrip("-"), names, n=1)
    return f"; did you mean {names[found[0]]!r}?" if found else ""
