"""When an update is taken back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, final

from kfac_np.backend import Scalar, array_namespace, on_host, select
from kfac_np.curvature import LadderEvent
from kfac_np.objective import Evaluation
from kfac_np.optimizers.base import Regularized, moved
from kfac_np.optimizers.damping import DampingPolicy
from kfac_np.optimizers.kfac_state import KFACState
from kfac_np.optimizers.quadratic_model import LocalModel
from kfac_np.optimizers.reports import StepReport
from kfac_np.optimizers.step_rules import StepRule
from kfac_np.trees import Tree

__all__ = ["Guard", "Outcome", "judged", "measured", "taken_back"]

_ROUNDINGS = 10.0  # of h, below which a change says nothing


@final
@dataclass(frozen=True)
class Guard:
    """Takes an update back, and has λ grow, if it raised the objective beyond the batches' noise.

    An update is judged twice. While λ settles, and whenever ρ is measured, the objective is
    evaluated again on the batch of the step: if it rose, or is not finite, a quarter of the update
    is tried, then a sixteenth; if none will do, the parameters stay.
    In every step the evaluation that the step begins with is held against the last one's, which
    costs nothing: the last update is undone if

        h' - h > 4 √(s² + s'²),

    s and s' being the standard errors of the means h and h' over the examples of their batches, or
    if h' is not finite. Where all steps have the same batch, as two evaluations of the same
    parameters tell, h' > h is enough.

    The n-th update in a row that is taken back multiplies λ by 4^n, and all factors are renewed.
    With a quarter of an update λ becomes 4 times as large, with a sixteenth 16 times, where λ is
    adapted. A λ that is given (`ConstantDamping`) is multiplied after updates taken back only, and
    by half as much from step to step after that.

    Between measurements an update that does harm is known as such one step later: the parameters
    after the last step of all are judged by nobody.

    λ settles in 50 steps, from the beginning and from every update that was taken back; in 50/n
    where the quadratic model is made in every n-th step only. A batch of
    one example has no standard error that is known, and undoes nothing but what is not finite.

    Examples
    --------
    >>> Guard().measures(51, trouble=0), Guard().measures(51, trouble=8)
    (False, True)
    """

    errors: ClassVar[float] = 4.0  # standard errors; normal noise exceeds four once in 30,000
    settling: ClassVar[int] = 50  # steps

    def measures(self, k: int, trouble: int, interval: int = 1) -> bool:
        """Tell whether step k measures h again; `trouble` last took an update back.

        `interval` is that of the quadratic model.
        """
        return (k - trouble) * interval <= self.settling

    def undoes(
        self, new: Scalar, old: Scalar, errors: tuple[Scalar | float, Scalar], *, noisy: bool
    ) -> Scalar:
        """Tell whether an objective rose too far, from `old` to `new` on the next batch.

        Examples
        --------
        >>> import numpy as np
        >>> new, old, errors = np.float64(2.0), np.float64(1.0), (np.float64(0.3), np.float64(0.4))
        >>> [bool(Guard().undoes(new, old, errors, noisy=noisy)) for noisy in (True, False)]
        [False, True]
        """
        xp = array_namespace(new)
        rise: Scalar | float = 0.0
        if noisy:
            rise = self.errors * xp.sqrt(errors[0] * errors[0] + errors[1] * errors[1])
            rise = select(xp.isfinite(rise), rise, math.inf)
        return ~(xp.isfinite(new) & (new - old <= rise))


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """An update, and what became of it.

    Attributes
    ----------
    update, params : tree of Array
        δ and θ + δ.
    norm : Scalar
        ‖δ‖.
    kept, rejected : Scalar
        An update that changes h by rounding only may be neither: the parameters stay, λ as well.
    decrease : Scalar or None
        M(δ) - M(0).
    rho : Scalar or None
        Where it was measured, of the update that was proposed; NaN where it says nothing, -∞ where
        the objective rose.
    value : Scalar or None
        h after the step on its own batch, where it was measured.
    shortened : float
        What the update that was proposed has been multiplied by.
    """

    update: Tree
    params: Tree
    norm: Scalar
    kept: Scalar
    rejected: Scalar
    decrease: Scalar | None
    rho: Scalar | None = None
    value: Scalar | None = None
    shortened: float = 1.0

    @classmethod
    def of(cls, params: Tree, update: Tree, decrease: Scalar | None) -> Outcome:
        """Before anything is measured: kept if it is finite."""
        new, norm, finite = moved(params, update)
        return cls(update, new, norm, finite, ~finite, decrease)


def judged(
    guard: Guard | None,
    damping: DampingPolicy,
    state: KFACState,
    h: Regularized,
    e: Evaluation,
    value: Callable[[Tree], Scalar],
) -> tuple[KFACState, bool]:
    """What the evaluation of a new batch tells of the last update, and whether to undo it.

    The host waits for the evaluation, and learns with it what the last step found. Where h is not
    finite it may be the batch's doing: then `value`, h of other parameters on it, is not finite
    before the update either, and there is nothing to undo.
    """
    if guard is None:
        return state, False
    same: Scalar | bool = not state.noisy
    if state.measured is not None:
        size = abs(h.value) + abs(state.measured)
        same = abs(h.value - state.measured) <= _rounding(e, size)
    if_same: Scalar | bool = False  # whether to undo it, should batches not differ; and if they do
    if_noisy: Scalar | bool = False
    if state.objective is not None:
        errors = (math.inf if state.error is None else state.error, e.standard_error)
        before = state.objective + _rounding(e, abs(state.objective))
        if_same = guard.undoes(h.value, before, errors, noisy=False)
        if_noisy = guard.undoes(h.value, before, errors, noisy=True)
    finite = array_namespace(h.value).isfinite(h.value)
    known = on_host(state.rejected, same, if_same, if_noisy, finite)
    rejected, same, if_same, if_noisy, is_finite = known
    state = replace(state, noisy=not same)
    if (if_same if same else if_noisy) and not rejected:
        before = h.value if is_finite else value(state.previous)
        return state, on_host(array_namespace(before).isfinite(before))[0]
    if not rejected:
        return replace(state, rejections=0, raised=max(1.0, state.raised / 2.0)), False
    n = state.rejections + 1
    raised = 1.0 if damping.adapts else float(damping.rejected(state.raised, n))
    return replace(state, rejections=n, raised=raised, trouble=state.step), False


def taken_back(
    damping: DampingPolicy, state: KFACState, h: Regularized, batch_size: int
) -> tuple[KFACState, StepReport]:
    """A step that takes the last update back, and does no other."""
    assert state.damping is not None
    k = state.step + 1
    new = replace(
        state,
        params=state.previous,
        average=state.previous_average,
        step=k,
        update=None,
        damping=damping.rejected(state.damping, state.rejections + 1),
        previous=None,
        previous_average=None,
        objective=None,
        error=None,
        measured=None,
        rejected=True,
        checks=None,
    )
    event = LadderEvent("all", "update", "update taken back", state.damping)
    numbers = {**h.numbers, "update_norm": 0.0, "damping": state.damping, "gamma": state.gamma}
    return new, StepReport(k, batch_size, numbers, events=[event])


def measured(
    guard: Guard | None,
    rule: StepRule,
    h: Regularized,
    e: Evaluation,
    outcome: Outcome,
    value: Scalar,
    model: LocalModel,
    *,
    follows: bool,
    noisy: bool,
) -> Outcome:
    """What becomes of an update after which h is `value` on the step's own batch.

    Where λ `follows`, ρ is the change of h over M(δ) - M(0). What is lost in the rounding of h
    tells nothing, of the model or of λ. A rate that is given may raise h by the noise of a batch,
    where batches are `noisy`.
    """
    xp = array_namespace(value)
    finite = xp.isfinite(value)
    kept = outcome.kept & finite
    if guard is not None:
        rise = guard.errors * e.standard_error if noisy and not rule.compares else 0.0
        kept = kept & (value - h.value <= rise)
    if not follows:
        value = select(kept, value, h.value)
        return replace(outcome, kept=kept, rejected=~kept, value=value)
    predicted = outcome.decrease
    if predicted is None:
        predicted = model.decrease(outcome.update)
    kept = kept & xp.isfinite(predicted)
    telling = ~((abs(predicted) <= _rounding(e, abs(h.value))) & finite)
    if guard is not None and rule.compares:
        # What promises something and does nothing is no step, unless λ leaves of it the gradient's.
        kept = kept & ((value < h.value) | ~telling | (model.damping > model.gradient_damping))
    ratio = (value - h.value) / select(abs(predicted) > 0.0, predicted, 1.0)
    return replace(
        outcome,
        kept=kept,
        rejected=~kept & telling,
        decrease=predicted,
        rho=select(kept, select(telling, ratio, math.nan), -math.inf),
        value=select(kept, value, h.value),
    )


def _rounding(e: Evaluation, size: Scalar) -> Scalar:
    """Changes of numbers of this size that say nothing."""
    info = array_namespace(e.outputs).finfo(e.outputs.dtype)
    return _ROUNDINGS * float(info.eps) * size
