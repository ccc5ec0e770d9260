"""Obtain a row: for every seed and composition of batches train what is missing, probe the frozen network, save the records, print them.

`python -m projects.g_simclr.evaluate --config projects/g_simclr/recipes/cifar10.yaml --data-root D`; fine-tuning: `projects.g_simclr.finetune`.
Finished runs are kept (score.json in the run folder), so the same command goes on where it stopped. `--weights FILE.h5 --arms '[reference]'`
probes a checkpoint of the reference instead.
"""

from __future__ import annotations

import copy
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import write_text
from common.engine import check_recipe, seed_everything
from common.probes import accuracy, knn_classify, linear_probe_lbfgs, summarise
from common.recipe import parse, to_yaml
from common.results import Record, picture_path, save_record
from projects.g_simclr import pretrain
from projects.g_simclr.batches import account, same_label_pairs
from projects.g_simclr.data import Images, Splits, load
from projects.g_simclr.encoders import glorot_uniform
from projects.g_simclr.model import PROBES, GSimCLR
from projects.g_simclr.pretrain import Arm, Recipe, one_run, run_folder
from projects.g_simclr.stopping import processes
from projects.g_simclr.weights import load_reference

FEW, DRAWS = 2, 5  # labels a class, and draws of them, of the few-label measure
METRICS = {
    "linear": "top-1 (%)",
    "neighbour": "1-NN accuracy (%)",
    "few": "accuracy with 2 labels per class (%)",
    "false_negatives": "false negatives (% of negative pairs)",
}


@torch.no_grad()
def features(model: GSimCLR, images: Images) -> dict[str, Tensor]:
    """Features of each probe, (N, width), as the frozen network gives them in eval mode for images as they are."""
    model.eval()
    device = next(model.parameters()).device
    found = [model.probes(part.to(device)) for part in images.batches()]
    return {name: torch.cat([part[name] for part in found]) for name in PROBES}


class Probed(NamedTuple):
    """`accuracy`: share of test images at the best epoch. `head`: with the best weights. `losses`: held-out loss of each epoch."""

    accuracy: float
    head: nn.Linear
    losses: list[float]


def linear_probe(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    epochs: int,
    lr: float = 1e-3,
    batch_size: int = 64,
    patience: int = 2,
    seed: int = 0,
) -> Probed:
    """One dense layer under Adam, stopped after `patience` epochs without a lower held-out loss, best weights restored.

    Args:
        train, held_out, test: features (N, D) as they are, labels (N,). The paper's protocol passes the test images as held_out too.
    """
    seed_everything(seed)
    features, labels = train
    head = nn.Linear(features.shape[1], classes).to(features.device)
    glorot_uniform(head)
    best, losses = copy.deepcopy(head), []
    update = torch.optim.Adam(head.parameters(), lr=float(lr), eps=1e-7, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(features), device=features.device).split(batch_size):
            update.zero_grad()
            F.cross_entropy(head(features[rows]), labels[rows]).backward()
            update.step()
        with torch.no_grad():
            losses.append(float(F.cross_entropy(head(held_out[0]), held_out[1])))
        if losses[-1] == min(losses):
            best = copy.deepcopy(head)
        if len(losses) - 1 - losses.index(min(losses)) >= patience:
            break
    with torch.no_grad():
        return Probed(accuracy(test[1], best(test[0]).argmax(1)), best, losses)


def few_labels(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> float:
    """Test accuracy of logistic regression on `FEW` labelled images a class, standardised, mean over `DRAWS` draws (the same for every run)."""
    scores = []
    for draw in range(DRAWS):
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(draw)).to(train[1].device)
        rows = torch.cat([order[train[1][order] == c][:FEW] for c in range(classes)])
        scores.append(linear_probe_lbfgs((train[0][rows], train[1][rows]), test, classes=classes)[1])
    return sum(scores) / len(scores)


