"""The laws of a curvature approximation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, all_finite, array_namespace, eigh
from kfac_np.curvature import Block, BlockDiagonal, Curvature
from kfac_np.errors import CurvatureError, FactorizationError, InputError
from kfac_np.fisher import Exact, FisherType, InputOnly
from kfac_np.objective import Evaluation, Objective
from kfac_np.testing._tools import (
    EXACT,
    random_like,
    require,
    require_close,
    require_double,
    require_same_arrays,
    run_laws,
    shapes,
    single,
    without_writing,
)
from kfac_np.trees import Tree

__all__ = ["CURVATURE_LAWS", "check_block", "check_curvature"]


def check_block(
    block: Block,
    objective: Objective,
    params: Tree,
    x: Array,
    t: Array,
    *,
    fisher: FisherType | None = None,
    exact_damping: bool = False,
    laws: Iterable[str] | None = None,
    seed: int = 0,
) -> None:
    """Raise `AssertionError` unless the block keeps every law, used for every parameter.

    Parameters
    ----------
    block : Block
    objective : Objective
        A small network, of whose parameters the block supports all, and a loss.
    params : tree of Array
    x, t : Array
        A batch of at least two examples.
    fisher : FisherType, optional
        The exact one when omitted.
    exact_damping : bool
        Whether `solve` promises the inverse of the block plus damping · I itself.
    laws : iterable of str, optional
        Names of some of `CURVATURE_LAWS`; all when omitted.
    seed : int
        For random vectors.

    Raises
    ------
    AssertionError
        A law is broken; the message names the block, the law and the numbers.
    InputError
        Something is not in double precision, or there is one example only.

    Examples
    --------
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.curvature import KFACBlock
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> from kfac_np.losses import SquaredError
    >>> backend = get_backend("numpy", "float64")
    >>> net = Sequential(Dense(2, 3), Tanh(), Dense(3, 2))
    >>> x = Rng(1).normal((10, 2), backend)
    >>> params = net.init(Rng(0), backend)
    >>> check_block(KFACBlock(), Objective(net, SquaredError()), params, x, x)
    """
    check_curvature(
        BlockDiagonal(block),
        objective,
        params,
        x,
        t,
        fisher=fisher,
        exact_damping=exact_damping,
        laws=laws,
        seed=seed,
    )


def check_curvature(
    curvature: Curvature,
    objective: Objective,
    params: Tree,
    x: Array,
    t: Array,
    *,
    fisher: FisherType | None = None,
    exact_damping: bool = False,
    laws: Iterable[str] | None = None,
    seed: int = 0,
) -> None:
    """Raise `AssertionError` unless the curvature keeps every law of `CURVATURE_LAWS`.

    Parameters
    ----------
    curvature : Curvature
    objective : Objective
        A small network and a loss.
    params : tree of Array
    x, t : Array
        A batch of at least two examples; so many that the matrix is regular, for the law about
        undamped inverses to say anything.
    fisher : FisherType, optional
        The exact one when omitted.
    exact_damping : bool
        Whether `solve` promises the inverse of the matrix plus damping · I itself.
    laws : iterable of str, optional
        Names of some laws; all when omitted.
    seed : int
        For random vectors.

    Raises
    ------
    AssertionError
        A law is broken; the message names the curvature, the law and the numbers.
    InputError
        Something is not in double precision, or there is one example only.

    Examples
    --------
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.curvature import FullMatrix
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> from kfac_np.losses import SquaredError
    >>> backend = get_backend("numpy", "float64")
    >>> net = Sequential(Dense(2, 3), Tanh(), Dense(3, 2))
    >>> x = Rng(1).normal((10, 2), backend)
    >>> params, objective = net.init(Rng(0), backend), Objective(net, SquaredError())
    >>> check_curvature(FullMatrix(), objective, params, x, x, exact_damping=True)
    """
    require_double(params=params, x=x, t=t)
    if x.shape[0] < 2:
        raise InputError(f"x: expected at least two examples, got {x.shape[0]}")
    subject = _Subject(
        curvature, objective, params, x, t, fisher or Exact(), exact_damping, Rng(seed)
    )
    run_laws(curvature, CURVATURE_LAWS, laws, subject)


Moments = dict[str, dict[str, Array]]


@final
@dataclass(frozen=True, eq=False)
class _Subject:
    """A curvature, and a batch to estimate it on."""

    curvature: Curvature
    objective: Objective
    params: Tree
    x: Array
    t: Array
    fisher: FisherType
    exact_damping: bool
    rng: Rng

    @cached_property
    def e(self) -> Evaluation:
        return self.objective.evaluate(self.params, self.x, self.t)

    @cached_property
    def moments(self) -> Moments:
        return self.estimate(self.e)

    def estimate(self, e: Evaluation, fisher: FisherType | None = None) -> Moments:
        return self.curvature.estimate(e, fisher or self.fisher, self.rng.child("fisher"))

    def on(self, rows: slice) -> Evaluation:
        return self.objective.evaluate(self.params, self.x[rows, ...], self.t[rows, ...])

    @cached_property
    def v(self) -> Tree:
        return random_like(self.rng.child("v"), self.params)

    @cached_property
    def w(self) -> Tree:
        return random_like(self.rng.child("w"), self.params)

    @cached_property
    def dense(self) -> Array:
        return self.curvature.matrix(self.moments, self.params).to_dense()

    @cached_property
    def damping(self) -> float:
        """Comparable with the matrix, so that both count."""
        xp = array_namespace(self.dense)
        return float(xp.linalg.trace(self.dense)) / self.dense.shape[0] + 1e-3


def places(s: _Subject) -> None:
    """Moments and factors are arrays where the parameters are; results have their structure."""
    backend = Backend.of(trees.leaves(s.params)[0])
    factors, _ = s.curvature.factorise(s.moments, s.damping)
    solved = s.curvature.solve(factors, s.v)
    applied = s.curvature.matrix(s.moments, s.params).matvec(s.v)
    for name, tree in (("moments", s.moments), ("factors", factors), ("solve", solved)):
        for path, leaf in trees.items(tree):
            require(
                Backend.of(leaf) == backend,
                f"{name}: {path} is {leaf.dtype} on {Backend.of(leaf).device}, expected "
                f"{backend.dtype} on {backend.device}",
            )
    for name, tree in (("solve", solved), ("matvec", applied)):
        require(
            shapes(tree) == shapes(s.params),
            f"{name} has the shapes {shapes(tree)}, parameters {shapes(s.params)}",
        )
    for path, p in trees.items(s.params):
        cost = s.curvature.block_of(path).cost(tuple(p.shape))
        require(
            not cost or set(cost) >= {"factors", "factorise", "solve"},
            f"cost of layer {path}: expected factors, factorise and solve, got {sorted(cost)}",
        )


def purity(s: _Subject) -> None:
    """Nothing that is passed in is written to, and the same again gives the same."""
    again = s.estimate(s.e)
    require_same_arrays("moments once", s.moments, "again", again)

    def factorise(moments: Moments) -> Any:
        return s.curvature.factorise(moments, s.damping)[0]

    factors = without_writing(factorise, "factorise", s.moments)
    require_same_arrays("factors once", factors, "again", factorise(s.moments))
    first = without_writing(s.curvature.solve, "solve", factors, s.v)
    require_same_arrays("solve once", first, "again", s.curvature.solve(factors, s.v))
    without_writing(lambda m, v: s.curvature.matrix(m, s.params).matvec(v), "matvec", again, s.v)


def chunks(s: _Subject) -> None:
    """Backpropagating one vector at a time gives the moments of all at once."""
    require_close(
        "moments of single columns",
        s.estimate(s.e, Exact(budget_bytes=1)),
        "of all columns",
        s.estimate(s.e, Exact()),
        EXACT,
    )


def means(s: _Subject) -> None:
    """Moments are means: of two halves of a batch they average, and twice the batch is no more."""
    half = s.x.shape[0] // 2
    xp = array_namespace(s.x)
    first, second, whole = (
        s.estimate(s.on(rows), Exact())
        for rows in (slice(0, half), slice(half, 2 * half), slice(0, 2 * half))
    )
    average = trees.scale(0.5, trees.axpy(1.0, first, second))
    require_close("the mean of two halves' moments", average, "the whole's", whole, EXACT)
    twice = s.objective.evaluate(s.params, xp.concat([s.x, s.x]), xp.concat([s.t, s.t]))
    require_close(
        "moments of the batch twice",
        s.estimate(twice, Exact()),
        "once",
        s.estimate(s.e, Exact()),
        EXACT,
    )


def weights(s: _Subject) -> None:
    """Doubling the weights of all examples doubles the matrix."""
    doubled = s.objective.evaluate(s.params, s.x, s.t, 2.0 * Backend.of(s.x).ones(s.x.shape[:1]))
    found = s.curvature.matrix(s.estimate(doubled), s.params).to_dense()
    require_close("with weights of 2", found, "twice that without", 2.0 * s.dense, EXACT)


def matrix(s: _Subject) -> None:
    """The matrix is symmetric, positive semi-definite, and what its products say it is."""
    m = s.curvature.matrix(s.moments, s.params)
    xp = array_namespace(s.dense)
    require_close("the matrix", s.dense, "its transpose", s.dense.T, EXACT)
    lowest, norm = float(eigh(s.dense)[0][0]), float(m.frobenius_norm())
    require(lowest >= -EXACT * norm, f"its lowest eigenvalue is {lowest:.3g}, its norm {norm:.3g}")
    require_close(
        "matvec", trees.ravel(m.matvec(s.v)), "to_dense", s.dense @ trees.ravel(s.v), EXACT
    )
    for name, scalar, expected in (
        ("trace", m.trace(), xp.linalg.trace(s.dense)),
        ("frobenius_norm", m.frobenius_norm(), xp.linalg.matrix_norm(s.dense)),
    ):
        require_close(name, scalar, "that of to_dense", expected, EXACT)


def solve(s: _Subject) -> None:
    """The damped inverse is linear, symmetric, positive, and as exact as it promises to be."""
    factors, _ = s.curvature.factorise(s.moments, s.damping)
    x, y = s.curvature.solve(factors, s.v), s.curvature.solve(factors, s.w)
    both = s.curvature.solve(factors, trees.axpy(-3.0, s.v, s.w))
    loose = 1e3 * EXACT  # the damping bounds the condition number to some thousand
    require_close("solve(w - 3 v)", both, "solve(w) - 3 solve(v)", trees.axpy(-3.0, x, y), loose)
    left, right = float(trees.inner(s.w, x)), float(trees.inner(s.v, y))
    size = float(trees.inner(s.v, x) * trees.inner(s.w, y)) ** 0.5
    require(
        abs(left - right) <= loose * size, f"⟨w, C v⟩ = {left:.15g}, but ⟨v, C w⟩ = {right:.15g}"
    )
    require(float(trees.inner(s.v, x)) > 0, "⟨v, C v⟩ is not positive for a random v")
    statistics, gradient = s.e.backward(s.e.output_gradient()), s.e.gradient()
    whole = s.curvature.solve(factors, gradient)
    mean = s.curvature.solve_mean(factors, statistics, s.e.scale, gradient)
    require_close("solve_mean", mean, "solve of the mean gradient", whole, loose)
    if s.exact_damping:
        back = s.dense @ trees.ravel(x) + s.damping * trees.ravel(x)
        require_close("(C + λ) solve(v)", back, "v", trees.ravel(s.v), loose)


def undamped(s: _Subject) -> None:
    """Without damping solve is the inverse of the matrix, where that has one."""
    values = eigh(s.dense)[0]
    condition = float(values[-1]) / max(float(values[0]), 1e-300)
    if not 0 < condition < 1e8:
        return
    applied = s.curvature.matrix(s.moments, s.params).matvec(s.v)
    try:
        factors, events = s.curvature.factorise(s.moments, 0.0)
    except FactorizationError as error:
        raise AssertionError(f"a matrix of condition {condition:.1g} led to: {error}") from error
    require(
        not events, f"a matrix of condition {condition:.1g} led to {'; '.join(map(str, events))}"
    )
    require_close(
        "solve(C v)", s.curvature.solve(factors, applied), "v", s.v, EXACT * max(1e2, condition)
    )


def degenerate(s: _Subject) -> None:
    """Moments of zero need damping, and no more; moments that are not finite are never used."""
    zero = trees.zeros_like(s.moments)
    factors, _ = s.curvature.factorise(zero, s.damping)
    solved = s.curvature.solve(factors, s.v)
    require(all_finite(*trees.leaves(solved)), "solve is not finite when all moments are zero")
    try:
        s.curvature.factorise(zero, 0.0)
    except FactorizationError:
        pass
    else:
        require(False, "moments of zero have an inverse without damping, and no error tells")
    bad = trees.scale(math.nan, s.moments)
    try:
        s.curvature.factorise(bad, s.damping)
    except FactorizationError:
        pass
    else:
        require(False, "moments of NaN are factorised without an error")
    good, _ = s.curvature.factorise(s.moments, s.damping)
    kept, events = s.curvature.factorise(bad, s.damping, good)
    require(bool(events), "no event tells that moments of NaN were not used")
    require_same_arrays("factors after moments of NaN", kept, "the last good ones", good)


def without_vectors(s: _Subject) -> None:
    """The input-only type, which has no vectors, gives a finite matrix or a `CurvatureError`."""
    try:
        moments = s.estimate(s.e, InputOnly())
    except CurvatureError:
        return
    found = s.curvature.matrix(moments, s.params).to_dense()
    require(all_finite(found), "the matrix of the input-only type is not finite")
    require(
        float(array_namespace(found).linalg.trace(found)) > 0.0,
        "the input-only type gives a matrix of zeros, and no error",
    )


def single_precision(s: _Subject) -> None:
    """Single precision stays single precision."""
    params, x, t, v = single((s.params, s.x, s.t, s.v))
    narrow = replace(s, params=params, x=x, t=t)
    moments = narrow.estimate(narrow.e)
    factors, _ = s.curvature.factorise(moments, s.damping)
    solved = s.curvature.solve(factors, v)
    for name, tree in (("moments", moments), ("factors", factors), ("solve", solved)):
        for path, leaf in trees.items(tree):
            expected = array_namespace(leaf).float32
            require(leaf.dtype == expected, f"{name}: {path} is {leaf.dtype}, expected {expected}")


CURVATURE_LAWS: Mapping[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        places,
        purity,
        chunks,
        means,
        weights,
        matrix,
        solve,
        undamped,
        degenerate,
        without_vectors,
        single_precision,
    )
}
"""The laws by name; the first line of a law's docstring states it."""
