"""The files in tests/data/reference, as networks of this library.

Numbers of curvlinops-for-pytorch 3.0.1 (float64). Its losses are those of this library: summed
over outputs, averaged over everything else, squared error with the ½.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cases import to_backend
from toys import MeanOverPositions

from kfac_np.backend import Backend
from kfac_np.layers import Dense, Layer, Logistic, ReLU, Sequential, Tanh
from kfac_np.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.trees import Tree

FOLDER = Path(__file__).parent / "data" / "reference"
LOSSES = {"mse": SquaredError(), "bce": SigmoidCrossEntropy(), "ce": SoftmaxCrossEntropy()}
PLAIN = {"tanh": Tanh, "relu": ReLU, "sigmoid": Logistic, "mean_seq": MeanOverPositions}


def names(*prefixes: str) -> list[str]:
    """Files of dense layers whose names begin so."""
    return sorted(p.stem for p in FOLDER.glob("*.npz") if p.stem.startswith(prefixes))


class Reference:
    """One file: arrays by name, and its specification."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays: Mapping[str, Any] = {key: file[key] for key in file.files}
        self.spec = json.loads(str(self.arrays["spec"]))
        self.layers = [_layer(op) for op in self.spec["layers"]]
        # Index in the network, and in the file, of each layer with parameters.
        self.positions = [i for i, layer in enumerate(self.layers) if isinstance(layer, Dense)]

    def __getitem__(self, key: str) -> Any:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    @property
    def count(self) -> int:
        """Number of layers with parameters."""
        return len(self.positions)

    def joint(self, weights: str, biases: str, part: Any = ...) -> Tree:
        """[W | b] of every layer in the structure of the parameters, e.g. of "vW" and "vb"."""
        tree: list[Any] = [()] * len(self.layers)
        for i, position in enumerate(self.positions):
            w = self[f"{weights}{i}"][part]
            if f"{biases}{i}" in self:
                w = np.concatenate([w, self[f"{biases}{i}"][part][..., None]], axis=-1)
            tree[position] = w
        return tuple(tree)

    def order(self) -> Any:
        """Indices that bring the file's flat order into the order of `trees.ravel`."""
        return np.concatenate([self[f"joint_index{i}"] for i in range(self.count)])

    def evaluate(self, backend: Backend, targets: str = "y") -> Evaluation:
        objective = Objective(Sequential(*self.layers), LOSSES[self.spec["loss"]])
        params = to_backend(backend, self.joint("W", "b"))
        return objective.evaluate(
            params, backend.asarray(self["x"]), backend.asarray(self[targets])
        )


@functools.cache
def load(name: str) -> Reference:
    """Read a file once."""
    return Reference(name)


def _layer(op: Mapping[str, Any]) -> Layer:
    if op["op"] == "linear":
        return Dense(op["d_in"], op["d_out"], bias=op["bias"])
    return PLAIN[op["op"]]()
