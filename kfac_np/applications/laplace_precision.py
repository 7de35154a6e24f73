"""P = h C + D: a curvature and a prior added exactly, with inverse, determinant and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, array_namespace, require_same_place
from kfac_np.errors import ConfigError, CurvatureError
from kfac_np.matrices import (
    BlockDiagonalMatrix,
    DenseMatrix,
    DiagonalMatrix,
    FlattenedMatrix,
    ScaledMatrix,
    Spectral,
    TreeMatrix,
)
from kfac_np.validation import is_number, listed, require_positive

__all__ = ["Part", "Precision", "Prior", "checked_prior", "single"]

Prior = float | Array
"""δ of one parameter: one number, or one for each entry, in the parameter's shape."""

_MOST_DENSE = 20_000  # parameters: a matrix of them takes 3 GB


@final
@dataclass(frozen=True, eq=False)
class Part:
    """Parameters that are coupled to no others, in units in which their prior is the identity.

    Attributes
    ----------
    like : dict
        The parameters, by path: one, or all of them where the curvature couples layers.
    joint : bool
        Whether `matrix` acts on all of them, flattened one after another.
    matrix : Spectral
        D⁻¹ᐟ² C D⁻¹ᐟ², eigendecomposed.
    prior : dict
        The diagonal of D, by path.
    """

    like: dict[str, Array]
    joint: bool
    matrix: Spectral
    prior: dict[str, Prior]

    def pack(self, v: Mapping[str, Array]) -> Array:
        """What `matrix` acts on, in its precision."""
        xp = array_namespace(self.matrix.values)
        own = {path: xp.astype(v[path], self.matrix.values.dtype) for path in self.like}
        return trees.ravel(own) if self.joint else next(iter(own.values()))

    def unpack(self, v: Array) -> dict[str, Array]:
        """The inverse of `pack`, in the parameters' precision."""
        whole: dict[str, Array] = (
            trees.unravel(v, self.like) if self.joint else dict.fromkeys(self.like, v)
        )
        xp = array_namespace(v)
        return {path: xp.astype(whole[path], p.dtype) for path, p in self.like.items()}

    def units(self, power: float) -> Prior:
        """The diagonal of D to a power: a number where all are the same, or else like `pack`."""
        if (number := single(self.prior)) is not None:
            return number**power
        values = self.matrix.values
        xp = array_namespace(values)
        return (
            self.pack(
                {
                    path: xp.full(p.shape, d, dtype=values.dtype, device=values.device)
                    if isinstance(d, float)
                    else d
                    for (path, p), d in self._pairs()
                }
            )
            ** power
        )

    def log_prior(self) -> float:
        """log det D."""
        total = 0.0
        for (_, p), d in self._pairs():
            if isinstance(d, float):
                total += math.prod(p.shape) * math.log(d)
            else:
                xp = array_namespace(d)
                total += float(xp.sum(xp.log(xp.astype(d, xp.float64))))
        return total

    def _pairs(self) -> list[tuple[tuple[str, Array], Prior]]:
        return [(item, self.prior[item[0]]) for item in self.like.items()]


