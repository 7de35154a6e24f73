"""Checkpoints: a tree of arrays and plain values in one npz file, without pickle.

A file holds the arrays, a JSON manifest (format, version, the skeleton of the tree, metadata)
and a SHA-256 over both. What comes back is what was saved, bit for bit: types of containers,
integers of any size, infinities and NaN, dtypes, and the memory order of matrices (sums of
products may round differently in another order).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import array_api_compat
import numpy as np

from kfac_np.backend import Backend, to_numpy
from kfac_np.errors import CheckpointError
from kfac_np.training.files import write_atomically
from kfac_np.trees import Tree

__all__ = ["checkpoints", "latest", "load", "load_latest", "save", "save_step"]

_FORMAT = "kfac_np checkpoint"
_VERSION = 1
_HostArray = np.ndarray[Any, Any]


def save(
    path: str | os.PathLike[str], tree: Tree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint beside `path` and rename it, so that `path` is never half-written.

    Parameters
    ----------
    path : path
    tree : tree
        Tuples, lists and dicts of arrays of any backend, NumPy scalars, None, bool, int, float
        and str.
    metadata : mapping, optional
        Small values of the same kinds, without arrays: the step, for example.

    Raises
    ------
    CheckpointError
        The tree holds something else (nothing is written).

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(f"{directory}/a.npz", {"w": (np.ones(2), None, 2**100)}, {"step": 3})
    ...     load(f"{directory}/a.npz")
    ({'w': (array([1., 1.]), None, 1267650600228229401496703205376)}, {'step': 3})
    """
    encoder = _Encoder()
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "metadata": _Encoder(allow_arrays=False).encode(dict(metadata or {}), "metadata"),
        "tree": encoder.encode(tree, "tree"),
    }
    text = json.dumps(manifest, allow_nan=False).encode()
    entries = {
        "manifest": np.frombuffer(text, dtype=np.uint8),
        "sha256": np.frombuffer(_digest(text, encoder.arrays), dtype=np.uint8),
        **encoder.arrays,
    }
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **entries))


def load(
    path: str | os.PathLike[str], backend: Backend | None = None
) -> tuple[Tree, dict[str, Any]]:
    """Read a checkpoint back as (tree, metadata).

    Parameters
    ----------
    path : path
    backend : Backend, optional
        Put the arrays on its device, with the dtypes they had; NumPy arrays when omitted.

    Raises
    ------
    CheckpointError
        The file is absent, truncated, altered, not a checkpoint, or of a newer version.

    Examples
    --------
    >>> load("no/such/file.npz")
    Traceback (most recent call last):
    kfac_np.errors.CheckpointError: no/such/file.npz: expected a checkpoint, found no such file
    """
    path = Path(path)
    manifest, text, arrays, digest = _read(path)
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint of kfac_np, got another npz file")
    version = manifest.get("version")
    if version != _VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint version {_VERSION}, got {version!r}; "
            "read it with the version of kfac_np that wrote it"
        )
    if digest != _digest(text, arrays):
        raise CheckpointError(f"{path}: the checksum does not match: the checkpoint is damaged")
    if backend is None:
        moved: Mapping[str, Any] = arrays
    else:
        moved = {name: _to_backend(backend, array) for name, array in arrays.items()}
    return _decode(manifest["tree"], moved), _decode(manifest["metadata"], {})


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """List the numbered checkpoints of a directory, oldest first (none if it does not exist).

    Examples
    --------
    >>> checkpoints("no/such/directory")
    []
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if re.fullmatch(r"step-\d{12}\.npz", p.name))


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """Return the newest numbered checkpoint of a directory, or None.

    Examples
    --------
    >>> latest("no/such/directory") is None
    True
    """
    found = checkpoints(directory)
    return found[-1] if found else None


def save_step(
    directory: str | os.PathLike[str],
    step: int,
    tree: Tree,
    metadata: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Save a checkpoint named after its step, then delete all but the newest `keep`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     for step in (5, 10, 15):
    ...         _ = save_step(directory, step, {}, keep=2)
    ...     [p.name for p in checkpoints(directory)]
    ['step-000000000010.npz', 'step-000000000015.npz']
    """
    if keep < 1:
        raise CheckpointError(f"keep: expected at least 1 checkpoint, got {keep}")
    path = Path(directory) / f"step-{step:012d}.npz"
    save(path, tree, {"step": step, **(metadata or {})})
    for forgotten in Path(directory).glob(".step-*.npz.part"):  # by a process that was killed
        forgotten.unlink()
    for old in [p for p in checkpoints(directory) if p != path][: -(keep - 1) or None]:
        old.unlink()
    return path


