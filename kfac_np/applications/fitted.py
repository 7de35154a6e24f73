"""A curvature that was estimated on a whole data set: what every application starts from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, all_finite
from kfac_np.curvature import BlockDiagonal, Curvature
from kfac_np.curvature.base import Moments
from kfac_np.errors import CheckpointError, CurvatureError, InputError, ShapeError
from kfac_np.layers import Layer
from kfac_np.matrices import TreeMatrix
from kfac_np.training import checkpoint
from kfac_np.trees import Tree
from kfac_np.validation import listed, require_instance

__all__ = ["FittedCurvature", "merge"]

_KIND = "fitted curvature"
_PLAIN = ("fisher", "paths", "input_names", "terms", "weight", "examples", "loss", "outputs")


@final
@dataclass(frozen=True, eq=False)
class FittedCurvature:
    """C ≈ (1/M) Σ_n J_nᵀ B_n J_n at θ, the mean over the M loss terms of a data set.

    Made by `fit_curvature`. Whatever belongs to one parameter is found by its path ("0", "2.1"):
    moments, blocks of `matrix`, solutions. The curvature of the *sum* of the losses, which a
    posterior or the influence of an example on a sum needs, is `terms` · `matrix`.

    Attributes
    ----------
    curvature : Curvature
        The approximation: a block for each layer, EKFAC, ...
    fisher : str
        The Fisher type, as it is printed: "Exact()", "MonteCarlo(samples=1)", "Empirical()".
    params : tree of Array
        θ, all parameters of the network.
    paths : tuple of str
        Those of the parameters that have curvature, in the order of the network.
    moments : dict
        Path to named moments, in double precision.
    input_names : tuple of str
        Those of them that are means over inputs: over `weight`, all others over `terms`.
    terms : int
        M: examples times positions with a target of their own.
    weight : float
        Σ w over the terms; M without weights.
    examples : int
        N.
    loss : float
        Σ_n w_n ℓ_n at θ, the sum over the terms (not the mean).
    outputs : int
        C, of each term.

    Examples
    --------
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> backend = get_backend("numpy", "float64")
    >>> objective = Objective(Sequential(Dense(2, 3), Tanh(), Dense(3, 1)), SquaredError())
    >>> params, x = objective.network.init(Rng(0), backend), Rng(1).normal((20, 2), backend)
    >>> fit = fit_curvature(objective, params, [(x, x[:, :1])])
    >>> fit.paths, fit.examples, fit.matrix.to_dense().shape
    (('0', '2'), 20, (13, 13))
    """

    curvature: Curvature
    fisher: str
    params: Tree
    paths: tuple[str, ...]
    moments: dict[str, Moments]
    input_names: tuple[str, ...]
    terms: int
    weight: float
    examples: int
    loss: float
    outputs: int

    def __repr__(self) -> str:
        return (
            f"FittedCurvature({self.curvature!r}, {self.fisher}, {self.examples} examples, "
            f"parameters {', '.join(self.paths)})"
        )

    @cached_property
    def operand(self) -> dict[str, Array]:
        """The parameters that have curvature, by path: what `matrix` acts on is like this."""
        found = dict(trees.items(self.params))
        return {path: found[path] for path in self.paths}

    @cached_property
    def matrix(self) -> TreeMatrix:
        """C, the mean over the terms, acting on dicts {path: array} like `operand`; undamped."""
        return self.curvature.matrix(self.moments, self.operand)

    def insert(self, operand: Mapping[str, Array]) -> Tree:
        """All parameters of the network, those of `operand` in the place of their own.

        Raises
        ------
        ShapeError
            `operand` has other paths or shapes than `FittedCurvature.operand`.
        """
        self.require_operand(operand)
        return trees.map_named(operand.get, self.params)

    def extract(self, tree: Tree) -> dict[str, Array]:
        """Of a tree like the network's parameters those leaves that have curvature, by path."""
        found = dict(trees.items(tree))
        if missing := [path for path in self.paths if path not in found]:
            raise ShapeError(f"tree: expected a leaf at {listed(missing)}, got {', '.join(found)}")
        return {path: found[path] for path in self.paths}

    def require_operand(self, operand: Mapping[str, Array], what: str = "operand") -> None:
        """Raise `ShapeError` unless `operand` has the paths and shapes of `operand`."""
        require_instance(what, operand, Mapping)
        expected, found = _shapes(self.operand), _shapes(operand)
        if found != expected:
            raise ShapeError(f"{what}: expected shapes {expected}, got {found}")

    def require_network(self, network: Layer, what: str) -> None:
        """Raise `InputError` unless the fit is of this network, as far as shapes tell."""
        own = network.init(Rng(0), Backend.of(trees.leaves(self.params)[0]))
        expected, found = (_shapes(dict(trees.items(tree))) for tree in (own, self.params))
        if expected != found:
            raise InputError(
                f"{what}: expected one of {network!r}, with parameters {expected}, got one with "
                f"parameters {found}"
            )

    def select(self, paths: Iterable[str]) -> FittedCurvature:
        """The curvature of some parameters only, those of the last layer for example.

        Parameters
        ----------
        paths : iterable of str

        Raises
        ------
        InputError
            A path that has no curvature here, or none at all.
        CurvatureError
            Layers are coupled (`FullMatrix`, `BlockTridiagonal`): fit those parameters alone.
        """
        kept = chosen_paths(paths, self.paths)
        if not self.curvature.separable:
            raise CurvatureError(
                f"select: {self.curvature!r} couples parameters, so that a part of it is none of "
                "its kind; expected a block-diagonal curvature, or fit_curvature(..., paths=...)"
            )
        return replace(self, paths=kept, moments={path: self.moments[path] for path in kept})

    # ---------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the settings of `curvature` to a checkpoint, in one piece."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        metadata = {"kind": _KIND, "curvature": repr(self.curvature), **plain}
        checkpoint.save(path, {"params": self.params, "moments": self.moments}, metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        curvature: Curvature | None = None,
        backend: Backend | None = None,
    ) -> FittedCurvature:
        """Read what `save` wrote; the data are not needed.

        Parameters
        ----------
        path : path
        curvature : Curvature, optional
            With the settings that were used to fit; `BlockDiagonal()` when omitted.
        backend : Backend, optional
            Where to put the arrays; NumPy's when omitted.

        Raises
        ------
        CheckpointError
            The file is none of `save`, or damaged, or of another curvature.
        """
        curvature = BlockDiagonal() if curvature is None else curvature
        require_instance("load: curvature", curvature, Curvature)
        require_instance("load: backend", backend, Backend, optional=True)
        tree, metadata = checkpoint.load(path, backend)
        if metadata.get("kind") != _KIND:
            raise CheckpointError(f"{path}: expected a fitted curvature, got another checkpoint")
        if metadata.get("curvature") != repr(curvature):
            raise CheckpointError(
                f"{path}: expected moments of {curvature!r}, got those of "
                f"{metadata.get('curvature')}; give that one as `curvature`"
            )
        if missing := [name for name in _PLAIN if name not in metadata]:
            raise CheckpointError(
                f"{path}: expected {listed(missing)} in it; it is of another version, fit again"
            )
        fit = cls(curvature=curvature, **tree, **{name: metadata[name] for name in _PLAIN})
        return require_sound(fit, f"{path}")


