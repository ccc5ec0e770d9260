"""Obtain a row in one command: train what is missing, measure frozen features, save the records, draw the pictures.

`python -m projects.mixed_ae.evaluate --config projects/mixed_ae/recipes/demo.yaml`; fine-tuning and the linear probe with crops: `projects.mixed_ae.finetune`.
Evaluation never mixes: features come from whole images through ordinary attention.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
from accelerate import PartialState
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from common.checkpoint import write_text
from common.engine import check_recipe, seed_everything
from common.probes import accuracy, knn_classify, linear_probe_lbfgs
from common.recipe import parse, to_yaml
from common.results import Record, picture_path, save_record
from projects.mixed_ae import pictures, pretrain
from projects.mixed_ae.data import Samples, Split, check_labelled, textured
from projects.mixed_ae.information import linear_prediction
from projects.mixed_ae.mixing import draw, group_size
from projects.mixed_ae.model import MixedAE
from projects.mixed_ae.pretrain import Variant

LINEAR, KNN, IOU = "linear accuracy (%)", "k-NN accuracy (%)", "object IoU (%)"
FILLERS = {0.0: "error with fillers / without, related 0", 0.8: "error with fillers / without, related 0.8"}
RECOGNISED, CONTRAST = "homologous accuracy (%)", "contrastive loss"


@dataclass(frozen=True)
class Recipe:
    """A row, and what it is compared with."""

    pretrain: pretrain.Recipe = field(default_factory=pretrain.Recipe)
    """Of each seed's training."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Of the runs."""
    compare: list[Variant] = field(default_factory=list)
    """Baselines and ablations trained and measured likewise."""
    untrained: bool = False
    """Measure an untrained encoder too."""
    information: bool = False
    """Measure what fillers tell about hidden patches of textured objects (least squares; no training)."""
    neighbours: PositiveInt = 20
    """k of k-NN."""
    dense_images: PositiveInt = 256
    """Images whose patches the linear patch classifier is fitted on, and as many that it is measured on (textured objects)."""
    segments: bool = False
    """Add the mean segment vector to patches when features are taken."""
    demo: bool = False
    """Records and pictures go to the report of embedded defaults."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/mixed_ae"
    """Where run folders go."""


@torch.no_grad()
def features(model: MixedAE, split: Split, crop: bool, dense: int, *, segments: bool = False, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Mean patch token (N, D) of whole images in order, and all patch tokens (`dense`, L, D) of the first ones, on the CPU."""
    device, size = model.cls_token.device, model.image_shape[1]
    samples = Samples(split, size, "centre" if crop and not isinstance(split.pixels, Tensor) else "none")
    model.eval()
    means, patches = [], []
    for rows in torch.arange(len(split)).split(batch):
        images = torch.stack([samples[int(i)][0] for i in rows]).to(device)
        tokens = model.features(images, segments=segments)[:, 1:].float().cpu()
        means.append(tokens.mean(1))
        patches.append(tokens[: max(0, dense - int(rows[0]))])  # all of them would not fit into memory for larger sets
    return torch.cat(means), torch.cat(patches)


