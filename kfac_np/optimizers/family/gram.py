"""Natural gradient in the space of examples: a matrix of N x N, however many the parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, DeferredChecks, Patches, Rng, Scalar, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.fisher import Empirical, FisherType
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers.averaging import IterateAverage
from kfac_np.optimizers.base import (
    Optimizer,
    Regularized,
    State,
    apply_update,
    check_params,
    keep_good,
)
from kfac_np.optimizers.reports import StepReport
from kfac_np.optimizers.schedules import Schedule, require_rate, value_at
from kfac_np.penalties import Penalty, penalized
from kfac_np.statistics import AffineStatistics, Statistics, term_gradients
from kfac_np.trees import Tree
from kfac_np.validation import (
    plain_fields,
    require_in,
    require_instance,
    require_integer,
    require_positive,
)

__all__ = ["GramDescent", "GramState", "gram_matrix", "natural_direction", "spring_direction"]


def gram_matrix(statistics: Tree, e: Evaluation) -> Array:
    """⟨u_r, u_s⟩ of the derivatives u of R = K N rows, over all parameters; not divided.

    Of an affine layer with T = 1 it is (ā āᵀ) ∘ (g gᵀ): no derivative of an example is formed. With
    more locations these products are summed over both examples' locations, or, where that is more
    memory, the derivatives of that one layer are formed; so are those of other parameters.

    Parameters
    ----------
    statistics : tree of Statistics
        Of K vectors, (K, N, ...).
    e : Evaluation

    Returns
    -------
    Array, shape (K · N, K · N)

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.ones((1, 1)), np.asarray([[1.0], [3.0]]), np.zeros((2, 1)))
    >>> gram_matrix(e.backward(np.ones((1, 2, 1))), e)
    array([[1., 3.],
           [3., 9.]])
    """
    total: Array | None = None
    for s in trees.leaves(statistics):
        part = _located(s) if _prefers_locations(s) else _formed(s, e)
        total = part if total is None else total + part
    if total is None:
        raise ShapeError("gram_matrix: expected statistics of at least one parameter, got none")
    return total


def _prefers_locations(s: Statistics) -> bool:
    if not isinstance(s, AffineStatistics) or isinstance(s.inputs, Patches):
        return False
    rows = s.num_vectors * s.num_examples
    return s.num_locations == 1 or rows * s.num_locations**2 <= math.prod(s.parameter_shape)


def _formed(s: Statistics, e: Evaluation) -> Array:
    u = term_gradients(s, e.scale)
    return u @ u.T


def _located(s: AffineStatistics) -> Array:
    xp, n, t = array_namespace(s.g), s.num_examples, s.num_locations
    a = xp.reshape(s.a, (n * t, -1))
    g = xp.reshape(s.g, (-1, s.g.shape[-1]))
    k = g.shape[0] // (n * t)
    products = xp.reshape(g @ g.T, (k, n * t, k, n * t)) * (a @ a.T)[None, :, None, :]
    return xp.reshape(
        xp.sum(xp.reshape(products, (k * n, t, k * n, t)), axis=(1, 3)), (k * n, k * n)
    )


def natural_direction(
    e: Evaluation,
    vectors: Array,
    gradient: Tree,
    damping: float,
    previous: Tree | None = None,
    momentum: float = 0.0,
) -> Tree:
    """φ = μ φ' + (F + λ I)⁻¹ (∇ - μ F φ'), F = (1/M) Σ J_nᵀ v_nk v_nkᵀ J_n.

    By Woodbury's identity, with B the R x P matrix of the rows J_nᵀ v_nk / √M, which is applied by
    `Evaluation.jvp` and `Evaluation.backward`: (F + λ I)⁻¹ q = (q - Bᵀ (B Bᵀ + λ I)⁻¹ B q) / λ.
    φ is the minimum of ‖B φ - y‖² + λ ‖φ - μ φ'‖² where ∇ = Bᵀ y.

    Parameters
    ----------
    e : Evaluation
    vectors : Array, shape (K, N, [S,] C)
    gradient : tree of Array
    damping : float
        λ.
    previous : tree of Array, optional
        φ', of the step before.
    momentum : float
        μ.

    Returns
    -------
    tree of Array

    Raises
    ------
    InputError
        Examples are coupled by batch statistics.

    References
    ----------
    Ren & Goldfarb 2019, arXiv:1906.02353, eq. 13; Goldshlager, Abrahamsen & Lin 2024,
    arXiv:2401.10190, eq. 34 (momentum).

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.ones((1, 1)), np.ones((2, 1)), np.zeros((2, 1)))
    >>> natural_direction(e, np.ones((1, 2, 1)), e.gradient(), 0.25)
    array([[0.8]])
    """
    if e.scale.coupled:
        raise InputError(
            "gram: expected examples that do not influence each other, got a network with batch "
            "statistics; use another optimiser"
        )
    xp, z = array_namespace(vectors), e.outputs
    k, n = vectors.shape[:2]
    root = math.sqrt(e.scale.terms)
    within = tuple(range(2, vectors.ndim))

    def rows(v: Tree) -> Array:  # B v
        return xp.reshape(xp.sum(vectors * e.jvp(v)[None, ...], axis=within), (k * n,)) / root

    def columns(y: Array) -> Tree:  # Bᵀ y
        weights = xp.reshape(y, (k, n, *(1,) * (z.ndim - 1)))
        s = e.backward(xp.sum(weights * vectors, axis=0))
        return trees.tree_map(lambda part: part.gradient() / root, s)

    carried = previous is not None and momentum > 0.0
    q = gradient
    if carried:
        q = trees.combine(1.0, gradient, -momentum, columns(rows(previous)))
    gram = gram_matrix(e.backward(vectors), e) / e.scale.terms
    gram = gram + damping * Backend.of(gram).eye(k * n)
    y = xp.linalg.solve(gram, rows(q)[:, None])[:, 0]
    d = trees.combine(1.0 / damping, q, -1.0 / damping, columns(y))
    return trees.combine(1.0, d, momentum, previous) if carried else d


def spring_direction(
    derivatives: Array,
    values: Array,
    damping: float,
    previous: Array | None = None,
    momentum: float = 0.0,
    projection: float = 0.0,
) -> Array:
    """Stochastic reconfiguration of a wave function: minSR, and with momentum SPRING.

    φ = Xᵀ (X Xᵀ + λ I + (κ/N) 1 1ᵀ)⁻¹ (v - μ X φ') + μ φ' with X = (O - Ō)/√N, v = 2 (e - ē)/√N.

    Parameters
    ----------
    derivatives : Array, shape (N, P)
        O, of the logarithm of the wave function at N samples.
    values : Array, shape (N,)
        e, the local energies.
    damping : float
        λ.
    previous : Array, shape (P,), optional
        φ'.
    momentum : float
        μ.
    projection : float
        κ, which keeps the singular direction 1 of X Xᵀ out of the way.

    Returns
    -------
    Array, shape (P,)

    References
    ----------
    Chen & Heyl 2023, arXiv:2302.01941 (minSR); Goldshlager, Abrahamsen & Lin 2024,
    arXiv:2401.10190, algorithm 1 (SPRING).

    Examples
    --------
    >>> import numpy as np
    >>> spring_direction(np.asarray([[1.0], [-1.0]]), np.asarray([3.0, -3.0]), 1.0)
    array([3.])
    """
    xp, n = array_namespace(derivatives), derivatives.shape[0]
    x = (derivatives - xp.mean(derivatives, axis=0)[None, :]) / math.sqrt(n)
    v = 2.0 * (values - xp.mean(values)) / math.sqrt(n)
    if previous is not None:
        v = v - momentum * (x @ previous)
    gram = x @ x.T + damping * Backend.of(x).eye(n) + projection / n
    phi = xp.linalg.solve(gram, v[:, None])[:, 0] @ x
    return phi if previous is None else phi + momentum * previous


@final
@dataclass(frozen=True, eq=False)
class GramState(State):
    """State of `GramDescent`: besides the parameters the direction before.

    Examples
    --------
    >>> GramState(params=(), average=None, step=0, direction=None).step
    0
    """

    like_params: ClassVar[tuple[str, ...]] = ("params", "average", "direction")

    direction: Tree | None


@final
@dataclass(frozen=True)
class GramDescent(Optimizer):
    """θ ← θ - α φ, φ = μ φ' + (F + (λ + η) I)⁻¹ (∇h - μ F φ'): the undivided natural gradient.

    All parameters together, no block is left out, by a system of as many equations as F has rows:
    N for the empirical Fisher, N C for the exact one, which small networks can afford.

    Parameters
    ----------
    objective : Objective
    fisher : FisherType
    rate : float or Schedule
        α.
    damping : float or Schedule
        λ.
    momentum : float
        μ, in [0, 1): SPRING's, which the next batch's examples correct.
    l2 : float
        η: h = loss + (η/2)‖θ‖².
    averaging : IterateAverage, optional
    seed : int
        Of sampled targets, and of what layers draw in training (Dropout).
    penalty : Penalty, optional
        R: h = loss + (η/2)‖θ‖² + R(θ), of `kfac_np.penalties`.

    References
    ----------
    Ren & Goldfarb 2019, arXiv:1906.02353; Goldshlager, Abrahamsen & Lin 2024, arXiv:2401.10190.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.fisher import Exact
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> gram = GramDescent(
    ...     Objective(Dense(1, 1, bias=False), SquaredError()), Exact(), rate=1.0, damping=1e-9,
    ...     momentum=0.0)
    >>> state = gram.init(np.asarray([[2.0]]))
    >>> gram.step(state, np.ones((4, 1)), np.zeros((4, 1)))[0].params.round(6)
    array([[0.]])
    """

    state_type: ClassVar[type[State]] = GramState

    fisher: FisherType = Empirical()
    rate: float | Schedule = 0.3
    damping: float | Schedule = 0.1
    momentum: float = 0.9
    l2: float = 0.0
    averaging: IterateAverage | None = None
    seed: int = 0
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        require_instance("GramDescent objective", self.objective, Objective)
        require_instance("GramDescent fisher", self.fisher, FisherType)
        require_instance("GramDescent averaging", self.averaging, IterateAverage, optional=True)
        require_rate("GramDescent rate", self.rate)
        require_rate("GramDescent damping", self.damping)
        require_in("GramDescent momentum", self.momentum, "[0, 1)")
        require_positive("GramDescent l2", self.l2, zero=True)
        require_instance("GramDescent penalty", self.penalty, Penalty, optional=True)
        require_integer("GramDescent seed", self.seed, zero=True)

    def init(self, params: Tree) -> GramState:
        check_params(params, self.penalty)
        direction = trees.zeros_like(params) if self.momentum else None
        return GramState(params, params if self.averaging else None, 0, direction)

    def step(
        self, state: GramState, x: Array, t: Array, weights: Array | None = None
    ) -> tuple[GramState, StepReport]:
        self.check_state(state)
        k, stream = state.step + 1, Rng(self.seed)
        checks = DeferredChecks()
        e = self.objective.evaluate(state.params, x, t, weights, stream.child("forward", k), checks)
        h = Regularized.of(e, penalized(self.l2, self.penalty))
        h.require_finite(k, checks)
        vectors = list(self.fisher.vectors(e, stream.child("targets", k)))
        damping = value_at(self.damping, k)
        phi = natural_direction(
            e,
            vectors[0] if len(vectors) == 1 else array_namespace(x).concat(vectors),
            h.gradient,
            damping + self.l2,
            state.direction,
            self.momentum,
        )
        phi = phi if self.penalty is None else self.penalty.project(phi)
        rate = value_at(self.rate, k)
        params, norm = apply_update(state.params, trees.scale(-rate, phi), k, checks)
        average = self.averaging.update(state.average, params, k) if self.averaging else None
        numbers: dict[str, Scalar | float | None] = {
            **h.numbers,
            "update_norm": norm,
            "alpha": rate,
            "mu": self.momentum,
            "damping": damping,
        }
        report = StepReport(k, x.shape[0], numbers)
        new = GramState(params, average, k, phi if self.momentum else None)
        return keep_good(state, new, checks), report
