"""Measures of both tasks (Sec. 7), over a whole test set at once, as shares or in the targets' own units; tables print x 100."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.metrics import confusion_matrix, f1_score
from torch import Tensor

from common.probes import accuracy, balanced_accuracy, macro_f1


class Categorical(NamedTuple):
    war: float  # accuracy
    uar: float  # mean recall of the classes in the test set
    weighted_f1: float  # weighted by support
    micro_f1: float
    macro_f1: float
    top5: float
    confusion: np.ndarray  # (K, K), rows true, columns predicted


class Dimensional(NamedTuple):
    """Each (D,), one value a dimension; the tables' figures are their means."""

    acc: np.ndarray  # 1 - mae
    mae: np.ndarray
    mse: np.ndarray
    rmse: np.ndarray
    pcc: np.ndarray
    ccc: np.ndarray


def average_views(scores: Tensor, groups: Tensor) -> Tensor:
    """Mean of scores (N, K) over the rows of each group number (N,), in rising order of the numbers."""
    names, place = groups.unique(return_inverse=True)
    total = scores.new_zeros(len(names), scores.shape[1]).index_add_(0, place, scores)
    return total / place.bincount(minlength=len(names))[:, None]


def categorical(labels: Tensor, scores: Tensor) -> Categorical:
    """Measures of scores (N, K), averaged over views already, against labels (N,) int64.

    A class without a test sample is left out of UAR's mean, with a warning that names it.
    """
    classes = scores.shape[1]
    absent = sorted(set(range(classes)) - set(labels.tolist()))
    if absent:
        warnings.warn(f"classes {absent} are absent from the test set: left out of UAR's mean", stacklevel=2)
    guess = scores.argmax(1)
    near = scores.topk(min(5, classes), 1).indices
    return Categorical(
        war=accuracy(labels, guess),
        uar=balanced_accuracy(labels, guess),
        weighted_f1=float(f1_score(labels, guess, average="weighted", zero_division=0)),
        micro_f1=float(f1_score(labels, guess, average="micro", zero_division=0)),
        macro_f1=macro_f1(labels, guess),
        top5=float((near == labels[:, None]).any(1).double().mean()),
        confusion=confusion_matrix(labels, guess, labels=range(classes)),
    )


def dimensional(targets: Tensor, predictions: Tensor) -> Dimensional:
    """Measures of predictions (N, D) against targets (N, D), with unbiased moments over all N samples.

    A dimension whose predictions (or targets) are constant has no PCC: NaN, with a warning.
    """
    t, p = targets.double().cpu().numpy(), predictions.double().cpu().numpy()
    if t.shape != p.shape or t.ndim != 2 or len(t) < 2:
        raise ValueError(f"expected targets and predictions (N, D) of one shape, N > 1, found {t.shape} and {p.shape}")
    var_t, var_p = t.var(0, ddof=1), p.var(0, ddof=1)
    covariance = ((t - t.mean(0)) * (p - p.mean(0))).sum(0) / (len(t) - 1)
    mae, mse = np.abs(t - p).mean(0), np.square(t - p).mean(0)
    constant = (var_t == 0) | (var_p == 0)
    if constant.any():
        warnings.warn(f"dimensions {np.flatnonzero(constant).tolist()} are constant: their PCC is undefined (NaN)", stacklevel=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        pcc = np.where(constant, np.nan, covariance / np.sqrt(var_t * var_p))
        ccc = 2 * covariance / (var_t + var_p + np.square(t.mean(0) - p.mean(0)))
    return Dimensional(1 - mae, mae, mse, np.sqrt(mse), pcc, ccc)
