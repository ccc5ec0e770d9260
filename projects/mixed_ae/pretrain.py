"""Pre-train MixedAE, or an ablation down to MAE, for one seed: `python -m projects.mixed_ae.pretrain --config projects/mixed_ae/recipes/imagenet_1600.yaml --data-root D`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from common.checkpoint import save_model
from common.engine import NonFiniteLoss, Training, budget, fit, seed_everything
from common.recipe import parse, to_yaml
from common.schedule import cosine, scaled_lr
from projects.mixed_ae.data import Name, Samples, Split, batches, load
from projects.mixed_ae.mixing import group_size
from projects.mixed_ae.model import MixedAE, Mixing, check_batch
from projects.mixed_ae.weights import load_mae


@dataclass(frozen=True)
class Architecture:
    """Encoder and decoder; defaults are ViT-B at 224 with MAE's decoder."""

    image_size: PositiveInt = 224
    """Pixels a side."""
    patch_size: PositiveInt = 16
    """Pixels a side."""
    embed_dim: PositiveInt = 768
    """Encoder width."""
    depth: PositiveInt = 12
    """Encoder blocks."""
    num_heads: PositiveInt = 12
    """Encoder heads."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden over outer width of the MLPs."""
    decoder_dim: PositiveInt = 512
    """Decoder width."""
    decoder_depth: PositiveInt = 8
    """Decoder blocks."""
    decoder_heads: PositiveInt = 16
    """Decoder heads."""


@dataclass(frozen=True)
class Method:
    """What of MixedAE is on; defaults are the whole method."""

    mixing: Mixing = "compose"
    """One mixed sequence a group, K complementary ones ("full"), or MAE ("none")."""
    ratio: PositiveFloat = 0.25
    """Share of a mixed sequence that each image gives: 1 / K."""
    segments: bool = True
    """Learned vector for the image's place in its group."""
    homologous: bool = True
    """Attention over the best keys only."""
    layers: list[NonNegativeInt] | None = None
    """Blocks with homologous attention, from 0; none given: all."""
    count: PositiveInt | None = None
    """Keys that a patch keeps; not given: as many as its image owns."""
    weight: NonNegativeFloat = 0.1
    """Of the contrastive loss; 0 = without."""
    temperature: PositiveFloat = 0.25
    """Of the contrastive loss."""
    projector: bool = False
    """Two-layer MLP before the contrastive loss."""
    permute: bool = False
    """Segment vectors are dealt anew in each step."""
    norm_pix: bool = True
    """Standardise target patches."""


VARIANTS: dict[str, dict[str, Any]] = {
    "mae": {"mixing": "none", "segments": False, "homologous": False, "weight": 0.0},
    "naive": {"segments": False, "homologous": False, "weight": 0.0},
    "segments": {"homologous": False, "weight": 0.0},
    "homologous": {"weight": 0.0},
    "no-segments": {"segments": False},
    "full-mixing": {"mixing": "full"},
    "projector": {"projector": True},
}
"""Baselines and ablations by name, as changes of the whole method: naive mixing, + segments, + homologous attention (then + contrast = all)."""

Variant = Literal["mae", "naive", "segments", "homologous", "no-segments", "full-mixing", "projector"]


@dataclass(frozen=True)
class Recipe:
    """Pre-training; defaults are the paper's ViT-B on ImageNet-1K."""

    name: str = "imagenet_1600"
    """Of the recipe: its file's, and the run folder's."""
    data: Name = "folder"
    """textured needs no files."""
    where: str = "imagenet"
    """Folder under the data root (data = folder)."""
    train_images: PositiveInt = 4096
    """Textured objects to train on."""
    test_images: PositiveInt = 1024
    """Textured objects to evaluate on."""
    related: NonNegativeFloat = 0.0
    """Weight of a background shared by the group (textured objects)."""
    crop: bool = True
    """Random resized crops (scale 0.2 to 1) and flips; off: images as they are."""
    model: Architecture = field(default_factory=Architecture)
    """Sizes."""
    method: Method = field(default_factory=Method)
    """What is on."""
    start: str | None = None
    """Checkpoint of MAE or MixedAE to start from."""
    batch_size: PositiveInt = 64
    """Images (not mixed sequences) a process and step."""
    base_lr: PositiveFloat = 1.5e-4
    """Peak learning rate at 256 images, scaled with the global batch."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's, not on 1-D parameters."""
    warmup: NonNegativeFloat = 40.0
    """Epochs of linear warm-up, then half a cosine to 0."""
    training: Training = field(default_factory=lambda: Training(epochs=1600, precision="bf16", log_every=50))
    """Length and arithmetic."""
    workers: NonNegativeInt = 0
    """Loader processes."""
    seed: NonNegativeInt = 0
    """Of weights, mixtures, crops and shuffles."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/mixed_ae"
    """Where run folders go."""

    def __post_init__(self) -> None:
        if not 0 <= self.related < 1:
            raise ValueError(f"related={self.related}: expected 0 <= related < 1")
        if self.method.mixing != "none":
            check_batch(self.batch_size, group_size(self.method.ratio), "batch_size")
        with torch.device("meta"):  # sizes, ratio, count, temperature ... are checked where they are used
            build(self)

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"

    @property
    def group(self) -> int:
        """Images that a batch must hold whole groups of."""
        return 1 if self.method.mixing == "none" else group_size(self.method.ratio)


def build(recipe: Recipe) -> MixedAE:
    """The untrained model of a recipe."""
    return MixedAE(**plain(recipe.model), **plain(recipe.method))


def plain(options: Any) -> dict[str, Any]:
    """Fields with plain numbers: a model's config.json and a saved state hold no others."""
    kinds = (bool, int, float)
    return {
        name: next((kind(value) for kind in kinds if isinstance(value, kind)), value) if isinstance(value, kinds) else value
        for name, value in vars(options).items()
    }


