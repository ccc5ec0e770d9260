"""Fine-tune, or probe linearly, an encoder on labelled pictures by the paper's protocol; saves the record, prints top-1.

`python -m projects.mr_mae.finetune --config projects/mr_mae/recipes/finetune-base-dino.yaml --data-root D`. The encoder comes from a pre-training run
folder, from a released ConvMAE file, or is left untrained. Linear probe: frozen backbone, batch norm without affine, LARS.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.layers import trunc_normal_
from timm.loss import SoftTargetCrossEntropy
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.checkpoint import load_model, save_model, write_text
from common.engine import Training, budget, check_recipe, fit, mean_over_processes, seed_everything
from common.probes import summarise
from common.recipe import parse, to_yaml
from common.results import Record, save_record
from common.schedule import cosine, scaled_lr
from projects.mr_mae.classifier import Classifier, PlainClassifier, fine_tuning_groups
from projects.mr_mae.data import HALF, Name, Pictures, centre, load, normalised, view
from projects.mr_mae.model import MRMAE
from projects.mr_mae.pretrain import Architecture, is_main, processes
from projects.mr_mae.teachers import IMAGENET, Statistics
from projects.mr_mae.weights import load_reference, plain_classifier, read, shape_of


@dataclass(frozen=True)
class Augmentation:
    """Of fine-tuning; a linear probe crops (scale 0.08 to 1, cut to the picture) and mirrors alone."""

    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment policy."""
    erasing: ClosedUnitInterval = 0.25
    """Probability of random erasing (pixel noise)."""
    mixup: NonNegativeFloat = 0.8
    """Alpha; with cutmix, one of the two a batch."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha."""
    smoothing: ClosedUnitInterval = 0.1
    """Label smoothing."""


@dataclass(frozen=True)
class Recipe:
    """A classifier on an encoder; defaults are the paper's fine-tuning of the base model."""

    name: str = "finetune-base-dino"
    """Of the recipe's file, and the run folder."""
    protocol: Literal["finetune", "linear_probe"] = "finetune"
    """Train everything, or a linear head on the frozen backbone."""
    start: str = "runs/mr_mae/base-dino/seed-{seed}"
    """Run folder of pre-training, or a released file; none: an untrained encoder."""
    num_heads: PositiveInt = 12
    """Attention heads; a file does not show them."""
    model: Architecture = field(default_factory=Architecture)
    """Shape of an untrained encoder (start: none)."""
    data: Name = "imagenet"
    """Data set."""
    image_size: PositiveInt = 224
    """Pixels a side; positions are resized to it."""
    limit: PositiveInt | None = None
    """Training pictures; not given: all."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Of fine-tuning."""
    drop_path: ClosedUnitInterval = 0.1
    """Of the last block."""
    batch_size: PositiveInt = 128
    """Pictures a process and batch."""
    base_lr: PositiveFloat = 5e-4
    """At 256 pictures a step (linear probe: 0.1)."""
    min_lr: NonNegativeFloat = 1e-6
    """End of the cosine (linear probe: 0)."""
    warmup: NonNegativeFloat = 5.0
    """Epochs (linear probe: 10)."""
    layer_decay: ClosedUnitInterval = 0.65
    """Of the rate, from the head downwards."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's; a linear probe has none."""
    training: Training = field(default_factory=lambda: Training(epochs=100, precision="bf16"))
    """Length and arithmetic; the reference advises against float16."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Seeds of a row."""
    seed: NonNegativeInt = 0
    """Seed of one run."""
    workers: NonNegativeInt = 0
    """Processes that read pictures."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/mr_mae"
    """Where run folders go."""

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"

    @property
    def statistics(self) -> Statistics:
        return HALF if self.data == "parts" else IMAGENET


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Training pictures as the protocol distorts them: ((3, S, S) normalised, label)."""

    def __init__(self, pictures: Pictures, recipe: Recipe) -> None:
        self.pictures, self.recipe = pictures, recipe
        self.policy: Callable[[Any], Any] | None = None
        self.erase: Callable[[Tensor], Tensor] | None = None
        if recipe.protocol == "finetune":
            if recipe.augmentation.randaugment:
                from PIL.Image import Resampling

                fill = tuple(round(255 * mean) for mean in recipe.statistics[0])
                self.policy = rand_augment_transform(
                    recipe.augmentation.randaugment,
                    # just below timm's 10, at which "posterize" would keep 0 bits: newer Pillow refuses that
                    {
                        "translate_const": int(0.45 * recipe.image_size),
                        "img_mean": fill,
                        "interpolation": Resampling.BICUBIC,
                        "magnitude_max": 9.99,
                    },
                )
            if recipe.augmentation.erasing:
                self.erase = RandomErasing(float(recipe.augmentation.erasing), mode="pixel", device="cpu")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

        probe = self.recipe.protocol == "linear_probe"
        image = view(self.pictures.images[index], self.recipe.image_size, "crop", scale=(0.08, 1.0), reject=not probe)
        if self.policy is not None:
            image = pil_to_tensor(self.policy(to_pil_image(image)))
        image = normalised(image, self.recipe.statistics)
        return (image if self.erase is None else self.erase(image)), self.pictures.labels[index]


