"""Obtain a table row: pre-train what is missing (or read an official checkpoint), probe the frozen encoders, save the records, print them.

`python -m projects.croma.evaluate --config projects/croma/recipes/demo.yaml`. Experiments: "probes" = one vector an image, every protocol and
sensor asked for; "scenes" = the embedded default (classes present, patch maps, retrieval, larger images), beside variants that switch one thing off and probes without a network.
Fine-tuning and segmentation: `projects.croma.finetune`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from common.checkpoint import write_text
from common.data import root as data_root_of
from common.engine import check_recipe, seed_everything
from common.probes import linear_probe_lbfgs, mean_average_precision, summarise
from common.recipe import parse, to_yaml
from common.results import Record, picture_path, save_record
from projects.croma import pictures
from projects.croma.data import Task, TaskName, load_task
from projects.croma.model import CROMA, Encoders, Sensors
from projects.croma.pretrain import Recipe as Pretraining
from projects.croma.pretrain import is_main
from projects.croma.pretrain import main as pretrain
from projects.croma.probing import Pool, Probes, Protocol, patch_features, probe, probe_patches, retrieval, vectors
from projects.croma.weights import load_encoders

PAPER = "croma"
Variant = Literal[
    "raw-means",
    "untrained",
    "contrastive-only",
    "reconstruction-only",
    "sincos",
    "sincos-interpolated",
    "no-cross-bias",
    "shared-mask",
    "optical-target",
]
VARIANTS: dict[str, dict[str, Any]] = {
    "contrastive-only": {"reconstruction_weight": 0.0},
    "reconstruction-only": {"contrastive_weight": 0.0},
    "sincos": {"positions": "sincos"},
    "sincos-interpolated": {"positions": "sincos_interpolated"},
    "no-cross-bias": {"positions": "alibi_self"},
    "shared-mask": {"shared_mask": True},
    "optical-target": {"targets": "optical"},
}
SENSORS: tuple[Sensors, ...] = ("radar", "optical", "joint")


@dataclass(frozen=True)
class Recipe:
    """Frozen encoders, probed."""

    name: str = "scenes"
    """Name of the recipe: its file's."""
    experiment: Literal["scenes", "probes"] = "probes"
    """The embedded default, or protocols on a task."""
    pretrain: Pretraining = field(default_factory=Pretraining)
    """Of each seed; ignored with `weights`."""
    weights: str | None = None
    """Official checkpoint, a path below the data root, in place of pre-training."""
    untrained: bool = False
    """Probe encoders with their initial weights, too (experiment: probes)."""
    task: TaskName = "bigearthnet"
    """Labelled data (experiment: probes)."""
    share: float = 1.0
    """Of the training split."""
    sensors: list[Sensors] = field(default_factory=lambda: ["radar", "optical", "joint"])
    """Encoders to probe."""
    protocols: list[Protocol] = field(default_factory=lambda: ["linear"])
    """What to do with the features."""
    pool: Pool = "gap"
    """Vector of an image: head output (joint: mean of tokens), mean of tokens, or all three side by side (joint)."""
    probes: Probes = field(default_factory=Probes)
    """Settings of the protocols."""
    train: PositiveInt = 500
    """Generated training scenes of the probes (experiment: scenes)."""
    test: PositiveInt = 200
    """Generated test scenes."""
    larger: list[PositiveInt] = field(default_factory=lambda: [2, 4])
    """Factors of the side at which the patch probe is tested again."""
    compare: list[Variant] = field(default_factory=list)
    """Variants measured beside (experiment: scenes); raw-means = the probes on channel means of each patch, without a network."""
    demo: bool = False
    """Records and pictures go to the report of embedded defaults."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """Runs to average."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/croma"
    """Where run folders go."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: expected more than 0, at most 1")


# -- the embedded default -------------------------------------------------------------------------------------------------


def scene_figures(model: CROMA | None, recipe: Recipe) -> dict[str, float]:
    """Figures of one model on generated scenes, in per cent: (a) mAP of the classes present, (b) class of each patch, (c) retrieval, (d) larger sides.

    Without a model (a), (b) and (d) of each patch's channel means; (a) then takes their mean and deviation over the scene.
    """
    encoders = None if model is None else model.encoders
    side = int(recipe.pretrain.size)
    present = load_task("scenes", train=recipe.train, test=recipe.test, side=side)
    maps = load_task("scene-maps", train=recipe.train, test=recipe.test, side=side)
    larger = [load_task("scene-maps", train=1, test=max(4, recipe.test // factor**2), side=factor * side) for factor in recipe.larger]
    out = {}
    for sensors in SENSORS:
        if encoders is not None:
            found = vectors(encoders, present, sensors, recipe.pool)
        else:
            means = {part: patch_features(None, present, getattr(present, part).images, sensors) for part in ("train", "test")}
            found = {part: torch.cat([each.mean(1), each.std(1)], 1) for part, each in means.items()}
        head, _ = linear_probe_lbfgs(
            (found["train"], present.train.labels), (found["test"], present.test.labels), multi_label=True, l2=1e-2, max_iter=100
        )
        with torch.no_grad():
            out[f"mAP, {sensors} (%)"] = 100 * mean_average_precision(present.test.labels, head(found["test"]))
    for sensors in SENSORS:
        _, scores = probe_patches(encoders, maps, larger if sensors == "joint" else [], sensors)
        out[f"patch accuracy, {sensors} (%)"] = scores[0]
        for factor, score in zip(recipe.larger, scores[1:], strict=False):
            out[f"patch accuracy, joint, {factor} x side (%)"] = score
    if model is not None:
        out["retrieval (%)"] = retrieval(model, present)
    return out


def _variant(recipe: Recipe, what: str) -> Pretraining:
    architecture = replace(recipe.pretrain.model, **VARIANTS[what])
    return replace(recipe.pretrain, name=f"{recipe.pretrain.name}-{what}", model=architecture)


def model_of(recipe: Recipe, what: str, seed: int) -> CROMA:
    """The trained model of one seed, trained now if need be; the initial one for "untrained"."""
    if what == "untrained":
        seed_everything(seed)
        return recipe.pretrain.model.build()
    # interpolated positions are the sine-cosine model's, resized at test time
    trained = (
        _variant(recipe, "sincos") if what == "sincos-interpolated" else _variant(recipe, what) if what in VARIANTS else recipe.pretrain
    )
    model = pretrain(replace(trained, seed=seed, out=recipe.out, data_root=recipe.data_root))
    if what == "sincos-interpolated":
        model.encoders.positions = "sincos_interpolated"
        model.encoders.trained_grid = (recipe.pretrain.size // 8,) * 2
    return model.cpu()


def score_scenes(recipe: Recipe, what: str, seed: int) -> dict[str, float]:
    """Figures of one seed of the method ("full") or a variant; kept as scores-<seed>/<what>.json beside the run."""
    began = time.monotonic()
    folder = Path(recipe.out) / recipe.pretrain.name / f"scores-{seed}"
    check_recipe(folder, to_yaml(replace(recipe, compare=[], seeds=[seed])))
    kept = folder / f"{what}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    model = None if what == "raw-means" else model_of(recipe, what, seed)
    found = scene_figures(model, recipe)
    found["seconds"] = round(time.monotonic() - began, 1)
    if is_main():
        write_text(folder / "recipe.yaml", to_yaml(replace(recipe, compare=[], seeds=[seed])))
        write_text(kept, json.dumps(found))
        if model is not None and what == "full" and seed == recipe.seeds[0]:
            draw(model, recipe)
    return found


def draw(model: CROMA, recipe: Recipe) -> None:
    """Reconstruction, class map and similarity of one patch to the rest, of a generated test scene."""
    side = int(recipe.pretrain.size)
    maps = load_task("scene-maps", train=recipe.train, test=recipe.test, side=side)
    head, _ = probe_patches(model.encoders, maps, [], "joint")
    wide = load_task("scene-maps", train=1, test=max(4, recipe.test // 4), side=2 * side)
    pictures.reconstruction(model, torch.from_numpy(maps.test.images[:4]), picture_path(PAPER, "reconstruction", demo=recipe.demo))
    pictures.class_map(model.encoders, head, wide, picture_path(PAPER, "class_map", demo=recipe.demo))
    pictures.similarity(model.encoders, wide, picture_path(PAPER, "similarity", demo=recipe.demo))


# -- probes of a task -----------------------------------------------------------------------------------------------------


def encoders_of(recipe: Recipe, seed: int, *, untrained: bool = False) -> Encoders:
    """Official weights, or those of one seed's pre-training."""
    if recipe.weights is not None:
        return load_encoders(data_root_of(recipe.data_root) / recipe.weights)
    return model_of(recipe, "untrained" if untrained else "full", seed).encoders


