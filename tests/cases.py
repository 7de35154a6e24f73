"""The case tables: every law runs on every entry.

A new layer, loss or network is one entry here. Data are drawn by NumPy from a seed made of the
case's name and moved to the backend under test, so that all backends see the same numbers.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import autograd.numpy as anp
import numpy as np
from toys import MaskedDropout, MeanOverPositions, MixPositions, Scaling, Softsign

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.layers import (
    GELU,
    Activation,
    AdaptiveAveragePool,
    AveragePool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    GlobalAveragePool,
    GlobalMaxPool,
    GroupNorm,
    Identity,
    Layer,
    LayerNorm,
    LeakyReLU,
    Logistic,
    MaxPool,
    MultiHeadAttention,
    Recurrent,
    ReLU,
    Reshape,
    Residual,
    RMSNorm,
    Sequential,
    SiLU,
    Softplus,
    Tanh,
    Tied,
)
from kfac_np.losses import (
    Loss,
    PoissonLogRate,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from kfac_np.objective import Evaluation, Objective
from kfac_np.trees import Tree

HostArray = np.ndarray[Any, Any]


def generator(name: str) -> np.random.Generator:
    """Random numbers for the case of that name."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def host_params(layer: Layer, seed: np.random.Generator, scale: float = 0.6) -> Tree:
    """Normal parameters of standard deviation `scale`, biases too, in double precision."""
    start = layer.init(Rng(0), get_backend("numpy", "float64"))
    return trees.tree_map(lambda w: scale * seed.standard_normal(w.shape), start)


def host_inputs(seed: np.random.Generator, shape: tuple[int, ...], classes: int) -> HostArray:
    """Standard normal numbers, or integers below `classes`."""
    return seed.integers(0, classes, shape) if classes else seed.standard_normal(shape)


def to_backend(backend: Backend, tree: Tree) -> Tree:
    """Move a tree of host arrays."""
    return trees.tree_map(backend.asarray, tree)


# ---------------------------------------------------------------------------------------- layers


