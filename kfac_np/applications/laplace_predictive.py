"""What is predicted of targets, from a Gaussian over the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from kfac_np.backend import (
    Array,
    Backend,
    DeferredChecks,
    Rng,
    array_namespace,
    logistic,
    quiet,
    softmax,
)
from kfac_np.errors import CurvatureError, InputError
from kfac_np.losses import Loss, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.validation import require_one_of

__all__ = ["Link", "Prediction", "Validation", "predicted", "require_predictable"]

Link = Literal["probit", "bridge", "monte-carlo", "map"]
"""How probabilities are averaged over a Gaussian of logits."""

_NUMBERS_AT_ONCE = 2**20


@final
@dataclass(frozen=True, eq=False)
class Prediction:
    """p(t | x, data) of each loss term.

    Attributes
    ----------
    mean : Array, shape (N, [S,] C)
        Of the targets: f for regression, for classes their probabilities.
    outputs : Array, shape (N, [S,] C)
        f, the network's outputs at θ: the mean of the Gaussian over outputs.
    output_variance : Array, shape (N, [S,] C)
        The diagonal of J P⁻¹ Jᵀ: what is not known of f. Noise is not in it.
    output_covariance : Array, shape (N, [S,] C, C), or None
        J P⁻¹ Jᵀ itself; None where only the diagonal was asked for.
    loss : Loss
    noise : float
        σ; 1 for classes, which have no such.

    Examples
    --------
    >>> import numpy as np
    >>> f, unsure = np.zeros((1, 1)), np.full((1, 1), 3.0)
    >>> Prediction(f, f, unsure, None, SquaredError(), noise=1.0).variance
    array([[4.]])
    """

    mean: Array
    outputs: Array
    output_variance: Array
    output_covariance: Array | None
    loss: Loss
    noise: float

    @property
    def covariance(self) -> Array:
        """Of the targets, shape (N, [S,] C, C): for regression J P⁻¹ Jᵀ + σ² I, noise included."""
        if not isinstance(self.loss, SquaredError):
            raise CurvatureError(
                f"covariance: expected SquaredError, got {self.loss!r}; see output_covariance"
            )
        like = self.output_covariance
        if like is None:
            raise CurvatureError("covariance: expected predict(x) without diagonal=True")
        xp = array_namespace(like)
        eye = xp.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        return like + self.noise * self.noise * eye

    @property
    def variance(self) -> Array:
        """Of the targets, shape (N, [S,] C): for classes p (1 - p)."""
        if not isinstance(self.loss, SquaredError):
            return self.mean * (1.0 - self.mean)
        return self.output_variance + self.noise * self.noise

    @quiet
    def nll(self, t: Array) -> float:
        """-log p(t | x, data), mean over the terms, with all constants of the likelihood.

        Parameters
        ----------
        t : Array
            Targets as the loss takes them.

        Raises
        ------
        TargetError
            They are none of this loss.
        """
        checks = DeferredChecks()
        self.loss.check(self.outputs, t, checks)
        checks.wait()
        xp = array_namespace(self.mean)
        if isinstance(self.loss, SquaredError):
            form, logdet = self.gaussian(t)
            values = 0.5 * (form + logdet + self.mean.shape[-1] * math.log(2.0 * math.pi))
        elif isinstance(self.loss, SoftmaxCrossEntropy):
            # The loss of log p is log p itself: its logarithm of the sum is 0.
            values = self.loss.value(_log(self.mean), t)
        else:
            p = self.mean
            values = -xp.sum(t * _log(p) + (1.0 - t) * _log(1.0 - p), axis=-1)
        return float(xp.mean(xp.astype(values, xp.float64)))

    def gaussian(self, t: Array) -> tuple[Array, Array]:
        """(t - f)ᵀ S⁻¹ (t - f) and log det S, S the `covariance`, for each term."""
        r, s = (t - self.outputs)[..., None], self.covariance
        xp = array_namespace(s)
        return xp.sum(r * xp.linalg.solve(s, r), axis=(-2, -1)), xp.linalg.slogdet(s)[1]


@final
@dataclass
class Validation:
    """Sums over batches of validation data."""

    nlls: float = 0.0
    forms: float = 0.0
    logdets: float = 0.0
    terms: int = 0
    outputs: int = 0

    def add(self, prediction: Prediction, t: Array) -> None:
        """Add a batch."""
        n = math.prod(prediction.mean.shape[:-1])
        self.terms, self.outputs = self.terms + n, prediction.mean.shape[-1]
        self.nlls += n * prediction.nll(t)
        if isinstance(prediction.loss, SquaredError):
            xp = array_namespace(t)
            form, logdet = (float(xp.sum(each)) for each in prediction.gaussian(t))
            self.forms, self.logdets = self.forms + form, self.logdets + logdet

    def sigma(self) -> float:
        """The best σ, where the covariance of targets is σ² times that of the predictions."""
        if not self.forms > 0.0:
            raise InputError("tuned_on batches: expected targets that are not fitted exactly")
        return math.sqrt(self.forms / (self.terms * self.outputs))

    def nll(self, profiled: bool) -> float:
        """Mean over the terms, with the best σ if `profiled`."""
        if not profiled:
            return self.nlls / self.terms
        constant = math.log(2.0 * math.pi * self.sigma() ** 2) + 1.0
        return 0.5 * (self.outputs * constant + self.logdets / self.terms)


def _log(p: Array) -> Array:
    xp = array_namespace(p)
    return xp.log(xp.where(p > 0.0, p, xp.finfo(p.dtype).smallest_normal + 0.0 * p))


def require_predictable(loss: Loss) -> None:
    """Raise `CurvatureError` unless targets of the loss can be predicted."""
    if not isinstance(loss, SquaredError | SoftmaxCrossEntropy | SigmoidCrossEntropy):
        raise CurvatureError(
            "Laplace: expected the loss SquaredError, SoftmaxCrossEntropy or SigmoidCrossEntropy, "
            f"got {loss!r}"
        )


@quiet
def predicted(
    loss: Loss, noise: float, f: Array, spread: Array, link: Link, samples: int, rng: Rng | int
) -> Prediction:
    """The prediction from outputs and their covariance or variances; as `Laplace.predict`."""
    require_one_of("predict link", link, ("probit", "bridge", "monte-carlo", "map"))
    classes, diagonal = isinstance(loss, SoftmaxCrossEntropy), spread.ndim == f.ndim
    variance = spread if diagonal else array_namespace(f).linalg.diagonal(spread)
    if isinstance(loss, SquaredError):
        mean = f
    elif link == "map":
        mean = _activation(classes)(f)
    elif link == "probit":
        mean = _activation(classes)(f / (1.0 + math.pi / 8.0 * variance) ** 0.5)
    elif diagonal:
        raise CurvatureError(f"predict link {link!r}: expected it without diagonal=True")
    elif link == "bridge":
        if not classes:
            raise CurvatureError(
                f"predict link 'bridge': expected SoftmaxCrossEntropy, got {loss!r}; use 'probit'"
            )
        mean = _bridge(f, spread)
    else:
        mean = _monte_carlo(f, spread, _activation(classes), samples, Rng.of(rng))
    return Prediction(mean, f, variance, None if diagonal else spread, loss, noise)


def _activation(classes: bool) -> Callable[[Array], Array]:
    return softmax if classes else logistic


def _bridge(f: Array, v: Array) -> Array:
    """The mean of the Dirichlet whose logits are nearest to N(f, V): Hobbhahn et al. 2022."""
    xp, c = array_namespace(f), f.shape[-1]
    rows = xp.sum(v, axis=-1)  # V 1
    total = xp.sum(rows, axis=-1, keepdims=True)
    f = f - rows * (xp.sum(f, axis=-1, keepdims=True) / total)
    variance = xp.linalg.diagonal(v) - rows * rows / total
    spread = xp.exp(f) * xp.sum(xp.exp(-f), axis=-1, keepdims=True)
    alpha = (1.0 - 2.0 / c + spread / (c * c)) / variance
    return alpha / xp.sum(alpha, axis=-1, keepdims=True)


def _monte_carlo(
    f: Array, v: Array, activation: Callable[[Array], Array], samples: int, rng: Rng
) -> Array:
    xp = array_namespace(f)
    values, u = xp.linalg.eigh(v)
    root = u * xp.sqrt(xp.where(values > 0.0, values, 0.0 * values))[..., None, :]
    backend, total = Backend.of(f), xp.zeros_like(f)
    at_once = max(1, _NUMBERS_AT_ONCE // math.prod(f.shape))
    for start in range(0, samples, at_once):
        z = rng.normal((min(at_once, samples - start), *f.shape), backend)
        total = total + xp.sum(activation(f + (root @ z[..., None])[..., 0]), axis=0)
    return total / samples
