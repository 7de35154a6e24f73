"""Reading MNIST's file format, IDX, plain or compressed by gzip."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from kfac_np.data.dataset import Dataset, Images, Labels
from kfac_np.errors import DataError

__all__ = ["FILE_NAMES", "idx_dataset", "missing_files", "read_idx"]

FILE_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# The third byte of a file tells its type; numbers are big-endian.
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

# A small part of a data set may lack many of its classes.
_MAY_BE_UNUSED = 64


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Read one IDX file.

    Compression is recognised by the content, whatever the file is called.

    Parameters
    ----------
    path : path

    Returns
    -------
    array
        Of the file's shape and dtype (uint8, int8, int16, int32, float32 or float64), in the
        machine's byte order.

    Raises
    ------
    DataError
        The file cannot be read, is not IDX, is damaged, or is shorter or longer than it says.

    References
    ----------
    Y. LeCun, C. Cortes and C. Burges, The MNIST database, "The IDX file format".

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory) / "three-idx1-ubyte"
    ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
    ...     read_idx(path)
    array([7, 8, 9], dtype=uint8)
    """
    try:
        with _opened(Path(path)) as stream:
            return _read(path, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: expected a readable file: {error.strerror}") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """What the file holds, or what is compressed in it."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not compressed:
            yield file
            return
        with gzip.open(file) as content:
            yield content


def _read(path: str | os.PathLike[str], stream: IO[bytes] | gzip.GzipFile) -> npt.NDArray[Any]:
    """Read no more than the header says, and a byte: what is compressed may be of any length."""
    start = stream.read(4)
    if len(start) < 4:
        raise DataError(f"{path}: expected an IDX file, got {len(start)} bytes")
    zeros, kind, ndim = start[:2], start[2], start[3]
    if zeros != b"\0\0" or kind not in _DTYPES:
        raise DataError(
            f"{path}: expected an IDX file, which begins with 00 00 and a type from 08 to 0e, "
            f"got {start.hex(' ')}"
        )
    sizes = stream.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(
            f"{path}: expected a header of {4 + 4 * ndim} bytes for {ndim} dimensions, "
            f"got {4 + len(sizes)} bytes: the file is cut short"
        )
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4", ndim))
    dtype = np.dtype(_DTYPES[kind])
    expected = math.prod(shape) * dtype.itemsize
    data = _at_most(stream, expected + 1)
    if len(data) != expected:
        fault = "the file is cut short" if len(data) < expected else "there is more after the data"
        raise DataError(
            f"{path}: expected {expected} bytes of {dtype.name} for shape {shape}, "
            f"got {len(data)}: {fault}"
        )
    try:
        return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:  # more dimensions than NumPy has, or sizes beyond any
        raise DataError(
            f"{path}: expected an array, got {ndim} dimensions of sizes {min(shape)} to "
            f"{max(shape)} ({error})"
        ) from error


def _at_most(stream: IO[bytes] | gzip.GzipFile, size: int) -> bytes:
    """Read `size` bytes, or what there is; memory is taken for what there is."""
    pieces = []
    while size > 0 and (piece := stream.read(min(size, 2**24))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def missing_files(
    directory: str | os.PathLike[str], names: Sequence[str] = FILE_NAMES
) -> list[str]:
    """List which of the files, plain or with ``.gz``, are not in a directory.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     (Path(directory) / "train-images-idx3-ubyte.gz").touch()
    ...     missing_files(directory)[0]
    'train-labels-idx1-ubyte'
    """
    return [name for name in names if _find(Path(directory), name) is None]


def _find(directory: Path, name: str) -> Path | None:
    candidates = (directory / name, directory / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def idx_dataset(
    directory: str | os.PathLike[str], name: str | None = None, source: str | None = None
) -> Dataset:
    """Load a directory with MNIST's four files: images and labels, for training and testing.

    The files are named as MNIST's, `FILE_NAMES`, plain or with ``.gz``. Bytes are divided by
    255; images stored as floats must be in [0, 1] already.

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
        With as many classes as the largest label says. Labels that leave more classes without an
        example than with one, and more than 64, are refused: 255 as a mark for no class, say.

    Raises
    ------
    DataError
        A file is missing or damaged, or the four do not fit together.

    Examples
    --------
    >>> idx_dataset("/nowhere")
    Traceback (most recent call last):
    kfac_np.errors.DataError: /nowhere: expected a directory with ...
    """
    directory = Path(directory)
    paths = [_find(directory, file_name) for file_name in FILE_NAMES]
    if None in paths:
        fault = (
            f"{', '.join(missing_files(directory))} missing"
            if directory.is_dir()
            else "no such directory"
        )
        raise DataError(
            f"{directory}: expected a directory with {', '.join(FILE_NAMES)} "
            f"(each plain or with .gz): {fault}"
        )
    images, labels, test_images, test_labels = [path for path in paths if path is not None]
    x_train, image_shape = _images(images)
    x_test, test_shape = _images(test_images)
    if test_shape != image_shape:
        raise DataError(
            f"{test_images}: expected images of {image_shape} pixels like the training images, "
            f"got {test_shape}"
        )
    t_train, t_test = _labels(labels, len(x_train)), _labels(test_labels, len(x_test))
    num_classes = _num_classes(directory, t_train, t_test)
    return Dataset(
        name=name or directory.resolve().name,
        x_train=x_train,
        t_train=t_train,
        x_test=x_test,
        t_test=t_test,
        image_shape=(*image_shape, 1),
        num_classes=num_classes,
        source=source or f"IDX files in {directory}",
    )


def _images(path: Path) -> tuple[Images, tuple[int, int]]:
    pixels = read_idx(path)
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise DataError(f"{path}: expected images of shape (N, height, width), got {pixels.shape}")
    if pixels.dtype == np.uint8:
        x = pixels.astype(np.float32)
        x /= np.float32(255)
    elif pixels.dtype.kind == "f":
        x = pixels.astype(np.float32)
    else:
        raise DataError(f"{path}: expected unsigned bytes or floats, got {pixels.dtype}")
    return x.reshape(len(x), -1), (pixels.shape[1], pixels.shape[2])


def _labels(path: Path, count: int) -> Labels:
    labels = read_idx(path)
    if labels.shape != (count,):
        raise DataError(
            f"{path}: expected {count} labels, one for each image, got shape {labels.shape}"
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: expected integer labels, got {labels.dtype}")
    if labels.min() < 0:
        raise DataError(f"{path}: expected labels 0, 1, ..., got {labels.min()}")
    return labels.astype(np.int64)


def _num_classes(directory: Path, *labels: Labels) -> int:
    """The largest label and one, unless that is no number of classes."""
    used = np.unique(np.concatenate(labels))
    count = int(used[-1]) + 1
    if (unused := count - len(used)) > max(len(used), _MAY_BE_UNUSED):
        below = f", the next below is {used[-2]}" if len(used) > 1 else ""
        raise DataError(
            f"{directory}: expected labels 0, 1, ..., without large gaps, got {used[-1]}{below}, "
            f"so that {unused} of {count} classes have no example"
        )
    return count
