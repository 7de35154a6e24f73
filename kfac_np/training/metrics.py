"""What is reported about a model: loss, reconstruction error, accuracy, evaluated in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

from kfac_np.backend import Array, array_namespace, logistic
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import Layer
from kfac_np.losses import SigmoidCrossEntropy
from kfac_np.objective import Objective
from kfac_np.trees import Tree

__all__ = ["Metrics", "Task", "chunk_size", "evaluate", "reconstruct"]

_LARGEST_CHUNK, _NUMBERS_AT_ONCE = 1000, 2**24

Task = Literal["reconstruction", "classification"]
"""What the targets are: the inputs themselves, or class labels."""


@final
@dataclass(frozen=True)
class Metrics:
    """Means over the examples of an evaluation set.

    Attributes
    ----------
    loss : float
        The objective without ℓ2 term: mean over loss terms of the loss, which sums over outputs.
    reconstruction_error : float or None
        Squared error of the reconstruction, summed over pixels (without a factor ½), mean over
        examples; None unless the task is reconstruction.
    accuracy : float or None
        Fraction of examples whose largest logit is that of the label; None unless the task is
        classification.

    Examples
    --------
    >>> Metrics(loss=2.5, accuracy=0.5).as_dict()
    {'loss': 2.5, 'accuracy': 0.5}
    """

    loss: float
    reconstruction_error: float | None = None
    accuracy: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The metrics that apply, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def evaluate(
    objective: Objective, params: Tree, x: Array, t: Array, task: Task, chunk: int | None = None
) -> Metrics:
    """Evaluate a model on examples, some at a time, so that memory does not grow with them.

    Parameters
    ----------
    objective : Objective
        As it is used after training: batch statistics must be frozen (`Objective.evaluation`),
        since those of a chunk would make the result depend on the chunks.
    params : tree of Array
    x : Array, shape (N, ...)
    t : Array
        Targets; for reconstruction usually `x` itself.
    task : {"reconstruction", "classification"}
    chunk : int, optional
        Examples at a time; by default so many that the outputs of all layers together are 2²⁴
        numbers, and 1000 at most.

    Returns
    -------
    Metrics
        Means over all N examples.

    Raises
    ------
    InputError
        The network still takes batch statistics.
    ShapeError
        There are no examples, or not as many targets.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Identity
    >>> from kfac_np.losses import SigmoidCrossEntropy
    >>> x = np.asarray([[0.0, 1.0], [1.0, 1.0]])
    >>> objective = Objective(Identity(), SigmoidCrossEntropy())
    >>> evaluate(objective, (), x, x, "reconstruction", chunk=1).reconstruction_error
    0.23349423...
    """
    xp = array_namespace(x)
    loss = error = correct = 0.0
    terms = 0
    n = x.shape[0]
    if n == 0 or t.shape[0] != n:
        raise ShapeError(
            f"evaluation: expected as many targets as inputs, got {t.shape[0]} and {n}"
        )
    if chunk is None:
        chunk = chunk_size(objective.network, x.shape[1:])
    for rows in _chunks(n, chunk):
        target = t[rows, ...]
        z = _outputs(objective, params, x[rows, ...])
        values = objective.loss.value(z, target)
        terms += math.prod(values.shape)
        loss += float(xp.sum(values))
        if task == "reconstruction":
            difference = _mean_output(objective, z) - target
            error += float(xp.sum(difference * difference))
        else:
            labels = target if target.ndim == z.ndim - 1 else xp.argmax(target, axis=-1)
            hits = xp.argmax(z, axis=-1) == labels
            correct += float(xp.mean(xp.astype(hits, z.dtype))) * z.shape[0]
    if task == "reconstruction":
        return Metrics(loss / terms, reconstruction_error=error / n)
    return Metrics(loss / terms, accuracy=correct / n)


def reconstruct(objective: Objective, params: Tree, x: Array) -> Array:
    """Mean of the model's distribution of outputs, for each input: what it takes `x` to be.

    Batch statistics must be frozen, as for `evaluate`.

    Returns
    -------
    Array, shape of the outputs

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Identity
    >>> reconstruct(Objective(Identity(), SigmoidCrossEntropy()), (), np.zeros((1, 2)))
    array([[0.5, 0.5]])
    """
    return _mean_output(objective, _outputs(objective, params, x))


def _outputs(objective: Objective, params: Tree, x: Array) -> Array:
    if objective.network.couples_examples:
        raise InputError(
            "evaluation: expected a network whose examples do not influence each other, got one "
            "with batch statistics; freeze them with Objective.evaluation"
        )
    # Unlike `forward`, this keeps no caches, which are larger than all else.
    return objective.network.evaluation(params, x)[1]


def chunk_size(network: Layer, shape: tuple[int, ...]) -> int:
    """Examples at a time, so that the outputs of all layers together are 2²⁴ numbers; 1000 at most.

    Examples
    --------
    >>> from kfac_np.layers import Dense
    >>> chunk_size(Dense(4, 2), (4,)), chunk_size(Dense(4, 2**20), (4,))
    (1000, 16)
    """
    return max(1, min(_LARGEST_CHUNK, _NUMBERS_AT_ONCE // max(1, network.backward_size(shape))))


def _mean_output(objective: Objective, z: Array) -> Array:
    return logistic(z) if isinstance(objective.loss, SigmoidCrossEntropy) else z


def _chunks(n: int, size: int) -> Iterator[Any]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
