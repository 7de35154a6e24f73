"""The failure ladder: what happens when a damped factor cannot be inverted.

Cholesky → more damping → double precision → eigenvalues clipped → the last good inverse is kept.
Each step down is recorded; nothing here ever returns NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, final

from kfac_np.backend import (
    Array,
    Backend,
    DeferredChecks,
    Scalar,
    all_finite,
    are_finite,
    array_namespace,
    clip,
    eigh,
    is_asynchronous,
    spd_inverse,
    symmetrize,
)
from kfac_np.errors import FactorizationError
from kfac_np.matrices.base import require_damping

__all__ = ["Ladder", "LadderEvent", "factorise_each", "require_damping", "require_regular"]

_MORE = (10.0, 100.0)
_ADDED = ("more damping", "float64", "eigenvalues clipped")  # rungs on which something is added
_DIGIT = 0.1  # relative error of an inverse that has one digit


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
        "kept the last basis" (of EKFAC), "left uncoupled" (from the next layer), "zero up to
        rounding" (of `reduce`: there is damping and no curvature); and of the optimiser "moments
        rejected" for statistics that were not finite, "moments out of proportion" for those that
        count for less, "update shortened", "update rejected" and "update taken back".
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
    damping: float | Scalar

    def __str__(self) -> str:
        return f"{self.layer}.{self.factor}: {self.rung} (damping {float(self.damping):g})"


@final
@dataclass(frozen=True)
class Ladder:
    """Inverts factors of one layer and notes every step down.

    Attributes
    ----------
    layer : str
    events : list of LadderEvent
        Appended to.
    checks : DeferredChecks or None
        Where given, an asynchronous device is not waited for. Its conditions are collected here and
        assumed to hold; where one turns out not to, the layer is factorised again without.

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
    checks: DeferredChecks | None = None

    def within(self, part: str) -> Ladder:
        """The ladder of a part of the layer, with the same events and checks.

        Examples
        --------
        >>> Ladder("2").within("[group 0]").layer
        '2[group 0]'
        """
        return replace(self, layer=f"{self.layer}{part}")

    def holds(self, condition: Scalar | bool) -> bool:
        """Tell whether a condition holds; with `checks`, one that is not known yet is assumed to.

        Examples
        --------
        >>> Ladder("0").holds(False)
        False
        """
        if self.checks is None or not is_asynchronous(condition):
            return bool(condition)
        self.checks.require(condition, lambda: FactorizationError(f"layer {self.layer}: try again"))
        return True

    def note(self, factor: str, rung: str, damping: float) -> None:
        """Record an event."""
        self.events.append(LadderEvent(self.layer, factor, rung, damping))

    def inverse(
        self, factor: str, m: Array, damping: Array | float, previous: Array | None
    ) -> Array:
        """(m + damping · I)⁻¹, or what the first rung that succeeds has in its place.

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
            `m` or its damping is not finite and there is no previous inverse.
        """
        eye = Backend.of(m).eye(m.shape[0])
        deferred = self.checks is not None and is_asynchronous(m)  # to the inverse's own checks
        if not (deferred or (all_finite(m) and math.isfinite(float(damping)))):
            return self.keep(factor, previous, float(damping))
        try:
            return _resolved_inverse(m + damping * eye, self.checks)
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

    def inverse_diagonal(
        self, factor: str, m: Array, damping: Array | float, previous: Array | None
    ) -> Array:
        """`inverse` of a matrix that is given by its diagonal, shape (n,)."""
        if not self.holds(are_finite(m + damping)):
            return self.keep(factor, previous, float(damping))
        return self.reciprocal(factor, m, damping)

    def reciprocal(self, factor: str, eigenvalues: Array, damping: Array | float) -> Array:
        """1 / (eigenvalues + damping), eigenvalues lost to rounding clipped from below.

        Parameters
        ----------
        factor : str
            For the record.
        eigenvalues : Array
            Non-negative and finite; zero where rounding is all there is.
        damping : float or 0-d Array

        Returns
        -------
        Array
            Finite. Directions with neither curvature nor damping above rounding error get the
            smallest eigenvalue that rounding allows; a matrix that is zero altogether is taken
            as the identity.

        Examples
        --------
        >>> import numpy as np
        >>> ladder = Ladder("0")
        >>> ladder.reciprocal("diagonal", np.asarray([0.5, 0.0]), 0.5)
        array([1., 2.])
        >>> ladder.reciprocal("diagonal", np.zeros(2), 0.0), ladder.events[0].rung
        (array([1., 1.]), 'eigenvalues clipped')
        """
        xp = array_namespace(eigenvalues)
        values = eigenvalues + damping
        tiny = float(xp.finfo(values.dtype).smallest_normal)  # 1 / tiny does not overflow
        within = float(xp.finfo(values.dtype).eps) * xp.max(values)
        lost = xp.logical_or(values <= tiny, (eigenvalues <= tiny) & (values <= within))
        if not self.holds(~xp.any(lost)):
            least = float(within) if float(within) > tiny else 1.0
            self.note(factor, "eigenvalues clipped", least)
            values = xp.where(lost, least, values)
        return 1.0 / values

    def keep(self, factor: str, previous: Any, damping: float) -> Any:
        """The last rung: what was there before, or an error that names the layer."""
        if previous is None:
            raise FactorizationError(
                f"layer {self.layer}: factor {factor} is not finite and there is no earlier "
                "inverse to keep; look for NaN or Inf in the data, a diverging network, or numbers "
                f"too large for the dtype (damping {damping:g})"
            )
        self.note(factor, "kept the last inverse", damping)
        return previous

    def _usable(self, m: Array, damping: Array | float) -> float:
        """The damping to multiply: rounding error of the mean diagonal at least.

        A matrix so small that this has no inverse is taken as zero, and its scale as 1.
        """
        xp = array_namespace(m)
        info = xp.finfo(m.dtype)
        eps, tiny = float(info.eps), float(info.smallest_normal)
        floor = eps * float(xp.mean(xp.abs(xp.linalg.diagonal(m))))
        return max(float(damping), floor if floor > tiny else eps)

    def _rungs(
        self, m: Array, eye: Array, shift: float
    ) -> list[tuple[str, Callable[[], tuple[Array, float]]]]:
        xp = array_namespace(m)

        def with_more(times: float) -> tuple[Array, float]:
            return _resolved_inverse(m + times * shift * eye), times * shift

        def in_double() -> tuple[Array, float]:
            wide = xp.astype(m, xp.float64) + shift * xp.astype(eye, xp.float64)
            return xp.astype(_resolved_inverse(wide), m.dtype), shift

        def clipped() -> tuple[Array, float]:
            values, vectors = eigh(symmetrize(xp.astype(m, xp.float64)))
            least = max(shift, float(xp.finfo(m.dtype).eps) * float(xp.max(xp.abs(values))))
            safe = clip(values + shift, low=least)
            return xp.astype((vectors / safe[None, :]) @ vectors.T, m.dtype), least

        more = [("more damping", lambda times=times: with_more(times)) for times in _MORE]
        return [*more, ("float64", in_double), ("eigenvalues clipped", clipped)]


