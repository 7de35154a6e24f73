"""The K-FAC optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, cast, final

from kfac_np import trees
from kfac_np.backend import (
    Array,
    DeferredChecks,
    Rng,
    Scalar,
    Truth,
    absolute,
    all_finite,
    are_finite,
    array_namespace,
    both,
    is_asynchronous,
    isfinite,
    known,
    negation,
    scalar,
    select,
    truth,
)
from kfac_np.curvature import (
    BlockDiagonal,
    Curvature,
    Factors,
    KFACBlock,
    LadderEvent,
    Moments,
)
from kfac_np.curvature.base import Units
from kfac_np.errors import ConfigError, DivergenceError, InputError
from kfac_np.fisher import FisherType, MonteCarlo
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers.averaging import IterateAverage, MovingAverage
from kfac_np.optimizers.balance import Balance
from kfac_np.optimizers.base import (
    Optimizer,
    Regularized,
    State,
    check_params,
    keep_good,
    l2_term,
    moved,
    require_finite_update,
    require_part,
)
from kfac_np.optimizers.damping import (
    DampingPolicy,
    GammaPolicy,
    GammaSearch,
    LevenbergMarquardt,
)
from kfac_np.optimizers.guard import Guard
from kfac_np.optimizers.local_model import LocalModel, in_units
from kfac_np.optimizers.reports import StepReport, report_of
from kfac_np.optimizers.schedules import (
    Exponential,
    Refresh,
    Schedule,
    require_flag,
    require_integer,
    require_positive,
    require_rate,
    value_at,
)
from kfac_np.optimizers.step_rules import (
    Choice,
    QuadraticModel,
    StepRule,
    require_finite_choice,
    require_fraction,
)
from kfac_np.statistics import Scale
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields

__all__ = ["KFAC", "KFACState"]

_LEAST = 1e-10  # of a typical eigenvalue: what a λ of 0 is raised from
_PROPORTION = 30.0  # of a batch's moments to their average, beyond which the batch counts for less
_ROUNDINGS = 10.0  # of h, below which a change says nothing
_OF_LOSS = 10.0  # of the loss for each parameter, that is added to F̂ in a layer's own units


@final
@dataclass(frozen=True, eq=False)
class KFACState(State):
    """State of `KFAC`.

    Attributes
    ----------
    moments : dict
        Moving averages of the curvature's moments.
    factors : dict or None
        What `Curvature.solve` needs, from the last refresh.
    update : tree or None
        δ₀, the last update.
    damping : Scalar or None
        λ carried over to the next step.
    gamma : float or None
        γ, likewise.
    multipliers : dict or None
        What layers' proposals are multiplied by (`Balance`), by path.
    gamma_ratio : float or None
        γ / √(λ + η) when γ was chosen.
    units : dict
        Units of the parameters that the factors are in, by path.
    previous, previous_average : tree or None
        Parameters and their average before the last update, which may still be taken back.
    objective, error : Scalar or None
        h of these on the last step's batch, and its standard error (of one example none).
    measured : Scalar or None
        h of `params` on that batch, where it was measured.
    rejected : Truth
        Whether the last step rejected its own update.
    rejections : int
        Updates taken back in a row, before that.
    trouble : int
        The last step whose update was taken back.
    raised : float
        What a given λ is multiplied by, since updates were taken back.
    noisy : bool
        Whether batches differ, as far as is known.

    Examples
    --------
    >>> KFACState((), None, 0, {}, None, None, None, None).damping is None
    True
    """

    like_params: ClassVar[tuple[str, ...]] = (
        "params",
        "average",
        "update",
        "previous",
        "previous_average",
    )

    moments: dict[str, Moments]
    factors: dict[str, Factors] | None
    update: Tree | None
    damping: Scalar | None
    gamma: float | None
    multipliers: dict[str, Scalar] | None = None
    gamma_ratio: float | None = None
    units: dict[str, Units] = field(default_factory=dict)
    previous: Tree | None = None
    previous_average: Tree | None = None
    objective: Scalar | None = None
    error: Scalar | None = None
    measured: Scalar | None = None
    rejected: Truth = False
    rejections: int = 0
    trouble: int = 0
    raised: float = 1.0
    noisy: bool = True


@final
@dataclass(frozen=True)
class KFAC(Optimizer):
    """δ = αΔ + μδ₀, Δ = -F̂(γ)⁻¹ ∇h: natural gradient by Kronecker-factored curvature.

    h(θ) = loss + (η/2)‖θ‖². The algorithm is the paper's; the defaults are meant to need no tuning
    by hand, and differ from its text, which `kfac_np.optimizers.published` follows:

    - An update that raises the objective is taken back (see `Guard`).
    - λ₀ is a typical eigenvalue of F̂ instead of 150, and λ is kept within bounds that are multiples
      of such an eigenvalue; it is halved instead of multiplied by (19/20)⁵ (see
      `LevenbergMarquardt`).
    - Where inputs of a layer differ by orders of magnitude, λ and γ are relative to the layers' own
      scales: the model has F + λ diag(u)⁻² + η I, and the factors are those of diag(u) F̂ diag(u),
      u the units of `Curvature.units`. Rescaled features and hidden units change nothing then.
    - γ₀ = 0.3 √(λ₀ + η) instead of √(λ₀ + η), since small γ got off plateaus sooner wherever we
      tried, and γ is searched in step 3, too, and by factors of 2; within bounds. Between searches
      it follows √(λ + η).
    - T₃ = 10 instead of 20, and of the first three steps only the first renews the factors: those
      as old as 20 steps cost more than renewing them does.
    - The average is of the last twentieth of the iterates at first (see `IterateAverage`).
    - The quadratic model uses 256 examples at least, and may not promise a loss that is out of
      reach (see `QuadraticModel`). With fewer there is no momentum, unless all batches are the
      same: from so few it would be noise.
    - Moments of a batch count as 30 times their average at most, so that an outlier does not rule.
    - η = 0 instead of 1e-5.

    What these rest on is in docs/results.md. Every part can be replaced.

    Parameters
    ----------
    objective : Objective
    curvature : Curvature
        F̂.
    fisher : FisherType
        Which vectors the curvature's statistics use; targets sampled from the model by default.
    step_rule : StepRule
        How α and μ come about.
    damping : DampingPolicy
        λ.
    gamma : GammaPolicy
        γ.
    moving_average : MovingAverage
    statistics : Refresh
        When the statistics are renewed; in every step by default.
    refresh : Refresh
        When the factors are computed from them (T₃). With `Refresh(spread=True)` a few layers at
        a time, so that no step is slow; where γ is searched, all of them nevertheless.
    averaging : IterateAverage or None
    statistics_fraction : float or Schedule
        τ₁, the fraction of the mini-batch that the statistics use: its first examples, so that
        the batch should be shuffled. By default all of the first mini-batch, since there is no
        earlier one to average with, and less and less until it is 1/8, as the paper has it.
    least_statistics : int
        How many examples the statistics use at least, where the mini-batch has so many.
    l2 : float
        η. It damps, too: the model and the factors use λ + η, so that λ = 0 alone is not undamped.
    relative : bool
        Damp relative to the layers' own scales where inputs differ by orders of magnitude; without
        it, and with a curvature that has no units, always by a multiple of I.
    guard : Guard or None
        Takes back what does harm. Without it every update with a finite objective is kept, and one
        that is not finite is a `DivergenceError`.
    seed : int
        Of the sampled targets, and of what layers draw in training (Dropout).

    References
    ----------
    Martens & Grosse 2015, arXiv:1503.05671, algorithm 2 and §§5-8.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> net = Sequential(Dense(2, 8), Tanh(), Dense(8, 1))
    >>> kfac = KFAC(Objective(net, SquaredError()), damping=LevenbergMarquardt(initial=1.0))
    >>> x = np.random.default_rng(0).standard_normal((256, 2))
    >>> t = x[:, :1] * x[:, 1:]
    >>> state = kfac.init(net.init(Rng(0), get_backend("numpy", "float64")))
    >>> losses = []
    >>> for _ in range(60):
    ...     state, report = kfac.step(state, x, t)
    ...     losses.append(report.loss)
    >>> losses[-1] < 0.1 * losses[0]
    True
    """

    state_type: ClassVar[type[State]] = KFACState

    curvature: Curvature = BlockDiagonal(KFACBlock())
    fisher: FisherType = MonteCarlo(1)
    step_rule: StepRule = QuadraticModel()
    damping: DampingPolicy = LevenbergMarquardt()
    gamma: GammaPolicy = GammaSearch(
        decay=0.5 ** (1 / 20), early=(3,), ratio=0.3, within=10.0, thorough=False, follows=True
    )
    moving_average: MovingAverage = MovingAverage()
    statistics: Refresh = Refresh(interval=1)
    refresh: Refresh = Refresh(interval=10, first=1)
    averaging: IterateAverage | None = IterateAverage(warm_up=True, power=19.0)
    statistics_fraction: float | Schedule = Exponential(1.0, decay=0.8, minimum=1 / 8)
    least_statistics: int = 64
    l2: float = 0.0
    relative: bool = True
    guard: Guard | None = Guard()
    seed: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        require_part("KFAC objective", self.objective, Objective)
        require_part("KFAC curvature", self.curvature, Curvature)
        require_part("KFAC fisher", self.fisher, FisherType)
        require_part("KFAC step_rule", self.step_rule, StepRule)
        require_part("KFAC step_rule.balance", self.step_rule.balance, Balance, optional=True)
        require_fraction("KFAC step_rule.fraction", self.step_rule.fraction)
        require_integer("KFAC step_rule.least_examples", self.step_rule.least_examples)
        require_part("KFAC damping", self.damping, DampingPolicy)
        require_part("KFAC gamma", self.gamma, GammaPolicy)
        require_part("KFAC moving_average", self.moving_average, MovingAverage)
        require_part("KFAC statistics", self.statistics, Refresh)
        require_part("KFAC refresh", self.refresh, Refresh)
        require_part("KFAC averaging", self.averaging, IterateAverage, optional=True)
        require_rate("KFAC statistics_fraction", self.statistics_fraction)
        if not isinstance(self.statistics_fraction, Schedule):
            require_fraction("KFAC statistics_fraction", self.statistics_fraction)
        require_integer("KFAC least_statistics", self.least_statistics)
        require_positive("KFAC l2", self.l2, zero=True)
        require_flag("KFAC relative", self.relative)
        require_part("KFAC guard", self.guard, Guard, optional=True)
        require_integer("KFAC seed", self.seed, zero=True)
        if self.statistics.spread:
            raise ConfigError("KFAC statistics: expected spread=False, the layers share a pass")
        if self.refresh.spread and not self.curvature.separable:
            raise ConfigError(
                "KFAC refresh: spread=True expected a curvature whose layers are factorised one by "
                f"one (BlockDiagonal, EKFAC), got {type(self.curvature).__name__}"
            )
        if isinstance(self.gamma, GammaSearch) and not self.step_rule.compares:
            raise ConfigError(
                "KFAC gamma: GammaSearch expected a step rule that evaluates the quadratic model "
                f"(QuadraticModel), got {type(self.step_rule).__name__}; use CoupledGamma with it"
            )

    def init(self, params: Tree) -> KFACState:
        check_params(params)
        average = params if self.averaging else None
        return KFACState(params, average, 0, {}, None, None, None, None)

    def step(
        self, state: KFACState, x: Array, t: Array, weights: Array | None = None
    ) -> tuple[KFACState, StepReport]:
        self.check_state(state)
        k = state.step + 1
        noise = Rng(self.seed).child("forward", k)
        checks = DeferredChecks()
        e = self.objective.evaluate(state.params, x, t, weights, noise, checks)
        h = Regularized.unchecked(e, self.l2)
        state, undone = self._judge(state, h, e)
        if undone:
            checks.wait()
            return self._undo(state, h, x.shape[0])
        h.require_finite(k, checks)
        moments, events = self._update_moments(e, state, k, checks)
        due = self._due(state, moments, k)
        units = self._units(state, moments, due)
        if units and not state.units:
            due = tuple(moments)
            state = replace(state, damping=None, gamma=None)  # these were in other units
        room = h.value - e.lower_bound
        typical = partial(self._typical_eigenvalue, moments, units, state.params, room)
        damping = self._damping(state, typical, k)

        part = _part(e, self.step_rule.fraction, checks, self.step_rule.least_examples)
        few = part.scale.examples < self.step_rule.least_examples
        previous = None if few and state.noisy else state.update
        model = LocalModel(part, h.gradient, damping, room, previous, self.l2, units)

        def choose(proposal: Tree) -> Choice:
            choice = self.step_rule.choose(
                k, model, proposal, lambda v: self._curvature_norm(moments, v)
            )
            require_part(f"KFAC step_rule: what it chose in step {k}", choice, Choice)
            return choice

        trials = self._trials(state, moments, units, due, h, e.scale, damping, k, checks)
        trial, choice = self._best(trials, choose)
        events += [(True, event) for event in trial.events]
        multipliers = state.multipliers
        if (balance := self._balance) is not None and balance.due(k):
            rng = Rng(self.seed).child("balance", k)
            multipliers = balance.update(multipliers, model, trial.proposal, rng)

        if previous is None:
            update = trees.scale(choice.alpha, trial.proposal)
        else:
            update = trees.combine(choice.alpha, trial.proposal, choice.mu, previous)
        if self.guard is None:
            require_finite_choice(choice, k, checks)
        params, norm, finite = moved(state.params, update)
        if self.guard is None:
            require_finite_update(finite, norm, k, checks)

        outcome = _Outcome(finite, negation(finite), damping, choice.decrease)
        if self._measures(state, k):
            value = self.objective.mean_value(params, x, t, weights, noise.child(), checks)
            value = value + l2_term(params, self.l2)
            outcome = self._measured(
                outcome, value, partial(model.decrease, update), h, e, state, typical
            )
        if self.guard is not None:
            times = state.rejections + 1
            more = self.damping.rejected(damping, times)
            outcome = replace(outcome, damping=select(outcome.rejected, more, outcome.damping))
        _require_damping(self.damping, "update", k, outcome.damping)
        kept = outcome.kept
        event = LadderEvent("all", "update", "update rejected", cast(float, damping))
        events.append((outcome.rejected, event))
        params = trees.select(kept, params, state.params)
        norm = select(kept, norm, 0.0)
        update = None if kept is False else trees.select(kept, update, trees.zeros_like(update))

        average = self.averaging.update(state.average, params, k) if self.averaging else None
        numbers = {
            **h.numbers,
            "update_norm": norm,
            "damping": damping,
            "gamma": trial.gamma,
            "alpha": choice.alpha,
            "mu": choice.mu if previous is not None else 0.0,
            "model_decrease": outcome.decrease,
            "rho": outcome.rho,
        }
        known = {"step": k, "batch_size": x.shape[0], "refreshed": trial.refreshed}
        new = replace(
            state,
            params=params,
            average=average,
            step=k,
            moments=moments,
            factors=trial.factors,
            update=update,
            damping=outcome.damping,
            gamma=trial.gamma,
            gamma_ratio=trial.gamma_ratio,
            multipliers=multipliers,
            units=units,
            checks=None,
        )
        if self.guard is not None:
            new = replace(
                new,
                previous=state.params,
                previous_average=state.average,
                objective=h.value,
                error=e.standard_error if e.scale.examples > 1 else None,
                measured=outcome.value,
                rejected=outcome.rejected,
            )
        return keep_good(state, new, checks), report_of(numbers, events, **known)

    def _measured(
        self,
        outcome: _Outcome,
        value: Scalar,
        decrease: Callable[[], Scalar],
        h: Regularized,
        e: Evaluation,
        state: KFACState,
        typical: Callable[[], Scalar],
    ) -> _Outcome:
        """What becomes of an update after which h is `value` on the step's own batch."""
        finite = isfinite(value)
        kept = both(both(outcome.kept, finite), self._does_no_harm(value, h, e))
        if not (self.damping.adapts or self.damping.measures(state.step + 1)):
            value = select(kept, value, h.value)
            return replace(outcome, kept=kept, rejected=negation(kept), value=value)
        predicted = decrease() if outcome.decrease is None else outcome.decrease
        # What is lost in the rounding of h tells nothing, of the model or of λ.
        kept = both(kept, isfinite(predicted))
        rounding = _ROUNDINGS * _epsilon(e.outputs) * absolute(h.value)
        telling = negation(both(absolute(predicted) <= rounding, finite))
        ratio = (value - h.value) / select(predicted != 0.0, predicted, 1.0)
        bad = math.nan if self.guard is not None else -math.inf
        rho = select(kept, select(telling, ratio, math.nan), bad)
        return _Outcome(
            kept,
            both(negation(kept), telling),
            self.damping.update(outcome.damping, rho, typical, noisy=state.noisy),
            predicted,
            select(isfinite(rho), rho, math.nan),
            select(kept, value, h.value),
        )

    def _judge(self, state: KFACState, h: Regularized, e: Evaluation) -> tuple[KFACState, bool]:
        """What this evaluation tells of the last update, and whether to undo it.

        The host waits for the evaluation, and learns with it what the last step found.
        """
        if self.guard is None:
            return state, False
        same: Truth = not state.noisy
        if state.measured is not None:
            size = absolute(h.value) + absolute(state.measured)
            same = absolute(h.value - state.measured) <= _ROUNDINGS * _epsilon(e.outputs) * size
        harm: list[Truth] = [False, False]
        if state.objective is not None:
            errors = (math.inf if state.error is None else state.error, e.standard_error)
            rounding = _ROUNDINGS * _epsilon(e.outputs) * absolute(state.objective)
            harm = [
                self.guard.undoes(h.value, state.objective + rounding, errors, noisy=noisy)
                for noisy in (False, True)
            ]
        rejected, alike, *harmful = known(state.rejected, same, *harm)
        state = replace(state, noisy=not alike)
        if harmful[state.noisy] and not rejected:
            return state, True
        if not rejected:
            return replace(state, rejections=0, raised=max(1.0, state.raised / 2.0)), False
        n = state.rejections + 1
        raised = 1.0 if self.damping.adapts else float(self.damping.rejected(state.raised, n))
        return replace(state, rejections=n, raised=raised, trouble=state.step), False

    def _undo(
        self, state: KFACState, h: Regularized, batch_size: int
    ) -> tuple[KFACState, StepReport]:
        """A step that takes the last update back, and does no other."""
        assert state.damping is not None
        k, damping = state.step + 1, state.damping
        new = replace(
            state,
            params=state.previous,
            average=state.previous_average,
            step=k,
            update=None,
            damping=self.damping.rejected(damping, state.rejections + 1),
            previous=None,
            previous_average=None,
            objective=None,
            error=None,
            measured=None,
            rejected=True,
            checks=None,
        )
        event = LadderEvent("all", "update", "update taken back", cast(float, damping))
        numbers = {**h.numbers, "update_norm": 0.0, "damping": damping, "gamma": state.gamma}
        return new, report_of(numbers, [(True, event)], step=k, batch_size=batch_size)

    def _does_no_harm(self, value: Scalar, h: Regularized, e: Evaluation) -> Truth:
        """Whether h on the step's own batch may become `value`."""
        if self.guard is None:
            return True
        if self.step_rule.compares:
            return value <= h.value
        return value - h.value <= self.guard.errors * e.standard_error

    def _measures(self, state: KFACState, k: int) -> bool:
        settling = self.guard is not None and self.guard.measures(k, state.trouble)
        return settling or self.damping.measures(k)

    def _due(self, state: KFACState, moments: dict[str, Moments], k: int) -> tuple[str, ...]:
        """The layers whose factors are renewed."""
        everything = state.factors is None or state.gamma is None or self.gamma.searches(k)
        if everything or state.rejections:
            return tuple(moments)
        return self.refresh.share(k, tuple(moments))

    def _units(
        self, state: KFACState, moments: dict[str, Moments], due: tuple[str, ...]
    ) -> dict[str, Units]:
        """The units that factors are in: those of the step that renewed them.

        None until a layer is met whose inputs differ by orders of magnitude, as raw features do:
        pixels and hidden units need none, and small ones among them are small for a reason.
        """
        if not (self.relative and due):
            return state.units
        if not (state.units or self.curvature.mixes_units(moments)):
            return {}
        due = due if state.units else tuple(moments)
        found = self.curvature.units(moments, state.params)
        return {**state.units, **{path: u for path, u in found.items() if path in due}}

    def _damping(self, state: KFACState, typical: Callable[[], Scalar], k: int) -> Scalar:
        """λ of step k."""
        damping = state.damping
        if damping is None:
            damping = self.damping.start(typical)
        damping = self.damping.at(k, damping)
        _require_damping(self.damping, "at", k, damping)
        if state.raised > 1.0:  # 0 cannot be raised
            damping = select(damping > 0.0, damping, _LEAST * typical())
        return damping * state.raised

    def _update_moments(
        self, e: Evaluation, state: KFACState, k: int, checks: DeferredChecks
    ) -> tuple[dict[str, Moments], list[tuple[Truth, LadderEvent]]]:
        """Statistics of part of the mini-batch, put into the moving averages."""
        old = state.moments
        if old and not self.statistics.due(k):
            return old, []
        fraction = value_at(self.statistics_fraction, k)
        require_fraction(f"KFAC statistics_fraction in step {k}", fraction)
        part = _part(e, fraction, checks, self.least_statistics)
        rng = Rng(self.seed).child("targets", k)
        try:
            new = self.curvature.estimate(part, self.fisher, rng, old or None)
        except DivergenceError:  # of targets drawn on the host
            checks.wait()  # what went wrong before says more
            raise
        events = []
        for path, m in new.items():
            good = are_finite(*m.values())
            if old:
                event = LadderEvent(path, ", ".join(m), "moments rejected", 0.0)
                events.append((negation(good), event))
                new[path] = trees.select(good, m, old[path])
            else:
                checks.require(good, partial(_no_moments, k, path, ", ".join(m)))
        if not old:
            return new, events
        if state.objective is not None:
            new, more = self._in_proportion(state, new)
            events += more
        epsilon = self.moving_average.epsilon(self.statistics.count(k))
        return self.curvature.mix(old, new, epsilon), events

    def _in_proportion(
        self, state: KFACState, new: dict[str, Moments]
    ) -> tuple[dict[str, Moments], list[tuple[Truth, LadderEvent]]]:
        """Moments that rule no average: a batch counts as _PROPORTION times the average at most.

        So a lasting change is followed within a few dozen steps, however large it is. Next to the
        loss, tr F̂_i may be tiny for a while, of a network that is sure of itself, and then grow.
        """
        before = self.curvature.block_traces(state.moments, state.params, state.units)
        now = self.curvature.block_traces(new, state.params, state.units)
        sizes = {path: math.prod(p.shape) for path, p in trees.items(state.params)}
        h = 0.0 if state.objective is None else state.objective
        least = _OF_LOSS / sum(sizes.values()) * select(h > 0.0, h, 0.0)
        weights, events = {}, []
        for path in before:
            trace = scalar(now[path])
            most = _PROPORTION * (scalar(before[path]) + sizes[path] * least)
            outsized = both(trace > most, most > 0.0)
            weights[path] = select(outsized, most / select(outsized, trace, 1.0), 1.0)
            event = LadderEvent(path, "moments", "moments out of proportion", 0.0)
            events.append((outsized, event))
        return self.curvature.weighted(state.moments, new, weights), events

    def _trials(
        self,
        state: KFACState,
        moments: dict[str, Moments],
        units: dict[str, Units],
        due: tuple[str, ...],
        h: Regularized,
        scale: Scale,
        damping: Scalar,
        k: int,
        checks: DeferredChecks,
    ) -> Iterator[_Trial]:
        """A proposal for each candidate γ, with the factors it came from, when it is asked for."""

        def propose(factors: dict[str, Factors]) -> Tree:
            if units:
                solved = self.curvature.solve(factors, in_units(h.gradient, units))
                solved = in_units(solved, units)
            elif h.statistics is None:
                solved = self.curvature.solve(factors, h.gradient)
            else:
                solved = self.curvature.solve_mean(factors, h.statistics, scale, h.gradient)
            proposal = trees.scale(-1.0, solved)
            return proposal if balance is None else balance.apply(state.multipliers, proposal)

        balance = self._balance
        if state.factors is not None and state.gamma is not None and not due:
            yield _Trial(
                state.gamma, state.gamma_ratio, state.factors, propose(state.factors), (), []
            )
            return
        checks.wait()  # factorising decides on the host, and waits for the device
        part = self.curvature.in_units({path: moments[path] for path in due}, units)
        root = math.sqrt(float(damping) + self.l2)
        current = state.gamma
        if self.gamma.follows and state.gamma_ratio is not None:
            current = state.gamma_ratio * root
        candidates = self.gamma.candidates(k, current, float(damping) + self.l2)
        _require_candidates(candidates, k)
        found, trial = False, None
        for gamma in candidates:
            new, events = self.curvature.factorise(part, gamma**2, state.factors)
            factors = {**(state.factors or {}), **new}
            proposal = propose(factors)
            ratio = gamma / root if root else None
            trial = _Trial(gamma, ratio, factors, proposal, due, events)
            if all_finite(*trees.leaves(proposal)):
                found = True
                yield trial
        if not found and trial is not None and self.guard is not None:
            yield trial  # to be rejected
        elif not found:
            raise DivergenceError(
                f"step {k}: no proposal is finite for gamma in {list(candidates)}; the parameters "
                "are unchanged. Use more damping"
            )

    def _best(
        self, trials: Iterator[_Trial], choose: Callable[[Tree], Choice]
    ) -> tuple[_Trial, Choice]:
        """The trial of which the model promises most, or the first that beats the first."""
        best = next(trials)
        choice = choose(best.proposal)
        for trial in trials:
            other = choose(trial.proposal)
            if choice.decrease is None or other.decrease is None:
                raise ConfigError(
                    f"KFAC gamma: several candidates from {type(self.gamma).__name__} expected a "
                    "step rule that evaluates the quadratic model (QuadraticModel), got "
                    f"{type(self.step_rule).__name__}"
                )
            if other.decrease < choice.decrease:  # the host decides, and waits for the device
                best, choice = trial, other
                if not self.gamma.thorough:
                    break
        return best, choice

    @property
    def _balance(self) -> Balance | None:
        """The step rule's, where layers have proposals of their own."""
        return self.step_rule.balance if self.curvature.separable else None

    def _typical_eigenvalue(
        self, moments: dict[str, Moments], units: dict[str, Units], params: Tree, room: Scalar
    ) -> Scalar:
        """Π_i (tr F̂_i / n_i)^(n_i / n), n = Σ_i n_i, over the layers' blocks of n_i parameters.

        Layers without curvature do not count; a thousandth of tr F̂ / n at least; 0 where nothing
        is left. In the layers' own units, where F̂ has that of h, _OF_LOSS h / n is added: a network
        that is sure of wrong answers has no F̂ that is worth the name.
        """
        sizes = {path: math.prod(p.shape) for path, p in trees.items(params)}
        blocks = self.curvature.block_traces(moments, params, units)
        if not blocks:
            sizes = {"all": sum(sizes.values())}
            blocks = {"all": self.curvature.matrix(moments, params).trace()}
        traces = {path: scalar(x) for path, x in blocks.items()}
        traces = {path: select(isfinite(x), x, 0.0) for path, x in traces.items()}
        counted = {path: select(x > 0.0, sizes[path], 0) for path, x in traces.items()}
        n = sum(counted.values())
        n = select(n > 0, n, 1)
        typical: Scalar = 1.0
        for path, x in traces.items():
            typical = typical * (x / sizes[path]) ** (counted[path] / n)
        trace = sum(traces.values())
        least = 1e-3 * trace / n
        found = select(trace > 0.0, select(typical > least, typical, least), 0.0)
        room = select(isfinite(room), room, 0.0)  # infinite for a loss without a lower bound
        return (
            found + _OF_LOSS / sum(sizes.values()) * select(room > 0.0, room, 0.0)
            if units
            else found
        )

    def _curvature_norm(self, moments: dict[str, Moments], v: Tree) -> Scalar:
        """vᵀ F̂ v."""
        return scalar(trees.inner(v, self.curvature.matrix(moments, v).matvec(v)))


