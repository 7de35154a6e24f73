"""The command figures: the papers' figures, from networks trained on the spot."""

from __future__ import annotations

import argparse
import sys
import time

from kfac_np import figures
from kfac_np.cli.progress import require_extras
from kfac_np.errors import ConfigError, DataError
from kfac_np.validation import did_you_mean

__all__ = ["draw_figures"]


def draw_figures(flags: argparse.Namespace) -> int:
    """Draw the named figures, or all; those of `all` whose data are not there are left out.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> draw_figures(make_parser().parse_args(["figures", "fischer"]))
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: figures: expected fisher, inverse, ... or all, got 'fischer'; ...
    """
    known = list(figures.figures())
    wanted = known if "all" in flags.names else list(dict.fromkeys(flags.names))
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        got = f"{unknown[0]!r}{did_you_mean(unknown[0], known)}" if unknown else "none"
        raise ConfigError(f"figures: expected {', '.join(known)} or all, got {got}")
    require_extras()
    directory = flags.out or "runs/figures"
    for name in wanted:
        began, used = time.perf_counter(), time.process_time()
        print(f"{name}: drawing", file=sys.stderr, flush=True)
        try:
            written = figures.draw(name, directory, quick=flags.quick)
        except DataError as error:
            if "all" not in flags.names:
                raise
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        seconds, processors = time.perf_counter() - began, time.process_time() - used
        names = ", ".join(path.name for path in written)
        print(f"{name}: {seconds:.1f} s ({processors:.1f} s of processors), {names}", flush=True)
    print(f"Everything is in {directory}")
    return 0
