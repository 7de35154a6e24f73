"""Networks for images by name: a plain convolutional one and a residual one, as objectives.

Both take flat rows of pixels, as data sets have them, and make images of them first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

from kfac_np.backend import Array, Backend, Rng
from kfac_np.errors import ConfigError
from kfac_np.layers import (
    Activation,
    AveragePool,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePool,
    GroupNorm,
    Initializer,
    Layer,
    LayerNorm,
    MaxPool,
    ReLU,
    Reshape,
    Residual,
    Sequential,
    he,
)
from kfac_np.losses import Loss, SoftmaxCrossEntropy
from kfac_np.objective import Objective
from kfac_np.validation import require_one_of

__all__ = ["NormalizationName", "Pooling", "convnet", "resnet"]

Pooling = Literal["max", "average"]
NormalizationName = Literal["none", "batch", "group", "layer"]


def convnet(
    image_shape: tuple[int, int, int],
    num_classes: int,
    channels: Sequence[int] = (32, 32, 64),
    kernel: int = 5,
    pooling: Pooling = "max",
    window: int = 3,
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    activation: Activation | None = None,
    initializer: Initializer = he,
    loss: Loss | None = None,
) -> Objective:
    """Convolutions, each with an activation and a pooling that halves the image; dense layers.

    Convolutions keep the size of the image ("same" padding). A pooling is left out where the next
    convolution's kernel would be so large for what is left that some of its taps never saw a
    pixel: images of 28 × 28 and a kernel of 5 have three poolings, images of 8 × 8 two, after the
    first convolution and after the last one.

    Parameters
    ----------
    image_shape : (height, width, channels)
    num_classes : int
    channels : sequence of int
        Of the convolutions.
    kernel : int
        Height and width of each of them.
    pooling : {"max", "average"}
        Max pooling comes before the activation (for one that rises the same, and less work),
        average pooling after it.
    window : int
        Height and width that are pooled, with stride 2 and ⌊(window - 1) / 2⌋ pixels of padding:
        an axis of n becomes ⌈n / 2⌉ with an odd window, ⌊n / 2⌋ with an even one. The
        padding may be no larger than the image.
    hidden : sequence of int
        Dense layers with an activation, after the convolutions.
    dropout : float
        Rate, before the last layer; 0 for none.
    activation : Activation
        ReLU by default.
    initializer : callable
    loss : Loss
        Softmax cross-entropy by default.

    Returns
    -------
    Objective
        Of flat rows of pixels and labels.

    Raises
    ------
    ConfigError
        Images are too small for the kernel or the window, or a size is not a positive whole
        number.

    References
    ----------
    Grosse & Martens 2016, arXiv:1602.01407, §6 (the network for CIFAR-10, of cuda-convnet).

    Examples
    --------
    >>> objective = convnet((28, 28, 1), 10)
    >>> objective.network
    Sequential(Reshape((28, 28, 1)),
        Conv(1, 32, (5, 5), padding='same'), MaxPool((3, 3), stride=2, padding=1), ReLU(),
        Conv(32, 32, (5, 5), padding='same'), MaxPool((3, 3), stride=2, padding=1), ReLU(),
        Conv(32, 64, (5, 5), padding='same'), MaxPool((3, 3), stride=2, padding=1), ReLU(),
        Flatten(), Dense(1024, 10))
    """
    _check("convnet", image_shape=image_shape, channels=channels, hidden=hidden)
    _check("convnet", num_classes=(num_classes,), kernel=(kernel,), window=(window,))
    require_one_of("convnet: pooling", pooling, get_args(Pooling))
    if window < 2:
        raise ConfigError(f"convnet: window: expected at least 2, got {window}")
    activation = ReLU() if activation is None else activation
    *size, depth = image_shape
    needed = kernel // 2 + 1  # so that each tap of the kernel sees a pixel somewhere
    _require_size("convnet", image_shape, needed, f"a kernel of {kernel}")
    padding = (window - 1) // 2
    _require_size("convnet", image_shape, padding, f"a pooling window of {window}")
    pool = (MaxPool if pooling == "max" else AveragePool)((window, window), 2, padding)
    layers: list[Layer] = [Reshape(tuple(image_shape))]
    for i, width in enumerate(channels):
        layers.append(Conv(depth, width, (kernel, kernel), padding="same", initializer=initializer))
        depth, pooled = width, [(n + 2 * padding - window) // 2 + 1 for n in size]
        if min(pooled) >= (1 if i == len(channels) - 1 else needed):
            layers += [pool, activation] if pooling == "max" else [activation, pool]
            size = pooled
        else:
            layers.append(activation)
    layers.append(Flatten())
    sizes = [math.prod(size) * depth, *hidden]
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [Dense(d_in, d_out, initializer=initializer), activation]
    return _classifier(layers, sizes[-1], num_classes, dropout, initializer, loss)


def resnet(
    image_shape: tuple[int, int, int],
    num_classes: int,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 1,
    normalization: NormalizationName = "group",
    dropout: float = 0.0,
    activation: Activation | None = None,
    initializer: Initializer = he,
    loss: Loss | None = None,
) -> Objective:
    """A residual network: stages of blocks of two 3 × 3 convolutions, each stage at half the size.

    A block is h(x) + f(x), f = convolution, normalisation, activation, convolution, normalisation,
    and an activation follows the sum. h is the identity, or a 1 × 1 convolution where the shape
    changes. At the end stand the mean over the image and one dense layer.

    Parameters
    ----------
    image_shape : (height, width, channels)
    num_classes : int
    widths : sequence of int
        Channels of each stage; the first block of all but the first has stride 2.
    blocks : int
        In each stage: (16, 32, 64) with 3 is the published network of 20 layers, 1 makes 8.
    normalization : {"none", "batch", "group", "layer"}
        What follows each 3 × 3 convolution, which then has no bias. "group" has 8 groups of
        channels, or 4, 2 or 1 where they would not be equal or have less than 4. With "none", the
        weights of each block's second convolution begin divided by the square root of the number
        of blocks, which keeps the outputs from growing with depth. "batch" makes examples influence
        each other (see `kfac_np.layers.BatchNorm`).
    dropout : float
        Rate, before the last layer; 0 for none.
    activation : Activation
        ReLU by default.
    initializer : callable
    loss : Loss
        Softmax cross-entropy by default.

    Returns
    -------
    Objective
        Of flat rows of pixels and labels.

    Raises
    ------
    ConfigError
        Images are too small for so many stages, or a size is not a positive integer.

    References
    ----------
    He et al. 2016, arXiv:1512.03385, §4.2 (with option B for the shortcuts).

    Examples
    --------
    >>> net = resnet((8, 8, 1), 10, widths=(4, 8), normalization="none").network
    >>> net.layers[5].inner
    Sequential(Conv(4, 8, (3, 3), stride=2, padding='same'), ReLU(),
        Conv(8, 8, (3, 3), padding='same'))
    >>> net.output_shape((64,))
    (10,)
    """
    _check("resnet", image_shape=image_shape, widths=widths)
    _check("resnet", num_classes=(num_classes,), blocks=(blocks,))
    require_one_of("resnet: normalization", normalization, get_args(NormalizationName))
    activation = ReLU() if activation is None else activation
    # Strides halve sizes, rounding up; with less than 2 × 2 left, taps would see padding only.
    _require_size("resnet", image_shape, 2 ** (len(widths) - 1) + 1, f"{len(widths)} stages")
    last = initializer
    if normalization == "none":
        last = _Divided(initializer, (blocks * len(widths)) ** 0.5)

    def convolution(c_in: int, c_out: int, stride: int, start: Initializer) -> list[Layer]:
        return [
            Conv(
                c_in,
                c_out,
                (3, 3),
                stride,
                padding="same",
                bias=normalization == "none",
                initializer=start,
            ),
            *_normalization(normalization, c_out),
        ]

    depth = widths[0]
    layers = [Reshape(tuple(image_shape)), *convolution(image_shape[2], depth, 1, initializer)]
    layers.append(activation)
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            first = convolution(depth, width, stride, initializer)
            inner = Sequential(*first, activation, *convolution(width, width, 1, last))
            shortcut = None
            if stride != 1 or width != depth:
                shortcut = Conv(depth, width, (1, 1), stride, bias=False, initializer=initializer)
            layers += [Residual(inner, shortcut), activation]
            depth = width
    layers.append(GlobalAveragePool())
    return _classifier(layers, depth, num_classes, dropout, initializer, loss)


@final
@dataclass(frozen=True)
class _Divided:
    """An initialiser's weights, divided."""

    initializer: Initializer
    divisor: float

    def __call__(self, rng: Rng, fan_in: int, fan_out: int, backend: Backend) -> Array:
        return self.initializer(rng, fan_in, fan_out, backend) * (1.0 / self.divisor)


