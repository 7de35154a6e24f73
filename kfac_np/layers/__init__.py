"""Layers: frozen hyper-parameters with explicit forward, backward and jvp.

Parameters, caches and statistics are passed in and out; a layer does not know what K-FAC is.
"""

from kfac_np.layers.activations import (
    GELU,
    Activation,
    Identity,
    LeakyReLU,
    Logistic,
    ReLU,
    SiLU,
    Softplus,
    Tanh,
)
from kfac_np.layers.base import Layer
from kfac_np.layers.containers import Residual, Sequential
from kfac_np.layers.conv_transpose import ConvTranspose
from kfac_np.layers.convolution import Conv
from kfac_np.layers.dense import Dense
from kfac_np.layers.flatten import Flatten
from kfac_np.layers.initializers import Initializer, fan_in_normal, glorot, he, sparse

__all__ = [
    "GELU",
    "Activation",
    "Conv",
    "ConvTranspose",
    "Dense",
    "Flatten",
    "Identity",
    "Initializer",
    "Layer",
    "LeakyReLU",
    "Logistic",
    "ReLU",
    "Residual",
    "Sequential",
    "SiLU",
    "Softplus",
    "Tanh",
    "fan_in_normal",
    "glorot",
    "he",
    "sparse",
]
