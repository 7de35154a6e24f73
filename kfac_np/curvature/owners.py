"""Whose moments these are: curvatures must not be given each other's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kfac_np.backend import Array
from kfac_np.errors import CurvatureError

__all__ = ["require_own"]

# A name among moments that gives away who estimated them; the first that is found counts.
_MAKERS = {
    "matrix": "FullMatrix",
    "S": "EKFAC",
    "A_next": "BlockTridiagonal",
    "A_later": "FullKronecker",
    "diagonal": "DiagonalBlock",
    "block": "ExactBlock",
    "G": "KFACBlock",
    "units": "UnitBlock",
}


def require_own(
    who: object,
    moments: Mapping[str, Mapping[str, Array]],
    owns: Callable[[str, Mapping[str, Array]], bool],
) -> None:
    """Raise `CurvatureError` for moments that another curvature estimated, naming both.

    Parameters
    ----------
    who : object
        The curvature that got them.
    moments : mapping of path to moments
    owns : callable
        (path, its moments) → whether they are such as `who` makes.

    Examples
    --------
    >>> require_own("DiagonalBlock()", {"0": {"A": 1, "G": 1}}, lambda path, m: "diagonal" in m)
    Traceback (most recent call last):
    kfac_np.errors.CurvatureError: layer 0: DiagonalBlock() expected moments of its own, got those \
of KFACBlock (A, G); estimate them with the curvature that uses them
    """
    for path, m in moments.items():
        if not owns(path, m):
            names = {name for each in moments.values() for name in each}
            found = next((maker for name, maker in _MAKERS.items() if name in names), "another")
            raise CurvatureError(
                f"layer {path}: {who} expected moments of its own, got those of {found} "
                f"({', '.join(m)}); estimate them with the curvature that uses them"
            )
