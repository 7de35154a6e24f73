"""What every step reports, and when its numbers reach the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast, final

from kfac_np.backend import Array, Scalar, Truth, array_namespace, later
from kfac_np.curvature import LadderEvent

__all__ = ["StepReport"]


@final
@dataclass(frozen=True)
class StepReport:
    """What happened in one step; None where it does not apply.

    Attributes
    ----------
    step : int
        Number of this step, from 1.
    batch_size : int
    loss : float
        Mean over the mini-batch's loss terms, before the step.
    objective : float
        The loss plus the ℓ2 term (η/2)‖θ‖², before the step.
    gradient_norm, update_norm : float
        ‖∇h‖ and ‖δ‖ over all parameters.
    damping : float
        λ used in this step.
    gamma : float
        γ used in this step; the factors were damped by γ² ≈ λ + η.
    alpha, mu : float
        Coefficients of the proposal and of the previous update: δ = αΔ + μδ₀. For SGD and Adam
        alpha is the learning rate.
    model_decrease : float
        M(δ) - M(0), negative when the quadratic model predicts progress.
    rho : float
        Reduction ratio, in steps that measured it.
    refreshed : tuple of str
        Paths whose factors were recomputed.
    events : tuple of LadderEvent
        Factorisations that did not succeed as asked, and updates that were rejected.

    Examples
    --------
    >>> StepReport(step=1, batch_size=8, loss=0.5, objective=0.5).as_dict()["loss"]
    0.5
    """

    step: int
    batch_size: int
    loss: float
    objective: float
    gradient_norm: float | None = None
    update_norm: float | None = None
    damping: float | None = None
    gamma: float | None = None
    alpha: float | None = None
    mu: float | None = None
    model_decrease: float | None = None
    rho: float | None = None
    refreshed: tuple[str, ...] = ()
    events: tuple[LadderEvent, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON: None where a number is not finite."""
        out = dataclasses.asdict(self)
        out = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in out.items()
        }
        out["refreshed"] = list(self.refreshed)
        out["events"] = [str(event) for event in self.events]
        return out


def report_of(
    numbers: dict[str, Scalar | None],
    events: Sequence[tuple[Truth, LadderEvent]] = (),
    **known: Any,
) -> StepReport:
    """The report of a step, or what stands in for it until its numbers have arrived.

    Parameters
    ----------
    numbers : dict
        Fields of the report that may have stayed on an asynchronous device; NaN in `rho` means
        that there is none.
    events : sequence of (condition, LadderEvent)
        Each has happened if its condition holds.
    **known
        The other fields.

    Examples
    --------
    >>> report_of({"loss": 0.5, "objective": 0.5}, step=1, batch_size=8).loss
    0.5
    """
    late = _LateReport(numbers, events, known)
    return cast(StepReport, late) if late.arrays else late.report


@final
class _LateReport:
    """Stands in for a `StepReport`: the first look at one of its fields waits for the numbers."""

    def __init__(
        self,
        numbers: dict[str, Scalar | None],
        events: Sequence[tuple[Truth, LadderEvent]],
        known: dict[str, Any],
    ) -> None:
        self._numbers, self._events, self._known = numbers, events, known
        found = [*numbers.values(), *(condition for condition, _ in events)]
        self.arrays: list[Array] = [x for x in found if not isinstance(x, int | float | None)]
        if self.arrays:
            xp = array_namespace(*self.arrays)
            wide = [xp.astype(x, xp.float64, copy=False) for x in self.arrays]
            self._sent = later(xp.stack(wide))

    @cached_property
    def report(self) -> StepReport:
        arrived = iter(self._sent.numpy().tolist() if self.arrays else ())

        def number(x: Scalar | None) -> float | None:
            return x if isinstance(x, int | float | None) else next(arrived)

        numbers: dict[str, Any] = {name: number(x) for name, x in self._numbers.items()}
        if numbers.get("rho") is not None and math.isnan(numbers["rho"]):
            numbers["rho"] = None
        events = tuple(
            dataclasses.replace(event, damping=float(event.damping))
            for condition, event in self._events
            if number(condition)
        )
        return StepReport(**numbers, **self._known, events=events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.report, name)

    def __eq__(self, other: object) -> bool:
        return self.report == (other.report if isinstance(other, _LateReport) else other)

    def __hash__(self) -> int:
        return hash(self.report)

    def __repr__(self) -> str:
        return repr(self.report)
