"""Fine-tune the encoder, or train a linear layer on it with crops, and record top-1: `python -m projects.mixed_ae.finetune --config projects/mixed_ae/recipes/imagenet_1600_finetune.yaml --data-root D`.

Patches are not mixed here, attention is ordinary, no segment vectors (option: their mean). Recipes are MAE's for ViT-B. Pre-trains first where that is missing.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import PartialState
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoint import save_model, write_text
from common.engine import Training, budget, check_recipe, fit, seed_everything
from common.recipe import parse, to_yaml
from common.results import Record, save_record
from common.schedule import cosine, scaled_lr
from projects.mixed_ae import pretrain
from projects.mixed_ae.data import MEAN, Samples, Split, check_labelled, normalised
from projects.mixed_ae.model import Classifier, MixedAE
from projects.mixed_ae.weights import load_encoder, load_mae

METRIC = "top-1 (%)"


@dataclass(frozen=True)
class Augment:
    """MAE's fine-tuning augmentation; the linear probe uses crops and flips alone."""

    mixup: NonNegativeFloat = 0.8
    """Alpha."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha."""
    smoothing: ClosedUnitInterval = 0.1
    """Of labels."""
    policy: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment string."""
    erasing: ClosedUnitInterval = 0.25
    """Probability."""


@dataclass(frozen=True)
class Recipe:
    """Supervised training of a pre-trained encoder; defaults are ViT-B on ImageNet-1K."""

    name: str = "imagenet_1600_finetune"
    """Of the recipe."""
    pretrain: pretrain.Recipe = field(default_factory=pretrain.Recipe)
    """Data, sizes, and the pre-training that comes first."""
    start: str = "pretrained"
    """The run of `pretrain` ("pretrained", made if missing), nothing ("scratch"), or a checkpoint of MAE or MixedAE (its path)."""
    protocol: Literal["finetune", "linear_probe"] = "finetune"
    """The whole network, or batch norm without affine + linear on frozen features, by LARS."""
    segments: bool = False
    """Add the mean segment vector to every patch."""
    batch_size: PositiveInt = 32
    """Images a process and step."""
    base_lr: PositiveFloat = 5e-4
    """Peak rate at 256 images (linear probe: 0.1)."""
    min_lr: NonNegativeFloat = 1e-6
    """Last rate."""
    warmup: NonNegativeFloat = 5.0
    """Epochs."""
    weight_decay: NonNegativeFloat = 0.05
    """Not on 1-D parameters, class token and positions (linear probe: 0)."""
    layer_decay: PositiveFloat = 0.65
    """Factor of the rate from each block to the one below."""
    drop_path: ClosedUnitInterval = 0.1
    """Of the last block."""
    augment: Augment = field(default_factory=Augment)
    """Used where the pre-training crops."""
    training: Training = field(default_factory=lambda: Training(epochs=100, precision="bf16", log_every=50))
    """Length and arithmetic."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Of the row."""
    seed: NonNegativeInt = 0
    """Of one run."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/mixed_ae"
    """Where run folders go."""

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"


class LinearProbe(nn.Module):
    """Batch norm without affine, then a linear layer, on the mean patch token of a frozen encoder."""

    def __init__(self, encoder: MixedAE, classes: int, segments: bool = False) -> None:
        super().__init__()
        self.encoder, self.segments = encoder.requires_grad_(False), segments
        width = encoder.norm.normalized_shape[0]
        self.head = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, classes))
        nn.init.trunc_normal_(self.head[1].weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        with torch.no_grad():
            tokens = self.encoder.features(images, segments=self.segments)[:, 1:]
        return self.head(tokens.mean(1))


def build(recipe: Recipe, classes: int) -> nn.Module:
    """The classifier or probe with its starting weights; pre-trains where `start` asks for a run that is missing."""
    run = replace(recipe.pretrain, seed=recipe.seed, data_root=recipe.data_root or recipe.pretrain.data_root, out=recipe.out)
    source: Any = None
    if recipe.start == "pretrained":
        source = {name: value.cpu() for name, value in pretrain.main(run).state_dict().items()}
    elif recipe.start != "scratch":
        source = recipe.start
    seed_everything(recipe.seed)
    if recipe.protocol == "linear_probe":
        encoder = pretrain.build(run)
        if source is not None:
            load_mae(encoder, source)
        return LinearProbe(encoder, classes, recipe.segments)
    shape = pretrain.plain(run.model)
    model = Classifier(
        **{name: value for name, value in shape.items() if not name.startswith("decoder_")},
        classes=classes,
        drop_path=float(recipe.drop_path),
    )
    if source is not None:
        load_encoder(model, source, segments=recipe.segments)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    return model


def optimizer(model: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """AdamW with layer-wise rates (groups carry `lr_scale`), or LARS on the probe's linear layer."""
    if isinstance(model, LinearProbe):
        weight, bias = model.head[1].weight, model.head[1].bias
        groups = [{"params": [weight], "always_adapt": True}, {"params": [bias], "always_adapt": False}]
        return Lars(groups, lr=lr, momentum=0.9, weight_decay=0.0)
    groups = param_groups_layer_decay(
        model, float(recipe.weight_decay), no_weight_decay_list=model.no_weight_decay(), layer_decay=float(recipe.layer_decay)
    )
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)