def splits(recipe: Recipe) -> tuple[Split, Split]:
    """Training and test images."""
    return load(
        recipe.data,
        data_root=recipe.data_root,
        where=recipe.where,
        seed=recipe.seed,
        size=recipe.model.image_size,
        patch=recipe.model.patch_size,
        train=recipe.train_images,
        test=recipe.test_images,
        related=recipe.related,
        group=group_size(recipe.method.ratio),
    )


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW without decay on biases, norms and other 1-D parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": float(weight_decay)},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=float(lr), betas=betas, fused=True)


def is_main() -> bool:
    return PartialState().is_main_process


def main(recipe: Recipe, split: Split | None = None) -> MixedAE:
    """Train, go on, or return the finished model; config.json and model.safetensors are left in the run folder.

    Args:
        split: training images, where the caller has them.
    Raises:
        NonFiniteLoss: naming the step, both terms and the largest contrastive logit.
    """
    seed_everything(recipe.seed)
    model = build(recipe)
    if recipe.start is not None:
        load_mae(model, recipe.start)
    split = splits(recipe)[0] if split is None else split
    samples = Samples(split, recipe.model.image_size, "crop" if recipe.crop else "none")
    loader = batches(samples, recipe.batch_size, recipe.group, workers=recipe.workers, scenes=recipe.related > 0)
    plan = budget(loader, recipe.training)
    peak = scaled_lr(recipe.base_lr, recipe.batch_size * PartialState().num_processes * recipe.training.accumulation)
    recent: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=recipe.training.log_every * recipe.training.accumulation)
    blocks = sorted(model.homologous)

    def loss(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        out = model(images)
        recent.append((out.reconstruction.detach(), out.contrast.detach(), out.largest_logit.detach()))
        terms = {"loss": out.loss, "reconstruction": out.reconstruction}
        if recipe.method.weight > 0:
            terms["contrast"] = out.contrast
        return terms | {f"accuracy_{number}": out.accuracy[number] for number in blocks}

    try:
        fitted = fit(
            model,
            loss,
            loader,
            adamw(model, peak, recipe.weight_decay),
            recipe.training,
            recipe.folder,
            recipe=recipe,
            seed=recipe.seed,
            lr_at=lambda step: cosine(step, total=plan.total, peak=peak, warmup=min(recipe.warmup * plan.per_epoch, plan.total / 2)),
        )
    except NonFiniteLoss as err:
        bad = next((terms for terms in recent if not torch.stack(terms).isfinite().all()), recent[-1])
        named = ", ".join(
            f"{n} {float(t):g}" for n, t in zip(("reconstruction", "contrast", "largest contrastive logit"), bad, strict=True)
        )
        raise NonFiniteLoss(f"{err}; at that step: {named}; lower base_lr, or precision=no") from err
    trained = fitted.model
    if not isinstance(trained, MixedAE):
        raise TypeError(f"training returned {type(trained).__name__}, expected MixedAE")
    if is_main():
        save_model(trained, recipe.folder, recipe=to_yaml(recipe))
    return trained


def variant(recipe: Recipe, name: str) -> Recipe:
    """The same training of a baseline or ablation, in a run folder of its own."""
    return replace(recipe, name=f"{recipe.name}-{name}", method=replace(recipe.method, **VARIANTS[name]))


if __name__ == "__main__":
    main(parse(Recipe))
