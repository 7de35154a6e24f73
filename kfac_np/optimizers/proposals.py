"""Proposals Δ = -F̂(γ)⁻¹ ∇h, one for each γ that is tried, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

from kfac_np import trees
from kfac_np.backend import DeferredChecks, Scalar, all_finite
from kfac_np.curvature import Curvature, Factors, LadderEvent, Moments
from kfac_np.curvature.base import Units
from kfac_np.errors import ConfigError, DivergenceError
from kfac_np.optimizers.base import Regularized
from kfac_np.optimizers.gamma import GammaPolicy
from kfac_np.optimizers.kfac_state import KFACState
from kfac_np.optimizers.quadratic_model import in_units
from kfac_np.optimizers.step_rules import Choice, StepRule
from kfac_np.statistics import Scale
from kfac_np.trees import Tree
from kfac_np.validation import require_positive

__all__ = ["Proposal", "best", "proposals", "solved"]


@final
@dataclass(frozen=True, eq=False)
class Proposal:
    """Δ, and the factors that it came from.

    Attributes
    ----------
    delta : tree of Array
    gamma : float
    gamma_ratio : float or None
        γ / √(λ + η), where γ was chosen.
    factors : dict
        Of every layer.
    refreshed : tuple of str
        The layers of which they are new.
    events : list of LadderEvent
    """

    delta: Tree
    gamma: float
    gamma_ratio: float | None
    factors: dict[str, Factors]
    refreshed: tuple[str, ...] = ()
    events: tuple[LadderEvent, ...] = ()


def solved(
    curvature: Curvature,
    factors: dict[str, Factors],
    h: Regularized,
    scale: Scale,
    units: Mapping[str, Units],
) -> Tree:
    """-F̂(γ)⁻¹ ∇h, damped in the layers' units."""
    if units:
        inner = curvature.solve(factors, in_units(h.gradient, units))
        inner = in_units(inner, units)
    elif h.statistics is None:
        inner = curvature.solve(factors, h.gradient)
    else:
        inner = curvature.solve_mean(factors, h.statistics, scale, h.gradient)
    return trees.scale(-1.0, inner)


def proposals(
    curvature: Curvature,
    policy: GammaPolicy,
    state: KFACState,
    moments: dict[str, Moments],
    damping: Scalar,
    solve: Callable[[dict[str, Factors]], Tree],
    checks: DeferredChecks,
    *,
    finite: bool,
) -> Iterator[Proposal]:
    """A proposal for each candidate γ, made when it is asked for.

    Parameters
    ----------
    curvature : Curvature
    policy : GammaPolicy
    state : KFACState
    moments : dict
        Of the layers whose factors are renewed, in their units; with none, the last factors are
        used.
    damping : Scalar
        λ + η.
    solve : callable
        Factors of all layers to Δ.
    checks : DeferredChecks
        Waited for: factorising decides on the host.
    finite : bool
        Whether one of them has to be finite. If not, the last is given where none is.

    Raises
    ------
    DivergenceError
        None is finite, and one has to be.
    """
    if not moments:
        assert state.factors is not None
        assert state.gamma is not None
        delta = solve(state.factors)
        yield Proposal(delta, state.gamma, state.gamma_ratio, state.factors)
        return
    checks.wait()
    k, damping_now = state.step + 1, float(damping)
    root, current = math.sqrt(damping_now), state.gamma
    if policy.relative and state.gamma_ratio is not None:
        current = state.gamma_ratio * root
    candidates = policy.candidates(k, current, damping_now)
    _require_candidates(candidates, k)
    found, last = False, None
    for gamma in candidates:
        new, events = curvature.factorise(moments, gamma**2, state.factors)
        factors = {**(state.factors or {}), **new}
        ratio = gamma / root if root else None
        last = Proposal(solve(factors), gamma, ratio, factors, tuple(moments), tuple(events))
        if all_finite(*trees.leaves(last.delta)):
            found = True
            yield last
    if not found and finite:
        raise DivergenceError(
            f"step {k}: no proposal is finite for gamma in {list(candidates)}; the parameters "
            "are unchanged. Use more damping"
        )
    if not found and last is not None:
        yield last


def best(
    trials: Iterator[Proposal],
    choose: Callable[[Tree], Choice],
    policy: GammaPolicy,
    rule: StepRule,
) -> tuple[Proposal, Choice]:
    """The proposal of which the model promises most; the first that beats the first, if that."""
    found = next(trials)
    choice = choose(found.delta)
    for trial in trials:
        other = choose(trial.delta)
        if choice.decrease is None or other.decrease is None:
            raise ConfigError(
                f"KFAC gamma: several candidates from {type(policy).__name__} expected a step rule "
                f"that evaluates the quadratic model (QuadraticModel), got {type(rule).__name__}"
            )
        if other.decrease < choice.decrease:  # the host decides, and waits for the device
            found, choice = trial, other
            if not policy.thorough:
                break
    return found, choice


def _require_candidates(candidates: object, k: int) -> None:
    """Raise `ConfigError` unless a policy gave some numbers >= 0."""
    if not isinstance(candidates, tuple | list) or not candidates:
        raise ConfigError(
            f"KFAC gamma: expected a tuple of candidates in step {k}, got {candidates!r}"
        )
    for gamma in candidates:
        require_positive(f"KFAC gamma: a candidate in step {k}", gamma, zero=True)
        if math.isinf(float(gamma) * float(gamma)):
            raise ConfigError(
                f"KFAC gamma: a candidate in step {k}: expected a number whose square is finite, "
                f"got {gamma!r}"
            )