def loader_of(recipe: Recipe, split: Split, classes: int) -> DataLoader[Any]:
    """Batches (images, targets); targets are soft where mixup or cutmix is on."""
    run, augment = recipe.pretrain, recipe.augment
    samples = Samples(split, run.model.image_size, "crop" if run.crop else "none", scale=(0.08, 1.0))
    mixup = None
    if run.crop and recipe.protocol == "finetune":
        samples.transform = _policy(run.model.image_size, augment)
        if augment.mixup or augment.cutmix:
            if recipe.batch_size % 2:
                raise ValueError(f"batch_size={recipe.batch_size}: mixup pairs images, expected an even number")
            mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=classes)
    if len(split) < recipe.batch_size:
        raise ValueError(f"{split.name}: expected at least {recipe.batch_size} images (one batch), found {len(split)}; use a smaller batch")
    collate = partial(_collate, mixup)
    return DataLoader(samples, recipe.batch_size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=run.workers)


def _collate(mixup: Mixup | None, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = torch.stack([image for image, _ in samples]), torch.stack([label for _, label in samples])
    return (images, labels) if mixup is None else mixup(images, labels)


# timm's operations for "inc1" but one: its PosterizeIncreasing asks for 0 bits at magnitude 9, which today's Pillow refuses
OPERATIONS = ["AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeOriginal", "SolarizeIncreasing", "SolarizeAdd", "ColorIncreasing"]
OPERATIONS += ["ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]


def _policy(size: int, augment: Augment) -> Any:
    """Crop (scale 0.08 to 1, bicubic), flip, RandAugment, normalisation, random erasing."""
    from torchvision.transforms import InterpolationMode, v2

    steps: list[Any] = [v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC, antialias=True), v2.RandomHorizontalFlip()]
    if augment.policy is not None:
        fill = {"img_mean": tuple(round(255 * value) for value in MEAN), "translate_const": round(0.45 * size)}
        steps += [v2.ToPILImage(), rand_augment_transform(augment.policy, fill, OPERATIONS), v2.PILToTensor()]
    return v2.Compose([*steps, normalised, RandomErasing(augment.erasing, mode="pixel", device="cpu")])


@torch.no_grad()
def top1(model: nn.Module, split: Split, recipe: Recipe, batch: int = 256) -> float:
    """Per cent of the split classified right (resize 256, centre crop 224, or the same ratio; images in memory as they are), shared by the processes."""
    state, device = PartialState(), next(model.parameters()).device
    samples = Samples(split, recipe.pretrain.model.image_size, "none" if isinstance(split.pixels, Tensor) else "centre")
    model.eval()
    right = torch.zeros((), device=device)
    for rows in torch.arange(len(split))[state.process_index :: state.num_processes].split(batch):
        images, labels = zip(*(samples[int(i)] for i in rows), strict=True)
        right += (model(torch.stack(images).to(device)).argmax(1).cpu() == torch.stack(labels)).sum().to(device)
    if state.num_processes > 1:
        torch.distributed.all_reduce(right)
    return 100 * float(right) / len(split)


def train(recipe: Recipe, data: tuple[Split, Split]) -> dict[str, float]:
    """Top-1 of one seed, trained where missing; kept as score.json in the run folder."""
    recipe = replace(recipe, seeds=[recipe.seed])  # a run is one seed, whichever row it belongs to
    kept = recipe.folder / "score.json"
    check_recipe(recipe.folder, to_yaml(recipe))
    if kept.is_file():
        return json.loads(kept.read_text())
    check_labelled(*data)
    classes = int(torch.cat([split.labels for split in data]).max()) + 1
    model = build(recipe, classes)
    loader = loader_of(recipe, data[0], classes)
    plan = budget(loader, recipe.training)
    peak = scaled_lr(recipe.base_lr, recipe.batch_size * PartialState().num_processes * recipe.training.accumulation)
    smoothing = recipe.augment.smoothing if recipe.protocol == "finetune" and recipe.pretrain.crop else 0.0

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, target = batch
        return {"loss": F.cross_entropy(model(images), target, label_smoothing=0.0 if target.ndim == 2 else smoothing)}

    began = time.monotonic()
    fitted = fit(
        model,
        loss,
        loader,
        optimizer(model, recipe, peak),
        recipe.training,
        recipe.folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lambda step: cosine(
            step,
            total=plan.total,
            peak=peak,
            final=min(float(recipe.min_lr), peak),
            warmup=min(recipe.warmup * plan.per_epoch, plan.total / 2),
        ),
    )
    found = {METRIC: top1(fitted.model, data[1], recipe), "seconds": round(time.monotonic() - began, 1)}
    if pretrain.is_main():
        if isinstance(fitted.model, Classifier):
            save_model(fitted.model, recipe.folder, recipe=to_yaml(recipe))
        write_text(kept, json.dumps(found))
    PartialState().wait_for_everyone()
    return found


def main(recipe: Recipe) -> Path | None:
    """Every seed of the recipe; gives the record's path (None on processes other than the first)."""
    scores: dict[int, dict[str, float]] = {}
    sha = ""
    for seed in recipe.seeds:
        data = pretrain.splits(replace(recipe.pretrain, seed=seed, data_root=recipe.data_root or recipe.pretrain.data_root))
        sha = data[1].sha256
        scores[seed] = train(replace(recipe, seed=seed), data)
        if pretrain.is_main():
            print(f"{recipe.name}, seed {seed}: {scores[seed][METRIC]:.2f} {METRIC}", flush=True)
    if not pretrain.is_main():
        return None
    embedded = recipe.pretrain.data == "textured"
    record = Record(
        f"recipes/{recipe.name}.yaml",
        METRIC,
        [values[METRIC] for values in scores.values()],
        list(scores),
        "trained here",
        {"name": "textured objects" if embedded else recipe.pretrain.data, "split": "test", "sha256": sha},
        sum(values["seconds"] for values in scores.values()) / 3600,
        {"protocol": recipe.protocol, "start": recipe.start},
    )
    return save_record("mixed_ae", record, demo=embedded)


if __name__ == "__main__":
    main(parse(Recipe))
