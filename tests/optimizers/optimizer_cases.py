"""Small problems for the optimisers, in the words of the reference and in those of the library."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from dense_net import HostArray, Net, sample_targets
from dense_reference import growing_batch_size

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, to_numpy
from kfac_np.fisher import FisherType
from kfac_np.layers import Dense, Identity, Layer, Logistic, ReLU, Sequential, Softplus, Tanh
from kfac_np.losses import (
    Loss,
    PoissonLogRate,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers import Guard
from kfac_np.trees import Tree

LAYERS: dict[str, Layer] = {
    "tanh": Tanh(),
    "logistic": Logistic(),
    "relu": ReLU(),
    "softplus": Softplus(),
    "identity": Identity(),
}
LOSSES: dict[str, Loss] = {
    "squared": SquaredError(),
    "sigmoid": SigmoidCrossEntropy(),
    "softmax": SoftmaxCrossEntropy(),
    "poisson": PoissonLogRate(),
}
TARGETS: dict[str, Callable[[HostArray, np.random.Generator], HostArray]] = {
    # Outputs of a teacher, as targets with a little noise.
    "squared": lambda z, draws: z + 0.1 * draws.standard_normal(z.shape),
    "sigmoid": lambda z, draws: 1.0 / (1.0 + np.exp(-z)),
    "softmax": lambda z, draws: np.argmax(z, axis=-1),
    "poisson": lambda z, draws: np.exp(0.5 * np.tanh(z)),
}


def a_guard(**constants: float) -> Guard:
    """A guard with other constants than there are."""
    guard = Guard()
    for name, value in constants.items():
        object.__setattr__(guard, name, value)
    return guard


@final
@dataclass(frozen=True)
class GivenTargets(FisherType):
    """The Monte-Carlo Fisher with the reference's draws instead of the library's."""

    loss: str
    seed: int

    def vectors(self, e: Evaluation, rng: Rng) -> Iterator[Array]:
        backend = Backend.of(e.outputs)
        t = sample_targets(self.loss, to_numpy(e.outputs), self.seed, int(rng.keys[-1]))
        v = e.objective.loss.gradient(e.outputs, backend.asarray(t))
        yield e.weighted(v, 0.5)[None, ...]


@dataclass(frozen=True)
class Case:
    """A network, and a stream of minibatches of a fixed set of examples.

    `grow` = (first size, step at which all are used); otherwise every step takes `batch` of them.
    """

    name: str
    net: Net
    examples: int = 64
    batch: int = 64
    grow: tuple[int, int] | None = None
    weighted: bool = False
    positions: int | None = None
    spread: float | tuple[float, ...] = 1.0
    outlier: int | None = None  # the step in which x is 1000 times as large

    def __str__(self) -> str:
        return self.name

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    @functools.cache  # noqa: B019 - the table lives as long as the tests
    def host(self) -> tuple[HostArray, HostArray, HostArray, HostArray]:
        """θ₀, x, t and weights."""
        draws = np.random.default_rng(self.seed)
        middle = () if self.positions is None else (self.positions,)
        x = np.asarray(self.spread) * draws.standard_normal(
            (self.examples, *middle, self.net.sizes[0])
        )
        teacher, theta = draws.standard_normal((2, self.net.num_parameters))
        t = TARGETS[self.net.loss](self.net.forward(teacher, x)[0], draws)
        w = draws.uniform(0.3, 1.7, self.examples) if self.weighted else np.ones(self.examples)
        return 0.7 * theta, x, t, w

    def batch_at(self, k: int) -> tuple[HostArray, HostArray, HostArray]:
        """x, t and weights for step k."""
        size = self.batch
        if self.grow is not None:
            size = growing_batch_size(k, self.grow[0], self.examples, self.grow[1])
        order = np.random.default_rng([self.seed, k]).permutation(self.examples)[:size]
        _, x, t, w = self.host()
        factor = 1000.0 if k == self.outlier else 1.0
        return factor * x[order], t[order], w[order]

    def sampler(self, z: HostArray, k: int) -> HostArray:
        """The reference's targets; `fisher` gives the library the same ones."""
        return sample_targets(self.net.loss, z, self.seed, k)

    @property
    def fisher(self) -> GivenTargets:
        return GivenTargets(self.net.loss, self.seed)

    @property
    def objective(self) -> Objective:
        """The network and loss in the library's words."""
        layers: list[Layer] = []
        for m, n in itertools.pairwise(self.net.sizes):
            layers += [Dense(m, n, bias=self.net.bias), LAYERS[self.net.activation]]
        return Objective(Sequential(*layers[:-1]), LOSSES[self.net.loss])

    def params(self, backend: Backend) -> Tree:
        """θ₀ as the library's tree."""
        return self.to_tree(backend, self.host()[0])

    def to_tree(self, backend: Backend, theta: HostArray) -> Tree:
        """A vector of the reference's as a tree of the library's."""
        matrices = iter(self.net.split(theta))
        return tuple(
            backend.asarray(next(matrices)) if isinstance(layer, Dense) else ()
            for layer in self.objective.network.layers
        )

    def batch_on(self, backend: Backend, k: int) -> tuple[Array, Array, Array | None]:
        """The minibatch of step k on the backend; weights None where all are 1."""
        x, t, w = self.batch_at(k)
        weights = backend.asarray(w) if self.weighted else None
        return backend.asarray(x), backend.asarray(t), weights


def flat(tree: Tree) -> HostArray:
    """A tree of the library's as a vector of the reference's."""
    return np.concatenate([to_numpy(leaf).ravel() for leaf in trees.leaves(tree)])


CASES: list[Case] = [
    Case("tanh_squared", Net((3, 4, 2), "tanh", "squared")),
    Case("logistic_sigmoid", Net((4, 3, 2, 4), "logistic", "sigmoid")),
    Case("relu_softmax", Net((3, 5, 3), "relu", "softmax")),
    Case("softplus_poisson", Net((2, 4, 2), "softplus", "poisson")),
    Case("no_bias_softmax", Net((3, 4, 3), "tanh", "softmax", bias=False)),
    Case("weighted_sigmoid", Net((3, 3, 2), "tanh", "sigmoid"), weighted=True),
    Case(
        "positions_squared", Net((2, 3, 2), "tanh", "squared"), examples=32, batch=32, positions=3
    ),
    Case("linear_squared", Net((3, 2, 2), "identity", "squared")),
    Case("growing_softmax", Net((3, 4, 3), "tanh", "softmax"), examples=96, grow=(16, 40)),
]


def case(name: str) -> Case:
    """The case of that name."""
    return next(c for c in CASES if c.name == name)
