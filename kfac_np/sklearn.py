"""K-FAC as estimators of scikit-learn: `KFACClassifier` and `KFACRegressor`.

They keep to its conventions (`fit`, `predict`, `score`, `clone`, pipelines, grid searches) and need
it installed: the extra ``sklearn``.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self, final

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from kfac_np.backend import Rng, get_backend
from kfac_np.data import BatchState, MiniBatches
from kfac_np.errors import ConfigError
from kfac_np.fisher import Exact, MonteCarlo
from kfac_np.layers import Activation, Dense, Layer, Logistic, ReLU, Sequential, Tanh, glorot, he
from kfac_np.losses import Loss, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, Optimizer
from kfac_np.validation import (
    require_in,
    require_instance,
    require_integer,
    require_one_of,
    require_positive,
)

__all__ = ["KFACClassifier", "KFACEstimator", "KFACRegressor"]

ACTIVATIONS: dict[str, Activation] = {"relu": ReLU(), "tanh": Tanh(), "logistic": Logistic()}
_WHOLE, _BATCH = 1000, 500  # "auto": all examples up to so many, then batches of so many
_EXACT = 16  # outputs up to which the exact Fisher costs little

Examples = tuple[Any, Any, Any]
"""Inputs, targets for the loss, and weights."""


class KFACEstimator(BaseEstimator, ABC):  # type: ignore[misc]
    """What both estimators do; a subclass says what targets are.

    Inputs are standardised by the mean and the spread of those that `fit` was given first.

    Parameters
    ----------
    hidden_layer_sizes : tuple of int
    activation : {"relu", "tanh", "logistic"}
    network : Layer, optional
        Instead of a perceptron of these: from (N, n_features) to (N, n_outputs).
    optimizer : callable, optional
        Objective → optimiser, `kfac_np.Adam` for example; `KFAC` with its defaults when omitted.
    alpha : float
        α of the penalty (α / 2N) ‖θ‖², as that of scikit-learn's perceptrons.
    batch_size : int or "auto"
        "auto" takes all of up to 1000 examples, and 500 of more.
    max_iter : int
        Passes over the examples.
    tol : float
        Training ends when the loss has not fallen by this much for `n_iter_no_change` passes.
    n_iter_no_change : int
    early_stopping : bool
        Look at the loss of examples that are held back, and keep the parameters that were best.
    validation_fraction : float
        How many of the examples are held back.
    warm_start : bool
        Whether `fit` goes on from the parameters that it found before.
    random_state : int, RandomState or None
        Of parameters, batches and what is held back.
    verbose : bool
        Print the loss of each pass.

    Attributes
    ----------
    n_iter_ : int
        Passes over the examples.
    loss_ : float
        Mean loss of the last pass, with standardised targets for the regressor.
    loss_curve_ : list of float
        That of each pass.
    validation_losses_ : list of float
        With `early_stopping`, the loss of the examples held back after each pass.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from sklearn.model_selection import cross_val_score
    >>> x, y = load_wine(return_X_y=True)
    >>> scores = cross_val_score(KFACClassifier((16,), max_iter=30, random_state=0), x, y, cv=3)
    >>> bool(scores.mean() > 0.9)
    True
    """

    def __init__(
        self,
        hidden_layer_sizes: tuple[int, ...] = (64, 32),
        activation: str = "relu",
        *,
        network: Layer | None = None,
        optimizer: Callable[[Objective], Optimizer] | None = None,
        alpha: float = 1e-4,
        batch_size: int | str = "auto",
        max_iter: int = 200,
        tol: float = 1e-4,
        n_iter_no_change: int = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.network = network
        self.optimizer = optimizer
        self.alpha = alpha
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    @abstractmethod
    def _learn_targets(self, y: Any, w: Any) -> None:
        """Keep what there is to know of all targets: classes, or mean and spread."""

    @abstractmethod
    def _targets(self, y: Any) -> Any:
        """Targets for the loss."""

    @abstractmethod
    def _loss_and_outputs(self) -> tuple[Loss, int]:
        """The loss, and how many outputs the network has."""

    # ------------------------------------------------------------------------------ training

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train from new parameters, or, with `warm_start`, from those of the last call.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
        y : array-like, shape (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like, shape (n_samples,), optional

        Returns
        -------
        self
        """
        examples, seed = self._begin(X, y, sample_weight, anew=not self.warm_start)
        rows, held = Rng(seed, "order").permutation(len(examples[0])), None
        if self.early_stopping:
            rows, out = train_test_split(
                rows, test_size=self.validation_fraction, random_state=seed
            )
            held = _rows(examples, out)
        examples = _rows(examples, rows)
        self._train(examples, held, MiniBatches(len(examples[0]), seed))
        return self

    def _begin(self, x: Any, y: Any, sample_weight: Any, anew: bool) -> tuple[Examples, int]:
        """Check and prepare what came; new parameters if there are none, or if `anew`."""
        self._check_settings()
        anew = anew or not hasattr(self, "_state")
        examples = self._examples(x, y, sample_weight, anew)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if anew:
            self._start(examples, seed)
        return examples, seed

    def _check_settings(self) -> None:
        require_one_of("activation", self.activation, ACTIVATIONS)
        for size in np.atleast_1d(self.hidden_layer_sizes):
            require_integer("hidden_layer_sizes", size)
        if self.batch_size != "auto":
            require_integer("batch_size", self.batch_size)
        require_positive("alpha", self.alpha, zero=True)
        require_positive("tol", self.tol, zero=True)
        require_integer("max_iter", self.max_iter)
        require_integer("n_iter_no_change", self.n_iter_no_change)
        require_in("validation_fraction", self.validation_fraction, "(0, 1)")
        require_instance("network", self.network, Layer, optional=True)
        if self.optimizer is not None and not callable(self.optimizer):
            raise ConfigError(
                "optimizer: expected a function of the objective, `kfac_np.Adam` for example, got "
                f"{self.optimizer!r}"
            )

    def _examples(self, x: Any, y: Any, sample_weight: Any, anew: bool) -> Examples:
        """Inputs in units of their spread, targets for the loss, weights of mean 1."""
        x, y = validate_data(
            self, x, y, reset=anew, multi_output=True, y_numeric=isinstance(self, RegressorMixin),
            dtype=np.float64,
        )  # fmt: skip
        if y.ndim == 2 and y.shape[1] == 1:
            warnings.warn(
                "A column-vector y was passed when a 1d array was expected: it is taken as one",
                DataConversionWarning,
                stacklevel=5,
            )
            y = y[:, 0]
        w = np.ones(len(x))
        if sample_weight is not None:
            w = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
            x, y, w = x[w > 0.0], y[w > 0.0], w[w > 0.0]
        if anew:
            self._learn_targets(y, w)
            self._shift, self._unit = mean_and_spread(x, w)
            self._weight = w.sum()
        return (x - self._shift) / self._unit, self._targets(y), w / w.mean()

    def _start(self, examples: Examples, seed: int) -> None:
        loss, outputs = self._loss_and_outputs()
        network = self.network or self._perceptron(examples[0].shape[1], outputs)
        if (found := network.output_shape(examples[0].shape[1:])) != (outputs,):
            raise ConfigError(f"network: expected outputs of shape {(outputs,)}, got {found}")
        objective = Objective(network, loss)
        if self.optimizer is None:
            fisher = Exact() if outputs <= _EXACT else MonteCarlo(1)
            l2 = self.alpha / self._weight
            self._optimizer: Any = KFAC(objective, fisher=fisher, l2=l2, seed=seed)
        else:
            self._optimizer = self.optimizer(objective)
        backend = get_backend("numpy", "float64")
        self._state = self._optimizer.init(network.init(Rng(seed), backend))
        self.n_iter_ = 0
        self.loss_curve_: list[float] = []
        self.validation_losses_: list[float] = []

    def _perceptron(self, features: int, outputs: int) -> Sequential:
        hidden = [int(size) for size in np.atleast_1d(self.hidden_layer_sizes)]
        initializer = he if self.activation == "relu" else glorot
        layers: list[Layer] = []
        for d_in, d_out in zip([features, *hidden], hidden, strict=False):
            layers += [Dense(d_in, d_out, initializer=initializer), ACTIVATIONS[self.activation]]
        return Sequential(*layers, Dense([features, *hidden][-1], outputs, initializer=glorot))

    def _train(self, examples: Examples, held: Examples | None, batches: MiniBatches) -> None:
        place, best, waited = BatchState(), np.inf, 0
        for _ in range(self.max_iter):
            place, value = self._epoch(examples, batches, place)
            if held is not None:
                value = self._optimizer.objective.value(self._current(), *held)
                self.validation_losses_.append(value)
                if value < best:
                    self._params = self._current()
            waited = 0 if value < best - self.tol else waited + 1
            best = min(best, value)
            if waited >= self.n_iter_no_change:
                break
        else:
            warnings.warn(
                f"the loss was still falling after max_iter = {self.max_iter} passes",
                ConvergenceWarning,
                stacklevel=3,
            )
        if held is None:
            self._params = self._current()

    def _epoch(
        self, examples: Examples, batches: MiniBatches, place: BatchState
    ) -> tuple[BatchState, float]:
        """Steps through all examples once, and their mean loss."""
        n, epoch, losses = len(examples[0]), place.epoch, []
        size = self._size(n)
        while place.epoch == epoch:
            place, rows = batches.next(place, size)
            # All examples come in one order: K-FAC then knows that the objective is the same.
            batch = _rows(examples, rows) if size < n else examples
            self._state, report = self._optimizer.step(self._state, *batch)
            losses.append(report.loss)
        self.loss_ = float(np.mean(losses))
        self.n_iter_ += 1
        self.loss_curve_.append(self.loss_)
        if self.verbose:
            print(f"Pass {self.n_iter_}: loss {self.loss_:.6g}")
        return place, self.loss_

    def _size(self, n: int) -> int:
        if self.batch_size == "auto":
            return n if n <= _WHOLE else _BATCH
        return int(self.batch_size)

    def _current(self) -> Any:
        return self._state.params if self._state.average is None else self._state.average

    def _outputs(self, x: Any) -> Any:
        check_is_fitted(self)
        x = validate_data(self, x, reset=False, dtype=np.float64)
        network = self._optimizer.objective.network
        return network.forward(self._params, (x - self._shift) / self._unit)[0]

    def _go_on(self, x: Any, y: Any, sample_weight: Any) -> None:
        """One pass over these examples."""
        examples, seed = self._begin(x, y, sample_weight, anew=False)
        self._epoch(examples, MiniBatches(len(examples[0]), seed), BatchState())
        self._params = self._current()


