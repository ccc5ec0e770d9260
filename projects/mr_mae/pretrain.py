"""Pre-train MR-MAE for one seed: `python -m projects.mr_mae.pretrain --config projects/mr_mae/recipes/base-dino.yaml --data-root D`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoint import save_model
from common.engine import NonFiniteLoss, Training, budget, fit, mean_over_processes, seed_everything
from common.masking import kept_count
from common.recipe import parse, to_yaml
from common.schedule import cosine, scaled_lr
from projects.mr_mae import parts, teachers
from projects.mr_mae.cache import FeatureStore, stored
from projects.mr_mae.classifier import pretraining_groups
from projects.mr_mae.data import HALF, Augment, Name, Pictures, Views, load
from projects.mr_mae.mimic import Distance, Focus, TargetNorm
from projects.mr_mae.model import MRMAE, SIZES, Targets, patch_side
from projects.mr_mae.teachers import IMAGENET, Features, Statistics, Teacher
from projects.mr_mae.weights import begin_from


@dataclass(frozen=True)
class Architecture:
    """Backbone and decoder; a named size, or every field of its own."""

    size: Literal["small", "base", "large", "huge", "vit_base", "own"] = "base"
    """Published size; own: the fields below."""
    stage_patch: list[PositiveInt] = field(default_factory=lambda: [4, 2, 2])
    """Patch of each stage; their product is the final patch."""
    stage_dims: list[PositiveInt] = field(default_factory=lambda: [32, 48, 96])
    """Channels of each stage (own)."""
    stage_depths: list[NonNegativeInt] = field(default_factory=lambda: [1, 1, 4])
    """Blocks of each stage (own)."""
    num_heads: PositiveInt = 4
    """Heads of the third stage (own)."""
    mlp_ratio: list[PositiveFloat] = field(default_factory=lambda: [4.0, 4.0, 4.0])
    """Hidden over outer width of each stage's MLPs (own)."""
    decoder_dim: PositiveInt = 64
    """Width of the decoder (own)."""
    decoder_depth: NonNegativeInt = 2
    """Its blocks (own)."""
    decoder_heads: PositiveInt = 4
    """Its heads (own)."""
    class_token: bool = False
    """Learned token before the third stage, as ConvMAE-v2 files have it."""

    def settings(self) -> dict[str, Any]:
        """Arguments of `MRMAE` for the encoder and decoder."""
        own = {name: value for name, value in vars(self).items() if name not in ("size", "class_token")}
        chosen = own if self.size == "own" else {"stage_patch": self.stage_patch} | SIZES[self.size]
        return chosen | ({"class_token": True} if self.class_token else {})


