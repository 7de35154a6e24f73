"""How much code one default step of K-FAC enters: what a reader who follows it has to open.

    python benchmarks/step_code.py             # a usual step, a refresh, a search for γ
    python benchmarks/step_code.py --files     # and the files of the first of them
    python benchmarks/step_code.py --steps 12,15

Two dense layers with tanh between them, softmax cross-entropy, 512 examples, `KFAC(objective)`. A
profiler (`sys.setprofile`) notes every function of the package that a step calls. "file lines" are
all lines of their files, "their lines" those that the functions themselves span.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import kfac_np
from kfac_np import KFAC, Dense, Objective, Rng, Sequential, SoftmaxCrossEntropy, Tanh, get_backend

PACKAGE = Path(kfac_np.__file__).parent
STEPS = {7: "usual", 10: "refresh", 20: "search for γ"}


def entered(function: Callable[[], Any]) -> set[CodeType]:
    """The code of each function of the package that a call enters."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            found.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return {code for code in found if Path(code.co_filename).is_relative_to(PACKAGE)}


def lines(codes: set[CodeType]) -> dict[str, tuple[int, int, int]]:
    """For each file how many functions were entered, the lines they span, and all of its lines."""
    spans: dict[str, set[int]] = {}
    functions: dict[str, int] = {}
    for code in codes:
        last = max(line for *_, line in code.co_lines() if line is not None)
        spans.setdefault(code.co_filename, set()).update(range(code.co_firstlineno, last + 1))
        functions[code.co_filename] = functions.get(code.co_filename, 0) + 1
    return {
        str(Path(name).relative_to(PACKAGE.parent)): (
            functions[name],
            len(span),
            len(Path(name).read_text(encoding="utf-8").splitlines()),
        )
        for name, span in sorted(spans.items())
    }


def default_steps(wanted: Sequence[int]) -> dict[int, dict[str, tuple[int, int, int]]]:
    """Train until the last of some steps; `lines` of each of them."""
    objective = Objective(Sequential(Dense(20, 30), Tanh(), Dense(30, 5)), SoftmaxCrossEntropy())
    kfac = KFAC(objective)
    draws = np.random.default_rng(0)
    x = draws.standard_normal((512, 20))
    t = np.argmax(x[:, :5] + draws.standard_normal((512, 5)), axis=1)
    states = [kfac.init(objective.network.init(Rng(0), get_backend("numpy", "float64")))]

    def step() -> None:
        states.append(kfac.step(states.pop(), x, t)[0])

    found = {}
    for k in range(1, max(wanted) + 1):
        if k in wanted:
            found[k] = lines(entered(step))
        else:
            step()
    return found


def numbers(text: str) -> list[int]:
    """Step numbers, from "7,10"."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=numbers, default=list(STEPS), metavar="N,N,...")
    parser.add_argument("--files", action="store_true", help="list the files of the first step")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Print a line a step, and on demand a line a file."""
    args = arguments(words)
    found = default_steps(args.steps)
    print(f"{'step':18s} {'files':>6s} {'file lines':>11s} {'functions':>10s} {'their lines':>12s}")
    for k, files in found.items():
        functions, spanned, total = (sum(column) for column in zip(*files.values(), strict=True))
        name = f"{k:2d} {STEPS.get(k, '')}"
        print(f"{name:18s} {len(files):6d} {total:11,d} {functions:10d} {spanned:12,d}")
    if args.files:
        k = args.steps[0]
        print(f"\n{f'step {k}':42s} {'lines':>6s} {'functions':>10s} {'their lines':>12s}")
        for name, (functions, spanned, total) in found[k].items():
            print(f"{name:42s} {total:6,d} {functions:10d} {spanned:12,d}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
