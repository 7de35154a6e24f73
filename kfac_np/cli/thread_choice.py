"""How many threads a run gets: as many as are fastest now, unless somebody has said."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace

from kfac_np.backend.numpy_kernels import threads
from kfac_np.doctor import machine
from kfac_np.doctor.hardware import gemm_rates
from kfac_np.training.config import Config

__all__ = ["best", "candidates", "rates", "with_threads"]

_ENOUGH = 0.9  # of the best rate: fewer threads leave more to other programs
_ROUNDS = 2
_SECONDS = 0.4
_SIZE = 500


def with_threads(configs: Mapping[str, Config], flags: argparse.Namespace) -> dict[str, Config]:
    """Return the configurations with the number of threads that their runs are to use.

    The first of these that there is: what is asked for, by ``--threads`` or by the configuration of
    a new run; what an environment variable says; what a resumed run began with; the number that is
    fastest now, of which a line tells. None where the threads of BLAS cannot be set.

    Parameters
    ----------
    configs : mapping
        Of runs that go one after the other; products are measured once.
    flags : namespace
        With "threads" and "resume".

    Raises
    ------
    ConfigError
        A number is asked for, and the threads of BLAS cannot be set.

    Examples
    --------
    >>> from kfac_np.training.config import from_table
    >>> configs = {"sgd": from_table({"run": {"steps": 1}})}
    >>> flags = argparse.Namespace(threads=3, resume="runs/before")
    >>> with_threads(configs, flags)["sgd"].run.threads
    3
    """
    known, fastest = functools.cache(_known), functools.cache(_fastest)
    found = {}
    for label, config in configs.items():
        before = config.run.threads
        number = flags.threads if flags.resume else before
        if number is not None:
            with threads.limited(number):
                pass  # what cannot be set is an error now
        elif config.backend.name == "numpy" and threads.available():
            number = known(before) or fastest()
        found[label] = replace(config, run=replace(config.run, threads=number))
    return found


def rates(counts: Iterable[int], seconds: float = _SECONDS, n: int = _SIZE) -> dict[int, float]:
    """Return the rate of products with each number of threads, measured by turns, in GFLOP/s.

    Other programs count: of the time that products took, not of the fastest one.

    Examples
    --------
    >>> rates([1], seconds=0.01, n=50)[1] > 0.0
    True
    """
    counts = sorted(counts)
    times = dict.fromkeys(counts, 0.0)
    for _ in range(_ROUNDS):
        for count in counts:
            with threads.limited(count):
                _, sustained = gemm_rates(n, seconds / (_ROUNDS * len(counts)))
            times[count] += 1.0 / sustained
    return {count: _ROUNDS / time for count, time in times.items()}


def best(found: Mapping[int, float]) -> int:
    """Return the fewest threads whose rate is close to the highest.

    Examples
    --------
    >>> best({1: 139.0, 2: 2.3}), best({1: 120.0, 2: 230.0}), best({1: 120.0, 2: 125.0})
    (1, 2, 1)
    """
    enough = _ENOUGH * max(found.values())
    return min(count for count, rate in found.items() if rate >= enough)


def candidates(cores: machine.Cores) -> list[int]:
    """Return powers of two, and as many threads as there are cores to run them.

    Examples
    --------
    >>> candidates(machine.Cores(installed=64, allowed=12, physical=6, quota=None))
    [1, 2, 4, 6, 8, 12]
    """
    most = cores.usable
    powers = {2**i for i in range(most.bit_length())}
    return sorted(powers | {most, min(cores.physical or most, most)})


def _known(before: int | None) -> int | None:
    """What the environment says, or what a resumed run had so far; where they differ, a line."""
    number, variable = threads.count(), threads.said()
    if before is None:
        return number if variable else None
    if number == before:
        return before
    if variable:
        _tell(f"{_threads(number)}, as {variable[0]} says; the run had {before} so far")
        return number
    _tell(f"{_threads(before)}, as the run had so far (--threads N overrides)")
    return before


def _fastest() -> int:
    counts = candidates(machine.cores())
    if len(counts) == 1:
        return counts[0]
    found = rates(counts)
    number = best(found)
    others = ", ".join(
        f"{rate:.3g} with {count}" for count, rate in found.items() if count != number
    )
    _tell(
        f"{_threads(number)}: products run at {found[number]:.3g} GFLOP/s now, {others} "
        "(--threads N overrides)"
    )
    return number


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number != 1)}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
