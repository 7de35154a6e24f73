"""Fashion-MNIST: found on the machine, or downloaded when asked to."""

from __future__ import annotations

import os
from pathlib import Path

from kfac_np.data.dataset import Dataset
from kfac_np.data.idx import FILE_NAMES, idx_dataset, missing_files
from kfac_np.data.sources import ENVIRONMENT_VARIABLE, cache, named_places, retrieve
from kfac_np.errors import DataError

__all__ = ["DEBIAN_DIRECTORY", "download_fashion_mnist", "fashion_mnist"]

DEBIAN_DIRECTORY = "/usr/share/datasets/fashion-mnist"

_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# Of the compressed files, FILE.gz. Debian's have the same content, but no name and another date
# in the header of gzip.
_SHA256 = {
    "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
_SOURCE = (
    "H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST (2017), Copyright Zalando SE, MIT licence, "
    "https://github.com/zalandoresearch/fashion-mnist"
)


def fashion_mnist(
    directory: str | os.PathLike[str] | None = None, download: bool = False
) -> Dataset:
    """Load Fashion-MNIST: 60,000 and 10,000 pictures of clothes, 28 × 28 pixels, ten classes.

    The four files are looked for in `directory`, if one is given, and nowhere else; otherwise
    in the directory that the environment variable ``KFAC_NP_DATA`` names (in its part
    ``fashion-mnist`` first, then in itself), then where Debian's package dataset-fashion-mnist
    puts them. If they are in none of these, they are downloaded, but only when asked to.

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
        The files are absent (the message says where they were looked for and the three ways to
        provide them) or damaged, or the download failed.

    References
    ----------
    H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking
    Machine Learning Algorithms, arXiv:1708.07747.

    Examples
    --------
    >>> fashion_mnist("/nowhere")
    Traceback (most recent call last):
    kfac_np.errors.DataError: fashion-mnist: expected ... looked in /nowhere ...
    """
    places = [Path(directory)] if directory is not None else _places()
    found = next((place for place in places if not missing_files(place)), None)
    if found is None and download:
        found = download_fashion_mnist(directory)
    if found is None:
        raise DataError(_absent(places))
    return idx_dataset(found, "fashion-mnist", _SOURCE)


def download_fashion_mnist(directory: str | os.PathLike[str] | None = None) -> Path:
    """Download Fashion-MNIST's four files (30 MB) with pooch, and compare their checksums.

    Files that are there already and are right are kept.

    Parameters
    ----------
    directory : path, optional
        By default ``fashion-mnist`` in pooch's cache directory for ``kfac_np``.

    Returns
    -------
    Path
        Where they are.

    Raises
    ------
    DataError
        pooch is not installed, the host cannot be reached, or a checksum differs.

    Examples
    --------
    >>> download_fashion_mnist("/dev/null/cannot/be/made")
    Traceback (most recent call last):
    kfac_np.errors.DataError: fashion-mnist: ...
    """
    directory = Path(directory or cache("fashion-mnist"))
    for file_name, checksum in _SHA256.items():
        retrieve("fashion-mnist", f"{_URL}{file_name}.gz", checksum, directory)
    return directory


def _places() -> list[Path]:
    return [*named_places("fashion-mnist"), Path(DEBIAN_DIRECTORY)]


def _absent(places: list[Path]) -> str:
    looked = ", ".join(f"{place} ({_state(place)})" for place in places)
    return (
        f"fashion-mnist: expected the files {', '.join(FILE_NAMES)} (each plain or with .gz), "
        f"looked in {looked}. Three ways to provide them: "
        f"(1) give the directory that has them, as argument or in the environment variable "
        f"{ENVIRONMENT_VARIABLE}; "
        f"(2) on Debian or Ubuntu, apt-get install dataset-fashion-mnist; "
        f"(3) allow the download (30 MB) with download=True"
    )


def _state(place: Path) -> str:
    if not place.is_dir():
        return "no such directory"
    missing = missing_files(place)
    return "none there" if len(missing) == len(FILE_NAMES) else f"missing: {', '.join(missing)}"
