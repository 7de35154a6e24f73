"""Max pooling of PyTorch's arrays by its own kernels, on one or two axes.

Winners are one array: which pixel of the image each was, counted row by row.
"""

from __future__ import annotations

import math
from typing import Any

from kfac_np.backend.geometry import Geometry
from kfac_np.backend.torch_kernels import engine
from kfac_np.backend.torch_kernels.engine import Images

__all__ = ["largest_of_windows", "spread_to_winners", "suits", "winning_pixels"]


def suits(x: Any, geometry: Geometry) -> bool:
    """Tell whether PyTorch pools such an array.

    Examples
    --------
    >>> import numpy as np
    >>> suits(np.ones((5, 9, 1)), Geometry((2,), (1,), (1,), ((0, 0),)))
    False
    """
    return engine.suits(x, geometry) and len(geometry.kernel) < 3


def largest_of_windows(x: Any, geometry: Geometry) -> tuple[Any, tuple[Any, ...]]:
    """`kfac_np.backend.max_pooling.max_pool`; winners have the shape of the result."""
    import torch

    images = _images(geometry)
    y, winners = torch.ops.aten.max_pool2d_with_indices(
        images.padded(x, -math.inf), images.kernel, images.stride, images.padding
    )
    return images.last(y), (images.last(winners),)


def spread_to_winners(
    g: Any, winners: tuple[Any, ...], geometry: Geometry, size: tuple[int, ...]
) -> Any:
    """`kfac_np.backend.max_pooling.max_pool_transpose`."""
    import torch

    images, (winner,) = _images(geometry), winners
    shape = images.padded_size(size)
    x = images.first(g.new_empty((len(winner), *shape, g.shape[-1])))  # its shape is what is needed
    windows = images.kernel, images.stride, images.padding, (1, 1), False
    each = [
        images.unpadded(
            torch.ops.aten.max_pool2d_with_indices_backward(
                images.first(v), x, *windows, images.first(winner)
            )
        )
        for v in (g if g.ndim > winner.ndim else g[None])
    ]
    if g.ndim == winner.ndim:
        return each[0]
    return torch.stack(each) if each else g.new_empty((0, len(winner), *size, g.shape[-1]))


def winning_pixels(dx: Any, winners: tuple[Any, ...], geometry: Geometry) -> Any:
    """`kfac_np.backend.max_pooling.max_pool_tangent`."""
    (winner,), n, c = winners, dx.shape[0], dx.shape[-1]
    pixels = _images(geometry).padded(dx).movedim(1, -1).reshape(n, -1, c)
    return pixels.gather(1, winner.reshape(n, -1, c)).reshape(winner.shape)


def _images(geometry: Geometry) -> Images:
    """PyTorch pads by half a window at most."""
    return Images.of(geometry, tuple(k // 2 for k in geometry.kernel))