@dataclass(frozen=True)
class TeacherSource:
    """A frozen teacher."""

    spec: str = "timm:vit_base_patch16_224.dino"
    """timm:<model>, open_clip:<model>, file:<TorchScript path>, or oracle (drawn parts)."""
    weights: str | None = None
    """Local file or run folder; not given: timm's or open_clip's own cache."""
    weight: PositiveFloat = 1.0
    """Lambda, of its mimic loss."""
    projected: bool = False
    """CLIP's tokens after its projection."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""


@dataclass(frozen=True)
class Recipe:
    """Pre-training; defaults are the paper's base model on ImageNet-1K with a DINO teacher."""

    name: str = "base-dino"
    """Of the run folder."""
    data: Name = "imagenet"
    """Data set; parts need no files."""
    image_size: PositiveInt = 224
    """Pixels a side."""
    limit: PositiveInt | None = None
    """Training pictures; not given: all."""
    augment: Augment = "crop"
    """Random resized crops and mirroring, mirroring alone, or nothing."""
    views: NonNegativeInt = 0
    """Fixed views of each picture, whose teacher features are cached on disk; 0: drawn anew each time, the teacher runs in every step."""
    model: Architecture = field(default_factory=Architecture)
    """Backbone and decoder."""
    teachers: list[TeacherSource] = field(default_factory=lambda: [TeacherSource()])
    """One mimic head each."""
    start: str | None = None
    """Released ConvMAE file or run folder to begin from; what it lacks (a decoder, say) is named and keeps its initial values."""
    targets: Targets = "both"
    """Both losses on their own tokens; pixels alone; mimic alone; or entangled: both on the hidden tokens."""
    mask_ratio: OpenUnitInterval = 0.75
    """Share of patches hidden."""
    focus: Focus = "none"
    """Choose visible patches by the first teacher's attention: sampled, or the highest."""
    norm_pix: bool = True
    """Standardise the pixels of each patch."""
    target_norm: TargetNorm = "layernorm"
    """Normalisation of teacher features."""
    distance: Distance = "mse"
    """Between prediction and teacher feature."""
    mimic_layers: list[PositiveInt] = field(default_factory=list)
    """Transformer blocks fused before the mimic head; empty: the encoder's output."""
    batch_size: PositiveInt = 128
    """Pictures a process and batch."""
    base_lr: PositiveFloat = 1.5e-4
    """Learning rate at 256 pictures a step."""
    warmup: NonNegativeFloat = 0.1
    """Share of the training with a rising rate (40 of 400 epochs)."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's, on every tensor of two axes or more."""
    training: Training = field(default_factory=lambda: Training(epochs=400, precision="bf16"))
    """Length and arithmetic."""
    seed: NonNegativeInt = 0
    """Of weights, masks, shuffles and drawn parts."""
    workers: NonNegativeInt = 0
    """Processes that read pictures."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    cache: str = "runs/mr_mae/features"
    """Folder of cached teacher features."""
    out: str = "runs/mr_mae"
    """Where run folders go."""

    def __post_init__(self) -> None:
        if self.warmup >= 1:
            raise ValueError(f"warmup={self.warmup}: expected a share of the training, less than 1")
        kept_count(grid_of(self) ** 2, self.mask_ratio)  # before hours of teacher features
        if self.targets == "pixels" and self.focus == "none" and self.teachers:
            raise ValueError("targets=pixels: expected no teachers, as nothing would use them; set teachers: []")
        if self.targets != "pixels" and not self.teachers:
            raise ValueError(f"targets={self.targets}: expected at least one teacher, found none")
        if self.focus != "none" and not self.teachers:
            raise ValueError(f"focus={self.focus}: expected a teacher whose attention chooses the visible patches, found none")
        oracles = [source.spec == "oracle" for source in self.teachers]
        if any(oracles) and (self.data != "parts" or self.augment != "none"):
            raise ValueError("teacher oracle: expected data parts without augmentation; it knows the drawn pictures alone")

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation that the student's pictures are normalised by."""
        return HALF if self.data == "parts" else IMAGENET


def grid_of(recipe: Recipe) -> int:
    """Patches along a side."""
    return recipe.image_size // patch_side(recipe.image_size, recipe.model.settings()["stage_patch"])


def build(recipe: Recipe, teacher_dims: Sequence[int]) -> MRMAE:
    """The model; a recipe that only focuses by its teacher has no mimic heads."""
    mimics = recipe.targets != "pixels"
    return MRMAE(
        recipe.image_size,
        **recipe.model.settings(),
        mask_ratio=recipe.mask_ratio,
        norm_pix=recipe.norm_pix,
        targets=recipe.targets,
        teacher_dims=[int(dim) for dim in teacher_dims] if mimics else [],
        mimic_weights=[float(source.weight) for source in recipe.teachers] if mimics else [1.0],
        mimic_layers=[int(layer) for layer in recipe.mimic_layers],
        target_norm=recipe.target_norm,
        distance=recipe.distance,
        focus=recipe.focus,
    )


def teacher_of(recipe: Recipe, source: TeacherSource) -> Teacher:
    """A frozen network on this process's device."""
    settings = {"student": recipe.statistics, "projected": source.projected, "settings": source.settings}
    return teachers.load(source.spec, grid=grid_of(recipe), weights=source.weights, **settings).to(processes().device)


class Oracle:
    """The drawn pictures' own features, in the place of a store."""

    def __init__(self, recipe: Recipe, count: int) -> None:
        grid = grid_of(recipe)
        drawn = parts.draw(count, recipe.seed) if grid == 4 else parts.draw(count, recipe.seed, 0, grid)  # spelled as elsewhere: it is kept
        self.tokens, self.score = parts.oracle(drawn), drawn.score
        self.dim = self.tokens.shape[-1]

    def __getitem__(self, index: int) -> Features:
        return Features(self.tokens[index], self.score[index])


