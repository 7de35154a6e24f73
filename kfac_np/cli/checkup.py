"""The command doctor: what the report says of this machine."""

from __future__ import annotations

import argparse
import json
import sys

from kfac_np.doctor import examine, written

__all__ = ["doctor"]

BROKEN = 1


def doctor(flags: argparse.Namespace) -> int:
    """Print what was measured and what to change; return 1 if something is broken.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> doctor(make_parser().parse_args(["doctor"]))  # doctest: +SKIP
    python 3.11.7, kfac_np 0.1.0, numpy 2.4.6, ...
    ...
    0
    """
    if sys.stderr.isatty():
        print("measuring for some seconds ...", file=sys.stderr, flush=True)
    report = examine(flags.backend, flags.seconds)
    if flags.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(written(report)))
    return BROKEN if any(one["broken"] for one in report["advice"]) else 0
