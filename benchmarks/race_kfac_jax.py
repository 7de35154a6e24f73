"""Seconds that kfac-jax needs to given losses on W1, for comparison with `race.py`.

    pip install . 'kfac-jax==0.0.8' 'jax==0.8.2' 'jaxlib==0.8.2'      # in an environment of its own
    python benchmarks/race_kfac_jax.py --damping 1,10,150 --seconds 60 --loss 260,240,225,212.6

The autoencoder 784-1000-500-250-30 and mirrored, tanh, on Fashion-MNIST: the start of the runs that
`race.py` makes with the same seed, batches of as many examples, shuffled anew in each pass.
Everything about kfac-jax is its own default, fully adaptive; its initial damping is given. Steps
are counted by the clock, no evaluations and no compilation: what a few first steps compile is used
again from the start. Runs of several dampings take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.contenders.jax_common import mean_loss
from benchmarks.workloads import autoencoder
from kfac_np.data import load
from kfac_np.training.config import from_table
from kfac_np.training.experiment import Experiment

AUTOENCODER = autoencoder((784, 1000, 500, 250, 30))
L2 = 1e-5
WARM_UP = 6
"""Steps after which all that is compiled has been: statistics, inverses, damping."""


@dataclass
class Run:
    """One initial damping."""

    damping: float
    optimizer: Any
    now: dict[str, Any]
    batches: Iterator[Any]
    spent: float = 0.0
    steps: int = 0
    reached: dict[float, tuple[int, float]] = field(default_factory=dict)

    def step(self) -> None:
        """Take one step, and count its seconds."""
        import jax

        self.now["key"], key = jax.random.split(self.now["key"])
        began = time.perf_counter()
        self.now["params"], self.now["state"], _ = self.optimizer.step(
            self.now["params"],
            self.now["state"],
            key,
            data_iterator=self.batches,
            global_step_int=self.steps,
        )
        jax.block_until_ready(self.now["params"])
        self.spent += time.perf_counter() - began
        self.steps += 1


def start(damping: float, params: Any, images: np.ndarray, size: int, seed: int) -> Run:
    """A compiled optimiser at the start of its run."""
    import jax
    import kfac_jax
    from jax import numpy as jnp

    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(mean_loss(AUTOENCODER, L2, register=True)),
        l2_reg=L2,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=damping,
        multi_device=False,
    )

    def fresh() -> Run:
        batches = batches_of(images, size, seed)
        key = jax.random.PRNGKey(seed)
        mine = jax.tree.map(jnp.array, params)
        state = optimizer.init(mine, key, next(batches))
        return Run(damping, optimizer, {"params": mine, "state": state, "key": key}, batches)

    first = fresh()
    for _ in range(WARM_UP):
        first.step()
    return fresh()


def batches_of(images: np.ndarray, size: int, seed: int) -> Iterator[Any]:
    """Mini-batches of one pass after the other."""
    from jax import numpy as jnp

    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images))
        for i in range(0, len(order) - size + 1, size):
            x = jnp.asarray(images[order[i : i + size]])
            yield x, x


def parameters(seed: int) -> tuple[Any, np.ndarray]:
    """Weights and biases as `race.py` begins with them, and the images."""
    from jax import numpy as jnp

    model = {"name": "autoencoder", "activation": "tanh", "initializer": "fan-in"}
    table = {"data": "fashion-mnist", "model": model, "seed": seed, "run": {"steps": 1}}
    dataset = load("fashion-mnist")
    experiment = Experiment.of(from_table(table), dataset)
    tree = experiment.start().state.params
    layers = [(w[:, :-1].T, w[:, -1]) for w in tree if len(w)]
    return [(jnp.array(w), jnp.array(b)) for w, b in layers], dataset.x_train


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damping", type=numbers, default="150")
    parser.add_argument("--loss", type=numbers, default="260,240,225,212.6")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def numbers(text: str) -> list[float]:
    """Of a list separated by commas."""
    return [float(number) for number in text.split(",")]


def main() -> None:
    """Race the dampings, and print when each reached each loss."""
    args = arguments()
    try:
        import jax
        import kfac_jax  # noqa: F401 - used by `start`
        from jax import numpy as jnp
    except ImportError as error:
        raise SystemExit(f"{error}; its environment is described above, in this file") from None
    levels = args.loss
    params, images = parameters(args.seed)
    runs = [start(damping, params, images, args.batch, args.seed) for damping in args.damping]
    evaluated = jnp.asarray(images[:10_000])
    loss = jax.jit(mean_loss(AUTOENCODER, 0.0, register=False))
    while (run := min(runs, key=lambda r: r.spent)).spent < args.seconds:
        until = run.spent + args.every
        while run.spent < until:
            run.step()
        value = float(loss(run.now["params"], (evaluated, evaluated)))
        for level in levels:
            if value <= level:
                run.reached.setdefault(level, (run.steps, run.spent))
        print(f"{run.damping:g}: {run.steps} steps, {run.spent:.1f} s, {value:.1f}", flush=True)
    for run in runs:
        found = ((level, run.reached.get(level)) for level in levels)
        cells = (f"{v:g}: {s[0]} steps, {s[1]:.1f} s" if s else f"{v:g}: not" for v, s in found)
        print(f"damping {run.damping:g}: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
