"""Probes of frozen features and the metrics of the papers' tables.

Probes: linear (`linear_probe_sgd`, `linear_probe_lbfgs`), nearest neighbours (`knn_classify`), `kmeans`, `svm_kfold`.
Metrics take (labels, predictions or scores) in this order, as tensors or arrays, and return a float in 0..1 (ari: -1..1).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import sklearn.metrics
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import SVC
from timm.optim.lars import Lars
from torch import Tensor, nn

Split = tuple[Tensor, Tensor]  # features (N, D), labels (N,) int64, or (N, L) of 0/1 in multi-label mode
Array = Tensor | np.ndarray
LARGEST = 2**25  # entries of the largest temporary (similarities, distances): 128 MB in float32


class Probe(NamedTuple):
    """What `linear_probe_sgd` returns; scores are lists with one entry an epoch."""

    head: nn.Module  # after the last epoch
    best_head: nn.Module  # after `best_epoch`
    val: list[float]  # empty without a validation split
    test: list[float]
    best_epoch: int  # 0-based; the LAST epoch that reaches the best validation score
    final: float  # test score after the last epoch
    early_stopping: float  # test score after `best_epoch`


class Clusters(NamedTuple):
    labels: Tensor  # (N,) int64
    centres: Tensor  # (K, D)
    inertia: float  # sum of squared distances to the own centre


class Summary(NamedTuple):
    mean: float
    std: float  # population (divisor n), as the papers' scripts print it
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f} (n={self.n})"


# -- linear probes -----------------------------------------------------------------------------------------------------


def linear_probe_sgd(
    train: Split | Sequence[Split],
    val: Split | Sequence[Split] | None,
    test: Split | Sequence[Split],
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam",
    momentum: float = 0.9,
    batch_size: int | None = None,
    multi_label: bool = False,
    classes: int | None = None,
    head: nn.Module | None = None,
    score: Callable[[Tensor, Tensor], float] | None = None,
    lr_at: Callable[[int], float] | None = None,
    generator: torch.Generator | None = None,
) -> Probe:
    """Train a linear head on frozen features; score validation and test after each epoch (GraphMAE, Sec. 4.1).

    Cross entropy and accuracy; in multi-label mode BCE with logits (mean over all entries) and micro F1 of logit >= 0.

    Args:
        train, val, test: (features (N, D), labels), labels (N,) int64, or (N, L) of 0/1 if `multi_label`. A sequence of
            such pairs is joined for scoring; in `train` each pair makes one optimiser step, in order (PPI's batches).
        val: None = no selection: `early_stopping` is then `final`.
        weight_decay: added to the gradient for adam, sgd and lars, decoupled for adamw.
        optimizer: lars is MAE's: momentum, trust 0.001 on matrices; neither trust ratio nor decay on 1-D parameters.
        momentum: of sgd and lars.
        batch_size: samples a step, shuffled each epoch, the last batch smaller; None = all at once.
        head: module (N, D) -> (N, classes), trained in place, e.g. `nn.Sequential(nn.BatchNorm1d(D, affine=False), linear)`;
            None = nn.Linear with torch's default initialisation.
        score: (labels, logits) -> float, larger is better, in place of accuracy or micro F1.
        lr_at: learning rate at an optimiser step (0-based), in place of the constant `lr`.
        generator: a CPU one, of the shuffling.
    Raises:
        ValueError: shapes, labels outside the classes, labels of the other mode, features that are not finite.
    """
    groups, splits = _pairs(train), {"train": _join(train), "test": _join(test)}
    if val is not None:
        splits["val"] = _join(val)
    if batch_size is not None and (len(groups) > 1 or batch_size < 1):
        raise ValueError(f"batch_size: expected a positive size and one train pair, got {batch_size} and {len(groups)} pairs")
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    outputs = _check_splits(splits, multi_label, classes)
    dim, device = splits["train"][0].shape[1], splits["train"][0].device
    head = nn.Linear(dim, outputs, device=device, dtype=splits["train"][0].dtype) if head is None else head
    score = score or (_score_multi_label if multi_label else _score_single)
    update = _optimizer(head, optimizer, lr, weight_decay, momentum)

    val_scores: list[float] = []
    test_scores: list[float] = []
    best_epoch, best_head = epochs - 1, head
    step = 0
    for epoch in range(epochs):
        head.train()
        for features, labels in _batches(groups, batch_size, generator):
            if lr_at is not None:
                for group in update.param_groups:
                    group["lr"] = lr_at(step)
            logits = head(features)
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits)) if multi_label else F.cross_entropy(logits, labels)
            update.zero_grad()
            loss.backward()
            update.step()
            step += 1
        head.eval()
        with torch.no_grad():
            test_scores.append(score(splits["test"][1], head(splits["test"][0])))
            if "val" in splits:
                val_scores.append(score(splits["val"][1], head(splits["val"][0])))
                if val_scores[-1] >= max(val_scores):  # >=: the last of equal epochs is kept, as in the reference
                    best_epoch, best_head = epoch, copy.deepcopy(head)
    return Probe(head, best_head, val_scores, test_scores, best_epoch, test_scores[-1], test_scores[best_epoch])


def linear_probe_lbfgs(
    train: Split,
    test: Split,
    *,
    l2: float | None = None,
    standardise: bool = True,
    multi_label: bool = False,
    classes: int | None = None,
    max_iter: int = 1000,
    tolerance: float = 1e-7,
) -> tuple[nn.Linear, float]:
    """Logistic regression to its optimum: min over W, b of mean cross entropy + l2/2 |W|^2, the bias left free.

    Args:
        train, test: (features (N, D), labels); computed in the features' dtype on their device.
        l2: None = 1/N, scikit-learn's C = 1 (in general l2 = 1 / (C N)).
        standardise: subtract mean, divide by standard deviation of the training features (constant columns: by 1).
        multi_label: one independent logistic regression a label, their losses summed.
        tolerance: on the largest gradient entry; float32 reaches about 1e-6.
    Returns:
        head on the features as given (standardisation folded in), and the test accuracy (multi-label: micro F1).
    """
    outputs = _check_splits({"train": train, "test": test}, multi_label, classes)
    features, labels = train
    mean, std = features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
    if standardise:
        mean, std = features.mean(0), features.std(0, correction=0)
        std = torch.where(std > 0, std, 1)
    inputs = (features - mean) / std
    l2 = 1 / len(features) if l2 is None else l2
    targets = labels.to(features.dtype) if multi_label else labels
    weight = features.new_zeros(outputs, features.shape[1]).requires_grad_()
    bias = features.new_zeros(outputs).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=tolerance,
        tolerance_change=tolerance**2,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        logits = F.linear(inputs, weight, bias)
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(inputs)
        else:
            loss = F.cross_entropy(logits, targets)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    head = nn.Linear(features.shape[1], outputs, device=features.device, dtype=features.dtype)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - head.weight @ mean)
        logits = head(test[0])
    return head, (_score_multi_label if multi_label else _score_single)(test[1], logits)


# -- neighbours and clusters -------------------------------------------------------------------------------------------


@torch.no_grad()
def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    classes: int | None = None,
) -> Tensor:
    """Class scores from the k nearest training samples by cosine; the prediction is `argmax(1)`, ties to the lower class.

    Args:
        train_features: (N, D); train_labels: (N,) int64, or (N, L) of 0/1 (multi-label); features: (M, D).
        temperature: each neighbour weighs exp(cosine / temperature) (DINO: 0.07); None = plain votes.
    Returns:
        (M, C) sums of the neighbours' weights; in multi-label mode (M, L) their weighted mean label, in 0..1.
    """
    _check_features("train_features", train_features)
    _check_features("features", features)
    if features.shape[1] != train_features.shape[1] or not 1 <= k <= len(train_features):
        raise ValueError(
            f"expected features of one width and 1 <= k <= {len(train_features)} training samples, "
            f"got {tuple(train_features.shape)}, {tuple(features.shape)} and k={k}"
        )
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature: expected a positive number or None, got {temperature}")
    multi_label = train_labels.ndim == 2
    outputs = _check_labels("train_labels", train_labels, len(train_features), multi_label, classes)
    keys = F.normalize(train_features, dim=1).T.contiguous()
    rows = []
    for part in features.split(max(1, LARGEST // len(train_features))):
        cosine, nearest = (F.normalize(part, dim=1) @ keys).topk(k, dim=1)
        weight = torch.ones_like(cosine) if temperature is None else (cosine / temperature).exp()
        if multi_label:
            rows.append((weight[..., None] * train_labels[nearest]).sum(1) / weight.sum(1, keepdim=True))
        else:
            rows.append(weight.new_zeros(len(part), outputs).scatter_add_(1, train_labels[nearest], weight))
    return torch.cat(rows)


def kmeans(
    features: Tensor,
    clusters: int,
    *,
    restarts: int = 10,
    seed: int = 0,
    max_iter: int = 300,
    tolerance: float = 1e-4,
    backend: Literal["auto", "sklearn", "torch"] = "auto",
) -> Clusters:
    """K-means (Euclidean, k-means++ starts); the restart with the least inertia is kept.

    Args:
        features: (N, D).
        tolerance: a restart has converged when its centres move, in squared distance, by at most this share of the mean variance.
        backend: "sklearn" copies to the CPU; "torch" runs all restarts together on the features' device; "auto" takes torch on
            a GPU. Starts differ between the two, so do local optima; each is deterministic for a seed.
    """
    _check_features("features", features)
    if not 1 <= clusters <= len(features):
        raise ValueError(f"clusters: expected 1 to {len(features)} (the number of samples), got {clusters}")
    if backend == "torch" or (backend == "auto" and features.is_cuda):
        return _kmeans_torch(features, clusters, restarts, seed, max_iter, tolerance)
    fitted = KMeans(clusters, n_init=restarts, random_state=seed, max_iter=max_iter, tol=tolerance).fit(_array(features))
    centres = torch.from_numpy(fitted.cluster_centers_).to(features)
    return Clusters(torch.from_numpy(fitted.labels_).long().to(features.device), centres, float(fitted.inertia_))


@torch.no_grad()
def _kmeans_torch(features: Tensor, clusters: int, restarts: int, seed: int, max_iter: int, tolerance: float) -> Clusters:
    count, dim = features.shape
    device = features.device
    generator = torch.Generator(device).manual_seed(seed)
    offset = features.mean(0)
    points = features - offset  # the squares below then cancel less
    chunk = max(1, LARGEST // (restarts * clusters))
    names = torch.arange(clusters, device=device)

    # greedy k-means++, as scikit-learn: of a few points drawn by squared distance, the one that lowers the inertia most
    centres = points.new_empty(restarts, clusters, dim)
    trials = 2 + int(math.log(clusters))
    for restart in range(restarts):
        nearest = torch.ones(count, device=device, dtype=points.dtype)
        for k in range(clusters):
            place = nearest.double().cumsum(0)  # multinomial refuses more than 2^24 entries
            u = torch.rand(trials if k else 1, generator=generator, device=device, dtype=torch.float64) * place[-1]
            drawn = points[torch.searchsorted(place, u, right=True).clamp(max=count - 1)]
            distance = torch.cdist(drawn, points).square()
            distance = torch.minimum(nearest, distance) if k else distance
            best = distance.sum(1).argmin()
            centres[restart, k], nearest = drawn[best], distance[best]

    def assign(centres: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels (R, N), inertia (R,), sums of the members (R, K, D), their number (R, K)."""
        labels, inertia, sums, sizes = [], centres.new_zeros(restarts), torch.zeros_like(centres), centres.new_zeros(restarts, clusters)
        norm = centres.square().sum(2)
        for part in points.split(chunk):
            distance = (norm[:, None] - 2 * part @ centres.transpose(1, 2)).add_(part.square().sum(1)[:, None])
            least, label = distance.min(2)
            member = (label[..., None] == names).to(part.dtype)  # products, unlike index_add, are deterministic on a GPU
            sums += member.transpose(1, 2) @ part
            sizes += member.sum(1)
            inertia += least.clamp(min=0).sum(1)
            labels.append(label)
        return torch.cat(labels, 1), inertia, sums, sizes

    limit = tolerance * points.var(0, correction=0).mean()
    for _ in range(max_iter):
        _, _, sums, sizes = assign(centres)
        moved = sums / sizes.clamp(min=1)[..., None]
        empty = sizes == 0
        if empty.any():
            moved[empty] = points[torch.randint(count, (int(empty.sum()),), generator=generator, device=device)]
        shift = (moved - centres).square().sum((1, 2))
        centres = moved
        if (shift <= limit).all():
            break
    labels, inertia, _, _ = assign(centres)
    winner = int(inertia.argmin())
    return Clusters(labels[winner], centres[winner] + offset, float(inertia[winner]))


def match_clusters(labels: Array, clusters: Array) -> np.ndarray:
    """Name each cluster after a class, one to one, so that agreement is largest (Hungarian). Returns (N,) class ids.

    With more clusters than classes the unmatched clusters become -1; with fewer, some classes have no cluster.
    """
    truth, found = _array(labels), _array(clusters)
    _same_length(truth, found)
    class_ids, true = np.unique(truth, return_inverse=True)
    cluster_ids, cluster = np.unique(found, return_inverse=True)
    counts = np.zeros((len(cluster_ids), len(class_ids)), dtype=np.int64)
    np.add.at(counts, (cluster, true), 1)
    name = np.full(len(cluster_ids), -1, dtype=np.int64)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    name[rows] = class_ids[columns]
    return name[cluster]


def cluster_accuracy(labels: Array, clusters: Array) -> float:
    """Share of samples whose cluster, after `match_clusters`, names their class; unmatched clusters count as errors."""
    return accuracy(labels, match_clusters(labels, clusters))


def nmi(labels: Array, clusters: Array) -> float:
    """Normalised mutual information: I(labels; clusters) / arithmetic mean of the two entropies."""
    return float(sklearn.metrics.normalized_mutual_info_score(_array(labels), _array(clusters)))


def ari(labels: Array, clusters: Array) -> float:
    """Adjusted Rand index: pair agreement, 0 expected by chance, 1 for equal partitions."""
    return float(sklearn.metrics.adjusted_rand_score(_array(labels), _array(clusters)))


def cluster_scores(labels: Array, clusters: Array) -> dict[str, float]:
    """accuracy, nmi, ari, macro_f1 of a clustering; F1 over the classes, after matching (a class without cluster has 0)."""
    named, truth = match_clusters(labels, clusters), _array(labels)
    return {
        "accuracy": accuracy(truth, named),
        "nmi": nmi(truth, clusters),
        "ari": ari(truth, clusters),
        "macro_f1": macro_f1(truth, named, classes=np.unique(truth)),
    }


# -- support vector machine --------------------------------------------------------------------------------------------


def rbf_scale(rows: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Kernel matrix (R, F) of `rows` (R, D) with the `fitted` rows (F, D): SVC's "rbf" with gamma "scale", as one matrix product.

    A kernel for `SVC(kernel=...)`; libsvm's own goes through the pairs one by one.
    """
    return rbf_kernel(rows, fitted, gamma=1 / (fitted.shape[1] * (fitted.var() or 1)))


def svm_kfold(
    features: Array,
    labels: Array,
    *,
    folds: int = 10,
    seed: int = 0,
    penalties: Sequence[float] = (0.001, 0.01, 0.1, 1, 10),
    kernel: Literal["rbf", "linear"] = "rbf",
    inner_folds: int = 5,
    jobs: int = 1,
) -> np.ndarray:
    """Accuracy of an SVM on each fold (folds,), C chosen inside the training folds (GraphMAE's graph protocol).

    Outer folds stratified, shuffled by `seed`; per fold a grid over `penalties` by stratified, unshuffled inner folds,
    refit on all training folds. gamma = 1 / (D var) ("scale"). `summarise` gives mean and deviation.

    Raises:
        ValueError: a class with fewer than `folds` samples.
    """
    inputs, truth = _array(features), _array(labels)
    if inputs.ndim != 2 or truth.shape != inputs.shape[:1]:
        raise ValueError(f"expected features (N, D) and labels (N,), got {inputs.shape} and {truth.shape}")
    if not np.isfinite(inputs).all():
        raise ValueError("features: expected finite values, found NaN or infinity")
    names, sizes = np.unique(truth, return_counts=True)
    if len(names) < 2 or sizes.min() < folds:
        raise ValueError(
            f"labels: expected two classes or more with at least {folds} samples each, got {dict(zip(names, sizes, strict=True))}"
        )
    values = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(inputs, truth):
        machine = SVC(kernel=rbf_scale if kernel == "rbf" else kernel, random_state=42)
        search = GridSearchCV(machine, {"C": list(penalties)}, cv=inner_folds, scoring="accuracy", n_jobs=jobs)
        search.fit(inputs[train], truth[train])
        values.append(accuracy(truth[test], search.predict(inputs[test])))
    return np.array(values)


# -- metrics -----------------------------------------------------------------------------------------------------------


def summarise(values: Sequence[float] | Array) -> Summary:
    """Mean and population standard deviation of one figure over seeds or folds."""
    data = np.asarray([float(v) for v in values])
    if data.size == 0:
        raise ValueError("values: expected at least one figure, got none")
    return Summary(float(data.mean()), float(data.std()), data.size)


def accuracy(labels: Array, predictions: Array) -> float:
    """Share of equal entries (top-1; micro F1 of a single-label task; HiCMAE's WAR)."""
    truth, guess = _array(labels), _array(predictions)
    _same_length(truth, guess)
    return float((truth == guess).mean())


def balanced_accuracy(labels: Array, predictions: Array) -> float:
    """Mean over the classes in `labels` of their recall (HiCMAE's UAR; ImagiNet's ACC)."""
    truth, guess = _array(labels), _array(predictions)
    _same_length(truth, guess)
    return float(np.mean([(guess[truth == c] == c).mean() for c in np.unique(truth)]))


def macro_f1(labels: Array, predictions: Array, classes: Sequence[int] | np.ndarray | None = None) -> float:
    """Mean of the per-class F1 over `classes` (default: every class found in labels or predictions); 0 where undefined."""
    truth, guess = _array(labels), _array(predictions)
    _same_length(truth, guess)
    return float(sklearn.metrics.f1_score(truth, guess, labels=classes, average="macro", zero_division=0))


def micro_f1(labels: Array, predictions: Array) -> float:
    """Multi-label F1 over all (sample, label) pairs: 2 TP / (2 TP + FP + FN); labels, predictions (N, L) of 0/1.

    0 if there is neither a positive label nor a positive prediction.
    """
    truth, guess = _array(labels), _array(predictions)
    if truth.ndim != 2 or truth.shape != guess.shape:
        raise ValueError(f"expected labels and predictions (N, L) of one shape, got {truth.shape} and {guess.shape}")
    truth, guess = truth.astype(bool), guess.astype(bool)
    positive = int(truth.sum()) + int(guess.sum())
    return 2 * int((truth & guess).sum()) / positive if positive else 0.0


def roc_auc_per_task(labels: Array, scores: Array, *, present: Array | None = None) -> np.ndarray:
    """Area under the ROC curve of each task (T,), NaN for a task whose present rows hold one class only.

    Args:
        labels: (N, T) or (N,), 1 = positive, anything else negative.
        scores: same shape, larger = more positive; equal scores count half.
        present: same shape, bool, False = label missing: the row is left out of that task.
    """
    truth, score = _array(labels), _array(scores)
    keep = np.ones(truth.shape, dtype=bool) if present is None else _array(present).astype(bool)
    if truth.ndim not in (1, 2) or not truth.shape == score.shape == keep.shape:
        raise ValueError(f"expected labels, scores and present of one shape (N,) or (N, T), got {truth.shape}, {score.shape}, {keep.shape}")
    truth, score, keep = (x.reshape(len(x), -1) for x in (truth == 1, score, keep))
    if not np.isfinite(score[keep]).all():
        raise ValueError("scores: expected finite values, found NaN or infinity")
    values = np.full(truth.shape[1], np.nan)
    for task in range(truth.shape[1]):
        y, s = truth[keep[:, task], task], score[keep[:, task], task]
        if y.any() and not y.all():
            values[task] = sklearn.metrics.roc_auc_score(y, s)
    return values


def roc_auc(labels: Array, scores: Array, *, present: Array | None = None) -> float:
    """Mean of `roc_auc_per_task` over the tasks that have both classes (one-hot labels: macro one-vs-rest AUC).

    Raises:
        ValueError: no task has both classes.
    """
    values = roc_auc_per_task(labels, scores, present=present)
    if np.isnan(values).all():
        raise ValueError("labels: expected at least one task with positive and negative rows, found none")
    return float(np.nanmean(values))


def average_precision(labels: Array, scores: Array) -> float:
    """AP = sum_k P(k) rel(k) / sum rel over the ranking by score, without interpolation; labels (N,), 1 = positive.

    Equal scores form one step. Raises ValueError without a positive label.
    """
    truth, score = _array(labels), _array(scores)
    if truth.ndim != 1 or truth.shape != score.shape:
        raise ValueError(f"expected labels and scores (N,) of one length, got {truth.shape} and {score.shape}")
    if not (truth == 1).any():
        raise ValueError("labels: expected at least one positive (1), found none")
    return float(sklearn.metrics.average_precision_score(truth == 1, score))


def mean_average_precision(labels: Array, scores: Array, average: Literal["macro", "micro"] = "macro") -> float:
    """mAP of a multi-label task; labels (N, L) of 0/1, scores (N, L).

    macro: mean of the labels' `average_precision` (labels without a positive are left out); micro: AP over all
    (sample, label) pairs.
    """
    truth, score = _array(labels), _array(scores)
    if truth.ndim != 2 or truth.shape != score.shape:
        raise ValueError(f"expected labels and scores (N, L) of one shape, got {truth.shape} and {score.shape}")
    if average == "micro":
        return average_precision(truth.ravel(), score.ravel())
    found = [t for t in range(truth.shape[1]) if (truth[:, t] == 1).any()]
    if not found:
        raise ValueError("labels: expected at least one positive (1), found none")
    return float(np.mean([average_precision(truth[:, t], score[:, t]) for t in found]))


# -- parts -------------------------------------------------------------------------------------------------------------


def _score_single(labels: Tensor, logits: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def _score_multi_label(labels: Tensor, logits: Tensor) -> float:
    return micro_f1(labels, logits >= 0)


def _optimizer(head: nn.Module, name: str, lr: float, weight_decay: float, momentum: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(head.parameters(), lr=lr, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(head.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "lars":
        matrices = [p for p in head.parameters() if p.ndim > 1]
        vectors = [p for p in head.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": weight_decay, "always_adapt": True},
            {"params": vectors, "weight_decay": 0.0, "always_adapt": False},
        ]
        return Lars([g for g in groups if g["params"]], lr=lr, momentum=momentum)
    raise ValueError(f"optimizer: expected adam, adamw, sgd or lars, got {name!r}")


def _pairs(split: Split | Sequence[Split]) -> list[Split]:
    return [split] if isinstance(split[0], Tensor) else list(split)  # type: ignore[list-item,arg-type]


def _join(split: Split | Sequence[Split]) -> Split:
    features, labels = zip(*_pairs(split), strict=True)
    return (features[0], labels[0]) if len(features) == 1 else (torch.cat(features), torch.cat(labels))


def _batches(groups: list[Split], size: int | None, generator: torch.Generator | None) -> list[Split]:
    if size is None:
        return groups
    features, labels = groups[0]
    order = torch.randperm(len(features), generator=generator).to(features.device)
    return [(features[rows], labels[rows]) for rows in order.split(size)]


def _check_splits(splits: dict[str, Split], multi_label: bool, classes: int | None) -> int:
    """Number of outputs that the head needs."""
    widths, outputs = {}, []
    for name, (features, labels) in splits.items():
        _check_features(f"{name} features", features)
        outputs.append(_check_labels(f"{name} labels", labels, len(features), multi_label, classes))
        widths[name] = features.shape[1]
    if len(set(widths.values())) > 1 or (multi_label and len(set(outputs)) > 1):
        raise ValueError(f"expected one feature width and one number of labels in all splits, got {widths} and {outputs}")
    return max(outputs)


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point() or len(features) == 0:
        raise ValueError(f"{name}: expected floating-point (N, D) with N > 0, got {features.dtype} {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError(f"{name}: expected finite values, found NaN or infinity in {int((~features.isfinite()).any(1).sum())} rows")


def _check_labels(name: str, labels: Tensor, count: int, multi_label: bool, classes: int | None) -> int:
    if multi_label:
        if labels.ndim != 2 or len(labels) != count:
            raise ValueError(f"{name}: multi-label mode expects ({count}, L) of 0/1, got {tuple(labels.shape)}")
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(f"{name}: multi-label mode expects 0 and 1 only")
        if classes is not None and labels.shape[1] != classes:
            raise ValueError(f"{name}: expected {classes} columns, got {labels.shape[1]}")
        return labels.shape[1]
    if labels.ndim != 1 or len(labels) != count or labels.is_floating_point():
        raise ValueError(
            f"{name}: expected ({count},) class numbers, got {labels.dtype} {tuple(labels.shape)}; "
            "(N, L) labels of 0/1 need the multi-label mode"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(f"{name}: expected class numbers 0 to {'...' if classes is None else classes - 1}, found {low} to {high}")
    return high + 1 if classes is None else classes


def _array(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _same_length(first: np.ndarray, second: np.ndarray) -> None:
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise ValueError(f"expected labels and predictions (N,) of one length, N > 0, got {first.shape} and {second.shape}")
