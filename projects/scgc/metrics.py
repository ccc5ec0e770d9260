"""Scores of a clustering: accuracy by one-to-one matching, NMI (arithmetic mean), ARI, macro F1, and the two ways to report them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from common.probes import cluster_scores

Rule = Literal["match", "reference"]
NAMES = {"accuracy": "ACC", "nmi": "NMI", "ari": "ARI", "macro_f1": "F1"}


def overwrite_empty(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The reference's rule for missing clusters: each class id (from 0) that no cluster has is written over the first, second, ... prediction.

    Raises:
        ValueError: more clusters than classes, where the reference stops too.
    """
    classes, found = np.unique(labels - labels.min()), np.unique(clusters)
    if len(found) > len(classes):
        raise ValueError(f"clusters: expected at most {len(classes)} as there are classes, found {len(found)}; use empty_clusters=match")
    changed = clusters.copy()
    if len(found) < len(classes):
        missing = [c for c in classes if c not in found]
        changed[: len(missing)] = missing
    return changed


def scores(labels: np.ndarray, clusters: np.ndarray, empty_clusters: Rule = "match") -> dict[str, float]:
    """ACC, NMI, ARI, F1 in 0..1 (ARI from -1).

    Args:
        labels: (N,) classes; clusters: (N,) predictions.
        empty_clusters: "match" = a cluster without class counts as errors, a class without cluster has F1 0;
            "reference" = `overwrite_empty` first, and all four scores are of the changed array.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if empty_clusters == "reference":
        clusters = overwrite_empty(labels, clusters)
    return {NAMES[name]: value for name, value in cluster_scores(labels, clusters).items()}


def by_epoch(labels: np.ndarray, assignments: np.ndarray, empty_clusters: Rule = "match") -> dict[str, np.ndarray]:
    """Scores of every epoch; assignments (epochs, N): those before each epoch's step, so epoch 0 is the K-means start."""
    every = [scores(labels, epoch, empty_clusters) for epoch in assignments]
    return {name: np.array([s[name] for s in every]) for name in NAMES.values()}


def settled(assignments: np.ndarray, share: float) -> int:
    """First epoch at which at most `share` of the nodes changed cluster since the epoch before, else the last: DEC's rule, needs no labels.

    Ours, not the paper's: its figures take the best epoch, which only the labels can tell.
    """
    rest = np.flatnonzero((assignments[1:] != assignments[:-1]).mean(1) <= share)
    return int(rest[0]) + 1 if len(rest) else len(assignments) - 1
