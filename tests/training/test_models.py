"""Models by name, and what is measured of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kfac_np.backend import Rng, get_backend
from kfac_np.errors import ConfigError, ShapeError
from kfac_np.layers import Dense, Identity, Logistic, Tanh, fan_in_normal
from kfac_np.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.training.metrics import Metrics, evaluate, reconstruct
from kfac_np.training.models import autoencoder, mlp


def layers_of(objective: Objective) -> list[Any]:
    return list(objective.network.layers)  # type: ignore[attr-defined]


def test_the_curves_autoencoder_is_the_published_one() -> None:
    objective = autoencoder((784, 400, 200, 100, 50, 25, 6))
    dense = [layer for layer in layers_of(objective) if isinstance(layer, Dense)]
    sizes = [dense[0].d_in, *(layer.d_out for layer in dense)]
    assert sizes == [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]
    kinds = [type(layer) for layer in layers_of(objective)]
    code = layers_of(objective).index(dense[5])
    assert kinds[code + 1] is Dense  # the code is linear
    assert kinds[-1] is Dense  # and so are the logits
    assert kinds.count(Logistic) == 10
    assert isinstance(objective.loss, SigmoidCrossEntropy)


def test_the_sparse_initialisation_is_the_default() -> None:
    params = autoencoder((40, 20, 5)).network.init(Rng(0), get_backend())
    assert (np.count_nonzero(params[0], axis=1) == 15).all()


def test_models_take_their_parts() -> None:
    objective = autoencoder((8, 4, 2), Tanh(), fan_in_normal, SquaredError())
    assert isinstance(objective.loss, SquaredError)
    assert layers_of(objective)[1] == Tanh()
    assert layers_of(objective)[0].initializer is fan_in_normal
    classifier = mlp((8, 3))
    assert isinstance(classifier.loss, SoftmaxCrossEntropy)
    assert [type(layer) for layer in layers_of(classifier)] == [Dense]


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, 2.0), (3, True)])
def test_impossible_sizes(sizes: Any) -> None:
    for make in (autoencoder, mlp):
        with pytest.raises(ConfigError, match="expected at least two positive layer sizes"):
            make(sizes)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_metrics_are_means_over_examples_however_they_are_cut(chunk: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((7, 5))
    objective = Objective(Identity(), SigmoidCrossEntropy())
    measured = evaluate(objective, (), x, x, "reconstruction", chunk)
    p = 1 / (1 + np.exp(-x))
    assert measured.loss == pytest.approx(
        float(np.mean(np.sum(-x * np.log(p) - (1 - x) * np.log(1 - p), axis=1)))
    )
    assert measured.reconstruction_error == pytest.approx(float(np.mean(np.sum((p - x) ** 2, 1))))
    assert measured.accuracy is None
    t = np.asarray([0, 1, 2, 3, 4, 0, 1])
    measured = evaluate(
        Objective(Identity(), SoftmaxCrossEntropy()), (), x, t, "classification", chunk
    )
    assert measured.accuracy == pytest.approx(float(np.mean(x.argmax(1) == t)))
    soft = np.eye(5)[t]
    again = evaluate(
        Objective(Identity(), SoftmaxCrossEntropy()), (), x, soft, "classification", chunk
    )
    assert again.accuracy == measured.accuracy
    assert again.loss == pytest.approx(measured.loss)


def test_squared_error_reconstructs_by_the_output_itself() -> None:
    x = np.asarray([[0.25, 0.5]])
    objective = Objective(Identity(), SquaredError())
    assert reconstruct(objective, (), x).tolist() == x.tolist()
    assert evaluate(objective, (), x, x + 1, "reconstruction") == Metrics(1.0, 2.0)


def test_evaluating_nothing_is_an_error() -> None:
    x = np.zeros((0, 2))
    with pytest.raises(ShapeError, match="expected as many targets as inputs"):
        evaluate(Objective(Identity(), SquaredError()), (), x, x, "reconstruction")
