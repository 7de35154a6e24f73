"""Data sets by name."""

from __future__ import annotations

import os

from kfac_np.data.cifar import cifar_dataset
from kfac_np.data.cifar_sets import cifar10, cifar100
from kfac_np.data.curve_images import curves
from kfac_np.data.dataset import Dataset, first
from kfac_np.data.fashion import fashion_mnist
from kfac_np.data.idx import idx_dataset
from kfac_np.data.optdigits import digits
from kfac_np.errors import ConfigError
from kfac_np.validation import did_you_mean, listed

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
    name : {"curves", "digits", "fashion-mnist", "cifar10", "cifar100", "cifar:DIR", "idx:DIR"}
        ``cifar:DIR`` is a directory in CIFAR's binary format (see `cifar_dataset`), ``idx:DIR`` one
        with MNIST's four files (see `idx_dataset`).
    directory : path, optional
        Where the files of Fashion-MNIST, CIFAR-10 or CIFAR-100 are, and of ``cifar``, which is
        then the same as ``cifar:DIR``; no other data set takes one.
    download : bool
        Whether Fashion-MNIST, CIFAR-10 and CIFAR-100 may be downloaded; ignored by the others,
        which never need it.
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
    kfac_np.errors.ConfigError: data: expected curves, digits, fashion-mnist, cifar10, ...
    """
    if name == "cifar" and directory is not None:
        name, directory = f"cifar:{directory}", None
    if directory is not None and name not in ("fashion-mnist", "cifar10", "cifar100"):
        raise ConfigError(
            "data: expected a directory with fashion-mnist, cifar10, cifar100 or cifar only, got "
            f"it with {name!r}"
        )
    if name == "curves":
        asked = {"n_train": n_train, "n_test": n_test}
        return curves(**{key: count for key, count in asked.items() if count is not None})
    if name == "digits":
        dataset = digits()
    elif name == "fashion-mnist":
        dataset = fashion_mnist(directory, download)
    elif name == "cifar10":
        dataset = cifar10(directory, download)
    elif name == "cifar100":
        dataset = cifar100(directory, download)
    elif name.startswith("cifar:") and name != "cifar:":
        dataset = cifar_dataset(name.removeprefix("cifar:"))
    elif name.startswith("idx:") and name != "idx:":
        dataset = idx_dataset(name.removeprefix("idx:"))
    else:
        known = ["curves", "digits", "fashion-mnist", "cifar10", "cifar100", "cifar:DIR", "idx:DIR"]
        raise ConfigError(
            f"data: expected {listed(known)}, got {name!r}{did_you_mean(name, known)}"
        )
    return first(dataset, n_train, n_test)
