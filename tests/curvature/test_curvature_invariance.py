"""Affine invariance: the same function learns the same, however its layers are parameterised.

A network s_i = W̄_i ā_{i-1}, a_i = φ(s_i), computes the same function as one whose layers see
transformed inputs Ω_i ā_i and make transformed outputs, s_i = Φ_i s†_i, with weights to match:
W̄_i = Φ_i W̄†_i Ω_{i-1}. Undamped K-FAC then changes both functions alike [Martens & Grosse 2015,
§10, Theorem 1]; gradient descent does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pytest
from cases import class_targets, real_targets
from curvature_cases import CURVATURES, in_units, solve_in_own_units
from numerics import assert_close, frobenius_distance, host

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.curvature import (
    Block,
    BlockDiagonal,
    Curvature,
    DiagonalBlock,
    ExactBlock,
    FullKronecker,
    KFACBlock,
    Ladder,
    plain,
)
from kfac_np.curvature.base import Units
from kfac_np.fisher import Empirical, Exact, FisherType, InputOnly, MonteCarlo
from kfac_np.layers import Dense, Layer, Sequential, Tanh
from kfac_np.losses import Loss, PoissonLogRate, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.statistics import (
    AffineStatistics,
    ElementwiseStatistics,
    EmbeddingStatistics,
    GroupedStatistics,
    Scale,
    Statistics,
)
from kfac_np.trees import Tree

HostArray = np.ndarray[Any, Any]
WIDTHS = (3, 4, 3, 2)
N, STEPS = 30, 4


@final
@dataclass(frozen=True, eq=False)
class Fixed(Layer):
    """y = M x + c on the last axis, with nothing to learn; `homogeneous` is [M c; 0 1]."""

    homogeneous: HostArray

    def _matrix(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.asarray(self.homogeneous[:-1].tolist(), dtype=x.dtype, device=x.device)

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return ()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        m = self._matrix(x)
        return x @ m[:, :-1].T + m[:, -1], ()

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        return g @ self._matrix(g)[:, :-1], ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return None if dx is None else dx @ self._matrix(dx)[:, :-1].T


def affine(n: int, seed: int, kind: str = "affine") -> HostArray:
    """An invertible affine map in homogeneous coordinates, condition number about 10.

    Of the kind "units" each coordinate is multiplied by a number of its own, 1e-3 to 1e3, and of
    "powers" by a power of two.
    """
    rng = np.random.default_rng(seed)
    m = np.eye(n + 1)
    if kind == "none":
        return m
    if kind == "units":
        m[:n, :n] = np.diag(10.0 ** rng.uniform(-3, 3, n))
        return m
    if kind == "powers":
        m[:n, :n] = np.diag(2.0 ** rng.integers(-10, 11, n))
        return m
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    m[:n, :n] = u @ np.diag(np.geomspace(0.3, 3.0, n)) @ v
    m[:n, n] = rng.standard_normal(n)
    return m


def original(*, bias: bool = True) -> tuple[Sequential, list[HostArray]]:
    """The plain network, and its weights."""
    rng = np.random.default_rng(0)
    layers: list[Layer] = []
    weights = []
    for i, o in itertools.pairwise(WIDTHS):
        layers += [Dense(i, o, bias=bias), Tanh()]
        weights.append(rng.standard_normal((o, i + bias)) / np.sqrt(i))
    return Sequential(*layers[:-1]), weights


def transformed(
    weights: list[HostArray], omega: str = "affine", phi: str = "affine"
) -> tuple[Sequential, list[HostArray]]:
    """Ω, dense, Φ, tanh, ... with weights to match: the same function."""
    layers: list[Layer] = []
    matched = []
    for i, w in enumerate(weights):
        d_out, d_in = w.shape[0], w.shape[1] - 1
        before, after = affine(d_in, 10 + i, omega), affine(d_out, 20 + i, phi)
        # s = Φ s† + c with Φ s† = w ā - c; the constant goes into the bias.
        shifted = w.copy()
        shifted[:, -1] -= after[:-1, -1]
        w_matched = np.linalg.inv(after[:-1, :-1]) @ shifted @ np.linalg.inv(before)
        layers += [Fixed(before), Dense(d_in, d_out), Fixed(after), Tanh()]
        matched.append(w_matched)
    return Sequential(*layers[:-1]), matched


Direction = Callable[[Any], Tree]
"""An evaluation -> a descent direction."""


def natural(curvature: Curvature, fisher: FisherType, damping: float = 0.0) -> Direction:
    def direction(e: Any) -> Tree:
        moments = curvature.estimate(e, fisher, Rng(5))
        factors, events = curvature.factorise(moments, damping)
        assert not events, "invariance is for invertible factors"
        return curvature.solve(factors, e.gradient())

    return direction


def in_own_units(curvature: Curvature, damping: float, *, measured: bool) -> Direction:
    """As `natural`, but damped where every parameter is a pure number."""

    def direction(e: Any) -> Tree:
        step, events = solve_in_own_units(curvature, e, e.gradient(), damping, measured=measured)
        assert not events
        return step

    return direction


def train(
    backend: Backend,
    network: tuple[Sequential, list[HostArray]],
    loss: Loss,
    direction: Direction,
    rate: float,
) -> list[HostArray]:
    """Outputs on inputs that were not trained on, after each of a few steps."""
    layers, weights = network
    rng = np.random.default_rng(3)
    x, unseen = (backend.asarray(rng.standard_normal((n, WIDTHS[0]))) for n in (N, 7))
    targets = class_targets if isinstance(loss, SoftmaxCrossEntropy) else real_targets
    t = backend.asarray(np.abs(targets(rng, (N, WIDTHS[-1]))))
    given = iter(weights)
    start = layers.init(Rng(0), backend)
    params = trees.tree_map(lambda _: backend.asarray(next(given)), start)
    objective, outputs = Objective(layers, loss), []
    for _ in range(STEPS):
        step = direction(objective.evaluate(params, x, t))
        params = trees.axpy(-rate, step, params)
        outputs.append(host(layers.forward(params, unseen)[0]))
    return outputs


def drift(
    backend: Backend,
    direction: Direction,
    *,
    loss: Loss | None = None,
    rate: float = 0.02,
    omega: str = "affine",
    phi: str = "affine",
) -> float:
    """Relative difference of two parameterisations of one function after the last step."""
    loss = loss or SquaredError()
    network, weights = original()
    first = train(backend, (network, weights), loss, direction, rate)
    second = train(backend, transformed(weights, omega, phi), loss, direction, rate)
    moved = np.max(np.abs(first[-1] - first[0]))
    assert moved > 0.001, "an optimiser that stands still is invariant to everything"
    return frobenius_distance(second[-1], first[-1])


def test_the_two_networks_are_one_function(backend: Backend):
    network, weights = original()
    still = trees.zeros_like
    first = train(backend, (network, weights), SquaredError(), lambda e: still(e.params), 1.0)
    other = train(backend, transformed(weights), SquaredError(), lambda e: still(e.params), 1.0)
    assert_close(other[0], first[0])
    assert frobenius_distance(transformed(weights)[1][0], weights[0]) > 0.5


@pytest.mark.parametrize("fisher", [Exact(), Empirical(), MonteCarlo(3)], ids=repr)
@pytest.mark.parametrize("loss", [SquaredError(), PoissonLogRate()], ids=repr)
@pytest.mark.parametrize("name", ["kfac", "kfac exactly damped", "tridiagonal"])
def test_kfac_is_invariant(backend: Backend, name: str, loss: Loss, fisher: FisherType):
    """To 1e-12: inverses of factors of condition 1e3 lose three digits of sixteen.

    All layers together have a condition of 4e7, and their inverse loses as many digits.
    """
    direction = natural(CURVATURES[name].curvature, fisher)
    tolerance = 1e-8 if name == "tridiagonal" else 1e-12
    assert drift(backend, direction, loss=loss) <= tolerance


def test_invariance_of_the_exact_blocks_and_the_full_matrix(backend: Backend):
    """What K-FAC approximates is invariant too, to what its condition leaves of the digits.

    It is 1e6 for blocks, and 1e9 for the full matrix, whose steps are long, too, for so few data.
    """
    assert drift(backend, natural(CURVATURES["exact blocks"].curvature, Exact())) <= 1e-10
    full = natural(CURVATURES["full"].curvature, Exact())
    assert drift(backend, full, rate=0.002) <= 1e-7


def test_invariance_to_transformed_inputs_alone(backend: Backend):
    """Without G (input-only) the update is invariant to Ω, and to Φ it is not."""
    direction = natural(BlockDiagonal(), InputOnly())
    assert drift(backend, direction, phi="none") <= 1e-12
    assert drift(backend, direction, omega="none") >= 0.2


def test_gradient_descent_fails_the_same_test(backend: Backend):
    for omega, phi in (("affine", "none"), ("none", "affine"), ("affine", "affine")):
        assert drift(backend, lambda e: e.gradient(), omega=omega, phi=phi) >= 0.15


@pytest.mark.parametrize(("name", "least"), [("diagonal", 0.05), ("ekfac", 0.02)])
def test_a_diagonal_fails_the_same_test(backend: Backend, name: str, least: float):
    """A diagonal, also that in K-FAC's eigenbasis, is another approximation in other units."""
    assert drift(backend, natural(CURVATURES[name].curvature, Exact())) >= least


