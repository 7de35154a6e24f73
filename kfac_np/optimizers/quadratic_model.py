"""The quadratic model of h around θ, and the step that minimises it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

from kfac_np import trees
from kfac_np.backend import Array, Rng, Scalar, array_namespace, scalar, select
from kfac_np.curvature.base import Units
from kfac_np.fisher import FisherType
from kfac_np.objective import Evaluation
from kfac_np.optimizers.step_rules import Choice, StepRule
from kfac_np.penalties import Penalty
from kfac_np.products import block_forms, tangent_forms
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_flag, require_fraction, require_integer

__all__ = ["LocalModel", "QuadraticModel", "in_units"]


@final
@dataclass(frozen=True, eq=False)
class LocalModel:
    """M(δ) = ½ δᵀ (F + λ diag(u)⁻² + H) δ + ∇hᵀ δ + h, with the exact Fisher F.

    Attributes
    ----------
    evaluation : Evaluation
        The examples that F is formed on.
    gradient : tree of Array
        ∇h.
    damping : Scalar
        λ.
    penalty : Penalty or None
        R, with H = ∇²R.
    units : dict
        Path of a parameter to its units u; 1 where there are none.
    bound : Scalar or None
        The most that h can decrease, where that is known.
    previous : tree or None
        δ₀, the update of the step before; None where there is no momentum.
    few : bool
        Whether the examples are too few to tell which momentum is best.
    kept : dict or None
        α and μ of an earlier model, where they still hold.

    References
    ----------
    Martens & Grosse 2015, §6.4 and §7; appendix C for F without backward passes.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.ones((1, 1)), np.zeros((1, 1)))
    >>> float(LocalModel(e, e.gradient(), damping=np.float64(1.0)).decrease(np.asarray([[-1.0]])))
    -1.0
    """

    evaluation: Evaluation
    gradient: Tree
    damping: Scalar
    bound: Scalar | None = None
    previous: Tree | None = None
    few: bool = False
    penalty: Penalty | None = None
    units: Mapping[str, Units] = field(default_factory=dict)
    kept: Mapping[str, Scalar] | None = None

    def forms(self, vectors: Sequence[Tree]) -> tuple[list[list[Scalar]], list[Scalar]]:
        """Matrix of v_iᵀ (F + λ diag(u)⁻² + H) v_j, and vector of ∇hᵀ v_i."""
        tangents = [
            self._previous_tangent if v is self.previous else self.evaluation.jvp(v)
            for v in vectors
        ]
        fisher = tangent_forms(self.evaluation, tangents)
        relative = [in_units(v, self.units, -1.0) for v in vectors]
        quadratic: list[list[Scalar]] = [[] for _ in vectors]
        for i in range(len(vectors)):
            for j in range(i + 1):
                form = scalar(fisher[i, j])
                if i == j:  # F is positive semidefinite: what is below 0 is rounding
                    form = select(form > 0.0, form, 0.0)
                form = form + self.damping * scalar(trees.inner(relative[i], relative[j]))
                if self.penalty is not None:
                    form = form + self.penalty.form(vectors[i], vectors[j])
                quadratic[i].append(form)
                if j < i:
                    quadratic[j].append(form)
        return quadratic, [scalar(trees.inner(v, self.gradient)) for v in vectors]

    @cached_property
    def _previous_tangent(self) -> Array:
        """J δ₀, which goes with every proposal."""
        return self.evaluation.jvp(self.previous)

    def decrease(self, update: Tree) -> Scalar:
        """M(δ) - M(0) for one update."""
        quadratic, linear = self.forms([update])
        return 0.5 * quadratic[0][0] + linear[0]

    @property
    def gradient_damping(self) -> Scalar:
        """λ with which a step along u² ∘ ∇h alone promises half of `bound`: ‖u ∘ ∇h‖² / bound."""
        assert self.bound is not None
        square = scalar(trees.squared_norm(in_units(self.gradient, self.units)))
        positive = self.bound > 0.0
        return select(positive, square / select(positive, self.bound, 1.0), 0.0)

    def of_each_layer(
        self, v: Tree, fisher: FisherType, rng: Rng
    ) -> dict[str, tuple[Scalar, Scalar]]:
        """v_iᵀ (F_ii + λ diag(u_i)⁻² + H_ii) v_i and ∇h_iᵀ v_i of each parameter, by its path.

        The block F_ii is formed from the vectors of `fisher`: unbiased for `MonteCarlo`, exact for
        `Exact`.
        """
        forms = block_forms(self.evaluation, v, fisher, rng)
        gradients = dict(trees.items(self.gradient))
        found = {}
        relative = dict(trees.items(in_units(v, self.units, -1.0)))
        for path, own in trees.items(v):
            form = forms[path] + self.damping * scalar(trees.squared_norm(relative[path]))
            if self.penalty is not None:
                form = form + self.penalty.block_form(path, v)
            found[path] = (form, scalar(trees.inner(gradients[path], own)))
        return found


@final
@dataclass(frozen=True)
class QuadraticModel(StepRule):
    """(α, μ) minimise the quadratic model with the exact Fisher.

    Solves the 2×2 system [Δᵀ B Δ, Δᵀ B δ₀; ·, δ₀ᵀ B δ₀] (α, μ)ᵀ = -(∇hᵀΔ, ∇hᵀδ₀) with
    B = F + λ diag(u)⁻² + ∇²R. Where Δ and δ₀ are parallel to rounding error, μ = 0.

    Of few examples, from batches that differ, such a μ would be noise (`least_examples`), and
    μ = 1/2 is given; α minimises the model with it. Where that leads uphill, μ = 0.

    Once a network fits its training data F vanishes, and the model promises more than there is:
    a loss below zero. With `bounded` the update is shortened until the model promises no more than
    to reach the loss's lower bound. Without it such steps, and adaptive λ that follows them down,
    can throw the parameters far off.

    Parameters
    ----------
    fraction : float
        τ₂.
    least_examples : int
        A quarter of a small batch tells too little of F: it is 0 along more directions, and the
        steps are too long. So it is so many examples at least, or all. Of fewer μ is given, and
        with fewer than half of that number it is 0. The paper's batches have thousands, and no
        such number (1).
    bounded : bool
        The paper has no such bound.
    momentum : bool
        Without it μ = 0, and α alone minimises the model (§6.4).
    interval : int
        α and μ are kept for so many steps at most. Steps that renew factors, search γ or measure ρ,
        and those after an update was taken back, make a model anyway, and a new choice. A model
        takes one and a half forward passes for each of Δ and δ₀; the paper makes one in every step.

    References
    ----------
    Martens & Grosse 2015, §6.4 and §7.

    Examples
    --------
    >>> QuadraticModel().fraction
    0.25
    """

    fraction: float = 1 / 4
    bounded: bool = True
    momentum: bool = True
    least_examples: int = 256
    interval: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        require_fraction("QuadraticModel fraction", self.fraction)
        require_integer("QuadraticModel least_examples", self.least_examples)
        require_flag("QuadraticModel bounded", self.bounded)
        require_flag("QuadraticModel momentum", self.momentum)
        require_integer("QuadraticModel interval", self.interval)

    @property
    def compares(self) -> bool:
        return True

    def choose(
        self,
        k: int,
        model: LocalModel,
        proposal: Tree,
        curvature_norm: Callable[[Tree], Scalar],
    ) -> Choice:
        if model.kept is not None:
            return Choice(model.kept["alpha"], model.kept["mu"], None)
        previous = model.previous if self.momentum else None
        quadratic, linear = model.forms([proposal] if previous is None else [proposal, previous])
        b, c = quadratic[0][0], linear[0]
        mu: Scalar | float
        if previous is None:
            alpha, mu = _minimum(b, c), 0.0
            decrease = 0.5 * (alpha * c)
            slope = alpha * c
        else:
            cross, b0 = quadratic[1]
            if model.few:
                alpha, mu, decrease = _with_momentum(_MOMENTUM, b, cross, b0, c, linear[1])
                slope = alpha * c + mu * linear[1]
            else:
                info = array_namespace(c).finfo(model.evaluation.outputs.dtype)
                alpha, mu = _minimum_of_two(b, cross, b0, c, linear[1], 10.0 * float(info.eps))
                slope = alpha * c + select(abs(mu) > 0.0, mu * linear[1], 0.0)
                decrease = 0.5 * slope
        decrease = select(array_namespace(c).isfinite(b + c), decrease, math.inf)
        choice = Choice(alpha, mu, decrease)
        if self.bounded and model.bound is not None:
            return _within(model.bound, choice, slope)
        return choice


_MOMENTUM = 0.5  # that few examples are given: docs/results.md, "Small batches"


def _within(bound: Scalar, choice: Choice, slope: Scalar) -> Choice:
    """Shorten an update, along which h has this slope, until it promises `bound` at most."""
    assert choice.decrease is not None
    bound = select(bound > 0.0, bound, 0.0)
    too_much = -choice.decrease > bound
    # M(sδ) - M(0) = s ∇hᵀδ + s² (M(δ) - M(0) - ∇hᵀδ) = -bound, in multiples of -∇hᵀδ > 0
    part = select(too_much, bound, 0.0) / select(too_much, -slope, 1.0)
    bend = select(too_much, choice.decrease - slope, 0.0) / select(too_much, -slope, 1.0)
    square = 1.0 - 4.0 * bend * part
    root = array_namespace(part).sqrt(select(square > 0.0, square, 0.0))
    s = select(too_much, 2.0 * part / (1.0 + root), 1.0)
    decrease = select(too_much, -bound, choice.decrease)
    return Choice(s * choice.alpha, s * choice.mu, decrease)


def _minimum(b: Scalar, c: Scalar) -> Scalar:
    """Where ½ b x² + c x is least; 0 unless b > 0."""
    return select(b > 0.0, -c / select(b > 0.0, b, 1.0), 0.0)


def _with_momentum(
    mu: float, b: Scalar, cross: Scalar, b0: Scalar, c: Scalar, c0: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """(α, μ) and ½ xᵀBx + cᵀx, α the best for this μ; for 0 if that is uphill, or δ₀ is 0."""
    alpha, alone = _minimum(b, c + mu * cross), _minimum(b, c)
    value = 0.5 * alpha * (c + mu * cross) + mu * (0.5 * mu * b0 + c0)
    useful = (value < 0.0) & (b0 > 0.0)
    return (
        select(useful, alpha, alone),
        select(useful, mu, 0.0),
        select(useful, value, 0.5 * (alone * c)),
    )


def _minimum_of_two(
    b: Scalar, cross: Scalar, b0: Scalar, c: Scalar, c0: Scalar, rounding: float
) -> tuple[Scalar, Scalar]:
    """Where ½ xᵀBx + cᵀx is least, B = [b, cross; cross, b0]; in x₁ alone where B is singular."""
    determinant = b * b0 - cross * cross
    regular = determinant > rounding * b * b0
    divisor = select(regular, determinant, 1.0)
    return (
        select(regular, (cross * c0 - b0 * c) / divisor, _minimum(b, c)),
        select(regular, (cross * c - b * c0) / divisor, 0.0),
    )


def in_units(v: Tree, units: Mapping[str, Units], power: float = 1.0) -> Tree:
    """u^power ∘ v, for each parameter that has units.

    Examples
    --------
    >>> import numpy as np
    >>> in_units((np.ones((2, 2)),), {"0": (np.asarray([[2.0], [4.0]]), np.asarray([[0.5, 1.0]]))})
    (array([[1., 2.],
           [2., 4.]]),)
    """
    if not units:
        return v

    def leaf(path: str, x: Array) -> Array:
        for u in units.get(path, ()):
            x = x * u**power
        return x

    return trees.map_named(leaf, v)
