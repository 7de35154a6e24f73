"""The K-FAC optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast, final

from kfac_np import trees
from kfac_np.backend import (
    Array,
    Doubts,
    Rng,
    Scalar,
    Truth,
    all_finite,
    are_finite,
    array_namespace,
    isfinite,
    negation,
    scalar,
    select,
    truth,
    works_ahead,
)
from kfac_np.curvature import (
    BlockDiagonal,
    Curvature,
    Factors,
    KFACBlock,
    LadderEvent,
    Moments,
)
from kfac_np.errors import ConfigError, DivergenceError, InputError, plain_fields
from kfac_np.fisher import FisherType, MonteCarlo
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers.averaging import IterateAverage, MovingAverage
from kfac_np.optimizers.balance import Balance
from kfac_np.optimizers.base import (
    Optimizer,
    Regularized,
    State,
    apply_update,
    check_params,
    keep_good,
    l2_term,
    require_part,
)
from kfac_np.optimizers.damping import (
    DampingPolicy,
    GammaPolicy,
    GammaSearch,
    LevenbergMarquardt,
)
from kfac_np.optimizers.local_model import LocalModel
from kfac_np.optimizers.reports import StepReport, report_of
from kfac_np.optimizers.schedules import (
    Exponential,
    Refresh,
    Schedule,
    require_positive,
    require_rate,
    require_whole,
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

__all__ = ["KFAC", "KFACState"]


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

    Examples
    --------
    >>> KFACState((), None, 0, {}, None, None, None, None).damping is None
    True
    """

    like_params: ClassVar[tuple[str, ...]] = ("params", "average", "update")

    moments: dict[str, Moments]
    factors: dict[str, Factors] | None
    update: Tree | None
    damping: Scalar | None
    gamma: float | None
    multipliers: dict[str, Scalar] | None = None


