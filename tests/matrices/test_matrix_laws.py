"""Laws of every matrix class, each against the dense matrix that it stands for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matrix_cases import (
    CASES,
    SINGULAR,
    Case,
    block_diagonal,
    dense,
    dense_spectral,
    diagonal,
    flattened,
    gram,
    kronecker,
    kronecker_diagonal,
    positive,
    stacked,
    units,
)
from numerics import assert_close, flat, host

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.errors import FactorizationError, InputError, ShapeError
from kfac_np.matrices import UnitMatrix

DAMPINGS = (0.0, 0.1, 10.0)
POWERS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.7)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, backend: Backend) -> Case:
    return CASES[request.param](backend)


@pytest.fixture(params=SINGULAR)
def singular(request: pytest.FixtureRequest, backend: Backend) -> Case:
    return SINGULAR[request.param](backend)


@pytest.fixture(params=[*CASES, *(f"{name} (singular)" for name in SINGULAR)])
def any_case(request: pytest.FixtureRequest, backend: Backend) -> Case:
    name = request.param
    table = SINGULAR if name.endswith(" (singular)") else CASES
    return table[name.removesuffix(" (singular)")](backend)


def dense_power(dense: np.ndarray, exponent: float, damping: float = 0.0) -> np.ndarray:
    """The same power on the host; directions without curvature have none in any positive power."""
    values, u = np.linalg.eigh(dense)
    zero = values <= 1e-12 * np.max(values, initial=0.0)
    values = np.where(zero, 0.0, values) + damping
    return (u * values**exponent) @ u.T


def test_to_dense_is_the_matrix(any_case: Case):
    assert_close(any_case.matrix.to_dense(), any_case.dense)


def test_matvec_is_the_dense_product(any_case: Case):
    v = any_case.vector()
    assert_close(flat(any_case.matrix.matvec(any_case.operand(v))), any_case.dense @ v)


def test_matvec_keeps_the_shape_and_the_operand(any_case: Case):
    v = any_case.operand(any_case.vector())
    before = host(v).copy()
    product = any_case.matrix.matvec(v)
    assert host(product).shape == host(v).shape
    np.testing.assert_array_equal(host(v), before)


def test_diagonal_trace_and_norm_are_those_of_the_dense_matrix(any_case: Case):
    assert_close(trees.ravel((any_case.matrix.diagonal(),)), np.diag(any_case.dense))
    assert_close(any_case.matrix.trace(), np.trace(any_case.dense))
    assert_close(any_case.matrix.frobenius_norm(), np.linalg.norm(any_case.dense))


def test_solve_is_the_dense_solution(case: Case):
    v = case.vector()
    for damping in DAMPINGS:
        expected = np.linalg.solve(case.dense + damping * np.eye(len(v)), v)
        assert_close(flat(case.matrix.solve(case.operand(v), damping)), expected)


def test_solve_undoes_matvec(case: Case):
    v = case.vector()
    for damping in DAMPINGS:
        image = flat(case.matrix.matvec(case.operand(v))) + damping * v
        assert_close(flat(case.matrix.solve(case.operand(image), damping)), v)


def test_logdet_is_that_of_the_dense_matrix(case: Case):
    for damping in DAMPINGS:
        sign, expected = np.linalg.slogdet(case.dense + damping * np.eye(case.dense.shape[0]))
        assert sign == 1
        actual = float(host(case.matrix.logdet(damping)))
        assert actual == pytest.approx(expected, abs=1e-12 * len(case.dense))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_power_is_the_dense_power(case: Case, damping: float):
    v = case.vector()
    for exponent in POWERS:
        power = case.matrix.power(exponent, damping)
        assert_close(power.to_dense(), dense_power(case.dense, exponent, damping))
        assert_close(flat(power.matvec(case.operand(v))), host(power.to_dense()) @ v)


def test_powers_multiply_by_adding_exponents(case: Case):
    v = case.operand(case.vector())
    for p, q in ((0.5, 0.5), (-0.5, -0.5), (2.0, -1.0), (0.3, -0.3)):
        product = case.matrix.power(p).matvec(case.matrix.power(q).matvec(v))
        assert_close(product, case.matrix.power(p + q).matvec(v))


def test_a_power_of_a_power_multiplies_exponents(case: Case):
    squared_root = case.matrix.power(0.5).power(2.0)
    assert_close(squared_root.to_dense(), case.dense)
    assert_close(case.matrix.power(-1.0).power(-1.0).to_dense(), case.dense)


def test_half_power_squared_is_the_matrix(any_case: Case):
    root = host(any_case.matrix.power(0.5).to_dense())
    assert_close(root, root.T)
    # √ halves the digits of eigenvalues at rounding: a null direction may come back as √ε.
    assert_close(root @ root, any_case.dense)


def test_trace_norm_and_logdet_of_a_power(case: Case):
    power, dense = case.matrix.power(-0.5, 0.2), dense_power(case.dense, -0.5, 0.2)
    assert_close(power.trace(), np.trace(dense))
    assert_close(power.frobenius_norm(), np.linalg.norm(dense))
    assert_close(power.logdet(), np.linalg.slogdet(dense)[1])


def test_negative_power_of_a_singular_matrix_is_refused(singular: Case):
    for exponent in (-1.0, -0.5):
        with pytest.raises(FactorizationError, match=r"singular .* more damping than 0"):
            singular.matrix.power(exponent)


def test_solve_with_a_singular_matrix_is_refused(singular: Case):
    v = singular.operand(singular.vector())
    with pytest.raises(FactorizationError, match="numerically singular"):
        singular.matrix.solve(v)
    with pytest.raises(FactorizationError, match="numerically singular"):
        singular.matrix.sample(Rng(0), inverse=True)


def test_positive_power_of_a_singular_matrix(singular: Case):
    for exponent in (0.0, 0.5, 1.0, 2.0):
        power = singular.matrix.power(exponent)
        assert_close(power.to_dense(), dense_power(singular.dense, exponent))


def test_logdet_of_a_singular_matrix_is_minus_infinity(singular: Case):
    assert float(host(singular.matrix.logdet())) == -np.inf


def test_damping_makes_a_singular_matrix_regular(singular: Case):
    v = singular.vector()
    for damping in (0.1, 10.0):
        damped = singular.dense + damping * np.eye(len(v))
        solution = flat(singular.matrix.solve(singular.operand(v), damping))
        assert_close(solution, np.linalg.solve(damped, v))
        assert_close(singular.matrix.logdet(damping), np.linalg.slogdet(damped)[1])


def test_what_rounding_makes_of_a_zero_eigenvalue_is_zero(backend: Backend):
    """The null direction of a Gram matrix comes out as ±1e-17: the sign must not matter."""
    signs = set()
    for seed in range(12):
        m = gram(5, 4, seed)
        signs.add(float(np.sign(np.linalg.eigvalsh(m)[0])))
        for case in (dense(backend, m, (5,)), kronecker(backend, m, positive(2, seed))):
            assert float(host(case.matrix.logdet())) == -np.inf
            with pytest.raises(FactorizationError, match="numerically singular"):
                case.matrix.power(-0.5)
        unit = units(backend, gram(2, 1, seed), positive(2, seed))
        assert float(host(unit.matrix.logdet())) == -np.inf
    assert {-1.0, 1.0} <= signs


def test_samples_stay_in_the_range_of_a_singular_matrix(singular: Case):
    draw = flat(singular.matrix.sample(Rng(0)))
    values, u = np.linalg.eigh(singular.dense)
    null = u[:, values <= 1e-12 * np.max(values, initial=0.0)]
    assert null.shape[1] > 0
    assert np.max(np.abs(null.T @ draw)) <= 1e-12 * max(1.0, float(np.max(np.abs(draw))))


def test_damping_below_rounding_is_refused(backend: Backend):
    case = SINGULAR["dense"](backend)
    with pytest.raises(FactorizationError, match="more damping than 1e-18"):
        case.matrix.solve(case.operand(case.vector()), damping=1e-18)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, "much"])
def test_damping_that_makes_no_sense_is_refused(case: Case, bad: float):
    v = case.operand(case.vector())
    for operation in (
        lambda: case.matrix.solve(v, bad),
        lambda: case.matrix.power(0.5, bad),
        lambda: case.matrix.logdet(bad),
        lambda: case.matrix.sample(Rng(0), bad),
    ):
        with pytest.raises(InputError, match=f"damping: expected a finite number >= 0, got {bad}"):
            operation()


@pytest.mark.parametrize("c", [1e25, 1e-25])
@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_scale_in_one_factor_alone(backend: Backend, form: str, c: float):
    """A·c ⊗ G/c in single precision: squares and sums of A overflow, those of G vanish."""
    narrow = dataclasses.replace(backend, dtype=backend.xp.float32)
    A, G = positive(4, 0), 2.0 * positive(3, 1)
    make = kronecker if form == "full" else kronecker_diagonal
    a = A if form == "full" else np.diag(A)
    plain, case = make(backend, a, G), make(narrow, c * a, G / c)
    v = 1e-20 * case.vector()
    for function in (
        lambda m, _: m.trace(),
        lambda m, _: m.frobenius_norm(),
        lambda m, _: m.logdet(),
        lambda m, _: m.diagonal(),
        lambda m, v: 1e20 * m.matvec(v),
        lambda m, v: 1e20 * m.solve(v, 0.1),
    ):
        found, expected = (function(x.matrix, x.operand(v)) for x in (case, plain))
        assert_close(host(found).astype(np.float64), host(expected), 1e-5)


@pytest.mark.parametrize("c", [1e30, 1e-30])
def test_norms_of_what_has_no_squares(backend: Backend, c: float):
    """Of entries that single precision holds, and whose squares it does not."""
    b = dataclasses.replace(backend, dtype=backend.xp.float32)
    one = kronecker(b, c**0.5 * positive(3, 0), c**0.5 * positive(2, 1))
    for case in (
        one,
        stacked(b, one, one),
        units(b, c * positive(2, 0), c * positive(2, 1)),
        dense(b, c * positive(4, 7), (2, 2)),
        dense_spectral(b, c * np.asarray([1.0, 3.0]), (2,)),
        diagonal(b, c * np.asarray([1.0, 3.0])),
        block_diagonal(b, one, dense(b, c * positive(4, 7), (2, 2)), diagonal(b, np.zeros((1, 3)))),
        flattened(b, c * positive(8, 12)),
    ):
        found = float(host(case.matrix.frobenius_norm()))
        assert found == pytest.approx(c * np.linalg.norm(case.dense / c), rel=1e-5)


@pytest.mark.parametrize("spread", [1e6, 1e9])
def test_kronecker_factors_are_judged_one_by_one(backend: Backend, spread: float):
    """cond(G ⊗ A) = cond(G) cond(A) may exceed 1/ε and yet both factors be well resolved."""
    A, G = np.diag(np.geomspace(1.0, spread, 4)), np.diag(np.geomspace(1.0, spread, 3))
    case = kronecker(backend, A, G)
    v = case.vector().reshape(3, 4)
    expected = v / (np.diag(G)[:, None] * np.diag(A)[None, :])
    assert_close(case.matrix.solve(backend.asarray(v)), expected)
    root = host(case.matrix.power(0.5).to_dense())
    np.testing.assert_allclose(np.diag(root) ** 2, np.diag(case.dense), rtol=1e-12)
    expected_logdet = 4 * np.sum(np.log(np.diag(G))) + 3 * np.sum(np.log(np.diag(A)))
    assert_close(case.matrix.logdet(), expected_logdet)


def test_diagonal_is_never_singular_by_rounding(backend: Backend):
    """Entries of a diagonal have no rounding error in common: each is judged by itself."""
    values = np.asarray([[1e-30, 1.0, 1e30]])
    case = CASES["diagonal"](backend)
    matrix = type(case.matrix)(backend.asarray(values))
    assert_close(matrix.solve(backend.asarray(values)), np.ones((1, 3)))
    assert_close(matrix.power(-0.5).to_dense(), np.diag(values[0] ** -0.5))
    assert float(host(matrix.logdet())) == pytest.approx(0.0, abs=1e-12)


def test_units_of_very_different_size_are_judged_one_by_one(backend: Backend):
    """Blocks of a unit have no rounding error in common with those of another unit."""
    blocks = [10.0**k * positive(2, k) for k in (0, 30, 60, 90)]
    case = units(backend, *blocks)
    v = case.vector().reshape(2, 4)
    expected = np.stack([np.linalg.solve(m, v[:, i]) for i, m in enumerate(blocks)], axis=1)
    solution = host(case.matrix.solve(backend.asarray(v)))
    np.testing.assert_allclose(solution, expected, rtol=1e-13)


@pytest.mark.parametrize("grade", [1e-3, 1e6, 1e-12, 1e15])
def test_rows_of_a_unit_of_very_different_size(backend: Backend, grade: float):
    """A scale and a shift have units of their own, and [grade² a, grade b; ., d] loses nothing."""
    core = np.asarray([[[2.0, 0.6], [0.6, 0.5]], [[0.3, -0.4], [-0.4, 2.0]]])
    rows = np.asarray([grade, 1.0])
    case = units(backend, *(core * rows[:, None] * rows[None, :]))
    v = np.random.default_rng(1).standard_normal((2, 2))
    expected = np.stack(
        [np.linalg.solve(m, v[:, i] / rows) / rows for i, m in enumerate(core)], axis=1
    )
    solution = host(case.matrix.solve(backend.asarray(v)))
    np.testing.assert_allclose(solution, expected, rtol=1e-13)
    assert_close(case.matrix.logdet(), np.sum(np.log(np.linalg.det(core))) + 4 * np.log(grade))


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 2, 1), (2, 2)])
def test_units_of_other_shapes_are_refused(backend: Backend, shape: tuple[int, ...]):
    with pytest.raises(ShapeError, match=r"blocks: expected shape \(C, 1, 1\) or \(C, 2, 2\)"):
        UnitMatrix(backend.zeros(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["kronecker", "dense", "diagonal"])
def test_a_matrix_that_is_not_finite_is_refused(backend: Backend, kind: str, bad: float):
    m = positive(4, 0)
    m[0, 0] = bad
    if kind == "kronecker":
        matrix = type(CASES["kronecker"](backend).matrix)(backend.asarray(m), backend.asarray(m))
    elif kind == "dense":
        matrix = type(CASES["dense"](backend).matrix)(backend.asarray(m), (4,))
    else:
        matrix = type(CASES["diagonal"](backend).matrix)(backend.asarray(m))
    for operation in (
        lambda: matrix.power(-1.0),
        lambda: matrix.power(0.5),
        matrix.logdet,
        lambda: matrix.sample(Rng(0)),
    ):
        with pytest.raises(FactorizationError, match="NaN or Inf"):
            operation()