def _classifier(
    layers: list[Layer],
    d_in: int,
    num_classes: int,
    dropout: float,
    initializer: Initializer,
    loss: Loss | None,
) -> Objective:
    """Put the last layer on top."""
    head = [Dropout(dropout)] if dropout else []
    network = Sequential(*layers, *head, Dense(d_in, num_classes, initializer=initializer))
    return Objective(network, SoftmaxCrossEntropy() if loss is None else loss)


def _normalization(name: NormalizationName, channels: int) -> list[Layer]:
    makers: dict[str, Callable[[], list[Layer]]] = {
        "none": list,
        "batch": lambda: [BatchNorm(channels)],
        "group": lambda: [GroupNorm(_groups(channels), channels)],
        "layer": lambda: [LayerNorm(channels)],
    }
    return makers[name]()


def _groups(channels: int) -> int:
    fitting = [n for n in (8, 4, 2) if channels % n == 0 and channels >= 4 * n]
    return max(fitting, default=1)


def _check(name: str, **sizes: Sequence[int]) -> None:
    """All sizes are positive integers, and images have three."""
    for option, values in sizes.items():
        values = tuple(values)
        right = all(type(n) is int and n > 0 for n in values) and (values or option == "hidden")
        if not right or (option == "image_shape" and len(values) != 3):
            expected = "(height, width, channels)" if option == "image_shape" else "positive sizes"
            raise ConfigError(f"{name}: {option}: expected {expected}, got {list(values)}")


def _require_size(name: str, image_shape: tuple[int, int, int], needed: int, what: str) -> None:
    height, width, _ = image_shape
    if min(height, width) < needed:
        raise ConfigError(
            f"{name}: expected images of at least {needed} × {needed} pixels for {what}, got "
            f"{height} × {width}"
        )