def iou(truth: Tensor, found: Tensor) -> float:
    """Mean over the classes 0 and 1 of intersection over union."""
    scores = [((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum().clamp(min=1) for c in (0, 1)]
    return float(torch.stack(scores).mean())


def measure(model: MixedAE, train: Split, test: Split, recipe: Recipe) -> dict[str, float]:
    """Frozen features in per cent: class by logistic regression and k-NN on the mean patch token, object by a linear classifier of patches."""
    crop, segments = recipe.pretrain.crop, recipe.segments and model.segment_embed is not None
    dense = 0 if train.objects is None else recipe.dense_images
    mean, seen = zip(*(features(model, split, crop, dense, segments=segments) for split in (train, test)), strict=True)
    found = {
        LINEAR: 100 * linear_probe_lbfgs((mean[0], train.labels), (mean[1], test.labels), max_iter=300, tolerance=1e-5)[1],
        KNN: 100 * accuracy(test.labels, knn_classify(mean[0], train.labels, mean[1], k=recipe.neighbours).argmax(1)),
    }
    if train.objects is not None and test.objects is not None:
        patches = [
            (part.flatten(0, 1), (split.objects[:dense] > 0.5).long().flatten()) for part, split in zip(seen, (train, test), strict=True)
        ]
        head, _ = linear_probe_lbfgs(*patches, max_iter=200, tolerance=1e-5)
        with torch.no_grad():
            found[IOU] = 100 * iou(patches[1][1], head(patches[1][0]).argmax(1))
    return found


def score(recipe: Recipe, run: pretrain.Recipe, data: tuple[Split, Split]) -> dict[str, float]:
    """Figures of one seed of one method, trained where missing; kept in the run folder, one file a way of measuring."""
    kept = run.folder / f"score-k{recipe.neighbours}-dense{recipe.dense_images}{'-segments' if recipe.segments else ''}.json"
    check_recipe(run.folder, to_yaml(run))
    if kept.is_file():
        return json.loads(kept.read_text())
    model = pretrain.main(run, data[0])
    began = time.monotonic()
    history = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    seed_everything(run.seed)
    found = measure(model, *data, recipe)
    last = history[-1]
    found |= {"reconstruction loss": last["reconstruction"]} | ({CONTRAST: last["contrast"]} if "contrast" in last else {})
    if recognised := [100 * value for name, value in last.items() if name.startswith("accuracy_")]:
        found |= {RECOGNISED: fmean(recognised), "homologous accuracy, best block (%)": max(recognised)}
    found["seconds"] = round(last["seconds"] + time.monotonic() - began, 1)
    if pretrain.is_main():
        write_text(kept, json.dumps(found))
    PartialState().wait_for_everyone()
    return found


def information(seed: int, group: int, groups: int = 800) -> dict[str, float]:
    """Error of the best linear guess of hidden patch colours with fillers over that without, for unrelated and for related images of a group."""
    out = {}
    owner = draw(torch.rand(16, generator=torch.Generator().manual_seed(seed)), group)
    for related, metric in FILLERS.items():
        images = textured(groups * group, seed, size=16, patch=4, related=related, group=group).pixels
        guess = linear_prediction(images, 4, group, owner)
        out[metric] = guess.mixed / guess.masked
    return out


def main(recipe: Recipe) -> Path | None:
    """Every method and metric, in the order of the recipe; gives the records' file (None on processes other than the first)."""
    base = replace(recipe.pretrain, data_root=recipe.data_root or recipe.pretrain.data_root, out=recipe.out)
    recipe = replace(recipe, pretrain=base)
    runs = {"all" if base.method.mixing != "none" else "mae": base}
    runs |= {name: pretrain.variant(base, name) for name in recipe.compare}
    found: dict[str, dict[int, dict[str, float]]] = {}

    def note(row: str, seed: int, values: dict[str, float]) -> None:
        found.setdefault(row, {})[seed] = values
        if pretrain.is_main():
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "seconds")
            print(f"{base.name}, {row}, seed {seed}: {shown}", flush=True)

    for seed in recipe.seeds:
        data = pretrain.splits(replace(base, seed=seed))
        check_labelled(*data)
        for name, run in runs.items():
            note(name, seed, score(recipe, replace(run, seed=seed), data))
        if recipe.untrained:
            began = time.monotonic()
            seed_everything(seed)
            note("untrained", seed, measure(pretrain.build(base), *data, recipe) | {"seconds": time.monotonic() - began})
        if recipe.information:
            began = time.monotonic()
            note("information", seed, information(seed, group_size(base.method.ratio)) | {"seconds": time.monotonic() - began})
    if not pretrain.is_main():
        return None
    for row, by_seed in found.items():
        path = _record(recipe, row, by_seed, data)
    if base.method.mixing != "none":
        _draw(replace(base, seed=recipe.seeds[0]), recipe.demo)
    return path


def _record(recipe: Recipe, row: str, by_seed: dict[int, dict[str, float]], data: tuple[Split, Split]) -> Path:
    hours = sum(values["seconds"] for values in by_seed.values()) / 3600
    weights = {"untrained": "untrained", "information": "least squares"}.get(row, "trained here")
    run = recipe.pretrain
    budget = f"{run.training.steps or run.training.epochs} {'steps' if run.training.steps else 'epochs'} of {run.batch_size} images"
    names = [name for name in next(iter(by_seed.values())) if name != "seconds"]
    about = {"name": "textured objects" if run.data == "textured" else run.data, "split": "test", "sha256": data[1].sha256}
    about["training_sha256"] = data[0].sha256
    for name in names:
        values = [values[name] for values in by_seed.values()]
        record = Record(f"recipes/{run.name}.yaml", name, values, list(by_seed), weights, about, hours, {"row": row, "budget": budget})
        path = save_record("mixed_ae", record, demo=recipe.demo)
    return path


def _draw(run: pretrain.Recipe, demo: bool) -> None:
    """Reconstructions, the keys that patches keep, and the course of the homologous accuracy, of one trained run."""
    from common.checkpoint import load_model

    model = load_model(MixedAE, run.folder)
    test = pretrain.splits(run)[1]
    samples = Samples(test, run.model.image_size, "none" if isinstance(test.pixels, Tensor) else "centre")
    images = torch.stack([samples[i][0] for i in range(run.group)])
    untracked = demo or run.data != "textured"  # real images are not published
    pictures.reconstructions(picture_path("mixed_ae", f"{run.name}_reconstructions", demo=untracked), model, images, run.seed)
    if model.homologous:
        pictures.kept_keys(picture_path("mixed_ae", f"{run.name}_kept_keys", demo=untracked), model, images, run.seed)
    history = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    pictures.course(picture_path("mixed_ae", f"{run.name}_course", demo=demo), history, run.method.ratio)


if __name__ == "__main__":
    main(parse(Recipe))
