"""Training: models by name, the loop, checkpoints, run directories and pictures.

`train` is the loop alone; `run` keeps a directory as well, and can resume it bit for bit.
"""

from kfac_np.training.config import Config, from_table, to_table
from kfac_np.training.experiment import Experiment
from kfac_np.training.image_models import convnet, resnet
from kfac_np.training.loop import Position, Step, Supply, start, train
from kfac_np.training.metrics import Metrics, evaluate, reconstruct
from kfac_np.training.models import autoencoder, mlp
from kfac_np.training.run import Observer, run

__all__ = [
    "Config",
    "Experiment",
    "Metrics",
    "Observer",
    "Position",
    "Step",
    "Supply",
    "autoencoder",
    "convnet",
    "evaluate",
    "from_table",
    "mlp",
    "reconstruct",
    "resnet",
    "run",
    "start",
    "to_table",
    "train",
]
