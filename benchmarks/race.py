"""Steps and seconds that optimisers need to reach given losses and accuracies, over several seeds.

    OPENBLAS_NUM_THREADS=1 python benchmarks/race.py --data fashion-mnist --model convnet \
        --seconds 200 --every 10 --seeds 0,1,2 --loss 0.4,0.3 --accuracy 0.88,0.9 --out runs/race \
        'kfac={}' 'sgd={"optimizer": {"rate": 0.03}}' 'adam={}'

Each contender is NAME=TABLE, a table as `kfac-np --config` takes it, in JSON; its optimiser is that
of the name unless the table says otherwise. All of a seed start from the same parameters and take
turns, the one that has had least time next. Only steps are counted, no evaluations: in processor
seconds, which with one BLAS thread are those of the clock on an idle machine, and which other load
disturbs less; or, with `--clock wall`, by the clock, as several threads need it. Evaluated are the
averaged parameters where the optimiser keeps an average, on the first training examples and on the
whole test set.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kfac_np.errors import KfacError
from kfac_np.training.config import from_table
from kfac_np.training.data import Dataset, load
from kfac_np.training.experiment import Experiment
from kfac_np.training.loop import Step, train

CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


@dataclass
class Runner:
    """One optimiser with one seed, and what has been seen of it."""

    name: str
    seed: int
    experiment: Experiment
    steps: Iterator[Step]
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
                step = next(self.steps)
                self.spent += self.clock() - began
        except KfacError as error:
            self.failed, self.spent = str(error), float("inf")
            return
        parameters = step.position.parameters
        params = parameters.get("averaged", parameters["current"])
        seen = self.experiment.evaluate(params)
        test = self.experiment.evaluate_test(params)
        self.rows.append(
            {
                "name": self.name,
                "seed": self.seed,
                "step": step.report.step,
                "seconds": round(self.spent, 2),
                **seen.as_dict(),
                **{f"test_{name}": value for name, value in test.as_dict().items()},
            }
        )

    def reached(self, column: str, level: float) -> dict | None:
        """The first evaluation at which a level was reached."""
        sign = -1.0 if column == "loss" else 1.0
        return next((row for row in self.rows if sign * row[column] >= sign * level), None)


def race(
    tables: dict[str, dict],
    common: dict,
    dataset: Dataset,
    seed: int,
    seconds: float,
    every: float,
    clock: str,
    goal: float | None,
) -> list[Runner]:
    """All contenders with one seed, taking turns."""
    runners = []
    for name, own in tables.items():
        optimizer = {"name": name, **own.get("optimizer", {})}
        table = {**common, "seed": seed, **own, "optimizer": optimizer}
        run = {"steps": 10**9, **own.get("run", {})}
        experiment = Experiment.of(from_table({**table, "run": run}), dataset)
        steps = train(experiment.optimizer, experiment.supply, experiment.start())
        runners.append(Runner(name, seed, experiment, steps, clock=CLOCKS[clock]))

    def still_running(runner: Runner) -> bool:
        there = goal is not None and runner.reached("loss", goal) is not None
        return runner.spent < seconds and not there

    while running := list(filter(still_running, runners)):
        runner = min(running, key=lambda r: r.spent)
        runner.run(every)
        last = runner.rows[-1] if runner.rows else {}
        print(runner.failed or json.dumps(last), flush=True)
    return runners


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


def picture(runners: list[Runner], path: Path) -> None:
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
    figure.savefig(path, dpi=110)


def main() -> None:
    """Race, print a table, write the numbers and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="+", metavar="NAME=JSON")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--model", default="convnet")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--loss", default="")
    parser.add_argument("--accuracy", default="")
    parser.add_argument("--examples", type=int, default=5000, help="training examples evaluated")
    parser.add_argument("--clock", choices=CLOCKS, default="processor")
    parser.add_argument("--goal", type=float, help="a loss at which a contender is through")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (args.seconds > 0.0 and args.every > 0.0):
        parser.error("--seconds and --every: expected numbers > 0")
    tables = {name: json.loads(text) for name, text in (c.split("=", 1) for c in args.contenders)}
    common = {"data": {"name": args.data}, "model": {"name": args.model}}
    tables = {
        name: {"run": {"evaluation_examples": args.examples}, **own} for name, own in tables.items()
    }
    dataset = load(args.data)
    runners = []
    for seed in map(int, args.seeds.split(",")):
        runners += race(
            tables, common, dataset, seed, args.seconds, args.every, args.clock, args.goal
        )
    levels = [("loss", float(v)) for v in args.loss.split(",") if v]
    levels += [("test_accuracy", float(v)) for v in args.accuracy.split(",") if v]
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
        picture(runners, args.out / "race.png")


if __name__ == "__main__":
    main()