def score_task(recipe: Recipe, task: Task, seed: int, *, untrained: bool = False) -> dict[str, dict[str, float]]:
    """Figures by "<sensors>, <protocol>"."""
    model = encoders_of(recipe, seed, untrained=untrained)
    if torch.cuda.is_available():
        model = model.cuda()
    out = {}
    for sensors in recipe.sensors:
        features = vectors(model, task, sensors, recipe.pool)
        for protocol in recipe.protocols:
            out[f"{sensors}, {protocol}"] = probe(features, task, protocol, recipe.probes, seed)
    return out


# -- records --------------------------------------------------------------------------------------------------------------


def _record(
    recipe: Recipe, row: str, metric: str, values: list[float], weights: str, data: dict[str, str], hours: float, **extra: Any
) -> None:
    record = Record(
        f"recipes/{recipe.name}.yaml", metric, values, list(recipe.seeds), weights, data, round(hours, 4), {"row": row, **extra}
    )
    if is_main():
        save_record(PAPER, record, demo=recipe.demo)
        print(f"{recipe.name}, {row}: {metric} {summarise(values)}", flush=True)


def main(recipe: Recipe) -> Mapping[str, dict[str, list[float]]]:
    """Figures by row and metric, one value a seed; recorded."""
    return scenes_row(recipe) if recipe.experiment == "scenes" else task_rows(recipe)


