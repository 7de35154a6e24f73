"""What a data set is: arrays on the host, and where they come from."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from kfac_np.errors import DataError, InputError
from kfac_np.validation import is_integer

__all__ = ["Dataset", "Images", "Labels", "check_dataset", "first"]

Images: TypeAlias = npt.NDArray[np.float32]
Labels: TypeAlias = npt.NDArray[np.int64]


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images in [0, 1], and their classes if they have any, for training and for testing.

    An autoencoder uses the images as targets too. The arrays are NumPy's: a minibatch is taken
    on the host and moved to where the parameters are.

    Parameters
    ----------
    name : str
    x_train, x_test : array of float32, shapes (N_train, d) and (N_test, d)
        Rows of pixels in [0, 1], d = height · width · channels: the channels of a pixel lie side by
        side, as convolutions want them, so that ``Reshape(image_shape)`` makes images of rows.
    t_train, t_test : array of int64, shapes (N_train,) and (N_test,), or None
        Classes 0..num_classes-1; None where there are no labels.
    image_shape : (int, int, int)
        Height, width and channels: 1 of grey images, 3 of coloured ones.
    num_classes : int or None
    source : str
        Where the data come from, and their licence.

    Raises
    ------
    DataError
        See `check_dataset`.

    Examples
    --------
    >>> import numpy as np
    >>> pixels = np.zeros((3, 4), dtype=np.float32)
    >>> Dataset("dark", pixels, None, pixels[:1], None, (2, 2, 1), None, "made up")
    Dataset('dark': 3 for training, 1 for testing, 2 × 2 pixels, no labels)
    """

    name: str
    x_train: Images
    t_train: Labels | None
    x_test: Images
    t_test: Labels | None
    image_shape: tuple[int, int, int]
    num_classes: int | None
    source: str

    def __post_init__(self) -> None:
        check_dataset(self)

    def fingerprint(self) -> str:
        """Number and shape of the training images, and a hash of all images and labels.

        Examples
        --------
        >>> from kfac_np.data import digits
        >>> digits().fingerprint()
        '1500 of 8×8×1, 382be5165630f68e'
        """
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.x_train, self.t_train, self.x_test, self.t_test):
            if array is not None:
                digest.update(f"{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        shape = "×".join(map(str, self.image_shape))
        return f"{len(self.x_train)} of {shape}, {digest.hexdigest()}"

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        depth = "" if channels == 1 else f" of {channels} channels"
        labels = "no labels" if self.num_classes is None else f"{self.num_classes} classes"
        return (
            f"Dataset({self.name!r}: {len(self.x_train)} for training, {len(self.x_test)} for "
            f"testing, {height} × {width} pixels{depth}, {labels})"
        )


def check_dataset(dataset: Dataset) -> None:
    """Raise `DataError` unless shapes agree, nothing is empty, and all values are in range.

    `Dataset` calls this itself.

    Raises
    ------
    DataError
        Names the data set, the array, what was expected, and what came.

    Examples
    --------
    >>> import numpy as np
    >>> pixels = np.full((3, 4), 255, dtype=np.float32)
    >>> Dataset("loud", pixels, None, pixels, None, (2, 2, 1), None, "made up")
    Traceback (most recent call last):
    kfac_np.errors.DataError: loud: x_train: expected values in [0, 1], got 255.0 to 255.0
    """
    shape = dataset.image_shape
    if len(shape) != 3 or not all(is_integer(n) and n > 0 for n in shape):
        raise DataError(
            f"{dataset.name}: image_shape: expected (height, width, channels), got {shape!r}"
        )
    d = math.prod(shape)
    for part, x, t in (
        ("train", dataset.x_train, dataset.t_train),
        ("test", dataset.x_test, dataset.t_test),
    ):
        _check_images(f"{dataset.name}: x_{part}", x, d)
        _check_labels(f"{dataset.name}: t_{part}", t, len(x), dataset.num_classes)


def _check_images(where: str, x: Images, d: int) -> None:
    if x.dtype != np.float32:
        raise DataError(f"{where}: expected dtype float32, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] != d or len(x) == 0:
        raise DataError(f"{where}: expected shape (N, {d}) with N >= 1, got {x.shape}")
    low, high = float(np.min(x)), float(np.max(x))
    if not (low >= 0 and high <= 1):  # a NaN is the minimum, and compares false
        raise DataError(f"{where}: expected values in [0, 1], got {low} to {high}")


def _check_labels(where: str, t: Labels | None, count: int, num_classes: int | None) -> None:
    if t is None and num_classes is None:
        return
    if t is None or num_classes is None:
        raise DataError(
            f"{where}: expected labels together with num_classes, or neither, "
            f"got {'no labels' if t is None else 'labels'} and num_classes={num_classes}"
        )
    if t.dtype != np.int64 or t.shape != (count,):
        raise DataError(f"{where}: expected shape ({count},) of int64, got {t.shape} of {t.dtype}")
    if t.min() < 0 or t.max() >= num_classes:
        raise DataError(
            f"{where}: expected labels in 0..{num_classes - 1}, got {t.min()} to {t.max()}"
        )


def first(dataset: Dataset, n_train: int | None = None, n_test: int | None = None) -> Dataset:
    """Keep only the first examples of a data set.

    Parameters
    ----------
    dataset : Dataset
    n_train, n_test : int, optional
        How many to keep; by default all.

    Returns
    -------
    Dataset
        Its arrays are views.

    Raises
    ------
    InputError
        A number is below 1, or more than there are.

    Examples
    --------
    >>> from kfac_np.data import digits
    >>> first(digits(), n_train=100)
    Dataset('digits': 100 for training, 297 for testing, 8 × 8 pixels, 10 classes)
    """
    for name, asked, there in (
        ("n_train", n_train, len(dataset.x_train)),
        ("n_test", n_test, len(dataset.x_test)),
    ):
        if asked is not None and not 1 <= asked <= there:
            raise InputError(f"{dataset.name}: {name}: expected 1 to {there}, got {asked}")
    return dataclasses.replace(
        dataset,
        x_train=dataset.x_train[:n_train],
        t_train=None if dataset.t_train is None else dataset.t_train[:n_train],
        x_test=dataset.x_test[:n_test],
        t_test=None if dataset.t_test is None else dataset.t_test[:n_test],
    )
