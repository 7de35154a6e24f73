"""A law that nothing can break is no law: losses with one mistake each are found out."""

from __future__ import annotations

import numpy as np
import pytest

from kfac_np.backend import Rng, get_backend
from kfac_np.errors import InputError
from kfac_np.losses import PoissonLogRate, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.losses.base import DiagonalLoss
from kfac_np.testing import LOSS_LAWS, check_loss

BACKEND = get_backend("numpy", "float64")
Z = Rng(3).normal((4, 3), BACKEND)
T = Rng(4).normal((4, 3), BACKEND)


class Wrapped(DiagonalLoss):
    """½‖z - t‖², handed on; a subclass makes one mistake."""

    inner = SquaredError()

    def check(self, z, t, checks):
        self.inner.check(z, t, checks)

    def value(self, z, t):
        return self.inner.value(z, t)

    def gradient(self, z, t):
        return self.inner.gradient(z, t)

    def hessian_diagonal(self, z):
        return self.inner.hessian_diagonal(z)

    def sample_targets(self, rng, z):
        return self.inner.sample_targets(rng, z)


def test_the_wrapped_loss_is_right():
    check_loss(Wrapped(), Z, T)


class WithoutTheHalf(Wrapped):
    """Derivatives and all, so that only the samples tell."""

    def value(self, z, t):
        return 2.0 * self.inner.value(z, t)

    def gradient(self, z, t):
        return 2.0 * self.inner.gradient(z, t)

    def hessian_diagonal(self, z):
        return 2.0 * self.inner.hessian_diagonal(z)


class KeepsTheAxis(Wrapped):
    def value(self, z, t):
        return self.inner.value(z, t)[..., None]


class InDouble(Wrapped):
    def gradient(self, z, t):
        return np.asarray(self.inner.gradient(z, t), dtype=np.float64)


class InSingle(Wrapped):
    def gradient(self, z, t):
        return self.inner.gradient(z, t).astype(np.float32)


class TooManyColumns(Wrapped):
    def fisher_factor(self, z, start=0, stop=None):
        return np.concatenate([self.inner.fisher_factor(z), np.zeros((1, *z.shape))])[start:stop]

    def num_columns(self, z):
        return z.shape[-1] + 1


class WritesToTheOutputs(Wrapped):
    def gradient(self, z, t):
        z -= t
        return z


class MeanOverOutputs(Wrapped):
    def value(self, z, t):
        return self.inner.value(z, t) / z.shape[-1]


class WrongHessian(Wrapped):
    def hessian_diagonal(self, z):
        return 1.0 + 0.1 * z**2


class AsymmetricHessian(Wrapped):
    def hessian_product(self, z, u):
        return u + (u[..., 1:2] - u[..., :1]) * (np.arange(3) == 0)


class VarianceForRoot(Wrapped):
    def hessian_diagonal(self, z):
        return 0.0 * z + 4.0

    def fisher_factor(self, z, start=0, stop=None):
        return 2.0 * self.inner.fisher_factor(z, start, stop) ** 2 * 2.0


class IgnoresTheRange(Wrapped):
    def fisher_factor(self, z, start=0, stop=None):
        size = (z.shape[-1] if stop is None else stop) - start
        return self.inner.fisher_factor(z, 0, size)


class MeanOverExamples(Wrapped):
    def gradient(self, z, t):
        return self.inner.gradient(z, t) / z.shape[0]


class BiasedSamples(Wrapped):
    def sample_targets(self, rng, z):
        return self.inner.sample_targets(rng, z) + 0.2


class NarrowSamples(Wrapped):
    def sample_targets(self, rng, z):
        return z + 0.8 * (self.inner.sample_targets(rng, z) - z)


class SamplesThatAreNoTargets(Wrapped):
    def sample_targets(self, rng, z):
        return self.inner.sample_targets(rng, z)[:-1]


class SamplesFromNowhere(Wrapped):
    def sample_targets(self, rng, z):
        return z + np.random.default_rng().standard_normal(z.shape)