def scenes_row(recipe: Recipe) -> dict[str, dict[str, list[float]]]:
    data = {"name": "generated scenes", "split": f"{recipe.train} for probes, {recipe.test} for test", "sha256": "generated"}
    out = {}
    for what in ("full", *recipe.compare):
        found = [score_scenes(recipe, what, seed) for seed in recipe.seeds]
        hours = sum(one["seconds"] for one in found) / 3600
        out[what] = {name: [one[name] for one in found] for name in found[0] if name != "seconds"}
        for metric, values in out[what].items():
            weights = {"untrained": "untrained", "raw-means": "no network"}.get(what, "trained here")
            _record(recipe, what, metric, values, weights, data, hours)
    return out


def task_rows(recipe: Recipe) -> dict[str, dict[str, list[float]]]:
    task = load_task(recipe.task, data_root=recipe.data_root, share=recipe.share)
    seeds = list(recipe.seeds)
    out: dict[str, dict[str, list[float]]] = {}
    for untrained in (False, True) if recipe.untrained and recipe.weights is None else (False,):
        began = time.monotonic()
        found = [score_task(recipe, task, seed, untrained=untrained) for seed in seeds]
        hours = (time.monotonic() - began) / 3600
        weights = "official, converted" if recipe.weights else "untrained" if untrained else "trained here"
        for row in found[0]:
            figures = {name: [one[row][name] for one in found] for name in found[0][row]}
            metric, values = next(iter(figures.items()))
            label = f"{row}, untrained" if untrained else row
            out[label] = figures
            data = {"name": task.name, "split": task.split, "sha256": task.sha256}
            further = {name: numbers for name, numbers in figures.items() if name != metric}
            _record(recipe, label, metric, values, weights, data, hours, pool=recipe.pool, **further)
    return out


if __name__ == "__main__":
    main(parse(Recipe))
