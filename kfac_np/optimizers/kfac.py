"""The K-FAC optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, final

from kfac_np import trees
from kfac_np.backend import (
    Array,
    DeferredChecks,
    Rng,
    Scalar,
    array_namespace,
    on_host,
    scalar,
    select,
)
from kfac_np.curvature import BlockDiagonal, Curvature, Factors, KFACBlock, LadderEvent, Moments
from kfac_np.curvature.base import Units
from kfac_np.curvature.typical import curvature_norm, typical_eigenvalue
from kfac_np.errors import ConfigError, CurvatureError, InputError
from kfac_np.fisher import FisherType, MonteCarlo
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers.averaging import IterateAverage
from kfac_np.optimizers.balance import Balance
from kfac_np.optimizers.base import (
    Optimizer,
    Regularized,
    State,
    check_params,
    keep_good,
    require_finite_update,
)
from kfac_np.optimizers.damping import DampingPolicy, LevenbergMarquardt
from kfac_np.optimizers.gamma import GammaPolicy, GammaSearch, RelativeGammaSearch
from kfac_np.optimizers.guard import Guard, Outcome, judged, measured, taken_back
from kfac_np.optimizers.kfac_state import KFACState
from kfac_np.optimizers.moments import (
    Events,
    MovingAverage,
    first_examples,
    loss_per_parameter,
    mixed,
)
from kfac_np.optimizers.proposals import Proposal, best, proposals, solved
from kfac_np.optimizers.quadratic_model import LocalModel, QuadraticModel
from kfac_np.optimizers.reports import StepReport
from kfac_np.optimizers.schedules import Refresh, Schedule, Shrinking, require_rate, value_at
from kfac_np.optimizers.step_rules import Choice, StepRule, require_finite_choice
from kfac_np.penalties import Penalty, penalized
from kfac_np.trees import Tree
from kfac_np.validation import (
    plain_fields,
    require_flag,
    require_fraction,
    require_instance,
    require_integer,
    require_positive,
)

__all__ = ["KFAC"]

_LEAST = 1e-10  # of a typical eigenvalue: what a λ of 0 is raised from
_HOPELESS = 20  # updates taken back in a row, after which one that is not finite is an error
_SHORTER = (1 / 4, 1 / 16)  # of an update that raised the objective: what is tried instead


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
    - Where inputs of a layer differ by orders of magnitude, or the median of their scales is above
      10, λ and γ are relative to the layers' own scales: the model has F + λ diag(u)⁻² + η I, and
      the factors are those of diag(u) F̂ diag(u), u the units of `Curvature.units`. Rescaled
      features and hidden units change nothing then.
    - γ₀ = 0.3 √(λ₀ + η) instead of √(λ₀ + η), since small γ got off plateaus sooner wherever we
      tried, and γ is searched in step 3, too, and by factors of 2; within bounds. Between searches
      it follows √(λ + η).
    - T₃ = 10 instead of 20, and of the first three steps only the first renews the factors: those
      as old as 20 steps cost more than renewing them does.
    - The average is of the last twentieth of the iterates at first (see `IterateAverage`).
    - The quadratic model uses 256 examples at least, and may not promise a loss that is out of
      reach (see `QuadraticModel`). With fewer, unless all batches are the same, μ = 1/2, since
      what they tell of the best one would be noise, and with fewer than 128 there is no momentum.
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
    balance : Balance or None
        Multipliers of the layers' proposals, where the curvature is separable.
    damping : DampingPolicy
        λ.
    gamma : GammaPolicy
        γ.
    moving_average : MovingAverage
        Of the moments, and when they are renewed: in every step by default.
    refresh : Refresh
        When the factors are computed from them (T₃). With `Refresh(spread=True)` a few layers at
        a time, so that no step is slow; where γ is searched, all of them nevertheless.
    averaging : IterateAverage or None
    statistics_fraction : float or Schedule
        τ₁, the fraction of the mini-batch that the statistics use: its first examples, so that
        the batch should be shuffled. By default all of the first mini-batch, since there is no
        earlier one to average with, and less and less until it is 1/8, as the paper has it; but a
        quarter of `step_rule.least_examples` at least, where the mini-batch has so many.
    l2 : float
        η. It damps, too: the model and the factors use λ + η, so that λ = 0 alone is not undamped.
    relative : bool
        Damp relative to the layers' own scales where inputs have units of their own, which
        `Curvature.mixes_units` tells (of exact and diagonal blocks alone it cannot); without it
        always by a multiple of I.
    guard : Guard or None
        Takes back what does harm. Without it every update with a finite objective is kept, and one
        that is not finite is a `DivergenceError`, which with it takes 20 rejections in a row.
    seed : int
        Of the sampled targets, and of what layers draw in training (Dropout).
    penalty : Penalty or None
        R: h = loss + (η/2)‖θ‖² + R(θ), of `kfac_np.penalties`. The quadratic model has its exact
        Hessian; F̂ knows nothing of it.

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
    balance: Balance | None = None
    damping: DampingPolicy = LevenbergMarquardt()
    gamma: GammaPolicy = RelativeGammaSearch()
    moving_average: MovingAverage = MovingAverage()
    refresh: Refresh = Refresh(interval=10, first=1)
    averaging: IterateAverage | None = IterateAverage(power=19.0)
    statistics_fraction: float | Schedule = Shrinking(to=1 / 8)
    l2: float = 0.0
    relative: bool = True
    guard: Guard | None = Guard()
    seed: int = 0
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        require_instance("KFAC objective", self.objective, Objective)
        require_instance("KFAC curvature", self.curvature, Curvature)
        require_instance("KFAC fisher", self.fisher, FisherType)
        require_instance("KFAC step_rule", self.step_rule, StepRule)
        require_instance("KFAC balance", self.balance, Balance, optional=True)
        require_fraction("KFAC step_rule.fraction", self.step_rule.fraction)
        require_integer("KFAC step_rule.least_examples", self.step_rule.least_examples)
        require_integer("KFAC step_rule.interval", self.step_rule.interval)
        require_instance("KFAC damping", self.damping, DampingPolicy)
        require_instance("KFAC gamma", self.gamma, GammaPolicy)
        require_instance("KFAC moving_average", self.moving_average, MovingAverage)
        require_instance("KFAC refresh", self.refresh, Refresh)
        require_instance("KFAC averaging", self.averaging, IterateAverage, optional=True)
        require_rate("KFAC statistics_fraction", self.statistics_fraction)
        if not isinstance(self.statistics_fraction, Schedule):
            require_fraction("KFAC statistics_fraction", self.statistics_fraction)
        require_positive("KFAC l2", self.l2, zero=True)
        require_instance("KFAC penalty", self.penalty, Penalty, optional=True)
        require_flag("KFAC relative", self.relative)
        require_instance("KFAC guard", self.guard, Guard, optional=True)
        require_integer("KFAC seed", self.seed, zero=True)
        if self.refresh.spread and not self.curvature.separable:
            raise ConfigError(
                "KFAC refresh: spread=True expected a curvature whose layers are factorised one by "
                f"one (BlockDiagonal, EKFAC), got {type(self.curvature).__name__}"
            )
        searches = isinstance(self.gamma, GammaSearch | RelativeGammaSearch)
        if searches and not self.step_rule.compares:
            raise ConfigError(
                f"KFAC gamma: {type(self.gamma).__name__} expected a step rule that evaluates the "
                f"quadratic model (QuadraticModel), got {type(self.step_rule).__name__}; use "
                "CoupledGamma with it"
            )

    def init(self, params: Tree) -> KFACState:
        check_params(params, self.penalty)
        average = params if self.averaging else None
        return KFACState(params, average, 0, {}, None, None, None, None)

    def state_from_tree(self, tree: dict[str, Any]) -> KFACState:
        state: KFACState = super().state_from_tree(tree)
        moments, paths = state.moments, self.curvature.paths(state.params)
        if not isinstance(moments, dict) or (moments and set(moments) != set(paths)):
            came = list(moments) if isinstance(moments, dict) else moments
            raise InputError(f"state: moments: expected those of {list(paths)}, got {came!r:.200}")
        for path, m in moments.items():
            if not isinstance(m, dict) or not all(hasattr(x, "ndim") for x in m.values()):
                raise InputError(
                    f"state: moments: layer {path}: expected arrays by name, got {m!r:.100}"
                )
        try:
            self.curvature.require_own(moments)
        except CurvatureError as error:
            raise InputError(f"state: moments: {error}") from error
        return state

    def step(
        self, state: KFACState, x: Array, t: Array, weights: Array | None = None
    ) -> tuple[KFACState, StepReport]:
        self.check_state(state)
        k, checks = state.step + 1, DeferredChecks()
        noise = Rng(self.seed).child("forward", k)
        e = self.objective.evaluate(state.params, x, t, weights, noise, checks)
        h = Regularized.of(e, self._penalty)

        def value(params: Tree) -> Scalar:
            loss = self.objective.mean_value(params, x, t, weights, noise.child(), checks)
            return loss if self._penalty is None else loss + self._penalty.value(params)

        state, harmful = judged(self.guard, self.damping, state, h, e, value)
        if harmful:
            checks.wait()
            return taken_back(self.damping, state, h, x.shape[0])
        h.require_finite(k, checks)
        now = _Now(k, state, e, h, checks)

        moments, events = self._renew_moments(now)
        now, metric = self._renew_metric(now, moments)  # F̂ of these, and the units it is damped in
        damping = self._damping(now, metric)  # λ
        model = self._model(now, metric, damping)  # M(δ), with the exact F
        proposal, choice = self._propose(now, metric, model)  # Δ = -F̂(γ)⁻¹ ∇h for the best γ
        update = choice.update(proposal.delta, model.previous)  # δ = αΔ + μδ₀
        outcome = self._try(now, model, choice, update, value)  # θ + δ, and whether it is kept
        damping = self._next_damping(now, metric, model, outcome)  # by ρ
        new = self._next(now, metric, model, proposal, choice, outcome, damping)
        report = self._report(now, model, proposal, choice, outcome, events)
        return keep_good(state, new, checks), report

    @property
    def _penalty(self) -> Penalty | None:
        """(η/2)‖θ‖² + R(θ)."""
        return penalized(self.l2, self.penalty)

    def _renew_moments(self, now: _Now) -> tuple[dict[str, Moments], Events]:
        """Moments on the first τ₁ of the mini-batch, put into the moving averages."""
        old, k = now.state.moments, now.k
        if old and not self.moving_average.due(k):
            return old, []
        fraction = value_at(self.statistics_fraction, k)
        require_fraction(f"KFAC statistics_fraction in step {k}", fraction)
        least = max(1, self.step_rule.least_examples // 4)
        part = first_examples(now.e, fraction, now.checks, least)
        rng = Rng(self.seed).child("targets", k)
        return mixed(
            self.curvature,
            now.state,
            lambda: self.curvature.estimate(
                part, self.fisher, rng, old or None, in_own_units=bool(now.state.units)
            ),
            self.moving_average.epsilon(k),
            now.checks,
        )

    def _renew_metric(self, now: _Now, moments: dict[str, Moments]) -> tuple[_Now, _Metric]:
        """Which layers get new factors, and the units that all of them are damped in.

        There are none until a layer is met whose inputs have units of their own, as raw features
        do: pixels and hidden units need none, and small ones among them are small for a reason.
        Then λ and γ begin anew, since they were in other units.
        """
        state, everything = now.state, tuple(moments)
        if state.factors is None or state.gamma is None or state.rejections:
            due = everything
        else:
            searched = self.gamma.searches(now.k)
            due = everything if searched else self.refresh.share(now.k, everything)
        if not (self.relative and due):
            return now, _Metric(moments, state.units, due)
        if not (state.units or self.curvature.mixes_units(moments)):
            return now, _Metric(moments, {}, due)
        if not state.units:
            due = everything
            begun = replace(state, damping=None, gamma=None, gamma_ratio=None)
            now = replace(now, state=begun)
        found = self.curvature.units(moments, state.params)
        if due != everything:
            found = {**state.units, **{path: u for path, u in found.items() if path in due}}
        return now, _Metric(moments, found, due)

    def _eigenvalue(self, now: _Now, metric: _Metric) -> Scalar:
        """A typical one of F̂; in the layers' own units it counts as part of the loss at least."""
        params, units = now.state.params, metric.units
        found = typical_eigenvalue(self.curvature, metric.moments, params, units)
        if not units:
            return found
        return found + loss_per_parameter(params, now.e.above_bound(now.h.value))

    def _damping(self, now: _Now, metric: _Metric) -> Scalar:
        """λ of this step."""
        eigenvalue = partial(self._eigenvalue, now, metric)
        current = now.state.damping
        if current is None and (begun := self.damping.start(eigenvalue)) is not None:
            current = self._number(now, "start", begun)
        damping = self._number(now, "at", self.damping.at(now.k, current))
        if now.state.raised > 1.0:  # 0 cannot be raised
            damping = select(damping > 0.0, damping, _LEAST * eigenvalue())
        return damping * now.state.raised

    def _model(self, now: _Now, metric: _Metric, damping: Scalar) -> LocalModel:
        """The quadratic model on the first τ₂ of the mini-batch.

        Where batches differ, few examples do not tell which momentum is best, and fewer yet have
        too noisy updates for any.
        """
        least = self.step_rule.least_examples
        part = first_examples(now.e, self.step_rule.fraction, now.checks, least)
        n, noisy = part.scale.examples, self.step_rule.compares and now.state.noisy
        return LocalModel(
            part,
            now.h.gradient,
            damping,
            bound=now.e.above_bound(now.h.value),
            previous=None if noisy and 2 * n < least else now.state.update,
            few=noisy and n < least,
            penalty=self._penalty,
            units=metric.units,
            kept=now.state.choice if self._choice_holds(now, metric) else None,
        )

    def _choice_holds(self, now: _Now, metric: _Metric) -> bool:
        """Whether the last model's α and μ serve for this step, which needs no model otherwise."""
        if metric.due or now.state.update is None or self._measures(now):
            return False
        return bool(now.k % self.step_rule.interval)

    def _measures(self, now: _Now) -> bool:
        """Whether the step measures h again."""
        k, interval = now.k, self.step_rule.interval
        settling = self.guard is not None and self.guard.measures(k, now.state.trouble, interval)
        return settling or self.damping.measures(k)

    def _propose(self, now: _Now, metric: _Metric, model: LocalModel) -> tuple[Proposal, Choice]:
        """The proposal whose best α and μ have the model promise most."""
        curvature, h, balance = self.curvature, now.h, self._balance

        def solve(factors: dict[str, Factors]) -> Tree:
            delta = solved(curvature, factors, h, now.e.scale, metric.units)
            delta = delta if self.penalty is None else self.penalty.project(delta)
            return delta if balance is None else balance.apply(now.state.multipliers, delta)

        def choose(delta: Tree) -> Choice:
            norm = partial(curvature_norm, curvature, metric.moments)
            choice = self.step_rule.choose(now.k, model, delta, norm)
            require_instance(f"KFAC step_rule: what it chose in step {now.k}", choice, Choice)
            if choice.decrease is None:
                return choice
            return replace(choice, decrease=scalar(choice.decrease, h.value))

        renewed = {path: metric.moments[path] for path in metric.due}
        if metric.units:
            renewed = curvature.in_units(renewed, metric.units)
        damping = model.damping + self.l2
        finite = self.guard is None
        trials = proposals(
            curvature, self.gamma, now.state, renewed, damping, solve, now.checks, finite=finite
        )
        return best(trials, choose, self.gamma, self.step_rule)

    def _try(
        self,
        now: _Now,
        model: LocalModel,
        choice: Choice,
        update: Tree,
        value: Callable[[Tree], Scalar],
    ) -> Outcome:
        """θ + δ, in some steps with h again on the same batch; then θ + δ/4, ... if it rose."""
        params = now.state.params
        outcome = Outcome.of(params, update, choice.decrease)
        if self.guard is None:
            require_finite_choice(choice, now.k, now.checks)
        if self.guard is None or now.state.rejections >= _HOPELESS:
            require_finite_update(outcome.kept, outcome.norm, now.k, now.checks)
        renews = self.damping.measures(now.k)
        if not self._measures(now):
            return outcome

        def measure(outcome: Outcome) -> Outcome:
            return measured(
                self.guard,
                self.step_rule,
                now.h,
                now.e,
                outcome,
                value(outcome.params),
                model,
                follows=self.damping.adapts or renews,
                noisy=now.state.noisy,
            )

        outcome = measure(outcome)
        if self.guard is None or not on_host(outcome.rejected)[0]:
            return outcome
        for part in _SHORTER:
            shorter = trees.scale(part, update)
            promised = None if choice.decrease is None else model.decrease(shorter)
            trial = measure(Outcome.of(params, shorter, promised))
            assert trial.value is not None
            moves = abs(trial.value - now.h.value) > 0.0
            if on_host(trial.kept & moves)[0]:
                return replace(trial, rho=outcome.rho, shortened=part)
        return outcome

    def _next_damping(
        self, now: _Now, metric: _Metric, model: LocalModel, outcome: Outcome
    ) -> Scalar:
        """λ of the next step: as ρ has it, but more after an update that went too far."""
        damping = model.damping
        if outcome.shortened < 1.0:
            tries = 1 + _SHORTER.index(outcome.shortened)
            return self._number(now, "rejected", self.damping.rejected(damping, tries))
        if outcome.rho is not None:
            eigenvalue = partial(self._eigenvalue, now, metric)
            noisy = now.state.noisy
            new = self.damping.update(damping, outcome.rho, eigenvalue, noisy=noisy)
            damping = self._number(now, "update", new)
        if self.guard is None:
            return damping
        more = self.damping.rejected(model.damping, now.state.rejections + 1)
        return select(outcome.rejected, self._number(now, "rejected", more), damping)

    def _next(
        self,
        now: _Now,
        metric: _Metric,
        model: LocalModel,
        proposal: Proposal,
        choice: Choice,
        outcome: Outcome,
        damping: Scalar,
    ) -> KFACState:
        """The state after the step: where the update is not kept, with the parameters as before.

        α and μ hold for further steps unless Δ or λ is about to be another.
        """
        state, kept = now.state, outcome.kept
        params = trees.select(kept, outcome.params, state.params)
        average = self.averaging.update(state.average, params, now.k) if self.averaging else None
        multipliers = state.multipliers
        if (balance := self._balance) is not None and balance.due(now.k):
            rng = Rng(self.seed).child("balance", now.k)
            multipliers = balance.update(multipliers, model, proposal.delta, rng)
        held = None
        if self.step_rule.interval > 1 and outcome.shortened == 1.0:
            alpha, mu = (scalar(number, now.h.value) for number in (choice.alpha, choice.mu))
            held = {"alpha": alpha, "mu": mu} if multipliers is state.multipliers else None
        new = replace(
            state,
            params=params,
            average=average,
            step=now.k,
            moments=metric.moments,
            factors=proposal.factors,
            update=trees.where(kept, outcome.update),
            damping=damping,
            gamma=proposal.gamma,
            gamma_ratio=proposal.gamma_ratio,
            multipliers=multipliers,
            units=metric.units,
            choice=held,
            checks=None,
        )
        if self.guard is None:
            return new
        return replace(
            new,
            previous=state.params,
            previous_average=state.average,
            objective=now.h.value,
            error=now.e.standard_error if now.e.scale.examples > 1 else None,
            measured=outcome.value,
            rejected=outcome.rejected,
        )

    def _report(
        self,
        now: _Now,
        model: LocalModel,
        proposal: Proposal,
        choice: Choice,
        outcome: Outcome,
        events: Events,
    ) -> StepReport:
        numbers: dict[str, Scalar | float | None] = {
            **now.h.numbers,
            "update_norm": select(outcome.kept, outcome.norm, 0.0),
            "damping": model.damping,
            "gamma": proposal.gamma,
            "alpha": outcome.shortened * choice.alpha,
            "mu": 0.0 if model.previous is None else outcome.shortened * choice.mu,
            "model_decrease": outcome.decrease,
            "rho": outcome.rho,
        }
        happened: list[Any] = [*events, *proposal.events]
        for condition, what in (
            (outcome.rejected, "update rejected"),
            (outcome.shortened < 1.0, "update shortened"),
        ):
            happened.append((condition, LadderEvent("all", "update", what, model.damping)))
        return StepReport(now.k, now.e.scale.examples, numbers, proposal.refreshed, happened)

    def _number(self, now: _Now, method: str, damping: Any) -> Scalar:
        """λ as a policy gave it; it is a `ConfigError` unless it is a number >= 0."""
        name = f"KFAC damping: λ from {type(self.damping).__name__}.{method} in step {now.k}"
        if getattr(damping, "shape", None) != ():
            require_positive(name, damping, zero=True)
        damping = scalar(damping, now.h.value)
        now.checks.require(
            (damping >= 0.0) & array_namespace(damping).isfinite(damping),
            lambda: ConfigError(f"{name}: expected a number >= 0, got {float(damping)!r}"),
        )
        return damping

    @property
    def _balance(self) -> Balance | None:
        """`balance`, where layers have proposals of their own."""
        return self.balance if self.curvature.separable else None


@final
@dataclass(frozen=True, eq=False)
class _Now:
    """Where a step begins: its number, the state, and the evaluation of the mini-batch."""

    k: int
    state: KFACState
    e: Evaluation
    h: Regularized
    checks: DeferredChecks


@final
@dataclass(frozen=True, eq=False)
class _Metric:
    """F̂: its moments, the units it is damped in, and the layers whose factors are renewed."""

    moments: dict[str, Moments]
    units: dict[str, Units]
    due: tuple[str, ...]
