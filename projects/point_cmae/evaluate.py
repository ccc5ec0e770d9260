"""Linear probe of frozen features: pre-train what is missing for every seed, measure on held-out clouds, save the records, print them.

`python -m projects.point_cmae.evaluate --config projects/point_cmae/recipes/demo.yaml` (no data needed). Fine-tuning, few-shot and voting: `finetune`;
part segmentation: `segment`. Beside the row stand, by `compare`: variants of the method, an untrained encoder, and moments of the cloud.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from common.checkpoint import write_text
from common.data import checksum
from common.engine import check_recipe, seed_everything
from common.kernels.points import chamfer
from common.probes import accuracy, balanced_accuracy, summarise
from common.recipe import parse, to_yaml
from common.results import Record, save_record
from projects.point_cmae import pictures, pretrain
from projects.point_cmae.augment import normalise
from projects.point_cmae.data import GENERATED, Name, Sizes, draw, load, stacked
from projects.point_cmae.model import PointCMAE, group, sample_points
from projects.point_cmae.optim import is_main

Variant = Literal["no-contrast", "paired", "one-branch", "untrained", "moments"]
CHANGES: dict[str, dict[str, Any]] = {
    "no-contrast": {"contrast": "none"},
    "paired": {"contrast": "paired"},
    "one-branch": {"branches": 1, "class_token": False, "contrast": "none", "reconstruction_weight": 1.0},
}
"""What a trained variant changes of the model."""
MOMENTS_C = 1.0
"""C of the SVM on moments, which are few."""


@dataclass(frozen=True)
class Recipe:
    """A linear SVM on [class token; maximum] of frozen tokens."""

    name: str = "demo"
    """Name of the recipe: its file's, and the run folder's."""
    demo: bool = False
    """Figures and pictures go to the report of the demos instead of the project's results."""
    pretrain: pretrain.Recipe = field(default_factory=pretrain.Recipe)
    """Pre-training of each seed; its name, seed, data_root and out come from here."""
    data: Name = "solids-hard"
    """Labelled clouds of the probe."""
    labels: PositiveInt | None = None
    """Training clouds of a class, drawn by seed; None: all."""
    draws: PositiveInt = 1
    """Draws of the labels whose accuracies are averaged."""
    svm_c: PositiveFloat = 0.01
    """C of the linear SVM on standardised features."""
    compare: list[Variant] = field(default_factory=list)
    """Measured beside the row."""
    picture: str = ""
    """Name of the picture of clouds, masked clouds and reconstructions of the first seed; empty: none."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the row: pre-training, masks, labels drawn; the generated clouds too."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/point_cmae"
    """Where run folders go."""


class Held(NamedTuple):
    """Of clouds that pre-training did not see, under masks drawn from a fixed seed."""

    chamfer: float  # mean over the branches, squared distance in units of the cloud's radius
    constant: float  # of one fixed patch predicted everywhere, fitted to training patches
    cosine: float  # of the two features of tokens that both masks hide; 0 with one branch
    spread: float


def probe_clouds(recipe: Recipe, split: Literal["train", "test"], seed: int) -> tuple[Tensor, Tensor]:
    """Clouds (n, points, 3) by farthest points of each, and their labels (n,)."""
    before = recipe.pretrain
    clouds = load(recipe.data, split, data_root=recipe.data_root, seed=seed, sizes=Sizes(*before.sizes))
    clouds.train = False  # the same draw of points for every variant
    points = stacked([clouds[i][0] for i in range(len(clouds))], clouds.name)
    return torch.cat([sample_points(part, before.points) for part in points.split(64)]), clouds.labels


def drawn_labels(labels: Tensor, count: int | None, seed: int, draw: int) -> Tensor:
    """Numbers of `count` samples of every class, in an order drawn from (seed, draw); all samples if `count` is None."""
    if count is None:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + draw))
    return torch.cat([order[labels[order] == label][:count] for label in labels.unique()])


def probe(recipe: Recipe, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], c: float) -> tuple[float, float]:
    """`svm` of features and labels, means over the draws of training labels."""
    found = []
    for number in range(recipe.draws):
        numbers = drawn_labels(train[1], recipe.labels, seed, number)
        found.append(svm((train[0][numbers], train[1][numbers]), test, c))
    return summarise([one for one, _ in found]).mean, summarise([balanced for _, balanced in found]).mean


def svm(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], c: float) -> tuple[float, float]:
    """Accuracy and balanced accuracy in per cent of a linear SVM on features (n, D), standardised by the training ones."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    found = make_pipeline(StandardScaler(), LinearSVC(C=c, max_iter=20000, random_state=0)).fit(train[0].numpy(), train[1].numpy())
    predicted = found.predict(test[0].numpy())
    return 100 * accuracy(test[1], predicted), 100 * balanced_accuracy(test[1], predicted)


