"""Convolutional networks: K-FAC as it comes against PyTorch's Adam and SGD with momentum.

    make bench BENCH=convnet                                # one thread, one seed
    make bench BENCH=convnet BENCH_FLAGS='--seeds 0,1,2 --threads 2'
    make bench BENCH=convnet BENCH_FLAGS='--model resnet --seconds 60'
    python benchmarks/convnet.py --sweep --seconds 40       # all settings of the peers

All in one run of `race.py`: the same start, the same batches where their sizes are the same, turns,
the same number of threads. K-FAC has its defaults, on NumPy and on PyTorch's arrays. The peers have
images channels last, fused optimisers, and the settings of `PEERS`, chosen by hand among those of
the sweep.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import environment

OURS = {
    "kfac": {"optimizer": {"name": "kfac-convolutional"}},
    "kfac-on-torch": {"optimizer": {"name": "kfac-convolutional"}, "backend": {"name": "torch"}},
}
# Rates of each batch size, and what goes with each rate: constant; half a cosine down to 0 over as
# many steps as 45,000 examples make, after a warm-up; constant, evaluated at averaged iterates.
RATES = {
    "adam": {16: (1e-3,), 32: (1e-3, 2e-3), 64: (1e-3, 2e-3, 3e-3), 128: (2e-3, 3e-3)},
    "sgd": {16: (0.01,), 32: (0.01, 0.02), 64: (0.02, 0.05), 128: (0.05, 0.1)},
}
SCHEDULES: tuple[Any, ...] = ({}, {"examples": 45_000, "warmup": 20}, {"average": 0.98})
PEERS = ("adam", 64, 0.003, 2), ("sgd", 64, 0.05, 2)


def peer(method: str, batch: int, rate: float, schedule: int) -> tuple[str, dict[str, Any]]:
    """Name and table of a contender of PyTorch."""
    settings = dict(SCHEDULES[schedule])
    if "examples" in settings:
        settings["steps"] = settings.pop("examples") // batch
    how = ("constant", "cosine", "averaged")[schedule]
    optimizer = {"name": f"torch-{method}", "rate": rate, "batch": batch, **settings}
    return f"torch-{method}-{batch}-{rate:g}-{how}", {"optimizer": optimizer}


def sweep() -> list[tuple[str, dict[str, Any]]]:
    """All settings of the peers."""
    return [
        peer(method, batch, rate, schedule)
        for method, batches in RATES.items()
        for batch, rates in batches.items()
        for rate, schedule in itertools.product(rates, range(len(SCHEDULES)))
    ]


def command(args: argparse.Namespace) -> list[str]:
    """Of `race.py`."""
    contenders = dict(sweep() if args.sweep else [*OURS.items(), *(peer(*p) for p in PEERS)])
    wanted = [n for n in args.contenders.split(",") if n] or list(contenders)
    if unknown := sorted(set(wanted) - set(contenders)):
        known = ", ".join(contenders)
        raise SystemExit(f"no contender {', '.join(unknown)}; there are {known}")
    options = {
        "data": args.data,
        "model": args.model,
        "seconds": args.seconds,
        "every": args.every,
        "seeds": args.seeds,
        "examples": 3000,
        "loss": "0.4,0.35,0.3",
        "accuracy": "0.85,0.87,0.88,0.89",
        "clock": "processor" if args.threads == 1 else "wall",
        "out": args.out,
    }
    words = [str(w) for option, value in options.items() for w in (f"--{option}", value)]
    texts = [f"{name}={json.dumps(contenders[name])}" for name in wanted]
    return [sys.executable, str(Path(__file__).with_name("race.py")), *words, *texts]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="convnet.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="convnet", help="convnet, resnet")
    parser.add_argument("--data", default="fashion-mnist", help="fashion-mnist, cifar10, cifar:DIR")
    parser.add_argument("--seconds", default="30", help="of steps, each contender")
    parser.add_argument("--every", default="1", help="seconds between evaluations")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contenders", default="", help="separated by commas; all by default")
    parser.add_argument("--sweep", action="store_true", help="the peers' settings instead")
    parser.add_argument("--out", type=Path, default=Path("runs/convnet"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race in a process of its own, with that many threads."""
    args = arguments(argv)
    root = Path(__file__).resolve().parents[1]
    env = environment(args.threads) | {"PYTHONPATH": str(root)}
    return subprocess.run(command(args), env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
