"""Metrics of the segmentation and clustering tables that `common.probes` has not (spec of the paper's evaluation, Sec. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

VOID = 255
"""Label of pixels that do not count."""


def confusion(labels: Tensor, predictions: Tensor, classes: int, *, void: int = VOID) -> Tensor:
    """(classes, classes) int64, row = label, column = prediction, void pixels left out; add those of batches.

    Raises:
        ValueError: a label that is neither void nor a class.
    """
    labels, predictions = labels.flatten().long(), predictions.flatten().long()
    valid = labels != void
    labels, predictions = labels[valid], predictions[valid]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels: expected 0 to {classes - 1} or {void} (void), found {int(labels.min())} to {int(labels.max())}")
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)


def iou(matrix: Tensor) -> Tensor:
    """(classes,) float64 TP / (TP + FP + FN) of a confusion matrix; NaN for classes in neither labels nor predictions."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())


def mean_iou(matrix: Tensor) -> float:
    """Mean over the classes that occur in labels or predictions."""
    return float(iou(matrix).nanmean())


def pixel_accuracy(matrix: Tensor) -> float:
    return float(matrix.diagonal().sum() / matrix.sum())


def purity(labels: Tensor, clusters: Tensor) -> float:
    """Sum over clusters of their largest class, over N."""
    _, label = labels.unique(return_inverse=True)
    _, cluster = clusters.unique(return_inverse=True)
    width = int(label.max()) + 1
    counts = torch.bincount(cluster * width + label, minlength=(int(cluster.max()) + 1) * width).view(-1, width)
    return float(counts.amax(1).sum() / len(labels))
