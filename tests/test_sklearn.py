"""The estimators against the checks of scikit-learn, and what it does not check."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from sklearn.utils.estimator_checks import parametrize_with_checks

from kfac_np import Adam, Dense, Sequential, Tanh
from kfac_np.errors import InputError
from kfac_np.sklearn import KFACClassifier, KFACRegressor

pytestmark = pytest.mark.filterwarnings("ignore")  # its checks raise warnings on purpose


@parametrize_with_checks([KFACClassifier((16,), max_iter=60), KFACRegressor((16,), max_iter=60)])
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_a_table_in_natural_units():
    x, y = load_wine(return_X_y=True)
    assert KFACClassifier(random_state=0).fit(x, y).score(x, y) == 1.0
    x, y = load_diabetes(return_X_y=True, scaled=False)
    model = KFACRegressor(random_state=0, early_stopping=True).fit(x, y)
    assert model.score(x, y) > 0.4
    assert len(model.validation_losses_) == model.n_iter_ == len(model.loss_curve_)


def test_pipelines_and_grid_searches():
    x, y = load_wine(return_X_y=True)
    pipeline = make_pipeline(PolynomialFeatures(2), KFACClassifier((8,), max_iter=10))
    search = GridSearchCV(pipeline, {"kfacclassifier__alpha": [1e-4, 1.0]}, cv=2).fit(x, y)
    assert search.best_score_ > 0.9


def test_going_on():
    """`warm_start` and `partial_fit` go on where the parameters are; `fit` alone begins anew."""
    x, y = load_wine(return_X_y=True)
    model = KFACClassifier(max_iter=5, warm_start=True, random_state=0).fit(x, y)
    first = model.loss_
    assert model.fit(x, y).loss_ < first
    assert model.n_iter_ == 10
    parts = KFACClassifier(random_state=0)
    for _ in range(5):
        parts.partial_fit(x, y, classes=[0, 1, 2])
    assert parts.n_iter_ == 5
    assert clone(model).set_params(warm_start=False).fit(x, y).n_iter_ == 5


def test_several_targets_and_labels():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 3))
    y = np.stack([100 + x[:, 0] * x[:, 1], 1e-3 * x[:, 2]], axis=1)
    assert KFACRegressor(random_state=0).fit(x, y).score(x, y) > 0.95
    labels = (x > 0).astype(int)
    model = KFACClassifier(random_state=0).fit(x, labels)
    assert model.score(x, labels) > 0.9
    assert model.predict_proba(x).shape == (200, 3)


def test_a_network_and_an_optimizer_of_ones_own():
    x, y = load_wine(return_X_y=True)
    network = Sequential(Dense(13, 8), Tanh(), Dense(8, 3))
    optimizer = functools.partial(Adam, rate=0.03)
    model = KFACClassifier(network=network, optimizer=optimizer, random_state=0)
    assert model.fit(x, y).score(x, y) > 0.95


def test_the_end_before_the_loss_has_settled_is_said():
    x, y = load_wine(return_X_y=True)
    with pytest.warns(ConvergenceWarning, match="max_iter = 2"):
        KFACClassifier(max_iter=2).fit(x, y)


@pytest.mark.parametrize(
    "setting",
    [
        {"activation": "cosine"},
        {"alpha": -1.0},
        {"max_iter": 0},
        {"batch_size": "whole"},
        {"validation_fraction": 1.0},
        {"optimizer": "adam"},
        {"network": Dense(1, 7)},
        {"network": 3},
    ],
    ids=str,
)
def test_settings_are_checked_by_name(setting: dict[str, object]):
    with pytest.raises(InputError, match=next(iter(setting))):
        KFACRegressor(**setting).fit(np.ones((4, 1)), np.arange(4.0))