def build(recipe: Recipe, classes: int) -> Classifier | PlainClassifier:
    """The classifier with the encoder that `start` names.

    Raises:
        FileNotFoundError: no such run or file. ValueError: a file that is no ConvMAE.
    """
    settings: dict[str, Any] = {"image_size": recipe.image_size, "drop_path": float(recipe.drop_path)}
    if recipe.start == "none":
        shape = recipe.model.settings()
        if shape.get("backbone") == "vit":
            return plain_classifier(MRMAE(recipe.image_size, **shape, targets="pixels"), classes, drop_path=settings["drop_path"])
        return Classifier(classes, **{name: value for name, value in shape.items() if not name.startswith("decoder")} | settings)
    path = Path(recipe.start.format(seed=recipe.seed))
    if not path.exists():
        raise FileNotFoundError(
            f"start {path}: no such run or file; pre-train it first (projects.mr_mae.pretrain), or name a released checkpoint"
        )
    heads = recipe.num_heads
    if (config := path / "config.json").is_file():
        about = json.loads(config.read_text())
        if about["backbone"] == "vit":
            return plain_classifier(load_model(MRMAE, path), classes, **settings)
        heads = about["num_heads"]
    state = read(path)
    model = Classifier(classes, **shape_of(state) | {"num_heads": int(heads)} | settings)
    load_reference(model, state)
    return model


class Probe(nn.Module):
    """Batch norm without affine and a linear layer on a frozen backbone's pooled tokens."""

    def __init__(self, backbone: Classifier | PlainClassifier, classes: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        dim = backbone.num_features
        self.head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, classes))
        trunc_normal_(self.head[1].weight, std=0.01)
        nn.init.zeros_(self.head[1].bias)

    def train(self, mode: bool = True) -> Probe:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone.features(images)
        return self.head(features)


def optimizer_of(model: nn.Module, recipe: Recipe, peak: float) -> torch.optim.Optimizer:
    """AdamW with layer decay, or LARS (momentum 0.9, trust 0.001, none on biases) for a linear probe."""
    if isinstance(model, Probe):
        linear = model.head[1]
        groups = [{"params": [linear.weight], "always_adapt": True}, {"params": [linear.bias], "always_adapt": False}]
        return Lars(groups, lr=peak, momentum=0.9, weight_decay=0.0)
    groups = fine_tuning_groups(model, float(recipe.layer_decay), float(recipe.weight_decay))
    return torch.optim.AdamW(
        [{k: v for k, v in g.items() if k not in ("names", "param_names")} for g in groups], lr=peak, betas=(0.9, 0.999)
    )


