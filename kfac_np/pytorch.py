"""Weights from PyTorch and to it: parameters here, a `state_dict` there.

Nothing here imports PyTorch: a state is any mapping of names to arrays. What differs is the layout.
Here an affine layer is one matrix with the bias as last column, channels come last, and columns of
a convolution run over taps, then channels; there, weight and bias are apart, channels come first,
and kernels of transposed convolutions are flipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import (
    Activation,
    AdaptiveAveragePool,
    AveragePool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    Dropout,
    Embedding,
    FixedNorm,
    Flatten,
    GlobalAveragePool,
    GlobalMaxPool,
    GroupNorm,
    Layer,
    LayerNorm,
    MaxPool,
    MultiHeadAttention,
    Normalization,
    Recurrent,
    Reshape,
    Residual,
    RMSNorm,
    Sequential,
    Tied,
)
from kfac_np.layers.attention import PROJECTIONS
from kfac_np.layers.base import Parameterless
from kfac_np.trees import Tree
from kfac_np.validation import require_instance

__all__ = ["from_state_dict", "to_state_dict"]

State = Mapping[str, Any]
Shape = tuple[int, ...]
Order = tuple[int, ...] | None
"""For each feature here, which one it is in PyTorch; None where they are in the same order."""

_IMAGES = (
    Conv, ConvTranspose, MaxPool, AveragePool, AdaptiveAveragePool, GlobalAveragePool, GlobalMaxPool
)  # fmt: skip
_SEQUENCES = (MultiHeadAttention, Recurrent, Embedding)
_ANY_ORDER = (Activation, Dropout, LayerNorm, RMSNorm, BatchNorm, FixedNorm)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def from_state_dict(
    network: Layer,
    state: State,
    input_shape: Shape,
    backend: Backend,
    names: Mapping[str, str] | None = None,
) -> Tree:
    """Parameters of a network from the `state_dict` of the same network in PyTorch.

    `Dense` takes the weights of Linear, `Conv` of Conv1d to 3d, `ConvTranspose` of theirs,
    `Embedding`, `LayerNorm`, `GroupNorm`, `RMSNorm` and `BatchNorm` of the layers of these names,
    `MultiHeadAttention` of MultiheadAttention, `Recurrent` of RNN with one layer. Behind a
    `Flatten` of images the columns of `Dense` are reordered, since channels come first there.

    Parameters
    ----------
    network : Layer
    state : mapping of str to array
        Arrays that the backend takes, NumPy's for example: ``{k: v.numpy() for k, v in
        model.state_dict().items()}``.
    input_shape : tuple of int
        Of one example here: (H, W, C) for an image of (C, H, W) there.
    backend : Backend
    names : mapping of str to str, optional
        The module's name there of a layer here, {"0": "conv1", "7": "fc"}; a layer that is not in
        it has the name of its path, as in `torch.nn.Sequential`.

    Returns
    -------
    tree of Array
        Parameters, in the backend's dtype. Running statistics of batch normalisation are left
        aside: `Objective.evaluation` takes those of given inputs.

    Raises
    ------
    InputError
        A name is missing or left over, or a layer has no counterpart there.
    ShapeError
        A weight has another shape.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import get_backend
    >>> state = {"0.weight": np.asarray([[1.0, 2.0]]), "0.bias": np.asarray([3.0])}
    >>> net = Sequential(Dense(2, 1))
    >>> from_state_dict(net, state, (2,), get_backend("numpy", "float64"))
    (array([[1., 2., 3.]]),)
    """
    require_instance("state", state, Mapping)
    left = dict.fromkeys(state)
    found: dict[str, Array] = {}
    for path, layer, order in _layers(network, input_shape):

        def get(name: str, shape: Shape, path: str = path, layer: Layer = layer) -> Array:
            key = _name(path, name, names)
            if key not in state:
                raise InputError(
                    f"layer {path} ({layer!r}): expected {key!r} in the state, got "
                    f"{', '.join(map(str, state)) or 'an empty one'}; say by `names` what the "
                    "module is called"
                )
            left.pop(key, None)
            array = backend.asarray(state[key])
            if tuple(array.shape) != shape:
                came = tuple(array.shape)
                raise ShapeError(f"layer {path} ({layer!r}): {key}: expected {shape}, got {came}")
            return array

        for name, array in _format(layer).read(layer, get, order).items():
            found[".".join(filter(None, (path, name)))] = array
        for name in _STATISTICS if isinstance(layer, BatchNorm) else ():
            left.pop(_name(path, name, names), None)
    if left:
        raise InputError(f"state: no layer takes {', '.join(left)}")
    like = network.init(Rng(0), backend)
    return trees.map_named(lambda path, _: found[path], like)


def to_state_dict(
    network: Layer,
    params: Tree,
    input_shape: Shape,
    names: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """The inverse of `from_state_dict`: what `torch.nn.Module.load_state_dict` takes.

    Parameters
    ----------
    network : Layer
    params : tree of Array
    input_shape, names
        As there.

    Returns
    -------
    dict
        Names to arrays of the parameters' kind; PyTorch makes tensors of NumPy's by
        `torch.from_numpy`. Of an RNN, which has two biases, the second is 0; running statistics are
        not there, so that `strict=False` loads a network with batch normalisation.

    Raises
    ------
    InputError
        A layer has no counterpart there.
    ShapeError
        The parameters are those of another network.

    Examples
    --------
    >>> import numpy as np
    >>> to_state_dict(Dense(2, 1), np.asarray([[1.0, 2.0, 3.0]]), (2,))
    {'weight': array([[1., 2.]]), 'bias': array([3.])}
    """
    leaves = dict(trees.items(params))
    like = network.init(Rng(0), Backend.of(next(iter(leaves.values()))))
    expected, came = (
        {path: tuple(p.shape) for path, p in found.items()}
        for found in (dict(trees.items(like)), leaves)
    )
    if came != expected:
        raise ShapeError(f"params: expected shapes {expected}, got {came}")
    state: dict[str, Array] = {}
    for path, layer, order in _layers(network, input_shape):
        own = {
            leaf[len(path) :].lstrip("."): p
            for leaf, p in leaves.items()
            if not path or leaf == path or leaf.startswith(f"{path}.")
        }
        for name, array in _format(layer).write(layer, own, order).items():
            state[_name(path, name, names)] = array
    return state


def _name(path: str, name: str, names: Mapping[str, str] | None) -> str:
    module = (names or {}).get(path, path)
    return f"{module}.{name}" if module else name


# ------------------------------------------------------------------------------------ the walk


@final
@dataclass
class _Place:
    """An example's shape, whether it has channels (first there), and the order of its features."""

    shape: Shape
    image: bool
    order: Order = None


