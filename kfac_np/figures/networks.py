"""Small networks, trained for a few steps, whose matrices can be written out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, get_backend, to_numpy
from kfac_np.curvature import Curvature, KFACBlock, Moments
from kfac_np.data import ConstantBatch, digits
from kfac_np.figures.drawing import HostArray
from kfac_np.fisher import Exact
from kfac_np.layers import Tanh, glorot
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers import (
    KFAC,
    GammaSearch,
    IterateAverage,
    LevenbergMarquardt,
    Optimizer,
    QuadraticModel,
    published,
)
from kfac_np.training.loop import Supply, start, train
from kfac_np.training.models import autoencoder, mlp
from kfac_np.trees import Tree

__all__ = [
    "MiddleLayers",
    "as_in_the_paper",
    "damped",
    "enlarged_digits",
    "middle_moments",
    "small_autoencoder",
    "small_classifier",
    "trained",
]

# Chunks of columns of the exact Fisher that keep a backward pass, squared, to some 100 MB.
_BUDGET = 2**23


@final
@dataclass(frozen=True, eq=False)
class MiddleLayers:
    """A network part of the way through its training, and its layers between first and last.

    Attributes
    ----------
    evaluation : Evaluation
        On all of the data.
    paths : tuple of str
    gamma : float
        The γ that the optimiser worked with.
    summary : str
        What has been trained and how far, for a title.

    Examples
    --------
    >>> small_autoencoder(quick=True).paths
    ('2', '4', '5', '7')
    """

    evaluation: Evaluation
    paths: tuple[str, ...]
    gamma: float
    summary: str


def enlarged_digits() -> tuple[HostArray, HostArray]:
    """The digits, enlarged from 8 × 8 to 16 × 16 pixels by linear interpolation, and labels.

    Returns
    -------
    x : array, shape (1500, 256)
        In [0, 1].
    t : array of int, shape (1500,)

    Examples
    --------
    >>> x, t = enlarged_digits()
    >>> x.shape, t.shape
    ((1500, 256), (1500,))
    """
    data = digits()
    places = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)
    left = np.minimum(places.astype(int), 6)
    weights = np.zeros((16, 8))
    weights[np.arange(16), left] = 1 - (places - left)
    weights[np.arange(16), left + 1] = places - left
    small = data.x_train.reshape(-1, 8, 8).astype(np.float64)
    assert data.t_train is not None
    return (weights @ small @ weights.T).reshape(-1, 256), data.t_train


def small_autoencoder(quick: bool = False) -> MiddleLayers:
    """256-20-20-20-20-20-256, tanh units and a linear code, after 25 full-batch steps of K-FAC.

    Examples
    --------
    >>> small_autoencoder(quick=True).evaluation.outputs.shape
    (60, 256)
    """
    width, examples, steps = (6, 60, 5) if quick else (20, 500, 25)
    x, _ = enlarged_digits()
    x = x[:examples]
    objective = autoencoder((256, width, width, width), Tanh(), glorot)
    name = "-".join(["autoencoder 256", *[str(width)] * 5, "256"])
    kfac = as_in_the_paper(objective, 0.1)
    return _middle(kfac, x, x, steps, name)


def small_classifier(quick: bool = False) -> MiddleLayers:
    """256-20-20-20-20-20-10, tanh units, after 7 full-batch steps of K-FAC, as in the paper.

    Examples
    --------
    >>> small_classifier(quick=True).summary
    'classifier 256-6-6-6-6-6-10 after 7 steps, ... % training error'
    """
    width, examples = (6, 100) if quick else (20, 1500)
    x, t = enlarged_digits()
    objective = mlp((256, *(width,) * 5, 10))
    name = "-".join(["classifier 256", *[str(width)] * 5, "10"])
    kfac = as_in_the_paper(objective, 0.01, statistics_fraction=1.0)
    found = _middle(kfac, x[:examples], t[:examples], 7, name)
    z = to_numpy(found.evaluation.outputs)
    error = float(np.mean(np.argmax(z, axis=1) != t[:examples]))
    summary = f"{name} after 7 steps, {100 * error:.1f} % training error"
    return MiddleLayers(found.evaluation, found.paths, found.gamma, summary)


def as_in_the_paper(objective: Objective, damping: float, **changes: Any) -> KFAC:
    """K-FAC as the paper publishes it, with a λ₀ of one's own and what keeps small networks safe.

    That is the bound on what the quadratic model promises, bounds on γ, and an average of the
    iterates in which the first one leaves no trace.

    Examples
    --------
    >>> from kfac_np.training.models import mlp
    >>> as_in_the_paper(mlp((2, 1)), 0.5).statistics_fraction
    0.125
    """
    settings: dict[str, Any] = {
        "step_rule": QuadraticModel(least_examples=1),
        "damping": LevenbergMarquardt(initial=damping, floor=0.0),
        "gamma": GammaSearch(minimum=1e-5**0.5, maximum=1.0),
        "averaging": IterateAverage(power=0.0),
    }
    return published(objective, **{**settings, **changes})


def trained(optimizer: Optimizer, x: Array, t: Array, batch: int, steps: int, seed: int = 0) -> Any:
    """Train for some steps and return the optimiser's state.

    Examples
    --------
    >>> from kfac_np.optimizers import SGD
    >>> backend = get_backend()
    >>> x, t = (backend.asarray(part) for part in enlarged_digits())
    >>> trained(SGD(mlp((256, 3, 10))), backend.asarray(x, backend.dtype), t, 10, 2).step
    2
    """
    supply = Supply(x, t, ConstantBatch(batch), seed)
    position = start(optimizer, Backend.of(x), seed)
    for step in itertools.islice(train(optimizer, supply, position), steps):
        position = step.position
    return position.state


def _middle(kfac: KFAC, x: HostArray, t: HostArray, steps: int, name: str) -> MiddleLayers:
    backend = get_backend("numpy", "float64")
    inputs, targets = backend.asarray(x), backend.asarray(t)
    state = trained(kfac, inputs, targets, len(x), steps)
    e = kfac.objective.evaluate(state.params, inputs, targets)
    paths = tuple(path for path, _ in trees.items(state.params))[1:-1]
    summary = f"{name} after {steps} steps, loss {e.value:.3g}"
    return MiddleLayers(e, paths, float(state.gamma), summary)


def middle_moments(curvature: Curvature, middle: MiddleLayers) -> dict[str, Moments]:
    """Moments of the middle layers alone, with the exact Fisher on all of the data.

    Examples
    --------
    >>> from kfac_np.curvature import BlockDiagonal
    >>> list(middle_moments(BlockDiagonal(), small_classifier(quick=True)))
    ['2', '4', '6', '8']
    """
    e, total, inputs = middle.evaluation, None, {}
    for statistics in Exact(_BUDGET).statistics(e, Rng(0)):
        part = _only(middle.paths, statistics)
        if total is None:
            inputs = curvature.input_moments(part, e.scale)
            total = curvature.moments(part, e.scale)
        else:
            total = trees.axpy(1.0, curvature.moments(part, e.scale), total)
    assert total is not None
    return {path: {**inputs.get(path, {}), **m} for path, m in total.items()}


def damped(moments: Mapping[str, Moments], block: KFACBlock, gamma: float) -> dict[str, Moments]:
    """The same moments, A and G of every layer damped by the block's rule: factored Tikhonov.

    Examples
    --------
    >>> m = {"0": {"A": np.eye(1), "G": np.eye(1), "A_next": np.eye(1)}}
    >>> damped(m, KFACBlock(), 0.5)["0"]["A"]
    array([[1.5]])
    """
    out = {}
    for path, m in moments.items():
        shift_a, shift_g = block.rule(m["A"], m["G"], gamma)
        a, g = np.eye(m["A"].shape[0]), np.eye(m["G"].shape[0])
        out[path] = {**m, "A": m["A"] + shift_a * a, "G": m["G"] + shift_g * g}
    return out


def _only(paths: Iterable[str], tree: Tree) -> dict[str, Any]:
    found = dict(trees.items(tree))
    return {path: found[path] for path in paths}