def moments(points: Tensor) -> Tensor:
    """(n, 30) of clouds (n, N, 3): what a centroid, a box, and second and third moments tell."""
    centre, low, high = points.mean(1), points.amin(1), points.amax(1)
    centred = points - centre[:, None]
    covariance = centred.transpose(1, 2) @ centred / points.shape[1]
    spread = torch.linalg.eigvalsh(covariance)
    size = (high - low).sort(1).values
    third = centred.pow(3).mean(1)
    norms = points.norm(dim=2).quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), dim=1).T
    return torch.cat(
        [centre, low, high, size, covariance.flatten(1)[:, [0, 1, 2, 4, 5, 8]], spread, third, norms, norms.std(1, keepdim=True)], 1
    )


@torch.no_grad()
def features(model: PointCMAE, points: Tensor, pool: Literal["class_max", "mean_max"], batch: int = 64) -> Tensor:
    """(n, 2C) of clouds (n, N, 3), model in eval mode."""
    device = next(model.parameters()).device
    return torch.cat([model.eval().features(part.to(device), pool).cpu() for part in points.split(batch)])


def constant_patch(patches: Tensor, steps: int = 150) -> Tensor:
    """The fixed patch (k, 3) with the least chamfer distance to patches (n, k, 3), fitted by Adam from one of them: what knows nothing of the cloud."""
    patch = patches[0].clone().requires_grad_()
    optimizer = torch.optim.Adam([patch], lr=0.01)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            chamfer(patch.expand(len(patches), -1, -1), patches).backward()
            optimizer.step()
    return patch.detach()


@torch.no_grad()
def held_out(model: PointCMAE, recipe: pretrain.Recipe, *, count: int = 128, batch: int = 32) -> Held:
    """Reconstruction and agreement on the test clouds of the pre-training data, the same clouds and masks for every variant."""
    device = next(model.parameters()).device
    model.eval()

    def clouds(split: Literal["pretrain", "test"]) -> Tensor:
        data = load(recipe.data, split, data_root=recipe.data_root, size=recipe.points, seed=recipe.seed, sizes=Sizes(*recipe.sizes))
        numbers = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
        return torch.stack([normalise(draw(data.read(int(i)), recipe.points, torch.Generator().manual_seed(int(i)))) for i in numbers])

    generator = torch.Generator(device).manual_seed(1234)
    outputs = [model(part.to(device), generator=generator) for part in clouds("test").split(batch)]
    sizes = torch.tensor([float(len(out.centres)) for out in outputs])
    patches = group(clouds("pretrain")[:32], model.num_group, model.group_size)[1].flatten(0, 1)
    fixed = constant_patch(patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:256]])
    targets = torch.cat([branch.target.flatten(0, 1) for out in outputs for branch in out.branches]).cpu()

    def mean(values: Sequence[Tensor]) -> float:
        return float((torch.stack(list(values)).cpu() * sizes).sum() / sizes.sum())

    return Held(
        mean([out.reconstruction for out in outputs]) / len(model.decoders),
        float(chamfer(fixed.expand(len(targets), -1, -1), targets)),
        mean([out.cosine for out in outputs]),
        mean([out.spread for out in outputs]),
    )


def variant_of(recipe: Recipe, what: str, seed: int) -> pretrain.Recipe:
    """The pre-training recipe of the row ("full") or of a variant, for one seed."""
    name = recipe.name if what == "full" else f"{recipe.name}-{what}"
    before = replace(recipe.pretrain, name=name, seed=seed, data_root=recipe.data_root, out=recipe.out)
    return replace(before, model=replace(before.model, **CHANGES.get(what, {})))