@final
@dataclass(frozen=True, eq=False)
class Precision:
    """P = h C + D, C a curvature in eigen-form and D the diagonal of a prior.

    With Λ the eigenvalues of D⁻¹ᐟ² C D⁻¹ᐟ², P = D¹ᐟ² U (h Λ + I) Uᵀ D¹ᐟ². Where D is a multiple δ
    of the identity these are the eigenvectors of C and its eigenvalues over δ, and nothing is
    decomposed again. Where the prior differs within what is coupled (entries of a layer, layers of
    a curvature that couples them), the matrix is written out, as large as it is.

    Attributes
    ----------
    parts : tuple of Part
    h : float

    Examples
    --------
    >>> import numpy as np
    >>> C = BlockDiagonalMatrix({"0": DiagonalMatrix(np.asarray([1.0, 3.0]))})
    >>> P = Precision.of(C, {"0": np.zeros(2)}, h=2.0, prior={"0": 4.0})
    >>> P.solve({"0": np.asarray([6.0, 10.0])})
    {'0': array([1., 1.])}
    """

    parts: tuple[Part, ...]
    h: float

    @classmethod
    def of(
        cls,
        curvature: TreeMatrix,
        operand: Mapping[str, Array],
        h: float,
        prior: Mapping[str, Prior],
    ) -> Precision:
        """Put it together; `curvature` is eigendecomposed, as `TreeMatrix.power` gives it.

        Raises
        ------
        CurvatureError
            The matrix has to be written out, and is too large.
        """
        if isinstance(curvature, BlockDiagonalMatrix):
            blocks = dict(trees.items(curvature.blocks))
            parts = [
                Part({path: p}, False, blocks[path].spectral(), {path: prior[path]})
                for path, p in operand.items()
            ]
        else:
            assert isinstance(curvature, FlattenedMatrix), "a power of what couples layers"
            parts = [Part(dict(operand), True, curvature.matrix.spectral(), dict(prior))]
        scaled = [replace(part, matrix=_scaled(part)) for part in parts]
        return cls(tuple(scaled), h)

    # ---------------------------------------------------------------------------------- P itself

    def matvec(self, v: Mapping[str, Array]) -> dict[str, Array]:
        """P v."""
        return self._apply(v, 0.5, lambda grown: grown)

    def solve(self, v: Mapping[str, Array]) -> dict[str, Array]:
        """P⁻¹ v."""
        return self._apply(v, -0.5, lambda grown: 1.0 / grown)

    def _apply(
        self, v: Mapping[str, Array], power: float, function: Callable[[Array], Array]
    ) -> dict[str, Array]:
        out: dict[str, Array] = {}
        for part in self.parts:
            matrix = part.matrix.with_values(function(1.0 + self.h * part.matrix.values))
            units = part.units(power)
            out.update(part.unpack(units * matrix.matvec(units * part.pack(v))))
        return {path: out[path] for path in v}

    def sample(self, rng: Rng) -> dict[str, Array]:
        """Draw from N(0, P⁻¹)."""
        out: dict[str, Array] = {}
        for part in self.parts:
            root = part.matrix.with_values((1.0 + self.h * part.matrix.values) ** -0.5)
            z = rng.normal(part.matrix.operand_shape, Backend.of(part.matrix.values))
            out.update(part.unpack(part.units(-0.5) * root.matvec(z)))
        return out

    @cached_property
    def logdet_ratio(self) -> float:
        """log det P - log det D = Σ log(1 + h λ)."""
        return math.fsum(float(_sum_log1p(self.h * part.matrix.values)) for part in self.parts)

    @cached_property
    def logdet_prior(self) -> float:
        """log det D."""
        return math.fsum(part.log_prior() for part in self.parts)

    # -------------------------------------------------------------------------------- P inverted

    def covariances(self) -> list[tuple[Part, Spectral, Prior]]:
        """Of each part: Σ in eigen-form and d with P⁻¹ = diag(d) Σ diag(d); d is 1 if it can be."""
        found = []
        for part in self.parts:
            values, units = 1.0 / (1.0 + self.h * part.matrix.values), part.units(-0.5)
            if isinstance(units, float):
                values, units = units * units * values, 1.0
            found.append((part, part.matrix.with_values(values), units))
        return found

    def variances(self) -> dict[str, Array]:
        """The diagonal of P⁻¹, by path."""
        out: dict[str, Array] = {}
        for part, sigma, units in self.covariances():
            out.update(part.unpack(units * units * sigma.diagonal()))
        return out

    def covariance(self) -> Array:
        """P⁻¹ itself, parameters in the order of `trees.ravel`, shape (P, P)."""
        dense = []
        for _, sigma, units in self.covariances():
            block, n = sigma.to_dense(), math.prod(sigma.operand_shape)
            if not isinstance(units, float):
                d = array_namespace(block).reshape(units, (n,))
                block = d[:, None] * block * d[None, :]
            dense.append(DenseMatrix(block, (n,)))
        return BlockDiagonalMatrix(tuple(dense)).to_dense()


def checked_prior(
    name: str, given: float | Mapping[str, Prior], operand: Mapping[str, Array]
) -> dict[str, Prior]:
    """The prior precision of each parameter, checked.

    Raises
    ------
    ConfigError
        A number that is not positive, or not one for each parameter.

    Examples
    --------
    >>> import numpy as np
    >>> checked_prior("delta", 2, {"0": np.ones(1), "2": np.ones(1)})
    {'0': 2.0, '2': 2.0}
    """
    if not isinstance(given, Mapping):
        require_positive(name, given)
        return dict.fromkeys(operand, float(given))
    if set(given) != set(operand):
        came = ", ".join(map(str, given)) or "none"
        raise ConfigError(f"{name}: expected one for each of {listed(operand)}, got {came}")
    return {path: _checked(f"{name} {path}", given[path], p) for path, p in operand.items()}


def _checked(name: str, given: Any, p: Array) -> Prior:
    if is_number(given):
        require_positive(name, given)
        return float(given)
    if tuple(getattr(given, "shape", (-1,))) != tuple(p.shape):
        came = f"shape {tuple(given.shape)}" if hasattr(given, "shape") else repr(given)
        raise ConfigError(
            f"{name}: expected a number or an array of shape {tuple(p.shape)}, got {came}"
        )
    require_same_place(name, given, p)
    xp = array_namespace(given)
    if not bool(xp.all((given > 0.0) & xp.isfinite(given))):
        raise ConfigError(f"{name}: expected finite numbers > 0")
    array: Array = given
    return array


def single(prior: Mapping[str, Prior]) -> float | None:
    """The number that the prior precision is everywhere, if it is one.

    Examples
    --------
    >>> single({"0": 1.0, "2": 1.0}), single({"0": 1.0, "2": 3.0})
    (1.0, None)
    """
    found = {d if isinstance(d, float) else None for d in prior.values()}
    return found.pop() if len(found) == 1 else None


def _scaled(part: Part) -> Spectral:
    """D⁻¹ᐟ² C D⁻¹ᐟ², eigendecomposed, of a part that has C."""
    matrix, units = part.matrix, part.units(-0.5)
    if isinstance(units, float):
        return matrix.with_values(units * units * matrix.values)
    if isinstance(matrix, DiagonalMatrix):
        return DiagonalMatrix(units * units * matrix.values)
    if (n := math.prod(matrix.operand_shape)) > _MOST_DENSE:
        raise CurvatureError(
            f"prior_precision of {', '.join(part.like)}: a prior that differs within what is "
            "coupled "
            f"takes its matrix written out, of at most {_MOST_DENSE} parameters, got {n}; give it "
            "one number"
        )
    return ScaledMatrix(matrix, units).power(1.0).spectral()


def _sum_log1p(values: Array) -> Array:
    xp = array_namespace(values)
    return xp.sum(xp.log1p(values))