def _layers(network: Layer, shape: Shape) -> list[tuple[str, Layer, Order]]:
    """Each layer that has parameters, with its path and the order of its inputs, in order."""
    require_instance("input_shape", shape, tuple)
    network.output_shape(shape)
    return list(_walk(network, "", _Place(shape, image=len(shape) >= 3), set()))


def _walk(
    layer: Layer, path: str, at: _Place, seen: set[str]
) -> Iterator[tuple[str, Layer, Order]]:
    """Move `at` behind the layer, and yield what is on the way."""
    if isinstance(layer, Sequential | Tied):
        order = range(len(layer.layers)) if isinstance(layer, Sequential) else layer.order
        for i in order:
            yield from _walk(layer.layers[i], f"{path}.{i}" if path else str(i), at, seen)
        return
    if isinstance(layer, Residual):
        _require_order(layer, path, at)
        before = _Place(at.shape, at.image)
        for place, child in trees.items(layer.children, path):
            branch = _Place(before.shape, before.image)
            yield from _walk(child, place, branch, seen)
            at.shape, at.image = branch.shape, branch.image
            _require_order(layer, path, branch)
        return
    if type(layer) in _FORMATS:
        if path not in seen:
            yield path, layer, at.order
        seen.add(path)
    elif not isinstance(layer, Parameterless):
        raise InputError(
            f"layer {path} ({layer!r}): has no counterpart in PyTorch that is known here"
        )
    _move(layer, path, at)


def _move(layer: Layer, path: str, at: _Place) -> None:
    shape = at.shape
    at.shape = layer.output_shape(shape)
    if isinstance(layer, Dense):
        at.order = None
    elif not isinstance(layer, _ANY_ORDER):
        _require_order(layer, path, at)
    if isinstance(layer, Reshape) and at.image:
        raise InputError(
            f"layer {path} ({layer!r}): numbers of an image are in another order in PyTorch, "
            "where channels come first; reorder them by hand"
        )
    if isinstance(layer, Flatten):
        channels, pixels = shape[-1], math.prod(shape[:-1])
        if at.image and channels > 1 and pixels > 1:
            at.order = tuple(c * pixels + t for t in range(pixels) for c in range(channels))
        at.image = False
    elif isinstance(layer, _IMAGES):
        at.image = len(at.shape) > 1
    elif isinstance(layer, _SEQUENCES):
        at.image = False


