"""The files in tests/data/reference and tests/data/applications, as networks of this library.

Images are (N, C, H, W) in the files and (N, H, W, C) here, where a kernel's columns run over taps,
then channels: they are permuted when a file is read, as are the columns of what follows `flatten`.

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

from kfac_np.backend import Backend
from kfac_np.layers import (
    AveragePool,
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    Logistic,
    MaxPool,
    ReLU,
    Sequential,
    Tanh,
)
from kfac_np.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.trees import Tree

FOLDER = Path(__file__).parent / "data" / "reference"
APPLICATIONS = FOLDER.with_name("applications")
LOSSES = {"mse": SquaredError(), "bce": SigmoidCrossEntropy(), "ce": SoftmaxCrossEntropy()}
PLAIN = {
    "tanh": Tanh,
    "relu": ReLU,
    "sigmoid": Logistic,
    "flatten": Flatten,
    "gap": GlobalAveragePool,
    "mean_seq": GlobalAveragePool,
}
POOLS = {"avgpool": AveragePool, "maxpool": MaxPool}


def names(*prefixes: str, folder: Path = FOLDER) -> list[str]:
    """Files whose names begin so."""
    return sorted(p.stem for p in folder.glob("*.npz") if p.stem.startswith(prefixes))


class Reference:
    """One file: arrays by name, and its specification."""

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        with np.load(folder / f"{name}.npz") as file:
            self.arrays: Mapping[str, Any] = {key: file[key] for key in file.files}
        self.spec = json.loads(str(self.arrays["spec"]))
        self.layers = [_layer(op) for op in self.spec["layers"]]
        # Index in the network, and in the file, of each layer with parameters.
        self.positions = [
            i for i, layer in enumerate(self.layers) if isinstance(layer, Dense | Conv)
        ]
        self.images = any(isinstance(layer, Conv) for layer in self.layers)
        self.columns = self._columns()

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
            w = w.reshape(w.shape[0], -1)
            if f"{biases}{i}" in self:
                w = np.concatenate([w, self[f"{biases}{i}"][part][..., None]], axis=-1)
            w, groups = w[:, self.columns[i]], self.groups(i)
            tree[position] = w if groups == 1 else w.reshape(groups, -1, w.shape[-1])
        return tuple(tree)

    def groups(self, i: int) -> int:
        """Number of groups of the i-th layer with parameters."""
        return getattr(self.layers[self.positions[i]], "groups", 1)

    def factor(self, name: str, i: int, kind: str) -> Any:
        """The file's A or G of a layer, of a grouped one those of all groups, stacked."""
        suffixes = [""] if self.groups(i) == 1 else [f"_g{q}" for q in range(self.groups(i))]
        found = [self[f"{name}{i}_{kind}{suffix}"] for suffix in suffixes]
        if name == "A":
            found = [a[np.ix_(self.columns[i], self.columns[i])] for a in found]
        return found[0] if self.groups(i) == 1 else np.stack(found)

    def block(self, name: str, i: int) -> Any:
        """A layer's diagonal block of the file's matrix "ggn" or "ef"."""
        if name in self:
            index = self[f"joint_index{i}"][self._joint_order(i)]
            return self[name][np.ix_(index, index)]
        order = self._joint_order(i)
        return self[f"{name}_block{i}"][np.ix_(order, order)]

    def order(self) -> Any:
        """Indices that bring the file's flat order into the order of `trees.ravel`."""
        each = [self[f"joint_index{i}"][self._joint_order(i)] for i in range(self.count)]
        return np.concatenate(each)

    def _joint_order(self, i: int) -> Any:
        """Indices that bring the file's order of [W | b] into this library's."""
        rows, columns = len(self[f"W{i}"]), self.columns[i]
        return (np.arange(rows)[:, None] * len(columns) + columns).ravel()

    def _columns(self) -> list[Any]:
        """For each layer with parameters: which of the file's columns of [W | b] are ours."""
        shape = self.inputs.shape[1:]
        found, flattened = [], None
        for layer in self.layers:
            if isinstance(layer, Flatten):
                flattened = shape
            if isinstance(layer, Dense | Conv):
                d = layer.d_in if isinstance(layer, Dense) else layer.kernel_columns
                columns = np.arange(d)
                if isinstance(layer, Conv):
                    columns = _channels_last(columns, layer.kernel)
                elif flattened:
                    columns = _channels_last(columns, flattened[:-1])
                flattened = None
                found.append(np.append(columns, d) if layer.bias else columns)
            shape = layer.output_shape(shape)
        return found

    @property
    def inputs(self) -> Any:
        """x, channels last."""
        return self.channels_last("x" if "x" in self else "x1")

    def channels_last(self, name: str) -> Any:
        """Inputs of that name in this library's layout."""
        return np.moveaxis(self[name], 1, -1) if self.images else self[name]

    @property
    def objective(self) -> Objective:
        """The network and its loss."""
        return Objective(Sequential(*self.layers), LOSSES[self.spec["loss"]])

    def evaluate(self, backend: Backend, targets: str = "y") -> Evaluation:
        params = to_backend(backend, self.joint("W", "b"))
        return self.objective.evaluate(
            params, backend.asarray(self.inputs), backend.asarray(self[targets])
        )


@functools.cache
def load(name: str, folder: Path = FOLDER) -> Reference:
    """Read a file once."""
    return Reference(name, folder)


def _layer(op: Mapping[str, Any]) -> Layer:
    if op["op"] == "linear":
        return Dense(op["d_in"], op["d_out"], bias=op["bias"])
    if op["op"].startswith("conv"):
        kernel, stride, padding, dilation = (
            _tuple(op[name]) for name in ("kernel", "stride", "padding", "dilation")
        )
        options = {"padding": padding, "groups": op["groups"], "bias": op["bias"]}
        return Conv(op["c_in"], op["c_out"], kernel, stride, dilation, **options)
    if op["op"][:7] in POOLS:
        return POOLS[op["op"][:7]](_tuple(op["kernel"]), _tuple(op["stride"]))
    return PLAIN[op["op"]]()


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _channels_last(columns: Any, spatial: tuple[int, ...]) -> Any:
    """Columns that run over (channels, *spatial), in the order (*spatial, channels)."""
    return np.moveaxis(columns.reshape(-1, *spatial), 0, -1).ravel()