def load_latest(
    directory: str | os.PathLike[str],
    fall_back: bool = False,
    backend: Backend | None = None,
) -> tuple[Path, Tree, dict[str, Any]]:
    """Load the newest checkpoint of a directory.

    Parameters
    ----------
    directory : path
    fall_back : bool
        When the newest is damaged, take the one before it, and so on.
    backend : Backend, optional
        As for `load`.

    Returns
    -------
    path : Path
        The one that was read.
    tree : tree
    metadata : dict

    Raises
    ------
    CheckpointError
        There is none, or none that can be read.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = save_step(directory, 5, {"w": 1})
    ...     path, tree, metadata = load_latest(directory)
    >>> path.name, tree, metadata
    ('step-000000000005.npz', {'w': 1}, {'step': 5})
    """
    found = checkpoints(directory)[::-1]
    if not found:
        raise CheckpointError(f"{directory}: expected a checkpoint, found none")
    for path in found if fall_back else found[:1]:
        try:
            return (path, *load(path, backend))
        except CheckpointError as error:
            damage = error
    if not fall_back and len(found) > 1:
        raise CheckpointError(f"{damage} (an older one is there: {found[1].name})")
    raise damage


def _read(path: Path) -> tuple[dict[str, Any], bytes, dict[str, _HostArray], bytes]:
    """Parse the file without trusting a byte of it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint, found no such file")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            entries = {name: file[name] for name in file.files}
        text, digest = entries.pop("manifest").tobytes(), entries.pop("sha256").tobytes()
        manifest = json.loads(text)
        if not isinstance(manifest, dict):
            raise ValueError("the manifest is not an object")
    # The parsers raise nearly anything on damaged bytes, down to MemoryError for a wild shape.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "pickle" in reason:  # NumPy's guess, with the advice to trust the file
            reason = "not a file of plain arrays"
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one ({reason})") from error
    return manifest, text, entries, digest


def _digest(text: bytes, arrays: Mapping[str, _HostArray]) -> bytes:
    """SHA-256 over the manifest and each array's name, type, shape, order and bytes."""
    sha = hashlib.sha256(text)
    for name, array in sorted(arrays.items()):
        fortran = _is_fortran(array)
        sha.update(f"{name} {array.dtype.str} {array.shape} {fortran}".encode())
        contiguous = np.ascontiguousarray(array.T if fortran else array)
        sha.update(contiguous.reshape(-1).view(np.uint8).data)
    return sha.digest()


def _is_fortran(array: _HostArray) -> bool:
    return bool(array.flags.fnc)  # Fortran-ordered and not C-ordered


def _to_backend(backend: Backend, array: _HostArray) -> Any:
    if array.dtype.kind in "fc":  # a float64 rescue in a float32 run must stay float64
        return backend.asarray(array, dtype=getattr(backend.xp, array.dtype.name))
    return backend.asarray(array)


@final
class _Encoder:
    """Turn a tree into JSON, setting the arrays aside.

    Values that JSON keeps exactly stand for themselves; everything else, containers included,
    is an object with one key, its type.
    """

    def __init__(self, allow_arrays: bool = True) -> None:
        self.arrays: dict[str, _HostArray] = {}
        self._allow_arrays = allow_arrays

    def encode(self, value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            # repr() of a finite float reads back as the same bits; the rest JSON cannot say.
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if type(value) in (tuple, list):
            children = [self.encode(v, f"{path}.{i}") for i, v in enumerate(value)]
            return {type(value).__name__: children}
        if type(value) is dict:
            pairs = [[self._key(k, path), self.encode(v, f"{path}.{k}")] for k, v in value.items()]
            return {"dict": pairs}
        if self._allow_arrays and isinstance(value, np.generic):
            return {"scalar": self._keep(np.asarray(value), path)}
        if self._allow_arrays and array_api_compat.is_array_api_obj(value):
            return {"array": self._keep(to_numpy(value), path)}
        raise CheckpointError(
            f"{path}: expected an array, None, bool, int, float, str, or a tuple, list or dict of "
            f"these, got {type(value).__name__}"
        )

    def _key(self, key: Any, path: str) -> Any:
        if type(key) not in (str, int, bool):
            raise CheckpointError(f"{path}: expected a str or int as key, got {key!r}")
        return key

    def _keep(self, array: _HostArray, path: str) -> str:
        if array.dtype.kind not in "biufc":
            raise CheckpointError(f"{path}: expected an array of numbers, got dtype {array.dtype}")
        name = f"array_{len(self.arrays)}"
        self.arrays[name] = array
        return name


def _decode(node: Any, arrays: Mapping[str, Any]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(value))[0]
    if kind in ("tuple", "list"):
        children = [_decode(v, arrays) for v in value]
        return tuple(children) if kind == "tuple" else children
    if kind == "dict":
        return {k: _decode(v, arrays) for k, v in value}
    return arrays[value][()] if kind == "scalar" else arrays[value]
