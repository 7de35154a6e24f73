"""Quadratic terms that are added to a loss: what pulls parameters towards where they should be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from kfac_np import trees
from kfac_np.backend import (
    Array,
    Scalar,
    array_namespace,
    require_array,
    require_same_place,
    scalar,
)
from kfac_np.errors import InputError, ShapeError
from kfac_np.matrices import TreeMatrix
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_instance, require_positive

__all__ = ["L2", "Anchor", "Penalty", "Quadratic", "Sum", "Zeros", "penalized"]


class Penalty(ABC):
    """R(θ), quadratic: an optimiser minimises h(θ) = L(θ) + R(θ).

    A subclass gives value, gradient and the product with its constant Hessian. One that holds
    parameters to a subspace gives the projection onto it, too.

    Examples
    --------
    >>> import numpy as np
    >>> R = L2(0.5)
    >>> float(R.value((np.ones(4),))), R.gradient((np.ones(1),)), R.product((np.ones(1),))
    (1.0, (array([0.5]),), (array([0.5]),))
    """

    @abstractmethod
    def value(self, params: Tree) -> Scalar:
        """R(θ) (0-d array)."""

    @abstractmethod
    def gradient(self, params: Tree) -> Tree:
        """∇R(θ), in the structure of the parameters."""

    @abstractmethod
    def product(self, v: Tree) -> Tree:
        """∇²R v, for v in the structure of the parameters."""

    def form(self, u: Tree, v: Tree) -> Scalar:
        """uᵀ ∇²R v (0-d array)."""
        return scalar(trees.inner(u, self.product(v)))

    def block_form(self, path: str, v: Tree) -> Scalar:
        """v_iᵀ [∇²R]_ii v_i of the parameter at a path."""

        def leaf(place: str, x: Array) -> Array:
            return x if place == path else array_namespace(x).zeros_like(x)

        alone = trees.map_named(leaf, v)
        return self.form(alone, alone)

    def add_gradient(self, params: Tree, gradient: Tree) -> Tree:
        """∇L + ∇R, given ∇L; projected."""
        return self.project(trees.axpy(1.0, self.gradient(params), gradient))

    def project(self, v: Tree) -> Tree:
        """The part of an update that is allowed: all of it, unless a subclass says otherwise."""
        return v

    def require_params(self, params: Tree) -> None:
        """Raise `InputError` unless training may begin at these parameters."""
        return


@final
@dataclass(frozen=True)
class L2(Penalty):
    """(η/2) ‖θ‖².

    Parameters
    ----------
    strength : float
        η.

    Examples
    --------
    >>> import numpy as np
    >>> float(L2(2.0).value((np.asarray([3.0]),)))
    9.0
    """

    strength: float

    def __post_init__(self) -> None:
        plain_fields(self)
        require_positive("L2 strength", self.strength, zero=True)

    def value(self, params: Tree) -> Scalar:
        return 0.5 * self.strength * scalar(trees.squared_norm(params))

    def gradient(self, params: Tree) -> Tree:
        return trees.scale(self.strength, params)

    def product(self, v: Tree) -> Tree:
        return trees.scale(self.strength, v)

    def form(self, u: Tree, v: Tree) -> Scalar:
        return self.strength * scalar(trees.inner(u, v))

    def block_form(self, path: str, v: Tree) -> Scalar:
        return self.strength * scalar(trees.squared_norm(dict(trees.items(v))[path]))

    def add_gradient(self, params: Tree, gradient: Tree) -> Tree:
        return trees.axpy(self.strength, params, gradient)


@final
@dataclass(frozen=True, eq=False)
class Zeros(Penalty):
    """0 where some weights are zero, infinite elsewhere: training keeps them at zero.

    What optimisers move is projected: the gradient, and with it all of SGD's and Adam's updates;
    K-FAC's proposal -P F̂⁻¹ P ∇h, before the quadratic model chooses a step along it.

    Parameters
    ----------
    masks : mapping of path to Array of bool
        Which weights may move. Parameters without a mask all may.

    Examples
    --------
    >>> import numpy as np
    >>> Zeros({"0": np.asarray([True, False])}).project((np.ones(2), np.ones(2)))
    (array([1., 0.]), array([1., 1.]))
    """

    masks: Mapping[str, Array]

    def __post_init__(self) -> None:
        require_instance("Zeros masks", self.masks, Mapping)
        for path, mask in self.masks.items():
            require_array(f"Zeros mask {path}", mask)
            if not array_namespace(mask).isdtype(mask.dtype, "bool"):
                raise InputError(f"Zeros mask {path}: expected dtype bool, got {mask.dtype}")

    def value(self, params: Tree) -> Scalar:
        return scalar(0.0, trees.leaves(params)[0])

    def gradient(self, params: Tree) -> Tree:
        return trees.zeros_like(params)

    def product(self, v: Tree) -> Tree:
        return trees.zeros_like(v)

    def form(self, u: Tree, v: Tree) -> Scalar:
        return scalar(0.0, trees.leaves(v)[0])

    def add_gradient(self, params: Tree, gradient: Tree) -> Tree:
        return self.project(gradient)

    def project(self, v: Tree) -> Tree:
        def leaf(path: str, x: Array) -> Array:
            mask, xp = self.masks.get(path), array_namespace(x)
            return x if mask is None else xp.where(mask, x, xp.zeros_like(x))

        return trees.map_named(leaf, v)

    def require_params(self, params: Tree) -> None:
        found = dict(trees.items(params))
        for path, mask in self.masks.items():
            _require_alike("Zeros", path, mask, found)
            xp = array_namespace(mask)
            if bool(xp.any((found[path] != 0.0) & ~mask)):
                raise InputError(
                    f"Zeros: parameter {path}: expected zeros where the mask is False, got others"
                )


@final
@dataclass(frozen=True, eq=False)
class Sum(Penalty):
    """R₁(θ) + R₂(θ) + ...

    Parameters
    ----------
    parts : tuple of Penalty

    Examples
    --------
    >>> import numpy as np
    >>> float(Sum((L2(1.0), L2(3.0))).value((np.ones(1),)))
    2.0
    """

    parts: tuple[Penalty, ...]

    def __post_init__(self) -> None:
        plain_fields(self)
        if not isinstance(self.parts, tuple) or not self.parts:
            raise InputError(f"Sum: expected a tuple of penalties, got {self.parts!r}")
        for part in self.parts:
            require_instance("Sum", part, Penalty)

    def value(self, params: Tree) -> Scalar:
        first, *others = (part.value(params) for part in self.parts)
        return sum(others, first)

    def gradient(self, params: Tree) -> Tree:
        first, *others = (part.gradient(params) for part in self.parts)
        return trees.tree_map(lambda *x: sum(x[1:], x[0]), first, *others)

    def product(self, v: Tree) -> Tree:
        first, *others = (part.product(v) for part in self.parts)
        return trees.tree_map(lambda *x: sum(x[1:], x[0]), first, *others)

    def project(self, v: Tree) -> Tree:
        for part in self.parts:
            v = part.project(v)
        return v

    def require_params(self, params: Tree) -> None:
        for part in self.parts:
            part.require_params(params)


def penalized(l2: float, penalty: Penalty | None) -> Penalty | None:
    """(η/2)‖θ‖² and a penalty, if any, as one.

    Examples
    --------
    >>> penalized(0.0, None), penalized(0.5, None)
    (None, L2(strength=0.5))
    """
    if not l2:
        return penalty
    return L2(l2) if penalty is None else Sum((L2(l2), penalty))


@final
@dataclass(frozen=True, eq=False)
class Anchor:
    """(λ/2) (θ - c)ᵀ C (θ - c), of parameters by path.

    Attributes
    ----------
    strength : float
        λ.
    matrix : TreeMatrix or None
        C, acting on dicts like `center`; the identity if None.
    center : dict of path to Array
        c. Parameters that are not in it are free.

    Examples
    --------
    >>> import numpy as np
    >>> Anchor(2.0, None, {"0": np.ones(1)}).strength
    2.0
    """

    strength: float
    matrix: TreeMatrix | None
    center: Mapping[str, Array]

    def product(self, v: Mapping[str, Array]) -> Tree:
        """λ C v."""
        moved = dict(v) if self.matrix is None else self.matrix.matvec(dict(v))
        return trees.scale(self.strength, moved)


@final
@dataclass(frozen=True, eq=False)
class Quadratic(Penalty):
    """Σ_i (λ_i/2) (θ - c_i)ᵀ C_i (θ - c_i), exactly as the matrices C_i have it.

    Parameters
    ----------
    anchors : tuple of Anchor

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import BlockDiagonalMatrix, DiagonalMatrix
    >>> C = BlockDiagonalMatrix({"0": DiagonalMatrix(np.asarray([1.0, 3.0]))})
    >>> R = Quadratic((Anchor(2.0, C, {"0": np.zeros(2)}),))
    >>> float(R.value((np.ones(2),))), R.gradient((np.ones(2),))
    (4.0, (array([2., 6.]),))
    """

    anchors: tuple[Anchor, ...]

    def __post_init__(self) -> None:
        if not self.anchors:
            raise InputError("Quadratic anchors: expected at least one, got none")
        for anchor in self.anchors:
            require_positive("Quadratic strength", anchor.strength, zero=True)

    def value(self, params: Tree) -> Scalar:
        first, *others = (self._term(anchor, params) for anchor in self.anchors)
        return sum(others, first)

    def gradient(self, params: Tree) -> Tree:
        return self._sum(params, lambda anchor: _away(anchor, params))

    def product(self, v: Tree) -> Tree:
        return self._sum(v, lambda anchor: _part(anchor, v))

    def require_params(self, params: Tree) -> None:
        found = dict(trees.items(params))
        for anchor in self.anchors:
            for path, center in anchor.center.items():
                _require_alike("Quadratic", path, center, found)

    def _term(self, anchor: Anchor, params: Tree) -> Scalar:
        away = _away(anchor, params)
        return 0.5 * scalar(trees.inner(away, anchor.product(away)))

    def _sum(self, like: Tree, operand: Callable[[Anchor], dict[str, Array]]) -> Tree:
        """Σ λ C v, zero for parameters that are free."""
        total: dict[str, Array] = {}
        for anchor in self.anchors:
            for path, x in anchor.product(operand(anchor)).items():
                total[path] = total[path] + x if path in total else x
        return trees.map_named(
            lambda path, x: total[path] if path in total else array_namespace(x).zeros_like(x),
            like,
        )


def _part(anchor: Anchor, v: Tree) -> dict[str, Array]:
    found = dict(trees.items(v))
    for path, center in anchor.center.items():
        _require_shape("Quadratic", path, center, found)
    return {path: found[path] for path in anchor.center}


def _away(anchor: Anchor, params: Tree) -> dict[str, Array]:
    return {path: x - anchor.center[path] for path, x in _part(anchor, params).items()}


def _require_alike(name: str, path: str, like: Array, found: Mapping[str, Array]) -> None:
    _require_shape(name, path, like, found)
    require_same_place(f"{name}: parameter {path}", like, found[path])


def _require_shape(name: str, path: str, like: Array, found: Mapping[str, Array]) -> None:
    came = tuple(found[path].shape) if path in found else "no such parameter"
    if came != tuple(like.shape):
        raise ShapeError(
            f"{name}: parameter {path}: expected shape {tuple(like.shape)}, got {came}"
        )
