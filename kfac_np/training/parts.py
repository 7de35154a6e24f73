"""What a run can be composed of: models sized by the data, and the names of all parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

from kfac_np import curvature, data, fisher, layers, losses, optimizers
from kfac_np.curvature.sharing import Sharing
from kfac_np.errors import ConfigError
from kfac_np.objective import Objective
from kfac_np.optimizers import family
from kfac_np.training import image_models, models
from kfac_np.training.annotations import Choices
from kfac_np.training.metrics import Task

__all__ = ["Autoencoder", "Classifier", "ConvNet", "Model", "ResNet", "choices"]


class Model(ABC):
    """A network by name, sized to fit a data set.

    Examples
    --------
    >>> from kfac_np.data import digits
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
        sizes = (dataset.x_train.shape[1], *self.sizes, _classes("an mlp", dataset))
        return models.mlp(sizes, self.activation, self.initializer)


@final
@dataclass(frozen=True)
class ConvNet(Model):
    """A convolutional classifier, as `kfac_np.training.convnet` makes it.

    Parameters
    ----------
    channels : tuple of int
    kernel : int
    pooling : {"max", "average"}
    window : int
    hidden : tuple of int
    dropout : float
    activation : Activation
    initializer : callable

    Examples
    --------
    >>> from kfac_np.data import digits
    >>> ConvNet(channels=(4,), kernel=3).objective(digits()).network.layers[:2]
    (Reshape((8, 8, 1)), Conv(1, 4, (3, 3), padding='same'))
    """

    channels: tuple[int, ...] = (32, 32, 64)
    kernel: int = 5
    pooling: image_models.Pooling = "max"
    window: int = 3
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    activation: layers.Activation = layers.ReLU()
    initializer: layers.Initializer = layers.he

    @property
    def task(self) -> Task:
        return "classification"

    def objective(self, dataset: data.Dataset) -> Objective:
        return image_models.convnet(
            dataset.image_shape,
            _classes("a convnet", dataset),
            self.channels,
            self.kernel,
            self.pooling,
            self.window,
            self.hidden,
            self.dropout,
            self.activation,
            self.initializer,
        )


@final
@dataclass(frozen=True)
class ResNet(Model):
    """A residual classifier, as `kfac_np.training.resnet` makes it.

    Parameters
    ----------
    widths : tuple of int
    blocks : int
    normalization : {"none", "batch", "group", "layer"}
    dropout : float
    activation : Activation
    initializer : callable

    Examples
    --------
    >>> ResNet(widths=(8, 16)).task
    'classification'
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 1
    normalization: image_models.NormalizationName = "group"
    dropout: float = 0.0
    activation: layers.Activation = layers.ReLU()
    initializer: layers.Initializer = layers.he

    @property
    def task(self) -> Task:
        return "classification"

    def objective(self, dataset: data.Dataset) -> Objective:
        return image_models.resnet(
            dataset.image_shape,
            _classes("a resnet", dataset),
            self.widths,
            self.blocks,
            self.normalization,
            self.dropout,
            self.activation,
            self.initializer,
        )


def _classes(model: str, dataset: data.Dataset) -> int:
    if dataset.num_classes is None:
        raise ConfigError(f"model: expected data with labels for {model}, got {dataset.name!r}")
    return dataset.num_classes


def choices() -> Choices:
    """Return the names of everything that a slot may hold.

    Examples
    --------
    >>> list(choices()[optimizers.Optimizer])
    ['kfac', 'sgd', 'adam', 'gram', 'preconditioned']
    """
    return {
        Model: {
            "autoencoder": Autoencoder,
            "mlp": Classifier,
            "convnet": ConvNet,
            "resnet": ResNet,
        },
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
            "gram": family.GramDescent,
            "preconditioned": family.Preconditioned,
        },
        family.Preconditioner: {
            "first-moment": family.FirstMoment,
            "adam": family.AdamScaling,
            "nadam": family.NAdamScaling,
            "sign-momentum": family.SignMomentum,
            "muon": family.Muon,
            "shampoo": family.Shampoo,
            "soap": family.SOAP,
            "eva": family.Eva,
            "foof": family.FOOF,
            "singd": family.SINGD,
        },
        optimizers.Schedule: {
            "constant": optimizers.Constant,
            "exponential": optimizers.Exponential,
            "inverse": optimizers.Inverse,
            "cosine": optimizers.Cosine,
            "piecewise": optimizers.Piecewise,
            "shrinking": optimizers.Shrinking,
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
            "relative": optimizers.RelativeGammaSearch,
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
            "ekfac": curvature.EKFAC,
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
