"""Trees as JSON, with their arrays set aside: the manifest of a checkpoint.

Values that JSON keeps exactly stand for themselves; everything else, containers included, is an
object with one key, its type.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any

import array_api_compat
import numpy as np

from kfac_np.backend import to_numpy
from kfac_np.errors import CheckpointError
from kfac_np.trees import Tree

__all__ = ["decode", "encode"]

_HostArray = np.ndarray[Any, Any]


def encode(value: Tree, path: str, arrays: dict[str, _HostArray] | None = None) -> Any:
    """Return what stands for a tree in JSON.

    Parameters
    ----------
    value : tree
    path : str
        Of the tree, for messages.
    arrays : dict, optional
        Gets the arrays; without it none are allowed.

    Raises
    ------
    CheckpointError
        The tree holds something that would not come back as it is.

    Examples
    --------
    >>> encode({"w": (np.ones(2), 3)}, "tree", arrays := {})
    {'dict': [['w', {'tuple': [{'array': 'array_0'}, 3]}]]}
    >>> arrays
    {'array_0': array([1., 1.])}
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        # repr() of a finite float reads back as the same bits; the rest JSON cannot say.
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if type(value) in (tuple, list):
        children = [encode(v, f"{path}.{i}", arrays) for i, v in enumerate(value)]
        return {type(value).__name__: children}
    if type(value) is dict:
        pairs = [[_key(k, path), encode(v, f"{path}.{k}", arrays)] for k, v in value.items()]
        return {"dict": pairs}
    if arrays is not None and isinstance(value, np.generic):
        return {"scalar": _keep(np.asarray(value), path, arrays)}
    if arrays is not None and array_api_compat.is_array_api_obj(value):
        if isinstance(value, np.ndarray) and type(value) not in (np.ndarray, np.memmap):
            raise CheckpointError(
                f"{path}: expected a plain array, got a {type(value).__name__}, which would not "
                "come back as one"
            )
        return {"array": _keep(to_numpy(value), path, arrays)}
    raise CheckpointError(
        f"{path}: expected an array, None, bool, int, float, str, or a tuple, list or dict of "
        f"these, got {type(value).__name__}"
    )


def _key(key: Any, path: str) -> Any:
    if type(key) not in (str, int, bool):
        raise CheckpointError(f"{path}: expected a str or int as key, got {key!r}")
    return key


def _keep(array: _HostArray, path: str, arrays: dict[str, _HostArray]) -> str:
    if array.dtype.kind not in "biufc":
        raise CheckpointError(f"{path}: expected an array of numbers, got dtype {array.dtype}")
    name = f"array_{len(arrays)}"
    arrays[name] = array
    return name


def decode(node: Any, path: str, arrays: Mapping[str, Any] | None = None) -> Tree:
    """Return the tree that a JSON value stands for: the inverse of `encode`.

    Raises
    ------
    ValueError
        The value is not one that `encode` returns.

    Examples
    --------
    >>> decode({"dict": [["w", {"tuple": [2, 3]}]]}, "tree")
    {'w': (2, 3)}
    >>> decode({"tuple": [{"set": [2]}]}, "tree")
    Traceback (most recent call last):
    ValueError: tree.0: expected a kind of values or containers, got 'set'
    """
    if node is None or type(node) in (bool, int, float, str):
        return node
    if type(node) is not dict or len(node) != 1:
        raise ValueError(f"{path}: expected a value, or an object with one key, its kind")
    ((kind, value),) = node.items()
    if kind in ("array", "scalar", "float"):
        if type(value) is not str:
            raise ValueError(f"{path}: expected a str for the {kind}, got {shortened(value)}")
        return _decode_number(kind, value, path, arrays or {})
    if kind not in ("tuple", "list", "dict"):
        raise ValueError(f"{path}: expected a kind of values or containers, got {shortened(kind)}")
    if type(value) is not list:
        raise ValueError(f"{path}: expected a list for the {kind}, got {shortened(value)}")
    if kind == "dict":
        return _decode_dict(value, path, arrays)
    children = [decode(v, f"{path}.{i}", arrays) for i, v in enumerate(value)]
    return tuple(children) if kind == "tuple" else children


def _decode_number(kind: str, value: str, path: str, arrays: Mapping[str, Any]) -> Any:
    if kind == "float":
        try:
            return struct.unpack(">d", bytes.fromhex(value))[0]
        except (ValueError, struct.error) as error:
            raise ValueError(
                f"{path}: expected 16 hexadecimal digits, got {shortened(value)}"
            ) from error
    if value not in arrays:
        raise ValueError(f"{path}: expected an array, but the file has no {shortened(value)}")
    array = arrays[value]
    if kind == "scalar" and array.shape != ():
        raise ValueError(f"{path}: expected a scalar, got an array of shape {tuple(array.shape)}")
    return array[()] if kind == "scalar" else array


def _decode_dict(
    pairs: list[Any], path: str, arrays: Mapping[str, Any] | None
) -> dict[str | int, Tree]:
    decoded: dict[str | int, Tree] = {}
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in (str, int, bool):
            raise ValueError(f"{path}: expected pairs of a key and a value, got {shortened(pair)}")
        decoded[pair[0]] = decode(pair[1], f"{path}.{pair[0]}", arrays)
    return decoded
