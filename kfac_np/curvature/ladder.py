"""The failure ladder: what happens when a damped factor cannot be inverted.

Cholesky → more damping → double precision → eigenvalues clipped → the last good inverse is kept.
Each step down is recorded; nothing here ever returns NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

from kfac_np.backend import Array, Backend, array_namespace, eigh, spd_inverse, symmetrize
from kfac_np.errors import FactorizationError

__all__ = ["Ladder", "LadderEvent"]

_MORE = (10.0, 100.0)


@final
@dataclass(frozen=True)
class LadderEvent:
    """A factorisation that did not succeed as asked.

    Attributes
    ----------
    layer : str
        Path of the parameter, as in `describe`.
    factor : str
        Which matrix: "A", "G", "block", ...
    rung : str
        What helped: "more damping", "float64", "eigenvalues clipped", "kept the last inverse",
        or "moments rejected" for statistics that were not finite.
    damping : float
        Damping added to the diagonal in the end.

    Examples
    --------
    >>> print(LadderEvent("0", "A", "more damping", 0.01))
    0.A: more damping (damping 0.01)
    """

    layer: str
    factor: str
    rung: str
    damping: float

    def __str__(self) -> str:
        return f"{self.layer}.{self.factor}: {self.rung} (damping {self.damping:g})"


@final
@dataclass(frozen=True)
class Ladder:
    """Inverts factors of one layer and notes every step down.

    Attributes
    ----------
    layer : str
    events : list of LadderEvent
        Appended to.

    Examples
    --------
    >>> import numpy as np
    >>> ladder = Ladder("0")
    >>> inverse = ladder.inverse("A", np.zeros((2, 2)), 0.0, None)
    >>> ladder.events[0].rung, bool(np.all(np.isfinite(inverse)))
    ('more damping', True)
    """

    layer: str
    events: list[LadderEvent] = field(default_factory=list)

    def note(self, factor: str, rung: str, damping: float) -> None:
        """Record an event."""
        self.events.append(LadderEvent(self.layer, factor, rung, damping))

    def inverse(
        self, factor: str, m: Array, damping: Array | float, previous: Array | None
    ) -> Array:
        """(m + damping · I)⁻¹, or the nearest thing that can be had.

        Parameters
        ----------
        factor : str
            For the record.
        m : Array, shape (n, n)
        damping : float or 0-d Array
        previous : Array or None
            The last good inverse.

        Raises
        ------
        FactorizationError
            `m` is not finite and there is no previous inverse.
        """
        backend = Backend.of(m)
        eye = backend.eye(m.shape[0])
        try:
            return spd_inverse(m + damping * eye)
        except FactorizationError:
            pass
        shift = self._usable(m, damping)
        for rung, attempt in self._rungs(m, eye, shift):
            try:
                inverse, used = attempt()
            except FactorizationError:
                continue
            self.note(factor, rung, used)
            return inverse
        return self.keep(factor, previous, float(damping))

    def keep(self, factor: str, previous: Any, damping: float) -> Any:
        """The last rung: what was there before, or an error that names the layer."""
        if previous is None:
            raise FactorizationError(
                f"layer {self.layer}: factor {factor} is not finite and there is no earlier "
                "inverse to keep; look for NaN or Inf in the data or a diverging network"
            )
        self.note(factor, "kept the last inverse", damping)
        return previous

    def _usable(self, m: Array, damping: Array | float) -> float:
        """The damping to multiply: rounding error of the mean diagonal at least."""
        xp = array_namespace(m)
        mean = float(xp.mean(xp.abs(xp.linalg.diagonal(m))))
        floor = float(xp.finfo(m.dtype).eps) * (mean if mean > 0 else 1.0)
        return max(float(damping), floor)

    def _rungs(
        self, m: Array, eye: Array, shift: float
    ) -> list[tuple[str, Callable[[], tuple[Array, float]]]]:
        xp = array_namespace(m)

        def with_more(times: float) -> tuple[Array, float]:
            return spd_inverse(m + times * shift * eye), times * shift

        def in_double() -> tuple[Array, float]:
            wide = xp.astype(m, xp.float64) + shift * xp.astype(eye, xp.float64)
            return xp.astype(spd_inverse(wide), m.dtype), shift

        def clipped() -> tuple[Array, float]:
            values, vectors = eigh(symmetrize(xp.astype(m, xp.float64)))
            least = max(shift, float(xp.finfo(m.dtype).eps) * float(xp.max(xp.abs(values))))
            safe = xp.clip(values + shift, min=least)
            return xp.astype((vectors / safe[None, :]) @ vectors.T, m.dtype), least

        more = [("more damping", lambda times=times: with_more(times)) for times in _MORE]
        return [*more, ("float64", in_double), ("eigenvalues clipped", clipped)]
