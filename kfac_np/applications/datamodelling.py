"""Do scores say what training on other data does? The linear datamodelling score."""

from __future__ import annotations

from kfac_np.backend import Array, Backend, Rng, array_namespace, require_array, require_finite
from kfac_np.errors import ShapeError
from kfac_np.validation import require_instance, require_sizes

__all__ = ["linear_datamodelling_score", "random_halves"]


def random_halves(number: int, examples: int, rng: Rng | int, backend: Backend) -> Array:
    """Random halves of a training set, as rows of 0 and 1 of shape (number, examples).

    A row is a vector of weights of the examples, or tells which of them to take. With an odd number
    of examples one more is left out than taken.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> random_halves(3, 7, Rng(0), get_backend("numpy", "float64")).sum(axis=1)
    array([3., 3., 3.])
    """
    require_sizes("random_halves", number=number, examples=examples)
    require_instance("random_halves backend", backend, Backend)
    drawn = Rng.of(rng).normal((number, examples), backend)
    xp = array_namespace(drawn)
    ranks = xp.argsort(xp.argsort(drawn, axis=1), axis=1)
    return xp.astype(ranks < examples // 2, drawn.dtype)


def linear_datamodelling_score(scores: Array, subsets: Array, losses: Array) -> Array:
    """How well sums of scores order the losses of networks trained on subsets of the data.

    For each query, Spearman's rank correlation over the subsets S between what the scores predict,
    - Σ_{t ∈ S} scores[q, t], and the loss that networks trained on S have: 1 when the order is
    right. Let `losses` be means over networks trained from several initialisations: what is asked
    is what the data do.

    Parameters
    ----------
    scores : Array, shape (Q, N)
        As of `Influence.scores`: positive where training on t lowers the loss of q.
    subsets : Array, shape (R, N)
        1 where a subset has the example and 0 elsewhere (`random_halves`).
    losses : Array, shape (R, Q)
        Of the queries, after training on each subset.

    Returns
    -------
    Array, shape (Q,)
        In [-1, 1]; 0 where all predictions or all losses are equal.

    References
    ----------
    Park et al. 2023, arXiv:2303.14186, §2; Ilyas et al. 2022, arXiv:2202.00622.

    Examples
    --------
    >>> import numpy as np
    >>> subsets = np.asarray([[1.0, 0.0], [0.0, 1.0]])
    >>> linear_datamodelling_score(np.asarray([[2.0, -1.0]]), subsets, np.asarray([[0.1], [0.5]]))
    array([1.])
    """
    for name, x in (("scores", scores), ("subsets", subsets), ("losses", losses)):
        require_array(f"linear_datamodelling_score {name}", x)
        if name != "subsets":  # which may be flags
            require_finite(f"linear_datamodelling_score {name}", x)
    sizes = [x.shape for x in (scores, subsets, losses)]
    if any(len(size) != 2 for size in sizes) or (
        (sizes[1][1], sizes[2][::-1]) != (sizes[0][1], (sizes[0][0], sizes[1][0]))
    ):
        raise ShapeError(
            "linear_datamodelling_score: expected scores (Q, N), subsets (R, N) and losses (R, Q), "
            f"got {sizes[0]}, {sizes[1]} and {sizes[2]}"
        )
    xp = array_namespace(scores, subsets, losses)
    predicted, found = _ranks(-scores @ xp.astype(subsets, scores.dtype).T), _ranks(losses.T)
    spread = xp.linalg.vector_norm(predicted, axis=1) * xp.linalg.vector_norm(found, axis=1)
    correlation = xp.vecdot(predicted, found, axis=-1)
    return xp.where(
        spread > 0, correlation / xp.where(spread > 0, spread, xp.ones_like(spread)), 0.0
    )


def _ranks(x: Array) -> Array:
    """Ranks in each row (Q, R) about their mean; equal values share the mean of theirs."""
    xp = array_namespace(x)
    above = xp.astype(x[:, :, None] > x[:, None, :], x.dtype)
    below = xp.astype(x[:, :, None] < x[:, None, :], x.dtype)
    return 0.5 * xp.sum(above - below, axis=2)
