"""A law that nothing can break is no law: layers with one mistake each are found out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from toys import MixPositions

from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import Dense, Embedding, Layer, Sequential, Tanh
from kfac_np.statistics import AffineStatistics
from kfac_np.testing import LAYER_LAWS, check_layer

BACKEND = get_backend("numpy", "float64")
DENSE, EMBEDDING = Dense(3, 2), Embedding(4, 2)
W = Rng(1).normal((2, 4), BACKEND)
X = Rng(2).normal((4, 3), BACKEND)


@dataclass(frozen=True)
class Wrapped(Layer):
    """Dense(3, 2), handed on; a subclass makes one mistake."""

    def init(self, rng, backend):
        return DENSE.init(rng, backend)

    def output_shape(self, shape):
        return DENSE.output_shape(shape)

    def forward(self, params, x, rng=None):
        return DENSE.forward(params, x)

    def backward(self, params, cache, g, wrt_input=True):
        return DENSE.backward(params, cache, g, wrt_input)

    def jvp(self, params, cache, dx, dparams):
        return DENSE.jvp(params, cache, dx, dparams)

    def backward_jvp(self, params, cache, g, dx, dparams, dg):
        return DENSE.backward_jvp(params, cache, g, dx, dparams, dg)


def test_the_wrapped_layer_is_right():
    check_layer(Wrapped(), W, X)


class DrawsFromNowhere(Wrapped):
    def init(self, rng, backend):
        return Backend.of(X).asarray(np.random.default_rng().standard_normal((2, 4)))


class InitOfAnotherShape(Wrapped):
    def init(self, rng, backend):
        return DENSE.init(rng, backend)[:, :-1]


class InitInSingle(Wrapped):
    def init(self, rng, backend):
        return DENSE.init(rng, backend).astype(np.float32)


class PromisesAnotherShape(Wrapped):
    def output_shape(self, shape):
        return (*shape[:-1], 3)


class KeepsAnAxis(Wrapped):
    def jvp(self, params, cache, dx, dparams):
        return DENSE.jvp(params, cache, dx, dparams)[None, ...]


class OutputsInSingle(Wrapped):
    def forward(self, params, x, rng=None):
        y, cache = DENSE.forward(params, x)
        return y.astype(np.float32), cache


class SizeUnknown(Wrapped):
    def backward_size(self, shape):
        return None


class WritesToItsCache(Wrapped):
    def backward(self, params, cache, g, wrt_input=True):
        cache *= 1.0
        return DENSE.backward(params, cache, g, wrt_input)


class RemembersCalls(Wrapped):
    """Not by writing to arrays, but to what lies beside them."""

    def forward(self, params, x, rng=None):
        y, a = DENSE.forward(params, x)
        return y, (a, {"calls": [0]})

    def backward(self, params, cache, g, wrt_input=True):
        a, state = cache
        state["calls"][0] += 1
        return DENSE.backward(params, a, state["calls"][0] * g, wrt_input)

    def jvp(self, params, cache, dx, dparams):
        return DENSE.jvp(params, cache[0], dx, dparams)

    def backward_jvp(self, params, cache, g, dx, dparams, dg):
        return DENSE.backward_jvp(params, cache[0], g, dx, dparams, dg)


class DividesByN(Wrapped):
    def backward(self, params, cache, g, wrt_input=True):
        dx, s = DENSE.backward(params, cache, g, wrt_input)
        return dx, AffineStatistics(s.a, s.g / s.num_examples)


class ForgetsTheInputTangent(Wrapped):
    def jvp(self, params, cache, dx, dparams):
        return DENSE.jvp(params, cache, None, dparams)


class TwiceTheDerivative(Wrapped):
    """Wrong in the same way forwards and backwards."""

    def jvp(self, params, cache, dx, dparams):
        return 2.0 * DENSE.jvp(params, cache, dx, dparams)

    def backward(self, params, cache, g, wrt_input=True):
        return DENSE.backward(params, cache, 2.0 * g, wrt_input)


class SumsTheVectors(Wrapped):
    def backward(self, params, cache, g, wrt_input=True):
        if g.ndim == 3:
            g = np.broadcast_to(g.sum(axis=0, keepdims=True), g.shape)
        return DENSE.backward(params, cache, g, wrt_input)


class OneVectorAtLeast(Wrapped):
    def backward(self, params, cache, g, wrt_input=True):
        if g.shape[0] == 0:
            g = np.zeros((1, *g.shape[1:]))
        return DENSE.backward(params, cache, g, wrt_input)


@dataclass(frozen=True)
class WeighsExamples:
    """Statistics whose parts do not add up to the whole."""

    inner: AffineStatistics

    def gradient(self):
        return self.inner.gradient()

    def per_example(self):
        return self.inner.per_example() / self.inner.num_examples


class PartsThatDoNotAddUp(Wrapped):
    def backward(self, params, cache, g, wrt_input=True):
        dx, s = DENSE.backward(params, cache, g, wrt_input)
        return dx, WeighsExamples(s)


class MixesExamples(Wrapped):
    """Consistent, but example n sees the next one: no batch of one can agree."""

    def backward(self, params, cache, g, wrt_input=True):
        dx, s = DENSE.backward(params, cache, g, wrt_input)
        return dx, AffineStatistics(np.roll(s.a, 1, axis=0), np.roll(s.g, 1, axis=-3))


class SubtractsTheBatchMean(Wrapped):
    """Consistent as far as derivatives at one batch go, but for what it says about itself."""

    def forward(self, params, x, rng=None):
        y, cache = DENSE.forward(params, x)
        return y - y.mean(axis=0), cache

    def jvp(self, params, cache, dx, dparams):
        dy = DENSE.jvp(params, cache, dx, dparams)
        return dy - dy.mean(axis=0)

    def backward(self, params, cache, g, wrt_input=True):
        return DENSE.backward(params, cache, g - g.mean(axis=-2, keepdims=True), wrt_input)


class SaysThatItCouples(Wrapped):
    couples_examples = True


class CutsWhatIsCoupled(SubtractsTheBatchMean):
    couples_examples = True

    def take(self, cache, rows):
        return cache[rows]


class IsAnotherOneAfterTraining(Wrapped):
    def evaluation(self, params, x):
        return Sequential(DENSE), DENSE.forward(params, 2.0 * x)[0]


class StaysCoupledAfterTraining(SubtractsTheBatchMean):
    couples_examples = True

    def evaluation(self, params, x):
        return self, self.forward(params, x)[0]


class DrawsFromElsewhere(Wrapped):
    def forward(self, params, x, rng=None):
        if rng is None:
            return DENSE.forward(params, x)
        return DENSE.forward(params, x + Rng(id(rng)).normal(x.shape, BACKEND))


class TakesEverything(Wrapped):
    def take(self, cache, rows):
        return cache


class NoneIsOne(Wrapped):
    def jvp(self, params, cache, dx, dparams):
        return DENSE.jvp(
            params, cache, np.ones_like(X[: len(cache)]) if dx is None else dx, dparams
        )


class AlwaysTheInputDerivative(Wrapped):
    def backward(self, params, cache, g, wrt_input=True):
        return DENSE.backward(params, cache, g, True)


class NeverTheInputDerivative(Wrapped):
    def backward(self, params, cache, g, wrt_input=True):
        return DENSE.backward(params, cache, g, False)


class ForgetsTheSecondDerivative(Wrapped):
    def backward_jvp(self, params, cache, g, dx, dparams, dg):
        return DENSE.backward_jvp(params, cache, g, None, dparams, dg)


class NeedsContiguousArrays(Wrapped):
    def forward(self, params, x, rng=None):
        return DENSE.forward(params, x if x.flags.c_contiguous else 0.0 * x)


class ComputesInDouble(Wrapped):
    def forward(self, params, x, rng=None):
        return DENSE.forward(np.asarray(params, dtype=float), np.asarray(x, dtype=float))


class LosesDigits(Wrapped):
    def forward(self, params, x, rng=None):
        coarse = x if x.dtype == np.float64 else np.round(x, 2)
        return DENSE.forward(params, coarse)


MISTAKES = [
    (DrawsFromNowhere(), "init", "parameters drawn once and drawn again differ"),
    (InitOfAnotherShape(), "init", "init draws parameters of shapes {'': (2, 3)}, expected"),
    (InitInSingle(), "init", "as float32 on cpu, expected float64"),
    (PromisesAnotherShape(), "shape", "output_shape promises (4, 3), but outputs have (4, 2)"),
    (KeepsAnAxis(), "shape", "jvp have shape (1, 4, 2), expected (4, 2)"),
    (OutputsInSingle(), "shape", "outputs are float32 on cpu, expected float64"),
    (SizeUnknown(), "shape", "backward_size: expected a count, got None"),
    (WritesToItsCache(), "purity", "backward writes to one of its arguments"),
    (RemembersCalls(), "purity", "backward: an argument before and after differ at 1.calls.0"),
    (DividesByN(), "adjointness", "in the parameters ⟨g, J v⟩ = "),
    (ForgetsTheInputTangent(), "adjointness", "in the inputs ⟨g, J v⟩ = 0 by jvp"),
    (ForgetsTheInputTangent(), "finite_differences", "jvp in the inputs and the difference"),
    (TwiceTheDerivative(), "finite_differences", "jvp in the inputs and the difference"),
    (DividesByN(), "finite_differences", "the derivative in the parameters is"),
    (SumsTheVectors(), "vectors", "vector 0 of 3 and the same vector alone differ by"),
    (OneVectorAtLeast(), "vectors", "no vectors: expected shapes"),
    (PartsThatDoNotAddUp(), "per_example", "the sum of per-example gradients and the gradient"),
    (MixesExamples(), "per_example", "the gradient of example 0 and that of a batch of it"),
    (SubtractsTheBatchMean(), "coupling", "with the other examples"),
    (SaysThatItCouples(), "coupling", "outputs do not change with those of other examples"),
    (CutsWhatIsCoupled(), "take", "the cache of examples that influence each other was cut"),
    (IsAnotherOneAfterTraining(), "evaluation", "what evaluation returns and the outputs differ"),
    (StaysCoupledAfterTraining(), "evaluation", "influence each other"),
    (DrawsFromElsewhere(), "random_numbers", "by a stream and by an equal one differ"),
    (TakesEverything(), "take", "the cut cache has the shapes {'': (4, 4)}, but the cache"),
    (NoneIsOne(), "absent_tangents", "jvp with dx = None and with dx = 0 differ by"),
    (AlwaysTheInputDerivative(), "absent_tangents", "returned an input derivative"),
    (NeverTheInputDerivative(), "adjointness", "backward returned no input derivative"),
    (ForgetsTheSecondDerivative(), "backward_jvp", "backward_jvp and the difference quotient"),
    (NeedsContiguousArrays(), "layout", "results with strided arrays and with contiguous ones"),
    (ComputesInDouble(), "single_precision", "expected dtype float32 for inputs of that dtype"),
    (LosesDigits(), "single_precision", "outputs in single precision and in double precision"),
]


@pytest.mark.parametrize(
    ("layer", "law", "message"),
    MISTAKES,
    ids=lambda value: type(value).__name__ if isinstance(value, Layer) else "",
)
def test_layers_with_a_mistake(layer: Layer, law: str, message: str):
    for laws in ([law], None):
        with pytest.raises(AssertionError) as error:
            check_layer(layer, W, X, laws=laws)
        if laws:
            assert f"{layer!r} breaks the law {law!r} (" in str(error.value)
            assert message in str(error.value)


def test_every_law_of_a_layer_has_been_broken():
    assert {law for _, law, _ in MISTAKES} == set(LAYER_LAWS)


def test_coupled_examples_are_no_mistake():
    @dataclass(frozen=True)
    class Coupled(SubtractsTheBatchMean):
        couples_examples = True

        def evaluation(self, params, x):
            mean = DENSE.forward(params, x)[0].mean(axis=0)
            return Shifted(mean), DENSE.forward(params, x)[0] - mean

        backward_jvp = Layer.backward_jvp

    @dataclass(frozen=True, eq=False)
    class Shifted(Wrapped):
        mean: np.ndarray

        def forward(self, params, x, rng=None):
            y, cache = DENSE.forward(params, x)
            return y - self.mean, cache

    check_layer(Coupled(), W, X)


class Whole(Wrapped):
    """An embedding that claims a derivative with respect to its integers."""

    def init(self, rng, backend):
        return EMBEDDING.init(rng, backend)

    def output_shape(self, shape):
        return EMBEDDING.output_shape(shape)

    def forward(self, params, x, rng=None):
        return EMBEDDING.forward(params, x)

    def backward(self, params, cache, g, wrt_input=True):
        dx, s = EMBEDDING.backward(params, cache, g, wrt_input)
        return (g[..., 0] if wrt_input else dx), s

    def jvp(self, params, cache, dx, dparams):
        return EMBEDDING.jvp(params, cache, dx, dparams)


def test_whole_numbers_have_no_derivative():
    params, x = EMBEDDING.init(Rng(1), BACKEND), np.asarray([[1, 0], [3, 3], [0, 2]])
    check_layer(EMBEDDING, params, x)
    check_layer(Sequential(EMBEDDING, Tanh()), (params, ()), x)
    with pytest.raises(AssertionError, match="a derivative with respect to integers"):
        check_layer(Whole(), params, x)


def test_a_layer_may_refuse_hessian_products():
    @dataclass(frozen=True)
    class NoHessian(Wrapped):
        backward_jvp = Layer.backward_jvp

    check_layer(NoHessian(), W, X)


def test_errors_of_a_layer_pass_through():
    class Fails(Wrapped):
        def backward(self, params, cache, g, wrt_input=True):
            raise ShapeError("Fails: something about shapes")

    for laws in (None, ["purity"]):
        with pytest.raises(ShapeError, match="something about shapes"):
            check_layer(Fails(), W, X, laws=laws)


@pytest.mark.parametrize(
    ("params", "x", "message"),
    [
        (W.astype(np.float32), X, "params: expected dtype float64, got float32"),
        ((W, None), X, "params.1: expected an array, got NoneType"),
        (W, np.nan * X, "x: expected finite values, got 12 of 12"),
        (W, X[0], r"x: expected shape \(N, ...\) without an empty axis, got \(3,\)"),
        (W, X[:0], r"x: expected shape \(N, ...\) without an empty axis, got \(0, 3\)"),
    ],
)
def test_what_cannot_be_checked(params, x, message: str):
    with pytest.raises(InputError, match=message):
        check_layer(DENSE, params, x)


def test_unknown_laws():
    with pytest.raises(InputError, match=r"laws: expected some of init, shape, .*; got gravity"):
        check_layer(DENSE, W, X, laws=["gravity"])


def test_the_seed_changes_the_directions_only(backend: Backend):
    net = Sequential(Dense(2, 3), Tanh(), MixPositions())
    params, x = net.init(Rng(0), backend), Rng(1).normal((2, 4, 2), backend)
    for seed in range(3):
        check_layer(net, params, x, seed=seed)
