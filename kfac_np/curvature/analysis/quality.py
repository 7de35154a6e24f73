"""How good an approximation is, at a point: its products against exact ones, and its factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from kfac_np import trees
from kfac_np.backend import (
    Array,
    Backend,
    Rng,
    all_finite,
    array_namespace,
    clip,
    quiet,
)
from kfac_np.curvature.base import Block, Curvature, Moments
from kfac_np.curvature.blocks.by_kind import KFACBlock
from kfac_np.curvature.factors import factor
from kfac_np.errors import InputError
from kfac_np.fisher import Exact, FisherType
from kfac_np.matrices import TreeMatrix
from kfac_np.objective import Evaluation
from kfac_np.products import ggn_product
from kfac_np.trees import Tree
from kfac_np.validation import require_instance

__all__ = ["LayerQuality", "Quality", "effective_rank", "quality"]


@final
@dataclass(frozen=True)
class LayerQuality:
    """How good the block of one parameter is; None where a number does not apply.

    Attributes
    ----------
    path : str
    parameters : int
    cosine, relative_error : float or None
        Between the products of the approximate and of the exact block with the same vectors:
        Σ ⟨Cv, Fv⟩ / √(Σ‖Cv‖² Σ‖Fv‖²), and √(Σ‖Cv - Fv‖² / Σ‖Fv‖²). For normal vectors these
        estimate ⟨C, F⟩ / (‖C‖ ‖F‖) and ‖C - F‖ / ‖F‖ in Frobenius norms.
    condition_a, condition_g : float or None
        Largest over smallest eigenvalue of a Kronecker factor, undamped; inf where singular.
    pi : float or None
        How the block's rule splits damping: γ_A = π γ, γ_G = γ / π.
    rank_a, rank_g : float or None
        Effective rank of a factor (`effective_rank`); that of their product is the product.

    Examples
    --------
    >>> LayerQuality("0", 12, cosine=0.9, relative_error=0.5).condition_a is None
    True
    """

    path: str
    parameters: int
    cosine: float | None
    relative_error: float | None
    condition_a: float | None = None
    condition_g: float | None = None
    pi: float | None = None
    rank_a: float | None = None
    rank_g: float | None = None


@final
@dataclass(frozen=True)
class Quality:
    """What `quality` found; as text a table with a line for each parameter.

    Attributes
    ----------
    layers : tuple of LayerQuality
    cosine, relative_error : float or None
        Of the whole matrices, blocks between layers included.

    Examples
    --------
    >>> print(Quality((LayerQuality("0", 12, 0.9, 0.5),), 0.9, 0.5))
    path   parameters  cosine  error  cond A  cond G  pi  rank A  rank G
    0      12          0.9     0.5
    total  12          0.9     0.5
    """

    layers: tuple[LayerQuality, ...]
    cosine: float | None
    relative_error: float | None

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("path", "parameters", "cosine", "error")
            + ("cond A", "cond G", "pi", "rank A", "rank G")
        ]
        for q in self.layers:
            numbers = (q.cosine, q.relative_error, q.condition_a, q.condition_g, q.pi)
            cells = map(_short, (*numbers, q.rank_a, q.rank_g))
            rows.append((q.path, str(q.parameters), *cells))
        total = sum(q.parameters for q in self.layers)
        overall = (_short(self.cosine), _short(self.relative_error))
        rows.append(("total", str(total), *overall, "", "", "", "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


@quiet
def quality(
    e: Evaluation,
    curvature: Curvature,
    *,
    moments: dict[str, Moments] | None = None,
    vectors: Sequence[Tree] | None = None,
    draws: int = 4,
    fisher: FisherType | None = None,
    rng: Rng | None = None,
) -> Quality:
    """Compare a curvature's products with exact ones, each parameter's block and all together.

    Takes a product with the exact Fisher (a jvp and a backward pass) for every vector and for
    every part of it that belongs to one parameter, and two eigendecompositions a layer.

    Parameters
    ----------
    e : Evaluation
        The exact Fisher is that of its batch.
    curvature : Curvature
    moments : dict, optional
        For example the moving averages of a run (`KFACState.moments`); estimated on the batch of
        `e` when omitted.
    vectors : sequence of trees, optional
        Directions that matter, for example the gradient; random normal ones when omitted.
    draws : int
        Number of random vectors.
    fisher : FisherType, optional
        For moments that are estimated here; the exact one when omitted.
    rng : Rng, optional

    Returns
    -------
    Quality

    Raises
    ------
    InputError
        No vectors.

    References
    ----------
    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".

    Examples
    --------
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.curvature import BlockDiagonal
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> net, backend = Sequential(Dense(2, 3), Tanh(), Dense(3, 1)), get_backend()
    >>> x = Rng(1).normal((50, 2), backend)
    >>> e = Objective(net, SquaredError()).evaluate(net.init(Rng(0), backend), x, x[:, :1])
    >>> found = quality(e, BlockDiagonal())
    >>> [q.path for q in found.layers], found.layers[1].relative_error < 1e-5
    (['0', '2'], True)
    """
    require_instance("quality: e", e, Evaluation)
    require_instance("quality: curvature", curvature, Curvature)
    rng = Rng.of(rng or 0).spawn()
    if moments is None:
        moments = curvature.estimate(e, fisher or Exact(), rng.child("fisher"))
    if vectors is None:
        vectors = [_random_like(e.params, rng.child("vector", k)) for k in range(draws)]
    if not vectors:
        raise InputError("quality: expected at least one vector, got none")
    matrix = curvature.matrix(moments, e.params)
    layers = []
    for path, p in trees.items(e.params):
        cosine, error = _compare(_block_products(e, matrix, vectors, path))
        numbers = _of_factors(moments.get(path, {}), curvature.block_of(path))
        layers.append(LayerQuality(path, math.prod(p.shape), cosine, error, *numbers))
    return Quality(tuple(layers), *_compare((matrix.matvec(v), ggn_product(e, v)) for v in vectors))


def effective_rank(eigenvalues: Array) -> float:
    """exp(-Σ p log p), p = eigenvalues / their sum: the rank that a flat spectrum would have.

    Parameters
    ----------
    eigenvalues : Array, shape (n,)
        Of a positive semi-definite matrix; negative ones (rounding) count as zero.

    Returns
    -------
    float
        1..n, and 0 for the zero matrix.

    References
    ----------
    Roy & Vetterli 2007, EUSIPCO, eq. 3.

    Examples
    --------
    >>> import numpy as np
    >>> round(effective_rank(np.asarray([2.0, 2.0, 0.0])), 12)
    2.0
    """
    xp = array_namespace(eigenvalues)
    values = clip(xp.astype(eigenvalues, xp.float64), low=0.0)
    total = float(xp.sum(values))
    if total == 0.0:
        return 0.0
    p = values / total
    safe = xp.where(p > 0, p, xp.ones_like(p))
    return math.exp(-float(xp.sum(safe * xp.log(safe))))


def _compare(pairs: Iterable[tuple[Tree, Tree]]) -> tuple[float | None, float | None]:
    """Cosine and relative error of approximate and exact products; None where they are 0/0."""
    cross = ours = exact = error = 0.0
    for approximate, true in pairs:
        cross += float(trees.inner(approximate, true))
        ours += float(trees.squared_norm(approximate))
        exact += float(trees.squared_norm(true))
        error += float(trees.squared_norm(trees.axpy(-1.0, true, approximate)))
    size = math.sqrt(ours) * math.sqrt(exact)
    return (cross / size if size > 0 else None, math.sqrt(error / exact) if exact > 0 else None)


def _block_products(
    e: Evaluation, matrix: TreeMatrix, vectors: Sequence[Tree], path: str
) -> Iterator[tuple[Tree, Tree]]:
    """Products of one approximate and exact block: with vectors that are zero elsewhere."""
    for v in vectors:
        part = trees.map_named(lambda at, x: x if at == path else 0.0 * x, v)
        ours, exact = matrix.matvec(part), ggn_product(e, part)
        yield dict(trees.items(ours))[path], dict(trees.items(exact))[path]


def _of_factors(
    moments: Mapping[str, Array], block: Block
) -> tuple[float | None, float | None, float | None, float | None, float | None]:
    """Condition numbers, π and effective ranks of factors A and G, if these are what there is."""
    a, g = moments.get("A"), moments.get("G")
    if a is None or g is None or g.ndim != 2 or not all_finite(a, g):  # of groups there are many
        return None, None, None, None, None
    pi = None
    if isinstance(block, KFACBlock):
        gamma_a, gamma_g = (float(gamma) for gamma in block.rule(a, g, 1.0))
        pi = math.sqrt(gamma_a) / math.sqrt(gamma_g) if gamma_a > 0 and gamma_g > 0 else None
    values = [factor(m).eigh()[0] for m in (a, g)]
    conditions = [_condition(v) for v in values]
    ranks = [effective_rank(v) for v in values]
    return conditions[0], conditions[1], pi, ranks[0], ranks[1]


def _condition(eigenvalues: Array) -> float:
    """Largest over smallest; inf where the smallest is not positive."""
    xp = array_namespace(eigenvalues)
    low, high = float(xp.min(eigenvalues)), float(xp.max(eigenvalues))
    return high / low if low > 0 else math.inf


def _random_like(params: Tree, rng: Rng) -> Tree:
    return trees.map_named(lambda path, p: rng.child(path).normal(p.shape, Backend.of(p)), params)


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"
