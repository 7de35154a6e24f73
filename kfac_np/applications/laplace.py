"""Laplace's approximation: a Gaussian over the parameters, and what it says of predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

from kfac_np import trees
from kfac_np.applications.batches import require_batch, require_batches
from kfac_np.applications.fitted import FittedCurvature, merge
from kfac_np.applications.laplace_outputs import joint_covariance, output_moments
from kfac_np.applications.laplace_precision import Precision, Prior, checked_prior
from kfac_np.applications.laplace_predictive import (
    Link,
    Prediction,
    Validation,
    predicted,
    require_predictable,
)
from kfac_np.applications.laplace_tuning import Evidence, Group, lowest, maximise
from kfac_np.backend import Array, Rng, array_namespace, quiet, require_finite, require_same_place
from kfac_np.errors import ConfigError, InputError, KfacError
from kfac_np.losses import SquaredError
from kfac_np.matrices import TreeMatrix
from kfac_np.objective import Objective
from kfac_np.trees import Tree
from kfac_np.validation import (
    is_number,
    require_instance,
    require_integer,
    require_positive,
)

__all__ = ["Laplace"]


@final
@dataclass(frozen=True, eq=False)
class Laplace:
    """p(θ | data) ≈ N(θ*, P⁻¹), P = M/(σ² T) · C + δ I.

    M · C is the curvature of the sum of the losses that was fitted at θ* (`fit_curvature`): full,
    K-FAC, EKFAC, diagonal, block-tridiagonal, of all layers or of some (`fit.select`, the last
    one for example; the others are held at θ*). The prior N(μ, 1/δ) is added exactly, in the
    eigenbasis: no factor is damped. θ* should be where training with ℓ2 term δ/M ended.

    Predictions are linearised: f(x) ~ N(f(x, θ*), J P⁻¹ Jᵀ), J = ∂f/∂θ. That is no shortcut. P is
    the curvature of the linearised network (the Gauss-Newton matrix), and is a good description of
    it alone. Weights drawn from the Gaussian (`sample`) and run through the network itself leave
    the region where it is nearly linear, since directions without curvature are as wide as the
    prior, and predict worse than θ* does [3, 4]: of a small classifier the test NLL went from 0.078
    to 0.246.

    Parameters
    ----------
    objective : Objective
        The network and the loss of the fit: SquaredError, SoftmaxCrossEntropy or
        SigmoidCrossEntropy. Batch statistics are frozen (`Objective.evaluation`).
    fit : FittedCurvature
        With `Exact` or `MonteCarlo` for a posterior in its usual sense.
    prior_precision : float or mapping
        δ > 0. Path to a number gives each layer its own; path to an array of the parameter's shape
        each entry, the bias column for example. An array takes the block written out.
    noise : float
        σ, the standard deviation of targets around f; for squared error only.
    temperature : float
        T; below 1 the data count for more.
    prior_mean : mapping of path to Array, optional
        μ, like `fit.operand`; 0 when omitted.
    budget_bytes : int
        For what predictions hold at a time.

    Raises
    ------
    InputError
        The fit is of another network.
    ConfigError
        A number that is not positive; noise for a loss that has none.
    CurvatureError
        Another loss; a prior that differs within a matrix too large to be written out.

    References
    ----------
    [1] MacKay 1992, "A Practical Bayesian Framework for Backpropagation Networks".
    [2] Ritter, Botev & Barber 2018, "A Scalable Laplace Approximation for Neural Networks".
    [3] Immer, Korzepa & Bauer 2021, arXiv:2008.08400 (the linearised predictive).
    [4] Daxberger et al. 2021, arXiv:2106.14806.

    Examples
    --------
    A linear model with the full covariance is Bayesian linear regression.

    >>> import numpy as np
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.curvature import FullMatrix
    >>> from kfac_np.layers import Dense
    >>> objective = Objective(Dense(1, 1, bias=False), SquaredError())
    >>> x = np.asarray([[1.0], [2.0]])
    >>> fit = fit_curvature(objective, np.asarray([[0.5]]), [(x, x)], FullMatrix())
    >>> posterior = Laplace(objective, fit, prior_precision=3.0, noise=1.0)
    >>> prediction = posterior.predict(np.asarray([[4.0]]))  # P = 1² + 2² + 3 = 8
    >>> prediction.output_covariance, prediction.variance
    (array([[[2.]]]), array([[3.]]))
    """

    objective: Objective
    fit: FittedCurvature
    prior_precision: float | Mapping[str, Prior] = 1.0
    noise: float = 1.0
    temperature: float = 1.0
    prior_mean: Mapping[str, Array] | None = None
    budget_bytes: int = 2**28

    def __post_init__(self) -> None:
        require_instance("Laplace objective", self.objective, Objective)
        require_instance("Laplace fit", self.fit, FittedCurvature)
        require_predictable(self.objective.loss)
        require_positive("Laplace noise", self.noise)
        require_positive("Laplace temperature", self.temperature)
        require_integer("Laplace budget_bytes", self.budget_bytes)
        if self.noise != 1.0 and not self._has_noise:
            raise ConfigError(
                f"Laplace noise: expected 1 for {self.objective.loss!r}, got {self.noise}; "
                "only squared error has noise"
            )
        if self.objective.network.couples_examples:
            raise InputError(
                "Laplace objective: expected independent examples, got a network with batch "
                "statistics; give `objective.evaluation(params, x)`"
            )
        self.fit.require_network(self.objective.network, "Laplace fit")
        if self.prior_mean is not None:
            self._require_prior_mean(self.prior_mean)
        _ = self._prior

    def _require_prior_mean(self, mean: Mapping[str, Array]) -> None:
        self.fit.require_operand(mean, "Laplace prior_mean")
        for path, p in self.fit.operand.items():
            require_same_place(f"Laplace prior_mean {path}", mean[path], p)
            require_finite(f"Laplace prior_mean {path}", mean[path])

    # ---------------------------------------------------------------------------- the posterior

    @cached_property
    def precision(self) -> Precision:
        """P: products, solutions, log-determinant, variances of its inverse."""
        return Precision.of(self._curvature, self.fit.operand, self._h, self._prior)

    @cached_property
    def _prior(self) -> dict[str, Prior]:
        return checked_prior("Laplace prior_precision", self.prior_precision, self.fit.operand)

    @cached_property
    def _curvature(self) -> TreeMatrix:
        return self.fit.matrix.power(1.0)  # eigendecomposed, and kept so with the fit

    @property
    def _h(self) -> float:
        return self.fit.terms / (self.noise**2 * self.temperature)

    @property
    def _has_noise(self) -> bool:
        return isinstance(self.objective.loss, SquaredError)

    def sample(self, rng: Rng | int) -> Tree:
        """Draw θ ~ N(θ*, P⁻¹): all parameters of the network; on from `rng`.

        Read above why to predict with `predict`, and not with networks of such weights.
        """
        drawn = self.precision.sample(Rng.of(rng))
        return self.fit.insert(trees.axpy(1.0, drawn, self.fit.operand))

    def log_prob(self, params: Tree, normalized: bool = True) -> float:
        """log N(θ; θ*, P⁻¹), which without its constant is -½ (θ - θ*)ᵀ P (θ - θ*).

        Parameters
        ----------
        params : tree of Array
            θ, like the network's parameters.
        normalized : bool
            With ½ log det P - (n/2) log 2π.
        """
        d = trees.axpy(-1.0, self.fit.operand, self.fit.extract(params))
        self.fit.require_operand(d)
        form = -0.5 * float(trees.inner(d, self.precision.matvec(d)))
        if not normalized:
            return form
        n = sum(math.prod(p.shape) for p in d.values())
        logdet = self.precision.logdet_prior + self.precision.logdet_ratio
        return form + 0.5 * logdet - 0.5 * n * math.log(2.0 * math.pi)

    def updated(self, fit: FittedCurvature) -> Laplace:
        """The posterior after more data, of which `fit` is, at its parameters (`merge`).

        Factors of K-FAC are averaged, not their products: at the same parameters that is the fit
        to all the data.
        """
        require_instance("updated fit", fit, FittedCurvature)
        return replace(self, fit=merge(self.fit, fit, params=fit.params))

    # ---------------------------------------------------------------- the marginal likelihood

    @property
    def log_likelihood(self) -> float:
        """log p(data | θ*) = -Σ ℓ/(σ² T), for squared error - Σ C log(σ √2π) (not tempered)."""
        value = -self.fit.loss / (self.noise**2 * self.temperature)
        if self._has_noise:
            value -= self._targets * math.log(self.noise * math.sqrt(2.0 * math.pi))
        return value

    @property
    def _targets(self) -> float:
        return self.fit.weight * self.fit.outputs

    @property
    def scatter(self) -> float:
        """Σ δ (θ* - μ)²."""
        return math.fsum(self._scatters.values())

    @cached_property
    def _scatters(self) -> dict[str, float]:
        found = {}
        for path, p in self.fit.operand.items():
            xp = array_namespace(p)
            d = xp.astype(p, xp.float64)
            if self.prior_mean is not None:
                d = d - xp.astype(self.prior_mean[path], xp.float64)
            found[path] = float(xp.sum(self._prior[path] * d * d))
        return found

    @property
    def log_marginal_likelihood(self) -> float:
        """log p(data) ≈ log p(data | θ*) - ½ (log det P - log det δ + Σ δ (θ* - μ)²)."""
        return self.log_likelihood - 0.5 * (self.precision.logdet_ratio + self.scatter)

    def log_derivatives(self) -> tuple[dict[str, float], float]:
        """Derivatives of `log_marginal_likelihood` by log δ of each parameter, and by log σ.

        By δ itself it is ∂/∂ log δ over δ; by a δ that several have in common, the sum of theirs.
        """
        evidence = self._evidence(per_layer=True, noise=True)
        gradient = evidence([0.0] * (len(self.fit.paths) + bool(evidence.targets)))[1]
        noise = gradient[-1] if evidence.targets else 0.0
        return dict(zip(self.fit.paths, gradient, strict=False)), noise

    def tuned(self, per_layer: bool = False, noise: bool = True) -> Laplace:
        """With the prior precision, and σ, that maximise `log_marginal_likelihood` exactly.

        Parameters
        ----------
        per_layer : bool
            Give each parameter its own; otherwise what there is is multiplied by one factor.
        noise : bool
            Tune σ, too, for squared error.

        Raises
        ------
        InputError
            There is no maximum.

        References
        ----------
        MacKay 1992; solved by Newton's method, since it is concave in all logarithms together.
        """
        evidence = self._evidence(per_layer, noise)
        point = maximise(evidence, next(iter(self.fit.operand.values())))
        factors = {
            path: math.exp(x)
            for group, x in zip(evidence.groups, point, strict=False)
            for path in group.paths
        }
        sigma = self.noise * math.exp(point[-1]) if evidence.targets else self.noise
        return self._multiplied(factors, sigma)

    def _evidence(self, per_layer: bool, noise: bool) -> Evidence:
        paths = self.fit.paths
        each = [(path,) for path in paths] if per_layer else [paths]
        groups = [Group(", ".join(p), p, math.fsum(self._scatters[q] for q in p)) for p in each]
        misfit = self.fit.loss / (self.noise**2 * self.temperature)
        targets = self._targets if noise and self._has_noise else 0.0
        return Evidence(self.precision, tuple(groups), misfit, targets)

    def _multiplied(self, factors: Mapping[str, float], sigma: float) -> Laplace:
        prior: float | dict[str, Prior] = {p: factors[p] * d for p, d in self._prior.items()}
        if is_number(self.prior_precision) and len(set(factors.values())) == 1:
            prior = self.prior_precision * next(iter(factors.values()))
        return replace(self, prior_precision=prior, noise=sigma)

    def tuned_on(
        self, batches: Iterable[Sequence[Array]], link: Link = "probit", noise: bool = True
    ) -> Laplace:
        """With the factor on the prior precision, and σ, of the least NLL on validation data.

        The factor is searched from 1e-4 to 1e4, on a grid and then between its points (with
        noise: that on δ σ²); the best σ for it is known in closed form.

        Parameters
        ----------
        batches : iterable of (x, t)
            Not of the training data.
        link, noise
            As for `predict` and `tuned`.
        """
        require_batches("tuned_on", batches)
        found = list(batches)
        if not found:
            raise InputError("tuned_on batches: expected at least one, got none")
        profiled = noise and self._has_noise
        # For a given δ σ² the covariance of targets is a multiple of σ², whose best is a mean.
        sigma, unit = (1.0, self.noise**2) if profiled else (self.noise, 1.0)
        h = self.fit.terms / (sigma**2 * self.temperature)

        def measured(x: float) -> Validation:
            prior = {path: math.exp(x) * unit * d for path, d in self._prior.items()}
            precision = Precision.of(self._curvature, self.fit.operand, h, prior)
            total = Validation()
            for number, batch in enumerate(found):
                try:
                    require_batch(batch, weights=False)
                    f, spread = self._moments(precision, batch[0], diagonal=False)
                    prediction = predicted(self.objective.loss, sigma, f, spread, link, 100, 0)
                    total.add(prediction, batch[1])
                except KfacError as error:
                    raise error.within(f"tuned_on batch {number}") from None
            return total

        x = lowest(lambda v: measured(v).nll(profiled), math.log(1e-4), math.log(1e4), 17)
        factor = math.exp(x)
        if profiled:
            sigma = measured(x).sigma()
            factor *= unit / sigma**2
        return self._multiplied(dict.fromkeys(self.fit.paths, factor), sigma)

    # ------------------------------------------------------------------------------ predictions

    def predict(
        self,
        x: Array,
        link: Link = "probit",
        samples: int = 1000,
        rng: Rng | int = 0,
        diagonal: bool = False,
    ) -> Prediction:
        """p(t | x, data), linearised: mean, variance (with noise), probabilities.

        Parameters
        ----------
        x : Array, shape (N, ...)
            As many as there are: memory is kept within the budget.
        link : {"probit", "bridge", "monte-carlo", "map"}
            How classes' probabilities are averaged over the Gaussian of logits: softmax of
            f/√(1 + π v/8), v the variances (sigmoid likewise); the Laplace bridge, for softmax;
            the mean over draws of logits; or at f itself, with no uncertainty at all.
        samples, rng
            For "monte-carlo".
        diagonal : bool
            Variances of the outputs only, for networks with many.

        Raises
        ------
        InputError
            Inputs that the network does not take.

        References
        ----------
        MacKay 1992 (probit); Hobbhahn, Kristiadi & Hennig 2022, arXiv:2003.01227 (bridge).
        """
        require_integer("predict samples", samples)
        f, spread = self.outputs(x, diagonal)
        return predicted(self.objective.loss, self.noise, f, spread, link, samples, rng)

    @quiet
    def outputs(self, x: Array, diagonal: bool = False) -> tuple[Array, Array]:
        """f(x) at θ*, and J P⁻¹ Jᵀ of each term; noise is not in it.

        Jacobians are not formed: each of the C outputs is carried back, and in K-FAC's eigenbasis
        an example's block is Σ_ij g̃_ci g̃_c'i ã_j² / (h λ_ij + δ), g̃ and ã its derivatives and
        inputs there. Weights that are used at several places, and other matrices, take the
        derivative of an example, some examples at a time.

        Parameters
        ----------
        x : Array, shape (N, ...)
        diagonal : bool
            Variances only, shape (N, [S,] C); otherwise (N, [S,] C, C).
        """
        return self._moments(self.precision, x, diagonal)

    def _moments(self, precision: Precision, x: Array, diagonal: bool) -> tuple[Array, Array]:
        self.objective.require_inputs(self.fit.params, x)
        return output_moments(
            self.objective.network, self.fit.params, precision, x, diagonal, self.budget_bytes
        )

    def joint_output_covariance(self, x: Array) -> Array:
        """J P⁻¹ Jᵀ of all outputs of a few examples together, in the order of (N, [S,] C)."""
        self.objective.require_inputs(self.fit.params, x)
        return joint_covariance(self.objective.network, self.fit.params, self.precision, x)