@pytest.mark.parametrize("block", [KFACBlock(), KFACBlock(exact_damping=True)], ids=repr)
def test_damping_breaks_invariance(backend: Backend, block: KFACBlock):
    """λI is the same in all coordinates, and they are not: a stated price."""
    assert drift(backend, natural(BlockDiagonal(block), Exact(), damping=0.1)) >= 0.03


IN_UNITS = {name: case.curvature for name, case in CURVATURES.items()}
IN_UNITS["full kronecker"] = FullKronecker()


@pytest.mark.parametrize("damping", [1e-4, 1.0])
@pytest.mark.parametrize("name", [*IN_UNITS, "ekfac measured"])
def test_damping_in_own_units_does_not_break_invariance_to_units(
    backend: Backend, name: str, damping: float
):
    """Features, hidden units and outputs rescaled by powers of two, which round nothing.

    By a multiple of the identity the damped update is another one.
    """
    curvature, measured = IN_UNITS[name.removesuffix(" measured")], name.endswith(" measured")
    other = {"omega": "powers", "phi": "powers"}
    own = in_own_units(curvature, damping, measured=measured)
    assert drift(backend, own, **other) <= 1e-14
    assert drift(backend, natural(curvature, Exact(), damping), **other) >= 0.01


Rescaled = tuple[HostArray, HostArray]
"""What inputs and derivatives are multiplied by, shape (2, 4) each: of two groups, or the first."""
AS_THEY_ARE = (np.ones((2, 4)), np.ones((2, 4)))
BY_ANYTHING = tuple(10.0 ** np.random.default_rng(6).uniform(-3, 3, (2, 2, 4)))
BY_POWERS_OF_TWO = tuple(2.0 ** np.random.default_rng(6).integers(-10, 11, (2, 2, 4)))