@torch.inference_mode()
def top1(model: nn.Module, pictures: Pictures, recipe: Recipe) -> float:
    """Per cent of the pictures whose evaluation view is classified right."""
    device, right = processes().device, 0
    model = model.eval().to(device)
    for numbers in torch.arange(len(pictures)).split(128):
        images = torch.stack([centre(pictures.images[int(i)], recipe.image_size) for i in numbers])
        right += int((model(normalised(images, recipe.statistics).to(device)).argmax(1).cpu() == pictures.labels[numbers]).sum())
    return 100 * right / len(pictures)


def train(recipe: Recipe, pictures: Pictures) -> nn.Module:
    """The trained classifier or probe of one seed; resumed where its run folder stands."""
    seed_everything(recipe.seed)
    classes, augmentation = len(pictures.classes), recipe.augmentation
    probing = recipe.protocol == "linear_probe"
    backbone = build(replace(recipe, drop_path=0.0) if probing else recipe, 0 if probing else classes)
    model: nn.Module = Probe(backbone, classes) if probing else backbone
    loader = DataLoader(Augmented(pictures, recipe), recipe.batch_size, shuffle=True, drop_last=True, num_workers=recipe.workers)
    plan = budget(loader, recipe.training)
    peak = scaled_lr(recipe.base_lr, recipe.batch_size * processes().num_processes * recipe.training.accumulation)
    warmup = min(recipe.warmup * plan.per_epoch, 0.2 * plan.total)  # short runs keep a cosine
    mixing = not probing and (augmentation.mixup > 0 or augmentation.cutmix > 0)
    mix = Mixup(
        float(augmentation.mixup), float(augmentation.cutmix), label_smoothing=float(augmentation.smoothing), num_classes=classes
    ) if mixing else None  # fmt: skip
    soft = SoftTargetCrossEntropy()

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        if mix is not None and len(images) % 2 == 0:
            images, targets = mix(images, labels)
            found = soft(net(images), targets)
        else:
            found = F.cross_entropy(net(images), labels, label_smoothing=0.0 if probing else float(augmentation.smoothing))
        return {"loss": mean_over_processes(found * len(images), len(images))}

    fitted = fit(
        model,
        loss,
        loader,
        optimizer_of(model, recipe, peak),
        recipe.training,
        recipe.folder,
        recipe=replace(recipe, seeds=[recipe.seed]),
        seed=recipe.seed,
        lr_at=lambda step: cosine(step, total=plan.total, peak=peak, final=float(recipe.min_lr), warmup=warmup),
    )
    if is_main() and not probing:
        save_model(fitted.model, recipe.folder, recipe=to_yaml(recipe))
    return fitted.model


def main(recipe: Recipe) -> Path | None:
    """Every seed; gives the record's path (None on processes other than the first)."""
    scores, seconds = [], 0.0
    about: dict[str, str] = {}
    for seed in recipe.seeds:
        run = replace(recipe, seed=seed, seeds=[seed])
        kept = run.folder / "score.json"
        check_recipe(run.folder, to_yaml(run))
        if not kept.is_file():
            began = time.monotonic()
            model = train(run, load(run.data, "train", data_root=run.data_root, limit=run.limit, seed=seed))
            test = load(run.data, "test", data_root=run.data_root, seed=seed)
            found = {"top1": top1(model, test, run), "seconds": round(time.monotonic() - began, 1), "data": test.about}
            if is_main():
                write_text(kept, json.dumps(found))
        if is_main():
            found = json.loads(kept.read_text())
            scores.append(found["top1"])
            seconds, about = seconds + found["seconds"], found["data"]
    if not is_main():
        return None
    own_run = Path(recipe.start.format(seed=recipe.seeds[0])).is_dir()
    weights = "untrained start" if recipe.start == "none" else "trained here" if own_run else "official, converted"
    extra = {"row": recipe.protocol, "start": recipe.start}
    record = Record(f"recipes/{recipe.name}.yaml", "top-1 (%)", scores, list(recipe.seeds), weights, about, seconds / 3600, extra)
    path = save_record("mr_mae", record, demo=recipe.data == "parts")
    print(f"{recipe.name}: {summarise(scores)} top-1 (%), recorded in {path}", flush=True)
    return path


if __name__ == "__main__":
    main(parse(Recipe))
