"""Every law of a loss, on every loss, on every backend; and losses against their definitions."""

from __future__ import annotations

import autograd
import numpy as np
import pytest
from cases import LOSSES, LossCase
from hypothesis import given
from hypothesis import strategies as st
from references.losses import term

from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.losses import PoissonLogRate, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.testing import LOSS_LAWS, check_loss
from kfac_np.testing._tools import check_targets

CLOSE = {"rtol": 1e-12, "atol": 1e-13}  # some hundred roundings


@pytest.mark.parametrize("law", LOSS_LAWS)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_loss_law(case: LossCase, law: str, backend: Backend):
    check_loss(case.loss, *case.build(backend), laws=[law], largest=case.largest)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_definition(case: LossCase, backend: Backend):
    z, t = case.host()
    c = z.shape[-1]
    rows = z.reshape(-1, c)
    targets = t.reshape(len(rows), *t.shape[z.ndim - 1 :])

    def each(function):
        return np.stack([function(case.loss, a, b) for a, b in zip(rows, targets, strict=True)])

    device_z, device_t = case.build(backend)
    value = to_numpy(case.loss.value(device_z, device_t))
    gradient = to_numpy(case.loss.gradient(device_z, device_t))
    factor = to_numpy(case.loss.fisher_factor(device_z)).reshape(-1, len(rows), c)
    hessian = each(autograd.hessian(term, 1))
    np.testing.assert_allclose(value.ravel(), each(term), **CLOSE)
    np.testing.assert_allclose(gradient.reshape(-1, c), each(autograd.grad(term, 1)), **CLOSE)
    np.testing.assert_allclose(np.einsum("kmc,kmd->mcd", factor, factor), hessian, **CLOSE)


@given(
    loss=st.sampled_from(
        [SquaredError(), SigmoidCrossEntropy(), SoftmaxCrossEntropy(), PoissonLogRate()]
    ),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple),
    scale=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_laws_for_all_shapes(loss, shape, scale: float, seed: int):
    backend = get_backend("numpy", "float64")
    z = scale * np.clip(Rng(seed).normal(shape, backend), -2.0, 2.0)
    t = loss.sample_targets(Rng(seed, "t"), z)
    laws = [law for law in LOSS_LAWS if law != "sampled_targets"]
    check_loss(loss, z, t, laws=laws, largest=500.0)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_class_numbers_are_one_hot_distributions(shape, backend: Backend, rng: Rng):
    loss, z = SoftmaxCrossEntropy(), rng.normal(shape, backend)
    classes = rng.integers(0, 3, shape[:-1])
    hard, soft = backend.asarray(classes), backend.asarray(np.eye(3)[classes])
    for method in (loss.value, loss.gradient):
        np.testing.assert_array_equal(to_numpy(method(z, hard)), to_numpy(method(z, soft)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64"])
def test_class_numbers_of_any_width(dtype: str, backend: Backend, rng: Rng):
    # 300 classes, more than some of these types can count.
    loss, z = SoftmaxCrossEntropy(), rng.normal((4, 300), backend)
    wide = backend.asarray(np.asarray([0, 5, 100, 127]))
    narrow = backend.asarray(np.asarray([0, 5, 100, 127], dtype=dtype))
    check_targets(loss, z, narrow)
    np.testing.assert_array_equal(
        to_numpy(loss.gradient(z, narrow)), to_numpy(loss.gradient(z, wide))
    )


def test_softmax_samples_only_what_is_possible(backend: Backend, rng: Rng):
    z = backend.asarray(
        [[0.0, -1e4, 0.0], [-1e4, 0.0, -1e4], [1e4, 0.0, 0.0], [0.0, 0.0, 1e4]] * 500
    )
    drawn = to_numpy(SoftmaxCrossEntropy().sample_targets(rng, z)).reshape(-1, 4).T
    assert [sorted(set(row)) for row in drawn.tolist()] == [[0, 2], [1], [0], [2]]
    assert drawn.dtype == np.int64


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_samples_are_the_same_on_every_backend(case: LossCase, backend: Backend):
    z, _ = case.host()
    here = case.loss.sample_targets(Rng(7), backend.asarray(z))
    np.testing.assert_allclose(to_numpy(here), case.loss.sample_targets(Rng(7), z), rtol=1e-15)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_gradients_at_sampled_targets(case: LossCase, backend: Backend):
    """Drawn in one: those at the targets that the same stream draws."""
    z, _ = case.build(backend)
    before = np.array(to_numpy(z))
    together = case.loss.sample_gradient(Rng(3), z)
    apart = case.loss.gradient(z, case.loss.sample_targets(Rng(3), z))
    assert Backend.of(together) == backend
    np.testing.assert_allclose(to_numpy(together), to_numpy(apart), rtol=1e-13, atol=1e-14)
    np.testing.assert_array_equal(to_numpy(z), before)


def test_values_in_closed_form(backend: Backend):
    # The scale of each loss, by hand: with the half, in nats, without the factorial.
    z, t = backend.asarray([[1.0, -2.0]]), backend.asarray([[3.0, 0.0]])
    half = backend.asarray([[0.5, 0.5]])
    assert float(SquaredError().value(z, t)[0]) == 4.0
    assert float(SigmoidCrossEntropy().value(0 * z, half)[0]) == pytest.approx(2 * np.log(2))
    assert float(SoftmaxCrossEntropy().value(0 * z, half)[0]) == pytest.approx(np.log(2))
    assert float(PoissonLogRate().value(z, t)[0]) == pytest.approx(np.e + np.exp(-2) - 3)
