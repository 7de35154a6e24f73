"""Values, gradients and products computed by another library: see data/reference/README.md.

Its Kronecker factors and inverses are compared in curvature/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import to_backend
from numerics import assert_close
from toys import MeanOverPositions

from kfac_np import products, trees
from kfac_np.backend import Backend, Rng, to_numpy
from kfac_np.fisher import Empirical, Exact
from kfac_np.layers import Dense, Layer, Logistic, ReLU, Sequential, Tanh
from kfac_np.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.trees import Tree

FOLDER = Path(__file__).parent / "data" / "reference"
FILES = sorted(path.stem for path in FOLDER.glob("*.npz"))
PRODUCTS = [name for name in FILES if name.startswith("mv_")]
MATRICES = [name for name in FILES if name.startswith(("mlp_", "seq_"))]
LOSSES = {"mse": SquaredError(), "bce": SigmoidCrossEntropy(), "ce": SoftmaxCrossEntropy()}
PLAIN = {"tanh": Tanh(), "relu": ReLU(), "sigmoid": Logistic(), "mean_seq": MeanOverPositions()}


class File:
    """One file, and the network that it describes."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.spec = json.loads(str(self.arrays["spec"]))
        self.layers = [self.layer(**op) for op in self.spec["layers"]]

    def layer(self, op: str, **settings: Any) -> Layer:
        if op == "linear":
            return Dense(settings["d_in"], settings["d_out"], bias=settings["bias"])
        return PLAIN[op]

    def tree(self, weights: str, biases: str, part: Any = ...) -> Tree:
        """[W | b] of all layers from the arrays of these names."""
        found, i = [], 0
        for layer in self.layers:
            if not isinstance(layer, Dense):
                found.append(())
                continue
            w = self.arrays[f"{weights}{i}"][part]
            if layer.bias:
                b = self.arrays[f"{biases}{i}"][part]
                w = np.concatenate([w, b[:, None]], axis=1)
            found.append(w)
            i += 1
        return tuple(found)

    def matrix(self, name: str) -> np.ndarray[Any, Any]:
        """A matrix over all parameters, in the order of `trees.ravel`."""
        count = sum(isinstance(layer, Dense) for layer in self.layers)
        order = np.concatenate([self.arrays[f"joint_index{i}"] for i in range(count)])
        return self.arrays[name][np.ix_(order, order)]

    def evaluate(self, backend: Backend) -> Evaluation:
        objective = Objective(Sequential(*self.layers), LOSSES[self.spec["loss"]])
        x, t = (backend.asarray(self.arrays[key]) for key in ("x", "y"))
        return objective.evaluate(to_backend(backend, self.tree("W", "b")), x, t)


def test_files_are_there():
    assert (len(FILES), len(PRODUCTS), len(MATRICES)) == (19, 3, 12)


@pytest.mark.parametrize("name", FILES)
def test_outputs_value_and_gradient(name: str, backend: Backend):
    file = File(name)
    e = file.evaluate(backend)
    assert_close(e.outputs, file.arrays["out"])
    assert e.value == pytest.approx(float(file.arrays["loss"]), rel=1e-12)
    assert_close(e.gradient(), file.tree("gW", "gb"))


@pytest.mark.parametrize(
    ("fisher", "key"), [(Exact(), "ggn"), (Exact(1), "ggn"), (Empirical(), "ef")]
)
@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name: str, fisher: Exact | Empirical, key: str, backend: Backend):
    file = File(name)
    e = file.evaluate(backend)
    total = 0.0
    for statistics in fisher.statistics(e, Rng(0)):
        each = [to_numpy(s.per_example()) for s in trees.leaves(statistics)]
        rows = np.concatenate([u.reshape(u.shape[0] * u.shape[1], -1) for u in each], axis=1)
        total = total + rows.T @ rows / e.scale.terms
    assert_close(total, file.matrix(key))


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, part: int, backend: Backend):
    file = File(name)
    e, v = file.evaluate(backend), to_backend(backend, file.tree("vW", "vb", part))
    for key, product in (
        ("ggn", products.ggn_product(e, v)),
        ("ef", products.fisher_product(e, v, Empirical())),
        ("hess", products.hessian_product(e, v)),
    ):
        assert_close(product, file.tree(f"{key}_vp_W", f"{key}_vp_b", part))
