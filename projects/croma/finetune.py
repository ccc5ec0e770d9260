"""Fine-tune the encoders, or train a segmentation head on frozen ones: `python -m projects.croma.finetune --config projects/croma/recipes/<row>.yaml --data-root D`.

Classification: a linear map of the representation; flips, quarter turns, mixup or cutmix, label smoothing; multi-label by binary cross-entropy.
Segmentation: a linear map of each patch token to its pixels' classes, cross-entropy without void pixels. The learning rate is swept; the best
validation epoch of the best rate is what is reported (Sec. 4).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.checkpoint import load_model, save_model
from common.engine import Training, budget, fit, seed_everything
from common.patch import grid_of, unpatchify
from common.probes import accuracy, mean_average_precision, summarise
from common.recipe import parse, to_yaml
from common.results import Record, picture_path, save_record
from common.schedule import cosine
from projects.croma import evaluate, pictures
from projects.croma.bands import keep_statistics
from projects.croma.data import Split, Task, TaskName, batches, load_task, turned
from projects.croma.metrics import VOID, confusion, mean_iou, pixel_accuracy
from projects.croma.model import Encoders, Sensors
from projects.croma.pretrain import Recipe as Pretraining
from projects.croma.pretrain import is_main


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning on a labelled task; defaults are the base model's."""

    name: str = "finetune"
    """Name of the recipe: its file's, and the run folder's."""
    pretrain: Pretraining = field(default_factory=Pretraining)
    """Where the encoders come from; ignored with `weights`."""
    weights: str | None = None
    """Official checkpoint, a path below the data root."""
    untrained: bool = False
    """Start from initial weights."""
    task: TaskName = "bigearthnet"
    """Labelled data."""
    share: float = 1.0
    """Of the training split."""
    sensors: Sensors = "joint"
    """Encoder whose representation is used."""
    frozen: bool = False
    """Train the head alone."""
    training: Training = field(default_factory=lambda: Training(epochs=30, precision="bf16"))
    """Length and arithmetic."""
    batch_size: PositiveInt = 256
    """Images a process."""
    lrs: list[PositiveFloat] = field(default_factory=lambda: [1e-5, 3e-5, 5e-5, 8e-5])
    """Peak learning rates that are tried."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's."""
    warmup: ClosedUnitInterval = 0.05
    """Share of the steps with a rising rate."""
    mixup: NonNegativeFloat = 0.8
    """Beta parameter; one of mixup and cutmix a batch (single-label)."""
    cutmix: NonNegativeFloat = 1.0
    """Beta parameter."""
    smoothing: ClosedUnitInterval = 0.1
    """Of labels (single-label)."""
    average: Literal["micro", "macro"] = "micro"
    """Of mAP."""
    train: PositiveInt = 500
    """Generated training scenes."""
    test: PositiveInt = 200
    """Generated test scenes."""
    demo: bool = False
    """Records and pictures go to the report of embedded defaults."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Runs to average."""
    seed: NonNegativeInt = 0
    """Seed of one run."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/croma"
    """Where run folders go."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: expected more than 0, at most 1")
        if not self.lrs:
            raise ValueError("lrs: expected at least one learning rate, got none")


class Classifier(nn.Module, PyTorchModelHubMixin):
    """Encoders and a linear map of one vector an image.

    Args:
        encoders: arguments of `Encoders`; sensors: whose vector is classified; classes: outputs.
    """

    def __init__(self, encoders: dict[str, Any] | None = None, *, sensors: Sensors = "joint", classes: int = 10) -> None:
        super().__init__()
        self.encoders = Encoders(**(encoders or {}))
        self.sensors = sensors
        self.head = nn.Linear(self.encoders.embed_dim, classes)

    def forward(self, **images: Tensor) -> Tensor:
        """Logits (B, classes) of radar (B, 2, H, W) and / or optical (B, 12, H, W)."""
        return self.head(self.encoders(**images, joint=self.sensors == "joint").vector(self.sensors))


