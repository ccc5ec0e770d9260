"""Pre-train Point-CMAE (or a baseline) for one seed: `python -m projects.point_cmae.pretrain --config projects/point_cmae/recipes/shapenet55.yaml --data-root D`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoint import load_model, save_model
from common.data import VARIABLE
from common.engine import Training, budget, fit, seed_everything
from common.recipe import parse, read, to_yaml
from projects.point_cmae import class_contrast
from projects.point_cmae.augment import AUGMENTATIONS
from projects.point_cmae.data import Name, Sizes, Unlabelled, load
from projects.point_cmae.model import Chamfer, Contrast, Ops, PointCMAE
from projects.point_cmae.optim import Clock, adamw, is_main, local_batch, rate_at, synchronised
from projects.point_cmae.weights import load_pretraining, ours_as_official, read_checkpoint

RECIPES = Path(__file__).parent / "recipes"
PAPERS_EPOCH = 275
"""Pre-training epoch (0-based) that the downstream figures were made from."""


@dataclass(frozen=True)
class Architecture:
    """The method; defaults are the paper's one size."""

    dim: PositiveInt = 384
    """Width of tokens, encoder and decoders."""
    depth: PositiveInt = 12
    """Encoder blocks."""
    num_heads: PositiveInt = 6
    """Attention heads of the encoder."""
    decoder_depth: PositiveInt = 4
    """Blocks of each decoder."""
    decoder_heads: PositiveInt = 6
    """Attention heads of the decoders."""
    num_group: PositiveInt = 64
    """Groups (tokens) of a cloud."""
    group_size: PositiveInt = 32
    """Points of a group."""
    widths: list[PositiveInt] = field(default_factory=lambda: [128, 256, 512])
    """Of the group embedding's point-wise layers."""
    mask_ratio: OpenUnitInterval = 0.6
    """Share of groups hidden in each branch."""
    mask: Literal["random", "block"] = "random"
    """Sampling scheme, drawn for each branch."""
    branches: Literal[1, 2] = 2
    """1: Point-MAE."""
    class_token: bool = True
    """In front of the visible tokens; Point-MAE has none."""
    chamfer: Chamfer = "l2"
    """l2: squared distances (the release's cdl2). l1: distances (cdl1)."""
    contrast: Contrast = "dense"
    """dense: the released code. paired: the abstract. none: two reconstructions alone."""
    reconstruction_weight: PositiveFloat = 1000.0
    """Factor of the chamfer distances; 1 in Point-MAE's loop."""
    contrast_weight: NonNegativeFloat = 1.0
    """Factor of the contrastive term (the history tried 5 and 10)."""
    drop_path: ClosedUnitInterval = 0.1
    """Rate of the last block."""
    ops: Ops = "auto"
    """Who samples the centres."""


@dataclass(frozen=True)
class Recipe:
    """Pre-training; defaults are the paper's on ShapeNet-55."""

    name: str = "shapenet55"
    """Name of the recipe: its file's, and the run folder's."""
    data: Name = "shapenet55"
    """Data set; solids and solids-hard need no files."""
    points: PositiveInt = 1024
    """Points of a cloud that the model sees."""
    sizes: list[PositiveInt] = field(default_factory=lambda: list(Sizes()))
    """Clouds of the generated sets: pre-training, training, test."""
    model: Architecture = field(default_factory=Architecture)
    """The method."""
    class_contrast: Literal["none", "moco", "byol", "simsiam"] = "none"
    """Standard contrastive loss on the class token beside a one-branch reconstruction (claim 1)."""
    training: Training = field(default_factory=lambda: Training(epochs=301))
    """Length and arithmetic: the reference makes one epoch more than its schedule is long."""
    schedule_epochs: PositiveInt = 300
    """Length of the rate's schedule (clock epoch)."""
    warmup: NonNegativeInt = 10
    """Epochs of warm-up."""
    clock: Clock = "epoch"
    """epoch: the reference's schedule, one epoch late. step: warm-up and cosine over all steps."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate, not scaled with the batch."""
    weight_decay: NonNegativeFloat = 0.05
    """Of AdamW; not on vectors, biases and tokens."""
    batch: PositiveInt = 128
    """Clouds a step over all processes; the last, smaller batch is dropped."""
    augmentation: Literal["scale_translate", "rotate", "none"] = "scale_translate"
    """Of every cloud at every step."""
    keep_epochs: list[NonNegativeInt] = field(default_factory=lambda: [PAPERS_EPOCH])
    """0-based epochs whose weights are kept in epoch-<n>; the paper fine-tunes from 275."""
    start: str = "none"
    """Official pre-training checkpoint to start from (Point-MAE's starts both branches alike)."""
    workers: NonNegativeInt = 4
    """Processes that read clouds."""
    seed: NonNegativeInt = 0
    """Of weights, masks and shuffles; the generated sets too."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/point_cmae"
    """Where run folders go."""

    def __post_init__(self) -> None:
        model = self.model
        if model.dim % model.num_heads or model.dim % model.decoder_heads:
            raise ValueError(
                f"model.dim={model.dim}: expected a multiple of num_heads={model.num_heads} and decoder_heads={model.decoder_heads}"
            )
        if self.points < max(model.num_group, model.group_size):
            raise ValueError(f"points={self.points}: expected at least num_group={model.num_group} and group_size={model.group_size}")
        if len(self.sizes) != 3 or len(model.widths) != 3:
            raise ValueError(f"sizes={self.sizes}, model.widths={model.widths}: expected three numbers each")
        if self.class_contrast != "none" and (model.branches, model.class_token) != (1, True):
            raise ValueError(f"class_contrast={self.class_contrast}: expected model.branches=1 with model.class_token=true")

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"


def build(recipe: Recipe) -> PointCMAE:
    """The untrained model, or the official checkpoint's."""
    model = PointCMAE(**asdict(recipe.model))
    if recipe.start != "none":
        load_pretraining(model, read_checkpoint(recipe.start), origin=recipe.start)
    return model


