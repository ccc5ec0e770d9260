"""Classification: fine-tune for every seed (or few-shot fold), evaluate after each epoch, vote, save the record, print it.

`python -m projects.point_cmae.finetune --config projects/point_cmae/recipes/scanobjectnn-hardest.yaml --data-root D` also pre-trains what is missing.
As in the reference the figure is the best epoch's on the TEST set (there is no validation split); the record holds the last epoch's beside it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoint import load_model, save_model, write_text
from common.data import checksum, root
from common.engine import Training, budget, check_recipe, fit, seed_everything
from common.probes import summarise
from common.recipe import parse, to_yaml
from common.results import Record, save_record
from projects.point_cmae.augment import AUGMENTATIONS, choose
from projects.point_cmae.classifier import PointClassifier, Protocol, apply_protocol, head_of, pre_sampled, vote
from projects.point_cmae.data import GENERATED, Clouds, Name, Sizes, few_shot, load, together
from projects.point_cmae.model import Ops, sample_points
from projects.point_cmae.optim import Clock, adamw, is_main, local_batch, rate_at, synchronised
from projects.point_cmae.pretrain import PAPERS_EPOCH, RECIPES, pretrained
from projects.point_cmae.weights import Transfer, load_complete, transfer


@dataclass(frozen=True)
class Architecture:
    """Classifier; sizes as those of the pre-trained model."""

    dim: PositiveInt = 384
    """Width."""
    depth: PositiveInt = 12
    """Blocks."""
    num_heads: PositiveInt = 6
    """Attention heads."""
    num_group: PositiveInt = 64
    """Groups: 64 of 1024 points, 128 of 2048, 512 of 8192."""
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
    """Classification; defaults are ModelNet40's with 1024 points."""

    name: str = "modelnet40-1k"
    """Name of the recipe: its file's, and the run folder's."""
    data: Name = "modelnet40"
    """Data set."""
    sizes: list[PositiveInt] = field(default_factory=lambda: list(Sizes()))
    """Clouds of the generated sets: pre-training, training, test."""
    points: PositiveInt = 1024
    """Points that the model sees."""
    protocol: Protocol = "full"
    """full: everything trains. mlp3, linear: head, class token and class position. frozen_*: the head alone, encoder in eval mode."""
    start: str = "shapenet55"
    """Pre-training recipe (its file's name), an official checkpoint, or none."""
    start_epoch: NonNegativeInt = PAPERS_EPOCH
    """Epoch that the pre-training recipe keeps; not used where it keeps none."""
    start_class_token: bool = False
    """Start the class token from branch 1; the reference's stays fresh."""
    whole: bool = False
    """`start` is an official classifier (its head too): evaluate it without training."""
    model: Architecture = field(default_factory=Architecture)
    """Sizes."""
    classes: PositiveInt | None = None
    """Outputs of the head, if more than the data has (few-shot keeps 40)."""
    training: Training = field(default_factory=lambda: Training(epochs=301, clip_norm=10.0))
    """Length and arithmetic."""
    schedule_epochs: PositiveInt = 300
    """Length of the rate's schedule."""
    warmup: NonNegativeInt = 10
    """Epochs of warm-up."""
    clock: Clock = "epoch"
    """epoch: the reference's schedule, one epoch late. step: warm-up and cosine over all steps."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.05
    """Of AdamW."""
    batch: PositiveInt = 32
    """Clouds a step over all processes."""
    augmentation: Literal["scale_translate", "rotate", "none"] = "scale_translate"
    """rotate is the `DA` of the tables (ScanObjectNN)."""
    votes: NonNegativeInt = 0
    """Repeats of the ten-view vote with the best epoch's weights (the reference: 299, best reported)."""
    way: PositiveInt | None = None
    """Few-shot: classes of a fold; then `folds` stand for the seeds."""
    shot: PositiveInt = 10
    """Few-shot: training clouds of a class."""
    folds: list[NonNegativeInt] = field(default_factory=lambda: list(range(10)))
    """Few-shot folds."""
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
        from_epoch = "" if self.start_epoch == PAPERS_EPOCH else f"epoch-{self.start_epoch}-"
        return Path(self.out) / self.name / f"{from_epoch}seed-{self.seed}"


