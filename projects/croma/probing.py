"""Frozen features and what is asked of them: linear and non-linear probe, k-NN, k-means on one vector an image; a probe of each patch; retrieval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn

from common.contrastive import unit
from common.probes import (
    Probe,
    accuracy,
    cluster_accuracy,
    kmeans,
    knn_classify,
    linear_probe_lbfgs,
    linear_probe_sgd,
    mean_average_precision,
    micro_f1,
)
from projects.croma.data import Task, batches
from projects.croma.metrics import purity
from projects.croma.model import CROMA, Encoders, Encodings, Sensors

Protocol = Literal["linear", "mlp", "knn", "kmeans"]
Pool = Literal["gap", "mean", "concat"]


@dataclass(frozen=True)
class Probes:
    """How frozen features are probed (Sec. 4)."""

    lrs: tuple[PositiveFloat, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates of AdamW that are tried; the best on validation counts."""
    epochs: PositiveInt = 100
    """Of each."""
    batch_size: PositiveInt = 1024
    """Images a step."""
    hidden: PositiveInt = 2048
    """Units of the non-linear probe."""
    neighbours: PositiveInt = 20
    """k."""
    restarts: PositiveInt = 10
    """Of k-means."""
    average: Literal["micro", "macro"] = "micro"
    """Of mAP; both are recorded."""


@torch.no_grad()
def encode(
    model: Encoders, task: Task, images: np.ndarray, keep: Callable[[Encodings], Tensor], sensors: Sensors, batch: int = 64
) -> Tensor:
    """What `keep` takes from the encodings of all images, un-augmented, in order; on the CPU.

    Raises:
        ValueError: the task's images lack a sensor.
    """
    wanted = ("radar", "optical") if sensors == "joint" else (sensors,)
    if absent := [name for name in wanted if name not in task.channels]:
        raise ValueError(f"sensors={sensors}: {task.name} has {list(task.channels)} only, {absent} is missing")
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for part in batches(images, batch):
        given = {name: value.to(device) for name, value in task.sensor_images(part).items() if name in wanted}
        parts.append(keep(model(**given, joint=sensors == "joint")).float().cpu())
    return torch.cat(parts)


def vectors(model: Encoders, task: Task, sensors: Sensors, pool: Pool = "gap") -> dict[str, Tensor]:
    """One vector an image of every split: {train, val, test: (N, D)}; computed once."""
    return {
        part: encode(model, task, split.images, lambda found: found.vector(sensors, pool), sensors)
        for part, split in (("train", task.train), ("val", task.val), ("test", task.test))
    }


def _map(average: Literal["micro", "macro"]) -> Callable[[Tensor, Tensor], float]:
    return lambda labels, scores: mean_average_precision(labels, scores, average)


def probe(features: dict[str, Tensor], task: Task, protocol: Protocol, how: Probes, seed: int = 0) -> dict[str, float]:
    """Test figures in per cent by name; the first is the protocol's own.

    Single-label: top-1. Multi-label: mAP (micro and macro); k-NN also micro F1 at 0.5. k-means: accuracy after the best one-to-one
    assignment, purity.
    """
    labels = {"train": task.train.labels, "val": task.val.labels, "test": task.test.labels}
    multi = task.kind == "multi"
    if protocol == "knn":
        scores = knn_classify(features["train"], labels["train"], features["test"], k=min(how.neighbours, len(labels["train"])))
        if not multi:
            return {"top-1 (%)": 100 * accuracy(labels["test"], scores.argmax(1))}
        return _multi(labels["test"], scores, how) | {"micro F1 (%)": 100 * micro_f1(labels["test"], scores > 0.5)}
    if protocol == "kmeans":
        if multi:
            raise ValueError(f"k-means: {task.name} has several labels an image; expected a single-label task")
        found = kmeans(unit(features["test"]), task.classes, restarts=how.restarts, seed=seed)
        return {
            "k-means accuracy (%)": 100 * cluster_accuracy(labels["test"], found.labels),
            "purity (%)": 100 * purity(labels["test"], found.labels),
        }
    tried = [_trained(features, labels, task, protocol, how, lr, seed) for lr in how.lrs]
    best = max(tried, key=lambda found: found.val[found.best_epoch])
    if not multi:
        return {"top-1 (%)": 100 * best.early_stopping, "lr": how.lrs[tried.index(best)]}
    with torch.no_grad():
        return _multi(labels["test"], best.best_head(features["test"]), how) | {"lr": how.lrs[tried.index(best)]}


