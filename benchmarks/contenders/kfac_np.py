"""This library: K-FAC and SGD."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.contenders.child import Running, Setup, serve
from benchmarks.workloads import Network

# The checkout this file is in, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def objective(network: Network) -> Any:
    """The network and loss, with this library's layers."""
    from kfac_np import Objective, SigmoidCrossEntropy, SoftmaxCrossEntropy
    from kfac_np.layers import Conv, Dense, Flatten, MaxPool, ReLU, Reshape, Sequential, Tanh

    activation = Tanh() if network.activation == "tanh" else ReLU()
    layers: list[Any] = [Reshape(network.image)] if network.channels else []
    depth = network.image[2]
    for width in network.channels:
        layers.append(Conv(depth, width, (network.kernel,) * 2, padding="same"))
        layers += [MaxPool((3, 3), 2, 1), activation]
        depth = width
    if network.channels:
        layers.append(Flatten())
    last = len(network.sizes) - 2
    for i in range(last + 1):
        layers.append(Dense(*network.sizes[i : i + 2]))
        if i < last and i not in network.linear:
            layers.append(activation)
    loss = SigmoidCrossEntropy() if network.loss == "sigmoid" else SoftmaxCrossEntropy()
    return Objective(Sequential(*layers), loss)


def optimizer(setup: Setup, target: Any) -> Any:
    """As the workload says."""
    from kfac_np import KFAC, SGD, MonteCarlo
    from kfac_np.optimizers import ConstantDamping, CoupledGamma, FixedRate, QuadraticModel, Refresh

    w = setup.workload
    if setup.method == "sgd":
        return SGD(target, rate=w.sgd_rate, momentum=w.momentum, nesterov=True)
    rule = FixedRate(w.rate, w.momentum)
    if w.model == "exact":
        rule = QuadraticModel(w.model_fraction, least_examples=1)
    return KFAC(
        target,
        fisher=fisher_of(setup) or MonteCarlo(1),
        step_rule=rule,
        damping=ConstantDamping(w.damping),
        gamma=CoupledGamma(),
        refresh=Refresh(w.refresh, 1),
        averaging=None,
        statistics_fraction=w.statistics_fraction,
        l2=w.l2,
    )


def fisher_of(setup: Setup) -> Any:
    """The exact Fisher instead of sampled targets, where updates are to be compared."""
    from kfac_np import Exact

    return Exact() if setup.options.get("statistics") == "exact" else None


def start(setup: Setup) -> tuple[Any, Any, Any, Any]:
    """Objective, parameters and batch on the device."""
    import numpy as np

    from benchmarks.problems import problem
    from kfac_np import Rng, get_backend

    backend = get_backend("cupy" if setup.device == "cuda" else "numpy", setup.dtype)
    numbers = problem(setup.workload, setup.dtype)
    target = objective(setup.workload.network)
    matrices = iter([np.concatenate([w, b[:, None]], axis=1) for w, b in numbers.layers])
    # A layer without parameters has an empty tuple in their place.
    params = tuple(
        () if isinstance(p, tuple) else backend.asarray(next(matrices))
        for p in target.network.init(Rng(0), backend)
    )
    x = backend.asarray(numbers.x)
    t = x if setup.workload.network.loss == "sigmoid" else backend.asarray(numbers.t)
    return target, params, x, t


def build(setup: Setup) -> Running:
    """The steps of its optimiser."""
    from kfac_np import trees
    from kfac_np.backend import to_numpy

    target, params, x, t = start(setup)
    opt = optimizer(setup, target)
    state = opt.init(params)

    def step() -> str:
        nonlocal state
        state, report = opt.step(state, x, t)
        to_numpy(trees.leaves(state.params)[-1][:1, :1])  # waits for a GPU
        refreshed = getattr(report, "refreshed", ())
        return "refresh " + " ".join(refreshed) if refreshed else ""

    def layers() -> Any:
        matrices = [to_numpy(p) for p in trees.leaves(state.params)]
        return [(m[:, :-1], m[:, -1]) for m in matrices]

    return Running(step, layers)


if __name__ == "__main__":
    serve({"kfac_np": "pip install -e ."}, build, "kfac_np numpy cupy-cuda12x")
