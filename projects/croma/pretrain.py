"""Pre-train CROMA for one seed: `python -m projects.croma.pretrain --config projects/croma/recipes/base.yaml --data-root D`.

The contrastive loss sees the batches of all processes; with gradient accumulation only those of one micro-batch, which the log says.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoint import save_model
from common.engine import Training, budget, fit, seed_everything
from common.recipe import parse, to_yaml
from common.schedule import cosine, scaled_lr
from projects.croma.bands import keep_statistics
from projects.croma.data import Crops, PretrainingData, by_sensor, mixing, pretraining_images, pretraining_statistics
from projects.croma.model import CROMA, Output, Scheme
from projects.croma.weights import load_pretraining


@dataclass(frozen=True)
class Architecture:
    """Sizes, positions, masks and losses; defaults are CROMA-base."""

    embed_dim: PositiveInt = 768
    """Width of all encoders."""
    depth: PositiveInt = 12
    """Layers of the optical encoder; radar and joint have half."""
    num_heads: PositiveInt = 16
    """Heads of all encoders."""
    decoder_dim: PositiveInt = 512
    """Width of the decoder, a multiple of 4 and of its heads."""
    decoder_depth: PositiveInt = 1
    """Layers of the decoder."""
    decoder_heads: PositiveInt = 8
    """Heads of the decoder."""
    positions: Scheme = "alibi"
    """2D- and X-ALiBi; without the cross bias; sine-cosine positions, recomputed or interpolated for other grids (ablation)."""
    joint_self_bias: Literal["cross", "self"] = "cross"
    """Distances in the joint encoder's self-attention: radar to optical (reference) or radar to radar."""
    mask_ratio: OpenUnitInterval = 0.75
    """Share of patches removed."""
    optical_mask_ratio: OpenUnitInterval | None = None
    """Of the optical image, where it differs; needs joint_self_bias = self."""
    shared_mask: bool = False
    """Remove the same patches of both sensors (ablation)."""
    contrastive_weight: NonNegativeFloat = 1.0
    """Of the contrastive loss; 0 = reconstruction only (ablation)."""
    reconstruction_weight: NonNegativeFloat = 1.0
    """Of the reconstruction loss; 0 = contrastive only (ablation)."""
    targets: Literal["both", "optical"] = "both"
    """Sensors to reconstruct (ablation)."""
    gather_gradient: Literal["none", "local", "full"] = "none"
    """What flows back through gathered features: nothing, to own rows, to all rows."""
    checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim}: expected a multiple of num_heads={self.num_heads}")
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_dim={self.decoder_dim}: expected a multiple of 4 and of decoder_heads={self.decoder_heads}")

    def build(self) -> CROMA:
        fields = asdict(self)
        inner = ("embed_dim", "depth", "num_heads", "positions", "joint_self_bias", "checkpointing")
        encoders = {name: _plain(fields.pop(name)) for name in inner}
        return CROMA(encoders, **{name: _plain(value) for name, value in fields.items()})


