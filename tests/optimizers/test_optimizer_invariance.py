"""Affine changes of every layer: the undamped K-FAC path does not see them, SGD's does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pytest
from dense_net import HostArray
from optimizer_cases import LOSSES

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.fisher import Exact
from kfac_np.layers import Dense, Layer, ReLU, Sequential, Tanh
from kfac_np.losses import Loss, SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import (
    KFAC,
    SGD,
    ConstantDamping,
    CoupledGamma,
    FixedRate,
    Optimizer,
    QuadraticModel,
    Refresh,
)
from kfac_np.trees import Tree


@final
@dataclass(frozen=True)
class FixedAffine(Layer):
    """y = M x + c, not trained: another coordinate system for the activations."""

    matrix: tuple[tuple[float, ...], ...]
    shift: tuple[float, ...]

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return ()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def _matrix(self, x: Array) -> Array:
        return array_namespace(x).asarray(self.matrix, dtype=x.dtype, device=x.device)

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        shift = array_namespace(x).asarray(self.shift, dtype=x.dtype, device=x.device)
        return x @ self._matrix(x).T + shift, ()

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        return (g @ self._matrix(g) if wrt_input else None), ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return None if dx is None else dx @ self._matrix(dx).T

    def backward_jvp(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def take(self, cache: Tree, rows: slice) -> Tree:
        return cache


def affine_pair(loss: Loss) -> tuple[Objective, Tree, Objective, Tree]:
    """A network, and the same function with every layer's inputs and outputs transformed.

    Each layer sees Ω x + c in place of its inputs x, and gives Φ s + d in place of s; W is
    changed to match.
    """
    draws = np.random.default_rng(3)
    sizes = (3, 4, 2)
    layers: list[Layer] = []
    changed: list[Layer] = []
    params: list[Tree] = []
    changed_params: list[Tree] = []

    def affine(n: int) -> tuple[HostArray, HostArray]:
        return np.eye(n) + 0.5 * draws.standard_normal((n, n)), draws.standard_normal(n)

    def fixed(M: HostArray, shift: HostArray) -> FixedAffine:
        return FixedAffine(tuple(map(tuple, M.tolist())), tuple(shift.tolist()))

    def homogeneous(M: HostArray, shift: HostArray) -> HostArray:
        return np.block([[M, shift[:, None]], [np.zeros((1, len(M))), np.ones((1, 1))]])

    for i, (m, n) in enumerate(itertools.pairwise(sizes)):
        W = draws.standard_normal((n, m + 1))
        (omega, c), (phi, d) = affine(m), affine(n)
        inverse = np.linalg.inv(phi)
        # Φ s + d = Φ W̄ x̄ + d with x̄ = Ω̄⁻¹ (Ωx + c, 1).
        W_changed = phi @ W @ np.linalg.inv(homogeneous(omega, c))
        W_changed[:, -1] += d
        if i:
            layers, changed = [*layers, Tanh()], [*changed, Tanh()]
            params, changed_params = [*params, ()], [*changed_params, ()]
        layers += [Dense(m, n)]
        changed += [fixed(omega, c), Dense(m, n), fixed(inverse, -inverse @ d)]
        params += [W]
        changed_params += [(), W_changed, ()]
    return (
        Objective(Sequential(*layers), loss),
        tuple(params),
        Objective(Sequential(*changed), loss),
        tuple(changed_params),
    )


UNDAMPED: dict[str, Any] = {
    "damping": ConstantDamping(0.0),
    "gamma": CoupledGamma(),
    "l2": 0.0,
    "statistics_fraction": 1.0,
    "refresh": Refresh(4, first=2),
    "averaging": None,
}
INVARIANT: dict[str, Callable[[Objective], Optimizer]] = {
    "quadratic_model": lambda o: KFAC(o, fisher=Exact(), step_rule=QuadraticModel(1.0), **UNDAMPED),
    "sampled_targets": lambda o: KFAC(o, step_rule=QuadraticModel(1.0), **UNDAMPED),
    "fixed_rate": lambda o: KFAC(o, step_rule=FixedRate(0.1, 0.5), **UNDAMPED),
    "kl_clip": lambda o: KFAC(o, step_rule=FixedRate(0.5, 0.5, kl_clip=1e-2), **UNDAMPED),
}


def outputs_along(optimizer: Optimizer, params: Tree, loss: str) -> list[HostArray]:
    draws = np.random.default_rng(4)
    x = draws.standard_normal((60, 3))
    t = draws.standard_normal((60, 2)) if loss == "squared" else draws.random((60, 2))
    state, outputs = optimizer.init(params), []
    for _ in range(10):
        state, _ = optimizer.step(state, x, t)
        outputs.append(optimizer.objective.evaluate(state.params, x, t).outputs)
    return outputs


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("loss", ["squared", "sigmoid"])
def test_undamped_path_does_not_see_affine_changes(name: str, loss: str) -> None:
    """[KFAC15 §10], for the whole optimiser: the same functions, step by step; SGD's are not."""
    one, params, other, changed = affine_pair(LOSSES[loss])
    path = outputs_along(INVARIANT[name](one), params, loss)
    path_changed = outputs_along(INVARIANT[name](other), changed, loss)
    for a, b in zip(path, path_changed, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    sgd, sgd_changed = (
        outputs_along(SGD(o, rate=0.01), p, loss) for o, p in ((one, params), (other, changed))
    )
    moved = float(np.max(np.abs(sgd[-1] - sgd[0])))
    assert np.max(np.abs(sgd[-1] - sgd_changed[-1])) > 0.1 * moved


def test_damping_ends_the_invariance() -> None:
    """The test above can fail: with λ > 0 the same comparison finds a difference."""
    one, params, other, changed = affine_pair(SquaredError())
    damped = {**UNDAMPED, "damping": ConstantDamping(0.1)}
    paths = [
        outputs_along(
            KFAC(o, fisher=Exact(), step_rule=QuadraticModel(1.0), **damped), p, "squared"
        )
        for o, p in ((one, params), (other, changed))
    ]
    assert np.max(np.abs(paths[0][-1] - paths[1][-1])) > 1e-3


# ---------------------------------------------------------------------------- units, damped

FEATURES = {
    "apart": (np.array([2.0**-9, 1, 2.0**6, 2.0**15]), np.array([2.0**15, 2.0**4, 2.0**-9, 1])),
    "together": (np.full(4, 2.0**7), np.full(4, 2.0**20)),
}
HIDDEN = (np.array([1, 2.0**-9, 2.0**9, 2.0, 0.5]), np.array([2.0**12, 1, 0.25, 2.0**-5, 8.0]))


def in_other_units(
    units: str, which: int
) -> tuple[Tree, HostArray, Callable[[Tree], list[HostArray]]]:
    """Parameters and inputs in one of two sets of units, and how parameters are brought back."""
    draws = np.random.default_rng(5)
    x, first, last = (draws.standard_normal(s) for s in ((60, 4), (5, 5), (2, 6)))
    features = FEATURES[units][which]
    f, c = np.append(features, 1.0), HIDDEN[which] if units == "apart" else np.ones(5)
    outer = np.append(c, 1.0)
    params = (c[:, None] * first / f, (), last / outer)

    def back(p: Tree) -> list[HostArray]:
        return [p[0] / c[:, None] * f, p[2] * outer]

    return params, x * features, back


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("units", FEATURES)
def test_damped_path_does_not_see_units(units: str, relative: bool) -> None:
    """Features, and hidden units, that are orders of magnitude apart, or all far from 1.

    With damping in the layers' own units, the same parameters but for the units, step by step.
    """
    t = np.random.default_rng(6).standard_normal((60, 2))
    objective = Objective(Sequential(Dense(4, 5), ReLU(), Dense(5, 2)), SquaredError())
    kfac = KFAC(objective, fisher=Exact(), relative=relative)
    paths: list[list[HostArray]] = []
    for which in (0, 1):
        params, x, back = in_other_units(units, which)
        state, path = kfac.init(params), []
        for _ in range(25):
            state, report = kfac.step(state, x, t)
            path += back(state.params)
        paths.append(path)
        if relative:
            assert report.loss < 0.7 * objective.value(params, x, t)
    apart = [np.max(np.abs(a - b)) for a, b in zip(*paths, strict=True)]
    if relative:
        assert max(apart) < 1e-7
    else:
        assert max(apart) > 1e-2
