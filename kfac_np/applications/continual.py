"""Several tasks, one network: what was learned holds on by its curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kfac_np import trees
from kfac_np.applications.conjugate import conjugate_gradients
from kfac_np.applications.fitted import FittedCurvature, merge
from kfac_np.backend import Array, array_namespace
from kfac_np.errors import InputError
from kfac_np.matrices import TreeMatrix
from kfac_np.penalties import Anchor, Quadratic
from kfac_np.trees import Tree
from kfac_np.validation import (
    is_number,
    require_in,
    require_instance,
    require_integer,
    require_positive,
)

__all__ = ["ewc", "merge_networks", "online_laplace"]


def ewc(
    *fits: FittedCurvature, strength: float, online: bool = False, decay: float = 1.0
) -> Quadratic:
    """Elastic weight consolidation: Σ_i (λ/2) γ^(T-i) (θ - c_i)ᵀ C_i (θ - c_i).

    C_i is a mean over the terms of task i, the fits in the order of the tasks 1..T. Give it to an
    optimiser as `penalty` while the next task is learned.

    Parameters
    ----------
    *fits : FittedCurvature
        A fit to each earlier task, at the parameters after it.
    strength : float
        λ.
    online : bool
        c_i is θ_T, the parameters after the last task, for all i; otherwise each task's own θ_i.
    decay : float
        γ, in (0, 1].

    Returns
    -------
    Quadratic

    References
    ----------
    Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3 (diagonal C); Schwarz et al. 2018,
    arXiv:1805.06370, §4 (online, with decay).

    Examples
    --------
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> backend = get_backend("numpy", "float64")
    >>> objective, x = Objective(Dense(2, 1), SquaredError()), Rng(1).normal((9, 2), backend)
    >>> params = objective.network.init(Rng(0), backend)
    >>> fit = fit_curvature(objective, params, [(x, x[:, :1])])
    >>> float(ewc(fit, strength=10.0).value(params))
    0.0
    """
    _require_alike("ewc", fits)
    require_positive("ewc strength", strength, zero=True)
    require_in("ewc decay", decay, "(0, 1]")
    last = fits[-1]
    return Quadratic(
        tuple(
            Anchor(
                strength * decay ** (len(fits) - 1 - i),
                _matrix(fit),
                (last if online else fit).operand,
            )
            for i, fit in enumerate(fits)
        )
    )


def online_laplace(*fits: FittedCurvature, terms: int, prior_precision: float = 0.0) -> Quadratic:
    """-log p(θ | earlier tasks) / M for the next task, of M terms, whose loss is a mean over them.

    The posterior after T tasks is N(θ_T, (Σ_i M_i C_i + δ I)⁻¹): the penalty is
    (1/2M) (θ - θ_T)ᵀ (Σ_i M_i C_i + δ I) (θ - θ_T). For a linear model, learned task after task to
    the minimum, this is what learning from all data at once gives.

    Parameters
    ----------
    *fits : FittedCurvature
        A fit to each earlier task; θ_T is the last one's.
    terms : int
        M: examples of the next task, times positions with a target of their own.
    prior_precision : float
        δ.

    Returns
    -------
    Quadratic

    Notes
    -----
    A sum of Kronecker products is kept as it is, a product for each task. In constant memory:
    `merge` the fits first, which averages their factors.

    References
    ----------
    Ritter, Botev & Barber 2018, arXiv:1805.07810, §3.

    Examples
    --------
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> backend = get_backend("numpy", "float64")
    >>> objective, x = Objective(Dense(2, 1), SquaredError()), Rng(1).normal((9, 2), backend)
    >>> fit = fit_curvature(objective, objective.network.init(Rng(0), backend), [(x, x[:, :1])])
    >>> [anchor.strength for anchor in online_laplace(fit, terms=18, prior_precision=9.0).anchors]
    [0.5, 0.5]
    """
    _require_alike("online_laplace", fits)
    require_integer("online_laplace terms", terms)
    require_positive("online_laplace prior_precision", prior_precision, zero=True)
    center = fits[-1].operand
    anchors = [Anchor(fit.terms / terms, _matrix(fit), center) for fit in fits]
    if prior_precision:
        anchors.append(Anchor(prior_precision / terms, None, center))
    return Quadratic(tuple(anchors))


def merge_networks(
    *fits: FittedCurvature, weights: Sequence[float] | None = None, damping: float = 0.0
) -> Tree:
    """One network of several that were trained apart: θ = (Σ w_i C_i)⁻¹ Σ w_i C_i θ_i.

    The minimum of the sum of their quadratic models, damped by (δ/2) ‖θ - θ̄‖² with θ̄ the weighted
    mean of the θ_i. Where no C_i says anything, and for parameters without curvature, it is θ̄.

    Parameters
    ----------
    *fits : FittedCurvature
        Two or more, of one network, each at its own parameters.
    weights : sequence of float, optional
        w_i; by default the number of terms of each fit, so that C_i counts as the curvature of the
        sum of its losses.
    damping : float
        δ.

    Returns
    -------
    tree of Array
        In the structure and dtype of the parameters.

    Raises
    ------
    InputError
        Fits of different networks; fewer than two; weights that do not fit.
    FactorizationError
        Conjugate gradients did not converge.

    References
    ----------
    Matena & Raffel 2022, arXiv:2111.09832, eq. 3 (diagonal C).

    Examples
    --------
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> backend = get_backend("numpy", "float64")
    >>> objective, x = Objective(Dense(2, 1), SquaredError()), Rng(1).normal((9, 2), backend)
    >>> fits = [fit_curvature(objective, backend.asarray([[w, 0.0, 0.0]]), [(x, x[:, :1])])
    ...         for w in (1.0, 3.0)]
    >>> merge_networks(*fits).round(9)
    array([[2., 0., 0.]])
    """
    _require_alike("merge_networks", fits, least=2)
    require_positive("merge_networks damping", damping, zero=True)
    shares = [float(fit.terms) for fit in fits] if weights is None else list(weights)
    if len(shares) != len(fits) or not all(is_number(w) and w > 0.0 for w in shares):
        raise InputError(
            f"merge_networks weights: expected {len(fits)} numbers > 0, got {weights!r}"
        )
    total = sum(shares)
    shares, level = [w / total for w in shares], damping / total
    points = [_double(fit.operand) for fit in fits]
    mean = _weighted(shares, points)

    def product(v: Tree) -> Tree:
        return trees.axpy(level, v, _weighted(shares, [fit.matrix.matvec(v) for fit in fits]))

    away = [
        fit.matrix.matvec(trees.axpy(-1.0, mean, point))
        for fit, point in zip(fits, points, strict=True)
    ]
    b = _weighted(shares, away)
    if float(trees.squared_norm(b)) > 0.0:
        near = _nearly_inverse(fits, shares, level)
        step = conjugate_gradients(product, b, near, tolerance=1e-12, what="merge_networks")
        mean = trees.axpy(1.0, step, mean)
    everything = _weighted(shares, [_double(fit.params) for fit in fits])

    def leaf(path: str, p: Array) -> Array:
        return array_namespace(p).astype({**everything, **mean}[path], p.dtype)

    return trees.map_named(leaf, fits[0].params)


def _nearly_inverse(
    fits: Sequence[FittedCurvature], shares: Sequence[float], level: float
) -> Callable[[Tree], Tree]:
    """The inverse of one matrix in the place of the sum: of moments averaged, or the diagonal."""
    kinds = {(repr(fit.curvature), fit.fisher) for fit in fits}
    if len(kinds) == 1 and fits[0].curvature.additive:
        one: TreeMatrix = merge(*fits, params=fits[0].params).matrix
        size = sum(math.prod(x.shape) for x in fits[0].operand.values())
        mean = float(one.trace()) / size
        return one.power(-1.0, level + (1e-6 * mean if mean > 0.0 else 1.0)).matvec

    diagonal = _weighted(shares, [fit.matrix.diagonal() for fit in fits])

    def leaf(x: Array, d: Array) -> Array:
        xp = array_namespace(d)
        return x / (d + level + 1e-6 * xp.mean(d) + xp.finfo(d.dtype).smallest_normal)

    return lambda v: trees.tree_map(leaf, v, diagonal)


def _matrix(fit: FittedCurvature) -> TreeMatrix:
    """C in the precision of the parameters, for products in every step."""
    dtype = next(iter(fit.operand.values())).dtype
    moments = trees.tree_map(lambda x: array_namespace(x).astype(x, dtype), fit.moments)
    return fit.curvature.matrix(moments, fit.operand)


def _double(tree: Tree) -> Tree:
    return trees.tree_map(lambda x: array_namespace(x).astype(x, array_namespace(x).float64), tree)


def _weighted(shares: Sequence[float], each: Sequence[Tree]) -> dict[str, Array]:
    """Σ w_i x_i, by path."""
    total = trees.scale(shares[0], dict(trees.items(each[0])))
    for share, tree in zip(shares[1:], each[1:], strict=True):
        total = trees.axpy(share, dict(trees.items(tree)), total)
    found: dict[str, Array] = total
    return found


def _require_alike(place: str, fits: Sequence[FittedCurvature], least: int = 1) -> None:
    if len(fits) < least:
        raise InputError(f"{place}: expected {least} fits at least, got {len(fits) or 'none'}")
    for fit in fits:
        require_instance(place, fit, FittedCurvature)
    for number, fit in enumerate(fits[1:], 2):
        try:
            fits[0].require_operand(fit.operand)
        except InputError as error:
            raise error.within(f"{place}: fit {number}") from None
