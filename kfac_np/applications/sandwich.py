"""The sandwich: a covariance of estimated parameters that trusts the model less."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np import trees
from kfac_np.applications.fitted import FittedCurvature
from kfac_np.backend import Array, array_namespace
from kfac_np.errors import InputError
from kfac_np.matrices import BlockDiagonalMatrix, DiagonalMatrix, TreeMatrix
from kfac_np.validation import require_instance, require_positive

__all__ = ["Sandwich"]


@final
@dataclass(frozen=True, eq=False)
class Sandwich:
    """Cov(θ̂) ≈ (1/M) J⁻¹ I J⁻¹, J = curvature + damping · I, I = second moment of the gradients.

    Where the model is true both are the same matrix and this is J⁻¹/M. Where it is not (noise of
    another size or shape, an approximation of the curvature), J⁻¹/M is no covariance of anything,
    and this still is: that of the estimate over data sets. For a generalised linear model at its
    maximum it is the robust covariance of statistics, HC0.

    Parameters
    ----------
    bread : FittedCurvature
        Gives J; fitted with `Exact`.
    meat : FittedCurvature
        Gives I; fitted with `Empirical` to the same data at the same parameters.
    damping : float

    Raises
    ------
    InputError
        The fits are of different parameters or data.

    References
    ----------
    Huber 1967; White 1982, "Maximum Likelihood Estimation of Misspecified Models".

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.curvature import FullMatrix
    >>> from kfac_np.fisher import Empirical
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> objective, x = Objective(Dense(1, 1, bias=False), SquaredError()), np.ones((4, 1))
    >>> data = [(x, np.asarray([[1.0], [-1.0], [3.0], [-3.0]]))]  # the mean is 0
    >>> fits = [fit_curvature(objective, np.zeros((1, 1)), data, FullMatrix(), fisher)
    ...     for fisher in (None, Empirical())]
    >>> Sandwich(*fits).covariance()  # of the mean: 5/4, whatever the model takes noise to be
    array([[1.25]])
    """

    bread: FittedCurvature
    meat: FittedCurvature
    damping: float = 0.0

    def __post_init__(self) -> None:
        require_instance("Sandwich bread", self.bread, FittedCurvature)
        require_instance("Sandwich meat", self.meat, FittedCurvature)
        require_positive("Sandwich damping", self.damping, zero=True)
        self.bread.require_operand(self.meat.operand)
        if self.bread.terms != self.meat.terms:
            raise InputError(
                f"Sandwich meat: expected a fit to {self.bread.terms} terms, as the bread is, got "
                f"one to {self.meat.terms}"
            )
        d = trees.axpy(-1.0, self.bread.operand, self.meat.operand)
        if float(trees.squared_norm(d)) != 0.0:
            raise InputError("Sandwich meat: expected a fit at the parameters of the bread")

    @cached_property
    def _bread(self) -> TreeMatrix:
        return self.bread.matrix.power(-1.0, self.damping)

    def matvec(self, v: Mapping[str, Array]) -> dict[str, Array]:
        """Cov(θ̂) v, for v like `bread.operand`."""
        self.bread.require_operand(v)
        product = self.meat.matrix.matvec(self._bread.matvec(dict(v)))
        found: dict[str, Array] = trees.scale(1.0 / self.bread.terms, self._bread.matvec(product))
        return found

    def covariance(self) -> Array:
        """Cov(θ̂) itself, parameters in the order of `trees.ravel`, shape (P, P)."""
        j, i = self._bread.to_dense(), self.meat.matrix.to_dense()
        return (j @ i @ j) / self.bread.terms

    def standard_errors(self) -> dict[str, Array]:
        """Roots of its diagonal, by path; a layer at a time where neither couples layers."""
        bread, meat = self._bread, self.meat.matrix
        if not (isinstance(bread, BlockDiagonalMatrix) and isinstance(meat, BlockDiagonalMatrix)):
            whole = self.covariance()
            xp = array_namespace(whole)
            roots: dict[str, Array] = trees.unravel(
                xp.sqrt(xp.linalg.diagonal(whole)), self.bread.operand
            )
            return roots
        blocks = [dict(trees.items(m.blocks)) for m in (bread, meat)]
        found = {}
        for path, p in self.bread.operand.items():
            j, i = (each[path] for each in blocks)
            xp = array_namespace(p)
            if isinstance(j, DiagonalMatrix) and isinstance(i, DiagonalMatrix):
                variances = j.values * i.values * j.values
            else:
                dense = j.to_dense()
                variances = xp.sum(dense * (i.to_dense() @ dense).T, axis=1)
            scaled = xp.sqrt(variances) / math.sqrt(self.bread.terms)
            found[path] = xp.reshape(scaled, p.shape)
        return found
