"""EKFAC against values computed by another library."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import to_backend
from curvature_cases import estimate
from numerics import assert_close, host
from reference_files import Reference, load, names

from kfac_np import trees
from kfac_np.backend import Backend
from kfac_np.curvature import EKFAC, expand, reduce
from kfac_np.fisher import Empirical, Exact

REFERENCES = names("inv_")
# The files have each value a second time, "_sep", with weights and biases as separate blocks. This
# library has no such blocks, a bias is a column of its matrix: those values are not read.
READ = {
    "ekfac_block",
    "ekfac_eigenvalues",
    "ekfac_mv_W",
    "ekfac_mv_b",
    "ekfac_inv_exact_W",
    "ekfac_inv_exact_b",
    "ekfac_trace",
    "ekfac_fro",
    "ekfac_logdet",
}


def of_reference(reference: Reference, backend: Backend):
    """Curvature, evaluation and moments."""
    kind = {"type-2": Exact(), "empirical": Empirical()}[reference.spec["fisher"]]
    curvature = EKFAC({"expand": expand, "reduce": reduce}[reference.spec["approx"]])
    e = reference.evaluate(backend)
    return curvature, e, estimate(curvature, e, kind)


def test_every_value_of_the_files_is_compared():
    assert len(REFERENCES) == 5
    for name in REFERENCES:
        keys = {key for key in load(name).arrays if key.startswith("ekfac") and "_sep" not in key}
        assert {key.rstrip("0123456789") for key in keys} <= READ


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_eigenvalues_and_blocks(backend: Backend, name: str):
    reference = load(name)
    curvature, e, moments = of_reference(reference, backend)
    matrix = curvature.matrix(moments, e.params)
    for i, position in enumerate(reference.positions):
        s, expected = host(moments[str(position)]["S"]), reference[f"ekfac_eigenvalues{i}"]
        assert s.shape == expected.shape
        # eigenvectors belong to factors of condition 1e2..1e4, and so do the digits that are left
        assert_close(np.sort(s, axis=None), np.sort(expected, axis=None))
        assert_close(matrix.blocks[position].to_dense(), reference.block("ekfac", i))


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_products_and_inverses(backend: Backend, name: str):
    reference = load(name)
    curvature, e, moments = of_reference(reference, backend)
    matrix, damping = curvature.matrix(moments, e.params), reference.spec["damping"]["exact"]
    factors, events = curvature.factorise(moments, damping)
    assert not events
    for part in range(2):
        v = to_backend(backend, reference.joint("vW", "vb", part))
        for found, key in (
            (matrix.matvec(v), "ekfac_mv"),
            (matrix.solve(v, damping), "ekfac_inv_exact"),
            (curvature.solve(factors, v), "ekfac_inv_exact"),
        ):
            expected = reference.joint(f"{key}_W", f"{key}_b", part)
            for a, b in zip(trees.leaves(found), trees.leaves(expected), strict=True):
                assert_close(a, b)


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_scalars(backend: Backend, name: str):
    reference = load(name)
    curvature, e, moments = of_reference(reference, backend)
    matrix = curvature.matrix(moments, e.params)
    assert_close(matrix.trace(), reference["ekfac_trace"])
    assert_close(matrix.frobenius_norm(), reference["ekfac_fro"])
    logdet = float(host(matrix.logdet()))
    if "ekfac_logdet" not in reference:  # a softmax output: G has the null vector of ones
        assert logdet == -math.inf
        return
    condition = max(reference.spec["cond_A_max"], reference.spec["cond_G_max"])
    assert logdet == pytest.approx(float(reference["ekfac_logdet"]), abs=1e-14 * condition)
