"""The laws of a layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import CurvatureError, InputError
from kfac_np.layers import Layer
from kfac_np.testing._subject import (
    Subject,
    gradients,
    inner,
    moved,
    only,
    or_zeros,
    wide,
    zeros_or_none,
)
from kfac_np.testing._tools import (
    EXACT,
    FINITE_DIFFERENCE,
    SINGLE,
    STEP,
    is_array,
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
    """Raise `AssertionError` unless the layer keeps every law of `LAYER_LAWS`.

    Call it in the test of a new layer, for each combination of hyper-parameters that takes
    another path through the code, and for few examples: each law costs some passes.

    Parameters
    ----------
    layer : Layer
    params : tree of Array
        In the structure of ``layer.init``; random, so that no term vanishes by accident.
    x : Array, shape (N, ...)
        Inputs, away from points where the layer is not differentiable. Integers for a layer that
        takes such: there is no derivative with respect to them, and `backward` returns None for it.
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
    run_laws(layer, LAYER_LAWS, laws, Subject(layer, params, x, Rng(seed)))


def init(s: Subject) -> None:
    """Initial parameters have the structure and place of the parameters, and are reproducible."""
    backend = s.backend
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


def shape(s: Subject) -> None:
    """Outputs and derivatives have the shapes, the dtype and the place that they should have."""
    expected = (s.x.shape[0], *s.layer.output_shape(s.x.shape[1:]))
    require(
        s.y.shape == expected, f"output_shape promises {expected}, but outputs have {s.y.shape}"
    )
    dx, gradient = s.backward(s.g)
    for name, array, like in (
        ("outputs", s.y, s.y),
        ("input derivatives", dx, s.x),
        ("jvp", s.jvp(s.dx, s.dparams), s.y),
    ):
        if array is None:  # of integer inputs
            continue
        require(
            Backend.of(array) == s.backend,
            f"{name} are {array.dtype} on {Backend.of(array).device}, expected {s.backend.dtype} "
            f"on {s.backend.device}",
        )
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


def purity(s: Subject) -> None:
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


def adjointness(s: Subject) -> None:
    """⟨g, J v⟩ = ⟨Jᵀ g, v⟩, in inputs and parameters together and in each alone."""
    dx, gradient = s.backward(s.g)
    nowhere = trees.zeros_like(s.params)
    for name, tangent, dparams in (
        ("inputs", s.dx, nowhere),
        ("parameters", None, s.dparams),
        ("inputs and parameters", s.dx, s.dparams),
    ):
        forwards, size = inner(s.g, s.jvp(tangent, dparams))
        backwards, other = inner((dx, gradient), (tangent, dparams))
        require(
            abs(forwards - backwards) <= EXACT * max(size, other),
            f"in the {name} ⟨g, J v⟩ = {forwards:.15g} by jvp, but ⟨Jᵀ g, v⟩ = {backwards:.15g} "
            "by backward",
        )


