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
from kfac_np.layers.attention import MultiHeadAttention
from kfac_np.layers.base import Layer
from kfac_np.layers.containers import Sequential, Tied
from kfac_np.layers.conv_transpose import ConvTranspose
from kfac_np.layers.convolution import Conv
from kfac_np.layers.dense import Dense
from kfac_np.layers.dropout import Dropout
from kfac_np.layers.embedding import Embedding, standard_normal
from kfac_np.layers.initializers import Initializer, fan_in_normal, glorot, he, sparse
from kfac_np.layers.normalization import Normalization
from kfac_np.layers.norms import BatchNorm, FixedNorm, GroupNorm, LayerNorm, RMSNorm
from kfac_np.layers.pooling import (
    AdaptiveAveragePool,
    AveragePool,
    GlobalAveragePool,
    GlobalMaxPool,
    MaxPool,
)
from kfac_np.layers.recurrent import Recurrent
from kfac_np.layers.reshape import Flatten, Reshape
from kfac_np.layers.residual import Residual
from kfac_np.layers.uses import merge_uses

__all__ = [
    "GELU",
    "Activation",
    "AdaptiveAveragePool",
    "AveragePool",
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Dense",
    "Dropout",
    "Embedding",
    "FixedNorm",
    "Flatten",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GroupNorm",
    "Identity",
    "Initializer",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Logistic",
    "MaxPool",
    "MultiHeadAttention",
    "Normalization",
    "RMSNorm",
    "ReLU",
    "Recurrent",
    "Reshape",
    "Residual",
    "Sequential",
    "SiLU",
    "Softplus",
    "Tanh",
    "Tied",
    "fan_in_normal",
    "glorot",
    "he",
    "merge_uses",
    "sparse",
    "standard_normal",
]