def _require_order(layer: Layer, path: str, at: _Place) -> None:
    if at.order is not None:
        raise InputError(
            f"layer {path} ({layer!r}): features of a flattened image are in another order in "
            "PyTorch, and only Dense undoes it; put one before this layer, or reorder by hand"
        )


# --------------------------------------------------------------------------------- the formats

Get = Callable[[str, Shape], Array]


@final
@dataclass(frozen=True)
class _Format:
    """How the parameters of a layer are read and written: by the names below its path."""

    read: Callable[[Any, Get, Order], dict[str, Array]]
    write: Callable[[Any, dict[str, Array], Order], dict[str, Array]]


def _format(layer: Layer) -> _Format:
    return _FORMATS[type(layer)]


def _joined(weight: Array, bias: Array | None) -> Array:
    """[W | b]."""
    if bias is None:
        return weight
    return array_namespace(weight).concat([weight, bias[..., None]], axis=-1)


def _cut(matrix: Array, bias: bool) -> tuple[Array, Array | None]:
    return (matrix[..., :-1], matrix[..., -1]) if bias else (matrix, None)


def _named(weight: Array, bias: Array | None) -> dict[str, Array]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _take(x: Array, order: Order, *, back: bool = False) -> Array:
    """Features in the order that they have here, or `back` in that of PyTorch, on the last axis."""
    if order is None:
        return x
    xp = array_namespace(x)
    indices = [0] * len(order)
    for here, there in enumerate(order):
        if back:
            indices[there] = here
        else:
            indices[here] = there
    return xp.take(x, xp.asarray(indices, device=x.device), axis=-1)


def _read_dense(layer: Dense, get: Get, order: Order) -> dict[str, Array]:
    weight = _take(get("weight", (layer.d_out, layer.d_in)), order)
    return {"": _joined(weight, get("bias", (layer.d_out,)) if layer.bias else None)}


def _write_dense(layer: Dense, params: dict[str, Array], order: Order) -> dict[str, Array]:
    weight, bias = _cut(params[""], layer.bias)
    return _named(_take(weight, order, back=True), bias)