@final
class KFACRegressor(RegressorMixin, KFACEstimator):  # type: ignore[misc]
    """A network with squared error, trained by K-FAC: a regressor of scikit-learn.

    Targets are standardised as inputs are; predictions are in the units that targets came in.
    Parameters and attributes are those of `KFACEstimator`.

    Examples
    --------
    >>> x = np.linspace(-2.0, 2.0, 200)[:, None]
    >>> model = KFACRegressor((16,), "tanh", random_state=0).fit(x, 500 + 100 * np.sin(3 * x[:, 0]))
    >>> bool(model.score(x, 500 + 100 * np.sin(3 * x[:, 0])) > 0.99)
    True
    """

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """One pass over these examples, from the parameters of the last call."""
        self._go_on(X, y, sample_weight)
        return self

    def predict(self, X: Any) -> Any:
        """Predicted targets, of the shape that they came in."""
        z = self._outputs(X) * self._target_unit + self._target_shift
        return z[:, 0] if self._flat else z

    def _learn_targets(self, y: Any, w: Any) -> None:
        self._flat = y.ndim == 1
        y = y[:, None] if self._flat else y
        self._target_shift, self._target_unit = mean_and_spread(y.astype(np.float64), w)

    def _targets(self, y: Any) -> Any:
        y = y[:, None] if y.ndim == 1 else y
        return (y - self._target_shift) / self._target_unit

    def _loss_and_outputs(self) -> tuple[Loss, int]:
        return SquaredError(), len(self._target_unit)


