"""scikit-learn's handwritten digits, the embedded default: 1,797 images of 8 x 8 pixels, ten classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor


class Digits(NamedTuple):
    train: tuple[Tensor, Tensor]  # images (n, 1, 8, 8), standardised, labels (n,) int64
    test: tuple[Tensor, Tensor]


def digits(seed: int = 0) -> Digits:
    """1,400 training and 397 test images, split by a seeded permutation."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x = torch.from_numpy(images[order]).float().view(-1, 1, 8, 8)
    x = (x - x[:1400].mean()) / x[:1400].std()
    y = torch.from_numpy(labels[order]).long()
    return Digits((x[:1400], y[:1400]), (x[1400:], y[1400:]))
