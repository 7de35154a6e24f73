"""Moments of the curvature: which examples they are taken from, and what is mixed in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

from kfac_np import trees
from kfac_np.backend import DeferredChecks, Scalar, are_finite, array_namespace, scalar, select
from kfac_np.curvature import Curvature, LadderEvent, Moments
from kfac_np.errors import DivergenceError, InputError
from kfac_np.objective import Evaluation
from kfac_np.optimizers.kfac_state import KFACState
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_in, require_integer

__all__ = ["Events", "MovingAverage", "first_examples", "loss_per_parameter", "mixed"]

Events = list[tuple[Scalar | bool, LadderEvent]]
"""What has happened, if its condition holds."""

_PROPORTION = 30.0  # of a batch's moments to their average, beyond which the batch counts for less
_FIRST_STEPS = 3  # each with an estimate of its own
_OF_LOSS = 10.0  # of the loss for each parameter: what tr F̂ may have been too small to show


@final
@dataclass(frozen=True)
class MovingAverage:
    """Moments ← ε moments + (1 - ε) new, ε = min(1 - 1/n, decay) for the n-th estimate.

    A plain mean at first.

    Parameters
    ----------
    decay : float
        In [0, 1).
    interval : int
        There is an estimate in the first three steps, and in those that it divides.

    References
    ----------
    Martens & Grosse 2015, §5.

    Examples
    --------
    >>> MovingAverage().epsilon(1), MovingAverage().epsilon(4), MovingAverage().epsilon(1000)
    (0.0, 0.75, 0.95)
    >>> [k for k in range(1, 20) if MovingAverage(interval=8).due(k)]
    [1, 2, 3, 8, 16]
    """

    decay: float = 0.95
    interval: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        require_in("MovingAverage decay", self.decay, "[0, 1)")
        require_integer("MovingAverage interval", self.interval)

    def due(self, k: int) -> bool:
        """Tell whether there is an estimate in step k."""
        return k <= _FIRST_STEPS or k % self.interval == 0

    def epsilon(self, k: int) -> float:
        """Weight of the old moments in step k, which has an estimate."""
        first = min(k, _FIRST_STEPS)
        estimates = first + k // self.interval - first // self.interval
        return min(1.0 - 1.0 / estimates, self.decay)


def first_examples(
    e: Evaluation, fraction: float, checks: DeferredChecks, least: int = 1
) -> Evaluation:
    """The first examples of a mini-batch, of which some must have a positive weight."""
    examples = e.scale.examples
    part = e.take(max(math.ceil(fraction * examples), min(least, examples)))
    w = part.scale.weights
    if w is not None:
        checks.require(
            array_namespace(w).max(w) > 0.0,
            lambda: InputError(
                f"weights: expected a positive weight among the first {part.scale.examples} of "
                f"{examples} examples, which the curvature is taken from; shuffle the batch"
            ),
        )
    return part


def mixed(
    curvature: Curvature,
    state: KFACState,
    estimate: Callable[[], dict[str, Moments]],
    epsilon: float,
    checks: DeferredChecks,
) -> tuple[dict[str, Moments], Events]:
    """ε old + (1 - ε) new moments; where the new ones are not finite, the old ones."""
    old = state.moments
    try:
        new = estimate()
    except DivergenceError:  # of targets drawn on the host
        checks.wait()  # what went wrong before says more
        raise
    events: Events = []
    for path, m in new.items():
        names, good = ", ".join(m), are_finite(*m.values())
        if old:
            events.append((~good, LadderEvent(path, names, "moments rejected", 0.0)))
            new[path] = trees.select(good, m, old[path])
        else:
            checks.require(good, partial(_no_moments, state.step + 1, path, names))
    if not old:
        return new, events
    if state.objective is not None:
        new, more = _in_proportion(curvature, state, new, state.objective)
        events += more
    return curvature.mix(old, new, epsilon), events


def _in_proportion(
    curvature: Curvature, state: KFACState, new: dict[str, Moments], h: Scalar
) -> tuple[dict[str, Moments], Events]:
    """Moments that rule no average: a batch counts as _PROPORTION times the average at most.

    So a lasting change is followed within a few dozen steps, however large it is. Next to the
    loss, tr F̂_i may be tiny for a while, of a network that is sure of itself, and then grow.
    """
    before = curvature.block_traces(state.moments, state.params, state.units)
    now = curvature.block_traces(new, state.params, state.units)
    sizes = {path: math.prod(p.shape) for path, p in trees.items(state.params)}
    least = loss_per_parameter(state.params, h)
    weights: dict[str, Scalar] = {}
    events: Events = []
    for path in before:
        trace = scalar(now[path])
        most = _PROPORTION * (scalar(before[path]) + sizes[path] * least)
        outsized = (trace > most) & (most > 0.0)
        weights[path] = select(outsized, most / select(outsized, trace, 1.0), 1.0)
        event = LadderEvent(path, "moments", "moments out of proportion", 0.0)
        events.append((outsized, event))
    return curvature.weighted(state.moments, new, weights), events


def loss_per_parameter(params: Tree, h: Scalar) -> Scalar:
    """_OF_LOSS h / n for n parameters, 0 where h < 0 or infinite.

    In a layer's own units F̂ has the unit of h. A network that is sure of wrong answers has no F̂
    that is worth the name; this much it will have.
    """
    good = (h > 0.0) & array_namespace(h).isfinite(h)
    n = sum(math.prod(p.shape) for p in trees.leaves(params))
    return _OF_LOSS / n * select(good, h, 0.0)


def _no_moments(k: int, path: str, names: str) -> DivergenceError:
    return DivergenceError(
        f"step {k}: layer {path}: the moments {names} are not finite, and there are no earlier "
        "ones to keep; scale the data"
    )
