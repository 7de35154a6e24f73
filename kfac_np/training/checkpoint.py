"""Checkpoints: a tree of arrays and plain values in one npz file, without pickle.

A file holds the arrays, a JSON manifest (format, version, the skeleton of the tree, metadata)
and a SHA-256 over both. What comes back is what was saved, bit for bit: types of containers,
integers of any size, infinities and NaN, dtypes, and the memory order of matrices (sums of
products may round differently in another order). Nothing that a file says of itself is believed:
arrays are stored uncompressed, so that none is longer than the file, and whatever is not as `save`
writes it is a `CheckpointError`.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from kfac_np.backend import Backend
from kfac_np.errors import CheckpointError
from kfac_np.training.encoding import decode, encode
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
        and str. Kinds of NumPy arrays that would come back as something else, masked ones for
        example, are refused.
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
    arrays: dict[str, _HostArray] = {}
    try:
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "metadata": encode(dict(metadata or {}), "metadata"),
            "tree": encode(tree, "tree", arrays),
        }
        text = json.dumps(manifest, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # too many digits, or too deep
        raise CheckpointError(f"tree: expected what JSON can hold ({error})") from error
    entries = {
        "manifest": np.frombuffer(text, dtype=np.uint8),
        "sha256": np.frombuffer(_digest(text, arrays), dtype=np.uint8),
        **arrays,
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
    try:
        metadata = decode(manifest.get("metadata"), "metadata")
        if type(metadata) is not dict:
            raise ValueError(f"metadata: expected a dict, got a {type(metadata).__name__}")
        moved: Mapping[str, Any] = arrays
        if backend is not None:
            moved = {name: _to_backend(backend, array) for name, array in arrays.items()}
        return decode(manifest.get("tree"), "tree", moved), metadata
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a checkpoint as kfac_np writes it ({error})") from error


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

    The metadata get the step, too.

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
    if not 0 <= (step := operator.index(step)) < 10**12:
        raise CheckpointError(f"step: expected a number of at most 12 digits, got {step}")
    path = Path(directory) / f"step-{step:012d}.npz"
    save(path, tree, {**(metadata or {}), "step": step})
    for forgotten in Path(directory).glob(".step-*.npz.part"):  # by a process that was killed
        forgotten.unlink()
    for old in [p for p in checkpoints(directory) if p != path][: -(keep - 1) or None]:
        old.unlink()
    return path


def load_latest(
    directory: str | os.PathLike[str],
    fall_back: bool = False,
    backend: Backend | None = None,
    restore: Callable[[Path, Tree, dict[str, Any]], Any] | None = None,
) -> tuple[Path, Any, dict[str, Any]]:
    """Load the newest checkpoint of a directory.

    Parameters
    ----------
    directory : path
    fall_back : bool
        When the newest cannot be read or restored, take the one before it, and so on.
    backend : Backend, optional
        As for `load`.
    restore : callable, optional
        (path, tree, metadata) -> what the tree stands for, or a `CheckpointError`.

    Returns
    -------
    path : Path
        The one that was read.
    tree : tree
        Or what `restore` made of it.
    metadata : dict

    Raises
    ------
    CheckpointError
        There is none, or none that can be read and restored; or it is not of the step that its
        name says.

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
    damages = []
    for path in found if fall_back else found[:1]:
        try:
            tree, metadata = _load_step(path, backend)
            return path, tree if restore is None else restore(path, tree, metadata), metadata
        except CheckpointError as error:
            damages.append(error)
    if not fall_back and len(found) > 1:
        raise CheckpointError(f"{damages[0]} (an older one is there: {found[1].name})")
    raise damages[0]


def _load_step(path: Path, backend: Backend | None) -> tuple[Tree, dict[str, Any]]:
    tree, metadata = load(path, backend)
    if metadata.get("step") != int(path.stem.removeprefix("step-")):
        raise CheckpointError(
            f"{path}: expected a checkpoint of the step in its name, got one of step "
            f"{metadata.get('step')!r}: has it been renamed?"
        )
    return tree, metadata


def _read(path: Path) -> tuple[dict[str, Any], bytes, dict[str, _HostArray], bytes]:
    """Parse the file without trusting a byte of it."""
    if not path.is_file():
        there = "something that is no file" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: expected a checkpoint, found {there}")
    try:
        with path.open("rb") as stream:
            _require_stored(stream)
            with np.load(stream, allow_pickle=False) as file:
                entries = {name: _require_numbers(name, file[name]) for name in file.files}
        text, digest = entries.pop("manifest").tobytes(), entries.pop("sha256").tobytes()
        manifest = json.loads(text, parse_constant=_refuse)
        if not isinstance(manifest, dict):
            raise ValueError("the manifest is not an object")
    # The parsers raise nearly anything on damaged bytes, down to MemoryError for a wild shape.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "pickle" in reason:  # NumPy's guess, with the advice to trust the file
            reason = "not a file of plain arrays"
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one ({reason})") from error
    return manifest, text, entries, digest


def _require_stored(stream: IO[bytes]) -> None:
    """Raise unless what the archive holds is no longer than the archive, before it is read."""
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed")
    if sum(member.file_size for member in members) > stream.seek(0, os.SEEK_END):
        raise ValueError("the members are longer than the file")
    stream.seek(0)


def _require_numbers(name: str, member: Any) -> _HostArray:
    if not isinstance(member, np.ndarray) or member.dtype.kind not in "biufc":
        raise ValueError(f"{name} is not an array of numbers")
    return member


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} in the manifest")


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
