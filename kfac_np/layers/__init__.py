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
from kfac_np.layers.batch_norm import BatchNorm, FixedNorm
from kfac_np.layers.containers import Residual, Sequential
from kfac_np.layers.conv_transpose import ConvTranspose
from kfac_np.layers.convolution import Conv
from kfac_np.layers.dense import Dense
from kfac_np.layers.dropout import Dropout
from kfac_np.layers.embedding import Embedding, standard_normal
from kfac_np.layers.flatten import Flatten
from kfac_np.layers.global_pooling import (
    AdaptiveAveragePool,
    GlobalAveragePool,
    GlobalMaxPool,
)
from kfac_np.layers.initializers import Initializer, fan_in_normal, glorot, he, sparse
from kfac_np.layers.normalization import GroupNorm, LayerNorm, RMSNorm
from kfac_np.layers.normalization_base import Normalization
from kfac_np.layers.pooling import AveragePool, MaxPool
from kfac_np.layers.recurrent import Recurrent
from kfac_np.layers.reshape import Reshape
from kfac_np.layers.tied import Tied
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
