"""Which training examples a prediction comes from: influence functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

from kfac_np.applications.fitted import FittedCurvature
from kfac_np.applications.influence_pairs import Pairs
from kfac_np.applications.influence_products import products_of
from kfac_np.backend import Array, array_namespace, quiet, require_array, require_finite
from kfac_np.errors import InputError
from kfac_np.matrices.base import require_damping
from kfac_np.objective import Evaluation, Objective
from kfac_np.validation import (
    listed,
    plain_fields,
    require_instance,
    require_integer,
    require_positive,
)

__all__ = ["Extremes", "Influence", "MeanEigenvalue", "extremes"]


@final
@dataclass(frozen=True)
class MeanEigenvalue:
    """λ = fraction · the mean eigenvalue of the layer's block of C, each layer its own.

    Parameters
    ----------
    fraction : float

    References
    ----------
    Grosse et al. 2023, arXiv:2308.03296 (a tenth).

    Examples
    --------
    >>> MeanEigenvalue()
    MeanEigenvalue(fraction=0.1)
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        plain_fields(self)
        require_positive("MeanEigenvalue fraction", self.fraction, zero=True)


@final
class Extremes(NamedTuple):
    """Numbers of examples, shape (..., k): those with the largest scores and with the smallest.

    Examples
    --------
    >>> import numpy as np
    >>> found = extremes(np.asarray([[0.0, 3.0, -2.0], [1.0, 2.0, 3.0]]), 1)
    >>> found.harmful
    array([[2],
           [0]])
    """

    helpful: Array
    harmful: Array


def extremes(scores: Array, k: int) -> Extremes:
    """The k examples with the largest scores and the k with the smallest, the most extreme first.

    Parameters
    ----------
    scores : Array, shape (..., N)
    k : int
        At most N.

    Examples
    --------
    >>> import numpy as np
    >>> extremes(np.asarray([0.0, 3.0, -2.0, 1.0]), 2)
    Extremes(helpful=array([1, 3]), harmful=array([2, 0]))
    """
    require_integer("extremes k", k)
    require_array("extremes scores", scores)
    require_finite("extremes scores", scores)
    if scores.ndim == 0 or k > scores.shape[-1]:
        raise InputError(f"extremes: expected scores of at least {k} examples, got {scores.shape}")
    order = array_namespace(scores).argsort(scores, axis=-1, stable=True)
    return Extremes(array_namespace(scores).flip(order[..., -k:], axis=-1), order[..., :k])


