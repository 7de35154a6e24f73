"""Batch normalisation: with the statistics of the batch in training, with fixed ones after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, array_namespace
from kfac_np.errors import ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.normalise import mean_over, normalise
from kfac_np.layers.normalization_base import MeanNormalization, Normalization
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_flag

__all__ = ["BatchNorm", "FixedNorm"]


@final
@dataclass(frozen=True, repr=False)
class BatchNorm(MeanNormalization):
    """x̂ = (x - mean) / √(variance + ε) over all examples and locations, for each channel.

    The statistics are those of the batch that is given, and derivatives go through them.
    `evaluation` freezes them (`FixedNorm`): means and variances of the training data instead of
    moving averages, so that nothing has to be carried along with the parameters. Parameters are
    one array (2, channels), the rows scale and shift; the variance divides by the number of values.

    Examples of a batch influence each other (`couples_examples`), and that means:

    - The loss of a batch is not a mean of losses that each depend on one example. Its gradient
      and products with the GGN and Hessian are exact derivatives of it, but an example has no
      gradient of its own: `Statistics.per_example` is the part of a gradient that an example's
      rows of this layer contribute, and is not what an example alone would give.
    - Exact curvature (`ExactBlock`, `FullMatrix`, `DiagonalBlock`, `UnitBlock`) treats the batch
      as one example with many loss terms: the squares are of whole-batch derivatives. The exact
      and the empirical Fisher carry every term back on its own, N · S · C vectors; Monte-Carlo
      targets still take one pass a sample, and are unbiased.
    - K-FAC with `expand` takes rows as independent, which coupled ones are not: an approximation
      more. `reduce` is refused.
    - Weights multiply loss terms only: an example of weight 0 is still in the statistics, and a
      weight of 2 is not the example twice. Moments of a batch are not the means of those of its
      halves.
    - `Evaluation.take` forwards the examples again, since their statistics are others.

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

    def __post_init__(self) -> None:
        self._check("BatchNorm", channels=self.channels)

    def __repr__(self) -> str:
        return f"BatchNorm({self.channels}{self._options()})"

    @property
    def size(self) -> int:
        return self.channels

    @property
    def axes(self) -> tuple[int, ...]:
        return (-3, -2)

    @property
    def couples_examples(self) -> bool:
        return True

    def normalised(self, x: Array) -> tuple[Array, Array]:
        self._require_several(x)
        return super().normalised(x)

    def evaluation(self, params: Tree, x: Array) -> tuple[Layer, Array]:
        self.output_shape(x.shape[1:])
        self._require_several(x)
        xp, view = array_namespace(x), self._view(x, x)
        _, rate = normalise(view, self.axes, True, self.epsilon)
        mean = mean_over(view, self.axes)
        mean = mean + mean_over(view - mean, self.axes)
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

    def normalised(self, x: Array) -> tuple[Array, Any]:
        return (x - self.mean) * self.rate, ()

    def jacobian(self, x_hat: Array, other: Any, u: Array) -> Array:
        return self.rate * u

    def jacobian_change(self, x_hat: Array, other: Any, u: Array, dx: Array) -> None:
        return None
