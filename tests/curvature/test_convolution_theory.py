"""KFC's assumptions, one by one: what each of them makes of the block, and how much it loses.

Grosse & Martens 2016, arXiv:1602.01407, §3 and §4.2.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
from cases import class_targets, host_params, to_backend
from curvature_cases import SHARING, estimate
from numerics import EPS, assert_close, frobenius_distance, host

from kfac_np import trees
from kfac_np.backend import Backend, Geometry, Patches, Rng, get_backend
from kfac_np.curvature import (
    Assumption,
    BlockDiagonal,
    ExactBlock,
    KFACBlock,
    convolution_block,
    kfc_factors,
    reduce,
)
from kfac_np.errors import CurvatureError
from kfac_np.fisher import Exact
from kfac_np.layers import Conv, ConvTranspose, Dense, Flatten, Identity, Layer, Sequential, Tanh
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers import Adam
from kfac_np.statistics import AffineStatistics, GroupedStatistics, Scale

HostArray = np.ndarray[Any, Any]

NONE, IAD, SUD, SUA, WD = (
    Assumption.NONE,
    Assumption.IAD,
    Assumption.SUD,
    Assumption.SUA,
    Assumption.WD,
)
SHA, SHD, SH, KFC = (
    Assumption.SH_ACTIVATIONS,
    Assumption.SH_DERIVATIVES,
    Assumption.SH,
    Assumption.KFC,
)

# Every combination that says something different.
SETS = [
    IAD | activations | derivatives
    for activations in (NONE, SHA, SUA, SHA | SUA)
    for derivatives in (NONE, SHD, SUD, SHD | SUD, WD)
]


def show(assumptions: Assumption) -> str:
    return "+".join(str(a.name) for a in assumptions) or "none"


# ------------------------------------------------------------------------------- the definitions

CONVOLUTIONS = {
    "1d": (Conv(2, 2, (3,), padding=1), (5, 2)),
    "1d strided": (Conv(1, 2, (4,), stride=3, padding=((2, 1),), bias=False), (7, 1)),
    "2d": (Conv(2, 1, (2, 2)), (3, 4, 2)),
    "2d same": (Conv(1, 2, (3, 3), padding="same"), (3, 4, 1)),
    "2d dilated": (Conv(2, 2, (2, 2), dilation=(2, 1), padding=((1, 0), (0, 2))), (3, 2, 2)),
    "2d cropped": (Conv(1, 2, (2, 2), padding=((-1, 1), (2, -1))), (4, 3, 1)),
    "3d": (Conv(1, 2, (2, 1, 2), stride=(1, 2, 1), padding=(0, 0, 1)), (2, 3, 2, 1)),
}


def case(name: str, vectors: int | None = 2) -> tuple[Conv, HostArray, HostArray]:
    """A convolution, an image of non-zero mean, and derivatives that depend on it."""
    layer, shape = CONVOLUTIONS[name]
    rng = np.random.default_rng(len(name))
    x = 0.5 + rng.standard_normal((4, *shape))
    out = layer.output_shape(shape)
    lead = (4,) if vectors is None else (vectors, 4)
    total = x.sum(axis=tuple(range(1, x.ndim))).reshape(-1, *(1,) * len(out))
    return layer, x, rng.standard_normal((*lead, *out)) + 0.2 * total


def statistics(
    backend: Backend, layer: Layer, x: HostArray, g: HostArray
) -> AffineStatistics | GroupedStatistics:
    params = to_backend(backend, host_params(layer, np.random.default_rng(0)))
    _, cache = layer.forward(params, backend.asarray(x))
    return layer.backward(params, cache, backend.asarray(g))[1]


def definition(
    layer: Conv, x: HostArray, g: HostArray, assumptions: Assumption, weights: HostArray
) -> HostArray:
    """The block by loops over locations and taps; M = N. Pixels are told apart by coordinates."""
    geometry = layer.geometry(x.shape[1:-1])
    mean, second = activations(geometry, x, assumptions, weights / weights.sum())
    gamma = derivatives(g, len(layer.kernel), assumptions)
    c, o = x.shape[-1], g.shape[-1]
    taps = list(itertools.product(*map(range, layer.kernel)))

    def pixel(t: tuple[int, ...], tap: tuple[int, ...]) -> tuple[int, ...]:
        steps = zip(t, tap, geometry.stride, geometry.dilation, geometry.padding, strict=True)
        return tuple(i * s + k * d - before for i, k, s, d, (before, _) in steps)

    d = len(taps) * c + layer.bias
    block = np.zeros((o, d, o, d))
    for (t, s), derivative in gamma.items():
        a = np.zeros((d, d))
        for (i, u), (j, v) in itertools.product(enumerate(taps), enumerate(taps)):
            # Padding is no pixel: its moments are 0.
            a[i * c : (i + 1) * c, j * c : (j + 1) * c] = second.get((pixel(t, u), pixel(s, v)), 0)
        if layer.bias:
            for i, u in enumerate(taps):
                a[i * c : (i + 1) * c, -1] = mean.get(pixel(t, u), 0.0)
                a[-1, i * c : (i + 1) * c] = mean.get(pixel(s, u), 0.0)
            a[-1, -1] = 1.0
        block += np.einsum("ij,kl->ikjl", derivative, a)
    return block.reshape(o * d, o * d)


def activations(
    geometry: Geometry, x: HostArray, assumptions: Assumption, weights: HostArray
) -> tuple[dict[Any, HostArray], dict[Any, HostArray]]:
    """Mean of each pixel, and second moment of each pair of them."""
    sides = zip(x.shape[1:-1], geometry.padding, strict=True)
    ranges = [range(-min(before, 0), n + min(after, 0)) for n, (before, after) in sides]
    of = {p: x[(slice(None), *p)] for p in itertools.product(*ranges)}
    mean = {p: weights @ a for p, a in of.items()}
    second = {(p, q): (a * weights[:, None]).T @ b for p, a in of.items() for q, b in of.items()}
    if SHA in assumptions:
        mean = dict.fromkeys(of, np.mean(list(mean.values()), axis=0))
        second = by_displacement(second)
    if SUA in assumptions:
        apart = {(p, q): np.outer(mean[p], mean[q]) for p, q in second if p != q}
        second = {**second, **apart}
    return mean, second


def derivatives(g: HostArray, axes: int, assumptions: Assumption) -> dict[Any, HostArray]:
    """Γ(t, t') of each pair of locations."""
    *_, n, o = *g.shape[: -1 - axes], g.shape[-1]
    out = g.shape[-1 - axes : -1]
    rows = g.reshape(-1, *out, o)
    of = {t: rows[(slice(None), *t)] for t in itertools.product(*map(range, out))}
    gamma = {(t, s): a.T @ b / n for t, a in of.items() for s, b in of.items()}
    if SHD in assumptions:
        gamma = by_displacement(gamma)
    if WD in assumptions:
        white = np.mean([np.trace(gamma[t, t]) / o for t in of])
        gamma = {(t, s): (t == s) * white * np.eye(o) for t, s in gamma}
    if SUD in assumptions:
        gamma = {(t, s): (t == s) * m for (t, s), m in gamma.items()}
    return gamma


def by_displacement(moments: dict[Any, HostArray]) -> dict[Any, HostArray]:
    groups: dict[Any, list[HostArray]] = {}

    def displacement(p: tuple[int, ...], q: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(p, q, strict=True))

    for (p, q), m in moments.items():
        groups.setdefault(displacement(p, q), []).append(m)
    return {(p, q): np.mean(groups[displacement(p, q)], axis=0) for p, q in moments}


@pytest.mark.parametrize("assumptions", SETS, ids=show)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_set_of_assumptions_is_its_definition(
    backend: Backend, name: str, assumptions: Assumption
):
    layer, x, g = case(name)
    weights = np.asarray([0.5, 1.0, 2.0, 0.7])
    scale = Scale(4, 4, backend.asarray(weights))
    block = convolution_block(statistics(backend, layer, x, g), scale, assumptions)
    assert block.operand_shape == (g.shape[-1], layer.kernel_columns + layer.bias)
    assert_close(block.to_dense(), definition(layer, x, g, assumptions, weights))


@pytest.mark.parametrize("vectors", [None, 3])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_no_assumption_is_the_exact_block(backend: Backend, name: str, vectors: int | None):
    s = statistics(backend, *case(name, vectors))
    block = convolution_block(s, Scale(4, 4)).to_dense()
    assert_close(block, ExactBlock().moments(s, Scale(4, 4))["block"])


def test_uncorrelated_given_the_activations(backend: Backend):
    """SUD alone takes every location for an example."""
    layer, x, g = case("2d same")
    block = convolution_block(statistics(backend, layer, x, g), Scale(4, 4), SUD).to_dense()
    a = host(statistics(backend, layer, x, g).a)
    g = g.reshape(2, 4, -1, 2)
    u = np.einsum("knti,ntj->kntij", g, a).reshape(-1, 2 * a.shape[-1])
    assert_close(block, u.T @ u / 4)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_expand_is_independence_and_derivatives_alike_everywhere(backend: Backend, name: str):
    """`KFACBlock` needs no homogeneity of the activations: it averages whole patches."""
    s = statistics(backend, *case(name))
    scale = Scale(4, 4, backend.asarray([0.5, 1.0, 2.0, 0.7]))
    kfac = KFACBlock()
    moments = {**kfac.input_moments(s, scale), **kfac.moments(s, scale)}
    expected = kfac.matrix(moments, s.parameter_shape).to_dense()
    assert_close(convolution_block(s, scale, IAD | SUD | SHD).to_dense(), expected)
    factors = kfc_factors(s, scale, IAD | SUD | SHD)
    assert_close(factors.to_dense(), expected)
    assert_close(factors.A, s.num_locations * moments["A"])
    assert_close(factors.G, moments["G"] / s.num_locations)


def test_one_location_is_a_dense_layer(backend: Backend):
    """Without sharing there is nothing to assume but IAD, and that is K-FAC."""
    rng = np.random.default_rng(0)
    a, g = backend.asarray(rng.standard_normal((5, 1, 3))), backend.asarray(rng.random((5, 1, 2)))
    s, kfac, scale = AffineStatistics(a, g), KFACBlock(), Scale(5, 5)
    moments = {**kfac.input_moments(s, scale), **kfac.moments(s, scale)}
    expected = kfac.matrix(moments, (2, 3)).to_dense()
    for assumptions in (IAD, IAD | SHA, IAD | SUA, KFC):
        assert_close(convolution_block(s, scale, assumptions).to_dense(), expected)


def test_a_dense_layer_over_a_sequence_is_a_convolution_of_one_tap(backend: Backend):
    x = np.random.default_rng(0).standard_normal((4, 5, 2))
    g = np.random.default_rng(1).standard_normal((4, 5, 3))
    for bias, assumptions in itertools.product((True, False), SETS):
        layers = Conv(2, 3, (1,), bias=bias), Dense(2, 3, bias=bias)
        one, other = (statistics(backend, layer, x, g) for layer in layers)
        assert not isinstance(other.inputs, Patches)
        blocks = [convolution_block(s, Scale(4, 4), assumptions).to_dense() for s in (one, other)]
        assert_close(*blocks)


def test_a_group_is_a_convolution_of_its_own(backend: Backend):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((3, 4, 4)), rng.standard_normal((3, 3, 2))
    whole = statistics(backend, Conv(4, 2, (2,), groups=2), x, g)
    alone = statistics(backend, Conv(2, 1, (2,)), x[..., 2:], g[..., 1:])
    blocks = [convolution_block(s, Scale(3, 3), KFC).to_dense() for s in (whole.groups[1], alone)]
    assert_close(*blocks)


# ------------------------------------------------------------------------------------- theorems


def rearranged(block: HostArray, d_out: int) -> HostArray:
    """Van Loan: a Kronecker product becomes a matrix of rank 1."""
    d = block.shape[0] // d_out
    return block.reshape(d_out, d, d_out, d).transpose(0, 2, 1, 3).reshape(d_out**2, d**2)


def second_to_first(block: HostArray, d_out: int) -> float:
    values = np.linalg.svd(rearranged(block, d_out), compute_uv=False)
    return float(values[1] / values[0])


@pytest.mark.parametrize("name", [n for n, (layer, _) in CONVOLUTIONS.items() if layer.c_out > 1])
def test_theorem_1_the_block_is_a_kronecker_product(backend: Backend, name: str):
    """To rounding under IAD, SH and SUD; homogeneous activations are not needed for that."""
    layer, x, g = case(name)
    shape = g.shape[-len(layer.kernel) - 1 :]
    g = g + 3.0 * np.random.default_rng(7).standard_normal(shape)  # differs by location
    s, scale = statistics(backend, layer, x, g), Scale(4, 4)
    for assumptions in (KFC, KFC & ~SHA, KFC | SUA, IAD | WD):
        block = host(convolution_block(s, scale, assumptions).to_dense())
        assert second_to_first(block, layer.c_out) <= 20 * EPS
        assert_close(kfc_factors(s, scale, assumptions).to_dense(), block, 1e-14)
    for assumptions in (SUD, IAD | SH, IAD | SUD):
        block = host(convolution_block(s, scale, assumptions).to_dense())
        assert second_to_first(block, layer.c_out) >= 0.005


@pytest.mark.parametrize("assumptions", [KFC, KFC & ~SHA, IAD | SHD | SUD | SUA, IAD | WD], ids=str)
def test_factors_of_k_fac_only_where_nothing_is_assumed_of_them(
    backend: Backend, assumptions: Assumption
):
    """Ω = T·A without assumptions about activations, Γ = G/T without white derivatives."""
    layer, x, g = case("2d same")
    s, scale = statistics(backend, layer, x, g), Scale(4, 4)
    t = s.num_locations
    block, found = KFACBlock(), kfc_factors(s, scale, assumptions)
    moments = {**block.input_moments(s, scale), **block.moments(s, scale)}
    assumed = {"A": bool(assumptions & (SHA | SUA)), "G": WD in assumptions}
    for ours, theirs in (("A", found.A / t), ("G", found.G * t)):
        distance = frobenius_distance(theirs, moments[ours])
        assert distance > 0.01 if assumed[ours] else distance < 1e-14


def counts(size: int, kernel: int) -> HostArray:
    """β(δ, δ') of theorem 1 along one axis, for a centred kernel and padding that keeps the size.

    Locations t for which t + δ and t + δ' are in the image.
    """
    reach = range(-(kernel // 2), kernel // 2 + 1)
    return np.asarray(
        [[size - max(i, j, 0) + min(i, j, 0) for j in reach] for i in reach], dtype=float
    )


def moments_of_channels(x: HostArray, displacement: tuple[int, int]) -> HostArray:
    """Ω(j, j', δ): the mean over examples and all pairs of pixels at that displacement."""
    h, w = x.shape[1:3]
    i, j = displacement
    first = x[:, max(-i, 0) : h - max(i, 0), max(-j, 0) : w - max(j, 0)]
    second = x[:, max(i, 0) : h - max(-i, 0), max(j, 0) : w - max(-j, 0)]
    return np.einsum("nhwc,nhwd->cd", first, second) / first[..., 0].size


@pytest.mark.parametrize("uncorrelated", [False, True], ids=["theorem 1", "theorem 4"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (5, 3)], ids=str)
def test_theorems_1_and_4_from_their_formulas(
    backend: Backend, kernel: tuple[int, int], uncorrelated: bool
):
    """β(δ, δ') Ω(j, j', δ' - δ) and Γ; with SUA and WD, Σ 1[δ = δ'] + M Mᵀ, and the identity."""
    rng = np.random.default_rng(3)
    size, c, c_out = (5, 4), 2, 3
    x = 0.5 + rng.standard_normal((6, *size, c))
    g = rng.standard_normal((2, 6, *size, c_out))
    layer = Conv(c, c_out, kernel, padding="same")
    assumptions = KFC | SUA | WD if uncorrelated else KFC
    factors = kfc_factors(statistics(backend, layer, x, g), Scale(6, 6), assumptions)

    beta = np.einsum("ij,kl->ikjl", *(counts(n, k) for n, k in zip(size, kernel, strict=True)))
    taps = list(itertools.product(*map(range, kernel)))
    mean = x.mean(axis=(0, 1, 2))
    omega = np.zeros((len(taps), c, len(taps), c))
    for (i, u), (j, v) in itertools.product(enumerate(taps), enumerate(taps)):
        if uncorrelated:
            sigma = moments_of_channels(x, (0, 0)) - np.outer(mean, mean)
            m = sigma * (u == v) + np.outer(mean, mean)
        else:
            m = moments_of_channels(x, (v[0] - u[0], v[1] - u[1]))
        omega[i, :, j, :] = beta[(*u, *v)] * m
    omega = omega.reshape(len(taps) * c, -1)
    # The bias is a tap that always sees 1: β(δ) M(j), and the number of locations.
    column = np.concatenate([beta[(*u, *u)] * mean for u in taps])
    locations = math.prod(size)
    assert_close(factors.A, np.block([[omega, column[:, None]], [column, locations]]))
    gamma = np.einsum("knhwi,knhwj->ij", g, g) / (6 * locations)
    if uncorrelated:
        gamma = np.eye(c_out) * np.trace(gamma) / c_out
    assert_close(factors.G, gamma)


# ------------------------------------------------- assumptions that hold by construction, and not

PIXELS, CHANNELS = 4, 2


def factorial(values: tuple[float, float], places: int) -> HostArray:
    """All combinations: independent by construction."""
    return np.asarray(list(itertools.product(values, repeat=places)))


def independent() -> tuple[HostArray, HostArray]:
    """4,096 examples for which every assumption holds exactly: each image with each derivative."""
    x = factorial((-1.0, 2.0), PIXELS)[:, :, None]
    g = factorial((-1.0, 1.0), PIXELS * CHANNELS).reshape(-1, PIXELS, CHANNELS)
    return np.repeat(x, len(g), axis=0), np.tile(g, (len(x), 1, 1))


def independent_statistics(x: HostArray, g: HostArray) -> tuple[AffineStatistics, Scale]:
    geometry = Geometry((3,), (1,), (1,), ((1, 1),))
    patches = Patches(x, geometry, True, 2**20)
    return AffineStatistics(patches, g), Scale(len(x), len(x))


def along(axis_values: list[float]) -> HostArray:
    return np.asarray(axis_values)[None, :, None]


# What breaks one assumption (and the fewest others), which sets then still hold, which do not.
SPOILT = {
    "nothing": (lambda x, g: (x, g), [*SETS, NONE, SUD], []),
    "IAD": (
        lambda x, g: (x, g * (1.0 + 0.5 * x[:, :1, :])),
        [NONE],
        [IAD, KFC],
    ),
    "SH of activations": (
        lambda x, g: (x * along([0.5, 1.0, 1.5, 2.0]), g),
        [NONE, SUD, IAD, IAD | SUD, IAD | SHD | SUD, IAD | SUA, IAD | SUA | WD],
        [IAD | SHA, KFC],
    ),
    "SH of derivatives": (
        lambda x, g: (x, g * along([0.5, 1.0, 1.5, 2.0])),
        [NONE, SUD, IAD, IAD | SHA, IAD | SUD, IAD | SHA | SUA | SUD],
        [IAD | SHD, KFC, IAD | WD],
    ),
    "SUD": (
        lambda x, g: (x, np.tile(g[:, :1, :], (1, PIXELS, 1))),
        [NONE, IAD, IAD | SH, IAD | SH | SUA],
        [SUD, IAD | SUD, KFC, IAD | WD],
    ),
    "SUA": (
        lambda x, g: (np.tile(x[:, :1, :], (1, PIXELS, 1)), g),
        [NONE, SUD, IAD, IAD | SUD, IAD | SH, KFC, IAD | SHA | WD],
        [IAD | SUA, KFC | SUA],
    ),
    "WD": (
        lambda x, g: (x, g * np.asarray([1.0, 3.0])),
        [NONE, SUD, IAD, IAD | SH, KFC, KFC | SUA],
        [IAD | WD, KFC | WD],
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_block_is_exact_where_its_assumptions_hold(spoilt: str):
    """With one assumption broken, the sets that have it lose at least 5 %, the others nothing."""
    change, hold, fail = SPOILT[spoilt]
    s, scale = independent_statistics(*change(*independent()))
    exact = convolution_block(s, scale).to_dense()
    for assumptions in hold:
        found = convolution_block(s, scale, assumptions).to_dense()
        assert frobenius_distance(found, exact) <= 1e-13, show(assumptions)
    for assumptions in fail:
        found = convolution_block(s, scale, assumptions).to_dense()
        assert frobenius_distance(found, exact) >= 0.05, show(assumptions)


def test_periodic_images_are_homogeneous():
    """All cyclic shifts of an image: correlated pixels, and no place unlike another."""
    rng = np.random.default_rng(0)
    n = 5
    image, derivative = rng.standard_normal((n, 2)) + 0.5, rng.standard_normal((n, 3))
    x = np.stack([np.roll(image, i, axis=0) for i in range(n) for _ in range(n)])
    g = np.stack([np.roll(derivative, i, axis=0) for _ in range(n) for i in range(n)])
    s, scale = independent_statistics(x, g)
    exact = convolution_block(s, scale).to_dense()
    for assumptions in (IAD, IAD | SHA, IAD | SHD, IAD | SH):
        found = convolution_block(s, scale, assumptions).to_dense()
        assert frobenius_distance(found, exact) <= 1e-13, show(assumptions)
    for assumptions in (IAD | SUD, IAD | SUA):
        found = convolution_block(s, scale, assumptions).to_dense()
        assert frobenius_distance(found, exact) >= 0.1, show(assumptions)


@pytest.mark.parametrize("assumptions", [IAD, IAD | SUD, KFC, KFC | SUA | WD], ids=show)
def test_the_error_of_independent_draws_goes_to_zero(assumptions: Assumption):
    """As one over the root of the number of examples."""
    errors = []
    for n in (200, 3200):
        rng = np.random.default_rng(n)
        found = []
        for _ in range(5):
            x, g = 1.0 + rng.standard_normal((n, 4, 1)), rng.standard_normal((n, 4, 2))
            s, scale = independent_statistics(x, g)
            exact = convolution_block(s, scale).to_dense()
            found.append(
                frobenius_distance(convolution_block(s, scale, assumptions).to_dense(), exact)
            )
        errors.append(float(np.mean(found)))
    assert errors[1] <= 0.15
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.25)


# ------------------------------------------------------------------------- what each step loses


def bars(rng: np.random.Generator, n: int) -> tuple[HostArray, HostArray]:
    """Noisy 6×6 images with a bright row, a bright column or neither, and which of them."""
    t, x = class_targets(rng, (n, 3)), 0.3 * rng.standard_normal((n, 6, 6, 1))
    for image, kind, place in zip(x[..., 0], t, rng.integers(0, 6, n), strict=True):
        if kind == 2:
            image += 1 / 6
        else:
            image[(place,) if kind == 0 else (slice(None), place)] += 1.0
    return x, t


BARS = Sequential(
    Conv(1, 3, (3, 3), padding=1),
    Tanh(),
    Conv(3, 4, (3, 3), stride=2, padding=1),
    Tanh(),
    Flatten(),
    Dense(36, 3),
)


@functools.cache
def trained() -> tuple[Any, HostArray, HostArray]:
    """Parameters after 30 steps of Adam: the loss falls from 1.2 to 0.5."""
    x, t = bars(np.random.default_rng(0), 60)
    optimizer = Adam(Objective(BARS, SoftmaxCrossEntropy()), 0.01)
    state = optimizer.init(BARS.init(Rng(1), get_backend("numpy", "float64")))
    for _ in range(30):
        state, report = optimizer.step(state, x, t)
    assert 0.4 <= report.loss <= 0.6
    return state.params, x, t


# ‖block - exact‖_F / ‖exact‖_F of the two convolutions.
LOSSES = {
    IAD: (0.316, 0.197),
    IAD | SHA: (0.370, 0.367),
    IAD | SHD: (0.474, 0.347),
    IAD | SUA: (0.418, 0.295),
    IAD | SUD: (1.058, 0.785),
    IAD | WD: (0.968, 0.842),
    SUD: (1.005, 0.780),
    IAD | SH: (0.451, 0.425),
    IAD | SHD | SUD: (1.050, 0.802),
    IAD | SHA | SUD: (1.050, 0.808),
    KFC: (1.046, 0.810),
    KFC | SUA: (1.044, 0.820),
    KFC | SUA | WD: (0.964, 0.857),
}


@pytest.mark.parametrize("assumptions", LOSSES, ids=show)
def test_what_each_assumption_loses(backend: Backend, assumptions: Assumption):
    """In a network with one loss term an image, SUD loses most: derivatives go hand in hand."""
    params, x, t = trained()
    objective = Objective(BARS, SoftmaxCrossEntropy())
    e = objective.evaluate(to_backend(backend, params), backend.asarray(x), backend.asarray(t))
    (tree,) = Exact().statistics(e, Rng(0))
    for s, expected in zip((tree[0], tree[2]), LOSSES[assumptions], strict=True):
        exact = convolution_block(s, e.scale).to_dense()
        found = convolution_block(s, e.scale, assumptions).to_dense()
        assert frobenius_distance(found, exact) == pytest.approx(expected, abs=0.001)


# ----------------------------------------------------------------------------- expand and reduce


def errors(e: Evaluation, sharing: str) -> list[float]:
    """What `KFACBlock` loses, layer by layer."""
    kfac, exact = SHARING[sharing], BlockDiagonal(ExactBlock())
    blocks = [c.matrix(estimate(c, e), e.params).blocks for c in (kfac, exact)]
    pairs = zip(*(trees.leaves(b) for b in blocks), strict=True)
    return [frobenius_distance(a.to_dense(), b.to_dense()) for a, b in pairs]


def random_batch(backend: Backend, network: Sequential, shape: tuple[int, ...]) -> Evaluation:
    """A batch for squared error, at random parameters."""
    rng = np.random.default_rng(0)
    start = network.init(Rng(0), get_backend("numpy", "float64"))
    params = trees.tree_map(lambda w: rng.standard_normal(w.shape) / np.sqrt(w.shape[-1]), start)
    return at(backend, network, params, rng.standard_normal(shape))


def at(backend: Backend, network: Sequential, params: Any, x: HostArray) -> Evaluation:
    t = np.zeros((len(x), *network.output_shape(x.shape[1:])))
    params, x, t = to_backend(backend, (params, x, t))
    return Objective(network, SquaredError()).evaluate(params, x, t)


def pooled(backend: Backend, *layers: Layer, size: int = 6) -> Evaluation:
    """Layers, the mean over pixels, and a linear map: both in one matrix after flattening."""
    shape = (size, size, 2)
    *out, c = Sequential(*layers).output_shape(shape)
    t = math.prod(out)
    network = Sequential(*layers, Flatten(), Dense(t * c, 3))
    rng = np.random.default_rng(0)
    start = network.init(Rng(0), get_backend("numpy", "float64"))
    params = trees.tree_map(lambda w: rng.standard_normal(w.shape) / np.sqrt(w.shape[-1]), start)
    params[-1][:, :-1] = np.tile(rng.standard_normal((3, c)) / np.sqrt(c), (1, t)) / t
    return at(backend, network, params, rng.standard_normal((8, *shape)))


@pytest.mark.parametrize("padding", [0, 1])
def test_expand_is_exact_with_an_error_at_every_location(backend: Backend, padding: int):
    """One convolution and a squared error an output pixel: there is one derivative a location."""
    network = Sequential(Conv(2, 3, (3, 3), padding=padding))
    assert errors(random_batch(backend, network, (4, 5, 4, 2)), "expand")[0] <= 1e-14
    # Below another convolution locations share outputs.
    network = Sequential(Conv(2, 3, (3,), padding=padding), Conv(3, 2, (3,), padding=padding))
    first, second = errors(random_batch(backend, network, (4, 7, 2)), "expand")
    assert second <= 1e-14
    assert first >= 0.3


@pytest.mark.parametrize("padding", [0, 1])
def test_reduce_is_exact_before_a_mean(backend: Backend, padding: int):
    """Whatever the padding: it is part of the patches. Expand loses nearly all."""
    e = pooled(backend, Conv(2, 3, (3, 3), padding=padding))
    assert errors(e, "reduce")[0] <= 1e-14
    assert errors(e, "expand")[0] >= 0.9


@pytest.mark.parametrize(
    ("padding", "size", "first"),
    [(1, 6, 0.131), (1, 12, 0.053), (0, 6, 0.792), (0, 12, 0.174)],
    ids=["padded 6", "padded 12", "unpadded 6", "unpadded 12"],
)
def test_reduce_two_convolutions_before_a_mean(
    backend: Backend, padding: int, size: int, first: float
):
    """Exact for the second. What comes back to the first is smaller at the border.

    There fewer taps of the second look: with padding 4 or 6 of 9 and in the outer row alone;
    without, as few as 1 and in two rows. The larger the image the less it matters.
    """
    layers = [Conv(2, 3, (3, 3), padding=padding), Identity(), Conv(3, 3, (3, 3), padding=padding)]
    found = errors(pooled(backend, *layers, size=size), "reduce")
    assert found[1] <= 1e-14
    assert found[0] == pytest.approx(first, abs=0.001)


# ----------------------------------------------------------------------------------- bad requests


def test_assumptions_on_moments_need_independence(backend: Backend):
    s = statistics(backend, *case("1d"))
    for assumptions in (SHA, SHD, SUA, WD, SUD | SUA):
        with pytest.raises(CurvatureError, match="expected IAD with"):
            convolution_block(s, Scale(4, 4), assumptions)


def test_no_factors_where_the_block_is_no_product(backend: Backend):
    s = statistics(backend, *case("1d"))
    for assumptions in (NONE, SUD, IAD, IAD | SUD, IAD | SH):
        with pytest.raises(CurvatureError, match="expected IAD with SUD and SH_DERIVATIVES"):
            kfc_factors(s, Scale(4, 4), assumptions)


def test_what_is_refused(backend: Backend):
    s = statistics(backend, *case("1d"))
    grouped = GroupedStatistics((s, s))
    for f in (convolution_block, kfc_factors):
        with pytest.raises(CurvatureError, match=r"got GroupedStatistics.*s\.groups\[i\]"):
            f(grouped, Scale(4, 4), KFC)
        with pytest.raises(CurvatureError, match="got tuple"):
            f((), Scale(4, 4), KFC)
        with pytest.raises(CurvatureError, match="batch statistics"):
            f(s, Scale(4, 4, coupled=True), KFC)
        with pytest.raises(CurvatureError, match="convolution_block"):
            f(s.inputs_only(), Scale(4, 4), KFC)
    for assumptions in (NONE, SUD, IAD, KFC):
        with pytest.raises(CurvatureError, match=r"at most 50 numbers, got .*small networks"):
            convolution_block(s, Scale(4, 4), assumptions, max_numbers=50)
    with pytest.raises(CurvatureError, match="at most 50 numbers"):
        kfc_factors(s, Scale(4, 4), max_numbers=50)
    # Where no array of that size is needed, nothing is refused.
    assert convolution_block(s, Scale(4, 4), KFC, max_numbers=256).operand_shape == (2, 7)


def test_a_transposed_convolution_has_a_block_too(backend: Backend):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((3, 4, 2)), rng.standard_normal((3, 7, 2))
    s = statistics(backend, ConvTranspose(2, 2, (3,), stride=2, padding=1), x, g)
    kfac, scale = KFACBlock(), Scale(3, 3)
    moments = {**kfac.input_moments(s, scale), **kfac.moments(s, scale)}
    block = convolution_block(s, scale, IAD | SUD | SHD).to_dense()
    assert_close(block, kfac.matrix(moments, s.parameter_shape).to_dense())


def test_reduce_is_another_approximation(backend: Backend):
    """All derivatives of an image alike, rather than uncorrelated: not one of KFC's sets."""
    s = statistics(backend, *case("2d"))
    kfac = KFACBlock(sharing=reduce)
    moments = {**kfac.input_moments(s, Scale(4, 4)), **kfac.moments(s, Scale(4, 4))}
    dense = kfac.matrix(moments, s.parameter_shape).to_dense()
    for assumptions in SETS:
        block = convolution_block(s, Scale(4, 4), assumptions).to_dense()
        assert frobenius_distance(block, dense) >= 0.01