def main(recipe: Recipe) -> PointCMAE:
    """Train, go on where the run folder stands, or return the finished model; its weights are in the run folder too."""
    clouds = load(recipe.data, "pretrain", data_root=recipe.data_root, size=recipe.points, seed=recipe.seed, sizes=Sizes(*recipe.sizes))
    batch = local_batch(recipe.batch, samples=len(clouds))
    seed_everything(recipe.seed)
    model = build(recipe)
    trained: Any = model
    if recipe.class_contrast != "none":
        trained = class_contrast.ClassContrast(model, recipe.class_contrast)
    trained = synchronised(trained)
    loader = DataLoader(
        Unlabelled(clouds, recipe.points),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
    )
    augment = AUGMENTATIONS[recipe.augmentation]

    def loss(net: nn.Module, points: Tensor) -> Any:
        return net(augment(points))

    def keep(_net: nn.Module, made: int) -> Mapping[str, float]:
        if is_main() and made - 1 in recipe.keep_epochs:
            save_model(model, recipe.folder / f"epoch-{made - 1}", recipe=to_yaml(recipe))
        return {}

    fit(
        trained,
        loss,
        loader,
        adamw(trained, recipe.lr, recipe.weight_decay),
        recipe.training,
        recipe.folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=rate_at(
            budget(loader, recipe.training), peak=recipe.lr, epochs=recipe.schedule_epochs, warmup=recipe.warmup, clock=recipe.clock
        ),
        after_step=trained.move_teacher if recipe.class_contrast in ("moco", "byol") else None,
        evaluate=keep if recipe.keep_epochs else None,
        evaluate_every=1 if recipe.keep_epochs else None,
    )
    if is_main():
        save_model(model, recipe.folder, recipe=to_yaml(recipe))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # others may load what is written
    return model


def pretrained(start: str, *, epoch: int, seed: int, data_root: str | None, out: str) -> dict[str, Tensor] | None:
    """Weights to fine-tune from, under official names: of a recipe of this folder (trained now where it is not), of an official file, or None.

    Args:
        start: "none", a pre-training recipe's name, or the path of a checkpoint, also one inside the data root.
        epoch: one that the recipe keeps; a recipe that keeps none gives its last weights.
    Raises:
        ValueError: the recipe keeps other epochs.
    """
    if start == "none":
        return None
    file = RECIPES / f"{start}.yaml"
    if not file.is_file():
        given, folder = Path(start), data_root or os.environ.get(VARIABLE)
        return read_checkpoint(given if given.is_file() or folder is None else Path(folder) / start)
    recipe = read(Recipe, file, data_root=data_root, out=out, seed=seed)
    if recipe.keep_epochs and epoch not in recipe.keep_epochs:
        raise ValueError(
            f"start_epoch={epoch}: {file.name} keeps epochs {recipe.keep_epochs}; start from one of them or add it to keep_epochs"
        )
    wanted = recipe.folder / f"epoch-{epoch}" if recipe.keep_epochs else recipe.folder
    if not (wanted / "config.json").is_file():
        main(recipe)
    model = load_model(PointCMAE, wanted)
    return ours_as_official(model.state_dict(), model)


if __name__ == "__main__":
    main(parse(Recipe))
