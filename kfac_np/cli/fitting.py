"""The command fit: the curvature of a run's training data, for all commands that need it."""

from __future__ import annotations

import argparse

from kfac_np.cli.progress import require_extras
from kfac_np.cli.runs import CURVATURE, TrainedRun, described, fitted

__all__ = ["fit"]


def fit(flags: argparse.Namespace) -> int:
    """Fit a curvature to a run's training data and leave it in RUN/curvature.npz.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> fit(make_parser().parse_args(["fit", "no/such/run"]))
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: no/such/run: expected a run directory, found no such directory
    """
    require_extras()
    run = TrainedRun.read(flags.directory)
    found = fitted(run, flags.curvature, flags.fisher, flags.batch_size)
    print(described(run, found))
    for path, trace in found.matrix.block_traces().items():
        shape = "×".join(map(str, found.operand[path].shape))
        print(f"  {path:8} {shape:>12}  trace {float(trace):.4g}")
    print(f"It is in {run.directory / CURVATURE}")
    return 0