def _resolved_inverse(m: Array, checks: DeferredChecks | None = None) -> Array:
    """`spd_inverse`, but refuse an inverse of which rounding has left no digit.

    The smallest pivot relative to its diagonal entry is 1 / max_i m_ii (m⁻¹)_ii (in statistics,
    the variance inflation), whatever the scales of the coordinates. Elimination leaves a rounding
    error of some √n · eps there, so that a singular matrix may well pass for positive definite.
    """
    n, xp = m.shape[0], array_namespace(m)
    info, diagonal = xp.finfo(m.dtype), xp.linalg.diagonal(m)
    own = DeferredChecks() if checks is None else checks

    def require(condition: Array, what: str) -> None:
        own.require(condition, lambda: FactorizationError(what))

    require(xp.min(diagonal) > 0, f"a {n}×{n} matrix is not positive definite")
    # Coordinates of size about 1: powers of two round nothing, and nothing overflows on the way.
    unit = 2.0 ** xp.floor(-0.5 * xp.log2(diagonal))
    scaled = m * unit[:, None]
    scaled *= unit[None, :]
    inverse = spd_inverse(scaled, own)
    inflation = xp.linalg.diagonal(inverse) * (diagonal * unit * unit)
    most = _DIGIT / (math.sqrt(n) * float(info.eps))
    require(xp.max(inflation) < most, f"a {n}×{n} matrix is singular up to rounding")
    wide = xp.astype(inflation, xp.float64) / xp.astype(diagonal, xp.float64)  # its diagonal
    largest = 0.5 * float(info.max)
    require(xp.max(wide) < largest, f"the inverse of a {n}×{n} matrix overflows")
    if checks is None:
        own.wait()
    inverse *= unit[:, None]
    inverse *= unit[None, :]
    return inverse


def factorise_each(
    paths: Iterable[str],
    factorise: Callable[[str, Ladder], Any],
    damping: float,
    each: Callable[..., Iterable[Any]] = map,
) -> tuple[dict[str, Any], list[LadderEvent]]:
    """Factors of every layer, and what happened; an asynchronous device is waited for once.

    All checks are deferred and read in one transfer. Layers of which one failed are factorised
    again, with each condition read where it arises.

    Parameters
    ----------
    paths : iterable of str
    factorise : callable
        Path and ladder to factors.
    damping : float
        With which it does so.
    each : callable
        How it is applied to all of them: `map`, or one that does several at a time.

    Raises
    ------
    FactorizationError
        Damping is 0 and one of them has no inverse without: `require_regular`.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros((1, 1))
    >>> found, events = factorise_each(
    ...     ["0"], lambda path, ladder: ladder.inverse("A", zero, 0.5, None), 0.5)
    >>> found, events
    ({'0': array([[2.]])}, [])
    """
    checks = {path: DeferredChecks() for path in paths}

    def attempt(path: str, own: DeferredChecks | None) -> tuple[Any, list[LadderEvent]]:
        ladder = Ladder(path, checks=own)
        return factorise(path, ladder), ladder.events

    found = dict(zip(checks, each(lambda path: attempt(path, checks[path]), checks), strict=True))
    for path, good in zip(checks, DeferredChecks.all_hold([*checks.values()]), strict=True):
        if not good:
            found[path] = attempt(path, None)
    events = [event for _, happened in found.values() for event in happened]
    require_regular(damping, events)
    return {path: factors for path, (factors, _) in found.items()}, events


def require_regular(damping: float, events: Iterable[LadderEvent]) -> None:
    """Raise `FactorizationError` if damping is 0 and some matrix had no inverse without.

    Examples
    --------
    >>> require_regular(0.0, [LadderEvent("0", "A", "more damping", 1e-15)])
    Traceback (most recent call last):
    kfac_np.errors.FactorizationError: layer 0: factor A is singular; give a damping > 0
    """
    for event in events:
        if event.rung in _ADDED and float(damping) == 0.0:
            raise FactorizationError(
                f"layer {event.layer}: factor {event.factor} is singular; give a damping > 0"
            )
