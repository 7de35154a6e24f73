"""What a preconditioner is: from the gradients of one parameter to a direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, array_namespace, combine
from kfac_np.errors import InputError
from kfac_np.statistics import AffineStatistics, ElementwiseStatistics, Scale, Statistics

__all__ = [
    "Observation",
    "Preconditioner",
    "Slots",
    "affine",
    "as_matrix",
    "between",
    "debiased",
    "mixed",
    "sides",
]

Slots = dict[str, Any]
"""What a preconditioner remembers of one parameter: arrays and plain numbers, by name."""


@final
@dataclass(frozen=True, eq=False)
class Observation:
    """What a preconditioner is shown of one parameter in one step.

    Attributes
    ----------
    gradient : Array
        Mean over the terms of the batch, of the parameter's shape: a vector, or a matrix
        (d_out, d_in).
    statistics : Statistics or None
        Those that the gradient is the first moment of, sums over the batch; None where only
        gradients are known.
    scale : Scale or None
        What the statistics are divided by.

    Examples
    --------
    >>> import numpy as np
    >>> Observation(np.ones((2, 3))).statistics is None
    True
    """

    gradient: Array
    statistics: Statistics | None = None
    scale: Scale | None = None


class Preconditioner(ABC):
    """Turns the gradients of one parameter, a vector or a matrix, into a direction D.

    The parameter moves by -α D; what `Preconditioned` does besides (momentum, weight decay,
    grafting, clipping) is no concern of it. It is not a block of curvature: what sees gradients
    alone knows of no Fisher. Nothing asks that D be linear in the gradient.

    An instance holds settings; what it remembers of a parameter is passed in and returned. The
    parameter of an affine layer is the one matrix [W | b], of which the bias is the last column: it
    is preconditioned as such, since s = [W | b] ā is one linear map.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.optimizers.family import FirstMoment
    >>> mean = FirstMoment(beta=0.5)
    >>> slots = mean.init(np.zeros(2))
    >>> direction, slots = mean.direction(slots, Observation(np.ones(2)), 1)
    >>> direction, slots["first"]
    (array([1., 1.]), array([0.5, 0.5]))
    """

    def supports(self, statistics: Statistics) -> bool:
        """Tell whether it is made for parameters with such statistics; others have the fallback.

        Scales and shifts (2, C) are vectors, two of them, and no matrix.
        """
        return not isinstance(statistics, ElementwiseStatistics)

    def factorises(self, k: int) -> bool:
        """Tell whether step k factorises matrices, which wants finite ones and waits for them."""
        return False

    def ready(self, k: int) -> bool:
        """Tell whether D is more than the gradient yet; before, a grafted method is on its own."""
        return True

    @abstractmethod
    def init(self, p: Array) -> Slots:
        """What is remembered of a parameter before its first step."""

    @abstractmethod
    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        """D in step k (from 1), and what is remembered after it.

        Raises
        ------
        FactorizationError
            A matrix could not be factorised.
        InputError
            It needs statistics, and there are none.
        """


def affine(rule: Preconditioner, seen: Observation) -> tuple[AffineStatistics, Scale]:
    """The pair (ā, g) and its scale.

    Raises
    ------
    InputError
        There are none, or they are of another kind.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.optimizers.family import FOOF
    >>> affine(FOOF(), Observation(np.ones((2, 3))))
    Traceback (most recent call last):
    kfac_np.errors.InputError: FOOF: expected the statistics (ā, g) of an affine layer, got None...
    """
    s, scale = seen.statistics, seen.scale
    if not isinstance(s, AffineStatistics) or scale is None:
        raise InputError(
            f"{type(rule).__name__}: expected the statistics (ā, g) of an affine layer, got "
            f"{s if s is None else type(s).__name__}; give the parameter another preconditioner"
        )
    return s, scale


def mixed(beta: float, old: Array, new: Array) -> Array:
    """β old + (1 - β) new; the sum of both for β = 1.

    Examples
    --------
    >>> import numpy as np
    >>> mixed(0.75, np.ones(1), np.zeros(1)), mixed(1.0, np.ones(1), np.ones(1))
    (array([0.75]), array([2.]))
    """
    return combine(beta, old, 1.0 - beta if beta < 1.0 else 1.0, new)


def debiased(beta: float, k: int) -> float:
    """1 / (1 - β^k), which makes a mean of the k first values of an average from 0; 1 for β = 1.

    Examples
    --------
    >>> debiased(0.5, 1), debiased(1.0, 7)
    (2.0, 1.0)
    """
    return 1.0 / (1.0 - beta**k) if beta < 1.0 else 1.0


def as_matrix(function: Callable[..., Array], *arrays: Array) -> Array:
    """Call a function of matrices with vectors as single columns, and make it a vector again.

    Examples
    --------
    >>> import numpy as np
    >>> as_matrix(lambda m: m.T @ m * m, np.asarray([3.0, 4.0]))
    array([ 75., 100.])
    """
    xp, shape = array_namespace(*arrays), arrays[0].shape
    columns = [xp.reshape(a, (a.shape[0], -1)) for a in arrays]
    return xp.reshape(function(*columns), shape)


def sides(p: Array, largest: int) -> dict[str, int]:
    """Sizes of the factors of a parameter: "L" for its rows, "R" for its columns.

    A vector is a column, and has one. Sides of more than `largest` rows have none.

    Examples
    --------
    >>> import numpy as np
    >>> sides(np.ones((2, 3)), 10), sides(np.ones((2, 30)), 10), sides(np.ones(3), 10)
    ({'L': 2, 'R': 3}, {'L': 2}, {'L': 3})
    """
    found = {"L": p.shape[0]} if p.ndim == 1 else {"L": p.shape[0], "R": p.shape[1]}
    return {name: n for name, n in found.items() if n <= largest}


def between(factors: Mapping[str, Array], m: Array) -> Array:
    """L m R, with the factors that there are.

    Examples
    --------
    >>> import numpy as np
    >>> between({"R": 2.0 * np.eye(2)}, np.ones((1, 2)))
    array([[2., 2.]])
    """
    if "L" in factors:
        m = factors["L"] @ m
    return m @ factors["R"] if "R" in factors else m
