"""Data sets on the host, and the minibatches drawn from them.

`load` gives a `Dataset` by name; `MiniBatches` draws shuffled indices that can be resumed;
`ConstantBatch` and `GrowingBatch` say how many.
"""

from __future__ import annotations

from kfac_np.data.batches import (
    BatchSchedule,
    BatchState,
    ConstantBatch,
    GrowingBatch,
    MiniBatches,
)
from kfac_np.data.cifar import cifar_dataset, read_cifar
from kfac_np.data.cifar_sets import cifar10, cifar100, download_cifar
from kfac_np.data.curve_images import curves, draw_curves
from kfac_np.data.dataset import Dataset, Images, Labels, check_dataset, first
from kfac_np.data.fashion import download_fashion_mnist, fashion_mnist
from kfac_np.data.idx import idx_dataset, read_idx
from kfac_np.data.loading import load
from kfac_np.data.optdigits import digits

__all__ = [
    "BatchSchedule",
    "BatchState",
    "ConstantBatch",
    "Dataset",
    "GrowingBatch",
    "Images",
    "Labels",
    "MiniBatches",
    "check_dataset",
    "cifar10",
    "cifar100",
    "cifar_dataset",
    "curves",
    "digits",
    "download_cifar",
    "download_fashion_mnist",
    "draw_curves",
    "fashion_mnist",
    "first",
    "idx_dataset",
    "load",
    "read_cifar",
    "read_idx",
]