def score(recipe: Recipe, what: str, seed: int) -> dict[str, float]:
    """Train and measure one seed of the row or of a variant, or read what an earlier call found (score.json of the run folder)."""
    before = variant_of(recipe, what, seed)
    asked = replace(recipe, seeds=[seed], compare=[], picture="", pretrain=before)
    folder = before.folder
    check_recipe(folder / "probe", to_yaml(asked))
    if (kept := folder / "probe" / "score.json").is_file():
        return json.loads(kept.read_text())
    began, found = time.monotonic(), {}
    train, test = (probe_clouds(recipe, split, seed) for split in ("train", "test"))
    if what == "moments":
        found["SVM accuracy (%)"], found["balanced"] = probe(
            recipe, seed, (moments(train[0]), train[1]), (moments(test[0]), test[1]), MOMENTS_C
        )
    else:
        if what == "untrained":
            seed_everything(seed)
            model = pretrain.build(before)
        else:
            model = pretrain.main(before)
        model.cpu()
        pools: list[Literal["class_max", "mean_max"]] = ["mean_max", "class_max"] if len(model.class_tokens) else ["mean_max"]
        for pool in pools:  # the one-branch baseline has no class token
            pair = [(features(model, points, pool), labels) for points, labels in (train, test)]
            value, balanced = probe(recipe, seed, pair[0], pair[1], recipe.svm_c)
            found |= {"SVM accuracy (%)": value, "balanced": balanced, f"SVM accuracy, {pool} (%)": value}
        if what != "untrained":
            held = held_out(model, before)
            found |= {"chamfer, held-out x 1000": 1000 * held.chamfer, "chamfer, constant patch x 1000": 1000 * held.constant}
            found |= {"spread, held-out": held.spread} | ({"cosine, held-out": held.cosine} if before.model.branches == 2 else {})
    found["seconds"] = round(time.monotonic() - began, 1)
    if is_main():
        write_text(folder / "probe" / "recipe.yaml", to_yaml(asked))
        write_text(kept, json.dumps(found))
    return found


METRICS = (
    "SVM accuracy (%)",
    "SVM accuracy, mean_max (%)",
    "cosine, held-out",
    "spread, held-out",
    "chamfer, held-out x 1000",
    "chamfer, constant patch x 1000",
)


def main(recipe: Recipe) -> dict[str, dict[str, list[float]]]:
    """Figures by variant and metric, one a seed; recorded on the main process."""
    said: dict[str, dict[str, list[float]]] = {}
    for what in ["full", *recipe.compare]:
        scores = {seed: score(recipe, what, seed) for seed in recipe.seeds}
        said[what] = {metric: [s[metric] for s in scores.values()] for metric in METRICS if all(metric in s for s in scores.values())}
        for metric, values in said[what].items() if is_main() else ():
            _record(recipe, what, metric, values, list(scores.values()))
            print(f"{recipe.name}, {what}: {metric} {summarise(values)}", flush=True)
    if recipe.picture and is_main():
        _picture(recipe)
    return said


def _record(recipe: Recipe, what: str, metric: str, values: list[float], scores: list[dict[str, float]]) -> None:
    test = load(recipe.data, "test", data_root=recipe.data_root, size=None, seed=0, sizes=Sizes(1, 1, 1))
    before = recipe.pretrain
    extra: dict[str, Any] = {
        "row": what,
        "pre_training": "none" if what in ("untrained", "moments") else before.data,
        "labels_per_class": recipe.labels or "all",
        "draws": recipe.draws,
        "svm_c": MOMENTS_C if what == "moments" else recipe.svm_c,
    }
    extra |= {"balanced_accuracy": [s["balanced"] for s in scores]} if metric == "SVM accuracy (%)" else {}
    extra |= {"features": "moments" if what == "moments" else "mean_max" if "mean_max" in metric or what == "one-branch" else "class_max"}
    weights = {"untrained": "untrained", "moments": "none"}.get(what, "trained here")
    data = {"name": test.name, "split": "held out", "sha256": checksum(test.files) if test.files else "generated"}
    hours = sum(s["seconds"] for s in scores) / 3600
    made = Record(f"recipes/{recipe.name}.yaml", metric, values, list(recipe.seeds), weights, data, hours, extra)
    save_record("point_cmae", made, demo=recipe.demo)


def _picture(recipe: Recipe) -> None:
    before = variant_of(recipe, "full", recipe.seeds[0])
    model = pretrain.main(before).cpu().eval()
    clouds = load(before.data, "test", data_root=before.data_root, size=before.points, seed=before.seed, sizes=Sizes(*before.sizes))
    chosen = [int((clouds.labels == label).nonzero()[0]) for label in range(len(clouds.classes))[-5:]]  # the first cloud of a class
    points = torch.stack([normalise(draw(clouds.read(i), before.points, torch.Generator().manual_seed(i))) for i in chosen])
    names = [clouds.classes[int(clouds.labels[i])] for i in chosen]
    pictures.reconstruction(recipe.picture, model, points, names, demo=recipe.demo or before.data not in GENERATED)


if __name__ == "__main__":
    main(parse(Recipe))
