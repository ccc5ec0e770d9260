"""Pre-train one seed: `python -m projects.g_simclr.pretrain --config projects/g_simclr/recipes/cifar10.yaml --data-root D [--batches random]`.

Autoencoder and clusters first, where the batches are guided (kept, and shared by all seeds unless the recipe says otherwise), then SimCLR.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoint import save_model
from common.engine import Training, budget, fit, seed_everything
from common.recipe import parse, to_yaml
from common.schedule import cosine
from projects.g_simclr.augment import Augmentation, augment
from projects.g_simclr.batches import GuidedBatches, account
from projects.g_simclr.data import Images, Splits, load
from projects.g_simclr.encoders import Name
from projects.g_simclr.model import GSimCLR
from projects.g_simclr.pseudo_labels import Autoencoder, Stage, pseudo_labels
from projects.g_simclr.schedules import warm_restarts

Arm = Literal["reference", "balanced", "strict", "random", "oracle"]


@dataclass(frozen=True)
class Probe:
    """Evaluation of frozen features."""

    measures: list[Literal["linear", "neighbour", "few"]] = field(default_factory=lambda: ["linear"])
    """Linear probes of P1, P2 and P3; the nearest neighbour by cosine on P3; two labels a class on P3."""
    epochs: PositiveInt = 100
    """At most, of the linear probe."""
    epochs_p1: PositiveInt | None = None
    """Of the probe of P1, where it differs."""
    lr: PositiveFloat = 1e-3
    """Adam's."""
    batch_size: PositiveInt = 64
    """Images a step."""
    patience: PositiveInt = 2
    """Epochs without a lower loss on held-out images."""


@dataclass(frozen=True)
class Recipe:
    """G-SimCLR and plain SimCLR on images; defaults are the paper's on CIFAR-10, its slips put right."""

    name: str = "cifar10"
    """Name of the recipe: its file's, and the run folder's."""
    data: str = "cifar10"
    """digits, or a folder under the data root."""
    image_size: PositiveInt | None = None
    """Resize images to this side."""
    encoder: Name = "cifar-resnet"
    """cifar-resnet and keras-resnet50 are the paper's."""
    blocks: PositiveInt = 4
    """Of cifar-resnet, in each group."""
    width: PositiveInt = 64
    """Channels of the first stage of resnet18 and resnet50."""
    cifar_stem: bool = True
    """3 x 3 stem without pooling, of resnet18 and resnet50."""
    head: list[PositiveInt] = field(default_factory=lambda: [256, 128, 50])
    """Widths of the projection head's layers."""
    temperature: PositiveFloat = 0.1
    """Of NT-Xent."""
    batches: Arm = "balanced"
    """How batches are composed: as published, spread evenly, without repeats, at random (SimCLR), spread by true labels (upper bound)."""
    batch_size: PositiveInt = 64
    """Images of a global batch, all processes together."""
    reshuffle_batches: bool = False
    """Let the published batches, fixed once, come in another order each epoch."""
    negatives: Literal["global", "local"] = "global"
    """From all processes, the rule then holding for the global batch, or each process's own."""
    clusters: PositiveInt = 64
    """K of k-means."""
    cluster_seed: NonNegativeInt = 0
    """Of k-means."""
    share_clusters: bool = True
    """One autoencoder and clustering, of seed 0, for all seeds."""
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    """The first stage."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Of the views."""
    augment_on: Literal["device", "workers"] = "device"
    """Where views are drawn: on the model's device, or by the loader's workers."""
    workers: NonNegativeInt = 0
    """Loader processes."""
    sync_batch_norm: bool = False
    """Batch statistics over all processes (GPUs only); the default is each process's own."""
    lr: PositiveFloat = 0.1
    """SGD's peak rate."""
    momentum: NonNegativeFloat = 0.0
    """SGD's."""
    schedule: Literal["restarts", "cosine"] = "restarts"
    """Cosine with warm restarts, or once to zero."""
    period: PositiveInt | None = None
    """Steps of the first period (not given: 1000), or of the whole cosine (not given: all steps)."""
    training: Training = field(default_factory=lambda: Training(epochs=15))
    """Length and arithmetic."""
    protocol: Literal["validation", "reference"] = "validation"
    """What early stopping looks at: a tenth of the training images, held out, or the test images as published."""
    probe: Probe = field(default_factory=Probe)
    """Of evaluate.py."""
    arms: list[Arm] = field(default_factory=lambda: ["balanced", "random"])
    """Compositions of batches that evaluate.py compares, everything else equal."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of a row."""
    weights: str | None = None
    """A checkpoint of the reference (.h5) that evaluate.py probes in place of training; give the one arm that it belongs to."""
    seed: NonNegativeInt = 0
    """Of one run."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    cache: str | None = None
    """Folder for decoded copies; default: the user's cache folder."""
    out: str = "runs/g_simclr"
    """Where run folders go."""

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: expected at least 2, one image has no negatives")
        if self.autoencoder.kernel % 2 == 0:
            raise ValueError(f"autoencoder.kernel={self.autoencoder.kernel}: expected an odd number")
        if len(self.head) < 2:
            raise ValueError(f"head={self.head}: expected two layers at least")
        if self.weights is not None and len(self.arms) != 1:
            raise ValueError(f"weights={self.weights}: expected the one arm that they belong to, found arms={self.arms}")
        if "strict" in (self.batches, *self.arms) and self.clusters < self.batch_size:
            raise ValueError(
                f"strict batches of {self.batch_size} need at least {self.batch_size} clusters; got {self.clusters}. Use --clusters 4x the batch or --batches balanced"
            )