def _trained(
    features: dict[str, Tensor], labels: dict[str, Tensor], task: Task, protocol: Protocol, how: Probes, lr: float, seed: int
) -> Probe:
    torch.manual_seed(seed)
    width = features["train"].shape[1]
    head: nn.Module = nn.Linear(width, task.classes)
    if protocol == "mlp":
        head = nn.Sequential(nn.Linear(width, how.hidden), nn.ReLU(), nn.Linear(how.hidden, task.classes))
    pairs = [(features[part], labels[part]) for part in ("train", "val", "test")]
    score = _map(how.average) if task.kind == "multi" else None
    return linear_probe_sgd(
        *pairs,
        epochs=how.epochs,
        lr=lr,
        optimizer="adamw",
        weight_decay=0.01,
        batch_size=how.batch_size,
        multi_label=task.kind == "multi",
        classes=task.classes,
        head=head,
        score=score,
    )


def _multi(labels: Tensor, scores: Tensor, how: Probes) -> dict[str, float]:
    averages: tuple[Literal["micro", "macro"], ...] = ("micro", "macro") if how.average == "micro" else ("macro", "micro")
    return {f"mAP {average} (%)": 100 * mean_average_precision(labels, scores, average) for average in averages}


# -- patches and pairs ----------------------------------------------------------------------------------------------------


def patch_features(model: Encoders | None, task: Task, images: np.ndarray, sensors: Sensors) -> Tensor:
    """(N, patches, D) tokens of one encoder; without a model the mean of each channel over each patch: what there is before learning."""
    if model is not None:
        return encode(model, task, images, lambda found: found.tokens(sensors), sensors, 16)
    given = task.sensor_images(torch.from_numpy(images))
    channels = torch.cat([given[name] for name in (("optical", "radar") if sensors == "joint" else (sensors,))], 1)
    return torch.nn.functional.avg_pool2d(channels.float() / 255, 8).flatten(2).transpose(1, 2)


def patch_labels(maps: Tensor, patch: int = 8) -> Tensor:
    """(N * patches,) most frequent class of each patch of maps (N, H, W)."""
    votes = torch.nn.functional.one_hot(maps).permute(0, 3, 1, 2).float()
    return torch.nn.functional.avg_pool2d(votes, patch).argmax(1).flatten()


def probe_patches(model: Encoders | None, task: Task, others: Sequence[Task], sensors: Sensors) -> tuple[nn.Linear, list[float]]:
    """Logistic regression from a token (see `patch_features`) to its patch's class, fitted on the task's training scenes: accuracy in
    per cent on its test scenes, then on the test scenes of `others` (larger images, same head)."""
    pairs = [
        (patch_features(model, one, split.images, sensors).flatten(0, 1), patch_labels(split.labels))
        for one, split in [(task, task.train), (task, task.test), *((other, other.test) for other in others)]
    ]
    head, own = linear_probe_lbfgs(pairs[0], pairs[1], classes=task.classes, max_iter=100)
    with torch.no_grad():
        return head, [100 * own] + [100 * accuracy(labels, head(tokens).argmax(1)) for tokens, labels in pairs[2:]]


@torch.no_grad()
def retrieval(model: CROMA, task: Task) -> float:
    """Share of test radar images, in per cent, whose nearest optical image by the contrastive projections is their own, averaged with the reverse."""
    encoders = model.encoders
    radar = encode(encoders, task, task.test.images, lambda found: model.radar_proj(found.vector("radar")), "radar")
    optical = encode(encoders, task, task.test.images, lambda found: model.optical_proj(found.vector("optical")), "optical")
    cosine = unit(radar) @ unit(optical).T
    own = torch.arange(len(cosine))
    return 50 * (accuracy(own, cosine.argmax(1)) + accuracy(own, cosine.argmax(0)))
