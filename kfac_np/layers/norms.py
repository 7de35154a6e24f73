"""Normalisation layers: of each example by itself, and over a batch.

Arrays are (N, *spatial, C), channels last. What they share is in `kfac_np.layers.normalization`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

from kfac_np.backend import Array, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.normalization import MeanNormalization, Normalization
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_flag

__all__ = ["BatchNorm", "FixedNorm", "GroupNorm", "LayerNorm", "RMSNorm"]


@final
@dataclass(frozen=True, repr=False)
class LayerNorm(MeanNormalization):
    """x̂ = (x - mean) / √(variance + ε) over the last axis, for each example and location.

    Parameters of the layer are one array (2, features), the rows scale and shift.

    Parameters
    ----------
    features : int
        Size of the last axis.
    epsilon : float
    affine : bool
        Whether there are a scale and a shift.

    References
    ----------
    Ba, Kiros & Hinton 2016, arXiv:1607.06450, eq. 4.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import Rng, get_backend
    >>> layer = LayerNorm(2)
    >>> params = layer.init(Rng(0), get_backend("numpy", "float64"))
    >>> layer.forward(params, np.asarray([[1.0, 5.0]]))[0].round(3)
    array([[-1.,  1.]])
    """

    features: int
    epsilon: float = 1e-5
    affine: bool = True

    axes: ClassVar[tuple[int, ...]] = (-1,)

    def __post_init__(self) -> None:
        self._check("features")

    @property
    def size(self) -> int:
        return self.features


@final
@dataclass(frozen=True, repr=False)
class RMSNorm(MeanNormalization):
    """x̂ = x / √(mean of x² + ε) over the last axis, for each example and location.

    Parameters of the layer are one array (1, features), the scale; there is no shift.

    Parameters
    ----------
    features : int
        Size of the last axis.
    epsilon : float
    affine : bool
        Whether there is a scale.

    References
    ----------
    Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

    Examples
    --------
    >>> import numpy as np
    >>> RMSNorm(2, affine=False).forward((), np.asarray([[3.0, 3.0]]))[0].round(3)
    array([[1., 1.]])
    """

    features: int
    epsilon: float = 1e-5
    affine: bool = True

    axes: ClassVar[tuple[int, ...]] = (-1,)
    centred: ClassVar[bool] = False
    shift: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check("features")

    @property
    def size(self) -> int:
        return self.features


@final
@dataclass(frozen=True, repr=False)
class GroupNorm(MeanNormalization):
    """x̂ = (x - mean) / √(variance + ε) over all locations and the channels of a group.

    Each example and each group of channels side by side has a mean and a variance of its own;
    `groups` = `channels` is instance normalisation. Parameters of the layer are one array
    (2, channels), the rows scale and shift.

    Parameters
    ----------
    groups : int
        Divides `channels`.
    channels : int
        Size of the last axis.
    epsilon : float
    affine : bool
        Whether there are a scale and a shift.

    References
    ----------
    Wu & He 2018, arXiv:1803.08494, eq. 7.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[[1.0, 10.0], [3.0, 30.0]]])  # one example, two locations, two channels
    >>> GroupNorm(2, 2, affine=False).forward((), x)[0].round(3)
    array([[[-1., -1.],
            [ 1.,  1.]]])
    """

    groups: int
    channels: int
    epsilon: float = 1e-5
    affine: bool = True

    axes: ClassVar[tuple[int, ...]] = (-3, -1)

    def __post_init__(self) -> None:
        self._check("groups", "channels")
        if self.channels % self.groups:
            raise InputError(
                f"GroupNorm: expected groups to divide channels, got {self.groups} groups for "
                f"{self.channels} channels"
            )

    @property
    def size(self) -> int:
        return self.channels

    def _last(self) -> tuple[int, ...]:
        return (self.groups, self.channels // self.groups)


@final
@dataclass(frozen=True, repr=False)
class BatchNorm(MeanNormalization):
    """x̂ = (x - mean) / √(variance + ε) over all examples and locations, for each channel.

    The statistics are those of the batch that is given, and derivatives go through them.
    `evaluation` freezes them (`FixedNorm`): means and variances of the training data instead of
    moving averages, so that nothing has to be carried along with the parameters. Parameters are
    one array (2, channels), the rows scale and shift; the variance divides by the number of values.

    Examples of a batch influence each other (`couples_examples`): an example has no gradient of its
    own, `Statistics.per_example` is what its rows of this layer contribute to the batch's, and
    K-FAC with `reduce` is refused. Weights multiply loss terms only; an example of weight 0 is
    still in the statistics. "Batch statistics" in docs/architecture.md says what curvatures do.

    Parameters
    ----------
    channels : int
        Size of the last axis.
    epsilon : float
    affine : bool
        Whether there are a scale and a shift.

    References
    ----------
    Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> layer, x = BatchNorm(1, affine=False), np.asarray([[1.0], [5.0]])
    >>> layer.forward((), x)[0].round(3)
    array([[-1.],
           [ 1.]])
    >>> fixed, _ = layer.evaluation((), x)
    >>> fixed.forward((), np.asarray([[3.0]]))[0], fixed.couples_examples
    (array([[0.]]), False)
    """

    channels: int
    epsilon: float = 1e-5
    affine: bool = True

    axes: ClassVar[tuple[int, ...]] = (-3, -2)

    def __post_init__(self) -> None:
        self._check("channels")

    @property
    def size(self) -> int:
        return self.channels

    @property
    def couples_examples(self) -> bool:
        return True

    def normalized(self, x: Array) -> tuple[Array, Array]:
        self._require_several(x)
        return super().normalized(x)

    def evaluation(self, params: Tree, x: Array) -> tuple[Layer, Array]:
        self.output_shape(x.shape[1:])
        _, rate = self.normalized(x)
        xp, view = array_namespace(x), self._view(x, x)
        mean = self._mean(view)
        mean = mean + self._mean(view - mean)
        fixed = FixedNorm(xp.reshape(mean, (-1,)), xp.reshape(rate, (-1,)), self.affine)
        return fixed, fixed.forward(params, x)[0]

    def _require_several(self, x: Array) -> None:
        if math.prod(x.shape[:-1]) < 2:
            raise ShapeError(
                f"{self!r}: expected at least two values for each channel, got one example "
                "without locations: one number has no variance"
            )


@final
@dataclass(frozen=True, eq=False, repr=False)
class FixedNorm(Normalization):
    """x̂ = (x - mean) · rate with given statistics: what `BatchNorm` is after training.

    Elementwise: examples do not influence each other. The parameters are those of the `BatchNorm`.

    Parameters
    ----------
    mean : Array, shape (channels,)
    rate : Array, shape (channels,)
        (variance + ε)^(-½).
    affine : bool
        Whether there are a scale and a shift.

    Examples
    --------
    >>> import numpy as np
    >>> layer = FixedNorm(np.asarray([2.0]), np.asarray([0.5]), affine=False)
    >>> layer.forward((), np.asarray([[4.0]]))[0]
    array([[1.]])
    """

    mean: Array
    rate: Array
    affine: bool = True

    def __post_init__(self) -> None:
        plain_fields(self)
        require_flag("FixedNorm affine", self.affine)
        if self.mean.ndim != 1 or self.mean.shape != self.rate.shape:
            raise ShapeError(
                "FixedNorm: expected mean and rate of one shape (channels,), got "
                f"{tuple(self.mean.shape)} and {tuple(self.rate.shape)}"
            )

    def __repr__(self) -> str:
        return f"FixedNorm({self.size}{'' if self.affine else ', affine=False'})"

    @property
    def size(self) -> int:
        return self.mean.shape[0]

    def normalized(self, x: Array) -> tuple[Array, Any]:
        return (x - self.mean) * self.rate, ()

    def jacobian(self, x_hat: Array, other: Any, u: Array) -> Array:
        return self.rate * u

    def jacobian_change(self, x_hat: Array, other: Any, u: Array, dx: Array) -> None:
        return None