class Overflows(Wrapped):
    def gradient(self, z, t):
        with np.errstate(all="ignore"):
            return self.inner.gradient(z, t) + 0.0 * np.exp(z)


class AcceptsAnything(Wrapped):
    def check(self, z, t, checks): ...


class AcceptsNaN(Wrapped):
    def check(self, z, t, checks):
        self.inner.check(z, np.nan_to_num(t), checks)


MISTAKES = [
    (KeepsTheAxis(), "shape", "value has shape (4, 1), expected (4,)"),
    (InSingle(), "shape", "gradient is float32 on cpu, expected float64"),
    (TooManyColumns(), "shape", "num_columns: expected 1..3, got 4"),
    (WritesToTheOutputs(), "purity", "gradient writes to one of its arguments"),
    (MeanOverOutputs(), "gradient", "gradient · u and the difference quotient differ by"),
    (WrongHessian(), "hessian", "hessian_product and the difference quotient of the gradient"),
    (AsymmetricHessian(), "hessian", "differ by"),
    (VarianceForRoot(), "fisher_factor", "S Sᵀ and the Hessian by hessian_product differ by"),
    (IgnoresTheRange(), "column_ranges", "columns in ranges of 1 and all differ"),
    (MeanOverExamples(), "terms", "the gradient of example 0 alone and in the batch differ"),
    (WithoutTheHalf(), "sampled_targets", "the mean square of the gradient over 4000 draws is"),
    (BiasedSamples(), "sampled_targets", "the mean of the gradient over 4000 draws is"),
    (NarrowSamples(), "sampled_targets", "standard errors from the Hessian"),
    (SamplesThatAreNoTargets(), "sampled_targets", "sampled targets are not valid: SquaredError"),
    (SamplesFromNowhere(), "sampled_targets", "targets drawn once and drawn again from the"),
    (Overflows(), "large_outputs", "gradient is not finite for outputs of ±10000"),
    (AcceptsAnything(), "bad_targets", "check accepts targets with one example too few"),
    (AcceptsNaN(), "bad_targets", "check accepts targets with NaN"),
    (InDouble(), "single_precision", "gradient: expected dtype float32, got float64"),
]


@pytest.mark.parametrize(
    ("loss", "law", "message"),
    MISTAKES,
    ids=lambda value: type(value).__name__ if isinstance(value, Wrapped) else "",
)
def test_losses_with_a_mistake(loss, law: str, message: str):
    with pytest.raises(AssertionError) as error:
        check_loss(loss, Z, T, laws=[law])
    assert f"breaks the law {law!r} (" in str(error.value)
    assert message in str(error.value)
    with pytest.raises(AssertionError):
        check_loss(loss, Z, T)


def test_every_law_of_a_loss_has_been_broken():
    assert {law for _, law, _ in MISTAKES} == set(LOSS_LAWS)


def test_losses_that_cannot_be_checked():
    with pytest.raises(InputError, match=r"z: expected shape \(N, \[S,\] C\) without an empty"):
        check_loss(SquaredError(), Z[0], T[0])
    with pytest.raises(InputError, match="z: expected dtype float64, got float32"):
        check_loss(SquaredError(), Z.astype(np.float32), T)
    with pytest.raises(InputError, match=r"laws: expected some of shape, .*; got gravity"):
        check_loss(SquaredError(), Z, T, laws=["gravity"])


def test_poisson_rates_are_finite_up_to_a_limit():
    loss, t = PoissonLogRate(), np.ones((4, 3))
    check_loss(loss, Z, t, largest=700.0)
    with pytest.raises(AssertionError, match="value is not finite"), np.errstate(over="ignore"):
        check_loss(loss, Z, t, largest=710.0)


@pytest.mark.parametrize("seed", range(5))
def test_honest_losses_pass_whatever_the_seed(seed: int):
    t = np.asarray([0, 1, 2, 0])
    check_loss(SoftmaxCrossEntropy(), Z, t, seed=seed)
    check_loss(SigmoidCrossEntropy(), Z, 0.0 * T, seed=seed)