def splits(recipe: Recipe) -> tuple[Clouds, Clouds]:
    """Training and test clouds; of few-shot the fold that `seed` names."""
    if recipe.way is not None:
        return few_shot(root(recipe.data_root), recipe.way, recipe.shot, recipe.seed)
    train, test = (
        load(recipe.data, part, data_root=recipe.data_root, size=None, seed=0, sizes=Sizes(*recipe.sizes)) for part in ("train", "test")
    )
    return train, test


def build(recipe: Recipe, classes: int) -> tuple[PointClassifier, Transfer | None]:
    """The classifier as the protocol starts it, and what was transferred."""
    state = pretrained(recipe.start, epoch=recipe.start_epoch, seed=0, data_root=recipe.data_root, out=recipe.out)
    seed_everything(recipe.seed)  # heads alike, whether pre-training had to run or not
    model = PointClassifier(recipe.classes or classes, head_of(recipe.protocol), **asdict(recipe.model))
    if state is None:
        return apply_protocol(model, recipe.protocol), None
    if recipe.whole:
        load_complete(model, state, "classifier", origin=recipe.start)
        return model, None
    report = transfer(model, state, "classifier", class_token=recipe.start_class_token, origin=recipe.start)
    if is_main():
        print(f"{recipe.name}: from {recipe.start}: {report}", flush=True)
    return apply_protocol(model, recipe.protocol), report


def _batches(clouds: Clouds, batch: int) -> DataLoader[Any]:
    return DataLoader(clouds, batch_size=batch, collate_fn=together)


@torch.no_grad()
def accuracy(model: PointClassifier, clouds: Clouds, points: int, batch: int = 64) -> float:
    """Overall accuracy in per cent, each cloud once, by farthest points of it; every process counts the whole set."""
    model.eval()
    device, right = model.class_token.device, 0
    for cloud, labels in _batches(clouds, batch):
        logits = model(sample_points(cloud.to(device), points, ops=model.ops))
        right += int((logits.argmax(1).cpu() == labels).sum())
    return 100 * right / len(clouds)


def vote_accuracies(model: PointClassifier, clouds: Clouds, points: int, repeats: int, *, seed: int, batch: int = 64) -> list[float]:
    """Accuracy in per cent of each of `repeats` ten-view votes (see `classifier.vote`)."""
    model.eval()
    device, out = model.class_token.device, []
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(repeats):
        right = 0
        for cloud, labels in _batches(clouds, batch):
            right += int((vote(model, cloud.to(device), points, generator=generator).argmax(1).cpu() == labels).sum())
        out.append(100 * right / len(clouds))
    return out


def run(recipe: Recipe) -> dict[str, Any]:
    """Fine-tune and evaluate one seed or fold, or read what an earlier call found; kept in the run folder as score.json."""
    recipe = replace(recipe, seeds=[recipe.seed], folds=[])
    folder = recipe.folder
    check_recipe(folder, to_yaml(recipe))
    if (kept := folder / "score.json").is_file():
        return json.loads(kept.read_text())
    train, test = splits(recipe)
    began = time.monotonic()
    model, report = build(recipe, len(train.classes))
    if recipe.whole:
        found: dict[str, Any] = {"best": accuracy(model, test, recipe.points), "epoch": None}
        found["last"] = found["best"]
    else:
        found = _trained(recipe, model, train, test)
        if recipe.votes:
            model = load_model(PointClassifier, folder / "best")
    if recipe.votes:
        found["votes"] = vote_accuracies(model, test, recipe.points, recipe.votes, seed=recipe.seed)
    found |= {"seconds": round(time.monotonic() - began, 1), "clouds": [len(train), len(test)]}
    found |= {"sha256": checksum(test.files) if test.files else "generated", "data": test.name}
    if report is not None:
        found["missing"] = report.missing
    if is_main():
        write_text(kept, json.dumps(found))
    return found


