"""Do the contenders of a workload do the same mathematics?

    python benchmarks/check.py W1-256-fixed
    python benchmarks/check.py --exact W1-256-fixed      # small network, exact Fisher, no sampling

From the same start parameters: the first update against this library's (length, cosine), and the
loss after some steps, evaluated by one NumPy program for all. With `--exact`, whatever is random is
replaced by its expectation in the libraries that can, and their parameters must agree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.measure import Settings
from benchmarks.problems import loss, problem
from benchmarks.processes import ContenderError, Process, environment
from benchmarks.registry import OURS, Contender, choose, interpreter, left_out, pair
from benchmarks.workloads import Workload, select, tiny


def layers_after(
    contender: Contender, workload: Workload, steps: list[int], settings: Settings
) -> list[list]:
    """Parameters after the given numbers of steps (the first one is taken by `setup`)."""
    env = environment(settings.threads, settings.device, settings.tf32)
    with tempfile.TemporaryDirectory() as folder:
        python = interpreter(contender, settings.pythons)
        process = Process(python, contender.program, env, Path(folder) / "log")
        try:
            process.ask(**settings.setup(contender, workload))
            done, found = 1, []
            for wanted in steps:
                if wanted > done:
                    process.ask(do="step", count=wanted - done)
                    done = wanted
                process.ask(do="save", path=f"{folder}/{wanted}.npz")
                with np.load(f"{folder}/{wanted}.npz") as arrays:
                    n = len(arrays.files) // 2
                    found.append([(arrays[f"{i}.W"], arrays[f"{i}.b"]) for i in range(n)])
        finally:
            process.close()
    return found


def vector(layers: list) -> np.ndarray:
    """All parameters in one row."""
    return np.concatenate([np.float64(a).ravel() for layer in layers for a in layer])


def compare(workload: Workload, names: list[str], steps: list[int], settings: Settings) -> bool:
    """Print a table; False if a contender failed."""
    start = problem(workload, settings.dtype)
    origin, ours, good = vector(start.layers), {}, True
    print(f"\n### {workload.name}: loss {loss(workload.network, *start):.6g} at the start\n")
    print("| contender | first update | cosine to ours | "
          + " | ".join(f"loss after {k}" for k in steps) + " |")  # fmt: skip
    print("|---|" + "---:|" * (2 + len(steps)))
    for contender in left_out(names, workload, settings.device, choose(names, workload))[0]:
        try:
            found = layers_after(contender, contender.workload(workload), steps, settings)
        except ContenderError as error:
            print(f"| {contender.name} | {error} |" + " |" * (1 + len(steps)))
            good = False
            continue
        update = vector(found[0]) - origin
        length = float(np.linalg.norm(update))
        if contender.name == OURS[contender.method]:
            ours[contender.method] = update
        mine = ours.get(contender.method)
        cosine = "–"
        if mine is not None:
            cosine = f"{update @ mine / max(length * np.linalg.norm(mine), 1e-300):.6f}"
        losses = [loss(workload.network, layers, start.x, start.t) for layers in found]
        print(f"| {contender.name} | {length:.5g} | {cosine} | "
              + " | ".join(f"{value:.6g}" for value in losses) + " |", flush=True)  # fmt: skip
    return good


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--contenders", default="")
    parser.add_argument("--steps", type=numbers, default="1,5,20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    parser.add_argument("--python", type=pair, action="append", default=[], metavar="NAME=PATH")
    args = parser.parse_args(words)
    args.chosen = select(args.workloads)
    return args


def main() -> int:
    """Compare."""
    args = arguments()
    settings = Settings(threads=args.threads, pythons=dict(args.python))
    names = [n for n in args.contenders.split(",") if n]
    if args.exact:
        settings = replace(settings, dtype="float64", options={"statistics": "exact"})
        names = names or ["kfac_np", "kfac-jax"]
    good = True
    for workload in args.chosen:
        chosen = tiny(workload) if args.exact or args.small else workload
        if args.exact:
            chosen = replace(chosen, refresh=1)
        good &= compare(chosen, names, args.steps, settings)
    return 0 if good else 1


def numbers(text: str) -> list[int]:
    """Of steps, separated by commas."""
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