def cached_features(recipe: Recipe, pictures: Pictures, teacher: Teacher, device: torch.device) -> FeatureStore:
    """Features of every fixed view, from disk or computed once and kept there."""
    views = Views(pictures, recipe.image_size, recipe.augment, recipe.statistics, fixed=recipe.views)
    grid = grid_of(recipe)

    def compute(numbers: range) -> Features:
        found = []
        for part in torch.tensor(list(numbers)).split(64):
            images = torch.stack([views.fixed_view(*divmod(int(number), recipe.views)) for number in part])
            found.append(teacher(images.to(device), grid))
        scores = [features.score for features in found if features.score is not None]
        return Features(torch.cat([features.tokens.half() for features in found]), torch.cat(scores) if scores else None)

    about = {"teacher": teacher.fingerprint(), "data": pictures.about, "grid": grid, "size": recipe.image_size}
    about |= {"augment": recipe.augment, "views": int(recipe.views), "student": list(map(list, recipe.statistics))}
    with processes().main_process_first():
        return stored(recipe.cache, about, len(pictures) * recipe.views, compute, say=lambda line: print(line, flush=True))


def processes() -> PartialState:
    """The processes that run and this one's device; asked before `fit`, it must start the group as `fit` would."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def is_main() -> bool:
    """Whether this process writes what all share."""
    return int(os.environ.get("RANK", "0")) == 0


def main(recipe: Recipe) -> MRMAE:
    """Pre-train, or go on, or return the finished model; leaves config.json and model.safetensors in the run folder."""
    pictures = load(recipe.data, "train", data_root=recipe.data_root, limit=recipe.limit, seed=recipe.seed)
    grid, device = grid_of(recipe), processes().device
    stores: list[Any] = []
    live: list[Teacher] = []
    dims = []
    for source in recipe.teachers:
        if source.spec == "oracle":
            stores.append(Oracle(recipe, len(pictures)))
            dims.append(stores[-1].dim)
            continue
        teacher = teacher_of(recipe, source)
        dims.append(teacher.dim)
        if recipe.views:
            stores.append(cached_features(recipe, pictures, teacher, device))
        else:
            live.append(teacher)
    if stores and live:
        raise ValueError("teachers: expected all of them cached or all run live, found both; set views for the cache")
    if recipe.focus != "none" and stores and stores[0][0].score is None:
        raise ValueError(f"focus={recipe.focus}: expected a teacher with a class token, found none in {recipe.teachers[0].spec}")

    seed_everything(recipe.seed)
    model = build(recipe, dims)
    if recipe.start is not None:
        begin_from(model, recipe.start)
    fixed = recipe.views or int(bool(stores))  # an oracle's pictures have one view
    data = Views(pictures, recipe.image_size, recipe.augment, recipe.statistics, fixed=fixed, stores=stores)
    loader = DataLoader(data, recipe.batch_size, shuffle=True, drop_last=True, num_workers=recipe.workers)
    plan = budget(loader, recipe.training)
    peak = scaled_lr(recipe.base_lr, recipe.batch_size * processes().num_processes * recipe.training.accumulation)

    def loss(net: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        features, score = batch.get("tokens", ()), batch.get("score")
        if live:
            found = [teacher(batch["images"], grid) for teacher in live]
            features, score = [one.tokens for one in found], found[0].score
        if recipe.focus != "none" and score is None:
            raise ValueError(f"focus={recipe.focus}: expected a teacher with a class token, found none in {recipe.teachers[0].spec}")
        out = net(batch["images"], features if recipe.targets != "pixels" else (), score=score)
        count = len(batch["images"])
        terms = {"loss": out.loss, "pixel": out.pixel, "mimic": out.mimic}
        return {name: mean_over_processes(term * count, count) for name, term in terms.items() if term is not None}

    optimizer = torch.optim.AdamW(pretraining_groups(model, float(recipe.weight_decay)), lr=peak, betas=(0.9, 0.95))
    try:
        fitted = fit(
            model,
            loss,
            loader,
            optimizer,
            recipe.training,
            recipe.folder,
            recipe=recipe,
            seed=recipe.seed,
            lr_at=lambda step: cosine(step, total=plan.total, peak=peak, warmup=recipe.warmup * plan.total),
        )
    except NonFiniteLoss as err:
        rate = optimizer.param_groups[0]["lr"]
        raise NonFiniteLoss(
            f"{err}; the learning rate was {rate:.3g}; try a smaller base_lr, or training.precision=bf16 instead of fp16"
        ) from err
    if is_main():
        save_model(fitted.model, recipe.folder, recipe=to_yaml(recipe))
    return fitted.model


if __name__ == "__main__":
    main(parse(Recipe))