def parts(layer: Layer) -> list[Layer]:
    """A layer and all that it is made of."""
    return [layer, *(part for child in trees.leaves(layer.children) for part in parts(child))]


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of a batch of inputs, N first.

    Where `classes` is given, inputs are integers below it. `definition` is the map of the layer in
    autograd.numpy, (params, x) -> y; without it, what tests/references/networks.py says.
    """

    name: str
    layer: Layer
    shape: tuple[int, ...]
    classes: int = 0
    definition: Callable[[Tree, Any], Any] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def has_hessian(self) -> bool:
        """Whether it has second derivatives, which layers of the library must have."""
        return not any(isinstance(part, Scaling | Softsign) for part in parts(self.layer))

    def host(self) -> tuple[Tree, HostArray]:
        """Parameters and inputs on the host."""
        seed = generator(self.name)
        return host_params(self.layer, seed), host_inputs(seed, self.shape, self.classes)

    def build(self, backend: Backend) -> tuple[Tree, Any]:
        """Parameters and inputs on the backend."""
        params, x = self.host()
        return to_backend(backend, params), backend.asarray(x)


ACTIVATIONS: list[Activation] = [
    Identity(),
    Tanh(),
    Logistic(),
    ReLU(),
    LeakyReLU(),
    LeakyReLU(0.3),
    LeakyReLU(0.0),
    LeakyReLU(1.0),
    Softplus(),
    SiLU(),
    GELU(),
]

LAYERS: list[LayerCase] = [
    LayerCase("dense", Dense(3, 4), (5, 3)),
    LayerCase("dense_no_bias", Dense(3, 4, bias=False), (5, 3)),
    LayerCase("dense_one_example", Dense(3, 2), (1, 3)),
    LayerCase("dense_one_input_one_unit", Dense(1, 1), (4, 1)),
    LayerCase("dense_sequence", Dense(3, 2), (4, 5, 3)),
    LayerCase("dense_sequence_no_bias", Dense(3, 2, bias=False), (4, 5, 3)),
    LayerCase("dense_two_shared_axes", Dense(2, 3), (3, 2, 4, 2)),
    *(LayerCase(f"{a!r}", a, (4, 6)) for a in ACTIVATIONS),
    LayerCase("softsign", Softsign(), (4, 6), definition=lambda _, x: x / (1.0 + anp.abs(x))),
    LayerCase("tanh_image", Tanh(), (2, 3, 2, 2)),
    LayerCase("flatten_image", Flatten(), (3, 2, 3, 2)),
    LayerCase("flatten_vector", Flatten(), (3, 4)),
    LayerCase("sequential_one", Sequential(Dense(3, 2)), (4, 3)),
    LayerCase("sequential_mlp", Sequential(Dense(3, 4), Tanh(), Dense(4, 2)), (5, 3)),
    LayerCase("sequential_without_parameters", Sequential(Tanh(), Flatten()), (3, 2, 2)),
    LayerCase(
        "sequential_begins_without_parameters",
        Sequential(Flatten(), Tanh(), Dense(6, 3)),
        (4, 2, 3),
    ),
    LayerCase("sequential_ends_with_activation", Sequential(Dense(3, 2), Softplus()), (4, 3)),
    LayerCase(
        "sequential_nested",
        Sequential(
            Sequential(Tanh()),
            Sequential(Dense(3, 4), Sequential(GELU(), Dense(4, 3, bias=False))),
            Logistic(),
            Dense(3, 2),
        ),
        (4, 3),
    ),
    LayerCase(
        "sequential_sequence", Sequential(Dense(2, 3), SiLU(), Flatten(), Dense(9, 2)), (4, 3, 2)
    ),
    LayerCase("residual_dense", Residual(Dense(3, 3)), (4, 3)),
    LayerCase("residual_activation", Residual(Tanh()), (4, 3)),
    LayerCase("residual_mlp", Residual(Sequential(Dense(3, 5), Tanh(), Dense(5, 3))), (4, 3)),
    LayerCase(
        "residual_in_sequential",
        Sequential(
            Dense(2, 3),
            Residual(Sequential(Logistic(), Dense(3, 3), Residual(Dense(3, 3, bias=False)))),
            Tanh(),
            Dense(3, 2),
        ),
        (4, 2),
    ),
    LayerCase("mix_positions", MixPositions(), (3, 4, 2)),
    LayerCase("mean_over_positions", MeanOverPositions(), (3, 4, 2)),
    LayerCase("conv1d", Conv(2, 3, (3,)), (3, 6, 2)),
    LayerCase("conv2d", Conv(2, 3, (3, 2)), (3, 4, 5, 2)),
    LayerCase("conv2d_no_bias_same", Conv(2, 3, (3, 3), padding="same", bias=False), (2, 4, 3, 2)),
    LayerCase("conv2d_strided", Conv(1, 2, (3, 3), stride=2, padding=1), (2, 6, 5, 1)),
    LayerCase(
        "conv2d_same_strided", Conv(1, 2, (4, 3), stride=(3, 2), padding="same"), (2, 7, 6, 1)
    ),
    LayerCase("conv2d_dilated", Conv(2, 2, (3, 2), dilation=(2, 3), padding=(1, 2)), (2, 5, 6, 2)),
    LayerCase(
        "conv2d_all",
        Conv(2, 4, (2, 3), stride=(2, 1), dilation=(1, 2), padding=((2, 1), (0, 3)), groups=2),
        (3, 5, 6, 2),
    ),
    LayerCase("conv2d_grouped", Conv(4, 6, (2, 2), groups=2), (3, 4, 3, 4)),
    LayerCase(
        "conv2d_depthwise", Conv(3, 6, (3, 3), groups=3, padding=1, bias=False), (2, 4, 3, 3)
    ),
    LayerCase("conv2d_pixelwise", Conv(3, 2, (1, 1)), (2, 3, 2, 3)),
    LayerCase("conv2d_cropped", Conv(2, 2, (2, 2), padding=((-1, 0), (1, -2))), (2, 5, 6, 2)),
    LayerCase("conv2d_in_chunks", Conv(2, 3, (3, 3), padding=1, budget_bytes=1), (4, 4, 3, 2)),
    LayerCase("conv3d", Conv(2, 2, (2, 3, 2), stride=(1, 2, 1), padding=1), (2, 3, 4, 2, 2)),
    LayerCase(
        "conv_transpose_of_which_only_output_padding_is_left",
        ConvTranspose(1, 2, (1,), stride=3, padding=1, output_padding=2),
        (2, 1, 1),
    ),
    LayerCase("conv_transpose1d", ConvTranspose(2, 3, (4,), stride=2, padding=1), (2, 5, 2)),
    LayerCase(
        "conv_transpose2d",
        ConvTranspose(2, 4, (3, 2), stride=(2, 3), padding=1, output_padding=1, groups=2),
        (2, 3, 4, 2),
    ),
    LayerCase(
        "conv_transpose2d_dilated",
        ConvTranspose(1, 2, (3, 2), stride=2, dilation=2, padding=((0, 5), (2, 1)), bias=False),
        (2, 4, 3, 1),
    ),
    LayerCase(
        "residual_shortcut",
        Residual(
            Sequential(Conv(2, 3, (3, 3), stride=2, padding=1), Tanh()),
            shortcut=Conv(2, 3, (1, 1), stride=2, bias=False),
        ),
        (2, 5, 4, 2),
    ),
    LayerCase(
        "convolutional_network",
        Sequential(
            Conv(1, 2, (3, 3), padding=1), Tanh(), Conv(2, 2, (2, 2)), Flatten(), Dense(12, 2)
        ),
        (3, 4, 3, 1),
    ),
    LayerCase("attention", MultiHeadAttention(4, 2), (2, 3, 4)),
    LayerCase("attention_causal", MultiHeadAttention(3, 3, causal=True), (2, 4, 3)),
    LayerCase("attention_no_bias", MultiHeadAttention(2, 1, bias=False), (3, 2, 2)),
    LayerCase("attention_of_one_position", MultiHeadAttention(2, 2), (3, 1, 2)),
    LayerCase("tied", Tied((Dense(3, 3), Tanh()), order=(0, 1, 0, 1, 0)), (4, 3)),
    LayerCase(
        "tied_parts", Tied((Tanh(), Dense(2, 2, bias=False), Dense(2, 2)), (0, 2, 1, 2)), (3, 2)
    ),
    LayerCase("tied_convolutions", Tied((Conv(1, 1, (2,), padding=1),), (0, 0, 0)), (2, 3, 1)),
    LayerCase(
        "tied_grouped_convolutions",
        Tied((Conv(2, 2, (3,), padding=1, groups=2), SiLU()), (0, 1, 0)),
        (2, 4, 2),
    ),
    LayerCase("tied_scale_and_shift", Tied((LayerNorm(3),), (0, 0)), (2, 2, 3)),
    LayerCase(
        "tied_nested",
        Sequential(Dense(1, 2), Tied((Residual(Tied((Dense(2, 2), Tanh()), (0, 1, 0))),), (0, 0))),
        (3, 1),
    ),
    LayerCase("recurrent", Recurrent(Sequential(Dense(5, 3), Tanh()), 3), (3, 4, 2)),
    LayerCase("recurrent_linear", Recurrent(Dense(3, 2, bias=False), 2), (2, 3, 1)),
    LayerCase("recurrent_one_position", Recurrent(Sequential(Tanh(), Dense(3, 2)), 2), (3, 1, 1)),
    LayerCase(
        "recurrent_deep",
        Recurrent(Tied((Dense(3, 3), SiLU(), Dense(3, 2)), (0, 1, 0, 2)), 2),
        (2, 3, 1),
    ),
    LayerCase("reshape", Reshape((3, -1, 2)), (2, 4, 6)),
    LayerCase("max_pool", MaxPool((2, 2)), (3, 4, 5, 2)),
    LayerCase("max_pool_overlapping", MaxPool((3, 2), stride=(2, 1), padding=1), (2, 6, 3, 2)),
    LayerCase("max_pool_sparse", MaxPool((2,), stride=3, padding=((1, 0),)), (3, 8, 2)),
    LayerCase("max_pool_cropped", MaxPool((2, 3), padding=((-1, 1), (0, -1))), (2, 5, 7, 1)),
    LayerCase("max_pool3d", MaxPool((2, 1, 2)), (2, 2, 3, 4, 2)),
    LayerCase("max_pool_of_one", MaxPool((1, 1), stride=2), (2, 3, 4, 1)),
    LayerCase("average_pool", AveragePool((2, 2)), (3, 4, 5, 2)),
    LayerCase(
        "average_pool_overlapping", AveragePool((3, 2), stride=(2, 1), padding=1), (2, 6, 3, 2)
    ),
    LayerCase("average_pool_uneven", AveragePool((2,), stride=3, padding=((3, -1),)), (3, 8, 2)),
    LayerCase("average_pool3d", AveragePool((1, 2, 2), stride=1), (2, 2, 3, 4, 2)),
    LayerCase("adaptive_average_pool", AdaptiveAveragePool((3, 2)), (2, 7, 4, 2)),
    LayerCase("adaptive_average_pool_enlarging", AdaptiveAveragePool((5,)), (2, 3, 2)),
    LayerCase("global_average_pool", GlobalAveragePool(), (3, 4, 3, 2)),
    LayerCase("global_average_pool_sequence", GlobalAveragePool(), (3, 4, 2)),
    LayerCase("global_max_pool", GlobalMaxPool(), (3, 4, 3, 2)),
    LayerCase("layer_norm", LayerNorm(4), (3, 4)),
    LayerCase("layer_norm_sequence", LayerNorm(3, epsilon=0.1), (2, 4, 3)),
    LayerCase("layer_norm_without_parameters", LayerNorm(4, affine=False), (3, 4)),
    LayerCase("rms_norm", RMSNorm(4), (3, 4)),
    LayerCase("rms_norm_image", RMSNorm(2, epsilon=0.1), (2, 3, 2, 2)),
    LayerCase("rms_norm_without_parameters", RMSNorm(3, affine=False), (2, 2, 3)),
    LayerCase("group_norm", GroupNorm(2, 4), (2, 3, 2, 4)),
    LayerCase("group_norm_of_one_group", GroupNorm(1, 4), (3, 4)),
    LayerCase("group_norm_of_each_channel", GroupNorm(3, 3, affine=False), (2, 4, 3)),
    LayerCase("batch_norm", BatchNorm(3), (5, 3)),
    LayerCase("batch_norm_image", BatchNorm(2, epsilon=0.1), (3, 2, 3, 2)),
    LayerCase("batch_norm_of_one_example", BatchNorm(2), (1, 4, 2)),
    LayerCase("batch_norm_without_parameters", BatchNorm(2, affine=False), (4, 2)),
    LayerCase(
        "batch_norm_in_sequential",
        Sequential(Dense(2, 3), BatchNorm(3), Tanh(), Dense(3, 2)),
        (4, 2),
    ),
    LayerCase(
        "batch_norm_in_residual",
        Residual(
            Sequential(Conv(1, 2, (2,), bias=False), BatchNorm(2), Softplus()),
            shortcut=Sequential(Conv(1, 2, (2,), bias=False), BatchNorm(2, affine=False)),
        ),
        (3, 4, 1),
    ),
    LayerCase("dropout", Dropout(0.5), (3, 4)),
    LayerCase("dropout_with_a_mask", MaskedDropout(0.4), (4, 3, 2)),
    LayerCase("embedding", Embedding(4, 2), (5, 3), classes=4),
    LayerCase("embedding_two_axes", Embedding(3, 2), (2, 2, 3), classes=3),
    LayerCase("embedding_of_one", Embedding(1, 1), (2, 1), classes=1),
    LayerCase(
        "embedding_in_sequential",
        Sequential(Embedding(3, 2), Tanh(), Flatten(), Dense(4, 2)),
        (3, 2),
        classes=3,
    ),
    # Parameters in dicts, vectors and numbers.
    LayerCase("scaling", Scaling(3), (4, 3)),
    LayerCase("scaling_positions", Scaling(2), (3, 4, 2)),
    LayerCase("scaling_in_sequential", Sequential(Tanh(), Scaling(3), Dense(3, 2)), (4, 3)),
]

# ---------------------------------------------------------------------------------------- losses

Targets = Callable[[np.random.Generator, tuple[int, ...]], HostArray]
"""(seed, shape of the outputs) -> targets on the host."""


def real_targets(seed: np.random.Generator, shape: tuple[int, ...]) -> HostArray:
    return seed.standard_normal(shape)


def unit_targets(seed: np.random.Generator, shape: tuple[int, ...]) -> HostArray:
    """Anywhere in [0, 1], the ends included."""
    t = seed.random(shape)
    t.flat[0], t.flat[-1] = 0.0, 1.0
    return t


def binary_targets(seed: np.random.Generator, shape: tuple[int, ...]) -> HostArray:
    return seed.integers(0, 2, shape).astype(float)


def class_targets(seed: np.random.Generator, shape: tuple[int, ...]) -> HostArray:
    return seed.integers(0, shape[-1], shape[:-1])


def soft_targets(seed: np.random.Generator, shape: tuple[int, ...]) -> HostArray:
    t = seed.random(shape)
    return t / t.sum(-1, keepdims=True)


def count_targets(seed: np.random.Generator, shape: tuple[int, ...]) -> HostArray:
    return seed.poisson(2.0, shape).astype(float)


@dataclass(frozen=True)
class LossCase:
    """A loss, the shape (N, [S,] C) of the outputs, and a kind of targets.

    Outputs may grow to `largest` before anything overflows.
    """

    name: str
    loss: Loss
    shape: tuple[int, ...]
    targets: Targets
    largest: float = 1e4

    def __str__(self) -> str:
        return self.name

    def host(self) -> tuple[HostArray, HostArray]:
        """Outputs z and targets t on the host."""
        seed = generator(self.name)
        z = 1.5 * seed.standard_normal(self.shape)
        return z, self.targets(seed, self.shape)

    def build(self, backend: Backend) -> tuple[Any, Any]:
        """Outputs z and targets t on the backend."""
        z, t = self.host()
        return backend.asarray(z), backend.asarray(t)


LOSSES: list[LossCase] = [
    LossCase("squared", SquaredError(), (4, 3), real_targets),
    LossCase("squared_one_output", SquaredError(), (4, 1), real_targets),
    LossCase("squared_positions", SquaredError(), (3, 2, 3), real_targets),
    LossCase("sigmoid", SigmoidCrossEntropy(), (4, 3), unit_targets),
    LossCase("sigmoid_binary", SigmoidCrossEntropy(), (4, 1), binary_targets),
    LossCase("sigmoid_positions", SigmoidCrossEntropy(), (3, 2, 3), unit_targets),
    LossCase("softmax", SoftmaxCrossEntropy(), (4, 3), class_targets),
    LossCase("softmax_soft", SoftmaxCrossEntropy(), (4, 3), soft_targets),
    LossCase("softmax_one_class", SoftmaxCrossEntropy(), (2, 1), class_targets),
    LossCase("softmax_positions", SoftmaxCrossEntropy(), (3, 2, 4), class_targets),
    LossCase("softmax_soft_positions", SoftmaxCrossEntropy(), (3, 2, 4), soft_targets),
    # A rate of e^709 is the largest that a double holds.
    LossCase("poisson", PoissonLogRate(), (4, 3), count_targets, largest=700.0),
    LossCase("poisson_positions", PoissonLogRate(), (3, 2, 2), count_targets, largest=700.0),
]

# -------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Problem:
    """A network case on one backend."""

    objective: Objective
    params: Tree
    x: Any
    t: Any
    weights: Any

    def evaluate(self) -> Evaluation:
        """Evaluate the whole batch."""
        return self.objective.evaluate(self.params, self.x, self.t, self.weights)


@dataclass(frozen=True)
class NetworkCase:
    """A network, a loss and a batch.

    `kfac_exact` names the sharing rules ("expand", "reduce") with which every K-FAC block of the
    exact Fisher equals the exact block. Where `classes` is given, inputs are whole
    numbers below it.
    """

    name: str
    network: Layer
    shape: tuple[int, ...]
    loss: Loss
    targets: Targets
    weighted: bool = False
    kfac_exact: tuple[str, ...] = ()
    classes: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.shape[0], *self.network.output_shape(self.shape[1:]))

    @property
    def terms(self) -> int:
        """M."""
        return int(np.prod(self.output_shape[:-1]))

    @property
    def coupled(self) -> bool:
        """Whether examples influence each other."""
        return self.network.couples_examples

    @property
    def fewest(self) -> int:
        """The least number of examples that can be evaluated: one has no variance."""
        return 2 if self.coupled else 1

    @property
    def reducible(self) -> bool:
        """Whether reduced factors are defined: one loss term an example, no coupling, and A of
        embeddings diagonal."""
        several = self.classes and int(np.prod(self.shape[1:])) > 1
        return self.terms == self.shape[0] and not self.coupled and not several

    @functools.cache  # noqa: B019 - the table lives as long as the tests
    def host(self) -> tuple[Tree, HostArray, HostArray, HostArray | None]:
        """Parameters, x, t and weights on the host."""
        seed = generator(self.name)
        params = host_params(self.network, seed)
        x = host_inputs(seed, self.shape, self.classes)
        t = self.targets(seed, self.output_shape)
        weights = seed.uniform(0.2, 2.0, self.shape[0]) if self.weighted else None
        return params, x, t, weights

    def build(self, backend: Backend) -> Problem:
        """The same on the backend."""
        params, x, t, weights = self.host()
        return Problem(
            Objective(self.network, self.loss),
            to_backend(backend, params),
            backend.asarray(x),
            backend.asarray(t),
            None if weights is None else backend.asarray(weights),
        )

    def tangent(self, backend: Backend, key: int = 0) -> Tree:
        """A random tree like the parameters."""
        seed = generator(f"{self.name} tangent {key}")
        return to_backend(
            backend, trees.tree_map(lambda w: seed.standard_normal(w.shape), self.host()[0])
        )


SQUARED, SIGMOID = SquaredError(), SigmoidCrossEntropy()
SOFTMAX, POISSON = SoftmaxCrossEntropy(), PoissonLogRate()
BOTH = ("expand", "reduce")

NETWORKS: list[NetworkCase] = [
    NetworkCase("dense_alone", Dense(3, 2), (5, 3), SQUARED, real_targets, kfac_exact=BOTH),
    NetworkCase(
        "deep_linear",
        Sequential(Dense(3, 4), Dense(4, 2), Identity(), Dense(2, 3)),
        (6, 3),
        SQUARED,
        real_targets,
        kfac_exact=BOTH,
    ),
    NetworkCase(
        "deep_linear_no_bias",
        Sequential(Dense(3, 4, bias=False), Dense(4, 2, bias=False)),
        (6, 3),
        SQUARED,
        real_targets,
        kfac_exact=BOTH,
    ),
    NetworkCase(
        "one_example_softmax",
        Sequential(Dense(3, 4), Tanh(), Dense(4, 3)),
        (1, 3),
        SOFTMAX,
        class_targets,
        kfac_exact=BOTH,
    ),
    NetworkCase(
        "one_example_poisson",
        Sequential(Dense(2, 3, bias=False), Softplus(), Dense(3, 2, bias=False)),
        (1, 2),
        POISSON,
        count_targets,
        kfac_exact=BOTH,
    ),
    NetworkCase(
        "tanh_squared", Sequential(Dense(3, 4), Tanh(), Dense(4, 2)), (5, 3), SQUARED, real_targets
    ),
    NetworkCase(
        "relu_softmax",
        Sequential(Dense(3, 5), ReLU(), Dense(5, 4), ReLU(), Dense(4, 3)),
        (6, 3),
        SOFTMAX,
        class_targets,
    ),
    NetworkCase(
        "leaky_softmax_soft",
        Sequential(Dense(3, 4), LeakyReLU(0.1), Dense(4, 3, bias=False)),
        (5, 3),
        SOFTMAX,
        soft_targets,
    ),
    NetworkCase(
        "logistic_sigmoid",
        Sequential(Dense(4, 3), Logistic(), Dense(3, 2), Logistic(), Dense(2, 4)),
        (5, 4),
        SIGMOID,
        unit_targets,
    ),
    NetworkCase(
        "gelu_poisson", Sequential(Dense(3, 4), GELU(), Dense(4, 2)), (5, 3), POISSON, count_targets
    ),
    NetworkCase(
        "silu_softplus_sigmoid",
        Sequential(Dense(3, 3), SiLU(), Dense(3, 3, bias=False), Softplus(), Dense(3, 1)),
        (5, 3),
        SIGMOID,
        binary_targets,
    ),
    NetworkCase(
        "ends_with_activation",
        Sequential(Tanh(), Dense(3, 2), Softplus()),
        (5, 3),
        SQUARED,
        real_targets,
    ),
    NetworkCase(
        "residual_nested",
        Sequential(
            Dense(2, 3),
            Residual(Sequential(Tanh(), Dense(3, 3), Residual(Dense(3, 3, bias=False)))),
            Sequential(Tanh(), Dense(3, 2)),
        ),
        (5, 2),
        SOFTMAX,
        class_targets,
    ),
    NetworkCase(
        "weighted_softmax",
        Sequential(Dense(3, 4), Tanh(), Dense(4, 3)),
        (6, 3),
        SOFTMAX,
        class_targets,
        weighted=True,
    ),
    NetworkCase(
        "flattened_image",
        Sequential(Flatten(), Dense(6, 3), Tanh(), Dense(3, 2)),
        (4, 2, 3),
        SIGMOID,
        unit_targets,
    ),
    # Weights shared over positions, one loss term an example.
    NetworkCase(
        "shared_then_flattened",
        Sequential(Dense(2, 3), Tanh(), Flatten(), Dense(9, 2)),
        (4, 3, 2),
        SOFTMAX,
        class_targets,
    ),
    NetworkCase(
        "mean_pooled",
        Sequential(Dense(2, 3), Tanh(), Dense(3, 3), MeanOverPositions(), Dense(3, 2)),
        (4, 3, 2),
        SIGMOID,
        unit_targets,
    ),
    NetworkCase(
        "mean_pooled_linear",
        Sequential(Dense(2, 3), Dense(3, 4), MeanOverPositions(), Dense(4, 2)),
        (4, 3, 2),
        SQUARED,
        real_targets,
        kfac_exact=("reduce",),
    ),
    NetworkCase(
        "mean_pooled_linear_no_bias",
        Sequential(Dense(2, 3, bias=False), Dense(3, 2, bias=False), MeanOverPositions()),
        (4, 3, 2),
        SQUARED,
        real_targets,
        kfac_exact=("reduce",),
    ),
    # Convolutions.
    NetworkCase(
        "conv_softmax",
        Sequential(
            Conv(1, 2, (3, 3), padding=1),
            Tanh(),
            Conv(2, 3, (2, 2), stride=2),
            Flatten(),
            Dense(12, 3),
        ),
        (4, 4, 4, 1),
        SOFTMAX,
        class_targets,
        weighted=True,
    ),
    NetworkCase(
        "conv_geometries_sigmoid",
        Sequential(
            Conv(2, 4, (3, 2), dilation=(1, 2), padding=((2, 1), (0, 1)), groups=2, budget_bytes=1),
            Softplus(),
            ConvTranspose(4, 2, (2, 2), stride=2, padding=1, groups=2, bias=False),
            Flatten(),
            Dense(48, 1),
        ),
        (3, 3, 4, 2),
        SIGMOID,
        unit_targets,
    ),
    NetworkCase(
        "conv1d_depthwise_squared",
        Sequential(Conv(2, 4, (3,), groups=2, padding="same"), Logistic(), Flatten(), Dense(16, 2)),
        (4, 4, 2),
        SQUARED,
        real_targets,
    ),
    NetworkCase(
        "conv3d_poisson",
        Sequential(Conv(1, 2, (2, 2, 2)), Tanh(), Flatten(), Dense(4, 2, bias=False)),
        (4, 2, 3, 2, 1),
        POISSON,
        count_targets,
    ),
    NetworkCase(
        "conv_per_pixel",
        Sequential(Conv(1, 2, (3,), padding=1, bias=False), Tanh(), Conv(2, 3, (1,))),
        (3, 4, 1),
        SOFTMAX,
        class_targets,
    ),
    NetworkCase(
        "conv_max_pool",
        Sequential(Conv(1, 2, (3, 3), padding=1), MaxPool((2, 2)), Tanh(), Flatten(), Dense(8, 3)),
        (4, 4, 5, 1),
        SOFTMAX,
        class_targets,
    ),
    NetworkCase(
        "conv_global_average_pool",
        Sequential(Conv(2, 3, (2, 2), padding="same"), SiLU(), GlobalAveragePool(), Dense(3, 2)),
        (4, 3, 3, 2),
        SIGMOID,
        unit_targets,
        weighted=True,
    ),
    NetworkCase(
        "conv_average_pool_linear",
        Sequential(Conv(1, 2, (2,)), AveragePool((5,)), Flatten(), Dense(2, 2)),
        (4, 6, 1),
        SQUARED,
        real_targets,
        kfac_exact=("reduce",),
    ),
    # Attention, with one loss term an example and with one at every position.
    NetworkCase(
        "attention_averaged",
        Sequential(
            Dense(1, 2), MultiHeadAttention(2, 2), GlobalAveragePool(), Dense(2, 3, bias=False)
        ),
        (4, 3, 1),
        SOFTMAX,
        class_targets,
        weighted=True,
    ),
    NetworkCase(
        "attention_positions",
        Sequential(Residual(MultiHeadAttention(2, 1, causal=True)), Tanh(), Dense(2, 2)),
        (3, 3, 2),
        SOFTMAX,
        class_targets,
    ),
    # Normalisation.
    NetworkCase(
        "layer_norm_softmax",
        Sequential(Dense(3, 4), LayerNorm(4), Tanh(), Dense(4, 3)),
        (4, 3),
        SOFTMAX,
        class_targets,
        weighted=True,
    ),
    NetworkCase(
        "rms_norm_positions",
        Sequential(Dense(2, 3, bias=False), RMSNorm(3), SiLU(), Dense(3, 2)),
        (3, 2, 2),
        SQUARED,
        real_targets,
    ),
    NetworkCase(
        "group_norm_sigmoid",
        Sequential(Conv(1, 4, (2, 2), bias=False), GroupNorm(2, 4), Tanh(), Flatten(), Dense(8, 1)),
        (3, 2, 3, 1),
        SIGMOID,
        unit_targets,
    ),
    NetworkCase(
        "batch_norm_softmax",
        Sequential(Dense(3, 3, bias=False), BatchNorm(3), Tanh(), Dense(3, 2)),
        (4, 3),
        SOFTMAX,
        class_targets,
    ),
    NetworkCase(
        "batch_norm_positions",
        Sequential(Conv(1, 2, (2,)), BatchNorm(2, epsilon=0.1), Softplus(), Dense(2, 2)),
        (4, 3, 1),
        SQUARED,
        real_targets,
        weighted=True,
    ),
    # Whole numbers as inputs.
    NetworkCase(
        "embedding_linear",
        Sequential(Embedding(3, 2), Flatten(), Dense(2, 2)),
        (5, 1),
        SQUARED,
        real_targets,
        kfac_exact=BOTH,
        classes=3,
    ),
    NetworkCase(
        "embedding_flattened",
        Sequential(Embedding(4, 2), Flatten(), Dense(4, 3), Tanh(), Dense(3, 3)),
        (4, 2),
        SOFTMAX,
        class_targets,
        weighted=True,
        classes=4,
    ),
    NetworkCase(
        "embedding_positions",
        Sequential(Embedding(3, 3), LayerNorm(3, affine=False), Dense(3, 2)),
        (3, 2),
        SIGMOID,
        unit_targets,
        classes=3,
    ),
    # Weights that are used several times.
    NetworkCase(
        "tied_softmax",
        Sequential(Dense(2, 3), Tied((Dense(3, 3), Tanh()), order=(0, 1, 0, 1, 0))),
        (4, 2),
        SOFTMAX,
        class_targets,
        weighted=True,
    ),
    NetworkCase(
        "tied_convolutions_squared",
        Sequential(
            Tied((Conv(1, 1, (2, 2), padding="same"), Softplus()), (0, 1, 0)),
            Flatten(),
            Dense(4, 2),
        ),
        (3, 2, 2, 1),
        SQUARED,
        real_targets,
    ),
    NetworkCase(
        "recurrent_sigmoid",
        Sequential(Recurrent(Sequential(Dense(4, 2), Tanh()), 2), GlobalAveragePool(), Dense(2, 1)),
        (4, 3, 2),
        SIGMOID,
        unit_targets,
    ),
    NetworkCase(
        "recurrent_positions",
        Sequential(Recurrent(Sequential(Dense(3, 2, bias=False), Tanh()), 2), Dense(2, 2)),
        (3, 3, 1),
        SOFTMAX,
        class_targets,
    ),
    # A loss term at every position.
    NetworkCase(
        "positions_linear",
        Sequential(Dense(2, 3), Dense(3, 2)),
        (4, 3, 2),
        SQUARED,
        real_targets,
        kfac_exact=("expand",),
    ),
    NetworkCase(
        "positions_softmax",
        Sequential(Dense(2, 3), Tanh(), Dense(3, 3)),
        (3, 4, 2),
        SOFTMAX,
        class_targets,
    ),
    NetworkCase(
        "positions_mixed_softmax",
        Sequential(Dense(2, 3), Tanh(), MixPositions(), Dense(3, 3)),
        (3, 3, 2),
        SOFTMAX,
        class_targets,
        weighted=True,
    ),
    NetworkCase(
        "positions_mixed_squared",
        Sequential(Dense(2, 3), MixPositions(), Logistic(), Dense(3, 2)),
        (3, 4, 2),
        SQUARED,
        real_targets,
    ),
]


def networks(**wanted: Any) -> list[NetworkCase]:
    """The network cases of which all given attributes have the given value."""
    return [c for c in NETWORKS if all(getattr(c, k) == v for k, v in wanted.items())]
