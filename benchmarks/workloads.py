"""What is timed: networks, batches, the mathematics of a step, and the operations it needs.

Only the standard library is used here, so that every contender's interpreter can read it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

FLOATS = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class Affine:
    """A matrix (d_out, d_in + 1), bias included, used at `positions` places of each example."""

    d_in: int
    d_out: int
    positions: int = 1


@dataclass(frozen=True)
class Network:
    """Convolutions, each followed by pooling, then dense layers; no activation at the end.

    `sizes` are the widths of the dense layers, the first one that of the input (of what the last
    pooling leaves, if there are convolutions). A `linear` layer has no activation after it.
    Pooling takes the maximum of 3 x 3 pixels, with stride 2 and 1 pixel of padding.
    """

    sizes: tuple[int, ...]
    activation: str
    loss: str  # "sigmoid": targets are the inputs; "softmax": targets are labels
    linear: tuple[int, ...] = ()
    image: tuple[int, int, int] = (0, 0, 0)
    channels: tuple[int, ...] = ()
    kernel: int = 5

    def affine(self) -> list[Affine]:
        """The matrices, from the input to the output."""
        layers = []
        height, width, depth = self.image
        for channels in self.channels:
            layers.append(Affine(self.kernel**2 * depth, channels, height * width))
            height, width, depth = -(-height // 2), -(-width // 2), channels
        return layers + [Affine(*pair) for pair in itertools.pairwise(self.sizes)]

    @property
    def inputs(self) -> int:
        """Numbers in one example."""
        return math.prod(self.image) if self.channels else self.sizes[0]


def autoencoder(sizes: tuple[int, ...]) -> Network:
    """Down to a linear code and, mirrored, up again; tanh, sigmoid cross-entropy."""
    code = len(sizes) - 2
    return Network((*sizes, *sizes[-2::-1]), "tanh", "sigmoid", linear=(code,))


def classifier(sizes: tuple[int, ...]) -> Network:
    """Dense layers with ReLU, softmax cross-entropy."""
    return Network(sizes, "relu", "softmax")


def convnet(
    image: tuple[int, int, int] = (32, 32, 3), channels: tuple[int, ...] = (32, 32, 64)
) -> Network:
    """The network of Grosse & Martens 2016, §6: 5 x 5 convolutions with pooling, a dense layer."""
    size = [-(-n // 2 ** len(channels)) for n in image[:2]]
    sizes = (math.prod(size) * channels[-1], 10)
    return Network(sizes, "relu", "softmax", (), image, channels)


@dataclass(frozen=True)
class Workload:
    """A network, a batch, and what K-FAC does in a step.

    `model` is "fixed" (rate and momentum given) or "exact" (both minimise the quadratic model with
    the exact Fisher). In every step the statistics are renewed, from one target sampled for each
    example, on the first `statistics_fraction` of the batch; every `refresh` steps the factors are
    inverted.
    """

    name: str
    network: Network
    batch: int
    model: str = "fixed"
    rate: float = 1e-3
    sgd_rate: float = 1e-4
    momentum: float = 0.9
    damping: float = 1.0
    l2: float = 0.0
    refresh: int = 20
    statistics_fraction: float = 1.0
    model_fraction: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """What a contender is sent."""
        return asdict(self)

    def operations(self, method: str = "kfac", empirical: bool = False) -> dict[str, float]:
        """Floating-point operations that one step needs, by part; `method` is "kfac" or "sgd".

        An `empirical` Fisher takes its factors from the gradients: no targets are sampled.
        Those of the matrix products, n³ for the inverse of a positive definite matrix and half for
        a symmetric product; elementwise work is not counted. Convolutions count as products with
        unfolded patches, zeros of the padding included.
        """
        n, model_n = self.batch, self.batch * self.model_fraction
        part_n = self.batch * self.statistics_fraction
        parts = dict.fromkeys(("forward", "backward", "gradient"), 0.0)
        if method == "kfac":
            parts |= dict.fromkeys(("sampled backward", "moments", "refresh", "solve"), 0.0)
            if self.model == "exact":
                parts["model"] = 0.0
        for i, layer in enumerate(self.network.affine()):
            d_out, d_in, uses = layer.d_out, layer.d_in + 1, layer.positions
            to_inputs = 2.0 * uses * layer.d_in * d_out if i else 0.0
            affine = 2.0 * uses * d_in * d_out
            parts["forward"] += n * affine
            parts["gradient"] += n * affine
            parts["backward"] += n * to_inputs
            if method != "kfac":
                continue
            parts["sampled backward"] += 0.0 if empirical else part_n * to_inputs
            parts["moments"] += part_n * uses * (d_in**2 + d_out**2)
            parts["refresh"] += (d_in**3 + d_out**3) / self.refresh
            by_examples = 2.0 * n * uses * (d_out**2 + d_in**2 + d_out * d_in)
            parts["solve"] += min(2.0 * (d_out**2 * d_in + d_out * d_in**2), by_examples)
            if self.model == "exact":
                # J v for two vectors: the tangent of the weights, and that of the layer's inputs.
                parts["model"] += 2 * model_n * (affine + to_inputs)
        return parts


W1 = autoencoder((784, 1000, 500, 250, 30))
W2 = convnet()
W3 = classifier((784, 500, 500, 10))
WIDE = autoencoder((784, 4096, 4096, 30))


def _all() -> dict[str, Workload]:
    workloads = [
        Workload(f"W1-{batch}-{model}", W1, batch, model)
        for batch in (256, 1000, 4000)
        for model in ("fixed", "exact")
    ]
    workloads += [Workload(f"W2-{batch}", W2, batch) for batch in (128, 512)]
    workloads.append(Workload("W3", W3, 512))
    workloads += [Workload(f"W1-4096-{model}", WIDE, 4000, model) for model in ("fixed", "exact")]
    return {w.name: w for w in workloads}


WORKLOADS = _all()
DEFAULT = ("W1-1000-fixed", "W1-1000-exact", "W3", "W2-128")
CUDA_DEFAULT = (*DEFAULT, "W1-4000-fixed", "W1-4000-exact", "W1-4096-fixed", "W1-4096-exact")


def select(names: list[str]) -> list[Workload]:
    """Workloads by name; "W1-1000" stands for all that begin so."""
    found: dict[str, Workload] = {}
    for name in names:
        chosen = [w for key, w in WORKLOADS.items() if key == name or key.startswith(f"{name}-")]
        if not chosen:
            raise SystemExit(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
        found |= {w.name: w for w in chosen}
    return list(found.values())


def tiny(workload: Workload) -> Workload:
    """The same kind of network and mathematics, small: for trying the instrument out."""
    network = workload.network
    if network.channels:
        network = convnet((8, 8, 3), (4, 6))
    elif network.loss == "sigmoid":
        network = autoencoder((20, 16, 8, 4))
    else:
        network = classifier((20, 16, 10))
    return replace(workload, network=network, batch=32)