@final
class KFACClassifier(ClassifierMixin, KFACEstimator):  # type: ignore[misc]
    """A network with cross-entropy, trained by K-FAC: a classifier of scikit-learn.

    Targets are classes, of any kind, or indicators (n_samples, n_labels) of several labels at once.
    Parameters and attributes are those of `KFACEstimator`, and the classes are in `classes_`.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((200, 2))
    >>> y = np.where(x[:, 0] * x[:, 1] > 0, "same", "different")
    >>> model = KFACClassifier(random_state=0).fit(x, y)
    >>> model.predict([[1.0, 1.0], [1.0, -1.0]]).tolist()
    ['same', 'different']
    """

    def partial_fit(
        self,
        X: Any,
        y: Any,
        classes: Any = None,
        sample_weight: Any = None,
    ) -> Self:
        """One pass over these examples; the first call names all `classes`."""
        self._known_classes = classes
        self._go_on(X, y, sample_weight)
        return self

    def predict(self, X: Any) -> Any:
        """The most probable class of each example, or its labels if it may have several."""
        z = self._outputs(X)
        if self._several:
            return (z > 0.0).astype(int)
        return self.classes_[np.argmax(z, axis=1)]

    def predict_proba(self, X: Any) -> Any:
        """Probabilities of the classes, or of each of several labels."""
        z = self._outputs(X)
        if self._several:
            return 1.0 / (1.0 + np.exp(-z))
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def _learn_targets(self, y: Any, w: Any) -> None:
        check_classification_targets(y)
        self._several = type_of_target(y).startswith("multilabel")
        known = getattr(self, "_known_classes", None)
        if self._several:
            self.classes_ = np.arange(y.shape[1])
        else:
            self.classes_ = np.unique(y if known is None else known)

    def _targets(self, y: Any) -> Any:
        if self._several:
            return y.astype(np.float64)
        return np.searchsorted(self.classes_, y)

    def _loss_and_outputs(self) -> tuple[Loss, int]:
        loss = SigmoidCrossEntropy() if self._several else SoftmaxCrossEntropy()
        return loss, len(self.classes_)


def mean_and_spread(x: Any, w: Any) -> tuple[Any, Any]:
    """Weighted mean and standard deviation of each column, the latter 1 where it vanishes.

    Examples
    --------
    >>> mean_and_spread(np.asarray([[1.0, 7.0], [3.0, 7.0]]), np.ones(2))
    (array([2., 7.]), array([1., 1.]))
    """
    mean = np.average(x, axis=0, weights=w)
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=w))
    return mean, np.where(spread > 1e-12 * np.abs(mean), spread, 1.0)


def _rows(examples: Examples, rows: Any) -> Examples:
    x, t, w = examples
    return x[rows], t[rows], w[rows]
