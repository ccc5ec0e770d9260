"""Part segmentation: train for every seed, part IoU after each epoch, save the records, print them.

`python -m projects.point_cmae.segment --config projects/point_cmae/recipes/shapenet-part.yaml --data-root D` also pre-trains what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoint import save_model, write_text
from common.data import checksum
from common.engine import Training, budget, check_recipe, fit, seed_everything
from common.probes import summarise
from common.recipe import parse, to_yaml
from common.results import Record, save_record
from projects.point_cmae.augment import scale_shift
from projects.point_cmae.data import Parts, Sizes, load_parts
from projects.point_cmae.model import Ops
from projects.point_cmae.optim import Clock, adamw, is_main, local_batch, rate_at, synchronised
from projects.point_cmae.pretrain import PAPERS_EPOCH, pretrained
from projects.point_cmae.segmenter import PartScores, PartSegmenter, own_parts, part_scores
from projects.point_cmae.weights import load_complete, transfer


@dataclass(frozen=True)
class Architecture:
    """Segmenter; sizes as those of the pre-trained model."""

    dim: PositiveInt = 384
    """Width."""
    depth: PositiveInt = 12
    """Blocks; features are taken after each third."""
    num_heads: PositiveInt = 6
    """Attention heads."""
    num_group: PositiveInt = 128
    """Groups."""
    group_size: PositiveInt = 32
    """Points of a group."""
    widths: list[PositiveInt] = field(default_factory=lambda: [128, 256, 512])
    """Of the group embedding."""
    drop_path: ClosedUnitInterval = 0.1
    """Rate of the last block."""
    dropout: ClosedUnitInterval = 0.5
    """In the head."""
    ops: Ops = "auto"
    """Who samples the centres."""


@dataclass(frozen=True)
class Recipe:
    """Part segmentation; defaults are ShapeNetPart's."""

    name: str = "shapenet-part"
    """Name of the recipe: its file's, and the run folder's."""
    data: Literal["shapenet-part", "solids"] = "shapenet-part"
    """Data set; solids need no files."""
    sizes: list[PositiveInt] = field(default_factory=lambda: list(Sizes()))
    """Clouds of the generated set: pre-training, training, test."""
    points: PositiveInt = 2048
    """Points of a cloud."""
    start: str = "shapenet55"
    """Pre-training recipe (its file's name), an official checkpoint, or none."""
    start_epoch: NonNegativeInt = PAPERS_EPOCH
    """Epoch that the pre-training recipe keeps; not used where it keeps none."""
    whole: bool = False
    """`start` is an official segmenter: evaluate it without training."""
    model: Architecture = field(default_factory=Architecture)
    """Sizes."""
    training: Training = field(default_factory=lambda: Training(epochs=300, clip_norm=10.0))
    """Length and arithmetic."""
    schedule_epochs: PositiveInt = 300
    """Length of the rate's schedule."""
    warmup: NonNegativeInt = 10
    """Epochs of warm-up."""
    clock: Clock = "epoch"
    """epoch: the reference's schedule, one epoch late. step: warm-up and cosine over all steps."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.05
    """Of AdamW."""
    legacy_double_step: bool = False
    """Step twice a batch as the reference does: with the whole gradient, then with the clipped one."""
    batch: PositiveInt = 16
    """Clouds a step over all processes."""
    workers: NonNegativeInt = 4
    """Processes that read clouds."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of a table row; pre-training is that of seed 0."""
    seed: NonNegativeInt = 0
    """Seed of one run."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/point_cmae"
    """Where run folders go."""

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"


def double_step(optimizer: torch.optim.AdamW, clip_norm: float) -> torch.optim.AdamW:
    """Let every `step` step with the gradients as they are, clip them, and step again (the reference's loop)."""
    once: Callable[[], Any] = optimizer.step

    def step(*_arguments: Any, **_named: Any) -> None:
        once()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
        once()

    optimizer.step = step  # type: ignore[method-assign, assignment]
    return optimizer


@torch.no_grad()
def evaluate(model: PartSegmenter, data: Parts, batch: int = 16) -> PartScores:
    """Part IoU over the whole set, each object once; every process counts all."""
    model.eval()
    device = next(model.parameters()).device
    predictions, labels = [], []
    for points, category, parts in DataLoader(data, batch_size=batch):
        predictions.append(own_parts(model(points.to(device), category.to(device)).cpu(), parts, data.parts))
        labels.append(parts)
    return part_scores(torch.cat(predictions), torch.cat(labels), data.parts)


def run(recipe: Recipe) -> dict[str, Any]:
    """Train and evaluate one seed, or read what an earlier call found; kept in the run folder as score.json."""
    recipe = replace(recipe, seeds=[recipe.seed])
    folder = recipe.folder
    check_recipe(folder, to_yaml(recipe))
    if (kept := folder / "score.json").is_file():
        return json.loads(kept.read_text())
    train, test = (
        load_parts(recipe.data, part, count=recipe.points, data_root=recipe.data_root, sizes=Sizes(*recipe.sizes))
        for part in ("train", "test")
    )
    began = time.monotonic()
    count = max(ids.stop for ids in train.parts.values())
    state = pretrained(recipe.start, epoch=recipe.start_epoch, seed=0, data_root=recipe.data_root, out=recipe.out)
    seed_everything(recipe.seed)
    model = PartSegmenter(count, len(train.parts), **asdict(recipe.model))
    if state is not None and recipe.whole:
        load_complete(model, state, "segmenter", origin=recipe.start)
    elif state is not None:
        report = transfer(model, state, "segmenter", origin=recipe.start)
        if is_main():
            print(f"{recipe.name}: from {recipe.start}: {report}", flush=True)
    if recipe.whole:
        scores = evaluate(model, test)
        found: dict[str, Any] = {"instance": 100 * scores.instance_miou, "class": 100 * scores.class_miou, "epoch": None}
        found["last"] = [found["instance"], found["class"]]
    else:
        found = _trained(recipe, model, train, test)
    found |= {
        "seconds": round(time.monotonic() - began, 1),
        "data": test.name,
        "sha256": checksum(test.files) if test.files else "generated",
    }
    if is_main():
        write_text(kept, json.dumps(found))
    return found


def _trained(recipe: Recipe, model: PartSegmenter, train: Parts, test: Parts) -> dict[str, Any]:
    """Train; per cent at the epoch of best instance mIoU on the test set (0-based), and at the last."""
    model = synchronised(model)
    loader = DataLoader(
        train,
        batch_size=local_batch(recipe.batch, samples=len(train)),
        shuffle=True,
        drop_last=True,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
    )

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        points, category, parts = batch
        scores = net(scale_shift(points), category)
        return {
            "loss": F.nll_loss(scores.flatten(0, 1), parts.flatten()),
            "train_accuracy": 100 * (scores.argmax(2) == parts).float().mean(),
        }

    def measured(net: Any, _made: int) -> dict[str, float]:
        scores = evaluate(net, test)
        return {"instance_miou": 100 * scores.instance_miou, "class_miou": 100 * scores.class_miou, "test_accuracy": 100 * scores.accuracy}

    optimizer, training = adamw(model, recipe.lr, recipe.weight_decay), recipe.training
    if recipe.legacy_double_step:
        optimizer, training = double_step(optimizer, training.clip_norm or 10.0), replace(training, clip_norm=None)
    fitted = fit(
        model,
        loss,
        loader,
        optimizer,
        training,
        recipe.folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=rate_at(
            budget(loader, recipe.training), peak=recipe.lr, epochs=recipe.schedule_epochs, warmup=recipe.warmup, clock=recipe.clock
        ),
        evaluate=measured,
        evaluate_every=1,
    )
    if is_main():
        save_model(model, recipe.folder, recipe=to_yaml(recipe))
    lines = [line for line in fitted.history if "instance_miou" in line]
    top, last = max(lines, key=lambda line: line["instance_miou"]), lines[-1]
    return {
        "instance": top["instance_miou"],
        "class": max(line["class_miou"] for line in lines),
        "epoch": round(top["epoch"]) - 1,
        "last": [last["instance_miou"], last["class_miou"]],
    }


def main(recipe: Recipe) -> Path | None:
    """Every seed of the recipe; gives the records' file (None on processes other than the first)."""
    scores = {seed: run(replace(recipe, seed=seed)) for seed in recipe.seeds}
    if not is_main():
        return None
    each = list(scores.values())
    for number, name in enumerate(("instance", "class")):
        record = Record(
            recipe=f"recipes/{recipe.name}.yaml",
            metric=f"{name} mIoU (%)",
            values=[score[name] for score in each],
            seeds=list(scores),
            weights="trained here" if not recipe.whole else "official, converted",
            data={"name": each[0]["data"], "split": "test", "sha256": each[0]["sha256"]},
            hours=sum(score["seconds"] for score in each) / 3600,
            extra={
                "selection": "best epoch on the test set, each metric its own, as the reference",
                "last_epoch": [score["last"][number] for score in each],
                "pre_training": recipe.start,
            },
        )
        path = save_record("point_cmae", record, demo=recipe.data == "solids")
        print(f"{recipe.name}: {summarise(record.values)} {record.metric}, recorded in {path}")
    return path


if __name__ == "__main__":
    main(parse(Recipe))
