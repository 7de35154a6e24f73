"""What the checkers share: running laws, comparing trees, arrays that notice writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kfac_np import trees
from kfac_np.backend import (
    Array,
    Backend,
    DeferredChecks,
    Rng,
    array_namespace,
    require_finite,
)
from kfac_np.errors import InputError
from kfac_np.losses import Loss
from kfac_np.trees import Tree

__all__ = [
    "EXACT",
    "FINITE_DIFFERENCE",
    "SINGLE",
    "STEP",
    "check_targets",
    "copy",
    "is_array",
    "random_like",
    "require",
    "require_close",
    "require_double",
    "require_same_arrays",
    "run_laws",
    "shapes",
    "single",
    "without_writing",
]

EXACT = 1e-12
"""For two ways to one number in double precision: some thousand roundings of 1.1e-16 each."""
STEP = 1e-5
FINITE_DIFFERENCE = 1e-8
"""For central differences: with the step h = 1e-5 the truncation h² f‴/6 is about 2e-11 f‴ and the
rounding eps/h about 2e-11 f, which leaves room for derivatives and sums of some hundreds."""
SINGLE = 1e-4
"""For single against double precision: about a thousand roundings of 6e-8 each."""


def check_targets(loss: Loss, z: Array, t: Array) -> None:
    """`Loss.check`, waited for."""
    checks = DeferredChecks()
    loss.check(z, t, checks)
    checks.wait()


def run_laws(
    subject: object,
    laws: Mapping[str, Callable[[Any], None]],
    wanted: Iterable[str] | None,
    argument: object,
) -> None:
    """Try the laws one after another, and say of the first that is broken which one it is."""
    names = tuple(laws if wanted is None else wanted)
    if unknown := [name for name in names if name not in laws]:
        raise InputError(f"laws: expected some of {', '.join(laws)}; got {', '.join(unknown)}")
    for name in names:
        summary = (laws[name].__doc__ or name).partition("\n")[0].rstrip(".")
        try:
            laws[name](argument)
        except AssertionError as error:
            raise AssertionError(
                f"{subject!r} breaks the law {name!r} ({summary}): {error}"
            ) from None


def require(ok: bool, message: str) -> None:
    """Raise `AssertionError` unless `ok`; unlike the statement it works under ``python -O``."""
    if not ok:
        raise AssertionError(message)


def is_array(leaf: object) -> bool:
    """Tell whether a leaf of a cache is an array: caches may hold anything."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def copy(x: Any) -> Any:
    """A copy that raises when it is written to, where the library can do that (NumPy)."""
    if not is_array(x):
        return x
    y = array_namespace(x).asarray(x, copy=True)
    if hasattr(y, "setflags"):
        y.setflags(write=False)
    return y


def without_writing(call: Callable[..., Any], what: str, *arguments: Tree) -> Any:
    """Call with read-only copies of trees of arrays; complain if they were written to."""
    before = [trees.tree_map(copy, a) for a in arguments]
    given = [trees.tree_map(copy, a) for a in arguments]
    try:
        result = call(*given)
    except ValueError as error:
        require("read-only" not in str(error), f"{what} writes to one of its arguments: {error}")
        raise
    for old, new in zip(before, given, strict=True):
        require_same_arrays(f"{what}: an argument before", old, "after", new)
    return result


def random_like(rng: Rng, tree: Tree) -> Tree:
    """Standard normal numbers in the shape of a tree of arrays."""
    return trees.map_named(lambda path, x: rng.child(path).normal(x.shape, Backend.of(x)), tree)


def single(tree: Tree) -> Tree:
    """The floating arrays of a tree in single precision."""

    def leaf(x: Array) -> Array:
        xp = array_namespace(x)
        return xp.astype(x, xp.float32) if xp.isdtype(x.dtype, "real floating") else x

    return trees.tree_map(leaf, tree)


def shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Path and shape of every array."""
    return {path: tuple(leaf.shape) for path, leaf in trees.items(tree) if is_array(leaf)}


def require_close(
    name: str, x: Tree, other: str, y: Tree, tolerance: float, scale: float = 0.0
) -> None:
    """Compare two trees, relative to the largest entry of both, or to `scale` if larger."""
    require(
        shapes(x) == shapes(y), f"{name} has the shapes {shapes(x)}, but {other} has {shapes(y)}"
    )
    pairs = list(zip(trees.items(x), trees.leaves(y), strict=True))
    pairs = [((p, a), b) for (p, a), b in pairs if is_array(a) and math.prod(a.shape)]
    largest = max([scale, *(_largest(a) for (_, a), _ in pairs), *(_largest(b) for _, b in pairs)])
    for (path, a), b in pairs:
        difference = _largest(a - b)
        require(
            difference <= tolerance * largest,
            f"{name} and {other} differ by {difference:.3g}"
            + (f" at {path}" if path else "")
            + f", where the largest number is {largest:.3g} "
            f"(allowed: {tolerance:g} of it)",
        )


def _largest(x: Array) -> float:
    xp = array_namespace(x)
    return float(xp.max(xp.abs(xp.astype(x, xp.float64))))


def require_same_arrays(name: str, x: Tree, other: str, y: Tree) -> None:
    """Require two trees to be equal bit for bit."""
    require(
        shapes(x) == shapes(y), f"{name} has the shapes {shapes(x)}, but {other} has {shapes(y)}"
    )
    for (path, a), b in zip(trees.items(x), trees.leaves(y), strict=True):
        same = bool(array_namespace(a).all(a == b)) if is_array(a) else a == b
        require(same, f"{name} and {other} differ" + (f" at {path}" if path else ""))


def require_double(**given: Tree) -> None:
    """Laws are checked in double precision: finite differences mean nothing in single."""
    for name, tree in given.items():
        for path, x in trees.items(tree):
            place = f"{name}.{path}" if path else name
            if not is_array(x):
                raise InputError(f"{place}: expected an array, got {type(x).__name__}")
            xp = array_namespace(x)
            if xp.isdtype(x.dtype, "real floating"):
                if x.dtype != xp.float64:
                    raise InputError(f"{place}: expected dtype float64, got {x.dtype}")
                require_finite(place, x)
