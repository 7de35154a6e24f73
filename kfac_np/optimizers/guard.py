"""When an update is taken back: what raises the objective is not kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Scalar, Truth, both, isfinite, negation, select, sqrt
from kfac_np.validation import require_integer, require_positive

__all__ = ["Guard"]


@final
@dataclass(frozen=True)
class Guard:
    """Takes an update back, and has λ grow, if it raised the objective beyond the batches' noise.

    An update is judged twice. While λ settles, and whenever ρ is measured, the objective is
    evaluated again on the batch of the step: if it rose, or is not finite, the parameters stay.
    In every step the evaluation that the step begins with is held against the last one's, which
    costs nothing: the last update is undone if

        h' - h > errors · √(s² + s'²),

    s and s' being the standard errors of the means h and h' over the examples of their batches, or
    if h' is not finite. Where all steps have the same batch, as two evaluations of the same
    parameters tell, h' > h is enough.

    With n updates taken back in a row λ becomes 4^n times as large, and all factors are renewed.

    Parameters
    ----------
    errors : float
        Standard errors that h may rise by. A batch of one example has none that is known, and
        undoes nothing but what is not finite.
    settling : int
        Steps in which λ settles, from the beginning and from every update that was taken back.

    Examples
    --------
    >>> Guard(settling=3).measures(4, trouble=0), Guard(settling=3).measures(10, trouble=8)
    (False, True)
    """

    errors: float = 4.0
    settling: int = 50

    def __post_init__(self) -> None:
        require_positive("Guard errors", self.errors)
        require_integer("Guard settling", self.settling, zero=True)

    def measures(self, k: int, trouble: int) -> bool:
        """Tell whether step k measures h again; `trouble` last took an update back."""
        return k - trouble <= self.settling

    def undoes(
        self, new: Scalar, old: Scalar, errors: tuple[Scalar, Scalar], *, noisy: bool
    ) -> Truth:
        """Tell whether an objective rose too far, from `old` to `new` on the next batch.

        Examples
        --------
        >>> guard = Guard()
        >>> [guard.undoes(2.0, 1.0, (0.3, 0.4), noisy=noisy) for noisy in (True, False)]
        [False, True]
        """
        room: Scalar = 0.0
        if noisy:
            room = self.errors * sqrt(errors[0] * errors[0] + errors[1] * errors[1])
            room = select(isfinite(room), room, math.inf)
        return negation(both(isfinite(new), new - old <= room))