def finite_differences(s: Subject) -> None:
    """jvp and the derivatives of backward agree with central differences of forward."""
    dx, gradient = s.backward(s.g)
    scale = max(1.0, inner(s.y, s.y)[0] ** 0.5)
    nowhere = trees.zeros_like(s.params)
    for name, tangent, dparams in (
        ("inputs", s.dx, nowhere),
        ("parameters", zeros_or_none(s.dx), s.dparams),
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


def vectors(s: Subject) -> None:
    """K vectors backpropagated together give what each alone gives; K may be 0."""
    for number in (3, 1):
        v = s.vectors(number)
        dx, gradient = s.backward(v)
        for k in range(number):
            require_close(
                f"vector {k} of {number}",
                trees.tree_map(lambda a, k=k: None if a is None else a[k, ...], (dx, gradient)),
                "the same vector alone",
                s.backward(v[k, ...]),
                EXACT,
            )
    dx, gradient = s.backward(s.vectors(1)[:0, ...])
    expected = {path: (0, *found) for path, found in shapes((s.dx, s.params)).items()}
    require(
        shapes((dx, gradient)) == expected,
        f"no vectors: expected shapes {expected}, got {shapes((dx, gradient))}",
    )


def per_example(s: Subject) -> None:
    """The gradients of single examples are those of batches of one, and sum to the gradient.

    Where examples influence each other there is no batch of one: the gradient is what vectors
    that are zero for all examples but one give, added up.
    """
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
    if s.layer.couples_examples:
        examples = range(s.x.shape[0])
        parts = [s.backward(only(s.g, n))[1] for n in examples]
        total = functools.reduce(functools.partial(trees.axpy, 1.0), parts)
        require_close(
            "the sum over vectors of one example each", total, "all", s.backward(s.g)[1], EXACT
        )
        return
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


def coupling(s: Subject) -> None:
    """couples_examples says whether an example's output depends on the other examples."""
    n = (s.x.shape[0] + 1) // 2
    if n == s.x.shape[0]:
        return  # there is no other example
    xp = array_namespace(s.x)
    others = [s.x[:1, ...]] * (s.x.shape[0] - n)
    y = s.value(s.params, xp.concat([s.x[:n, ...], *others]))[:n, ...]
    change = float(xp.max(xp.abs(y - s.y[:n, ...])))
    most = EXACT * float(xp.max(xp.abs(s.y)))
    if s.layer.couples_examples:
        require(change > most, "outputs do not change with those of other examples")
    else:
        require(change <= most, f"outputs change by {change:.3g} with the other examples")


def evaluation(s: Subject) -> None:
    """The form for use after training makes the same of the same inputs, and couples nothing."""
    fixed, y = s.layer.evaluation(s.params, s.x)
    require_close("what evaluation returns", y, "the outputs", s.y, EXACT)
    require(not fixed.couples_examples, f"the examples of {fixed!r} influence each other")
    first = s.x[:1, ...]
    for name, x, expected in (("all examples", s.x, s.y), ("one example", first, s.y[:1, ...])):
        z, _ = fixed.forward(s.params, x)
        require_close(f"the evaluation form on {name}", z, "the outputs", expected, EXACT)


def random_numbers(s: Subject) -> None:
    """forward draws from the stream that it is given, and makes the same of equal ones."""

    def results(stream: Rng) -> Tree:
        y, cache = s.layer.forward(s.params, s.x, stream)
        return y, s.backward_at(s.params, cache, s.g)

    first, second = s.rng.child("random"), s.rng.child("random")
    require_same_arrays("results by a stream", results(first), "by an equal one", results(second))


def take(s: Subject) -> None:
    """A cache cut to some examples is the cache of these examples; coupled ones are refused."""
    if s.layer.couples_examples:
        try:
            s.layer.take(s.cache, slice(0, 1))
        except InputError:
            return
        require(False, "the cache of examples that influence each other was cut")
    rows = slice(0, (s.x.shape[0] + 1) // 2)
    cut = without_writing(lambda c: s.layer.take(c, rows), "take", s.cache)
    y, fresh = s.layer.forward(s.params, s.x[rows, ...])
    require_close("outputs", s.y[rows, ...], "those of the first examples", y, EXACT)
    require_close("the cut cache", cut, "the cache of the first examples", fresh, EXACT)
    results = []
    for cache in (cut, fresh):
        dx = None if s.dx is None else s.dx[rows, ...]
        dy = s.layer.jvp(s.params, cache, dx, s.dparams)
        found = s.backward_at(s.params, cache, s.g[rows, ...])
        results.append((*found, or_zeros(dy, y)))
    require_close("derivatives by the cut cache", results[0], "by a fresh one", results[1], EXACT)


def absent_tangents(s: Subject) -> None:
    """None stands for a tangent of zeros; without `wrt_input` only the statistics come."""
    require_close(
        "jvp with dx = None",
        s.jvp(None, s.dparams),
        "with dx = 0",
        s.jvp(zeros_or_none(s.dx), s.dparams),
        EXACT,
    )
    _, gradient = s.backward(s.g)
    dx, statistics = s.layer.backward(s.params, s.cache, s.g, wrt_input=False)
    require(dx is None, "backward(wrt_input=False) returned an input derivative")
    require_close(
        "the gradient with wrt_input=False", gradients(statistics), "with it", gradient, EXACT
    )


def backward_jvp(s: Subject) -> None:
    """backward_jvp agrees with central differences of backward; a layer may refuse it."""
    if not has_backward_jvp(s):
        return

    def exact(dx: Array | None, dparams: Tree, dg: Array | None) -> tuple[Array | None, Tree]:
        ddx, dgradient = s.layer.backward_jvp(s.params, s.cache, s.g, dx, dparams, dg)
        return (None if s.whole else or_zeros(ddx, s.x)), dgradient

    def at(h: float) -> tuple[Array | None, Tree]:
        params = moved(s.params, h, s.dparams)
        _, cache = s.layer.forward(params, moved(s.x, h, s.dx))
        return s.backward_at(params, cache, moved(s.g, h, s.dg))

    quotient = trees.tree_map(
        lambda a, b: None if a is None else (a - b) / (2 * STEP), at(STEP), at(-STEP)
    )
    scale = max(1.0, inner(at(0.0), at(0.0))[0] ** 0.5)
    require_close(
        "backward_jvp",
        exact(s.dx, s.dparams, s.dg),
        "the difference quotient of backward",
        quotient,
        FINITE_DIFFERENCE,
        scale,
    )
    zx, zg = zeros_or_none(s.dx), array_namespace(s.y).zeros_like(s.y)
    for dx, dg in ((None, s.dg), (s.dx, None), (None, None)):
        given = ", ".join(f"{n} = None" for n, v in (("dx", dx), ("dg", dg)) if v is None)
        require_close(
            f"backward_jvp with {given}",
            exact(dx, s.dparams, dg),
            "with zeros",
            exact(zx if dx is None else dx, s.dparams, zg if dg is None else dg),
            EXACT,
        )


def has_backward_jvp(s: Subject) -> bool:
    try:
        s.layer.backward_jvp(s.params, s.cache, s.g, s.dx, s.dparams, None)
    except CurvatureError:
        return False
    return True


def layout(s: Subject) -> None:
    """Arrays that are not contiguous give the same results."""

    def spread(x: Array | None) -> Any:
        """The same numbers, every second one along the first and last axes of a larger array."""
        if x is None or x.ndim == 0:
            return x
        ends = {0, x.ndim - 1}
        shape = tuple(2 * n if i in ends else n for i, n in enumerate(x.shape))
        wide = array_namespace(x).zeros(shape, dtype=x.dtype, device=x.device)
        every_second = tuple(slice(None, None, 2 if i in ends else 1) for i in range(x.ndim))
        wide[every_second] = x
        return wide[every_second]

    params = trees.tree_map(spread, s.params)
    y, cache = s.layer.forward(params, spread(s.x))
    found = s.backward_at(params, cache, spread(s.g))
    dy = s.layer.jvp(params, cache, spread(s.dx), trees.tree_map(spread, s.dparams))
    require_close(
        "results with strided arrays",
        (y, *found, or_zeros(dy, s.y)),
        "with contiguous ones",
        (s.y, *s.backward(s.g), s.jvp(s.dx, s.dparams)),
        EXACT,
    )


def single_precision(s: Subject) -> None:
    """Single precision stays single precision, and is close to double precision."""
    params, x, g, dparams = single((s.params, s.x, s.g, s.dparams))
    dx = None if s.dx is None else single(s.dx)
    y, cache = s.layer.forward(params, x)
    ddx, gradient = s.backward_at(params, cache, g)
    results = {
        "outputs": y,
        "input derivatives": ddx,
        "gradients": gradient,
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
        coupling,
        evaluation,
        random_numbers,
        take,
        absent_tangents,
        backward_jvp,
        layout,
        single_precision,
    )
}
"""The laws by name; the first line of a law's docstring states it."""
