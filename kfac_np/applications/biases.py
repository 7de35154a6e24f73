"""Kronecker factors in which a bias is no part of its layer's weights."""

from __future__ import annotations

from dataclasses import replace

from kfac_np.applications.fitted import FittedCurvature
from kfac_np.backend import Array, array_namespace
from kfac_np.curvature import BlockDiagonal
from kfac_np.curvature.base import Moments
from kfac_np.errors import CurvatureError
from kfac_np.objective import Objective
from kfac_np.validation import require_instance

__all__ = ["separate_biases"]


def separate_biases(objective: Objective, fit: FittedCurvature) -> FittedCurvature:
    """K-FAC with weights and biases apart: blocks G ⊗ A' and G, instead of G ⊗ A.

    Inputs are homogeneous here, so that a layer has one A = E[ā āᵀ] for both. Without the entries
    that couple the column of ones to the inputs it has these two blocks exactly. It is there to
    compare with libraries that keep weights and biases apart.

    Parameters
    ----------
    objective : Objective
        Of the fit: it knows which layers have a bias.
    fit : FittedCurvature
        Of `BlockDiagonal` with Kronecker factors; blocks without have nothing to separate.

    Raises
    ------
    CurvatureError
        Another curvature.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> objective, x = Objective(Dense(1, 1), SquaredError()), np.ones((2, 1))
    >>> fit = fit_curvature(objective, np.ones((1, 2)), [(x, x)])
    >>> fit.moments[""]["A"].tolist(), separate_biases(objective, fit).moments[""]["A"].tolist()
    ([[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    """
    require_instance("separate_biases objective", objective, Objective)
    require_instance("separate_biases fit", fit, FittedCurvature)
    if not isinstance(fit.curvature, BlockDiagonal):
        raise CurvatureError(
            f"separate_biases: expected a fit of BlockDiagonal(), got {fit.curvature!r}"
        )

    def apart(path: str, m: Moments) -> Moments:
        biased = getattr(objective.network.at(path), "bias", False)
        return {**m, "A": _apart(m["A"])} if biased and "A" in m else m

    return replace(fit, moments={path: apart(path, m) for path, m in fit.moments.items()})


def _apart(a: Array) -> Array:
    xp = array_namespace(a)
    last = xp.arange(a.shape[-1], device=a.device) == a.shape[-1] - 1
    return xp.where(last[:, None] == last[None, :], a, 0.0 * a)
