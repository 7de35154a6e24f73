"""Networks by name: deep autoencoders and classifiers, as objectives ready to train."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kfac_np.errors import ConfigError
from kfac_np.layers import (
    Activation,
    Dense,
    Initializer,
    Layer,
    Logistic,
    Sequential,
    Tanh,
    glorot,
    sparse,
)
from kfac_np.losses import Loss, SigmoidCrossEntropy, SoftmaxCrossEntropy
from kfac_np.objective import Objective

__all__ = ["autoencoder", "mlp"]


def autoencoder(
    sizes: Sequence[int],
    activation: Activation | None = None,
    initializer: Initializer = sparse,
    loss: Loss | None = None,
) -> Objective:
    """Deep autoencoder: `sizes` down to a linear code, mirrored, logits as output.

    Parameters
    ----------
    sizes : sequence of int
        From the number of pixels to the size of the code, as (784, 400, 200, 100, 50, 25, 6).
    activation : Activation
        Of all hidden layers but the code; logistic by default.
    initializer : callable
        By default the published sparse one, which suits logistic and tanh units.
    loss : Loss
        Sigmoid cross-entropy by default: pixels are probabilities.

    Returns
    -------
    Objective
        To be given the images as inputs and as targets.

    References
    ----------
    Hinton & Salakhutdinov 2006; Martens & Grosse 2015, §13.

    Examples
    --------
    >>> net = autoencoder((784, 400, 200, 100, 50, 25, 6)).network
    >>> sum(isinstance(layer, Dense) for layer in net.layers), net.output_shape((784,))
    (12, (784,))
    """
    sizes = _checked("autoencoder", sizes)
    hidden = Logistic() if activation is None else activation
    encoder = _dense_stack(sizes, hidden, initializer)
    decoder = _dense_stack(sizes[::-1], hidden, initializer)
    network = Sequential(*encoder, *decoder)
    return Objective(network, SigmoidCrossEntropy() if loss is None else loss)


def mlp(
    sizes: Sequence[int],
    activation: Activation | None = None,
    initializer: Initializer = glorot,
    loss: Loss | None = None,
) -> Objective:
    """Fully connected classifier: hidden layers with an activation, one logit for each class.

    Parameters
    ----------
    sizes : sequence of int
        From the number of inputs to the number of classes.
    activation : Activation
        Of the hidden layers; tanh by default.
    initializer : callable
    loss : Loss
        Softmax cross-entropy by default.

    Examples
    --------
    >>> mlp((64, 32, 10)).network
    Sequential(Dense(64, 32), Tanh(), Dense(32, 10))
    """
    sizes = _checked("mlp", sizes)
    layers = _dense_stack(sizes, Tanh() if activation is None else activation, initializer)
    return Objective(Sequential(*layers), SoftmaxCrossEntropy() if loss is None else loss)


def _dense_stack(
    sizes: Sequence[int], activation: Activation, initializer: Initializer
) -> list[Layer]:
    """Dense layers with the activation between them: the last one is linear."""
    layers: list[Layer] = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [Dense(d_in, d_out, initializer=initializer), activation]
    return layers[:-1]


def _checked(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(sizes)
    if len(sizes) < 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise ConfigError(f"{name}: expected at least two positive layer sizes, got {list(sizes)}")
    return sizes