def _read_conv(layer: Any, get: Get, _: Order, *, transposed: bool) -> dict[str, Array]:
    """(c_out, c_in / groups, *kernel), transposed (c_in, c_out / groups, *kernel), to W̄."""
    groups, taps = layer.groups, len(layer.kernel)
    c_in, c_out = layer.c_in // groups, layer.c_out // groups
    sizes = (groups * c_in, c_out) if transposed else (groups * c_out, c_in)
    w = get("weight", (*sizes, *layer.kernel))
    xp = array_namespace(w)
    w = xp.reshape(w, (groups, sizes[0] // groups, sizes[1], *layer.kernel))
    if transposed:
        w = xp.flip(w, axis=tuple(range(3, 3 + taps)))
        w = xp.permute_dims(w, (0, 2, *range(3, 3 + taps), 1))
    else:
        w = xp.permute_dims(w, (0, 1, *range(3, 3 + taps), 2))
    w = xp.reshape(w, (groups, c_out, math.prod(layer.kernel) * c_in))
    bias = xp.reshape(get("bias", (layer.c_out,)), (groups, c_out)) if layer.bias else None
    w = _joined(w, bias)
    return {"": w if groups > 1 else w[0, ...]}


def _write_conv(
    layer: Any, params: dict[str, Array], _: Order, *, transposed: bool
) -> dict[str, Array]:
    groups, taps = layer.groups, len(layer.kernel)
    c_in, c_out = layer.c_in // groups, layer.c_out // groups
    w, bias = _cut(params[""], layer.bias)
    xp = array_namespace(w)
    w = xp.reshape(w, (groups, c_out, *layer.kernel, c_in))
    if transposed:
        w = xp.flip(w, axis=tuple(range(2, 2 + taps)))
        w = xp.permute_dims(w, (0, 2 + taps, 1, *range(2, 2 + taps)))
        w = xp.reshape(w, (groups * c_in, c_out, *layer.kernel))
    else:
        w = xp.permute_dims(w, (0, 1, 2 + taps, *range(2, 2 + taps)))
        w = xp.reshape(w, (groups * c_out, c_in, *layer.kernel))
    return _named(w, None if bias is None else xp.reshape(bias, (layer.c_out,)))


def _read_embedding(layer: Embedding, get: Get, _: Order) -> dict[str, Array]:
    return {"": get("weight", (layer.size, layer.d_out)).T}


def _write_embedding(layer: Embedding, params: dict[str, Array], _: Order) -> dict[str, Array]:
    return {"weight": params[""].T}


def _read_norm(layer: Normalization, get: Get, order: Order) -> dict[str, Array]:
    if not layer.affine:
        return {}
    names = ("weight", "bias") if layer.shift else ("weight",)
    rows = [_take(get(name, (layer.size,)), order) for name in names]
    return {"": array_namespace(*rows).stack(rows)}


def _write_norm(layer: Normalization, params: dict[str, Array], order: Order) -> dict[str, Array]:
    if not layer.affine:
        return {}
    names = ("weight", "bias") if layer.shift else ("weight",)
    return {name: _take(params[""][i, :], order, back=True) for i, name in enumerate(names)}


def _read_attention(layer: MultiHeadAttention, get: Get, _: Order) -> dict[str, Array]:
    d = layer.d_model
    weight = get("in_proj_weight", (3 * d, d))
    bias = get("in_proj_bias", (3 * d,)) if layer.bias else None
    inner = _joined(weight, bias)
    output = _joined(
        get("out_proj.weight", (d, d)), get("out_proj.bias", (d,)) if layer.bias else None
    )
    parts = [inner[i * d : (i + 1) * d, :] for i in range(3)]
    return dict(zip(PROJECTIONS, [*parts, output], strict=True))


def _write_attention(
    layer: MultiHeadAttention, params: dict[str, Array], _: Order
) -> dict[str, Array]:
    cut = [_cut(params[name], layer.bias) for name in PROJECTIONS]
    xp = array_namespace(cut[0][0])
    state = {"in_proj_weight": xp.concat([w for w, _ in cut[:3]]), "out_proj.weight": cut[3][0]}
    if layer.bias:
        state["in_proj_bias"] = xp.concat([b for _, b in cut[:3]])
        state["out_proj.bias"] = cut[3][1]
    return state


def _cell(layer: Recurrent) -> tuple[str, Dense]:
    """The affine layer of an Elman cell, and its path; other cells have no counterpart."""
    cell = layer.cell
    if isinstance(cell, Dense):
        return "", cell
    if isinstance(cell, Sequential) and isinstance(cell.layers[0], Dense):
        rest = [child for child in cell.layers[1:] if trees.leaves(child.children)]
        if not rest and all(type(child) not in _FORMATS for child in cell.layers[1:]):
            return "0", cell.layers[0]
    raise InputError(
        f"{layer!r}: expected a cell of one Dense and an activation, as torch.nn.RNN has it"
    )


def _read_recurrent(layer: Recurrent, get: Get, _: Order) -> dict[str, Array]:
    path, dense = _cell(layer)
    h = layer.d_state
    inputs, state = get("weight_ih_l0", (h, dense.d_in - h)), get("weight_hh_l0", (h, h))
    weight = array_namespace(inputs).concat([inputs, state], axis=1)
    bias = get("bias_ih_l0", (h,)) + get("bias_hh_l0", (h,)) if dense.bias else None
    return {path: _joined(weight, bias)}


def _write_recurrent(layer: Recurrent, params: dict[str, Array], _: Order) -> dict[str, Array]:
    path, dense = _cell(layer)
    weight, bias = _cut(params[path], dense.bias)
    d = dense.d_in - layer.d_state
    state = {"weight_ih_l0": weight[:, :d], "weight_hh_l0": weight[:, d:]}
    if bias is not None:
        zero = array_namespace(bias).zeros_like(bias)
        state |= {"bias_ih_l0": bias, "bias_hh_l0": zero}
    return state


_NORM = _Format(_read_norm, _write_norm)
_FORMATS: Mapping[type[Layer], _Format] = {
    Dense: _Format(_read_dense, _write_dense),
    Conv: _Format(partial(_read_conv, transposed=False), partial(_write_conv, transposed=False)),
    ConvTranspose: _Format(
        partial(_read_conv, transposed=True), partial(_write_conv, transposed=True)
    ),
    Embedding: _Format(_read_embedding, _write_embedding),
    LayerNorm: _NORM,
    RMSNorm: _NORM,
    GroupNorm: _NORM,
    BatchNorm: _NORM,
    FixedNorm: _NORM,
    MultiHeadAttention: _Format(_read_attention, _write_attention),
    Recurrent: _Format(_read_recurrent, _write_recurrent),
}