def _trained(recipe: Recipe, model: PointClassifier, train: Clouds, test: Clouds) -> dict[str, Any]:
    """Train; accuracy at the best epoch on the test set, that epoch (0-based), and at the last."""
    folder, best = recipe.folder, recipe.folder / "best"
    model = synchronised(model)
    loader = DataLoader(
        train,
        batch_size=local_batch(recipe.batch, samples=len(train)),
        shuffle=True,
        drop_last=True,
        collate_fn=together,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
    )
    augment = AUGMENTATIONS[recipe.augmentation]

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        clouds, labels = batch
        sampled = sample_points(clouds, pre_sampled(recipe.points, clouds.shape[1]), ops=recipe.model.ops)
        logits = net(augment(choose(sampled, recipe.points)))
        return {"loss": F.cross_entropy(logits, labels), "train_accuracy": 100 * (logits.argmax(1) == labels).float().mean()}

    def evaluate(net: Any, made: int) -> dict[str, float]:
        value = accuracy(net, test, recipe.points)
        told = best / "score.json"
        if is_main() and value > (json.loads(told.read_text())["accuracy"] if told.is_file() else -1.0):
            save_model(net, best)
            write_text(told, json.dumps({"accuracy": value, "epoch": made - 1}))
        return {"test_accuracy": value}

    plan = budget(loader, recipe.training)
    fitted = fit(
        model,
        loss,
        loader,
        adamw(model, recipe.lr, recipe.weight_decay),
        recipe.training,
        folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=rate_at(plan, peak=recipe.lr, epochs=recipe.schedule_epochs, warmup=recipe.warmup, clock=recipe.clock),
        evaluate=evaluate,
        evaluate_every=1,
    )
    if is_main():
        save_model(model, folder, recipe=to_yaml(recipe))
    told_lines = [line for line in fitted.history if "test_accuracy" in line]
    top = max(told_lines, key=lambda line: line["test_accuracy"])
    return {"best": top["test_accuracy"], "epoch": round(top["epoch"]) - 1, "last": told_lines[-1]["test_accuracy"]}


def main(recipe: Recipe) -> Path | None:
    """Every seed (or fold) of the recipe; gives the record's path (None on processes other than the first)."""
    seeds = recipe.folds if recipe.way is not None else recipe.seeds
    scores = {}
    for seed in seeds:
        scores[seed] = run(replace(recipe, seed=seed))
        if is_main():
            print(f"{recipe.name}: seed {seed}: best epoch {scores[seed]['best']:.2f} %, last {scores[seed]['last']:.2f} %", flush=True)
    if not is_main():
        return None
    each = list(scores.values())
    own = recipe.start == "none" or (RECIPES / f"{recipe.start}.yaml").is_file()
    what = "trained here" if own else "official, converted" if recipe.whole else f"fine-tuned from {Path(recipe.start).name}"
    extra: dict[str, Any] = {"protocol": recipe.protocol, "selection": "best epoch on the test set, as the reference"}
    extra |= {
        "last_epoch": [score["last"] for score in each],
        "pre_training": recipe.start,
        "best_epoch": [score["epoch"] for score in each],
    }

    def record(metric: str, values: list[float], **more: Any) -> Path:
        files = " ".join(dict.fromkeys(score["sha256"] for score in each))  # few-shot: a file a fold
        data = {"name": each[0]["data"], "split": "test", "sha256": files}
        hours = sum(score["seconds"] for score in each) / 3600
        metric += "" if recipe.start_epoch == PAPERS_EPOCH else f", from epoch {recipe.start_epoch}"  # a row of its own
        made = Record(f"recipes/{recipe.name}.yaml", metric, values, list(scores), what, data, hours, extra | more)
        path = save_record("point_cmae", made, demo=recipe.data in GENERATED and recipe.way is None)
        print(f"{recipe.name}: {metric} {summarise(values)}, recorded in {path}", flush=True)
        return path

    path = record("accuracy (%)", [score["best"] for score in each])
    if recipe.votes:
        means = [fmean(score["votes"]) for score in each]
        best = [max(score["votes"]) for score in each]
        record("accuracy, voting (%)", best, mean_of_votes=means, votes=recipe.votes, selection_of_vote="best, as the reference")
        print(f"{recipe.name}: mean of {recipe.votes} votes {summarise(means)}", flush=True)
    return path


if __name__ == "__main__":
    main(parse(Recipe))
