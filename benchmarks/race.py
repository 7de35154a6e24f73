"""Steps and seconds that optimisers need to reach given losses and accuracies, over several seeds.

    OPENBLAS_NUM_THREADS=1 python benchmarks/race.py --data fashion-mnist --model convnet \
        --seconds 200 --every 10 --seeds 0,1,2 --loss 0.4,0.3 --accuracy 0.88,0.9 --out runs/race \
        'kfac={}' 'sgd={"optimizer": {"rate": 0.03}}' 'adam={}'

Each contender is NAME=TABLE, a table as `kfac-np --config` takes it, in JSON; its optimiser is that
of the name unless the table says otherwise. One called "torch-adam" or "torch-sgd" is PyTorch's,
with the settings of `benchmarks/torch_trainee.py`. What `--common` has is in all. All of a seed
start from the same parameters and take turns, the one that has had least time next. Only steps are
counted, no evaluations: in processor seconds, which with one BLAS thread are those of the clock on
an idle machine, and which other load disturbs less; or, with `--clock wall`, by the clock, as
several threads need it. Evaluated are the averaged parameters where the optimiser keeps an average,
on the first training examples and on the whole test set.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.torch_trainee import TorchTrainee
from kfac_np.data import Dataset, load
from kfac_np.errors import KfacError
from kfac_np.training.config import from_table
from kfac_np.training.experiment import Experiment
from kfac_np.training.loop import train

CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


class Trainee:
    """An optimiser of this library, with a network and data."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.last = experiment, None
        self.steps = train(experiment.optimizer, experiment.supply, experiment.start())

    def step(self) -> int:
        """Do one, and tell its number."""
        self.last = next(self.steps)
        return self.last.position.step

    def evaluate(self) -> dict[str, float]:
        """On the first training examples and on the whole test set."""
        parameters = self.last.position.parameters
        params = parameters.get("averaged", parameters["current"])
        test = self.experiment.evaluate_test(params).as_dict()
        seen = self.experiment.evaluate(params).as_dict()
        return seen | {f"test_{name}": value for name, value in test.items()}


@dataclass
class Runner:
    """One optimiser with one seed, and what has been seen of it."""

    name: str
    seed: int
    trainee: Any
    spent: float = 0.0
    failed: str = ""
    rows: list[dict] = field(default_factory=list)
    clock: Callable[[], float] = time.process_time

    def run(self, seconds: float) -> None:
        """Go on for some seconds, then evaluate."""
        until = self.spent + seconds
        try:
            while self.spent < until:
                began = self.clock()
                number = self.trainee.step()
                self.spent += self.clock() - began
        except KfacError as error:
            self.failed, self.spent = str(error), float("inf")
            return
        row = {"name": self.name, "seed": self.seed, "step": number}
        self.rows.append(row | {"seconds": round(self.spent, 2)} | self.trainee.evaluate())

    def reached(self, column: str, level: float) -> dict | None:
        """The first evaluation at which a level was reached."""
        sign = -1.0 if column == "loss" else 1.0
        return next((row for row in self.rows if sign * row[column] >= sign * level), None)


def race(
    tables: dict[str, dict],
    dataset: Dataset,
    seed: int,
    seconds: float,
    every: float,
    clock: str,
    goal: float | None,
) -> list[Runner]:
    """All contenders with one seed, taking turns."""
    runners = []
    for name, table in tables.items():
        trainee = trainee_of(table, seed, dataset)
        runners.append(Runner(name, seed, trainee, clock=CLOCKS[clock]))

    def still_running(runner: Runner) -> bool:
        there = goal is not None and runner.reached("loss", goal) is not None
        return runner.spent < seconds and not there

    while running := list(filter(still_running, runners)):
        runner = min(running, key=lambda r: r.spent)
        runner.run(every)
        last = runner.rows[-1] if runner.rows else {}
        print(runner.failed or json.dumps(last), flush=True)
    return runners


def trainee_of(table: dict, seed: int, dataset: Dataset) -> Any:
    """This library's optimiser, or PyTorch's."""
    experiment = Experiment.of(from_table({"seed": seed, **in_our_words(table)}), dataset)
    method, settings = peer(table)
    return TorchTrainee(method, settings, experiment) if method else Trainee(experiment)


def peer(table: dict) -> tuple[str, dict]:
    """The method and settings of a contender in PyTorch; an empty name for one of ours."""
    settings = dict(table["optimizer"])
    name = settings.pop("name")
    return (name.removeprefix("torch-"), settings) if name.startswith("torch-") else ("", {})


def in_our_words(table: dict) -> dict:
    """The table, in which a peer's optimiser is the one of the same name here."""
    method, _ = peer(table)
    return {**table, "optimizer": {"name": method}} if method else table


