"""The figures of the K-FAC and KFC papers, drawn again from networks trained on the spot.

`draw` makes one by name: a picture and the numbers behind it. docs/figures.md says what to see.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kfac_np.figures import (
    autocorrelation,
    batch_size,
    damping,
    fisher,
    inverse,
    kfc_training,
    races,
)
from kfac_np.figures.drawing import Drawing, save
from kfac_np.validation import require_one_of

__all__ = ["Drawing", "draw", "figures"]


def figures() -> dict[str, Callable[[bool], Drawing]]:
    """Return the function behind the name of each figure; it is told whether to be quick.

    Examples
    --------
    >>> list(figures())[:3]
    ['fisher', 'inverse', 'damping']
    """
    return {
        "fisher": fisher.draw,
        "inverse": inverse.draw,
        "damping": damping.draw,
        "batch-size": batch_size.draw,
        "curves": races.draw_curves_race,
        "fashion": races.draw_fashion_race,
        "faces": races.draw_faces_race,
        "kfc-autocorrelation": autocorrelation.draw,
        "kfc-training": kfc_training.draw,
    }


def draw(name: str, directory: str | os.PathLike[str], *, quick: bool = False) -> list[Path]:
    """Draw one figure and write it: NAME.png, NAME.csv, and further tables of some.

    Parameters
    ----------
    name : str
    directory : path
        Made if it is not there; older files of the same names are replaced.
    quick : bool
        The same picture of a tiny network, within seconds: to see that all works.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ConfigError
        No figure has that name; matplotlib is missing.
    DataError
        The figure's data are not on this machine.

    Examples
    --------
    >>> draw("fischer", "runs/figures")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: figures: expected fisher, inverse, ..., got 'fischer'; did you ...
    """
    known = figures()
    require_one_of("figures", name, known)
    return save(known[name](quick), directory, name)