def _plain(value: object) -> object:
    """A recipe's checked numbers as plain ones, which config.json can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return float(value) if isinstance(value, float) else int(value)


@dataclass(frozen=True)
class Recipe:
    """CROMA's pre-training; defaults are those of the paper's base model as far as they are known."""

    name: str = "base"
    """Name of the recipe: its file's, and the run folder's."""
    data: PretrainingData = "ssl4eo"
    """Pairs to train on; scenes need no files."""
    model: Architecture = field(default_factory=Architecture)
    """The method."""
    training: Training = field(default_factory=lambda: Training(epochs=300, precision="bf16"))
    """Length and arithmetic."""
    batch_size: PositiveInt = 900
    """Pairs a process (8 x 900 in the paper)."""
    base_lr: PositiveFloat = 4e-6
    """Peak rate for 256 pairs; scaled by the global batch."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's, on every parameter."""
    warmup: ClosedUnitInterval = 0.05
    """Share of the steps with a rising rate."""
    size: PositiveInt = 120
    """Side of the images that the model sees, a multiple of 8."""
    crop: tuple[PositiveInt, PositiveInt] = (60, 180)
    """Smallest and largest side that is cut out and resized, at most the whole image."""
    augment: bool = True
    """Flips and quarter turns."""
    mixup: NonNegativeFloat = 0.3
    """Both parameters of the Beta distribution of the mixing share; 0 = no mixing."""
    scenes: PositiveInt = 2000
    """Generated scenes."""
    scene_side: PositiveInt = 48
    """Their side in pixels."""
    repeats: PositiveInt = 64
    """How often each of the six real pairs stands beside the scenes (data: pairs)."""
    workers: NonNegativeInt = 0
    """Processes that load data."""
    init: str | None = None
    """Checkpoint whose weights to start from: official, or a run folder, whose encoders are taken."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Seeds of a table row."""
    seed: NonNegativeInt = 0
    """Seed of one run."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/croma"
    """Where run folders go."""

    def __post_init__(self) -> None:
        if self.size % 8:
            raise ValueError(f"size={self.size}: expected a multiple of the patch, 8; the next is {-(-self.size // 8) * 8}")
        if self.crop[0] > self.crop[1]:
            raise ValueError(f"crop={self.crop}: expected smallest, largest")

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW on every trained parameter, norms and biases too."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=recipe.betas, weight_decay=float(recipe.weight_decay), fused=True)


def is_main() -> bool:
    """Whether this process writes what all share."""
    return int(os.environ.get("RANK", "0")) == 0


def loss_of(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """What a run logs of a batch (B, 14, H, W)."""
    found: Output = model(batch)
    return {name: getattr(found, name) for name in ("loss", "contrastive", "reconstruction", "optical", "radar")}


def main(recipe: Recipe) -> CROMA:
    """Pre-train, or go on where the run folder stands, and give the model with its last weights; they are in the run folder too.

    Raises:
        ValueError: a batch of one pair in all, a data set smaller than a batch.
    """
    recipe = replace(recipe, seeds=[recipe.seed])  # a run is one seed, whichever row it belongs to
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.batch_size * processes < 2 and recipe.model.contrastive_weight:
        raise ValueError("batch_size=1 in one process: the contrastive loss needs at least 2 samples; its loss would be 0")
    images = pretraining_images(
        recipe.data, data_root=recipe.data_root, count=recipe.scenes, side=recipe.scene_side, seed=recipe.seed, repeats=recipe.repeats
    )
    crops = Crops(images, recipe.size, recipe.crop, augment=recipe.augment)
    if len(crops) < recipe.batch_size * processes:
        raise ValueError(
            f"{recipe.data}: {len(crops)} pairs are fewer than one batch of {recipe.batch_size} x {processes}; use a smaller batch"
        )
    loader = DataLoader(
        crops,
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=mixing(float(recipe.mixup)),
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    seed_everything(recipe.seed)
    model = recipe.model.build()
    if recipe.init is not None:
        fresh = load_pretraining(model, recipe.init)
        if is_main():
            print(f"{recipe.name}: weights of {recipe.init}; {len(fresh)} parameters start fresh", flush=True)
    plan = budget(loader, recipe.training)
    peak = scaled_lr(float(recipe.base_lr), recipe.batch_size * processes * recipe.training.accumulation)
    if is_main() and recipe.training.accumulation > 1:
        print(
            f"{recipe.name}: negatives come from {recipe.batch_size * processes} pairs, one micro-batch, not from all that are accumulated"
        )
    fitted = fit(
        model,
        loss_of,
        loader,
        optimizer_of(model, recipe),
        recipe.training,
        recipe.folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lambda step: cosine(step, total=plan.total, peak=peak, warmup=int(recipe.warmup * plan.total)),
    )
    if is_main():
        save_model(fitted.model, recipe.folder, recipe=to_yaml(recipe))
        keep_statistics(recipe.folder, by_sensor(pretraining_statistics(recipe.data, recipe.scene_side)))
    return fitted.model


if __name__ == "__main__":
    main(parse(Recipe))
