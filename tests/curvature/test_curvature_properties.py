"""What holds of every curvature of every network, over random networks, losses and batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import class_targets, count_targets, real_targets, unit_targets
from curvature_cases import CURVATURES, diagonal_blocks, estimate
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close, flat, host

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.fisher import Empirical, Exact, MonteCarlo
from kfac_np.layers import GELU, Dense, Identity, Layer, Logistic, ReLU, Residual, Sequential, Tanh
from kfac_np.losses import (
    PoissonLogRate,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from kfac_np.objective import Evaluation, Objective
from kfac_np.products import fisher_product, quadratic_forms

LOSSES = [
    (SquaredError(), real_targets),
    (SigmoidCrossEntropy(), unit_targets),
    (SoftmaxCrossEntropy(), class_targets),
    (PoissonLogRate(), count_targets),
]
ACTIVATIONS = st.sampled_from([Identity(), Tanh(), ReLU(), Logistic(), GELU()])


@dataclass(frozen=True)
class Drawn:
    """A network and a batch, on the host."""

    network: Layer
    loss: Any
    targets: Any
    shape: tuple[int, ...]
    weighted: bool
    seed: int

    def evaluate(self, backend: Backend) -> Evaluation:
        rng = np.random.default_rng(self.seed)
        start = self.network.init(Rng(0), backend)
        params = trees.tree_map(
            lambda p: backend.asarray(0.7 * rng.standard_normal(tuple(p.shape))), start
        )
        x = rng.standard_normal(self.shape)
        t = self.targets(rng, (self.shape[0], *self.network.output_shape(self.shape[1:])))
        weights = backend.asarray(rng.uniform(0.1, 3.0, self.shape[0])) if self.weighted else None
        return Objective(self.network, self.loss).evaluate(
            params, backend.asarray(x), backend.asarray(t), weights
        )


@st.composite
def problems(draw: st.DrawFn) -> Drawn:
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    layers: list[Layer] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [Dense(d_in, d_out, bias=draw(st.booleans())), draw(ACTIVATIONS)]
    if draw(st.booleans()):
        layers.append(Residual(Sequential(Dense(widths[-1], widths[-1]), draw(ACTIVATIONS))))
    loss, targets = draw(st.sampled_from(LOSSES))
    positions = draw(st.sampled_from([(), (1,), (3,)]))
    shape = (draw(st.integers(1, 6)), *positions, widths[0])
    seed = draw(st.integers(0, 2**16))
    return Drawn(Sequential(*layers), loss, targets, shape, draw(st.booleans()), seed)


fishers = st.sampled_from([Exact(), Exact(budget_bytes=64), Empirical(), MonteCarlo(2)])


@settings(max_examples=30)
@given(problem=problems(), fisher=fishers)
def test_one_fisher_seen_four_ways(backend: Backend, problem: Drawn, fisher: Any):
    """The full matrix has the blocks, the diagonal, the products and the quadratic forms."""
    e = problem.evaluate(backend)
    full, blocks, diagonal = (
        host(
            CURVATURES[k]
            .curvature.matrix(estimate(CURVATURES[k].curvature, e, fisher), e.params)
            .to_dense()
        )
        for k in ("full", "exact blocks", "diagonal")
    )
    floor = 1e-300  # all may be zero: dead units
    top = float(np.max(np.abs(full))) + floor
    assert np.max(np.abs(blocks - diagonal_blocks(full, e.params))) <= 1e-13 * top
    assert np.max(np.abs(diagonal - np.diag(np.diag(full)))) <= 1e-13 * top
    rng = np.random.default_rng(problem.seed)
    v = trees.unravel(backend.asarray(rng.standard_normal(len(full))), e.params)
    if not isinstance(fisher, MonteCarlo) or e.scale.positions == 1:
        # Monte-Carlo products keep positions apart, of which the matrix has the sum.
        product = flat(trees.ravel(fisher_product(e, v, fisher, Rng(0))))
        expected = full @ flat(trees.ravel(v))
        assert np.max(np.abs(product - expected)) <= 1e-12 * top * len(full)
    if isinstance(fisher, Exact):
        form = float(host(quadratic_forms(e, [v]))[0, 0])
        expected = flat(trees.ravel(v)) @ full @ flat(trees.ravel(v))
        assert abs(form - expected) <= 1e-12 * top * len(full) ** 2


@given(data=st.data(), problem=problems(), fisher=fishers, log_damping=st.floats(-3, 3))
def test_symmetric_positive_and_inverted(
    backend: Backend, data: st.DataObject, problem: Drawn, fisher: Any, log_damping: float
):
    e, damping = problem.evaluate(backend), 10.0**log_damping
    allowed = [n for n, c in CURVATURES.items() if e.scale.positions == 1 or not c.reduces]
    case = CURVATURES[data.draw(st.sampled_from(allowed))]
    moments = estimate(case.curvature, e, fisher)
    matrix = case.curvature.matrix(moments, e.params)
    dense = host(matrix.to_dense())
    top = float(np.max(np.abs(dense))) + 1e-300
    assert np.max(np.abs(dense - dense.T)) <= 1e-15 * top
    assert np.linalg.eigvalsh(dense)[0] >= -1e-13 * top
    assert abs(float(host(matrix.trace())) - np.trace(dense)) <= 1e-13 * top * len(dense)
    factors, events = case.curvature.factorise(moments, damping)
    assert not events
    v = np.random.default_rng(problem.seed).standard_normal(len(dense))
    tree = trees.unravel(backend.asarray(v), e.params)
    solution = flat(trees.ravel(case.curvature.solve(factors, tree)))
    assert v @ solution > 0, "a direction of descent"
    if case.exact_damping:
        condition = 1 + len(dense) * top / damping
        assert_close(dense @ solution + damping * solution, v, 1e-14 * condition)
