"""Pre-train HiCMAE for one seed: `python -m projects.hicmae.pretrain --config projects/hicmae/recipes/pretrain-base.yaml --data-root D`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.checkpoint import save_model
from common.contrastive import Gather
from common.data import root
from common.engine import Training, budget, fit, seed_everything
from common.recipe import parse, to_yaml
from common.schedule import scaled_lr
from projects.hicmae.data import PretrainingClips, Sizes, read_speech, read_video_list
from projects.hicmae.layers import FusionOrder
from projects.hicmae.model import HiCMAE, Modality, Target
from projects.hicmae.optim import adamw, lr_at
from projects.hicmae.talkers import SyntheticTalkers


@dataclass(frozen=True)
class Architecture:
    """Inputs, encoders, fusion, decoders and losses; defaults are HiCMAE-B's."""

    image_size: PositiveInt = 160
    """Pixels of a frame's side."""
    frames: PositiveInt = 16
    """Of a clip."""
    patch_size: PositiveInt = 16
    """Pixels of a cube's side."""
    tubelet: PositiveInt = 2
    """Frames of a cube."""
    audio_size: list[PositiveInt] = field(default_factory=lambda: [256, 128])
    """Spectrogram: frames of 10 ms, mel bins."""
    audio_patch_size: PositiveInt = 16
    """Side of a spectrogram patch."""
    embed_dim: PositiveInt = 512
    """Width of both encoders."""
    num_heads: PositiveInt = 8
    """Heads of the encoders and of fusion."""
    depth: PositiveInt = 10
    """Blocks of each encoder."""
    fusion_depth: PositiveInt = 2
    """Layers of the fusion encoder."""
    fusion_order: FusionOrder = "both"
    """Which stream is updated first (Table 16)."""
    decoder_dim: PositiveInt = 384
    """Width of both decoders."""
    decoder_heads: PositiveInt = 6
    """Their heads."""
    decoder_depth: PositiveInt = 4
    """Their blocks."""
    levels: list[PositiveInt] = field(default_factory=lambda: [4, 7, 10])
    """Encoder blocks that the decoders read, decoder_depth - 1 of them."""
    skip: bool = True
    """Off: decoders of self blocks alone."""
    contrastive_levels: list[PositiveInt] | None = None
    """Encoder blocks that are contrasted; not given: `levels`."""
    contrastive_weight: NonNegativeFloat = 0.0025
    """Lambda."""
    temperature: PositiveFloat = 0.07
    """Of the contrastive loss, fixed."""
    gather: Gather | None = None
    """Negatives of other processes: none (the reference), or with `full` all of them."""
    mask_ratio: OpenUnitInterval = 0.9
    """Share of video places hidden."""
    audio_mask_ratio: OpenUnitInterval = 0.8
    """Share of audio tokens hidden."""
    target: Target = "difference"
    """Pixels to be rebuilt."""
    difference_weight: NonNegativeFloat | None = None
    """w of (1 - w) first frames + w differences."""
    modality: Modality = "av"
    """One modality: a masked autoencoder with skips, without fusion and contrast."""


