"""CIFAR-10 and CIFAR-100: found on the machine, or downloaded when asked to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfac_np.data.cifar import HUNDRED, TEN, load_layout, other_version
from kfac_np.data.dataset import Dataset
from kfac_np.data.sources import ENVIRONMENT_VARIABLE, cache, named_places, retrieve
from kfac_np.errors import DataError

__all__ = ["cifar10", "cifar100", "download_cifar"]

_URL = "https://www.cs.toronto.edu/~kriz/"
_LAYOUTS = {"cifar10": TEN, "cifar100": HUNDRED}
_FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
_ARCHIVES = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}
# Of the archives. (The page that publishes them gives MD5 sums, which do not keep anybody out.)
_SHA256 = {
    "cifar10": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar100": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
}
_SOURCE = (
    "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009), "
    "https://www.cs.toronto.edu/~kriz/cifar.html"
)


def cifar10(directory: str | os.PathLike[str] | None = None, download: bool = False) -> Dataset:
    """Load CIFAR-10: 50,000 and 10,000 coloured pictures, 32 × 32 pixels, ten classes.

    The files are looked for in `directory`, if one is given, or in its folder
    ``cifar-10-batches-bin``, and nowhere else; otherwise in the directory that the environment
    variable ``KFAC_NP_DATA`` names, in the same two ways. If they are in none of these, they are
    downloaded, but only when asked to.

    Parameters
    ----------
    directory : path, optional
    download : bool
        Whether files that are not there may be downloaded, into `directory` or else into
        pooch's cache directory, where the next call with ``download=True`` finds them.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        The files are absent (the message says where they were looked for) or damaged, or the
        download failed.

    References
    ----------
    A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Examples
    --------
    >>> cifar10("/nowhere")
    Traceback (most recent call last):
    kfac_np.errors.DataError: cifar10: expected the files data_batch_1.bin, ...
    """
    return _published("cifar10", directory, download)


def cifar100(directory: str | os.PathLike[str] | None = None, download: bool = False) -> Dataset:
    """Load CIFAR-100: 50,000 and 10,000 coloured pictures, 32 × 32 pixels, a hundred classes.

    The classes are the fine ones. Files are found like those of `cifar10`, in the folder
    ``cifar-100-binary``.

    Parameters
    ----------
    directory : path, optional
    download : bool

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        As `cifar10`.

    Examples
    --------
    >>> cifar100("/nowhere")
    Traceback (most recent call last):
    kfac_np.errors.DataError: cifar100: expected the files train.bin, test.bin, looked in ...
    """
    return _published("cifar100", directory, download)


def download_cifar(name: str, directory: str | os.PathLike[str] | None = None) -> Path:
    """Download CIFAR-10 or CIFAR-100 (170 MB) with pooch, compare the checksum, and unpack it.

    Parameters
    ----------
    name : {"cifar10", "cifar100"}
    directory : path, optional
        By default `name` in pooch's cache directory for ``kfac_np``.

    Returns
    -------
    Path
        Where the files are: a folder in the directory. The archive stays beside it.

    Raises
    ------
    DataError
        pooch is not installed, the host cannot be reached, or the checksum differs.

    Examples
    --------
    >>> download_cifar("cifar10", "/dev/null/cannot/be/made")
    Traceback (most recent call last):
    kfac_np.errors.DataError: cifar10: ...
    """
    directory = Path(directory or cache(name))

    def unpack(pooch: Any) -> Any:
        return pooch.Untar(members=[_FOLDERS[name]], extract_dir=".")

    retrieve(name, _URL + _ARCHIVES[name], _SHA256[name], directory, unpack)
    return directory / _FOLDERS[name]


def _published(name: str, directory: str | os.PathLike[str] | None, download: bool) -> Dataset:
    layout, folder = _LAYOUTS[name], _FOLDERS[name]
    if directory is not None:
        places = [Path(directory), Path(directory) / folder]
    else:
        places = named_places(folder)
    files = (*layout.batches, layout.test)
    found = next((p for p in places if all((p / n).is_file() for n in files)), None)
    if found is None and download:
        found = download_cifar(name, directory)
    if found is None:
        looked = ", ".join(f"{p} ({_state(p, files)})" for p in places)
        looked = looked or f"no place ({ENVIRONMENT_VARIABLE} names none)"
        raise DataError(
            f"{name}: expected the files {', '.join(files)}, looked in {looked}. "
            f"Two ways to provide them: (1) give the directory that has them, as argument or in "
            f"the environment variable {ENVIRONMENT_VARIABLE}; "
            f"(2) allow the download (170 MB) with download=True"
        )
    return load_layout(found, layout, [found / n for n in layout.batches], name, _SOURCE)


def _state(place: Path, files: Sequence[str]) -> str:
    if not place.is_dir():
        return "no such directory"
    missing = [name for name in files if not (place / name).is_file()]
    state = "none there" if len(missing) == len(files) else f"missing: {', '.join(missing)}"
    return state + other_version(place)
