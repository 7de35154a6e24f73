"""Directories of files in the binary format of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt

from kfac_np.data.dataset import Dataset, Images, Labels
from kfac_np.errors import DataError

__all__ = [
    "HUNDRED",
    "TEN",
    "Layout",
    "cifar_dataset",
    "load_layout",
    "other_version",
    "read_cifar",
]

_SHAPE = (3, 32, 32)  # in the files: a plane for each channel
_PIXELS = 3072


@final
@dataclass(frozen=True)
class Layout:
    """One of the two published forms of a directory.

    Attributes
    ----------
    label_bytes : int
        Before the pixels of a record; the last one is the class.
    batches : tuple of str
        Training files, as published.
    pattern : str
        Of the training files in a directory of somebody else's.
    test : str
    class_names : str
        A file with a line for each class, where there is one.
    num_classes : int
        Without such a file.

    Examples
    --------
    >>> TEN.label_bytes, HUNDRED.label_bytes
    (1, 2)
    """

    label_bytes: int
    batches: tuple[str, ...]
    pattern: str
    test: str
    class_names: str
    num_classes: int


TEN = Layout(
    1,
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "data_batch_*.bin",
    "test_batch.bin",
    "batches.meta.txt",
    10,
)
HUNDRED = Layout(
    2,
    ("train.bin",),
    "train.bin",
    "test.bin",
    "fine_label_names.txt",
    100,
)

# Version, folder in its archive, and files that it has.
_OTHER_VERSIONS = (
    ("Python", "cifar-10-batches-py", ("data_batch_1",)),
    ("Python", "cifar-100-python", ("train", "meta")),
    ("MATLAB", "cifar-10-batches-mat", ("data_batch_1.mat",)),
    ("MATLAB", "cifar-100-matlab", ("train.mat", "meta.mat")),
)


def cifar_dataset(
    directory: str | os.PathLike[str], name: str | None = None, source: str | None = None
) -> Dataset:
    """Load a directory in the binary format of CIFAR-10 or of CIFAR-100, whatever is in it.

    Which of the two is seen from the names of its files: ``data_batch_1.bin``, ``data_batch_2.bin``
    and so on, any number of them, and ``test_batch.bin`` have records of one label byte and 3072
    pixels, ``train.bin`` and ``test.bin`` of two label bytes, of which the second one (fine) is the
    class. There are as many classes as ``batches.meta.txt`` or ``fine_label_names.txt`` has lines
    that are not blank, or, without such a file, 10 or 100.

    Parameters
    ----------
    directory : path
    name : str, optional
        The data set's name; by default the directory's.
    source : str, optional
        The data set's source note; by default the directory.

    Returns
    -------
    Dataset
        Rows of 32 · 32 · 3 pixels, the bytes divided by 255; the three colours of a pixel lie side
        by side.

    Raises
    ------
    DataError
        Files are missing or damaged, or labels are out of range.

    Examples
    --------
    >>> cifar_dataset("/nowhere")
    Traceback (most recent call last):
    kfac_np.errors.DataError: /nowhere: expected a directory with ...: no such directory
    """
    directory = Path(directory)
    there = [x for x in (TEN, HUNDRED) if _batches(directory, x) and (directory / x.test).is_file()]
    if len(there) != 1:
        fault = "both are there" if there else "neither is there"
        raise DataError(
            f"{directory}: expected a directory with data_batch_*.bin and test_batch.bin, or with "
            f"train.bin and test.bin: {fault if directory.is_dir() else 'no such directory'}"
            f"{other_version(directory)}"
        )
    return load_layout(
        directory,
        there[0],
        _in_order(directory, _batches(directory, there[0])),
        name or directory.resolve().name,
        source or f"files in CIFAR's format in {directory}",
    )


def read_cifar(
    path: str | os.PathLike[str], label_bytes: int = 1
) -> tuple[Labels, npt.NDArray[np.uint8]]:
    """Read one file of records: label bytes, then 32 × 32 bytes of red, of green and of blue.

    Parameters
    ----------
    path : path
    label_bytes : {1, 2}
        1 in CIFAR-10; 2 in CIFAR-100, a coarse and a fine label.

    Returns
    -------
    labels : array of int64, shape (N,)
        The last label byte of each record.
    pixels : array of uint8, shape (N, 3, 32, 32)
        A view of what was read.

    Raises
    ------
    DataError
        The file cannot be read, is empty, or is no integer of records long.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(bytes([7]) + bytes(3072))
    ...     file.flush()
    ...     labels, pixels = read_cifar(file.name)
    >>> labels, pixels.shape
    (array([7]), (1, 3, 32, 32))
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a readable file: {error.strerror}") from error
    record = label_bytes + _PIXELS
    if not content or len(content) % record:
        pickled = content[:1] == b"\x80" and content[-1:] == b"."
        raise DataError(
            f"{path}: expected records of {record} bytes, {label_bytes} for labels and {_PIXELS} "
            f"pixels; got {len(content)} bytes: {len(content) // record} records and "
            f"{len(content) % record} bytes"
            f"{'; it is a pickle, as the Python version has them' if pickled else ''}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, label_bytes - 1].astype(np.int64)
    return labels, records[:, label_bytes:].reshape(-1, *_SHAPE)


def _batches(directory: Path, layout: Layout) -> list[Path]:
    """The training files that are there."""
    return list(directory.glob(layout.pattern))


def _in_order(directory: Path, batches: Sequence[Path]) -> list[Path]:
    """Sort numbered training files; a copy of one, or one that is missing, is an error."""
    if len(batches) == 1 and batches[0].name in HUNDRED.batches:
        return list(batches)
    numbered: dict[int, Path] = {}
    for path in sorted(batches):
        match = re.fullmatch(r"data_batch_([0-9]+)\.bin", path.name)
        number = int(match[1]) if match else -1
        if number < 0 or number in numbered:
            raise DataError(
                f"{directory}: expected training files data_batch_1.bin, data_batch_2.bin, ..., "
                f"each once, got {path.name!r}, too: move it elsewhere"
            )
        numbered[number] = path
    first_missing = next((k for k in range(1, max(numbered)) if k not in numbered), None)
    if first_missing is not None:
        raise DataError(
            f"{directory}: expected all training files up to {numbered[max(numbered)].name}, "
            f"data_batch_{first_missing}.bin is missing"
        )
    return [numbered[k] for k in sorted(numbered)]


def other_version(directory: str | os.PathLike[str]) -> str:
    """Say so if a directory, or one in it, has a published version of CIFAR that is not binary.

    Returns
    -------
    str
        The end of a message; empty if there is no such version.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     (Path(directory) / "data_batch_1").touch()
    ...     other_version(directory)
    '; the files there are of the Python version, the binary one is needed'
    """
    for version, inside, signs in _OTHER_VERSIONS:
        for place in (Path(directory), Path(directory) / inside):
            if all((place / sign).is_file() for sign in signs):
                where = "there" if place == Path(directory) else f"in {inside}"
                return f"; the files {where} are of the {version} version, the binary one is needed"
    return ""


def load_layout(
    directory: Path, layout: Layout, batches: Sequence[Path], name: str, source: str
) -> Dataset:
    """Load given training files, and the test file, of a directory with a known layout.

    Raises
    ------
    DataError
        Files are missing or damaged, or labels are out of range.

    Examples
    --------
    >>> load_layout(Path("/nowhere"), TEN, [Path("/nowhere/data_batch_1.bin")], "toys", "made up")
    Traceback (most recent call last):
    kfac_np.errors.DataError: /nowhere/data_batch_1.bin: expected a readable file: No such file ...
    """
    num_classes = _num_classes(directory / layout.class_names, layout.num_classes)
    x_train, t_train = _examples(batches, layout, num_classes)
    x_test, t_test = _examples([directory / layout.test], layout, num_classes)
    return Dataset(
        name=name,
        x_train=x_train,
        t_train=t_train,
        x_test=x_test,
        t_test=t_test,
        image_shape=(32, 32, 3),
        num_classes=num_classes,
        source=source,
    )


def _num_classes(path: Path, default: int) -> int:
    if not path.is_file():
        return default
    try:
        names = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected names of classes, a line each ({error})") from error
    if not 1 <= len(names) <= 256:  # labels are bytes
        raise DataError(
            f"{path}: expected 1 to 256 names of classes, a line each, got {len(names) or 'none'}"
        )
    return len(names)


def _examples(paths: Sequence[Path], layout: Layout, num_classes: int) -> tuple[Images, Labels]:
    """Pixels in [0, 1], channels last, and labels of several files; one float copy is made."""
    read = [read_cifar(path, layout.label_bytes) for path in paths]
    for path, (labels, _) in zip(paths, read, strict=True):
        if int(labels.max()) >= num_classes:
            raise DataError(
                f"{path}: expected labels in 0..{num_classes - 1}, as {layout.class_names} or else "
                f"the format says, got {int(labels.max())}"
            )
    channels, *size = _SHAPE
    x = np.empty((sum(len(labels) for labels, _ in read), *size, channels), dtype=np.float32)
    start = 0
    for labels, pixels in read:
        rows = x[start : start + len(labels)]
        np.divide(np.moveaxis(pixels, 1, -1), np.float32(255), out=rows, dtype=np.float32)
        start += len(labels)
    return x.reshape(len(x), _PIXELS), np.concatenate([labels for labels, _ in read])
