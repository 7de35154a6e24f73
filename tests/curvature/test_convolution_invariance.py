"""KFC's invariance: pointwise affine maps of the activations, the same at every location.

A convolution whose inputs are changed to Ω a + c at each pixel, and whose outputs Φ s† + d are
what the next layer sees, has weights with which the network computes the same function. Undamped
KFC then changes both functions alike [Grosse & Martens 2016, arXiv:1602.01407, §4.1, theorem 3];
gradient descent does not. Centring and whitening the activations are such maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pytest
from numerics import frobenius_distance, host
from test_curvature_invariance import Fixed, affine, natural

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, get_backend, pad
from kfac_np.curvature import BlockDiagonal, KFACBlock, expand, reduce
from kfac_np.fisher import Empirical, Exact, FisherType, MonteCarlo
from kfac_np.layers import Conv, Dense, Flatten, Layer, Sequential, Tanh
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, SGD, ConstantDamping, CoupledGamma, FixedRate, Optimizer
from kfac_np.trees import Tree

HostArray = np.ndarray[Any, Any]
Maps = Callable[[int, int, str], HostArray]
"""(layer, channels, "inputs" or "outputs") -> homogeneous matrix of an affine map."""

N, STEPS = 200, 4
NUMPY = get_backend("numpy", "float64")


@final
@dataclass(frozen=True)
class ZeroPad(Layer):
    """Zeros around the spatial axes, as a layer: a map of the activations can come after it."""

    width: int

    def _widths(self, ndim: int) -> tuple[tuple[int, int], ...]:
        return ((self.width, self.width),) * (ndim - 2)

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return ()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*(n + 2 * self.width for n in shape[:-1]), shape[-1])

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        return pad(x, self._widths(x.ndim)), x.shape

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        inner = (slice(self.width, -self.width),) * (len(cache) - 2)
        return (g[..., *inner, :] if wrt_input else None), ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return None if dx is None else pad(dx, self._widths(dx.ndim))


# ----------------------------------------------------------------------------- pairs of networks

NETWORKS = {
    "1d": ([Conv(2, 3, (3,)), Conv(3, 2, (2,))], (7, 2)),
    "2d": ([Conv(2, 3, (2, 2)), Conv(3, 2, (2, 2))], (4, 4, 2)),
    "strided, dilated": (
        [Conv(2, 3, (2, 2), stride=(2, 1)), Conv(3, 2, (2, 2), dilation=(1, 2))],
        (6, 5, 2),
    ),
    "3d": ([Conv(1, 2, (2, 1, 2)), Conv(2, 2, (1, 2, 2))], (3, 3, 4, 1)),
    "grouped": ([Conv(4, 4, (2,), groups=2), Conv(4, 2, (2,), groups=2)], (4, 4)),
    "depthwise": ([Conv(3, 3, (2,), groups=3), Conv(3, 2, (1,))], (4, 3)),
}
OUTPUTS = 2


@dataclass(frozen=True)
class Pair:
    """A network and the same function with transformed activations, with their parameters."""

    network: Sequential
    params: list[HostArray]
    changed: Sequential
    changed_params: list[HostArray]


def blockwise(maps: Maps, layer: int, channels: int, groups: int, side: str) -> HostArray:
    """A map that keeps the groups of a convolution apart."""
    c = channels // groups
    out = np.eye(channels + 1)
    for i in range(groups):
        each = slice(i * c, (i + 1) * c)
        m = maps(layer * 100 + i, c, side)
        out[each, each], out[each, -1] = m[:-1, :-1], m[:-1, -1]
    return out


def over_taps(m: HostArray, taps: int) -> HostArray:
    """What a map of the pixels does to a patch with a 1 appended."""
    c = m.shape[0] - 1
    out = np.eye(taps * c + 1)
    out[:-1, :-1] = np.kron(np.eye(taps), m[:-1, :-1])
    out[:-1, -1] = np.tile(m[:-1, -1], taps)
    return out


def matched(w: HostArray, before: HostArray, after: HostArray, taps: int) -> HostArray:
    """W† with W ā = Φ W† ā† + d, where ā† is the patch of the changed inputs."""
    shifted = w.copy()
    shifted[:, -1] -= after[:-1, -1]
    return np.linalg.inv(after[:-1, :-1]) @ shifted @ np.linalg.inv(over_taps(before, taps))


def pair(name: str, maps: Maps, padding: int = 0, *, transform_padding: bool = True) -> Pair:
    """Convolutions, tanh between them, and a dense layer on all pixels."""
    convolutions, shape = NETWORKS[name]
    rng = np.random.default_rng(0)
    layers: list[Layer] = []
    changed: list[Layer] = []
    params, changed_params = [], []
    for i, conv in enumerate(convolutions):
        taps = int(np.prod(conv.kernel))
        w = rng.standard_normal(host(conv.init(Rng(0), NUMPY)).shape)
        w /= np.sqrt(w.shape[-1])
        before, after = (
            blockwise(maps, i, c, conv.groups, side)
            for c, side in ((conv.c_in, "inputs"), (conv.c_out, "outputs"))
        )
        padded = Conv(
            conv.c_in,
            conv.c_out,
            conv.kernel,
            conv.stride,
            conv.dilation,
            padding,
            groups=conv.groups,
        )
        layers += [padded, Tanh()]
        if padding and transform_padding:
            changed += [ZeroPad(padding), Fixed(before), conv, Fixed(after), Tanh()]
        else:
            changed += [Fixed(before), padded, Fixed(after), Tanh()]
        params.append(w)
        changed_params.append(matched_groups(w, before, after, taps, conv.groups))
    *out, c = Sequential(*layers).output_shape(shape)
    pixels = int(np.prod(out))
    w = rng.standard_normal((OUTPUTS, pixels * c + 1)) / np.sqrt(pixels * c)
    before = maps(len(convolutions) * 100, c, "inputs")
    head = Dense(pixels * c, OUTPUTS)
    return Pair(
        Sequential(*layers, Flatten(), head),
        [*params, w],
        Sequential(*changed, Fixed(before), Flatten(), head),
        [*changed_params, matched(w, before, np.eye(OUTPUTS + 1), pixels)],
    )


def matched_groups(
    w: HostArray, before: HostArray, after: HostArray, taps: int, groups: int
) -> HostArray:
    if groups == 1:
        return matched(w, before, after, taps)
    parts = []
    c_in, c_out = (before.shape[0] - 1) // groups, (after.shape[0] - 1) // groups
    for i in range(groups):
        sides = []
        for m, c in ((before, c_in), (after, c_out)):
            keep = [*range(i * c, (i + 1) * c), m.shape[0] - 1]
            sides.append(m[np.ix_(keep, keep)])
        parts.append(matched(w[i], *sides, taps))
    return np.stack(parts)


def random_maps(layer: int, channels: int, side: str) -> HostArray:
    return affine(channels, layer + (1000 if side == "inputs" else 2000))


def linear_maps(layer: int, channels: int, side: str) -> HostArray:
    """Without a shift, 0 stays 0."""
    m = random_maps(layer, channels, side).copy()
    m[:-1, -1] = 0.0
    return m


def of_activations(name: str, *, whiten: bool) -> Maps:
    """Centre (and whiten) what each convolution of the plain network sees, over all locations."""
    plain = pair(name, lambda layer, channels, side: np.eye(channels + 1))
    x, given = inputs(name)[0], iter(plain.params)
    seen, h = [], x
    for layer in plain.network.layers:
        if isinstance(layer, Conv | Flatten):
            seen.append(h.reshape(-1, h.shape[-1]))
        h, _ = layer.forward(() if isinstance(layer, Tanh | Flatten) else next(given), h)

    def maps(layer: int, channels: int, side: str) -> HostArray:
        m = np.eye(channels + 1)
        if side == "inputs":
            group = layer % 100
            rows = seen[layer // 100][:, group * channels : (group + 1) * channels]
            if whiten:
                m[:-1, :-1] = np.linalg.inv(
                    np.linalg.cholesky(np.cov(rows.T).reshape(channels, -1))
                )
            m[:-1, -1] = -m[:-1, :-1] @ rows.mean(axis=0)
        return m

    return maps


# -------------------------------------------------------------------------------------- training


def inputs(name: str) -> tuple[HostArray, HostArray, HostArray]:
    """Images to train on, of means unlike 0; images that are not trained on; targets."""
    rng = np.random.default_rng(3)
    shape = NETWORKS[name][1]
    x, unseen = (rng.standard_normal((n, *shape)) + 1.0 for n in (N, 7))
    return x, unseen, rng.standard_normal((N, OUTPUTS))


def train(
    backend: Backend,
    name: str,
    network: Sequential,
    weights: list[HostArray],
    direction: Callable[[Any], Tree],
    rate: float,
) -> list[HostArray]:
    """Outputs on unseen images, before and after each of a few steps."""
    x, unseen, t = map(backend.asarray, inputs(name))
    given = iter(weights)
    params = trees.tree_map(lambda _: backend.asarray(next(given)), network.init(Rng(0), backend))
    objective, outputs = Objective(network, SquaredError()), [network.forward(params, unseen)[0]]
    for _ in range(STEPS):
        step = direction(objective.evaluate(params, x, t))
        params = trees.axpy(-rate, step, params)
        outputs.append(network.forward(params, unseen)[0])
    return [host(z) for z in outputs]


def drift(
    backend: Backend,
    name: str,
    direction: Callable[[Any], Tree],
    both: Pair,
    rate: float = 0.05,
) -> float:
    """Distance of the two functions after the last step, relative to how far the first moved."""
    first = train(backend, name, both.network, both.params, direction, rate)
    second = train(backend, name, both.changed, both.changed_params, direction, rate)
    assert frobenius_distance(second[0], first[0]) <= 1e-12, "the two are one function"
    moved = float(np.linalg.norm(first[-1] - first[0]))
    assert moved >= 0.01 * np.linalg.norm(first[0])
    return float(np.linalg.norm(second[-1] - first[-1])) / moved


def kfc(fisher: FisherType | None = None, sharing: Any = expand, damping: float = 0.0) -> Any:
    return natural(BlockDiagonal(KFACBlock(sharing=sharing)), fisher or Exact(), damping)


def gradient(e: Any) -> Tree:
    return e.gradient()


# ----------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", NETWORKS)
def test_kfc_does_not_see_pointwise_affine_maps(backend: Backend, name: str):
    assert drift(backend, name, kfc(), pair(name, random_maps)) <= 1e-9


@pytest.mark.parametrize("sharing", [expand, reduce])
@pytest.mark.parametrize("fisher", [Empirical(), MonteCarlo(1), Exact()], ids=repr)
def test_for_every_fisher_and_sharing(backend: Backend, fisher: FisherType, sharing: Any):
    both = pair("2d", random_maps)
    assert drift(backend, "2d", kfc(fisher, sharing), both) <= 1e-9


@pytest.mark.parametrize("whiten", [False, True], ids=["centred", "whitened"])
@pytest.mark.parametrize("name", NETWORKS)
def test_centring_and_whitening_change_nothing(name: str, whiten: bool):
    both = pair(name, of_activations(name, whiten=whiten))
    assert drift(NUMPY, name, kfc(), both) <= 1e-9
    assert drift(NUMPY, name, gradient, both) >= 0.25


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_descent_fails_the_same_test(name: str):
    assert drift(NUMPY, name, gradient, pair(name, random_maps)) >= 0.25


def test_damping_breaks_invariance():
    assert drift(NUMPY, "2d", kfc(damping=0.1), pair("2d", random_maps)) >= 0.4


def test_padding_that_is_transformed_too_keeps_it():
    both = pair("2d", random_maps, padding=1)
    # 73 inputs of the dense layer for 200 images: the factors are worse conditioned.
    assert drift(NUMPY, "2d", kfc(), both) <= 1e-6
    assert drift(NUMPY, "2d", gradient, both, rate=0.005) >= 0.25


def test_zero_padding_keeps_linear_maps_apart():
    """0 is mapped to 0: without a shift padding does no harm."""
    both = pair("2d", linear_maps, padding=1, transform_padding=False)
    assert drift(NUMPY, "2d", kfc(), both) <= 1e-7


def test_zero_padding_breaks_it():
    """Behind a shift a padded 0 is another number: the two are not even one function.

    By 62 % already before the first step, if the activations are but centred. The steps that
    follow are then as different as unrelated ones.
    """
    both = pair("2d", of_activations("2d", whiten=False), padding=1, transform_padding=False)
    first = train(NUMPY, "2d", both.network, both.params, kfc(), 0.05)
    second = train(NUMPY, "2d", both.changed, both.changed_params, kfc(), 0.05)
    assert frobenius_distance(second[0], first[0]) == pytest.approx(0.615, abs=0.001)
    moves = [steps[-1] - steps[0] for steps in (first, second)]
    assert frobenius_distance(*moves[::-1]) == pytest.approx(0.973, abs=0.001)


OPTIMIZERS: dict[str, Callable[[Objective], Optimizer]] = {
    "fixed rate and momentum": lambda o: KFAC(
        o,
        fisher=Exact(),
        step_rule=FixedRate(0.05, 0.9),
        damping=ConstantDamping(0.0),
        gamma=CoupledGamma(),
        l2=0.0,
        statistics_fraction=1.0,
        averaging=None,
        guard=None,  # it would raise the λ of 0
    ),
    "clipped": lambda o: KFAC(
        o,
        step_rule=FixedRate(0.5, 0.9, kl_clip=1e-3),
        damping=ConstantDamping(0.0),
        gamma=CoupledGamma(),
        l2=0.0,
        statistics_fraction=1.0,
        averaging=None,
        guard=None,  # it would raise the λ of 0
    ),
    "sgd": lambda o: SGD(o, 0.02),
}


def along(name: str, make: Callable[[Objective], Optimizer], layers: Sequential, w: Any) -> Any:
    x, unseen, t = inputs(name)
    given, outputs = iter(w), []
    optimizer = make(Objective(layers, SquaredError()))
    start = layers.init(Rng(0), NUMPY)
    state = optimizer.init(trees.tree_map(lambda _: next(given), start))
    for _ in range(8):
        state, _ = optimizer.step(state, x, t)
        outputs.append(layers.forward(state.params, unseen)[0])
    return outputs


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_whole_optimiser(name: str):
    """Momentum, clipped updates, sampled targets and moving averages of the factors included."""
    both = pair("2d", random_maps)
    first = along("2d", OPTIMIZERS[name], both.network, both.params)
    second = along("2d", OPTIMIZERS[name], both.changed, both.changed_params)
    moved = float(np.max(np.abs(first[-1] - first[0])))
    differences = [float(np.max(np.abs(a - b))) for a, b in zip(first, second, strict=True)]
    if name == "sgd":
        assert differences[-1] >= 0.3 * moved
    else:
        assert max(differences) <= 1e-8 * moved
    assert all(np.all(np.isfinite(z)) for z in itertools.chain(first, second))