@final
@dataclass(frozen=True, eq=False)
class _Trial:
    gamma: float
    gamma_ratio: float | None
    factors: dict[str, Factors]
    proposal: Tree
    refreshed: tuple[str, ...]
    events: list[LadderEvent]


@final
@dataclass(frozen=True, eq=False)
class _Outcome:
    """Whether an update is kept, and what follows for λ; h after it where it was measured."""

    kept: Truth
    rejected: Truth
    damping: Scalar
    decrease: Scalar | None
    rho: Scalar | None = None
    value: Scalar | None = None


def _epsilon(x: Array) -> float:
    return float(array_namespace(x).finfo(x.dtype).eps)


def _require_damping(policy: DampingPolicy, method: str, k: int, damping: Scalar) -> None:
    """Raise `ConfigError` unless a policy gave a number >= 0, as far as the host can tell."""
    if not is_asynchronous(damping):  # type: ignore[arg-type]
        name = f"KFAC damping: λ from {type(policy).__name__}.{method} in step {k}"
        require_positive(name, damping, zero=True)  # type: ignore[arg-type]


def _require_candidates(candidates: object, k: int) -> None:
    """Raise `ConfigError` unless a policy gave some numbers >= 0."""
    if not isinstance(candidates, tuple | list) or not candidates:
        raise ConfigError(
            f"KFAC gamma: expected a tuple of candidates in step {k}, got {candidates!r}"
        )
    for gamma in candidates:
        require_positive(f"KFAC gamma: a candidate in step {k}", gamma, zero=True)


def _part(e: Evaluation, fraction: float, checks: DeferredChecks, least: int = 1) -> Evaluation:
    """The first examples of a mini-batch, of which some must count."""
    examples = e.scale.examples
    part = e.take(max(math.ceil(fraction * examples), min(least, examples)))
    w = part.scale.weights
    if w is not None:
        checks.require(
            truth(array_namespace(w).max(w) > 0.0),
            lambda: InputError(
                f"weights: expected a positive weight among the first {part.scale.examples} of "
                f"{examples} examples, which the curvature is taken from; shuffle the batch"
            ),
        )
    return part


def _no_moments(k: int, path: str, names: str) -> DivergenceError:
    return DivergenceError(
        f"step {k}: layer {path}: the moments {names} are not finite, and there are no earlier "
        "ones to keep; scale the data"
    )