def one_run(recipe: Recipe, seed: int, arm: Arm) -> Recipe:
    """The recipe of one training: the row that it belongs to, and how it is probed, do not matter to it."""
    return replace(recipe, seed=seed, batches=arm, seeds=[seed], arms=[arm], probe=Probe(), weights=None)


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.out) / recipe.name / recipe.batches / f"seed-{recipe.seed}"


def build(recipe: Recipe, channels: int) -> GSimCLR:
    return GSimCLR(
        recipe.encoder, channels, recipe.blocks, recipe.width, recipe.cifar_stem, [int(w) for w in recipe.head], float(recipe.temperature)
    )


def cluster_numbers(recipe: Recipe, splits: Splits) -> Tensor:
    """(N,) numbers that guide the batches: pseudo-labels, true labels (oracle), or zeros (random)."""
    if recipe.batches == "random":
        return torch.zeros(len(splits.train), dtype=torch.int64)
    if recipe.batches == "oracle":
        return splits.train.known()
    seed = 0 if recipe.share_clusters else recipe.seed
    stage = Stage(recipe.data, recipe.image_size, recipe.protocol, recipe.autoencoder, seed)
    folder = Path(recipe.out) / recipe.name / "autoencoder" / f"seed-{seed}"
    return pseudo_labels(stage, recipe.clusters, recipe.cluster_seed, splits, folder)


