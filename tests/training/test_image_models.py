"""Networks for images: what is built for which images, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kfac_np.backend import Rng, get_backend
from kfac_np.errors import ConfigError, InputError
from kfac_np.layers import (
    AveragePool,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    GroupNorm,
    LayerNorm,
    MaxPool,
    ReLU,
    Reshape,
    Residual,
    Tanh,
    fan_in_normal,
)
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.training.image_models import convnet, resnet
from kfac_np.training.metrics import evaluate, reconstruct


def layers_of(objective: Objective) -> list[Any]:
    return list(objective.network.layers)  # type: ignore[attr-defined]


def kinds(objective: Objective) -> str:
    """The layers by their first letters."""
    return "".join(type(layer).__name__[0] for layer in layers_of(objective)[1:])


def shapes(objective: Objective, pixels: int) -> list[tuple[int, ...]]:
    found, shape = [], (pixels,)
    for layer in layers_of(objective):
        shape = layer.output_shape(shape)
        found.append(shape)
    return found


@pytest.mark.parametrize(
    ("side", "options", "expected", "last"),
    [
        (28, {}, "CMRCMRCMRFD", (4, 4, 64)),
        (32, {}, "CMRCMRCMRFD", (4, 4, 64)),
        (28, {"window": 2}, "CMRCMRCMRFD", (3, 3, 64)),
        (8, {}, "CMRCRCMRFD", (2, 2, 64)),  # a kernel of 5 wants 3 pixels
        (8, {"kernel": 3}, "CMRCMRCMRFD", (1, 1, 64)),
        (3, {}, "CRCRCMRFD", (2, 2, 64)),
        (1, {"kernel": 1, "window": 2}, "CRCRCRFD", (1, 1, 64)),
        (28, {"pooling": "average"}, "CRACRACRAFD", (4, 4, 64)),
        (28, {"channels": (4,), "hidden": (7, 5), "dropout": 0.5}, "CMRFDRDRDD", (14, 14, 4)),
    ],
)
def test_convnets_fit_their_images(
    side: int, options: dict[str, Any], expected: str, last: tuple[int, ...]
) -> None:
    objective = convnet((side, side, 3), 10, **options)
    assert kinds(objective) == expected
    seen = shapes(objective, 3 * side * side)
    assert seen[expected.index("F")] == last
    assert seen[-1] == (10,)


def test_the_convnet_is_the_published_one() -> None:
    layers = layers_of(convnet((32, 32, 3), 10))
    assert layers[0] == Reshape((32, 32, 3))
    assert [layer for layer in layers if isinstance(layer, Conv)] == [
        Conv(3, 32, (5, 5), padding="same"),
        Conv(32, 32, (5, 5), padding="same"),
        Conv(32, 64, (5, 5), padding="same"),
    ]
    assert layers[2:4] == [MaxPool((3, 3), stride=2, padding=1), ReLU()]
    assert [layer.output_shape((32, 32, 3)) for layer in layers[2:3]] == [(16, 16, 3)]
    assert layers[-1] == Dense(1024, 10, initializer=layers[1].initializer)


def test_a_network_of_rows_is_one_of_images() -> None:
    backend = get_backend("numpy", "float64")
    network: Any = convnet((4, 6, 2), 3, channels=(2,), kernel=3).network
    params = network.init(Rng(0), backend)
    x = np.random.default_rng(0).random((5, 48))
    image = x.reshape(5, 4, 6, 2)
    expected = network.layers[1].forward(params[1], image)[0]
    for layer, p in zip(network.layers[2:], params[2:], strict=True):
        expected, _ = layer.forward(p, expected)
    assert np.array_equal(network.forward(params, x)[0], expected)


def test_convnets_take_their_parts() -> None:
    objective = convnet(
        (8, 8, 1), 2, (3,), 3, "average", 2, (4,), 0.25, Tanh(), fan_in_normal, SquaredError()
    )
    layers = layers_of(objective)
    assert isinstance(objective.loss, SquaredError)
    assert layers[2:4] == [Tanh(), AveragePool((2, 2), stride=2)]
    assert layers[-2] == Dropout(0.25)
    assert {x.initializer for x in layers if isinstance(x, Conv | Dense)} == {fan_in_normal}


def test_the_resnet_is_the_published_one() -> None:
    objective = resnet((32, 32, 3), 10, blocks=3, normalization="batch")
    layers = layers_of(objective)
    blocks = [layer for layer in layers if isinstance(layer, Residual)]
    assert len(blocks) == 9
    inner: Any = blocks[3].inner
    assert inner.layers == (
        Conv(16, 32, (3, 3), stride=2, padding="same", bias=False),
        BatchNorm(32),
        ReLU(),
        Conv(32, 32, (3, 3), padding="same", bias=False),
        BatchNorm(32),
    )
    assert blocks[3].shortcut == Conv(16, 32, (1, 1), stride=2, bias=False)
    assert [b.shortcut is None for b in blocks] == [True] * 3 + [False, True, True] * 2
    assert shapes(objective, 3072)[-3] == (8, 8, 64)
    assert layers[-1].d_in == 64


@pytest.mark.parametrize(
    ("width", "groups"), [(64, 8), (32, 8), (16, 4), (8, 2), (12, 2), (6, 1), (7, 1), (2, 1)]
)
def test_groups_are_equal_and_of_four_channels_at_least(width: int, groups: int) -> None:
    assert layers_of(resnet((8, 8, 1), 2, (width,)))[2] == GroupNorm(groups, width)


def test_residual_branches_without_normalisation_begin_small() -> None:
    backend = get_backend("numpy", "float64")
    objective = resnet((8, 8, 1), 3, widths=(16, 16), blocks=2, normalization="none")
    params = objective.network.init(Rng(0), backend)
    first, _, second = params[3]  # of the first block
    assert np.std(first[:, :-1]) == pytest.approx((2 / 144) ** 0.5, rel=0.05)
    assert np.std(second[:, :-1]) == pytest.approx((2 / 144) ** 0.5 / 2, rel=0.05)
    assert layers_of(objective)[1].bias
    layers = layers_of(resnet((8, 8, 1), 3, (4,), normalization="layer", dropout=0.5))
    assert layers[2] == LayerNorm(4)
    assert layers[-2] == Dropout(0.5)


@pytest.mark.parametrize(
    ("make", "shape", "options", "message"),
    [
        (convnet, (2, 9, 1), {}, r"at least 3 × 3 pixels for a kernel of 5, got 2 × 9"),
        (resnet, (4, 4, 1), {}, r"at least 5 × 5 pixels for 3 stages, got 4 × 4"),
        (resnet, (1, 4, 1), {"widths": (2,)}, r"at least 2 × 2 pixels for 1 stages"),
        (convnet, (8, 8), {}, r"image_shape: expected \(height, width, channels\), got \[8, 8\]"),
        (convnet, (8, 8, 1), {"channels": ()}, r"channels: expected positive sizes, got \[\]"),
        (convnet, (8, 8, 1), {"channels": (3, 0)}, r"channels: expected positive sizes"),
        (convnet, (8, 8, 1), {"hidden": (2.5,)}, r"hidden: expected positive sizes, got \[2.5\]"),
        (convnet, (8, 8, 1), {"kernel": True}, r"kernel: expected positive sizes"),
        (convnet, (8, 8, 1), {"window": 1}, r"window: expected at least 2, got 1"),
        (convnet, (8, 8, 1), {"window": 99}, r"at least 49 × 49 pixels for a pooling window of 99"),
        (convnet, (8, 8, 1), {"pooling": "min"}, r"pooling: expected max or average, got 'min'"),
        (resnet, (8, 8, 1), {"blocks": 0}, r"blocks: expected positive sizes, got \[0\]"),
        (resnet, (8, 8, 1), {"widths": ()}, r"widths: expected positive sizes"),
        (
            resnet,
            (8, 8, 1),
            {"normalization": "instance"},
            r"normalization: expected none, batch, group or layer, got 'instance'",
        ),
    ],
)
def test_impossible_networks(make: Any, shape: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{make.__name__}: .*{message}"):
        make(shape, 10, **options)


def test_no_tap_of_a_kernel_is_idle() -> None:
    # A tap that never sees a pixel has no derivative: a row and column of zeros in A.
    backend = get_backend("numpy", "float64")
    for objective, pixels in (
        (convnet((8, 8, 1), 2, (2, 2, 2)), 64),
        (convnet((3, 3, 1), 2, (2, 2, 2)), 9),
        (resnet((5, 5, 1), 2, (2, 3, 2), normalization="none"), 25),
    ):
        params = objective.network.init(Rng(1), backend)
        x = np.random.default_rng(1).random((20, pixels))
        e = objective.evaluate(params, x, np.arange(20) % 2)
        statistics = e.backward(e.output_gradient())
        shape: tuple[int, ...] = (pixels,)
        for layer, s in zip(layers_of(objective), statistics, strict=True):
            if isinstance(layer, Conv):
                a = s.a.reshape(-1, s.a.shape[-1])
                taps = a[:, :-1].reshape(len(a), -1, layer.c_in)
                assert (np.abs(taps).sum(axis=(0, 2)) > 0).all(), (layer, shape)
            shape = layer.output_shape(shape)


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_chunks_do_not_change_what_batch_statistics_are(chunk: int | None) -> None:
    backend = get_backend("numpy", "float64")
    objective = resnet((5, 5, 1), 3, widths=(2,), normalization="batch")
    params = objective.network.init(Rng(0), backend)
    rng = np.random.default_rng(0)
    x, t = rng.random((9, 25)), rng.integers(0, 3, 9)
    frozen = objective.evaluation(params, x)
    expected = objective.value(params, x, t)  # the statistics are those of x itself
    found = evaluate(frozen, params, x, t, "classification", chunk)
    assert found.loss == pytest.approx(expected, rel=1e-12)
    for measure in (
        lambda: evaluate(objective, params, x, t, "classification", chunk),
        lambda: reconstruct(objective, params, x),
    ):
        with pytest.raises(InputError, match=r"batch statistics; freeze them with Objective\.eval"):
            measure()
