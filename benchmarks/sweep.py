"""Training loss after equal processor time, for several settings on one data set.

    OPENBLAS_NUM_THREADS=1 python benchmarks/sweep.py --data curves --seconds 40 \
        '{"optimizer": {"name": "sgd", "rate": 0.01}, "batch": {"size": 100}}' \
        '{"optimizer": {"name": "adam", "rate": 0.003}, "batch": {"size": 100}}'

Each argument is a table as `kfac-np --config` takes it, in JSON. Processor seconds, not those of
the clock, are counted, and those of steps only, so that other load on the machine disturbs less;
with one BLAS thread they are the same thing on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from kfac_np.data import Dataset, load
from kfac_np.errors import KfacError
from kfac_np.training.config import from_table
from kfac_np.training.experiment import Experiment
from kfac_np.training.loop import train


def run(table: dict, dataset: Dataset, seconds: float, looks: int = 8) -> str:
    """Train for `seconds`; step and training loss at some moments on the way."""
    experiment = Experiment.of(from_table(table), dataset)
    spent, seen = 0.0, []
    for k in range(looks + 1):
        if k == 0:
            steps = train(experiment.optimizer, experiment.supply, experiment.start())
        while spent < seconds * k / looks or k == 0:
            began = time.process_time()
            step = next(steps)
            spent += time.process_time() - began
            if k == 0:
                break
        metrics = experiment.evaluate(step.position.state.params)
        seen.append(f"{step.report.step}:{metrics.loss:.2f}")
    return f"{spent / step.report.step:.3f} s/step  " + " ".join(seen)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line; each of `tables` is what was typed, and the complete table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", metavar="JSON")
    parser.add_argument("--data", default="curves")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    common = {"data": {"name": args.data}, "seed": args.seed, "run": {"steps": 10**9}}
    try:
        args.tables = [(text, {**common, **json.loads(text)}) for text in args.tables]
        for _, table in args.tables:
            from_table(table)
    except (KfacError, TypeError, json.JSONDecodeError) as error:
        parser.error(f"expected tables in JSON: {error}")
    return args


def main() -> None:
    """Run every table given, one after the other."""
    args = arguments()
    dataset = load(args.data)
    for text, table in args.tables:
        try:
            print(text, run(table, dataset, args.seconds), sep="\n    ", flush=True)
        except KfacError as error:
            print(text, f"failed: {error}", sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
