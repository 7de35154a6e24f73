"""K-FAC for convolutions (KFC) against SGD and Adam, on a small convolutional network."""

from __future__ import annotations

from kfac_np.backend import get_backend
from kfac_np.data import ConstantBatch, digits
from kfac_np.figures.drawing import Drawing, Table
from kfac_np.figures.networks import as_in_the_paper
from kfac_np.figures.racing import COLUMNS, Racer, draw_race, race
from kfac_np.optimizers import SGD, Adam, kfc_pre, practical
from kfac_np.training.image_models import convnet

__all__ = ["draw"]


def draw(quick: bool = False) -> Drawing:
    """Training loss on digits: adaptive K-FAC, K-FAC at a given rate, KFC-pre, SGD and Adam.

    References
    ----------
    Grosse & Martens 2016, §6 (training curves).
    """
    examples, channels, steps = (100, (4, 4), 4) if quick else (1500, (16, 32), 150)
    data = digits()
    backend = get_backend("numpy", "float32")
    x = backend.asarray(data.x_train[:examples])
    t = backend.asarray(data.t_train)[:examples]
    objective = convnet(data.image_shape, 10, channels, kernel=3)
    large, small = ConstantBatch(min(500, examples)), ConstantBatch(100)
    adaptive = as_in_the_paper(objective, 1.0)
    pre = kfc_pre(objective, 3e-3, damping=1e-3)
    racers = [
        Racer("K-FAC, adaptive, batch 500", adaptive, large, steps),
        Racer("K-FAC, rate 0.01, batch 100", practical(objective, 0.01), small, 2 * steps),
        Racer("KFC-pre, rate 0.003, batch 100", pre, small, 2 * steps),
        Racer("SGD, Nesterov 0.9, rate 0.1, batch 100", SGD(objective, 0.1), small, 4 * steps),
        Racer("Adam, rate 0.01, batch 100", Adam(objective, 0.01), small, 4 * steps),
    ]
    rows = race(racers, x, t, evaluations=40)
    title = "convolutional network on digits, training loss of the current parameters"
    figure = draw_race(rows, title, "SoftmaxCrossEntropy, mean over images", 2 * steps)
    return Drawing(figure, Table(COLUMNS, rows))
