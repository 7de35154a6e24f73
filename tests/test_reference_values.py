"""Values, gradients and products computed by another library: see data/reference/README.md.

Its Kronecker factors and inverses are compared in curvature/.
"""

from __future__ import annotations

import numpy as np
import pytest
from cases import to_backend
from numerics import assert_close
from reference_files import load, names

from kfac_np import products, trees
from kfac_np.backend import Backend, Rng, to_numpy
from kfac_np.fisher import Empirical, Exact

FILES = names("mlp_", "seq_", "cnn", "inv_", "mv_")
PRODUCTS = names("mv_")
MATRICES = [name for name in names("mlp_", "seq_", "cnn") if "ggn" in load(name)]


def test_files_are_there():
    assert (len(FILES), len(PRODUCTS), len(MATRICES)) == (27, 4, 13)


@pytest.mark.parametrize("name", FILES)
def test_outputs_value_and_gradient(name: str, backend: Backend):
    file = load(name)
    e = file.evaluate(backend)
    assert_close(e.outputs, file["out"])
    assert e.value == pytest.approx(float(file["loss"]), rel=1e-12)
    assert_close(e.gradient(), file.joint("gW", "gb"))


@pytest.mark.parametrize(
    ("fisher", "key"), [(Exact(), "ggn"), (Exact(1), "ggn"), (Empirical(), "ef")]
)
@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name: str, fisher: Exact | Empirical, key: str, backend: Backend):
    file = load(name)
    e = file.evaluate(backend)
    total = 0.0
    for statistics in fisher.statistics(e, Rng(0)):
        each = [to_numpy(s.per_example()) for s in trees.leaves(statistics)]
        rows = np.concatenate([u.reshape(u.shape[0] * u.shape[1], -1) for u in each], axis=1)
        total = total + rows.T @ rows / e.scale.terms
    assert_close(total, file[key][np.ix_(file.order(), file.order())])


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, part: int, backend: Backend):
    file = load(name)
    e, v = file.evaluate(backend), to_backend(backend, file.joint("vW", "vb", part))
    for key, product in (
        ("ggn", products.ggn_product(e, v)),
        ("ef", products.fisher_product(e, v, Empirical())),
        ("hess", products.hessian_product(e, v)),
    ):
        assert_close(product, file.joint(f"{key}_vp_W", f"{key}_vp_b", part))
