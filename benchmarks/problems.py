"""The numbers all contenders of a workload start from, and their loss, in plain NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks.workloads import Network, Workload

Layers = list[tuple[Any, Any]]
"""Weights (d_out, d_in) and biases (d_out,); of convolutions, d_in runs over pixels of the kernel
(by rows), then over channels."""


class Problem(NamedTuple):
    """Start parameters, inputs (images as flat rows, channels last) and targets."""

    layers: Layers
    x: np.ndarray
    t: np.ndarray


def problem(workload: Workload, dtype: str = "float32") -> Problem:
    """Random numbers, the same ones each time: a step takes the same time on any data."""
    rng = np.random.default_rng(0)
    gain = 2.0 if workload.network.activation == "relu" else 1.0
    layers = []
    for layer in workload.network.affine():
        weights = rng.standard_normal((layer.d_out, layer.d_in)) * (gain / layer.d_in) ** 0.5
        layers.append((weights.astype(dtype), np.zeros(layer.d_out, dtype)))
    x = rng.random((workload.batch, workload.network.inputs)).astype(dtype)
    if workload.network.loss == "sigmoid":
        return Problem(layers, x, x)
    return Problem(layers, x, rng.integers(0, layers[-1][1].size, workload.batch))


def loss(network: Network, layers: Layers, x: np.ndarray, t: np.ndarray) -> float:
    """Mean over the examples, without any weight decay, in double precision."""
    x = np.asarray(x, np.float64)
    convolutions = len(network.channels)
    if convolutions:
        x = x.reshape(len(x), *network.image)
    for i, (weights, bias) in enumerate(layers):
        if i < convolutions:
            x = _pooled(_patches(x, network.kernel) @ weights.T + bias)
        else:
            x = x.reshape(len(x), -1) @ weights.T + bias
        if i < len(layers) - 1 and i not in network.linear:
            x = np.tanh(x) if network.activation == "tanh" else np.maximum(x, 0.0)
    if network.loss == "sigmoid":
        return float(np.mean(np.sum(np.logaddexp(0.0, x) - t * x, axis=1)))
    top = x.max(axis=1)
    log_sum = top + np.log(np.sum(np.exp(x - top[:, None]), axis=1))
    return float(np.mean(log_sum - x[np.arange(len(x)), t]))


def _patches(x: np.ndarray, kernel: int) -> np.ndarray:
    edge = kernel // 2
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(1, 2))
    n, height, width = windows.shape[:3]
    return np.moveaxis(windows, 3, -1).reshape(n, height, width, -1)


def _pooled(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows[:, ::2, ::2].max(axis=(-2, -1))
