"""Pseudo-labels: train the denoising autoencoder, cluster its latent vectors, keep the cluster numbers in a file that knows its data.

Done once, before contrastive training, on the training images alone; cluster numbers are never refreshed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoint import save_model, write_text, written_aside
from common.engine import Training, fit, seed_everything
from common.probes import kmeans
from common.recipe import to_yaml
from projects.g_simclr.autoencoder import DenoisingAutoencoder
from projects.g_simclr.data import Images, Splits
from projects.g_simclr.stopping import fit_until_flat, processes


@dataclass(frozen=True)
class Autoencoder:
    """The denoising autoencoder and its training; defaults are CIFAR-10's (ImageNet subset: five levels, kernel 5, lr 1e-4, patience 5)."""

    widths: list[PositiveInt] = field(default_factory=lambda: [32, 64, 128])
    """Channels of the levels."""
    kernel: PositiveInt = 3
    """Side of the convolutions, odd."""
    noise: NonNegativeFloat = 0.01
    """Deviation of the noise added in training."""
    flat: bool = False
    """Cluster the flattened latent in place of its mean over space."""
    lr: PositiveFloat = 1e-3
    """Adam's learning rate."""
    batch_size: PositiveInt = 64
    """Images of a process and step; the incomplete last batch is dropped."""
    training: Training = field(default_factory=lambda: Training(epochs=100))
    """At most this long."""
    patience: NonNegativeInt = 2
    """Epochs without a lower validation loss before training ends and the best weights return; 0: train to the end, no validation."""


@dataclass(frozen=True)
class Stage:
    """What the autoencoder's run depends on; its run folder keeps it."""

    data: str
    image_size: int | None
    protocol: str
    autoencoder: Autoencoder
    seed: int


def train_autoencoder(stage: Stage, splits: Splits, folder: Path) -> DenoisingAutoencoder:
    """The trained autoencoder in eval mode; goes on, or returns at once, where the folder holds one."""
    how = stage.autoencoder
    seed_everything(stage.seed)
    model = DenoisingAutoencoder(splits.train.pixels.shape[1], how.widths, how.kernel, how.noise, how.flat)
    model.check(splits.train.pixels[:1])
    train, held_out = splits.train, splits.test
    if how.patience and stage.protocol != "reference":
        train, held_out = splits.held_out()
    loader = DataLoader(train, batch_size=how.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=float(how.lr), eps=1e-7)

    def loss(net: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        return {"loss": net(train.floats(pixels)).loss}

    @torch.no_grad()
    def validation(net: nn.Module) -> dict[str, float]:
        device = next(net.parameters()).device
        total = sum(float(net(part.to(device)).loss) * len(part) for part in held_out.batches())
        return {"validation_loss": total / len(held_out)}

    if how.patience:
        fit_until_flat(
            model, loss, loader, optimizer, how.training, folder, validation, patience=how.patience, recipe=stage, seed=stage.seed
        )
    else:
        fit(model, loss, loader, optimizer, how.training, folder, recipe=stage, seed=stage.seed)
    if processes().is_main_process:
        save_model(model, folder, recipe=to_yaml(stage))
    return model.eval()


@torch.no_grad()
def embed(model: DenoisingAutoencoder, images: Images) -> Tensor:
    """What k-means sees, (N, D): no noise, moving statistics.

    Raises:
        ValueError: vectors that are not finite or all alike: the autoencoder diverged.
    """
    device = next(model.parameters()).device
    vectors = torch.cat([model.eval().embed(part.to(device)) for part in images.batches()])
    finite = bool(vectors.isfinite().all())
    if not finite or (len(vectors) > 1 and float(vectors.std(0).max()) == 0):
        loss = float(model(next(images.batches()).to(device)).loss)
        found = "the same one for all images" if finite else "NaN or infinity"
        raise ValueError(
            f"autoencoder embeddings: expected finite ones that differ, found {found}; the autoencoder diverged (loss {loss:.4g}), lower autoencoder.lr"
        )
    return vectors


def cluster(vectors: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Cluster numbers (N,): k-means++ with 10 restarts, scikit-learn on a CPU, the same settings on a GPU.

    Raises:
        ValueError: more clusters than images.
    """
    if clusters > len(vectors):
        raise ValueError(f"k-means: expected at most as many clusters as images, found {clusters} for {len(vectors)}; use fewer --clusters")
    return kmeans(vectors, clusters, restarts=10, seed=seed).labels.cpu()


def identity(images: Images, clusters: int, seed: int, autoencoder: str) -> dict[str, str]:
    """What a file of cluster numbers belongs to."""
    return {
        "images": str(len(images)),
        "order": images.order,
        "clusters": str(clusters),
        "seed": str(seed),
        "autoencoder": autoencoder,
    }


def save(path: Path, labels: Tensor, about: dict[str, str]) -> None:
    """Write cluster numbers with what they belong to, and their sizes beside them as JSON."""
    with written_aside(path) as aside:
        save_file({"labels": labels.to(torch.int32)}, aside, metadata=about)
    sizes = labels.bincount(minlength=int(about["clusters"])).tolist()
    write_text(path.with_suffix(".json"), json.dumps({**about, "sizes": sizes}, indent=1) + "\n")


def read(path: Path, about: dict[str, str]) -> Tensor:
    """Cluster numbers (N,) of a file that belongs to `about`; keys that `about` lacks are not compared.

    Raises:
        ValueError: a file of other images, in another order, of another autoencoder or clustering; both sides are named.
    """
    with safe_open(path, framework="pt") as file:
        found, labels = file.metadata() or {}, file.get_tensor("labels").long()
    words = {"images": "images", "clusters": "clusters", "seed": "seed", "order": "order of images", "autoencoder": "autoencoder"}
    for key in about:
        if found.get(key) != about[key]:
            here, there = (value if len(value) < 16 else f"{value[:12]}..." for value in (about[key], found.get(key, "nothing")))
            raise ValueError(
                f"pseudo-labels {path}: expected {words[key]} {here}, found {there}; they are of another data set or autoencoder, remove the file"
            )
    if len(labels) != int(found["images"]):
        raise ValueError(f"pseudo-labels {path}: expected {found['images']} numbers, found {len(labels)}; remove the file")
    return labels


def pseudo_labels(stage: Stage, clusters: int, cluster_seed: int, splits: Splits, folder: Path) -> Tensor:
    """Cluster numbers (N,) of the training images: from `folder`, or made there now. Clustering runs on one process; all read the same file."""
    state = processes()
    weights = folder / "model.safetensors"
    path = folder / f"clusters-{clusters}-seed-{cluster_seed}.safetensors"
    model = train_autoencoder(stage, splits, folder)
    state.wait_for_everyone()
    about = identity(splits.train, clusters, cluster_seed, hashlib.sha256(weights.read_bytes()).hexdigest())
    if state.is_main_process and not path.is_file():
        labels = cluster(embed(model.to(state.device), splits.train), clusters, cluster_seed)
        sizes = labels.bincount(minlength=clusters)
        print(f"pseudo-labels: {clusters} clusters of {int(sizes.min())} to {int(sizes.max())} images", flush=True)
        save(path, labels, about)
    state.wait_for_everyone()
    return read(path, about)
