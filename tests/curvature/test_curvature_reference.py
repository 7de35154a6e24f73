"""Factors, blocks, inverses and scalars against values computed by another library."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import to_backend
from curvature_cases import SHARING, dense, estimate
from numerics import assert_close, frobenius_distance, host
from reference_files import Reference, load, names

from kfac_np import trees
from kfac_np.backend import Backend
from kfac_np.curvature import (
    BlockDiagonal,
    DampingRule,
    ExactBlock,
    FullMatrix,
    KFACBlock,
    pi_trace,
    plain,
    reduce,
)
from kfac_np.fisher import Empirical, Exact

VALUES = names("mlp_", "seq_", "cnn")
WHOLE = [name for name in VALUES if "ggn" in load(name)]
INVERSES = names("inv_")
FISHERS = {"type2": (Exact(), "y"), "emp": (Empirical(), "y"), "mc": (Empirical(), "y_sampled")}
FACTORS = [
    (name, sharing, fisher)
    for name in [*VALUES, *INVERSES]
    for sharing in SHARING
    for fisher in FISHERS
    if f"G{load(name).count - 1}_{fisher}_{sharing}" in load(name)
]
DISTANCES = [
    (name, sharing)
    for name in VALUES
    for sharing in SHARING
    if f"{sharing}1" in load(name).spec["kfac_vs_ggn_relative_frobenius"]
]


def test_files_are_there():
    assert [len(each) for each in (VALUES, WHOLE, INVERSES, FACTORS, DISTANCES)] == [
        18,
        13,
        5,
        66,
        27,
    ]


@pytest.mark.parametrize(("name", "sharing", "fisher"), FACTORS)
def test_kronecker_factors(backend: Backend, name: str, sharing: str, fisher: str):
    """A and G themselves: this library splits the scale as the reference does."""
    reference = load(name)
    kind, targets = FISHERS[fisher]
    moments = estimate(SHARING[sharing], reference.evaluate(backend, targets), kind)
    for i, position in enumerate(reference.positions):
        found = moments[str(position)]
        assert_close(found["A"], reference.factor("A", i, sharing))
        assert_close(found["G"], reference.factor("G", i, f"{fisher}_{sharing}"))


@pytest.mark.parametrize(("fisher", "key"), [("type2", "ggn"), ("emp", "ef")])
@pytest.mark.parametrize("name", WHOLE)
def test_the_full_matrix(backend: Backend, name: str, fisher: str, key: str):
    reference = load(name)
    e = reference.evaluate(backend)
    kind, _ = FISHERS[fisher]
    expected = reference[key][np.ix_(reference.order(), reference.order())]
    assert_close(dense(FullMatrix(), e, kind), expected)


@pytest.mark.parametrize(("fisher", "key"), [("type2", "ggn"), ("emp", "ef")])
@pytest.mark.parametrize("name", VALUES)
def test_exact_blocks(backend: Backend, name: str, fisher: str, key: str):
    reference = load(name)
    e = reference.evaluate(backend)
    kind, _ = FISHERS[fisher]
    exact = BlockDiagonal(ExactBlock())
    matrix = exact.matrix(estimate(exact, e, kind), e.params)
    for i, position in enumerate(reference.positions):
        assert_close(matrix.blocks[position].to_dense(), reference.block(key, i))


@pytest.mark.parametrize(("name", "sharing"), DISTANCES)
def test_distance_of_kfac_from_the_exact_blocks(backend: Backend, name: str, sharing: str):
    """‖G ⊗ A - block‖_F / ‖block‖_F, to the four digits that the reference states."""
    reference = load(name)
    stated = reference.spec["kfac_vs_ggn_relative_frobenius"]
    e = reference.evaluate(backend)
    kfac = SHARING[sharing].matrix(estimate(SHARING[sharing], e), e.params)
    exact = BlockDiagonal(ExactBlock())
    block = exact.matrix(estimate(exact, e), e.params)
    for i, position in enumerate(reference.positions):
        if f"{sharing}{i}" not in stated:  # a grouped convolution, which the reference averages
            continue
        distance = frobenius_distance(
            kfac.blocks[position].to_dense(), block.blocks[position].to_dense()
        )
        if stated[f"{sharing}{i}"] < 1e-12:
            assert distance < 1e-14, "theory says exact"
        else:
            assert float(f"{distance:.4g}") == stated[f"{sharing}{i}"]


@pytest.mark.parametrize(("sharing", "fisher"), [(s, f) for s in SHARING for f in ("type2", "emp")])
def test_factors_of_each_group_are_nearer_than_those_of_their_average(sharing: str, fisher: str):
    """Within the groups: the reference library averages A over the groups, and G is of all."""
    reference = load("cnn_ce_relu_groups2")
    exact = reference.block({"type2": "ggn", "emp": "ef"}[fisher], 0)
    columns = reference.columns[0]
    A, G = reference.factor("A", 0, sharing), reference.factor("G", 0, f"{fisher}_{sharing}")
    average = np.kron(
        reference[f"G0_{fisher}_{sharing}_groupavg"],
        reference[f"A0_{sharing}_groupavg"][np.ix_(columns, columns)],
    )
    of_groups, of_average = 0.0, 0.0
    for q in range(2):
        rows = slice(q * len(exact) // 2, (q + 1) * len(exact) // 2)
        block = exact[rows, rows]
        of_groups += np.linalg.norm(np.kron(G[q], A[q]) - block) ** 2
        of_average += np.linalg.norm(average[rows, rows] - block) ** 2
    assert of_groups < 0.96 * of_average


def curvature_of(reference: Reference, **options) -> BlockDiagonal:
    sharing = {"sharing": reduce} if reference.spec["approx"] == "reduce" else {}
    return BlockDiagonal(KFACBlock(**sharing, **options))


def moments_of(reference: Reference, backend: Backend):
    kind = {"type-2": Exact(), "empirical": Empirical()}[reference.spec["fisher"]]
    e = reference.evaluate(backend)
    return e, estimate(curvature_of(reference), e, kind)


def a_pair(damping_a: float, damping_g: float) -> DampingRule:
    return lambda A, G, gamma: (damping_a, damping_g)


def inverses(reference: Reference):
    """Name of the result in the file, curvature, damping."""
    damping = reference.spec["damping"]
    yield "inv_plain", curvature_of(reference, rule=plain), damping["plain"]
    pair = curvature_of(reference, rule=a_pair(*damping["plain_tuple"]))
    yield "inv_plain_tuple", pair, 1.0
    yield "inv_pi", curvature_of(reference, rule=pi_trace), damping["pi"]
    yield "inv_exact", curvature_of(reference, exact_damping=True), damping["exact"]


@pytest.mark.parametrize("name", INVERSES)
def test_products_and_inverses(backend: Backend, name: str):
    reference = load(name)
    e, moments = moments_of(reference, backend)
    matrix = curvature_of(reference).matrix(moments, e.params)
    for part in range(2):
        v = to_backend(backend, reference.joint("vW", "vb", part))

        def assert_is(actual: trees.Tree, key: str, part: int = part) -> None:
            expected = reference.joint(f"{key}_W", f"{key}_b", part)
            # Products of numbers, and inverses of condition numbers below 2000 (damped).
            for a, b in zip(trees.leaves(actual), trees.leaves(expected), strict=True):
                assert_close(a, b)

        assert_is(matrix.matvec(v), "kfac_mv")
        assert_is(matrix.solve(v, reference.spec["damping"]["exact"]), "inv_exact")
        for key, curvature, damping in inverses(reference):
            factors, events = curvature.factorise(moments, damping)
            assert_is(curvature.solve(factors, v), key)
            assert not events


@pytest.mark.parametrize("name", INVERSES)
def test_scalars(backend: Backend, name: str):
    reference = load(name)
    e, moments = moments_of(reference, backend)
    matrix = curvature_of(reference).matrix(moments, e.params)
    assert_close(matrix.trace(), reference["kfac_trace"])
    assert_close(matrix.frobenius_norm(), reference["kfac_fro"])
    logdet = float(host(matrix.logdet()))
    if "kfac_logdet" not in reference:  # a softmax output: G has the null vector of ones
        assert logdet == -math.inf
        return
    # d log λ = dλ/λ: the smallest eigenvalues lose as many digits as the factors' condition.
    condition = max(reference.spec["cond_A_max"], reference.spec["cond_G_max"])
    assert logdet == pytest.approx(float(reference["kfac_logdet"]), abs=1e-14 * condition)
    assert math.exp(logdet) == pytest.approx(float(reference["kfac_det"]), rel=1e-8)
