"""Data sets by name."""

from __future__ import annotations

import os

from kfac_np.errors import ConfigError
from kfac_np.training.data.curve_images import curves
from kfac_np.training.data.dataset import Dataset, first
from kfac_np.training.data.fashion import fashion_mnist
from kfac_np.training.data.idx import idx_dataset
from kfac_np.training.data.optdigits import digits

__all__ = ["load"]


def load(
    name: str,
    directory: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    n_train: int | None = None,
    n_test: int | None = None,
) -> Dataset:
    """Load the data set of that name.

    Parameters
    ----------
    name : {"curves", "digits", "fashion-mnist", "idx:DIR"}
        ``idx:DIR`` is a directory with MNIST's four files (see `idx_dataset`).
    directory : path, optional
        Where Fashion-MNIST's files are; no other data set takes one.
    download : bool
        Whether Fashion-MNIST may be downloaded; ignored by the others, which never need it.
    n_train, n_test : int, optional
        Keep only that many examples, the first ones. CURVES are made in any number, by default
        20,000 and 10,000.

    Returns
    -------
    Dataset

    Raises
    ------
    ConfigError
        There is no data set of that name, or it takes no directory.
    InputError
        `n_train` or `n_test` is below 1, or more than there are.
    DataError
        Files are absent or damaged.

    Examples
    --------
    >>> load("digits", n_train=1000)
    Dataset('digits': 1000 for training, 297 for testing, 8 × 8 pixels, 10 classes)
    >>> load("mnist")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: data: expected curves, digits, fashion-mnist or idx:DIR, got 'mnist'
    """
    if directory is not None and name != "fashion-mnist":
        raise ConfigError(
            f"data: expected a directory with fashion-mnist only, got it with {name!r}"
        )
    if name == "curves":
        asked = {"n_train": n_train, "n_test": n_test}
        return curves(**{key: count for key, count in asked.items() if count is not None})
    if name == "digits":
        dataset = digits()
    elif name == "fashion-mnist":
        dataset = fashion_mnist(directory, download)
    elif name.startswith("idx:") and name != "idx:":
        dataset = idx_dataset(name.removeprefix("idx:"))
    else:
        raise ConfigError(f"data: expected curves, digits, fashion-mnist or idx:DIR, got {name!r}")
    return first(dataset, n_train, n_test)
