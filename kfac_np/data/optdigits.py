"""Handwritten digits of 8 × 8 pixels, which come with the package."""

from __future__ import annotations

from importlib import resources

import numpy as np

from kfac_np.data.dataset import Dataset

__all__ = ["digits"]

_N_TRAIN = 1500


def digits() -> Dataset:
    """Load 1797 handwritten digits, each pixel the blackness of a 4 × 4 block: count / 16.

    The first 1500 images are for training and the last 297 for testing. The file keeps its
    original order, in which the digits of a writer stand together: most of the writers that are
    tested on do not occur in training.

    Returns
    -------
    Dataset
        8 × 8 pixels, ten classes. Some border pixels are zero in every image.

    References
    ----------
    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository, 1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0: the file optdigits.tes.

    Examples
    --------
    >>> digits()
    Dataset('digits': 1500 for training, 297 for testing, 8 × 8 pixels, 10 classes)
    """
    folder = resources.files("kfac_np.data") / "files"
    with (folder / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
        x = archive["x"].astype(np.float32) / np.float32(16)
        t = archive["t"].astype(np.int64)
    return Dataset(
        name="digits",
        x_train=x[:_N_TRAIN],
        t_train=t[:_N_TRAIN],
        x_test=x[_N_TRAIN:],
        t_test=t[_N_TRAIN:],
        image_shape=(8, 8, 1),
        num_classes=10,
        source="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), "
        "https://doi.org/10.24432/C50P49, CC BY 4.0",
    )
