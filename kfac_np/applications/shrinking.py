"""Networks with fewer units: which layers follow one another, and how they are cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, final

from kfac_np import trees
from kfac_np.backend import Array, array_namespace
from kfac_np.errors import InputError
from kfac_np.layers import (
    Activation,
    AdaptiveAveragePool,
    AveragePool,
    Conv,
    Dense,
    Dropout,
    FixedNorm,
    Flatten,
    GlobalAveragePool,
    GlobalMaxPool,
    Layer,
    MaxPool,
    Reshape,
    Residual,
    Sequential,
)
from kfac_np.trees import Tree

__all__ = ["Link", "factored", "find_links", "matrices", "shrunk"]

Place = tuple[str, Layer]
_POOLS = (AdaptiveAveragePool, AveragePool, GlobalAveragePool, GlobalMaxPool, MaxPool)


@final
@dataclass(frozen=True)
class Link:
    """A layer whose units are seen by one other layer only, through maps of each unit alone.

    Attributes
    ----------
    path, layer : str, Layer
        Whose units they are.
    to, reader : str, Layer
        The layer that reads them.
    between : tuple of (path, Layer)
        Activations, pools, fixed norms, at most one flattening.
    """

    path: str
    layer: Dense | Conv
    to: str
    reader: Dense | Conv
    between: tuple[Place, ...]

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.layer.d_out if isinstance(self.layer, Dense) else self.layer.c_out

    @property
    def columns(self) -> list[list[int]]:
        """The columns of the reader's W̄ that belong to each unit: taps, pixels of a flattening."""
        total = columns_of(self.reader)
        return [list(range(unit, total, self.units)) for unit in range(self.units)]


def columns_of(layer: Dense | Conv) -> int:
    """Columns of W̄ without the bias."""
    return layer.d_in if isinstance(layer, Dense) else layer.kernel_columns


def chains(network: Layer, path: str = "") -> Iterator[list[Place]]:
    """Layers in the order of their use, nested `Sequential` unrolled; those of branches apart."""
    main: list[Place] = []
    for place, layer in _unrolled(network, path):
        main.append((place, layer))
        if isinstance(layer, Residual):
            for inner, branch in trees.items(layer.children, place):
                yield from chains(branch, inner)
    yield main


def _unrolled(layer: Layer, path: str) -> Iterator[Place]:
    if isinstance(layer, Sequential):
        for i, child in enumerate(layer.layers):
            yield from _unrolled(child, f"{path}.{i}" if path else str(i))
    else:
        yield path, layer


def matrices(network: Layer) -> dict[str, Dense | Conv]:
    """The dense layers and the convolutions in one group of a network, by path."""
    return {path: layer for chain in chains(network) for path, layer in chain if _is_matrix(layer)}


def _is_matrix(layer: Layer) -> TypeGuard[Dense | Conv]:
    return isinstance(layer, Dense) or (isinstance(layer, Conv) and layer.groups == 1)


def find_links(network: Layer) -> dict[str, Link]:
    """The layers whose units can go, by path, each with the layer that reads them."""
    found = {}
    for chain in chains(network):
        before: int | None = None
        for i, (path, layer) in enumerate(chain):
            if _is_matrix(layer):
                if before is not None:
                    start, first = chain[before]
                    assert _is_matrix(first)
                    link = Link(start, first, path, layer, tuple(chain[before + 1 : i]))
                    if _acts_on_units(link):
                        found[start] = link
                before = i
    return found


def _acts_on_units(link: Link) -> bool:
    for _, layer in link.between:
        if isinstance(layer, FixedNorm):
            if layer.size != link.units:
                return False
        elif not (isinstance(layer, (Activation, Dropout, Flatten, *_POOLS)) or _flattens(layer)):
            return False
    return columns_of(link.reader) % link.units == 0


def _flattens(layer: Layer) -> bool:
    return isinstance(layer, Reshape) and len(layer.shape) == 1


def shrunk(network: Layer, params: Tree, kept: Mapping[str, Sequence[int]]) -> tuple[Layer, Tree]:
    """The network with some units only, in `kept`: units, and what reads them, are cut out.

    Parameters
    ----------
    network : Layer
    params : tree of Array
    kept : mapping of path to sequence of int
        Rows that stay, for layers of `find_links`; others stay whole.

    Returns
    -------
    network : Layer
    params : tree of Array
        Outputs are those of the network in which the reader's columns of the other units are 0.
    """
    links = find_links(network)
    layers: dict[str, Layer] = {}
    arrays = dict(trees.items(params))
    for path, units in kept.items():
        link = links[path]
        arrays[path] = _take(arrays[path], units, 0)
        layers[path] = _resized(layers.get(path, link.layer), out=len(units))
        columns = sorted(c for unit in units for c in link.columns[unit])
        bias = range(columns_of(link.reader), arrays[link.to].shape[1])
        arrays[link.to] = _take(arrays[link.to], [*columns, *bias], 1)
        part = columns_of(link.reader) // link.units
        layers[link.to] = _resized(
            layers.get(link.to, link.reader), into=len(units), columns=part * len(units)
        )
        for place, layer in link.between:
            if isinstance(layer, FixedNorm):
                layers[place] = replace(
                    layer, mean=_take(layer.mean, units, 0), rate=_take(layer.rate, units, 0)
                )
                if layer.affine:
                    arrays[place] = _take(arrays[place], units, 1)
            elif _flattens(layer):
                layers[place] = Flatten()
    return replaced(network, layers), trees.map_named(lambda path, _: arrays[path], params)


