"""What a run can be composed of: models sized by the data, and the names of all parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

from kfac_np import curvature, fisher, layers, losses, optimizers
from kfac_np.curvature.sharing import Sharing
from kfac_np.errors import ConfigError
from kfac_np.objective import Objective
from kfac_np.training import data, models
from kfac_np.training.annotations import Choices
from kfac_np.training.metrics import Task

__all__ = ["Autoencoder", "Classifier", "Model", "choices"]


class Model(ABC):
    """A network by name, sized to fit a data set.

    Examples
    --------
    >>> from kfac_np.training.data import digits
    >>> Autoencoder(sizes=(30, 6)).objective(digits()).network.output_shape((64,))
    (64,)
    """

    @property
    @abstractmethod
    def task(self) -> Task:
        """What it is trained for."""

    @abstractmethod
    def objective(self, dataset: data.Dataset) -> Objective:
        """Network and loss for a data set.

        Raises
        ------
        ConfigError
            The data set does not have what the model needs.
        """


@final
@dataclass(frozen=True)
class Autoencoder(Model):
    """A deep autoencoder: logistic units and a linear code unless told otherwise.

    Parameters
    ----------
    sizes : tuple of int
        Hidden layers down to the code; the decoder mirrors them, the data give the rest.
    activation : Activation
    initializer : callable
    loss : Loss

    Examples
    --------
    >>> Autoencoder((30, 6)).task
    'reconstruction'
    """

    sizes: tuple[int, ...]
    activation: layers.Activation = layers.Logistic()
    initializer: layers.Initializer = layers.sparse
    loss: losses.Loss = losses.SigmoidCrossEntropy()

    @property
    def task(self) -> Task:
        return "reconstruction"

    def objective(self, dataset: data.Dataset) -> Objective:
        sizes = (dataset.x_train.shape[1], *self.sizes)
        return models.autoencoder(sizes, self.activation, self.initializer, self.loss)


@final
@dataclass(frozen=True)
class Classifier(Model):
    """A fully connected classifier with softmax output.

    Parameters
    ----------
    sizes : tuple of int
        Hidden layers; the data give the rest.
    activation : Activation
    initializer : callable

    Examples
    --------
    >>> Classifier((30,)).task
    'classification'
    """

    sizes: tuple[int, ...]
    activation: layers.Activation = layers.Tanh()
    initializer: layers.Initializer = layers.glorot

    @property
    def task(self) -> Task:
        return "classification"

    def objective(self, dataset: data.Dataset) -> Objective:
        if dataset.num_classes is None:
            raise ConfigError(f"model: expected data with labels for an mlp, got {dataset.name!r}")
        sizes = (dataset.x_train.shape[1], *self.sizes, dataset.num_classes)
        return models.mlp(sizes, self.activation, self.initializer)


def choices() -> Choices:
    """Return the names of everything that a slot may hold.

    Examples
    --------
    >>> list(choices()[optimizers.Optimizer])
    ['kfac', 'sgd', 'adam']
    """
    return {
        Model: {"autoencoder": Autoencoder, "mlp": Classifier},
        layers.Activation: {
            "logistic": layers.Logistic,
            "tanh": layers.Tanh,
            "relu": layers.ReLU,
            "leaky-relu": layers.LeakyReLU,
            "gelu": layers.GELU,
            "silu": layers.SiLU,
            "softplus": layers.Softplus,
            "identity": layers.Identity,
        },
        layers.Initializer: {
            "sparse": layers.sparse,
            "glorot": layers.glorot,
            "he": layers.he,
            "fan-in": layers.fan_in_normal,
        },
        losses.Loss: {
            "sigmoid-cross-entropy": losses.SigmoidCrossEntropy,
            "squared-error": losses.SquaredError,
        },
        data.BatchSchedule: {"constant": data.ConstantBatch, "growing": data.GrowingBatch},
        **_optimizer_choices(),
    }


def _optimizer_choices() -> dict[Any, dict[str, Any]]:
    return {
        optimizers.Optimizer: {
            "kfac": optimizers.KFAC,
            "sgd": optimizers.SGD,
            "adam": optimizers.Adam,
        },
        optimizers.Schedule: {
            "constant": optimizers.Constant,
            "exponential": optimizers.Exponential,
            "inverse": optimizers.Inverse,
            "cosine": optimizers.Cosine,
            "piecewise": optimizers.Piecewise,
        },
        optimizers.StepRule: {
            "quadratic-model": optimizers.QuadraticModel,
            "fixed-rate": optimizers.FixedRate,
        },
        optimizers.DampingPolicy: {
            "levenberg-marquardt": optimizers.LevenbergMarquardt,
            "constant": optimizers.ConstantDamping,
        },
        optimizers.GammaPolicy: {
            "search": optimizers.GammaSearch,
            "coupled": optimizers.CoupledGamma,
        },
        fisher.FisherType: {
            "monte-carlo": fisher.MonteCarlo,
            "exact": fisher.Exact,
            "empirical": fisher.Empirical,
            "input-only": fisher.InputOnly,
        },
        curvature.Curvature: {
            "block-diagonal": curvature.BlockDiagonal,
            "block-tridiagonal": curvature.BlockTridiagonal,
            "full-kronecker": curvature.FullKronecker,
            "full": curvature.FullMatrix,
        },
        curvature.Block: {
            "kfac": curvature.KFACBlock,
            "diagonal": curvature.DiagonalBlock,
            "exact": curvature.ExactBlock,
            "unit": curvature.UnitBlock,
        },
        curvature.DampingRule: {
            "pi-trace": curvature.pi_trace,
            "pi-frobenius": curvature.pi_frobenius,
            "pi-spectral": curvature.pi_spectral,
            "no-pi": curvature.no_pi,
            "plain": curvature.plain,
        },
        Sharing: {"expand": curvature.expand, "reduce": curvature.reduce},
    }
