"""K-FAC, block-diagonal and block-tridiagonal, with and without momentum, against SGD."""

from __future__ import annotations

from collections.abc import Sequence

from kfac_np.backend import get_backend
from kfac_np.curvature import BlockDiagonal, BlockTridiagonal
from kfac_np.data import (
    BatchSchedule,
    ConstantBatch,
    Dataset,
    GrowingBatch,
    curves,
    fashion_mnist,
    first,
)
from kfac_np.figures.drawing import Drawing, Table
from kfac_np.figures.faces import faces
from kfac_np.figures.networks import as_in_the_paper
from kfac_np.figures.racing import COLUMNS, Racer, draw_race, race
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import SGD, QuadraticModel
from kfac_np.training.models import autoencoder

__all__ = ["contestants", "draw_curves_race", "draw_faces_race", "draw_fashion_race"]

_SMALL = (12, 4)  # hidden layers of the quick version


def draw_curves_race(quick: bool = False) -> Drawing:
    """CURVES: 784-400-200-100-50-25-6 and its mirror image, logistic units.

    References
    ----------
    Martens & Grosse 2015, §13.
    """
    data = curves(200, 1) if quick else curves(20_000, 1)
    sizes = (784, *(_SMALL if quick else (400, 200, 100, 50, 25, 6)))
    batch = ConstantBatch(100) if quick else GrowingBatch(500, 2000)
    name, steps = _named("CURVES", sizes), 3 if quick else 250
    return _race(data, autoencoder(sizes), 0.01, batch, 0.01, steps, name)


def draw_fashion_race(quick: bool = False) -> Drawing:
    """Fashion-MNIST: 784-400-200-100-30 and its mirror image, logistic units.

    Raises
    ------
    DataError
        The data are not on this machine; nothing is downloaded.
    """
    data = first(fashion_mnist(), n_train=200 if quick else 20_000)
    sizes = (784, *(_SMALL if quick else (400, 200, 100, 30)))
    batch = ConstantBatch(100 if quick else 1000)
    name, steps = _named("Fashion-MNIST", sizes), 3 if quick else 200
    return _race(data, autoencoder(sizes), 150.0, batch, 0.003, steps, name)


def draw_faces_race(quick: bool = False) -> Drawing:
    """Generated faces: 625-400-200-100-30 and its mirror image, logistic units, squared error."""
    data = faces(200, 1) if quick else faces(20_000, 1)
    sizes = (625, *(_SMALL if quick else (400, 200, 100, 30)))
    batch = ConstantBatch(100 if quick else 1000)
    name, steps = _named("generated faces", sizes), 3 if quick else 200
    objective = autoencoder(sizes, loss=SquaredError())
    return _race(data, objective, 1.0, batch, 0.002, steps, name)


def contestants(
    objective: Objective,
    damping: float,
    batch: BatchSchedule,
    rate: float,
    steps: int,
    per_step: int = 12,
) -> list[Racer]:
    """Four kinds of K-FAC with the published adaptation, and SGD with `per_step` as many steps.

    Parameters
    ----------
    objective : Objective
    damping : float
        λ₀.
    batch : BatchSchedule
        Of K-FAC; SGD has batches of 100.
    rate : float
        Of SGD, with Nesterov's momentum of 0.9.
    steps : int
        Of K-FAC.
    per_step : int

    Examples
    --------
    >>> racers = contestants(autoencoder((4, 2)), 1.0, ConstantBatch(9), 0.01, 5)
    >>> [racer.steps for racer in racers]
    [5, 5, 5, 5, 60]
    """
    racers = []
    for kind, curvature in (
        ("block-diagonal", BlockDiagonal()),
        ("block-tridiagonal", BlockTridiagonal()),
    ):
        for momentum, rule in (
            ("", QuadraticModel(least_examples=1)),
            (", no momentum", QuadraticModel(momentum=False, least_examples=1)),
        ):
            kfac = as_in_the_paper(objective, damping, curvature=curvature, step_rule=rule)
            racers.append(Racer(f"K-FAC {kind}{momentum}", kfac, batch, steps))
    sgd = SGD(objective, rate=rate, momentum=0.9, nesterov=True)
    label = f"SGD, Nesterov 0.9, rate {rate:g}"
    return [*racers, Racer(label, sgd, ConstantBatch(100), per_step * steps)]


def _named(data: str, sizes: Sequence[int]) -> str:
    return f"{data}, autoencoder {'-'.join(map(str, sizes))}"


def _race(
    data: Dataset,
    objective: Objective,
    damping: float,
    batch: BatchSchedule,
    rate: float,
    steps: int,
    name: str,
) -> Drawing:
    x = get_backend("numpy", "float32").asarray(data.x_train)
    rows = race(contestants(objective, damping, batch, rate, steps), x, x)
    kind = type(objective.loss).__name__
    title = f"{name}, training loss of the current parameters"
    figure = draw_race(rows, title, f"{kind}, mean over images", steps)
    return Drawing(figure, Table(COLUMNS, rows))