@final
@dataclass(frozen=True, eq=False)
class Influence:
    """g_qᵀ B⁻¹ g_t, B = C + λ I: what training on example t does for the loss of query q.

    g are gradients of the losses of single examples at θ (of one example's w ℓ, summed over its
    positions; nothing is divided by N), C is the curvature of a fit, a mean over M loss terms.
    Where training ended at a minimum of the mean loss, taking example t out of the mean changes the
    loss of query q by about

        + g_qᵀ B⁻¹ g_t / M.

    So a positive score is that of a helpful example: without it the query's loss would be higher.
    Whatever structure the fit has is what is inverted: K-FAC, EKFAC, diagonal, exact blocks, the
    whole matrix. Parameters that it does not have are held fixed.

    Of an affine layer with T = 1 no gradient is ever formed, and with K-FAC the work for a pair of
    examples grows like d_in + d_out, not d_in · d_out. Other layers form those of a few examples at
    a time, or none.

    Parameters
    ----------
    objective : Objective
        Whose losses are meant; of independent examples.
    fit : FittedCurvature
        Of the same network, at the θ at which gradients are taken.
    damping : float, mapping or MeanEigenvalue
        λ. A number stands for all layers, a mapping has one for each path; 0.1 of the layer's mean
        eigenvalue when omitted. B is C + λ I itself: no factor is damped. A weight decay η of
        training belongs here: B = C + η I is then the curvature of what was minimised.
    budget_bytes : int
        Roughly what may be held at once. Queries that do not fit are taken some at a time; each
        time costs a pass over the examples.

    References
    ----------
    Koh & Liang 2017, arXiv:1703.04730, eq. 2; Grosse et al. 2023, arXiv:2308.03296, §2 and §3.

    Examples
    --------
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> backend = get_backend("numpy", "float64")
    >>> objective, x = Objective(Dense(2, 1), SquaredError()), Rng(1).normal((9, 2), backend)
    >>> fit = fit_curvature(objective, backend.asarray([[1.0, 0.0, 0.0]]), [(x, x[:, 1:])])
    >>> influence = Influence(objective, fit, damping=0.01)
    >>> influence.scores((x[:2], x[:2, 1:]), (x, x[:, 1:])).shape
    (2, 9)
    """

    objective: Objective
    fit: FittedCurvature
    damping: float | Mapping[str, float] | MeanEigenvalue = MeanEigenvalue()
    budget_bytes: int = 2**28

    def __post_init__(self) -> None:
        require_instance("Influence objective", self.objective, Objective)
        require_instance("Influence fit", self.fit, FittedCurvature)
        require_integer("Influence budget_bytes", self.budget_bytes)
        network = self.objective.network
        if network.couples_examples:
            raise InputError(
                "Influence objective: expected independent examples, got a network with batch "
                "statistics; take `objective.evaluation(params, x)`, and fit that"
            )
        self.fit.require_network(network, "Influence fit")
        self.dampings  # noqa: B018 - what is wrong with it is said here

    @cached_property
    def dampings(self) -> dict[str, float]:
        """λ of each parameter, by path."""
        paths, damping = self.fit.paths, self.damping
        if isinstance(damping, MeanEigenvalue):
            means = {p: array_namespace(d).mean(d) for p, d in self.fit.matrix.diagonal().items()}
            return {path: damping.fraction * float(mean) for path, mean in means.items()}
        if not isinstance(damping, Mapping):
            damping = dict.fromkeys(paths, damping)
        if damping.keys() != set(paths):
            came = ", ".join(map(str, damping)) or "none"
            raise InputError(
                f"Influence damping: expected a number for {listed(paths)}, got {came}"
            )
        for path in paths:
            try:
                require_damping(damping[path])
            except InputError as error:
                raise error.within(f"Influence, layer {path}") from None
        return {path: float(damping[path]) for path in paths}

    # -------------------------------------------------------------------------------- scores

    def scores(
        self,
        queries: Sequence[Array],
        examples: Sequence[Array],
        *,
        query_terms: bool = False,
        terms: bool = False,
    ) -> Array:
        """g_qᵀ B⁻¹ g_t for every query and example.

        Parameters
        ----------
        queries, examples : tuple (x, t) or (x, t, weights)
            On the parameters' device; weights multiply the losses.
        query_terms, terms : bool
            Where an example has losses at S positions (a token each): one score for each of them,
            which add up to that of the example.

        Returns
        -------
        Array, shape (Q, [S,] N, [S])

        Raises
        ------
        InputError
            Queries or examples without targets, or that do not fit the network.
        FactorizationError
            B is singular: give damping.
        """
        each = [_terms if flag else _summed for flag in (query_terms, terms)]
        blocks: dict[int, list[Array]] = {}
        for start, cross, _ in self.pairs.cross(queries, each[0], examples, each[1]):
            blocks.setdefault(start, []).append(cross)
        xp = array_namespace(next(iter(blocks.values()))[0])
        found = xp.concat([xp.concat(b, axis=3) for b in blocks.values()], axis=1)
        found = xp.permute_dims(found, (1, 0, 3, 2))  # (Q, K_q, N, K)
        found = found if terms else found[..., 0]
        return found if query_terms else found[:, 0, ...]

    def self_influence(self, examples: Sequence[Array], *, terms: bool = False) -> Array:
        """g_tᵀ B⁻¹ g_t of each example: how much a fit depends on it; never negative.

        Parameters
        ----------
        examples : tuple (x, t) or (x, t, weights)
        terms : bool
            Of the loss at each position; these do not add up to that of the example.

        Returns
        -------
        Array, shape (N, [S])
        """
        grams = list(self.pairs.gram(examples, _terms if terms else _summed))
        xp = array_namespace(*grams)
        found = xp.concat([xp.linalg.diagonal(gram) for gram in grams], axis=0)
        return found if terms else found[:, 0]

    @cached_property
    @quiet
    def pairs(self) -> Pairs:
        """Products with B⁻¹, of derivatives along any vectors."""
        products = products_of(self.fit.matrix, self.dampings)
        return Pairs(self.objective, self.fit, products, self.budget_bytes)


def _summed(e: Evaluation) -> Array:
    """The gradient of each example's loss."""
    return e.output_gradient()[None, ...]


def _terms(e: Evaluation) -> Array:
    """The gradient of the loss at each position, (S, N, [S,] C)."""
    v, positions = e.output_gradient(), e.scale.positions
    xp = array_namespace(v)
    own = xp.eye(positions, dtype=v.dtype, device=v.device)[:, None, :, None]
    each = own * xp.reshape(v, (1, v.shape[0], positions, v.shape[-1]))
    return xp.reshape(each, (positions, *v.shape))