def factored(
    network: Layer, params: Tree, factors: Mapping[str, tuple[Array, Array]]
) -> tuple[Layer, Tree]:
    """The network with layers W̄ = P Q as two: Q with the bias of W̄'s, then P without any.

    Parameters
    ----------
    factors : mapping of path to (P, Q)
        Of shapes (d_out, r) and (r, columns of W̄).
    """
    layers: dict[str, Layer] = {}
    arrays: dict[str, Tree] = {}
    for path, (outer, inner) in factors.items():
        layer, rank = network.at(path), inner.shape[0]
        if isinstance(layer, Dense):
            second: Layer = Dense(rank, layer.d_out, bias=False)
        else:
            assert isinstance(layer, Conv)
            second = Conv(rank, layer.c_out, (1,) * len(layer.kernel), bias=False)
        layers[path] = Sequential(_resized(layer, out=rank), second)
        arrays[path] = (inner, outer)
    return replaced(network, layers), trees.map_named(arrays.get, params)


def replaced(network: Layer, layers: Mapping[str, Layer], path: str = "") -> Layer:
    """The network with other layers at some paths, inside `Sequential` and `Residual`."""
    if isinstance(network, Sequential):
        before = f"{path}." if path else ""
        return Sequential(
            *(replaced(child, layers, f"{before}{i}") for i, child in enumerate(network.layers))
        )
    if isinstance(network, Residual):
        each = [replaced(child, layers, p) for p, child in trees.items(network.children, path)]
        return Residual(*each)
    return layers.get(path, network)


def constant_outputs(link: Link, params: Tree, like: Array) -> Array:
    """What the reader sees of each unit whose row of W̄ is 0, at every location; shape (units,)."""
    xp = array_namespace(like)
    x = xp.zeros((1, link.units), dtype=like.dtype, device=like.device)
    arrays = dict(trees.items(params))
    for path, layer in link.between:
        if isinstance(layer, Activation | FixedNorm):
            x = layer.forward(arrays.get(path, ()), x)[0]
    return x[0, :]


def absorbed(link: Link, params: Tree, w: Array, units: Sequence[int], read: Array) -> Array:
    """The reader's W̄ with what removed units leave behind, φ(0), added to its bias.

    Raises
    ------
    InputError
        There is something, and the reader has no bias or pads with zeros.
    """
    xp = array_namespace(w)
    constant = xp.astype(constant_outputs(link, params, w), read.dtype)
    gone = [unit for unit in range(link.units) if unit in set(units)]
    if float(xp.max(xp.abs(_take(constant, gone, 0)))) == 0.0:
        return read
    pads = any(
        getattr(layer, "padding", 0) not in (0, "valid")
        for layer in (*(layer for _, layer in link.between), link.reader)
    )
    if pads or not link.reader.bias:
        why = "pads with zeros" if pads else "has no bias"
        raise InputError(
            f"layer {link.path}: a unit without weights still gives φ(0) ≠ 0, which layer "
            f'{link.to} cannot take over, since it {why}; use remove="inputs"'
        )
    left = xp.zeros((read.shape[0],), dtype=read.dtype, device=read.device)
    for unit in gone:
        left = left + constant[unit] * xp.sum(_take(read, link.columns[unit], 1), axis=1)
    return xp.concat([read[:, :-1], (read[:, -1] + left)[:, None]], axis=1)


def size_of(params: Tree) -> int:
    """Number of parameters."""
    return sum(math.prod(p.shape) for p in trees.leaves(params))


def _resized(
    layer: Any, *, out: int | None = None, into: int | None = None, columns: int = 0
) -> Any:
    dense = isinstance(layer, Dense)
    if out is not None:
        layer = replace(layer, **{"d_out" if dense else "c_out": out})
    if into is not None:
        layer = replace(layer, **({"d_in": columns} if dense else {"c_in": into}))
    return layer


def _take(x: Array, indices: Sequence[int], axis: int) -> Array:
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(list(indices), device=x.device), axis=axis)
