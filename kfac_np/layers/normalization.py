"""Normalisation of each example by itself: over channels, groups of them, and locations.

Arrays are (N, *spatial, C), channels last. `kfac_np.layers.batch_norm` has the one over a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.errors import InputError
from kfac_np.layers.normalization_base import MeanNormalization

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


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

    def __post_init__(self) -> None:
        self._check("LayerNorm", features=self.features)

    def __repr__(self) -> str:
        return f"LayerNorm({self.features}{self._options()})"

    @property
    def size(self) -> int:
        return self.features

    @property
    def axes(self) -> tuple[int, ...]:
        return (-1,)


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

    def __post_init__(self) -> None:
        self._check("RMSNorm", features=self.features)

    def __repr__(self) -> str:
        return f"RMSNorm({self.features}{self._options()})"

    @property
    def size(self) -> int:
        return self.features

    @property
    def shift(self) -> bool:
        return False

    @property
    def centred(self) -> bool:
        return False

    @property
    def axes(self) -> tuple[int, ...]:
        return (-1,)


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

    def __post_init__(self) -> None:
        self._check("GroupNorm", groups=self.groups, channels=self.channels)
        if self.channels % self.groups:
            raise InputError(
                f"GroupNorm: expected groups to divide channels, got {self.groups} groups for "
                f"{self.channels} channels"
            )

    def __repr__(self) -> str:
        return f"GroupNorm({self.groups}, {self.channels}{self._options()})"

    @property
    def size(self) -> int:
        return self.channels

    @property
    def axes(self) -> tuple[int, ...]:
        return (-3, -1)

    def _last(self) -> tuple[int, ...]:
        return (self.groups, self.channels // self.groups)