def every_kind(backend: Backend, by: Rescaled) -> dict[str, tuple[Statistics, HostArray]]:
    """Statistics of each kind, and what a derivative is multiplied by in other units."""
    rng, (omega, phi) = np.random.default_rng(6), by
    a, g = rng.standard_normal((2, 7, 3, 4)), rng.standard_normal((2, 7, 3, 4))
    indices = backend.xp.asarray([[0, 1, 3]] * 3 + [[1, 1, 2]] * 4, device=backend.device)
    a, g = (backend.asarray(x * units[:, None, None, :]) for x, units in ((a, omega), (g, phi)))
    groups = [AffineStatistics(a[i, ...], g[i, ...]) for i in range(2)]
    outer = phi[:, :, None] * omega[:, None, :]
    return {
        "affine": (groups[0], outer[0]),
        "grouped": (GroupedStatistics(tuple(groups)), outer),
        "embedding": (EmbeddingStatistics(indices, g[0, ...], 4), phi[0, :, None] * np.ones(4)),
        "elementwise": (
            ElementwiseStatistics(a[0, ...], g[0, ...], True),
            np.stack([phi[0] * omega[0], phi[0]]),
        ),
    }


@pytest.mark.parametrize("kind", ["affine", "grouped", "embedding", "elementwise"])
@pytest.mark.parametrize(
    "block",
    [
        KFACBlock(),
        KFACBlock(rule=plain),
        KFACBlock(exact_damping=True),
        DiagonalBlock(),
        ExactBlock(),
    ],
    ids=repr,
)
def test_damping_in_own_units_of_every_kind_of_parameter(backend: Backend, block: Block, kind: str):
    """Where U becomes D ∘ U, u ∘ solve(u ∘ v) becomes D⁻¹ ∘ that, with the moments in units u.

    What is scaled and shifted has been normalised, and is not rescaled.
    """

    def solved(by: Rescaled, *, relative: bool) -> HostArray:
        omega, phi = by
        s, units = every_kind(backend, (AS_THEY_ARE[0] if kind == "elementwise" else omega, phi))[
            kind
        ]
        scale, ladder = Scale(7, 7), Ladder("0")
        moments = {**block.input_moments(s, scale), **block.moments(s, scale)}
        rng = np.random.default_rng(7)
        w, v = (rng.standard_normal(units.shape) for _ in range(2))
        u: Units = (backend.ones(()),)
        if relative:
            found = block.units(moments, backend.asarray(w / units))
            assert found is not None
            u, moments = found, block.in_units(moments, found)
        factors = block.factorise(moments, 0.3, ladder)
        assert not ladder.events
        x = block.solve(factors, in_units({"": u}, backend.asarray(units * v)))
        return units * host(in_units({"": u}, x))

    first = solved(AS_THEY_ARE, relative=True)
    assert_close(solved(BY_POWERS_OF_TWO, relative=True), first, 1e-15)
    damped = solved(AS_THEY_ARE, relative=False)
    assert frobenius_distance(solved(BY_POWERS_OF_TWO, relative=False), damped) > 0.05


def test_invariance_with_shared_weights(backend: Backend):
    """KFC: pointwise affine maps, the same at every position [Grosse & Martens 2016]."""
    network, weights = original()
    other, matched = transformed(weights)
    rng = np.random.default_rng(4)
    x = backend.asarray(rng.standard_normal((10, 4, WIDTHS[0])))
    t = backend.asarray(rng.standard_normal((10, 4, WIDTHS[-1])))
    outputs = []
    for layers, start in ((network, weights), (other, matched)):
        given = iter(start)
        params = trees.tree_map(
            lambda _, given=given: backend.asarray(next(given)), layers.init(Rng(0), backend)
        )
        e = Objective(layers, SquaredError()).evaluate(params, x, t)
        step = natural(BlockDiagonal(), Exact())(e)
        outputs.append(host(layers.forward(trees.axpy(-0.3, step, params), x)[0]))
    assert_close(outputs[1], outputs[0])