def chosen_paths(paths: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Some of the known paths, in their order; `InputError` for others, or none."""
    wanted = (paths,) if isinstance(paths, str) else tuple(paths)
    if not wanted or any(path not in known for path in wanted):
        came = ", ".join(map(repr, wanted)) or "none"
        raise InputError(f"paths: expected some of {listed(map(repr, known))}, got {came}")
    return tuple(path for path in known if path in wanted)


def require_sound(fit: FittedCurvature, place: str) -> FittedCurvature:
    """The fit itself, or `InputError`: moments that are not finite, or of another curvature."""
    for path, m in fit.moments.items():
        for name, x in m.items():
            if not all_finite(x):
                raise InputError(f"{place}: layer {path}: {name} is not finite")
    fit.curvature.require_own(fit.moments)
    return fit


def merge(*fits: FittedCurvature, params: Tree | None = None) -> FittedCurvature:
    """The curvature of several data sets together: moments are averaged by their terms.

    Fits at the same parameters give what a fit to all the data would have given. At different ones
    (tasks that were learned one after the other) the sum is an approximation of its own, and
    `params` says at which point it stands. Kronecker factors are averaged, not their products.

    Parameters
    ----------
    *fits : FittedCurvature
        One or more, of one curvature, Fisher type and network.
    params : tree of Array, optional
        θ of the result; needed where the fits have different ones.

    Returns
    -------
    FittedCurvature
        `terms`, `examples` and `loss` are sums.

    Raises
    ------
    InputError
        No fits; fits of different kinds; different parameters and no `params`.
    CurvatureError
        `EKFAC`: eigenvalues that were measured in different bases have no sum.

    Examples
    --------
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> backend = get_backend("numpy", "float64")
    >>> objective, x = Objective(Dense(2, 1), SquaredError()), Rng(1).normal((9, 2), backend)
    >>> params = objective.network.init(Rng(0), backend)
    >>> parts = [fit_curvature(objective, params, [(y, y[:, :1])]) for y in (x[:4], x[4:])]
    >>> merge(*parts).examples
    9
    """
    if not fits:
        raise InputError("merge: expected at least one fit, got none")
    for fit in fits:
        require_instance("merge", fit, FittedCurvature)
    first = fits[0]
    for number, fit in enumerate(fits[1:], 2):
        _require_alike(first, fit, number)
    if len(fits) > 1 and not first.curvature.additive:
        raise CurvatureError(
            f"merge: {first.curvature!r} measures in a basis of each fit's own, so that sums mean "
            "nothing; fit it to all the data, or merge fits of BlockDiagonal()"
        )
    if params is None:
        if not all(_equal(first.params, fit.params) for fit in fits[1:]):
            raise InputError(
                "merge: the fits have different parameters; give those of the result as `params`"
            )
        params = first.params
    else:
        trees.map_named(_require_same_shape, first.params, params)
    terms, weight = sum(fit.terms for fit in fits), math.fsum(fit.weight for fit in fits)

    def share(fit: FittedCurvature) -> dict[str, Moments]:
        def of(name: str) -> float:
            return fit.weight / weight if name in first.input_names else fit.terms / terms

        return {
            path: {name: of(name) * x for name, x in m.items()} for path, m in fit.moments.items()
        }

    total = share(first)
    for fit in fits[1:]:
        total = trees.axpy(1.0, share(fit), total)
    return replace(
        first,
        params=params,
        moments=total,
        terms=terms,
        weight=weight,
        examples=sum(fit.examples for fit in fits),
        loss=math.fsum(fit.loss for fit in fits),
    )


def _require_alike(first: FittedCurvature, other: FittedCurvature, number: int) -> None:
    pairs: list[tuple[str, Any, Any]] = [
        ("curvature", repr(first.curvature), repr(other.curvature)),
        ("Fisher type", first.fisher, other.fisher),
        ("parameters", _shapes(first.operand), _shapes(other.operand)),
    ]
    for what, expected, found in pairs:
        if expected != found:
            raise InputError(f"merge: fit {number}: expected {what} {expected}, got {found}")


def _shapes(operand: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(p.shape) for path, p in operand.items()}


def _require_same_shape(path: str, p: Array, q: Array) -> None:
    if tuple(p.shape) != tuple(q.shape):
        raise ShapeError(f"params {path}: expected {tuple(p.shape)}, got {tuple(q.shape)}")


def _equal(one: Tree, other: Tree) -> bool:
    return float(trees.squared_norm(trees.axpy(-1.0, one, other))) == 0.0