def split_features(model: GSimCLR, splits: Splits, protocol: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Features and labels by part (train, held_out, test)."""
    train, held_out = (splits.train, splits.test) if protocol == "reference" else splits.held_out()
    device = next(model.parameters()).device
    parts = {"train": train, "held_out": held_out, "test": splits.test}
    return {name: features(model, part) for name, part in parts.items()}, {name: part.known().to(device) for name, part in parts.items()}


def probe(model: GSimCLR, splits: Splits, recipe: Recipe) -> dict[str, float]:
    """Every measure of the recipe in per cent: `linear P1` ..., `neighbour`, `few`."""
    found, labels = split_features(model, splits, recipe.protocol)
    classes, how, out = len(splits.train.classes), recipe.probe, {}
    if "linear" in how.measures:
        for name in PROBES:
            parts = [(found[part][name], labels[part]) for part in ("train", "held_out", "test")]
            epochs = how.epochs_p1 if name == "P1" and how.epochs_p1 else how.epochs
            result = linear_probe(
                *parts, classes=classes, epochs=epochs, lr=how.lr, batch_size=how.batch_size, patience=how.patience, seed=recipe.seed
            )
            out[f"linear {name}"] = 100 * result.accuracy
    known = {part: (found[part]["P3"], labels[part]) for part in ("train", "test")}
    if "neighbour" in how.measures:
        guess = knn_classify(*known["train"], known["test"][0], k=1, temperature=None, classes=classes).argmax(1)
        out["neighbour"] = 100 * accuracy(known["test"][1], guess)
    if "few" in how.measures:
        out["few"] = 100 * few_labels(known["train"], known["test"], classes)
    return out


def score(recipe: Recipe, splits: Splits) -> dict[str, Any]:
    """Train and probe one seed and composition, or read what an earlier call found: values by measure, seconds, and more for the record."""
    if recipe.weights is not None:
        began = time.monotonic()
        model = pretrain.build(recipe, splits.train.pixels.shape[1]).to(processes().device)
        load_reference(model, recipe.weights)
        return {"values": probe(model, splits, recipe), "seconds": round(time.monotonic() - began, 1)}
    check_recipe(run_folder(recipe), to_yaml(one_run(recipe, recipe.seed, recipe.batches)))
    kept = run_folder(recipe) / "score.json"
    wanted = json.loads(json.dumps({"protocol": recipe.protocol, **vars(recipe.probe)}))
    if kept.is_file() and (found := json.loads(kept.read_text()))["probe"] == wanted:
        return found
    model = pretrain.main(recipe, splits)
    began = time.monotonic()
    lines = [json.loads(line) for line in (run_folder(recipe) / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "images_used" in line]
    found = {"values": probe(model, splits, recipe), "probe": wanted, "loss": lines[-1]["loss"], "images_used": epochs[-1]["images_used"]}
    if "false_negatives" in epochs[-1]:
        found["values"]["false_negatives"] = 100 * sum(line["false_negatives"] for line in epochs) / len(epochs)
    found["seconds"] = round(lines[-1]["seconds"] + time.monotonic() - began, 1)
    if is_main():
        write_text(kept, json.dumps(found))
    return found


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def label(arm: Arm) -> str:
    """How rows of tables.yaml name a composition of batches."""
    return {"random": "SimCLR", "oracle": "true labels"}.get(arm, f"G-SimCLR, {arm}")


def main(recipe: Recipe) -> Path | None:
    """Every seed and arm of the recipe; gives the records' file (None on processes other than the first)."""
    splits = load(recipe.data, data_root=recipe.data_root, image_size=recipe.image_size, cache=recipe.cache)
    splits.test.known()
    scores: dict[Arm, dict[int, dict[str, Any]]] = {arm: {} for arm in recipe.arms}
    for seed in recipe.seeds:
        for arm in recipe.arms:
            run = replace(one_run(recipe, seed, arm), probe=recipe.probe, weights=recipe.weights)
            scores[arm][seed] = score(run, splits)
            shown = ", ".join(f"{name} {value:.2f}" for name, value in scores[arm][seed]["values"].items())
            print(f"{recipe.name}: seed {seed}, {label(arm)}: {shown} ({scores[arm][seed]['seconds']:.0f} s)", flush=True)
    if not is_main():
        return None
    for arm in recipe.arms:
        path = save(recipe, arm, scores[arm], splits)
    if guided(recipe):
        pictures(recipe, splits)
    return path


def guided(recipe: Recipe) -> list[Arm]:
    """The recipe's arms that are trained here on batches chosen by pseudo-labels."""
    return [arm for arm in recipe.arms if arm not in ("random", "oracle")] if recipe.weights is None else []


def same_cluster_pairs(recipe: Recipe, arm: Arm, splits: Splits) -> list[float]:
    """Mean pairs of one pseudo-label in a batch of the first epoch, by seed; also of arms that pseudo-labels do not guide, empty if none does."""
    out, by = [], guided(recipe)
    for seed in recipe.seeds if by else []:
        run = one_run(recipe, seed, arm)
        made = pretrain.batch_sampler(run, pretrain.cluster_numbers(run, splits)).compose(0)
        out.append(account(made, pretrain.cluster_numbers(one_run(recipe, seed, by[0]), splits)).same_cluster_pairs)
    return out


def save(recipe: Recipe, arm: Arm, scores: dict[int, dict[str, Any]], splits: Splits) -> Path:
    """One record a measure of one composition of batches; gives their file."""
    pairs = same_cluster_pairs(recipe, arm, splits)
    for measure in next(iter(scores.values()))["values"]:
        kind, _, place = measure.partition(" ")
        values = [s["values"][measure] for s in scores.values()]
        record = Record(
            recipe=f"recipes/{recipe.name}.yaml",
            metric=METRICS[kind],
            values=values,
            seeds=list(scores),
            weights="trained here" if recipe.weights is None else "official, converted",
            data={"name": recipe.data, "split": "test", "sha256": f"train {splits.train.sha256}, test {splits.test.sha256}"},
            hours=sum(s["seconds"] for s in scores.values()) / 3600,
            extra={
                "row": f"{label(arm)}{f' {place}' if place else ''}",
                "protocol": f"stopped on {'test' if recipe.protocol == 'reference' else 'held-out training'} images",
                "loss": [s.get("loss") for s in scores.values()],
                "same_cluster_pairs": pairs,
                "images_used": [s.get("images_used") for s in scores.values()],
            },
        )
        path = save_record("g_simclr", record, demo=recipe.name == "demo")
        print(f"{recipe.name}, {record.extra['row']}: {summarise(values)} {record.metric}", flush=True)
    return path


def pictures(recipe: Recipe, splits: Splits) -> None:
    """Images of eight clusters, and how same-cluster pairs and wrong negatives spread over the batches of an epoch."""
    import matplotlib.pyplot as plt

    numbers = pretrain.cluster_numbers(one_run(recipe, recipe.seeds[0], "balanced"), splits)
    largest = numbers.bincount().argsort(descending=True)[:8]
    rows = []
    for number in largest:
        members = splits.train.pixels[(numbers == number).nonzero().flatten()[:20]]
        members = F.pad(members, (1, 1, 1, 1, 0, 0, 0, 20 - len(members)))  # a border, and nothing where a cluster has fewer images
        rows.append(members.permute(2, 0, 3, 1).flatten(1, 2))  # (H, 20 W, C)
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axis.imshow(torch.cat(rows).squeeze(2), cmap="gray_r")
    axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{splits.train.name}: images of the eight largest of {recipe.clusters} clusters, one a row")
    figure.savefig(picture_path("g_simclr", f"{recipe.name}_clusters", demo=recipe.name == "demo" or recipe.data != "digits"), dpi=110)
    plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    arms = {
        arm: pretrain.batch_sampler(one_run(recipe, recipe.seeds[0], arm), numbers).compose(0)
        for arm in ("random", "reference", "balanced")
    }
    for axis, what, by in zip(axes, ("same-cluster pairs", "pairs of one class"), (numbers, splits.train.known()), strict=True):
        for arm, made in arms.items():
            axis.plot(
                same_label_pairs(made, by), ".", markersize=3, label=f"{arm}, mean {float(same_label_pairs(made, by).double().mean()):.1f}"
            )
        axis.set(xlabel="batch of the first epoch", ylabel=f"{what} in a batch", title=what)
        axis.legend()
    figure.suptitle(
        f"{recipe.clusters} clusters, batches of {recipe.batch_size}; wrong negatives of random batches {100 * account(arms['random'], numbers, splits.train.known()).false_negatives:.1f} %"
    )
    figure.savefig(picture_path("g_simclr", f"{recipe.name}_batches", demo=recipe.name == "demo"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(parse(Recipe))
