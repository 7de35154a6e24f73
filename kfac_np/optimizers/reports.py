"""What every step reports, and when its numbers reach the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, final

from kfac_np.backend import Scalar, array_namespace, is_asynchronous, later
from kfac_np.curvature import LadderEvent

__all__ = ["StepReport"]

_NUMBERS = (
    "loss",
    "objective",
    "gradient_norm",
    "update_norm",
    "damping",
    "gamma",
    "alpha",
    "mu",
    "model_decrease",
    "rho",
)


@final
class StepReport:
    """What happened in one step.

    Its numbers are Python's; None where one does not apply. On an asynchronous device the first
    look at one waits until they have arrived, all in one transfer.

    Parameters
    ----------
    step : int
        Number of this step, from 1.
    batch_size : int
    numbers : mapping of str to Scalar, float or None
        The properties below, as 0-d arrays or Python's own; what is left out is None.
    refreshed : tuple of str
        Paths whose factors were recomputed.
    events : sequence of LadderEvent, or of (condition, LadderEvent)
        Factorisations that did not succeed as asked, and updates that were rejected; one with a
        condition has happened if it holds.

    Examples
    --------
    >>> StepReport(step=1, batch_size=8, numbers={"loss": 0.5, "objective": 0.5}).loss
    0.5
    """

    FIELDS = ("step", "batch_size", *_NUMBERS, "refreshed", "events")

    def __init__(
        self,
        step: int,
        batch_size: int,
        numbers: Mapping[str, Scalar | float | None],
        refreshed: tuple[str, ...] = (),
        events: Sequence[LadderEvent | tuple[Scalar | bool, LadderEvent]] = (),
    ) -> None:
        self.step = step
        self.batch_size = batch_size
        self.refreshed = refreshed
        self._given = {name: numbers.get(name) for name in _NUMBERS}
        self._events = [(True, e) if isinstance(e, LadderEvent) else e for e in events]
        values = [*self._given.values(), *(condition for condition, _ in self._events)]
        arrays: list[Any] = [x for x in values if is_asynchronous(x)]
        self._transfer = None
        if arrays:
            xp = array_namespace(*arrays)
            wide = [xp.astype(x, xp.float64, copy=False) for x in arrays]
            self._transfer = later(xp.stack(wide))

    @cached_property
    def _arrived(self) -> tuple[dict[str, float | None], tuple[LadderEvent, ...]]:
        rest = iter(() if self._transfer is None else self._transfer.numpy().tolist())

        def number(x: Any) -> float:
            return next(rest) if is_asynchronous(x) else float(x)

        numbers = {k: None if x is None else number(x) for k, x in self._given.items()}
        rho = numbers["rho"]
        if rho is not None and not math.isfinite(rho):  # it says nothing, or the objective rose
            numbers["rho"] = None
        happened = [event for condition, event in self._events if number(condition)]
        plain = [dataclasses.replace(e, damping=float(e.damping)) for e in happened]
        return numbers, tuple(plain)

    @property
    def events(self) -> tuple[LadderEvent, ...]:
        """What did not succeed as asked, and updates that were rejected or taken back."""
        return self._arrived[1]

    @property
    def loss(self) -> float:
        """Mean over the mini-batch's loss terms, before the step."""
        return self._required("loss")

    @property
    def objective(self) -> float:
        """The loss plus the ℓ2 term (η/2)‖θ‖², before the step."""
        return self._required("objective")

    @property
    def gradient_norm(self) -> float | None:
        """‖∇h‖ over all parameters."""
        return self._arrived[0]["gradient_norm"]

    @property
    def update_norm(self) -> float | None:
        """‖δ‖ over all parameters."""
        return self._arrived[0]["update_norm"]

    @property
    def damping(self) -> float | None:
        """λ used in this step."""
        return self._arrived[0]["damping"]

    @property
    def gamma(self) -> float | None:
        """γ used in this step; the factors were damped by γ² ≈ λ + η."""
        return self._arrived[0]["gamma"]

    @property
    def alpha(self) -> float | None:
        """Coefficient of the proposal, δ = αΔ + μδ₀; for SGD and Adam the learning rate."""
        return self._arrived[0]["alpha"]

    @property
    def mu(self) -> float | None:
        """Coefficient of the previous update."""
        return self._arrived[0]["mu"]

    @property
    def model_decrease(self) -> float | None:
        """M(δ) - M(0), negative when the quadratic model predicts progress."""
        return self._arrived[0]["model_decrease"]

    @property
    def rho(self) -> float | None:
        """Reduction ratio, in steps that measured it and could tell."""
        return self._arrived[0]["rho"]

    def _required(self, name: str) -> float:
        number = self._arrived[0][name]
        assert number is not None, f"a step without {name}"
        return number

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON: None where a number is not finite."""
        out = {name: getattr(self, name) for name in self.FIELDS}
        out = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in out.items()
        }
        out["refreshed"] = list(self.refreshed)
        out["events"] = [str(event) for event in self.events]
        return out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepReport):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.FIELDS)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in self.FIELDS))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.FIELDS)
        return f"StepReport({fields})"