def check(recipe: Recipe, images: Images) -> None:
    """Refuse what cannot work before anything is trained.

    Raises:
        ValueError: fewer images than a batch or than clusters, a batch that the processes cannot share, colour steps without colours.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if len(images) < recipe.batch_size:
        raise ValueError(f"{images.name}: {len(images)} images cannot fill one batch of {recipe.batch_size}; use a smaller batch_size")
    if recipe.batch_size % processes:
        raise ValueError(f"batch_size={recipe.batch_size} on {processes} processes: expected a multiple of the number of processes")
    if recipe.batches not in ("random", "oracle") and recipe.clusters > len(images):
        raise ValueError(
            f"k-means: expected at most as many clusters as images, found {recipe.clusters} for {len(images)}; use fewer --clusters"
        )
    if recipe.augmentation.colours and images.pixels.shape[1] != 3:
        raise ValueError(
            f"{images.name}: {images.pixels.shape[1]} channel(s), colour jitter and colour drop need 3; set augmentation.jitter and augmentation.grey to 0"
        )


class TwoViews:
    """Collates images (bytes) into two random views; workers run it, seeded by the engine."""

    def __init__(self, images: Images, how: Augmentation) -> None:
        self.full, self.how = images.full, how

    def __call__(self, pixels: list[Tensor]) -> tuple[Tensor, Tensor]:
        images = torch.stack(pixels).float() / self.full
        return augment(images, self.how), augment(images, self.how)


def batch_sampler(recipe: Recipe, numbers: Tensor) -> GuidedBatches:
    """The sampler for as many processes as run; the rule holds where negatives come from."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    mode = "balanced" if recipe.batches == "oracle" else recipe.batches
    together = recipe.negatives == "global"
    size = recipe.batch_size if together else recipe.batch_size // processes
    return GuidedBatches(numbers, size, mode, seed=recipe.seed, processes=processes if together else 1, reshuffle=recipe.reshuffle_batches)


def rate(recipe: Recipe, step: int, total: int) -> float:
    """Learning rate at a 0-based step of `total`."""
    peak = float(recipe.lr)
    if recipe.schedule == "restarts":
        return warm_restarts(step, first=recipe.period or 1000, peak=peak)
    return cosine(step, total=recipe.period or total, peak=peak)


def synchronised(model: nn.Module, wanted: bool) -> nn.Module:
    if not wanted or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return model
    if not torch.cuda.is_available():
        raise ValueError("sync_batch_norm: expected GPUs, found none; torch's synchronised batch norm does not run on a CPU, switch it off")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def main(recipe: Recipe, splits: Splits | None = None) -> GSimCLR:
    """Train, go on, or return the finished model; leaves config.json and model.safetensors in the run folder.

    Args:
        splits: the loaded data set, where the caller has it already.
    """
    recipe = one_run(recipe, recipe.seed, recipe.batches)
    splits = splits or load(recipe.data, data_root=recipe.data_root, image_size=recipe.image_size, cache=recipe.cache)
    images = splits.train
    check(recipe, images)
    numbers = cluster_numbers(recipe, splits)
    sampler = batch_sampler(recipe, numbers)
    in_workers = recipe.augment_on == "workers"
    loader = DataLoader(
        images,
        batch_sampler=sampler,
        collate_fn=TwoViews(images, recipe.augmentation) if in_workers else torch.stack,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
    )
    seed_everything(recipe.seed)
    model = synchronised(build(recipe, images.pixels.shape[1]), recipe.sync_batch_norm)
    plan = budget(loader, recipe.training)

    def loss(net: nn.Module, batch: Any) -> dict[str, Tensor]:
        if in_workers:
            first, second = batch
        else:
            pixels = images.floats(batch)
            first, second = augment(pixels, recipe.augmentation), augment(pixels, recipe.augmentation)
        out = net(first, second, gather="full" if recipe.negatives == "global" else None)
        return {"loss": out.loss, "alignment": out.alignment}

    def composition(_net: nn.Module, epochs: int) -> dict[str, float]:
        terms = account(sampler.compose(epochs - 1), numbers, images.labels).terms()
        if recipe.batches == "random":
            del terms["same_cluster_pairs"]  # nothing was clustered
        return terms

    learning = [p for p in model.parameters() if p.requires_grad]
    fitted = fit(
        model,
        loss,
        loader,
        torch.optim.SGD(learning, lr=float(recipe.lr), momentum=float(recipe.momentum)),
        recipe.training,
        run_folder(recipe),
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lambda step: rate(recipe, step, plan.total),
        evaluate=composition,
        evaluate_every=1,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        save_model(fitted.model, run_folder(recipe), recipe=to_yaml(recipe))
    return fitted.model


if __name__ == "__main__":
    main(parse(Recipe))
