"""Obtain the embedded default's figures: trains the seeds that are missing, then k-NN on frozen features beside an untrained encoder."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from common.engine import seed_everything
from common.probes import accuracy, knn_classify
from common.recipe import parse
from common.results import Record, save_record
from projects._skeleton import pretrain
from projects._skeleton.data import digits
from projects._skeleton.model import MaskedAutoencoder


@dataclass(frozen=True)
class Recipe:
    """k-NN of frozen features."""

    pretrain: pretrain.Recipe = field(default_factory=pretrain.Recipe)
    """Of each seed's training."""
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    """Runs to average."""
    neighbours: int = 10
    """k."""


@torch.no_grad()
def knn(model: MaskedAutoencoder, neighbours: int) -> float:
    """Test accuracy in per cent."""
    data = digits()
    model.eval()
    train, test = (model.features(images) for images, _ in data)
    return 100 * accuracy(data.test[1], knn_classify(train, data.train[1], test, k=neighbours).argmax(1))


def main(recipe: Recipe) -> dict[str, list[float]]:
    """Figures by metric, one a seed; saved as records of the embedded default."""
    began = time.monotonic()
    found: dict[str, list[float]] = {"k-NN accuracy (%)": [], "k-NN accuracy, untrained (%)": []}
    for seed in recipe.seeds:
        found["k-NN accuracy (%)"].append(knn(pretrain.main(replace(recipe.pretrain, seed=seed)), recipe.neighbours))
        seed_everything(seed)
        found["k-NN accuracy, untrained (%)"].append(knn(MaskedAutoencoder(), recipe.neighbours))
    for metric, values in found.items():
        data = {"name": "scikit-learn digits", "split": "seeded permutation, last 397", "sha256": "ships with scikit-learn"}
        hours = (time.monotonic() - began) / 3600
        save_record("_skeleton", Record("recipes/demo.yaml", metric, values, recipe.seeds, "trained here", data, hours), demo=True)
        print(f"{metric}: {values}")
    return found


if __name__ == "__main__":
    main(parse(Recipe))