@final
@dataclass(frozen=True)
class KFAC(Optimizer):
    """δ = αΔ + μδ₀, Δ = -F̂(γ)⁻¹ ∇h: natural gradient by Kronecker-factored curvature.

    h(θ) = loss + (η/2)‖θ‖². The algorithm is the paper's; the defaults are meant to need no tuning
    by hand, and differ from its text, which `kfac_np.optimizers.published` follows:

    - λ₀ is a typical eigenvalue of F̂ instead of 150 (see `LevenbergMarquardt`).
    - γ₀ = 0.3 √(λ₀ + η) instead of √(λ₀ + η), since small γ got off plateaus sooner wherever we
      tried, and γ is searched in step 3, too, and by factors of 2; within bounds.
    - T₃ = 10 instead of 20, and of the first three steps only the first renews the factors: those
      as old as 20 steps cost more than renewing them does.
    - The average is of the last twentieth of the iterates at first (see `IterateAverage`).
    - λ is not adapted to less than 0.3 times such an eigenvalue of the current F̂.
    - The quadratic model uses 256 examples at least, and may not promise a loss that is out of
      reach (see `QuadraticModel`).

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
    l2 : float
        η. It damps, too: the model and the factors use λ + η, so that λ = 0 alone is not undamped.
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
        decay=0.5 ** (1 / 20), early=(3,), ratio=0.3, within=10.0, thorough=False
    )
    moving_average: MovingAverage = MovingAverage()
    statistics: Refresh = Refresh(interval=1)
    refresh: Refresh = Refresh(interval=10, first=1)
    averaging: IterateAverage | None = IterateAverage(warm_up=True, power=19.0)
    statistics_fraction: float | Schedule = Exponential(1.0, decay=0.8, minimum=1 / 8)
    l2: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        require_part("KFAC objective", self.objective, Objective)
        require_part("KFAC curvature", self.curvature, Curvature)
        require_part("KFAC fisher", self.fisher, FisherType)
        require_part("KFAC step_rule", self.step_rule, StepRule)
        require_part("KFAC step_rule.balance", self.step_rule.balance, Balance, optional=True)
        require_fraction("KFAC step_rule.fraction", self.step_rule.fraction)
        require_whole("KFAC step_rule.least_examples", self.step_rule.least_examples)
        require_part("KFAC damping", self.damping, DampingPolicy)
        require_part("KFAC gamma", self.gamma, GammaPolicy)
        require_part("KFAC moving_average", self.moving_average, MovingAverage)
        require_part("KFAC statistics", self.statistics, Refresh)
        require_part("KFAC refresh", self.refresh, Refresh)
        require_part("KFAC averaging", self.averaging, IterateAverage, optional=True)
        require_rate("KFAC statistics_fraction", self.statistics_fraction)
        if not isinstance(self.statistics_fraction, Schedule):
            require_fraction("KFAC statistics_fraction", self.statistics_fraction)
        require_positive("KFAC l2", self.l2, zero=True)
        require_whole("KFAC seed", self.seed, zero=True)
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
        doubts = Doubts()
        e = self.objective.evaluate(state.params, x, t, weights, noise, doubts)
        h = Regularized.of(e, self.l2, k, doubts)
        moments, events = self._update_moments(e, state.moments, k, doubts)
        typical = partial(self._typical_eigenvalue, moments, state.params)
        damping = self._damping(state, typical, k)

        room = h.value - e.lower_bound
        part = _part(e, self.step_rule.fraction, doubts, self.step_rule.least_examples)
        model = LocalModel(part, h.gradient, damping + self.l2, room, state.update)

        def choose(proposal: Tree) -> Choice:
            choice = self.step_rule.choose(
                k, model, proposal, lambda v: self._curvature_norm(moments, v)
            )
            require_part(f"KFAC step_rule: what it chose in step {k}", choice, Choice)
            return choice

        trials = self._trials(state, moments, h, e.scale, damping, k, doubts)
        trial, choice = self._best(trials, choose)
        require_finite_choice(choice, k, doubts)
        events += [(True, event) for event in trial.events]
        multipliers = state.multipliers
        if (balance := self._balance) is not None and balance.due(k):
            rng = Rng(self.seed).child("balance", k)
            multipliers = balance.update(multipliers, model, trial.proposal, rng)

        if state.update is None:
            update = trees.scale(choice.alpha, trial.proposal)
        else:
            update = trees.combine(choice.alpha, trial.proposal, choice.mu, state.update)
        params, norm = apply_update(state.params, update, k, doubts)

        rho, decrease, next_damping = None, choice.decrease, damping
        if self.damping.measures(k):
            decrease = model.decrease(update) if decrease is None else decrease
            value = self.objective.mean_value(params, x, t, weights, noise.child(), doubts)
            value = value + l2_term(params, self.l2)
            good = isfinite(value)  # or it is not a place to go to, and λ was too small
            change = select(good, value - h.value, math.nan)
            rho, next_damping = self._reduction(change, decrease, damping, typical)
            _require_damping(self.damping, "update", k, next_damping)
            event = LadderEvent("all", "update", "update rejected", cast(float, damping))
            events.append((negation(good), event))
            params = trees.select(good, params, state.params)
            norm = select(good, norm, 0.0)
            update = None if good is False else trees.select(good, update, trees.zeros_like(update))

        average = self.averaging.update(state.average, params, k) if self.averaging else None
        numbers = {
            **h.numbers,
            "update_norm": norm,
            "damping": damping,
            "gamma": trial.gamma,
            "alpha": choice.alpha,
            "mu": choice.mu if state.update is not None else 0.0,
            "model_decrease": decrease,
            "rho": rho,
        }
        known = {"step": k, "batch_size": x.shape[0], "refreshed": trial.refreshed}
        new = KFACState(
            params,
            average,
            k,
            moments,
            trial.factors,
            update,
            next_damping,
            trial.gamma,
            multipliers,
        )
        return keep_good(state, new, doubts), report_of(numbers, events, **known)

    def _damping(self, state: KFACState, typical: Callable[[], Scalar], k: int) -> Scalar:
        """λ of step k."""
        damping = state.damping
        if damping is None:
            damping = self.damping.start(typical)
        damping = self.damping.at(k, damping)
        _require_damping(self.damping, "at", k, damping)
        return damping

    def _reduction(
        self, change: Scalar, decrease: Scalar, damping: Scalar, typical: Callable[[], Scalar]
    ) -> tuple[Scalar, Scalar]:
        """ρ of a change of h where the model has `decrease`, and λ of the next step."""
        gains = decrease != 0.0  # where there is nothing to gain, 0/0 says nothing about λ
        rho = select(gains, change / select(gains, decrease, 1.0), math.nan)
        return rho, select(gains, self.damping.update(damping, rho, typical), damping)

    def _update_moments(
        self, e: Evaluation, old: dict[str, Moments], k: int, doubts: Doubts
    ) -> tuple[dict[str, Moments], list[tuple[Truth, LadderEvent]]]:
        """Statistics of part of the mini-batch, put into the moving averages."""
        if old and not self.statistics.due(k):
            return old, []
        fraction = value_at(self.statistics_fraction, k)
        require_fraction(f"KFAC statistics_fraction in step {k}", fraction)
        part = _part(e, fraction, doubts)
        rng = Rng(self.seed).child("targets", k)
        new = self.curvature.estimate(part, self.fisher, rng, old or None)
        events = []
        for path, m in new.items():
            good = are_finite(*m.values())
            if old:
                event = LadderEvent(path, ", ".join(m), "moments rejected", 0.0)
                events.append((negation(good), event))
                new[path] = trees.select(good, m, old[path])
            else:
                doubts.require(good, partial(_no_moments, k, path, ", ".join(m)))
        if not old:
            return new, events
        epsilon = self.moving_average.epsilon(self.statistics.count(k))
        return self.curvature.mix(old, new, epsilon), events

    def _trials(
        self,
        state: KFACState,
        moments: dict[str, Moments],
        h: Regularized,
        scale: Scale,
        damping: Scalar,
        k: int,
        doubts: Doubts,
    ) -> Iterator[_Trial]:
        """A proposal for each candidate γ, with the factors it came from, when it is asked for."""

        def propose(factors: dict[str, Factors]) -> Tree:
            if h.statistics is None:
                solved = self.curvature.solve(factors, h.gradient)
            else:
                solved = self.curvature.solve_mean(factors, h.statistics, scale, h.gradient)
            proposal = trees.scale(-1.0, solved)
            return proposal if balance is None else balance.apply(state.multipliers, proposal)

        balance = self._balance
        everything = state.factors is None or self.gamma.searches(k)
        due = tuple(moments) if everything else self.refresh.share(k, tuple(moments))
        if state.factors is not None and state.gamma is not None and not due:
            yield _Trial(state.gamma, state.factors, propose(state.factors), (), [])
            return
        doubts.settle()  # factorising decides on the host, and waits for the device
        part = {path: moments[path] for path in due}
        candidates = self.gamma.candidates(k, state.gamma, float(damping) + self.l2)
        _require_candidates(candidates, k)
        none_finite = True
        for gamma in candidates:
            new, events = self.curvature.factorise(part, gamma**2, state.factors)
            factors = {**(state.factors or {}), **new}
            proposal = propose(factors)
            if all_finite(*trees.leaves(proposal)):
                none_finite = False
                yield _Trial(gamma, factors, proposal, due, events)
        if none_finite:
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

    def _typical_eigenvalue(self, moments: dict[str, Moments], params: Tree) -> Scalar:
        """Π_i (tr F̂_i / n_i)^(n_i / n), n = Σ_i n_i, over the layers' blocks of n_i parameters.

        Layers without curvature do not count; a thousandth of tr F̂ / n at least; 0 where nothing
        is left.
        """
        sizes = {path: math.prod(p.shape) for path, p in trees.items(params)}
        blocks = self.curvature.block_traces(moments, params)
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
        return select(trace > 0.0, select(typical > least, typical, least), 0.0)

    def _curvature_norm(self, moments: dict[str, Moments], v: Tree) -> Scalar:
        """vᵀ F̂ v."""
        return scalar(trees.inner(v, self.curvature.matrix(moments, v).matvec(v)))


@final
@dataclass(frozen=True, eq=False)
class _Trial:
    gamma: float
    factors: dict[str, Factors]
    proposal: Tree
    refreshed: tuple[str, ...]
    events: list[LadderEvent]


def _require_damping(policy: DampingPolicy, method: str, k: int, damping: Scalar) -> None:
    """Raise `ConfigError` unless a policy gave a number >= 0, as far as the host can tell."""
    if not works_ahead(damping):  # type: ignore[arg-type]
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


def _part(e: Evaluation, fraction: float, doubts: Doubts, least: int = 1) -> Evaluation:
    """The first examples of a mini-batch, of which some must count."""
    examples = e.scale.examples
    part = e.take(max(math.ceil(fraction * examples), min(least, examples)))
    w = part.scale.weights
    if w is not None:
        doubts.require(
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
