"""Products with patches of PyTorch's arrays: by its own convolution and the derivatives of it.

Channels stay last: PyTorch is handed a view with the axes in its order, and takes that for its
memory format `channels_last`. Nothing is copied on the way in or out, and nothing is recorded for
`torch.autograd`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import array_api_compat

from kfac_np.backend.geometry import Geometry, pad

if TYPE_CHECKING:
    from kfac_np.backend.patches import Patches

__all__ = ["Images", "TorchEngine", "suits", "transposed_product"]


def suits(x: Any, geometry: Geometry) -> bool:
    """Tell whether PyTorch has kernels for an array: one of its own, on one to three axes.

    On a GPU PyTorch's convolutions are in TF32 unless it is told otherwise: they are not used.

    Examples
    --------
    >>> import numpy as np
    >>> suits(np.ones((5, 9, 1)), Geometry((2,), (1,), (1,), ((0, 0),)))
    False
    """
    if not array_api_compat.is_torch_array(x) or x.device.type != "cpu":
        return False
    return bool(x.is_floating_point()) and len(geometry.kernel) <= 3


@final
@dataclass(frozen=True)
class Images:
    """A geometry on one to three axes in PyTorch's terms: a sequence is an image of one row.

    Examples
    --------
    >>> Images.of(Geometry((3,), (2,), (1,), ((1, 2),)))
    Images(kernel=(1, 3), stride=(1, 2), padding=(0, 1), dilation=(1, 1), uneven=((0, 1),))
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    uneven: tuple[tuple[int, int], ...]
    """Padding beyond as many zeros before as after, which is all that PyTorch takes."""

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(cls, geometry: Geometry, most: tuple[float, ...] | None = None) -> Images:
        """With as much of the padding as PyTorch takes: even, and at most so much on each axis."""
        bounds = (math.inf,) * len(geometry.kernel) if most is None else most
        even: tuple[Any, ...] = tuple(
            max(0, min(*pair, bound)) for pair, bound in zip(geometry.padding, bounds, strict=True)
        )
        uneven = tuple(
            (low - p, high - p) for p, (low, high) in zip(even, geometry.padding, strict=True)
        )
        found = cls(geometry.kernel, geometry.stride, even, geometry.dilation, uneven)
        if len(even) > 1:
            return found
        kernel, stride, dilation = ((1, *v) for v in (found.kernel, found.stride, found.dilation))
        return cls(kernel, stride, (0, *even), dilation, uneven)

    @property
    def convolution(self) -> tuple[Any, ...]:
        """What a convolution takes behind its arrays."""
        nothing = (0,) * len(self.kernel)
        return self.stride, self.padding, self.dilation, False, nothing, 1

    def first(self, x: Any) -> Any:
        """A view of (N, *spatial, C) with channels behind the examples."""
        return (x if len(self.uneven) > 1 else x.unsqueeze(1)).movedim(-1, 1)

    def last(self, x: Any) -> Any:
        """The way back; where PyTorch has ordered memory in another way, a copy."""
        x = x.movedim(1, -1)
        return (x if len(self.uneven) > 1 else x.squeeze(1)).contiguous()

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """With the `uneven` padding."""
        return tuple(n + low + high for n, (low, high) in zip(size, self.uneven, strict=True))

    def padded(self, x: Any, value: float = 0.0) -> Any:
        """Put the `uneven` padding on, and channels behind the examples."""
        return self.first(pad(x, self.uneven, value))

    def unpadded(self, x: Any) -> Any:
        """The adjoint of `padded`."""
        return pad(self.last(x), tuple((-low, -high) for low, high in self.uneven))

    def weights(self, w: Any) -> Any:
        """(d_out, taps · C) as a kernel of PyTorch's."""
        return w.reshape(len(w), *self.kernel, -1).movedim(-1, 1)


@final
@dataclass(frozen=True, eq=False)
class TorchEngine:
    """`Patches.product` and `gradient` by PyTorch's convolution."""

    patches: Patches

    def product(self, m: Any) -> Any:
        """`Patches.product`."""
        import torch

        p = self.patches
        images = Images.of(p.geometry)
        kernel = images.weights(m[: p.shape[2] - p.ones, :].T)
        bias = m[-1, :] if p.ones else None
        return images.last(torch.convolution(images.padded(p.x), kernel, bias, *images.convolution))

    def gradient(self, g: Any) -> Any:
        """`Patches.gradient`."""
        p, each = self.patches, g if g.ndim == 4 else g[None]
        total = each.new_empty((len(each), g.shape[-1], p.shape[2]))
        for sums, (kernel, bias) in zip(total, self._gradients(each), strict=True):
            columns = p.shape[2] - p.ones
            sums[:, :columns] = kernel.movedim(1, -1).reshape(-1, columns)
            if p.ones:
                sums[:, -1] = bias
        return total if g.ndim == 4 else total[0]

    def _gradients(self, each: Any) -> Iterator[tuple[Any, Any]]:
        import torch

        p, d_out = self.patches, each.shape[-1]
        images = Images.of(p.geometry)
        x = images.padded(p.x)
        kernel = images.weights(x.new_empty((d_out, p.shape[2] - p.ones)))  # for its shape
        wanted = (False, True, p.ones)
        for g in each:
            g = images.first(g.reshape(p.shape[0], *p.out, d_out))
            _, *found = torch.ops.aten.convolution_backward(
                g, x, kernel, (d_out,), *images.convolution, wanted
            )
            yield tuple(found)

    def second_moment(self) -> Any:
        """`Patches.second_moment`, by NumPy's kernels on the same memory."""
        import torch

        x: Any = self.patches.x
        return torch.from_numpy(replace(self.patches, x=x.detach().numpy()).second_moment())


def transposed_product(g: Any, w: Any, geometry: Geometry, size: tuple[int, ...]) -> Any:
    """`kfac_np.backend.patches.transposed_product`, of a g that PyTorch's kernels suit."""
    import torch

    images = Images.of(geometry)
    c = w.shape[1] // geometry.taps
    x = images.first(g.new_empty((len(g), *images.padded_size(size), c)))  # its shape is needed
    dx, _, _ = torch.ops.aten.convolution_backward(
        images.first(g), x, images.weights(w), None, *images.convolution, (True, False, False)
    )
    return images.unpadded(dx)
