"""Draws from N(0, C + λI) and N(0, (C + λI)⁻¹): their covariance, within what chance allows."""

from __future__ import annotations

import numpy as np
import pytest
from matrix_cases import CASES, Case
from numerics import assert_close, flat, host

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend

DRAWS = 300


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_covariance_of_draws(name: str, damping: float, inverse: bool):
    """Entry (i, j) of a covariance of n draws has variance (C_ii C_jj + C_ij²) / n.

    Five standard deviations: one entry in 1.7 million exceeds them by chance, and the seed is
    fixed. A draw with C in place of C⁻¹, or with blocks that share their noise, misses by more.
    On NumPy alone: the other backends draw the same numbers, by the law below.
    """
    case = CASES[name](get_backend("numpy", "float64"))
    covariance = case.dense + damping * np.eye(len(case.dense))
    if inverse:
        covariance = np.linalg.inv(covariance)
    draws = np.stack(
        [flat(case.matrix.sample(Rng(0, name, i), damping, inverse=inverse)) for i in range(DRAWS)]
    )
    variances = np.diag(covariance)
    sigma = np.sqrt((np.outer(variances, variances) + covariance**2) / DRAWS)
    assert np.all(np.abs(draws.T @ draws / DRAWS - covariance) <= 5 * sigma)
    assert np.all(np.abs(np.mean(draws, axis=0)) <= 5 * np.sqrt(variances / DRAWS))


def test_a_draw_has_the_operands_structure(backend: Backend):
    for make in CASES.values():
        case = make(backend)
        draw = case.matrix.sample(Rng(1))
        same = trees.tree_map(lambda x, y: x.shape == y.shape, case.like, draw)
        assert all(trees.leaves(same))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("inverse", [False, True])
def test_every_backend_draws_the_same(backend: Backend, name: str, inverse: bool):
    """The symmetric root is unique, whatever signs the eigenvectors have."""

    def draw(case: Case) -> np.ndarray:
        return host(case.matrix.sample(Rng(2), 0.1, inverse=inverse))

    assert_close(draw(CASES[name](backend)), draw(CASES[name](get_backend("numpy", "float64"))))


def test_a_stream_gives_one_draw_after_another(backend: Backend):
    """Equal streams give equal draws, one stream a different draw each time."""
    for make in CASES.values():
        case = make(backend)
        rng = Rng(3)
        first, second = flat(case.matrix.sample(rng)), flat(case.matrix.sample(rng))
        assert_close(flat(case.matrix.sample(Rng(3))), first, 0.0)
        assert np.all(first != second)
