"""The default call on tables of numbers, in several units, beside Adam and scikit-learn.

    make bench BENCH=tables                    # the whole grid: about 80 minutes of one core
    python benchmarks/tables.py --quick        # every other cell, one seed: ten minutes
    python benchmarks/tables.py --only wine/raw --optimizers kfac,adam-0.01 --jobs 2
    python benchmarks/tables.py --only diabetes/raw/float64/all/0 --steps 300
    python benchmarks/tables.py --read runs/tables.jsonl          # the summary again

Every run has the same network, 64-32 ReLU, the same start and one core. Its seconds are processor
seconds of steps, without evaluations, so that other load disturbs little.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import THREAD_VARIABLES
from benchmarks.table_data import CLASSES, SHIPPED, SIZES, TABLES, UNITS
from benchmarks.table_report import summary
from benchmarks.table_runs import OPTIMIZERS, Cell, run

Runs = Sequence[tuple[Cell, str]]
BATCHES = (16, 128, 0)
SEEDS = range(5)


def grid() -> Iterator[Cell]:
    """All cells, seeds outermost, so that what is interrupted has seen every table."""
    for seed in SEEDS:
        for data in TABLES:
            for units in UNITS:
                if units == "targets" and data in CLASSES:
                    continue
                for dtype in ("float32", "float64"):
                    for batch in BATCHES:
                        if batch < SIZES[data]:
                            yield Cell(data, units, dtype, batch, seed)


def tenth() -> Iterator[Cell]:
    """Every other cell, the seeds in turn."""
    for cell in grid():
        at = (TABLES.index(cell.data), UNITS.index(cell.units), BATCHES.index(cell.batch))
        number = sum(at) + (cell.dtype == "float64")
        if number % 2 == 0 and cell.seed == (number // 2) % len(SEEDS):
            yield cell


def matches(cell: Cell, pattern: str) -> bool:
    """Whether a cell has all the words of dataset/units/dtype/batch/seed; an empty one is any."""
    words = cell.name.split("/")
    wanted = pattern.split("/")
    if len(wanted) > len(words):
        raise SystemExit(
            f"--only: expected at most dataset/units/dtype/batch/seed, got {pattern!r}"
        )
    return all(w in ("", "*", word) for w, word in zip(wanted, words, strict=False))


def choose(quick: bool, patterns: Sequence[str], optimizers: Sequence[str]) -> Runs:
    """The runs asked for. L-BFGS knows no batches: it runs once, on the whole table."""
    unknown = set(optimizers) - set(OPTIMIZERS)
    if unknown:
        known = ", ".join(OPTIMIZERS)
        raise SystemExit(f"no optimizer {', '.join(sorted(unknown))}; there are {known}")
    cells = list(tenth() if quick else grid())
    for pattern in patterns:
        if not any(matches(c, pattern) for c in grid()):
            raise SystemExit(f"--only {pattern}: no such cell; one is {next(grid()).name}")
    if patterns:
        cells = [c for c in cells if any(matches(c, p) for p in patterns)]
    names = optimizers or list(OPTIMIZERS)
    return [(c, n) for c in cells for n in names if c.batch == 0 or n != "sklearn-lbfgs"]


def needs_sklearn(a_run: tuple[Cell, str]) -> bool:
    """For the table or the optimiser."""
    return a_run[0].data in SHIPPED or a_run[1].startswith("sklearn")


def warm_up() -> None:
    """Let a process import and compile what its runs need."""
    for name in OPTIMIZERS:
        run(Cell("one_in_a_hundred", "standardised", "float32", 0, 0), name, 0.0, steps=3)


def measure(
    runs: Runs, out: Path, seconds: float, steps: int | None, jobs: int
) -> list[dict[str, Any]]:
    """All runs in `jobs` processes of one thread; each line is written when its run has ended."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))  # for the children
    lines: list[dict[str, Any]] = []
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with out.open("w") as file, ProcessPoolExecutor(jobs, context, warm_up) as pool:
        futures: list[Future[dict[str, Any]]] = [
            pool.submit(run, cell, name, seconds, steps) for cell, name in runs
        ]
        try:
            for future in as_completed(futures):
                lines.append(future.result())
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
                if len(lines) % 100 == 0:
                    left = (time.monotonic() - began) / len(lines) * (len(runs) - len(lines))
                    count = f"{len(lines)} of {len(runs)} runs"
                    print(f"{count}, {left / 60:.0f} minutes to go", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            print(f"interrupted after {len(lines)} of {len(runs)} runs", flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for, write it, print the summary."""
    args = arguments(argv)
    if args.read:
        lines = [json.loads(text) for path in args.read for text in path.read_text().splitlines()]
    else:
        names = [n for n in args.optimizers.split(",") if n]
        runs = choose(args.quick, args.only, names)
        if importlib.util.find_spec("sklearn") is None and any(map(needs_sklearn, runs)):
            raise SystemExit("no scikit-learn: pip install --group bench, or leave it out")
        print(f"{len(runs)} runs; each is a line of {args.out}", flush=True)
        lines = measure(runs, args.out, args.seconds, args.steps, args.jobs)
    print(f"\n{summary(lines)}" if lines else "no runs")
    return 0 if lines else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="tables.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="every other cell, one seed each: a tenth of the runs"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="CELL",
        help="dataset/units/dtype/batch/seed, or its beginning; * for any; may be repeated",
    )
    parser.add_argument("--optimizers", default="", metavar="NAMES", help=", ".join(OPTIMIZERS))
    parser.add_argument("--seconds", type=float, default=1.0, help="processor seconds a run (1)")
    parser.add_argument("--steps", type=int, help="steps a run instead of seconds")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/tables.jsonl"), help="JSON lines")
    parser.add_argument("--read", type=Path, nargs="+", help="summarise these files, run nothing")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.seconds <= 0 or (args.steps is not None and args.steps < 1):
        parser.error("--jobs, --seconds, --steps: expected numbers above 0")
    return args


if __name__ == "__main__":
    sys.exit(main())