class Segmenter(nn.Module, PyTorchModelHubMixin):
    """Encoders and a linear map of each patch token to the classes of its pixels.

    Args:
        encoders: arguments of `Encoders`; sensors: whose tokens are mapped; classes: of a pixel.
    """

    def __init__(self, encoders: dict[str, Any] | None = None, *, sensors: Sensors = "joint", classes: int = 10) -> None:
        super().__init__()
        self.encoders = Encoders(**(encoders or {}))
        self.sensors = sensors
        self.head = nn.Linear(self.encoders.embed_dim, classes * self.encoders.patch_size[0] ** 2)

    def forward(self, **images: Tensor) -> Tensor:
        """Logits (B, classes, H, W)."""
        tokens = self.encoders(**images, joint=self.sensors == "joint").tokens(self.sensors)
        grid = grid_of(next(iter(images.values())), self.encoders.patch_size)
        return unpatchify(self.head(tokens), grid, self.encoders.patch_size, "first")


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels of a split, flipped and turned alike; 224 MB or 30 GB, the array is read sample by sample."""

    def __init__(self, split: Split, *, maps: bool) -> None:
        self.split, self.maps = split, maps

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = torch.from_numpy(np.array(self.split.images[index])), self.split.labels[index]
        if not self.maps:
            return turned(image), label
        both = turned(torch.cat([image.short(), label[None].short()]))
        return both[:-1].to(torch.uint8), both[-1].long()


def model_of(recipe: Recipe, task: Task, seed: int) -> Classifier | Segmenter:
    """Encoders from the checkpoint or the pre-training with a fresh head."""
    source = evaluate.Recipe(
        name=recipe.name, pretrain=recipe.pretrain, weights=recipe.weights, seeds=[seed], data_root=recipe.data_root, out=recipe.out
    )
    encoders = evaluate.encoders_of(source, seed, untrained=recipe.untrained)
    seed_everything(seed)
    kind = Segmenter if task.kind == "segmentation" else Classifier
    model = kind(config_of(encoders), sensors=recipe.sensors, classes=task.classes)
    model.encoders.load_state_dict(encoders.state_dict())
    # what the chosen encoder does not use is not trained
    used = {"radar": ("radar",), "optical": ("optical",), "joint": ("radar_encoder", "optical_encoder", "joint")}[recipe.sensors]
    for name, parameter in model.encoders.named_parameters():
        idle = kind is Segmenter and "_head" in name
        parameter.requires_grad_(not recipe.frozen and name.startswith(used) and not idle)
    return model


def config_of(encoders: Encoders) -> dict[str, Any]:
    """Constructor arguments of encoders that exist."""
    return {
        "embed_dim": encoders.embed_dim,
        "depth": len(encoders.optical_encoder.stack.layers),
        "num_heads": encoders.num_heads,
        "radar_depth": len(encoders.radar_encoder.stack.layers),
        "joint_depth": len(encoders.joint_encoder.layers),
        "patch_size": encoders.patch_size[0],
        "radar_channels": encoders.channels["radar"],
        "optical_channels": encoders.channels["optical"],
        "positions": encoders.positions,
        "trained_grid": list(encoders.trained_grid),
        "joint_self_bias": encoders.joint_self_bias,
    }


def given(task: Task, images: Tensor, sensors: Sensors) -> dict[str, Tensor]:
    """The images that an encoder needs, by sensor.

    Raises:
        ValueError: the task lacks one.
    """
    wanted = ("radar", "optical") if sensors == "joint" else (sensors,)
    if absent := [name for name in wanted if name not in task.channels]:
        raise ValueError(f"sensors={sensors}: {task.name} has {list(task.channels)} only, {absent} is missing")
    return {name: value for name, value in task.sensor_images(images).items() if name in wanted}


def loss_on(task: Task, recipe: Recipe) -> Any:
    """(model, (images, labels)) -> {"loss"}."""
    mixing = task.kind == "single" and (recipe.mixup > 0 or recipe.cutmix > 0)
    mixer = (
        Mixup(float(recipe.mixup), float(recipe.cutmix), label_smoothing=float(recipe.smoothing), num_classes=task.classes)
        if mixing
        else None
    )
    soft = SoftTargetCrossEntropy()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        if mixer is not None and len(images) % 2 == 0:  # timm pairs the batch with its reverse
            images, labels = mixer(images.float() / 255, labels)
            return {"loss": soft(model(**given(task, images, recipe.sensors)).float(), labels)}
        logits = model(**given(task, images, recipe.sensors)).float()
        if task.kind == "multi":
            return {"loss": F.binary_cross_entropy_with_logits(logits, labels.float())}
        ignore = VOID if task.kind == "segmentation" else -100
        return {
            "loss": F.cross_entropy(
                logits, labels, ignore_index=ignore, label_smoothing=0.0 if task.kind == "segmentation" else float(recipe.smoothing)
            )
        }

    return loss


@torch.no_grad()
def score(model: nn.Module, task: Task, split: Split, sensors: Sensors, average: Literal["micro", "macro"]) -> dict[str, float]:
    """Figures in per cent, the task's own first: top-1, mAP, or mIoU over the whole split."""
    model.eval()
    device = next(model.parameters()).device
    outputs, matrix = [], torch.zeros(task.classes, task.classes, dtype=torch.int64)
    done = 0
    for images in batches(split.images):
        logits = model(**{name: part.to(device) for name, part in given(task, images, sensors).items()}).float().cpu()
        if task.kind == "segmentation":
            matrix += confusion(split.labels[done : done + len(images)], logits.argmax(1), task.classes)
        else:
            outputs.append(logits)
        done += len(images)
    if task.kind == "segmentation":
        return {"mIoU (%)": 100 * mean_iou(matrix), "pixel accuracy (%)": 100 * pixel_accuracy(matrix)}
    scores = torch.cat(outputs)
    if task.kind == "single":
        return {"top-1 (%)": 100 * accuracy(split.labels, scores.argmax(1))}
    other: Literal["micro", "macro"] = "macro" if average == "micro" else "micro"
    return {f"mAP {name} (%)": 100 * mean_average_precision(split.labels, scores, name) for name in (average, other)}


