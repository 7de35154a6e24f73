"""The marginal likelihood as a function of prior precision and noise, and its maximum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from kfac_np.applications.laplace_precision import Part, Precision
from kfac_np.backend import Array, array_namespace, quiet
from kfac_np.errors import FactorizationError, InputError

__all__ = ["Derivatives", "Evidence", "Group", "lowest", "maximise"]

_STEPS = 200
_LARGEST_STEP = 3.0  # of a logarithm
_NO_OPTIMUM = 80.0  # a logarithm so far from the start means that there is none


@final
@dataclass(frozen=True)
class Group:
    """Parameters whose prior precision is multiplied by one factor e^x.

    Attributes
    ----------
    name : str
    paths : tuple of str
    scatter : float
        Σ δ (θ - μ)², at x = 0.
    """

    name: str
    paths: tuple[str, ...]
    scatter: float


@final
@dataclass(frozen=True)
class Derivatives:
    """Of log det P - log det D with respect to x of each group.

    Attributes
    ----------
    logdet_ratio : float
        Itself.
    effective : list of float
        γ, minus its first derivatives: the number of parameters that the data determine.
    second : list of list of float
        Its second derivatives; the sum of a row is half the derivative of -γ by log σ.
    """

    logdet_ratio: float
    effective: list[float]
    second: list[list[float]]


@final
@dataclass(frozen=True, eq=False)
class Evidence:
    """F(x, y) = log p(data), x the logarithms of factors of δ, y that of σ, from what they are now.

    F = -m e^(-2y) - n y - ½ (log det P - log det D) - ½ Σ_g s_g e^(x_g), up to a constant, with the
    misfit m = Σ ℓ/(σ² T), n targets, s_g the scatter. All of it is concave in (x, y): log det P is
    convex, as that of a sum of positive matrices times exponentials, and log det D linear. So there
    is one maximum, and Newton's method finds it.

    Attributes
    ----------
    precision : Precision
        P at x = y = 0.
    groups : tuple of Group
    misfit : float
    targets : float
        n; 0 where y is held at 0.
    """

    precision: Precision
    groups: tuple[Group, ...]
    misfit: float
    targets: float

    @quiet
    def __call__(self, point: Sequence[float]) -> tuple[float, list[float], list[list[float]]]:
        """Value, gradient and Hessian at (x_1, ..., x_G[, y])."""
        x = point[: len(self.groups)]
        y = point[-1] if self.targets else 0.0
        found = self._curvature(x, y)
        scatter = [g.scatter * math.exp(v) for g, v in zip(self.groups, x, strict=True)]
        misfit = self.misfit * math.exp(-2.0 * y)
        value = -misfit - self.targets * y - 0.5 * (found.logdet_ratio + math.fsum(scatter))
        gradient = [0.5 * (e - s) for e, s in zip(found.effective, scatter, strict=True)]
        hessian = [[-0.5 * q for q in row] for row in found.second]
        for i, s in enumerate(scatter):
            hessian[i][i] -= 0.5 * s
        if self.targets:
            sums = [-math.fsum(row) for row in found.second]
            gradient.append(2.0 * misfit - self.targets + math.fsum(found.effective))
            for row, total in zip(hessian, sums, strict=True):
                row.append(total)
            hessian.append([*sums, -4.0 * misfit + 2.0 * math.fsum(sums)])
        return value, gradient, hessian

    def effective(self, point: Sequence[float]) -> list[float]:
        """γ of each group: the number of parameters that the data determine."""
        y = point[-1] if self.targets else 0.0
        return self._curvature(point[: len(self.groups)], y).effective

    def _curvature(self, x: Sequence[float], y: float) -> Derivatives:
        h = self.precision.h * math.exp(-2.0 * y)
        size = len(self.groups)
        if len(self.precision.parts) == 1 and size > 1:
            return self._coupled(self.precision.parts[0], h, x)
        at = {path: i for i, g in enumerate(self.groups) for path in g.paths}
        ratio, effective, second = 0.0, [0.0] * size, [[0.0] * size for _ in range(size)]
        for part in self.precision.parts:
            i = at[next(iter(part.like))]
            values = (h * math.exp(-x[i])) * part.matrix.values
            xp = array_namespace(values)
            determined = values / (1.0 + values)
            ratio += float(xp.sum(xp.log1p(values)))
            effective[i] += float(xp.sum(determined))
            second[i][i] += float(xp.sum(determined / (1.0 + values)))
        return Derivatives(ratio, effective, second)

    def _coupled(self, part: Part, h: float, x: Sequence[float]) -> Derivatives:
        """Layers with factors of their own where the curvature couples them.

        With R = (I + E⁻¹ᐟ² h C' E⁻¹ᐟ²)⁻¹, E the factors e^x: γ_g = tr_g(I - R), and second
        derivatives tr_g(R) - Σ of squares of R in the blocks (g, g').
        """
        like = part.matrix.values
        xp = array_namespace(like)
        ones = [xp.ones(p.shape, dtype=like.dtype, device=like.device) for p in part.like.values()]
        factor = {path: v for g, v in zip(self.groups, x, strict=True) for path in g.paths}
        roots = [one * math.exp(-0.5 * factor[p]) for one, p in zip(ones, part.like, strict=True)]
        root = part.pack(dict(zip(part.like, roots, strict=True)))
        dense = root[:, None] * part.matrix.with_values(h * like).to_dense() * root[None, :]
        values, u = xp.linalg.eigh(dense)
        values = xp.where(values > 0.0, values, 0.0 * values)
        r = (u / (1.0 + values)) @ u.T
        sides = [
            part.pack(
                {p: one * float(p in g.paths) for p, one in zip(part.like, ones, strict=True)}
            )
            for g in self.groups
        ]
        diagonal, squares = xp.linalg.diagonal(r), r * r
        traces = [float(xp.sum(diagonal * side)) for side in sides]
        counts = [float(xp.sum(side)) for side in sides]
        second = [[-float(xp.sum(a * (squares @ b))) for b in sides] for a in sides]
        for i, trace in enumerate(traces):
            second[i][i] += trace
        effective = [n - trace for n, trace in zip(counts, traces, strict=True)]
        return Derivatives(float(xp.sum(xp.log1p(values))), effective, second)


def maximise(evidence: Evidence, like: Array) -> list[float]:
    """The maximum, by Newton's method with steps that go up.

    Parameters
    ----------
    evidence : Evidence
    like : Array
        Where the small equations are solved.

    Raises
    ------
    InputError
        There is none: parameters without curvature, or at the mean of their prior.
    """
    point = _start(evidence)
    xp = array_namespace(like)

    def solved(hessian: list[list[float]], gradient: list[float]) -> list[float]:
        h = xp.asarray(hessian, dtype=xp.float64, device=like.device)
        g = xp.asarray(gradient, dtype=xp.float64, device=like.device)
        step = -xp.linalg.solve(h, g[:, None])[:, 0]
        return [float(step[i]) for i in range(len(gradient))]

    start = point
    value, gradient, hessian = evidence(point)
    for _ in range(_STEPS):
        step = solved(hessian, gradient)
        largest = max(map(abs, step))
        if largest <= 1e-9:  # what is left after it is its square
            return [p + s for p, s in zip(point, step, strict=True)]
        scale = min(1.0, _LARGEST_STEP / largest)
        while True:
            tried = [p + scale * s for p, s in zip(point, step, strict=True)]
            found = evidence(tried)
            # At the summit rounding decides what is higher; there the full step is right.
            if found[0] >= value - 1e-13 * abs(value):
                break
            scale *= 0.5
            if scale < 1e-10:
                return point
        point, (value, gradient, hessian) = tried, found
        if max(abs(p - s) for p, s in zip(point, start, strict=True)) > _NO_OPTIMUM:
            raise InputError(_unbounded([g.name for g in evidence.groups]))
    raise FactorizationError("tuned: Newton's method did not converge")


@quiet
def _start(evidence: Evidence) -> list[float]:
    """Where all misfit is noise, and each group is determined in full: e^(2y) = 2 m/n, s e^x = P.

    In whatever units targets and parameters come, Newton's method then begins at the same point.
    """
    for group in evidence.groups:
        if not group.scatter > 0.0:
            raise InputError(_unbounded([group.name]))
    if evidence.targets and not evidence.misfit > 0.0:
        raise InputError(
            "tuned: the marginal likelihood has no maximum in the noise, since the network fits "
            "its targets exactly; expected noise=False"
        )
    shapes = {path: p.shape for part in evidence.precision.parts for path, p in part.like.items()}
    point = [
        math.log(sum(math.prod(shapes[path]) for path in group.paths) / group.scatter)
        for group in evidence.groups
    ]
    if evidence.targets:
        point.append(0.5 * math.log(2.0 * evidence.misfit / evidence.targets))
    for group, determined in zip(evidence.groups, evidence.effective(point), strict=True):
        if not determined > 0.0:
            raise InputError(_unbounded([group.name]))
    return point


def _unbounded(names: list[str]) -> str:
    return (
        f"tuned: the marginal likelihood has no maximum in the prior precision of "
        f"{', '.join(names)}: expected parameters that the data determine and that are not at the "
        "mean of their prior"
    )


def lowest(function: Callable[[float], float], low: float, high: float, grid: int) -> float:
    """Where a function of one variable is lowest: the best of a grid, then by golden section.

    Examples
    --------
    >>> round(lowest(lambda x: (x - 0.3) ** 2, -4.0, 4.0, 9), 3)
    0.3
    """
    width = (high - low) / (grid - 1)
    points = [low + i * width for i in range(grid)]
    values = [function(p) for p in points]
    best = points[values.index(min(values))]
    a, b = max(low, best - width), min(high, best + width)
    ratio = 0.5 * (math.sqrt(5.0) - 1.0)
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    fc, fd = function(c), function(d)
    while b - a > 1e-3:
        if fc <= fd:
            b, d, fd = d, c, fc
            c = b - ratio * (b - a)
            fc = function(c)
        else:
            a, c, fc = c, d, fd
            d = a + ratio * (b - a)
            fd = function(d)
    return 0.5 * (a + b)
