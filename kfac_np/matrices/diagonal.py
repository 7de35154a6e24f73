"""A diagonal matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, array_namespace
from kfac_np.matrices.base import Spectral

__all__ = ["DiagonalMatrix"]


@final
@dataclass(frozen=True, eq=False)
class DiagonalMatrix(Spectral):
    """V ↦ values · V, elementwise: its own eigen-form.

    Attributes
    ----------
    values : Array, of the operand's shape

    Examples
    --------
    >>> import numpy as np
    >>> C = DiagonalMatrix(np.asarray([[1.0, 3.0]]))
    >>> C.solve(np.ones((1, 2)), damping=1.0)
    array([[0.5 , 0.25]])
    """

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return self.values.shape

    def with_values(self, values: Array) -> DiagonalMatrix:
        return DiagonalMatrix(values)

    def matvec(self, v: Array) -> Array:
        return self.values * v

    def diagonal(self) -> Array:
        return self.values

    def to_dense(self) -> Array:
        xp = array_namespace(self.values)
        n = math.prod(self.values.shape)
        eye = xp.eye(n, dtype=self.values.dtype, device=self.values.device)
        return eye * xp.reshape(self.values, (1, n))
