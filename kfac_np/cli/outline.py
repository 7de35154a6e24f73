"""The layers of a network, those without parameters among them, and the shapes between them."""

from __future__ import annotations

from collections.abc import Iterator

from kfac_np import trees
from kfac_np.layers import Layer, Residual, Sequential

__all__ = ["outline"]

_Row = tuple[str, str, tuple[int, ...]]


def outline(network: Layer, input_shape: tuple[int, ...]) -> str:
    """Tabulate path, layer and shape of the output, a line for each layer.

    Parameters
    ----------
    network : Layer
    input_shape : tuple of int
        Of one example.

    Returns
    -------
    str
        Paths are those of the layer table (`kfac_np.curvature.describe`).

    Examples
    --------
    >>> from kfac_np.layers import Conv, Dense, Flatten, Residual, Sequential
    >>> same = Conv(2, 2, (3, 3), padding=1)
    >>> net = Sequential(Conv(1, 2, (3, 3)), Residual(same), Flatten(), Dense(8, 2))
    >>> print(outline(net, (4, 4, 1)))
    path   layer                         output
    input                                4×4×1
    0      Conv(1, 2, (3, 3))            2×2×2
    1        Conv(2, 2, (3, 3), padding=1)  2×2×2
    1      Residual                      2×2×2
    2      Flatten()                     8
    3      Dense(8, 2)                   2
    """
    rows: list[_Row] = [("input", "", input_shape), *_rows(network, input_shape, "", "")]
    cells = [("path", "layer", "output")]
    cells += [(path, name, "×".join(map(str, shape))) for path, name, shape in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(2)]
    return "\n".join(
        f"{path.ljust(widths[0])}  {name.ljust(widths[1])}  {shape}" for path, name, shape in cells
    )


def _rows(layer: Layer, shape: tuple[int, ...], path: str, indent: str) -> Iterator[_Row]:
    if isinstance(layer, Sequential):
        for place, child in trees.items(layer.children, path):
            yield from _rows(child, shape, place, indent)
            shape = child.output_shape(shape)
    elif isinstance(layer, Residual):
        for place, child in trees.items(layer.children, path):
            yield from _rows(child, shape, place, f"{indent}  ")
        yield path, f"{indent}Residual", layer.output_shape(shape)
    else:
        yield path, f"{indent}{layer!r}", layer.output_shape(shape)