def table_of(runners: list[Runner], levels: list[tuple[str, float]]) -> str:
    """Median (least to most) of steps and seconds over the seeds, a line for each level."""
    names = list(dict.fromkeys(r.name for r in runners))
    lines = ["| to reach | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for column, level in levels:
        cells = []
        for name in names:
            mine = [r for r in runners if r.name == name]
            found = [r.reached(column, level) for r in mine]
            there = [row for row in found if row is not None]
            if len(there) < len(mine):
                cells.append(f"{len(there)} of {len(mine)} seeds")
                continue
            parts = []
            for what, unit in (("step", "steps"), ("seconds", "s")):
                values = sorted(row[what] for row in there)
                spread = f" ({values[0]:g} to {values[-1]:g})" if len(values) > 1 else ""
                parts.append(f"{statistics.median(values):g}{spread} {unit}")
            cells.append(", ".join(parts))
        lines.append(f"| {column.replace('_', ' ')} {level:g} | " + " | ".join(cells) + " |")
    quantity = "test_accuracy" if "test_accuracy" in runners[0].rows[0] else "reconstruction_error"
    ends = []
    for name in names:
        rows = [r.rows[-1] for r in runners if r.name == name and r.rows]
        loss, other = (statistics.median(row[key] for row in rows) for key in ("loss", quantity))
        ends.append(f"{loss:.4g}, {other:.4g}")
    what = quantity.replace("_", " ")
    return "\n".join([*lines, f"| loss, {what} at the end | {' | '.join(ends)} |"])


def picture(runners: list[Runner], path: Path, title: str) -> None:
    """Loss and test accuracy (or loss) against steps and seconds, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(r.name for r in runners))
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharey="row", constrained_layout=True)
    other = "test_accuracy" if "test_accuracy" in runners[0].rows[0] else "test_loss"
    for row, column in enumerate(("loss", other)):
        for axis, x in zip(axes[row], ("step", "seconds"), strict=True):
            for r in runners:
                colour, style = (
                    f"C{names.index(r.name)}",
                    ["-", "--", ":", "-."][names.index(r.name) % 4],
                )
                first = r.seed == runners[0].seed
                axis.plot(
                    [p[x] for p in r.rows],
                    [p[column] for p in r.rows],
                    color=colour,
                    linestyle=style,
                    linewidth=1.2,
                    label=r.name if first else None,
                )
            axis.set_xlabel("steps" if x == "step" else "seconds")
            axis.set_ylabel({"loss": "training loss"}.get(column, column.replace("_", " ")))
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            if column.endswith("loss"):
                axis.set_yscale("log")
    axes[0][0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line; `tables` has the complete table of each contender but for its seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="+", metavar="NAME=JSON")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--model", default="convnet")
    parser.add_argument("--common", type=table_in, default={}, metavar="JSON", help="for all")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--seeds", type=list_of(int), default="0")
    parser.add_argument("--loss", type=list_of(float), default="")
    parser.add_argument("--accuracy", type=list_of(float), default="")
    parser.add_argument("--examples", type=int, default=5000, help="training examples evaluated")
    parser.add_argument("--clock", choices=CLOCKS, default="processor")
    parser.add_argument("--goal", type=float, help="a loss at which a contender is through")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    if not (args.seconds > 0.0 and args.every > 0.0):
        parser.error("--seconds and --every: expected numbers > 0")
    args.tables = {}
    for text in args.contenders:
        name, _, own = text.partition("=")
        try:
            args.tables[name] = complete(name, table_in(own), args)
            from_table(in_our_words(args.tables[name]))
        except (argparse.ArgumentTypeError, KfacError) as error:
            parser.error(f"{name}: {error}")
    return args


def complete(name: str, own: dict, args: argparse.Namespace) -> dict:
    """The table of a contender: its own over what all have."""
    common = {"data": {"name": args.data}, "model": {"name": args.model}}
    for key, value in args.common.items():
        common[key] = {**common.get(key, {}), **value} if isinstance(value, dict) else value
    run = {"steps": 10**9, "evaluation_examples": args.examples, **own.get("run", {})}
    optimizer = {"name": name, **own.get("optimizer", {})}
    return {**common, **own, "run": run, "optimizer": optimizer}


def table_in(text: str) -> dict:
    """The table that a JSON text has."""
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"expected a table in JSON, got {text!r}: {error}"
        ) from None
    if not isinstance(table, dict):
        raise argparse.ArgumentTypeError(f"expected a table in JSON, got {text!r}")
    return table


def list_of(kind: type) -> Callable[[str], list]:
    """What reads values separated by commas."""

    def values(text: str) -> list:
        try:
            return [kind(value) for value in text.split(",") if value]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers as in 1,2, got {text!r}") from None

    return values


def main() -> None:
    """Race, print a table, write the numbers and a picture."""
    args = arguments()
    try:
        dataset = load(args.data)
    except KfacError as error:
        raise SystemExit(f"race.py: {error}") from None
    runners = []
    for seed in args.seeds:
        runners += race(args.tables, dataset, seed, args.seconds, args.every, args.clock, args.goal)
    levels = [("loss", value) for value in args.loss]
    levels += [("test_accuracy", value) for value in args.accuracy]
    text = table_of(runners, levels)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = [row for r in runners for row in r.rows]
        with (args.out / "race.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        (args.out / "race.md").write_text(text + "\n")
        picture(runners, args.out / "race.png", f"{args.data}, {args.model}")


if __name__ == "__main__":
    main()
