"""The quadratic model of h around θ that α, μ, ρ and the balance of the layers come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

from kfac_np import trees
from kfac_np.backend import Array, Rng, Scalar, scalar
from kfac_np.curvature.base import Units
from kfac_np.fisher import FisherType
from kfac_np.objective import Evaluation
from kfac_np.products import block_forms, tangent_forms
from kfac_np.trees import Tree

__all__ = ["LocalModel", "in_units"]


@final
@dataclass(frozen=True, eq=False)
class LocalModel:
    """M(δ) = ½ δᵀ (F + λ diag(u)⁻² + η I) δ + ∇hᵀ δ + h, with the exact Fisher F.

    Attributes
    ----------
    evaluation : Evaluation
        The examples that F is formed on.
    gradient : tree of Array
        ∇h.
    damping : float
        λ.
    l2 : float
        η.
    units : dict
        Path of a parameter to its units u; 1 where there are none.
    room : float
        h less the least value that it can have.
    previous : tree or None
        δ₀, the update of the step before.

    References
    ----------
    Martens & Grosse 2015, §6.4 and §7; appendix C for F without backward passes.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.ones((1, 1)), np.zeros((1, 1)))
    >>> LocalModel(e, e.gradient(), damping=1.0).decrease(np.asarray([[-1.0]]))
    -1.0
    """

    evaluation: Evaluation
    gradient: Tree
    damping: Scalar
    room: Scalar = math.inf
    previous: Tree | None = None
    l2: float = 0.0
    units: Mapping[str, Units] = field(default_factory=dict)

    def forms_and_slope(self, vectors: Sequence[Tree]) -> tuple[list[list[Scalar]], list[Scalar]]:
        """Matrix of v_iᵀ (F + λ diag(u)⁻² + η I) v_j, and vector of ∇hᵀ v_i."""
        tangents = [
            self._previous_tangent if v is self.previous else self.evaluation.jvp(v)
            for v in vectors
        ]
        fisher, m = tangent_forms(self.evaluation, tangents), len(vectors)
        bend: list[list[Scalar]] = [[0.0] * m for _ in vectors]
        relative = [in_units(v, self.units, -1.0) for v in vectors]
        for i in range(m):
            for j in range(i, m):
                damping = self.damping * scalar(trees.inner(relative[i], relative[j]))
                if self.l2:
                    damping = damping + self.l2 * scalar(trees.inner(vectors[i], vectors[j]))
                bend[i][j] = bend[j][i] = scalar(fisher[i, j]) + damping
        return bend, [scalar(trees.inner(v, self.gradient)) for v in vectors]

    @cached_property
    def _previous_tangent(self) -> Array:
        """J δ₀, which goes with every proposal."""
        return self.evaluation.jvp(self.previous)

    def decrease(self, update: Tree) -> Scalar:
        """M(δ) - M(0) for one update."""
        bend, slope = self.forms_and_slope([update])
        return 0.5 * bend[0][0] + slope[0]

    def of_each_layer(
        self, v: Tree, fisher: FisherType, rng: Rng
    ) -> dict[str, tuple[Scalar, Scalar]]:
        """v_iᵀ (F_ii + λ diag(u_i)⁻² + η I) v_i and ∇h_iᵀ v_i of each parameter, by its path.

        The block F_ii is formed from the vectors of `fisher`: unbiased for `MonteCarlo`, exact for
        `Exact`.
        """
        forms = block_forms(self.evaluation, v, fisher, rng)
        gradients = dict(trees.items(self.gradient))
        found = {}
        relative = dict(trees.items(in_units(v, self.units, -1.0)))
        for path, own in trees.items(v):
            bend = forms[path] + self.damping * scalar(trees.squared_norm(relative[path]))
            if self.l2:
                bend = bend + self.l2 * scalar(trees.squared_norm(own))
            found[path] = (bend, scalar(trees.inner(gradients[path], own)))
        return found


def in_units(v: Tree, units: Mapping[str, Units], power: float = 1.0) -> Tree:
    """u^power ∘ v, for each parameter that has units.

    Examples
    --------
    >>> import numpy as np
    >>> in_units((np.ones((2, 2)),), {"0": (np.asarray([[2.0], [4.0]]), np.asarray([[0.5, 1.0]]))})
    (array([[1., 2.],
           [2., 4.]]),)
    """
    if not units:
        return v

    def leaf(path: str, x: Array) -> Array:
        for u in units.get(path, ()):
            x = x * u**power
        return x

    return trees.map_named(leaf, v)