@dataclass(frozen=True)
class Recipe:
    """Pre-training without labels; defaults are HiCMAE-B's on VoxCeleb2 (4 processes of 40 clips)."""

    name: str = "pretrain-base"
    """Of the recipe's file and of the run folder."""
    data: Literal["voxceleb2", "speech", "talkers"] = "voxceleb2"
    """A list of videos; 72 training clips of RAVDESS's speech (sound alone); talkers drawn on the fly."""
    list: str = "voxceleb2/pretrain.csv"
    """List of videos under the data root."""
    path_map: dict[str, str] = field(default_factory=dict)
    """Prefixes of the list's paths to replace: {old: new}."""
    clips: PositiveInt = 2000
    """Talkers drawn."""
    stride: PositiveInt = 4
    """Frames between two frames of a clip."""
    model: Architecture = field(default_factory=Architecture)
    """The method."""
    training: Training = field(default_factory=lambda: Training(epochs=100, precision="fp16"))
    """Length and arithmetic."""
    batch_size: PositiveInt = 40
    """Clips a process; they are each other's negatives."""
    base_lr: PositiveFloat = 3e-4
    """Peak rate at 256 clips."""
    min_lr: NonNegativeFloat = 1e-5
    """Last rate at 256 clips."""
    warmup_epochs: NonNegativeFloat = 5.0
    """Epochs of the rise from 0."""
    weight_decay: NonNegativeFloat = 0.05
    """Of matrices."""
    workers: NonNegativeInt = 0
    """Processes that decode clips."""
    skip_bad: bool = False
    """Put the next clip in place of one that cannot be read, and count; else stop."""
    seed: NonNegativeInt = 0
    """Of weights, masks, clips and shuffles."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/hicmae"
    """Where run folders go."""

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"


def sizes(model: Architecture) -> Sizes:
    return Sizes(model.image_size, model.frames, *model.audio_size)


def build(model: Architecture) -> HiCMAE:
    return HiCMAE(**asdict(model))


def load(recipe: Recipe) -> Dataset[Any]:
    """Unlabelled clips; items are (video, audio, ...)."""
    if recipe.data == "talkers":
        frames, bins = recipe.model.audio_size
        return SyntheticTalkers(recipe.seed, recipe.clips, size=recipe.model.image_size, frames=frames, bins=bins)
    folder = root(recipe.data_root)
    if recipe.data == "speech":
        if recipe.model.modality != "a":
            raise ValueError(f"data speech holds sound alone: expected model.modality a, found {recipe.model.modality}")
        pairs: Any = [(None, row.sound) for row in read_speech(folder).train]
    else:
        pairs = read_video_list(folder / recipe.list, path_map=recipe.path_map, root=folder)
    return PretrainingClips(pairs, sizes(recipe.model), stride=recipe.stride, skip_bad=recipe.skip_bad)


def is_main() -> bool:
    """Whether this process writes what all share."""
    return int(os.environ.get("RANK", "0")) == 0


def main(recipe: Recipe, data: Dataset[Any] | None = None) -> HiCMAE:
    """Train, or go on, or return the finished model; leaves config.json and model.safetensors in the run folder.

    Args:
        data: the clips, where the caller has them already.
    """
    seed_everything(recipe.seed)
    model = build(recipe.model)
    data = load(recipe) if data is None else data
    if len(data) < recipe.batch_size:  # type: ignore[arg-type]
        raise ValueError(f"batch_size={recipe.batch_size}: expected at most the {len(data)} clips that there are")  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(
        data, batch_size=recipe.batch_size, shuffle=True, drop_last=True, num_workers=recipe.workers, persistent_workers=recipe.workers > 0
    )
    plan = budget(loader, recipe.training)
    clips = recipe.batch_size * recipe.training.accumulation * PartialState().num_processes
    peak, final = (scaled_lr(float(rate), clips) for rate in (recipe.base_lr, recipe.min_lr))
    warmup = min(round(recipe.warmup_epochs * plan.per_epoch), plan.total - 1)

    def loss(net: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        out = net(batch[0], batch[1])
        named = {"loss": out.loss, "video": out.video_loss, "audio": out.audio_loss, "contrastive": out.contrastive_loss}
        return {name: value for name, value in named.items() if value is not None}

    fitted = fit(
        model,
        loss,
        loader,
        adamw(model, peak, recipe.weight_decay, betas=(0.9, 0.95)),
        recipe.training,
        recipe.folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lambda step: lr_at(step, total=plan.total, warmup=warmup, peak=peak, final=final),
    )
    if is_main():
        save_model(fitted.model, recipe.folder, recipe=to_yaml(recipe))
    return fitted.model


if __name__ == "__main__":
    main(parse(Recipe))
