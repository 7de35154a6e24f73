"""The command line ``kfac-np``: training, what is made of a trained run, figures, this machine.

Exit codes: 0 success; 1 the run failed (it diverged, the disk is full, ...); 2 bad usage,
configuration, data or checkpoint; 130 interrupted, 143 terminated, 129 hung up (the run has saved a
checkpoint).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kfac_np.cli.arguments import make_parser
from kfac_np.cli.streams import standard_streams
from kfac_np.errors import (
    CheckpointError,
    ConfigError,
    CurvatureError,
    DataError,
    InputError,
    KfacError,
)

if TYPE_CHECKING:
    import argparse

__all__ = ["main"]

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_BAD_INPUT = (ConfigError, CurvatureError, DataError, InputError, CheckpointError)
_COMMANDS = {
    "train": ("kfac_np.cli.commands", "train"),
    "describe": ("kfac_np.cli.commands", "describe"),
    "factors": ("kfac_np.cli.commands", "factors"),
    "compare": ("kfac_np.cli.comparison", "compare"),
    "fit": ("kfac_np.cli.fitting", "fit"),
    "uncertainty": ("kfac_np.cli.uncertainty", "uncertainty"),
    "influence": ("kfac_np.cli.influence", "influence"),
    "prune": ("kfac_np.cli.pruning", "prune_run"),
    "figures": ("kfac_np.cli.pictures", "draw_figures"),
    "doctor": ("kfac_np.cli.checkup", "doctor"),
}
# What a caller in Python is advised, and how it is said on a command line.
_AS_FLAGS = {
    "split=True": "--set optimizer.curvature.split=true",
    "with download=True": "with --download",
    "as argument or in": "with --data-dir DIR or in",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are one line on standard error.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.

    Examples
    --------
    >>> main(["describe", "--data", "digits", "--sizes", "32,6"])
    path  layer          parameters     block      factors           factorise  solve
    0     Dense(64, 32)  32×65 = 2080   KFACBlock  A 65×65, G 32×32  ...
    ...
    0
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with standard_streams() as (output, _):
        code = _main(words)
        output.flush()
        # Of a pipe whose reader has gone there is nobody to tell.
        if output.failure is not None and not isinstance(output.failure, BrokenPipeError):
            print(f"kfac-np: error: standard output: {output.failure}", file=sys.stderr)
    return code if output.failure is None else code or FAILED


def _main(words: list[str]) -> int:
    try:
        flags = make_parser().parse_args(words)
        return _command(flags.command)(flags)
    except KeyboardInterrupt as error:
        print(f"kfac-np: interrupted{_notes(error)}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if "--debug" in words:
            raise
        wrong_input = isinstance(error, _BAD_INPUT)
        print(f"kfac-np: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT if wrong_input else FAILED


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """Import what a command needs once it is called: --help needs none of it."""
    module, function = _COMMANDS[name]
    found: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), function)
    return found


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    for advice, flag in _AS_FLAGS.items():
        text = text.replace(advice, flag)
    if isinstance(error, KfacError | OSError) and text:
        return text + _notes(error)
    return f"{type(error).__name__}: {text}{_notes(error)} (--debug shows the traceback)"


def _notes(error: BaseException) -> str:
    """What a run adds to the error that ends it."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
