"""Smaller networks: weights, units or directions that the loss hardly needs are taken out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from kfac_np import trees
from kfac_np.applications.factoring import FACTORINGS
from kfac_np.applications.fit import fit_curvature
from kfac_np.applications.fitted import FittedCurvature, chosen_paths
from kfac_np.applications.pruning_round import Pruned, Remove, Round
from kfac_np.applications.saliency import METHODS, Method
from kfac_np.applications.shrinking import find_links, matrices, size_of
from kfac_np.backend import Array
from kfac_np.errors import InputError
from kfac_np.fisher import Exact, FisherType
from kfac_np.objective import Objective
from kfac_np.validation import (
    require_in,
    require_instance,
    require_integer,
    require_one_of,
    require_positive,
)

__all__ = ["prune"]

_REMOVE = ("weights", "units", "inputs", *FACTORINGS)


def prune(
    objective: Objective,
    fit: FittedCurvature,
    share: float,
    *,
    remove: Remove = "units",
    method: Method = "obs",
    damping: float | None = None,
    rounds: int = 1,
    batches: Iterable[Sequence[Array]] | None = None,
    fisher: FisherType | None = None,
    paths: Iterable[str] | None = None,
) -> Pruned:
    """Remove a share of a network's parameters, those that the quadratic model needs least.

    Parameters
    ----------
    objective : Objective
    fit : FittedCurvature
        Of this network, at a minimum of the loss; gradients are taken as zero.
    share : float
        Of all parameters of the network, in (0, 1); a little more goes where the last unit makes
        it so.
    remove : str
        "weights": single weights of matrices (no biases) become zeros. All others change shapes:
        "units": rows of W̄, and the columns of the next layer that read them;
        "inputs": columns that read a unit, and then the unit: what other units and the bias can
        take over, they take over;
        "rank": W̄ ≈ P Q, the best of its rank in the metric of G ⊗ A, as two layers;
        "eigenvectors": the same in the eigenbasis of G or A (EigenDamage).
    method : str
        For the first three: "obs" (the rest compensates), "obd", or "magnitude" (no curvature).
    damping : float, optional
        λ of H = C + λ I, for "obs" and "obd". By default a hundredth of the mean of C's diagonal.
    rounds : int
        More than one: shares grow from round to round, with a fit to what is left in between.
    batches : iterable of (x, t) or (x, t, weights), optional
        To fit again; needed for more rounds than one.
    fisher : FisherType, optional
        To fit again; `Exact()` when omitted.
    paths : iterable of str, optional
        Layers to cut: whose weights, units, inputs or ranks go. All that can be when omitted.

    Returns
    -------
    Pruned

    Raises
    ------
    InputError
        A fit of another network; a layer that cannot be cut so; more than there is to remove.
    CurvatureError
        "rank" with another curvature than Kronecker products, rows or columns with one that
        couples layers.

    Notes
    -----
    Units go by cost divided by the number of parameters that they free. In `Sequential`, `Residual`
    inside too, a unit can go where one `Dense` or `Conv` reads it and what is between acts on each
    unit alone; outputs of the network, and what is added to a shortcut, stay.

    References
    ----------
    LeCun et al. 1990; Hassibi & Stork 1993; Wang et al. 2019, arXiv:1905.05934.

    Examples
    --------
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> from kfac_np.losses import SquaredError
    >>> backend = get_backend("numpy", "float64")
    >>> objective = Objective(Sequential(Dense(2, 8), Tanh(), Dense(8, 1)), SquaredError())
    >>> params, x = objective.network.init(Rng(0), backend), Rng(1).normal((20, 2), backend)
    >>> fit = fit_curvature(objective, params, [(x, x[:, :1])])
    >>> prune(objective, fit, share=0.5).objective.network
    Sequential(Dense(2, 3), Tanh(), Dense(3, 1))
    """
    _check(objective, fit, share, remove, method, damping, rounds, batches, fisher)
    again = Exact() if fisher is None else fisher
    data = None if batches is None or rounds == 1 else list(batches)
    total = size_of(fit.params)
    start = {path: math.prod(p.shape) for path, p in trees.items(fit.params)}
    chosen = _cuttable(objective, fit, remove, paths)
    result = Pruned(objective, fit.params, {}, 0.0, {}, {}, (total, total))
    for number in range(1, rounds + 1):
        if number > 1:
            assert data is not None
            fit = fit_curvature(
                result.objective, result.params, data, fit.curvature, again, paths=fit.paths
            )
        gone = share if number == rounds else 1.0 - (1.0 - share) ** (number / rounds)
        step = Round(
            result.objective, fit, total, gone, share, remove, method, damping, chosen
        ).run()
        result = replace(step, predicted=result.predicted + step.predicted)
    return replace(result, before={path: start[path] for path in result.after})


def _check(
    objective: Any,
    fit: Any,
    share: Any,
    remove: Any,
    method: Any,
    damping: Any,
    rounds: Any,
    batches: Any,
    fisher: Any,
) -> None:
    require_instance("prune objective", objective, Objective)
    require_instance("prune fit", fit, FittedCurvature)
    require_in("prune share", share, "(0, 1)")
    require_one_of("prune remove", remove, _REMOVE)
    require_one_of("prune method", method, METHODS)
    if damping is not None:
        require_positive("prune damping", damping, zero=True)
    require_integer("prune rounds", rounds)
    require_instance("prune fisher", fisher, FisherType, optional=True)
    if rounds > 1:
        if batches is None:
            raise InputError(f"prune batches: expected data to fit again in {rounds} rounds")
        if remove in FACTORINGS:
            raise InputError(f'prune rounds: expected 1 with remove="{remove}", got {rounds}')
        again = repr(Exact() if fisher is None else fisher)
        if again != fit.fisher:
            raise InputError(f"prune fisher: expected that of the fit, {fit.fisher}, got {again}")
    fit.require_network(objective.network, "prune fit")


def _cuttable(
    objective: Objective, fit: FittedCurvature, remove: Remove, paths: Iterable[str] | None
) -> tuple[str, ...]:
    """Paths of the layers whose curvature decides, all or those that were asked for."""
    links = find_links(objective.network)
    known = list(matrices(objective.network))
    if remove == "units":
        known = [path for path in known if path in links]
    elif remove == "inputs":
        read = {link.to for link in links.values()}
        known = [path for path in known if path in read]
    known = [path for path in known if path in fit.paths]
    if not known:
        raise InputError(
            f"prune: expected layers with {remove} that can go, got none in the fit; with "
            'remove="weights" or "rank" every layer can be cut'
        )
    return tuple(known) if paths is None else chosen_paths(paths, known)
