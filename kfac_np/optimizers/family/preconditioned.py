"""The optimiser around a preconditioner: what all methods have in common, written once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, final

from kfac_np import trees
from kfac_np.backend import Array, DeferredChecks, Rng, Scalar, array_namespace, scalar, select
from kfac_np.errors import ConfigError, FactorizationError
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers.averaging import IterateAverage
from kfac_np.optimizers.base import (
    Optimizer,
    Regularized,
    State,
    apply_update,
    check_params,
    keep_good,
    norm_of,
)
from kfac_np.optimizers.family.base import Observation, Preconditioner, Slots
from kfac_np.optimizers.family.elementwise import AdamScaling
from kfac_np.optimizers.reports import StepReport
from kfac_np.optimizers.schedules import Schedule, require_rate, value_at
from kfac_np.penalties import Penalty, penalized
from kfac_np.statistics import GroupedStatistics, Scale, Statistics
from kfac_np.trees import Tree
from kfac_np.validation import (
    plain_fields,
    require_flag,
    require_in,
    require_instance,
    require_integer,
    require_positive,
)

__all__ = ["Preconditioned", "PreconditionedState"]


@final
@dataclass(frozen=True, eq=False)
class PreconditionedState(State):
    """State of `Preconditioned`.

    Attributes
    ----------
    slots : dict of path to Slots
        What the preconditioners remember; empty before the first step, which sees what kind of
        parameter each is.
    velocity : tree of Array or None
        The momentum, if there is any.

    Examples
    --------
    >>> PreconditionedState(params=(), average=None, step=0, slots={}, velocity=None).step
    0
    """

    like_params: ClassVar[tuple[str, ...]] = ("params", "average", "velocity")

    slots: dict[str, Slots]
    velocity: Tree | None


@final
@dataclass(frozen=True)
class Preconditioned(Optimizer):
    """v ← μ v + D + ω θ, θ ← θ - α v: D is what a preconditioner makes of the gradient.

    Without momentum that is θ ← (1 - α ω) θ - α D, decoupled weight decay. In a step, in this
    order: the gradient is clipped, D computed for each parameter, grafted, all of it clipped; then
    come weight decay and momentum.

    Matrices are those of affine layers, [W | b] with the bias as last column, which is
    preconditioned and decays with the rest; of grouped ones, each group's. Other parameters (scales
    and shifts, and what a preconditioner says that it does not support) have the `fallback`.

    Parameters
    ----------
    objective : Objective
    preconditioner : Preconditioner
    rate : float or Schedule
        α, also for what has the fallback.
    momentum : float
        μ, in [0, 1), of the directions. Most preconditioners have one of their own, of gradients.
    nesterov : bool
        Move by -α (D + ω θ + μ v) instead.
    weight_decay : float
        ω.
    undecayed : tuple of str
        Paths of parameters without it.
    graft : Preconditioner, optional
        Its direction has the length that D is given, for each matrix: ‖D_graft‖ / ‖D‖ · D. For
        what `preconditioner` moves.
    fallback : Preconditioner
    overrides : mapping of path to Preconditioner, optional
        Instead of `preconditioner` or the fallback.
    clip : float, optional
        Largest norm of the gradient of all parameters; a longer one is scaled down to it.
    kl_clip : float, optional
        κ: D is scaled by min(1, √(κ / (α² Σ ⟨D, ∇⟩))).
    l2 : float
        η: h = loss + (η/2)‖θ‖², in the gradient.
    averaging : IterateAverage, optional
    seed : int
        Of what layers draw in training (Dropout).
    penalty : Penalty, optional
        R: h = loss + (η/2)‖θ‖² + R(θ), of `kfac_np.penalties`.

    References
    ----------
    Loshchilov & Hutter 2019, arXiv:1711.05101 (decoupled weight decay); Agarwal et al. 2020,
    arXiv:2002.11803 (grafting); Ba, Grosse & Martens 2017, §5 (KL clip).

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.optimizers.family import Muon
    >>> optimizer = Preconditioned(
    ...     Objective(Dense(2, 2, bias=False), SquaredError()), Muon(scale="original"), rate=0.1)
    >>> state = optimizer.init(np.eye(2))
    >>> state, report = optimizer.step(state, np.ones((1, 2)), np.zeros((1, 2)))
    >>> report.loss
    1.0
    """

    state_type: ClassVar[type[State]] = PreconditionedState

    preconditioner: Preconditioner = AdamScaling()
    rate: float | Schedule = 1e-3
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    undecayed: tuple[str, ...] = ()
    graft: Preconditioner | None = None
    fallback: Preconditioner = AdamScaling()
    overrides: Mapping[str, Preconditioner] = field(default_factory=dict)
    clip: float | None = None
    kl_clip: float | None = None
    l2: float = 0.0
    averaging: IterateAverage | None = None
    seed: int = 0
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        require = partial(require_instance, optional=True)
        require_instance("Preconditioned objective", self.objective, Objective)
        for name in ("preconditioner", "fallback"):
            require_instance(f"Preconditioned {name}", getattr(self, name), Preconditioner)
        require("Preconditioned graft", self.graft, Preconditioner)
        require("Preconditioned penalty", self.penalty, Penalty)
        require("Preconditioned averaging", self.averaging, IterateAverage)
        require_instance("Preconditioned overrides", self.overrides, Mapping)
        for path, rule in self.overrides.items():
            require_instance(f"Preconditioned overrides[{path!r}]", rule, Preconditioner)
        require_instance("Preconditioned undecayed", self.undecayed, tuple)
        require_rate("Preconditioned rate", self.rate)
        require_in("Preconditioned momentum", self.momentum, "[0, 1)")
        require_flag("Preconditioned nesterov", self.nesterov)
        for name in ("weight_decay", "l2"):
            require_positive(f"Preconditioned {name}", getattr(self, name), zero=True)
        for name in ("clip", "kl_clip"):
            if getattr(self, name) is not None:
                require_positive(f"Preconditioned {name}", getattr(self, name))
        require_integer("Preconditioned seed", self.seed, zero=True)

    def init(self, params: Tree) -> PreconditionedState:
        check_params(params, self.penalty)
        paths = [path for path, _ in trees.items(params)]
        for name, named in (("overrides", self.overrides), ("undecayed", self.undecayed)):
            if unknown := [str(path) for path in named if path not in paths]:
                raise ConfigError(
                    f"Preconditioned {name}: expected paths among {', '.join(paths)}; "
                    f"got {', '.join(unknown)}"
                )
        velocity = trees.zeros_like(params) if self.momentum else None
        return PreconditionedState(params, params if self.averaging else None, 0, {}, velocity)

    def step(
        self, state: PreconditionedState, x: Array, t: Array, weights: Array | None = None
    ) -> tuple[PreconditionedState, StepReport]:
        self.check_state(state)
        k = state.step + 1
        noise = Rng(self.seed).child("forward", k)
        checks = DeferredChecks()
        e = self.objective.evaluate(state.params, x, t, weights, noise, checks)
        h = self._regularized(e)
        h.require_finite(k, checks)
        rules = (self.preconditioner, self.fallback, *self.overrides.values())
        if any(rule.factorises(k) for rule in (*rules, self.graft) if rule is not None):
            checks.wait()  # a factorisation of NaN would be what is told of
        update, slots, velocity = self.advance(state, h.gradient, h.statistics, e.scale)
        update = update if self.penalty is None else self.penalty.project(update)
        params, norm = apply_update(state.params, update, k, checks)
        average = self.averaging.update(state.average, params, k) if self.averaging else None
        numbers: dict[str, Scalar | float | None] = {
            **h.numbers,
            "update_norm": norm,
            "alpha": value_at(self.rate, k),
            "mu": self.momentum,
        }
        report = StepReport(k, x.shape[0], numbers)
        new = PreconditionedState(params, average, k, slots, velocity)
        return keep_good(state, new, checks), report

    def _regularized(self, e: Evaluation) -> Regularized:
        """Loss and gradient, and the statistics of the loss also where there is a penalty."""
        h, penalty = Regularized.of(e, None), penalized(self.l2, self.penalty)
        if penalty is None:
            return h
        gradient = penalty.add_gradient(e.params, h.gradient)
        value = h.loss + penalty.value(e.params)
        return replace(h, value=value, gradient=gradient, gradient_norm=norm_of(gradient))

    def advance(
        self,
        state: PreconditionedState,
        gradient: Tree,
        statistics: Tree | None = None,
        scale: Scale | None = None,
    ) -> tuple[Tree, dict[str, Slots], Tree | None]:
        """What a step does once the gradient is known, wherever it comes from.

        Parameters
        ----------
        state : PreconditionedState
        gradient : tree of Array
            Of the objective, ℓ2 term included.
        statistics : tree of Statistics, optional
            Those that the loss's gradient is the first moment of. Without them vectors are arrays
            of one axis.
        scale : Scale, optional

        Returns
        -------
        update : tree of Array
        slots : dict
        velocity : tree of Array or None
            The last two are for the next state.

        Raises
        ------
        FactorizationError
            It names the parameter.
        """
        k = state.step + 1
        rate = value_at(self.rate, k)
        if self.clip is not None:
            gradient = trees.scale(_at_most(self.clip, norm_of(gradient)), gradient)
        found = dict(trees.items(statistics)) if statistics is not None else {}
        slots: dict[str, Slots] = {}

        def leaf(path: str, p: Array, g: Array) -> Array:
            seen = Observation(g, found.get(path), scale)
            try:
                d, slots[path] = self._one(path, p, seen, state.slots.get(path), k)
            except FactorizationError as error:
                raise FactorizationError(f"step {k}: parameter {path}: {error}") from error
            return d

        d = trees.map_named(leaf, state.params, gradient)
        if self.kl_clip is not None:
            change = rate**2 * scalar(trees.inner(d, gradient))
            d = trees.scale(_at_most(self.kl_clip, change) ** 0.5, d)
        if self.weight_decay:
            d = trees.map_named(self._decayed, state.params, d)
        if state.velocity is None:
            return trees.scale(-rate, d), slots, None
        velocity = trees.combine(self.momentum, state.velocity, 1.0, d)
        move = trees.combine(self.momentum, velocity, 1.0, d) if self.nesterov else velocity
        return trees.scale(-rate, move), slots, velocity

    def rule_of(self, path: str, p: Array, s: Statistics | None) -> Preconditioner:
        """Return what a parameter with such statistics is preconditioned by."""
        if path in self.overrides:
            return self.overrides[path]
        first = s.groups[0] if isinstance(s, GroupedStatistics) else s
        if p.ndim not in (2, 3) or (first is not None and not self.preconditioner.supports(first)):
            return self.fallback
        return self.preconditioner

    def _decayed(self, path: str, p: Array, d: Array) -> Array:
        return d if path in self.undecayed else trees.axpy(self.weight_decay, p, d)

    def _one(
        self, path: str, p: Array, seen: Observation, slots: Slots | None, k: int
    ) -> tuple[Array, Slots]:
        """D of a parameter: of one with groups, group by group."""
        rule = self.rule_of(path, p, seen.statistics)
        graft = self.graft if rule == self.preconditioner else None
        if p.ndim <= 2:
            return _direction(rule, graft, p, seen, slots, k)
        xp, parts, kept = array_namespace(p), [], {}
        for i in range(p.shape[0]):
            old = None if slots is None else slots[str(i)]
            group = _group(seen, i)
            d, kept[str(i)] = _direction(rule, graft, p[i, ...], group, old, k)
            parts.append(d)
        return xp.stack(parts), kept


def _direction(
    rule: Preconditioner,
    graft: Preconditioner | None,
    p: Array,
    seen: Observation,
    slots: Slots | None,
    k: int,
) -> tuple[Array, Slots]:
    """D of one vector or matrix, as long as the grafted method's."""
    if slots is None:
        slots = {"own": rule.init(p), **({"graft": graft.init(p)} if graft else {})}
    d, own = rule.direction(slots["own"], seen, k)
    if graft is None:
        return d, {"own": own}
    length, other = graft.direction(slots["graft"], seen, k)
    new = {"own": own, "graft": other}
    if not rule.ready(k):
        return length, new
    norm = norm_of(d)
    return trees.scale(norm_of(length) / select(norm > 0.0, norm, 1.0), d), new


def _group(seen: Observation, i: int) -> Observation:
    s = seen.statistics
    part = s.groups[i] if isinstance(s, GroupedStatistics) else None
    return Observation(seen.gradient[i, ...], part, seen.scale)


def _at_most(limit: float, size: Scalar) -> Scalar:
    """min(1, limit / size)."""
    above = size > limit
    return select(above, limit / select(above, size, 1.0), 1.0)
