"""The block-tridiagonal inverse against a dense evaluation of its published definition."""

from __future__ import annotations

import numpy as np
import pytest
from curvature_cases import estimate
from numerics import assert_close, flat, host
from reference_files import Reference, load, names

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import BlockDiagonal, BlockTridiagonal, FullKronecker
from kfac_np.fisher import Exact

FILES = names("tridiag_")
UNDAMPED = [name for name in FILES if load(name).spec["undamped"]]
DAMPED = [(name, k) for name in FILES for k in range(len(load(name).spec["gammas"]))]
CURVATURE = BlockTridiagonal()
# Both sides invert matrices of condition up to 1e5, the reference whole ones.
LOOSE = 1e-9


def test_files_are_there():
    assert (len(FILES), len(UNDAMPED), len(DAMPED)) == (3, 2, 6)


def solutions(reference: Reference, backend: Backend, vectors, damping: float) -> np.ndarray:
    """(F̂ + damping)⁻¹ of some rows."""
    e = reference.evaluate(backend)
    factors, events = CURVATURE.factorise(estimate(CURVATURE, e), damping)
    assert not events
    rows = [trees.unravel(backend.asarray(v), e.params) for v in vectors]
    return np.stack([flat(trees.ravel(CURVATURE.solve(factors, row))) for row in rows])


@pytest.mark.parametrize("name", FILES)
def test_moments_of_layers_and_of_neighbours(backend: Backend, name: str):
    reference = load(name)
    moments = estimate(CURVATURE, reference.evaluate(backend))
    paths = [str(position) for position in reference.positions]
    for i, path in enumerate(paths):
        assert_close(moments[path]["A"], reference[f"A_{i}_{i}"])
        assert_close(moments[path]["G"], reference[f"G_{i}_{i}_type2"])
        if path == paths[-1]:
            assert set(moments[path]) == {"A", "G"}
        else:
            assert_close(moments[path]["A_next"], reference[f"A_{i}_{i + 1}"])
            assert_close(moments[path]["G_next"], reference[f"G_{i}_{i + 1}_type2"])


@pytest.mark.parametrize("name", FILES)
def test_one_column_at_a_time(backend: Backend, name: str):
    e = load(name).evaluate(backend)
    assert_close(
        trees.ravel(estimate(CURVATURE, e, Exact(budget_bytes=1))),
        trees.ravel(estimate(CURVATURE, e)),
        1e-14,
    )


@pytest.mark.parametrize("name", FILES)
def test_all_kronecker_products(backend: Backend, name: str):
    reference, full = load(name), FullKronecker()
    e = reference.evaluate(backend)
    matrix = full.matrix(full.estimate(e, Exact(), Rng(0)), e.params)
    assert_close(matrix.to_dense(), reference["F_tilde"])


@pytest.mark.parametrize("name", UNDAMPED)
def test_the_matrix_that_agrees_on_neighbours(backend: Backend, name: str):
    reference = load(name)
    e = reference.evaluate(backend)
    matrix = CURVATURE.matrix(estimate(CURVATURE, e), e.params)
    assert_close(matrix.to_dense(), reference["F_hat"], LOOSE)


@pytest.mark.parametrize("name", UNDAMPED)
def test_regressions_and_inverse_without_damping(backend: Backend, name: str):
    reference = load(name)
    e = reference.evaluate(backend)
    factors, _ = CURVATURE.factorise(estimate(CURVATURE, e), 0.0)
    for i, position in enumerate(reference.positions[:-1]):
        assert_close(factors[str(position)]["Psi_A"], reference[f"Psi_A{i}"], LOOSE)
        assert_close(factors[str(position)]["Psi_G"], reference[f"Psi_G{i}"], LOOSE)
    inverse = solutions(reference, backend, np.eye(len(reference["F_hat"])), 0.0)
    assert_close(inverse, reference["F_hat_inv"], LOOSE)
    assert_close(solutions(reference, backend, reference["v"], 0.0), reference["inv_v"], LOOSE)


@pytest.mark.parametrize(("name", "k"), DAMPED)
def test_regressions_and_inverse_with_damping(backend: Backend, name: str, k: int):
    reference = load(name)
    damping = reference.spec["gammas"][k] ** 2
    e = reference.evaluate(backend)
    factors, events = CURVATURE.factorise(estimate(CURVATURE, e), damping)
    assert not events
    for i, position in enumerate(reference.positions[:-1]):
        assert_close(factors[str(position)]["Psi_A"], reference[f"Psi_A{i}_damped{k}"])
        assert_close(factors[str(position)]["Psi_G"], reference[f"Psi_G{i}_damped{k}"])
    inverse = solutions(reference, backend, np.eye(len(reference["v"].T)), damping)
    assert_close(inverse, reference[f"F_hat_inv_damped{k}"])
    assert_close(
        solutions(reference, backend, reference["v"], damping), reference[f"inv_v_damped{k}"]
    )
    gradient = flat(trees.ravel(e.gradient()))
    assert_close(gradient, reference["grad_joint"])
    step = solutions(reference, backend, [gradient], damping)[0]
    assert_close(step, reference[f"inv_grad_damped{k}"])


@pytest.mark.parametrize(("name", "k"), DAMPED)
def test_block_diagonal_with_the_same_damping(backend: Backend, name: str, k: int):
    """The file's other half, and what the coupling adds: they are far apart."""
    reference = load(name)
    e, plain = reference.evaluate(backend), BlockDiagonal()
    damping = reference.spec["gammas"][k] ** 2
    factors, _ = plain.factorise(estimate(plain, e), damping)
    rows = [trees.unravel(backend.asarray(v), e.params) for v in reference["v"]]
    found = np.stack([host(trees.ravel(plain.solve(factors, row))) for row in rows])
    assert_close(found, reference[f"blockdiag_inv_v_damped{k}"])
    coupled = reference[f"inv_v_damped{k}"]
    assert np.linalg.norm(found - coupled) > 0.01 * np.linalg.norm(coupled)
