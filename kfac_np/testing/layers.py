"""The laws of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import CurvatureError, InputError
from kfac_np.layers import Layer
from kfac_np.testing._tools import (
    EXACT,
    FINITE_DIFFERENCE,
    SINGLE,
    STEP,
    is_array,
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

__all__ = ["LAYER_LAWS", "check_layer"]


def check_layer(
    layer: Layer,
    params: Tree,
    x: Array,
    *,
    laws: Iterable[str] | None = None,
    seed: int = 0,
) -> None:
    """Raise `AssertionError` unless the layer keeps every law of :data:`LAYER_LAWS`.

    Call it in the test of a new layer, for each combination of hyper-parameters that takes
    another path through the code, and for few examples: each law costs some passes.

    Parameters
    ----------
    layer : Layer
    params : tree of Array
        In the structure of ``layer.init``; random, so that no term vanishes by accident.
    x : Array, shape (N, ...)
        Inputs, away from points where the layer is not differentiable.
    laws : iterable of str, optional
        Names of some laws; all when omitted.
    seed : int
        For the random directions.

    Raises
    ------
    AssertionError
        A law is broken; the message names the layer, the law and the numbers.
    InputError
        Parameters or inputs are not in double precision, or not finite.

    Examples
    --------
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> backend = get_backend("numpy", "float64")
    >>> net = Sequential(Dense(3, 4), Tanh(), Dense(4, 2))
    >>> check_layer(net, net.init(Rng(0), backend), Rng(1).normal((5, 3), backend))
    """
    require_double(params=params, x=x)
    if x.ndim < 2 or math.prod(x.shape) == 0:
        raise InputError(f"x: expected shape (N, ...) without an empty axis, got {x.shape}")
    run_laws(layer, LAYER_LAWS, laws, _Subject(layer, params, x, Rng(seed)))


@final
@dataclass(frozen=True, eq=False)
class _Subject:
    """A layer at a point, with random directions."""

    layer: Layer
    params: Tree
    x: Array
    rng: Rng

    @cached_property
    def forwarded(self) -> tuple[Array, Tree]:
        return self.layer.forward(self.params, self.x)

    @property
    def y(self) -> Array:
        return self.forwarded[0]

    @property
    def cache(self) -> Tree:
        return self.forwarded[1]

    @cached_property
    def dx(self) -> Array:
        return random_like(self.rng.child("dx"), self.x)

    @cached_property
    def dparams(self) -> Tree:
        return random_like(self.rng.child("dparams"), self.params)

    @cached_property
    def g(self) -> Array:
        return random_like(self.rng.child("g"), self.y)

    @cached_property
    def dg(self) -> Array:
        return random_like(self.rng.child("dg"), self.y)

    def vectors(self, number: int) -> Array:
        shape = (number, *self.y.shape)
        return self.rng.child("vectors").normal(shape, Backend.of(self.y))

    def value(self, params: Tree, x: Array) -> Array:
        return self.layer.forward(params, x)[0]

    def jvp(self, dx: Array | None, dparams: Tree) -> Array:
        return or_zeros(self.layer.jvp(self.params, self.cache, dx, dparams), self.y)

    def backward(self, g: Array) -> tuple[Array, Tree]:
        """Input derivative and parameter gradient."""
        dx, statistics = self.layer.backward(self.params, self.cache, g)
        return required(dx), gradients(statistics)


def gradients(statistics: Tree) -> Tree:
    return trees.tree_map(lambda s: s.gradient(), statistics)


def or_zeros(x: Array | None, like: Array) -> Array:
    return array_namespace(like).zeros_like(like) if x is None else x


def required(dx: Array | None) -> Array:
    require(dx is not None, "backward returned no input derivative, though asked for one")
    assert dx is not None
    return dx


def moved(x: Tree, step: float, dx: Tree) -> Tree:
    return trees.axpy(step, dx, x)


def inner(x: Tree, y: Tree) -> tuple[float, float]:
    """The inner product, and the sum of the absolute values of its terms."""
    xp_sum, absolute = 0.0, 0.0
    for a, b in zip(trees.leaves(x), trees.leaves(y), strict=True):
        xp = array_namespace(a)
        xp_sum += float(xp.sum(a * b))
        absolute += float(xp.sum(xp.abs(a * b)))
    return xp_sum, absolute


def init(s: _Subject) -> None:
    """Initial parameters have the structure and place of the parameters, and are reproducible."""
    backend = Backend.of(s.x)
    first = s.layer.init(Rng(1), backend)
    require_same_arrays(
        "parameters drawn once", first, "drawn again", s.layer.init(Rng(1), backend)
    )
    require(
        shapes(first) == shapes(s.params),
        f"init draws parameters of shapes {shapes(first)}, expected {shapes(s.params)}",
    )
    for path, leaf in trees.items(first):
        require(
            Backend.of(leaf) == backend,
            f"init draws parameter {path} as {leaf.dtype} on {Backend.of(leaf).device}, expected "
            f"{backend.dtype} on {backend.device}",
        )


def shape(s: _Subject) -> None:
    """Outputs and derivatives have the shapes, the dtype and the place that they should have."""
    expected = (s.x.shape[0], *s.layer.output_shape(s.x.shape[1:]))
    require(
        s.y.shape == expected, f"output_shape promises {expected}, but outputs have {s.y.shape}"
    )
    dx, gradient = s.backward(s.g)
    for name, array, like in (
        ("outputs", s.y, s.x),
        ("input derivatives", dx, s.x),
        ("jvp", s.jvp(s.dx, s.dparams), s.y),
    ):
        require(
            Backend.of(array) == Backend.of(like),
            f"{name} are {array.dtype} on {Backend.of(array).device}, expected {like.dtype} "
            f"on {Backend.of(like).device}",
        )
        if name != "outputs":
            require(
                array.shape == like.shape,
                f"{name} have shape {array.shape}, expected {like.shape}",
            )
    require(
        shapes(gradient) == shapes(s.params),
        f"gradients have shapes {shapes(gradient)}, parameters {shapes(s.params)}",
    )
    size = s.layer.backward_size(s.x.shape[1:])
    require(isinstance(size, int) and size >= 0, f"backward_size: expected a count, got {size!r}")


def purity(s: _Subject) -> None:
    """Nothing that is passed in is written to, and a cache can be used again and again."""
    y, cache = without_writing(s.layer.forward, "forward", s.params, s.x)
    require_same_arrays("outputs with read-only arguments", y, "without", s.y)

    def backward(params: Tree, cache: Tree, g: Array) -> tuple[Array | None, Tree]:
        dx, statistics = s.layer.backward(params, cache, g)
        return dx, gradients(statistics)

    first = without_writing(backward, "backward", s.params, cache, s.g)
    without_writing(s.layer.jvp, "jvp", s.params, cache, s.dx, s.dparams)
    if has_backward_jvp(s):
        without_writing(
            s.layer.backward_jvp, "backward_jvp", s.params, cache, s.g, s.dx, s.dparams, s.dg
        )
    again = without_writing(backward, "backward", s.params, cache, s.g)
    require_same_arrays("backward once", first, "backward again", again)


def adjointness(s: _Subject) -> None:
    """⟨g, J v⟩ = ⟨Jᵀ g, v⟩, in inputs and parameters together and in each alone."""
    dx, gradient = s.backward(s.g)
    nowhere = trees.zeros_like(s.params)
    for name, tangent, dparams in (
        ("inputs", s.dx, nowhere),
        ("parameters", None, s.dparams),
        ("inputs and parameters", s.dx, s.dparams),
    ):
        forwards, size = inner(s.g, s.jvp(tangent, dparams))
        backwards, other = inner((dx, gradient), (or_zeros(tangent, s.x), dparams))
        require(
            abs(forwards - backwards) <= EXACT * max(size, other),
            f"in the {name} ⟨g, J v⟩ = {forwards:.15g} by jvp, but ⟨Jᵀ g, v⟩ = {backwards:.15g} "
            "by backward",
        )


def finite_differences(s: _Subject) -> None:
    """jvp and the derivatives of backward agree with central differences of forward."""
    dx, gradient = s.backward(s.g)
    scale = max(1.0, inner(s.y, s.y)[0] ** 0.5)
    nowhere = trees.zeros_like(s.params)
    for name, tangent, dparams in (
        ("inputs", s.dx, nowhere),
        ("parameters", array_namespace(s.x).zeros_like(s.x), s.dparams),
    ):
        after, before = (
            s.value(moved(s.params, h, dparams), moved(s.x, h, tangent)) for h in (STEP, -STEP)
        )
        difference = (after - before) / (2 * STEP)
        require_close(
            f"jvp in the {name}",
            s.jvp(tangent, dparams),
            "the difference quotient",
            difference,
            FINITE_DIFFERENCE,
            scale,
        )
        by_backward, _ = inner((dx, gradient), (tangent, dparams))
        by_forward, size = inner(s.g, difference)
        require(
            abs(by_backward - by_forward) <= FINITE_DIFFERENCE * max(scale, size),
            f"the derivative in the {name} is {by_backward:.12g} by backward, but "
            f"{by_forward:.12g} by differences of forward",
        )


def vectors(s: _Subject) -> None:
    """K vectors carried back together give what each alone gives; K may be 0."""
    for number in (3, 1):
        v = s.vectors(number)
        dx, gradient = s.backward(v)
        for k in range(number):
            require_close(
                f"vector {k} of {number}",
                trees.tree_map(lambda a, k=k: a[k, ...], (dx, gradient)),
                "the same vector alone",
                s.backward(v[k, ...]),
                EXACT,
            )
    dx, gradient = s.backward(s.vectors(1)[:0, ...])
    expected = {path: (0, *found) for path, found in shapes((s.x, s.params)).items()}
    require(
        shapes((dx, gradient)) == expected,
        f"no vectors: expected shapes {expected}, got {shapes((dx, gradient))}",
    )


def per_example(s: _Subject) -> None:
    """The gradients of single examples are those of batches of one, and sum to the gradient."""
    for v in (s.g, s.vectors(2)):
        _, statistics = s.layer.backward(s.params, s.cache, v)
        each = trees.tree_map(lambda leaf: leaf.per_example(), statistics)
        require_close(
            "the sum of per-example gradients",
            trees.tree_map(lambda u, n=v.ndim - s.y.ndim: array_namespace(u).sum(u, axis=n), each),
            "the gradient",
            gradients(statistics),
            EXACT,
        )
    for n in range(s.x.shape[0]):
        _, cache = s.layer.forward(s.params, s.x[n : n + 1, ...])
        _, one = s.layer.backward(s.params, cache, s.g[n : n + 1, ...])
        _, statistics = s.layer.backward(s.params, s.cache, s.g)
        require_close(
            f"the gradient of example {n}",
            trees.tree_map(lambda leaf, n=n: leaf.per_example()[n, ...], statistics),
            "that of a batch of it alone",
            gradients(one),
            EXACT,
        )


def take(s: _Subject) -> None:
    """A cache cut to some examples is the cache of these examples."""
    rows = slice(0, (s.x.shape[0] + 1) // 2)
    cut = without_writing(lambda c: s.layer.take(c, rows), "take", s.cache)
    y, fresh = s.layer.forward(s.params, s.x[rows, ...])
    require_close("outputs", s.y[rows, ...], "those of the first examples", y, EXACT)
    require_close("the cut cache", cut, "the cache of the first examples", fresh, EXACT)
    results = []
    for cache in (cut, fresh):
        dx, statistics = s.layer.backward(s.params, cache, s.g[rows, ...])
        dy = s.layer.jvp(s.params, cache, s.dx[rows, ...], s.dparams)
        results.append((required(dx), gradients(statistics), or_zeros(dy, y)))
    require_close("derivatives by the cut cache", results[0], "by a fresh one", results[1], EXACT)


def absent_tangents(s: _Subject) -> None:
    """None stands for a tangent of zeros; without `wrt_input` only the statistics come."""
    zeros = array_namespace(s.x).zeros_like(s.x)
    require_close(
        "jvp with dx = None",
        s.jvp(None, s.dparams),
        "with dx = 0",
        s.jvp(zeros, s.dparams),
        EXACT,
    )
    _, gradient = s.backward(s.g)
    dx, statistics = s.layer.backward(s.params, s.cache, s.g, wrt_input=False)
    require(dx is None, "backward(wrt_input=False) returned an input derivative")
    require_close(
        "the gradient with wrt_input=False", gradients(statistics), "with it", gradient, EXACT
    )


def backward_jvp(s: _Subject) -> None:
    """backward_jvp agrees with central differences of backward; a layer may refuse it."""
    if not has_backward_jvp(s):
        return

    def exact(dx: Array | None, dparams: Tree, dg: Array | None) -> tuple[Array, Tree]:
        ddx, dgradient = s.layer.backward_jvp(s.params, s.cache, s.g, dx, dparams, dg)
        return or_zeros(ddx, s.x), dgradient

    def at(h: float) -> tuple[Array, Tree]:
        params = moved(s.params, h, s.dparams)
        _, cache = s.layer.forward(params, moved(s.x, h, s.dx))
        dx, statistics = s.layer.backward(params, cache, moved(s.g, h, s.dg))
        return required(dx), gradients(statistics)

    quotient = trees.tree_map(lambda a, b: (a - b) / (2 * STEP), at(STEP), at(-STEP))
    scale = max(1.0, inner(at(0.0), at(0.0))[0] ** 0.5)
    require_close(
        "backward_jvp",
        exact(s.dx, s.dparams, s.dg),
        "the difference quotient of backward",
        quotient,
        FINITE_DIFFERENCE,
        scale,
    )
    zx, zg = array_namespace(s.x).zeros_like(s.x), array_namespace(s.y).zeros_like(s.y)
    for dx, dg in ((None, s.dg), (s.dx, None), (None, None)):
        given = ", ".join(f"{n} = None" for n, v in (("dx", dx), ("dg", dg)) if v is None)
        require_close(
            f"backward_jvp with {given}",
            exact(dx, s.dparams, dg),
            "with zeros",
            exact(zx if dx is None else dx, s.dparams, zg if dg is None else dg),
            EXACT,
        )


def has_backward_jvp(s: _Subject) -> bool:
    try:
        s.layer.backward_jvp(s.params, s.cache, s.g, None, s.dparams, None)
    except CurvatureError:
        return False
    return True


def layout(s: _Subject) -> None:
    """Arrays that are not contiguous give the same results."""

    def spread(x: Array) -> Any:
        """The same numbers, every second one along the first and last axes of a larger array."""
        if x.ndim == 0:
            return x
        ends = {0, x.ndim - 1}
        shape = tuple(2 * n if i in ends else n for i, n in enumerate(x.shape))
        wide = array_namespace(x).zeros(shape, dtype=x.dtype, device=x.device)
        every_second = tuple(slice(None, None, 2 if i in ends else 1) for i in range(x.ndim))
        wide[every_second] = x
        return wide[every_second]

    params = trees.tree_map(spread, s.params)
    y, cache = s.layer.forward(params, spread(s.x))
    dx, statistics = s.layer.backward(params, cache, spread(s.g))
    dy = s.layer.jvp(params, cache, spread(s.dx), trees.tree_map(spread, s.dparams))
    require_close(
        "results with strided arrays",
        (y, required(dx), gradients(statistics), or_zeros(dy, s.y)),
        "with contiguous ones",
        (s.y, *s.backward(s.g), s.jvp(s.dx, s.dparams)),
        EXACT,
    )


def single_precision(s: _Subject) -> None:
    """Single precision stays single precision, and is close to double precision."""
    params, x, g, dx, dparams = single((s.params, s.x, s.g, s.dx, s.dparams))
    y, cache = s.layer.forward(params, x)
    ddx, statistics = s.layer.backward(params, cache, g)
    results = {
        "outputs": y,
        "input derivatives": required(ddx),
        "gradients": gradients(statistics),
        "jvp": or_zeros(s.layer.jvp(params, cache, dx, dparams), y),
    }
    if has_backward_jvp(s):
        results["backward_jvp"] = s.layer.backward_jvp(params, cache, g, dx, dparams, g)[1]
    for name, tree in {**results, "the cache": cache}.items():
        for leaf in filter(is_array, trees.leaves(tree)):
            xp = array_namespace(leaf)
            require(
                not xp.isdtype(leaf.dtype, "real floating") or leaf.dtype == xp.float32,
                f"{name}: expected dtype float32 for inputs of that dtype, got {leaf.dtype}",
            )
    results.pop("backward_jvp", None)
    doubles = (s.y, *s.backward(s.g), s.jvp(s.dx, s.dparams))
    for (name, tree), double in zip(results.items(), doubles, strict=True):
        require_close(
            f"{name} in single precision", wide(tree), "in double precision", double, SINGLE
        )


def wide(tree: Tree) -> Tree:
    return trees.tree_map(lambda x: array_namespace(x).astype(x, array_namespace(x).float64), tree)


LAYER_LAWS: Mapping[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        init,
        shape,
        purity,
        adjointness,
        finite_differences,
        vectors,
        per_example,
        take,
        absent_tangents,
        backward_jvp,
        layout,
        single_precision,
    )
}
"""The laws by name; the first line of a law's docstring states it."""