def folder_of(recipe: Recipe, lr: float, seed: int) -> Path:
    return Path(recipe.out) / recipe.name / f"lr-{lr:g}" / f"seed-{seed}"


def run(recipe: Recipe, task: Task, lr: float) -> tuple[Classifier | Segmenter, dict[str, float]]:
    """One training at one rate: the model after the last epoch; figures of validation and test at the best validation epoch."""
    model = model_of(recipe, task, recipe.seed)
    loader = DataLoader(
        Labelled(task.train, maps=task.kind == "segmentation"),
        batch_size=min(recipe.batch_size, len(task.train.labels)),
        shuffle=True,
        drop_last=True,
    )
    plan = budget(loader, recipe.training)
    trained = [p for p in model.parameters() if p.requires_grad]

    def figures(bare: nn.Module, _epoch: int) -> dict[str, float]:
        found = {"val": score(bare, task, task.val, recipe.sensors, recipe.average)}
        same = task.val is task.test  # no validation split of its own
        found["test"] = found["val"] if same else score(bare, task, task.test, recipe.sensors, recipe.average)
        return {f"{part} {name}": value for part, by_name in found.items() for name, value in by_name.items()}

    fitted = fit(
        model,
        loss_on(task, recipe),
        loader,
        torch.optim.AdamW(trained, lr=float(lr), weight_decay=float(recipe.weight_decay), fused=True),
        recipe.training,
        folder_of(recipe, lr, recipe.seed),
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lambda step: cosine(step, total=plan.total, peak=float(lr), warmup=int(recipe.warmup * plan.total)),
        evaluate=figures,
        evaluate_every=1,
    )
    lines = [line for line in fitted.history if any(name.startswith("val ") for name in line)]
    first = next(name for name in lines[0] if name.startswith("val "))
    best = max(lines, key=lambda line: line[first])
    if is_main():
        save_model(fitted.model, folder_of(recipe, lr, recipe.seed), recipe=to_yaml(recipe))
        keep_statistics(folder_of(recipe, lr, recipe.seed), task.sensor_statistics())
    return fitted.model, {name: value for name, value in best.items() if name.startswith(("val ", "test "))} | {
        "epoch": best["epoch"],
        "lr": lr,
    }


def main(recipe: Recipe) -> dict[str, list[float]]:
    """Figures by metric, one a seed; recorded. The best rate is chosen on validation, for each seed."""
    task = load_task(
        recipe.task, data_root=recipe.data_root, share=recipe.share, train=recipe.train, test=recipe.test, side=int(recipe.pretrain.size)
    )
    began = time.monotonic()
    chosen, models = [], []
    for seed in recipe.seeds:
        runs = [run(replace(recipe, seed=seed, seeds=[seed]), task, lr) for lr in recipe.lrs]
        first = next(name for name in runs[0][1] if name.startswith("val "))
        model, best = max(runs, key=lambda pair: pair[1][first])
        chosen.append(best)
        models.append(model)
        if is_main():
            print(f"{recipe.name}: seed {seed}: {json.dumps(best)}", flush=True)
    names = [name for name in chosen[0] if name.startswith("test ")]
    out = {name.removeprefix("test "): [best[name] for best in chosen] for name in names}
    metric, values = next(iter(out.items()))
    weights = "official, converted, fine-tuned" if recipe.weights else "from initial weights" if recipe.untrained else "trained here"
    extra = {
        "row": f"{recipe.sensors}, {'frozen, ' if recipe.frozen else ''}{'segmentation' if task.kind == 'segmentation' else 'fine-tuned'}",
        "lr": [best["lr"] for best in chosen],
        "epoch": [best["epoch"] for best in chosen],
        **{name: numbers for name, numbers in out.items() if name != metric},
    }
    data = {"name": task.name, "split": task.split, "sha256": task.sha256}
    if is_main():
        hours = round((time.monotonic() - began) / 3600, 4)
        save_record(
            "croma",
            Record(f"recipes/{recipe.name}.yaml", metric, values, list(recipe.seeds), weights, data, hours, extra),
            demo=recipe.demo,
        )
        if task.kind == "segmentation" and recipe.sensors == "joint":
            pictures.segmentation(
                models[0],
                task,
                picture_path("croma", f"segmentation_{recipe.name}", demo=recipe.demo or not recipe.task.startswith("scene")),
            )
        print(f"{recipe.name}: {metric} {summarise(values)}", flush=True)
    return out


def load_downstream(folder: str | Path) -> Classifier | Segmenter:
    """A fine-tuned model from its run folder; which of the two, its head's outputs say.

    Raises:
        FileNotFoundError, ValueError: as `common.checkpoint.load_model`.
    """
    try:
        return load_model(Segmenter, folder)
    except ValueError:
        return load_model(Classifier, folder)


if __name__ == "__main__":
    main(parse(Recipe))
