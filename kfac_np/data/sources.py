"""Where files of known data sets may be, and how they are downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfac_np.errors import DataError

__all__ = ["ENVIRONMENT_VARIABLE", "cache", "named_places", "retrieve"]

ENVIRONMENT_VARIABLE = "KFAC_NP_DATA"


def named_places(folder: str) -> list[Path]:
    """List where the environment variable ``KFAC_NP_DATA`` says that a data set may be.

    Parameters
    ----------
    folder : str
        The data set's own folder in the named directory; it comes first.

    Examples
    --------
    >>> all(isinstance(place, Path) for place in named_places("fashion-mnist"))
    True
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return [Path(named) / folder, Path(named)] if named else []


def cache(name: str) -> Path:
    """Return the directory into which a data set is downloaded unless another one is given.

    Raises
    ------
    DataError
        pooch is not installed.

    Examples
    --------
    >>> cache("cifar10").name
    'cifar10'
    """
    return Path(_pooch(name).os_cache("kfac_np")) / name


def retrieve(
    name: str,
    url: str,
    sha256: str,
    directory: Path,
    processor: Callable[[Any], Any] | None = None,
) -> None:
    """Download a file with pooch and compare its checksum; keep it if it is there and right.

    Parameters
    ----------
    name : str
        Of the data set, for messages.
    url, sha256 : str
    directory : Path
    processor : callable, optional
        pooch -> what is to be done with the file, as ``lambda pooch: pooch.Untar()``.

    Raises
    ------
    DataError
        pooch is not installed, the host cannot be reached, or the checksum differs.

    Examples
    --------
    >>> retrieve("toys", "http://localhost:9/toys.gz", "0" * 64, Path("/dev/null/no"))
    Traceback (most recent call last):
    kfac_np.errors.DataError: toys: could not download http://localhost:9/toys.gz to ...
    """
    pooch = _pooch(name)
    file_name = url.rpartition("/")[2]
    steps = None if processor is None else processor(pooch)
    try:
        pooch.retrieve(url, f"sha256:{sha256}", fname=file_name, path=directory, processor=steps)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise DataError(
            f"{name}: could not download {url} to {directory}: {' '.join(str(error).split())}"
        ) from error


def _pooch(name: str) -> Any:
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise DataError(f"{name}: downloading needs pooch: pip install pooch") from error
    return pooch
