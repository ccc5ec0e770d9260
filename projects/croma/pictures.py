"""Pictures: what the model reconstructs, the class of each patch, how similar each patch is to a chosen one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.contrastive import unit
from common.patch import patchify, unpatchify
from projects.croma.bands import OPTICAL
from projects.croma.data import Task
from projects.croma.model import CROMA, Encoders
from projects.croma.scenes import CLASSES

RED_GREEN_BLUE = [OPTICAL.index(band) for band in ("B4", "B3", "B2")]


def _plots(rows: int, columns: int, width: float = 1.7) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, width * rows + 0.4), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def colour(image: Tensor, like: Tensor | None = None) -> np.ndarray:
    """Natural colour (H, W, 3) in 0..1 of an image (12 or 14, H, W) uint8 or in [0, 1], stretched to the 2nd and 98th percentile of `like`, or its own."""
    rgb = image[RED_GREEN_BLUE].float().permute(1, 2, 0).numpy()
    low, high = np.percentile(rgb if like is None else like[RED_GREEN_BLUE].float().numpy(), [2, 98])
    return np.clip((rgb - low) / max(high - low, 1e-6), 0, 1)


@torch.no_grad()
def reconstruction(model: CROMA, images: Tensor, path: Path, seed: int = 0) -> Path:
    """A row an image (B, 14, H, W) uint8: optical image, what the encoder sees of it, reconstruction; the same for radar VV.

    Predictions are of normalised patches: mean and deviation of the true patch are put back.
    """
    model.eval()
    found = model(images, generator=torch.Generator().manual_seed(seed))
    size = model.encoders.patch_size
    grid = (images.shape[-2] // size[0], images.shape[-1] // size[1])
    true = patchify(images.float() / 255, size, "first")
    mean, std = true.mean(-1, keepdim=True), (true.var(-1, keepdim=True) + 1e-6).sqrt()
    predicted = found.prediction * std + mean
    split = model.encoders.channels["optical"] * size[0] * size[1]
    rows = {"optical": (slice(0, split), found.optical_mask), "radar": (slice(split, None), found.radar_mask)}
    figure, axes = _plots(len(images), 6)
    for column, (sensor, (part, mask)) in enumerate(rows.items()):
        hidden = mask.hidden[..., None]
        versions = {
            sensor: true[..., part],
            "visible": torch.where(hidden, 0.5, true[..., part]),
            "reconstructed": torch.where(hidden, predicted[..., part], true[..., part]),
        }
        for number, (title, patches) in enumerate(versions.items()):
            whole = unpatchify(patches, grid, size, "first")
            axes[0, 3 * column + number].set_title(title, fontsize=8)
            for row, image in enumerate(whole):
                axis = axes[row, 3 * column + number]
                axis.imshow(colour(image, images[row].float() / 255) if sensor == "optical" else image[0], cmap="gray", vmin=0, vmax=1)
    return _save(figure, path)


@torch.no_grad()
def class_map(encoders: Encoders, head: nn.Module, task: Task, path: Path, scenes: int = 3) -> Path:
    """Optical image, radar, true map and the probe's class of each patch, at a side the model was not trained on."""
    images = torch.from_numpy(task.test.images[:scenes])
    tokens = encoders(**task.sensor_images(images)).tokens("joint")
    side = images.shape[-1] // encoders.patch_size[1]
    guess = head(tokens).argmax(-1).view(len(images), -1, side)
    figure, axes = _plots(len(images), 4, 2.2)
    for row, image in enumerate(images):
        axes[row, 0].imshow(colour(image))
        axes[row, 1].imshow(image[len(OPTICAL)], cmap="gray")
        for column, classes in ((2, task.test.labels[row]), (3, guess[row])):
            shown = axes[row, column].imshow(classes, cmap="tab10", vmin=-0.5, vmax=9.5, interpolation="nearest")
    for axis, title in zip(axes[0], ("optical", "radar VV", "map", "patch probe, joint"), strict=True):
        axis.set_title(title, fontsize=8)
    bar = figure.colorbar(shown, ax=axes, ticks=range(len(CLASSES)), shrink=0.7)
    bar.ax.set_yticklabels(CLASSES, fontsize=7)
    bar.ax.set_ylim(-0.5, len(CLASSES) - 0.5)
    return _save(figure, path)


@torch.no_grad()
def similarity(encoders: Encoders, task: Task, path: Path, scenes: int = 3) -> Path:
    """Cosine of one patch's joint encoding (red cross) with those of all patches."""
    images = torch.from_numpy(task.test.images[:scenes])
    tokens = unit(encoders(**task.sensor_images(images)).tokens("joint"))
    side, patch = images.shape[-1] // encoders.patch_size[1], encoders.patch_size[0]
    chosen = tokens.shape[1] // 2 + side // 2
    cosine = (tokens @ tokens[:, chosen, :, None])[..., 0].view(len(images), -1, side)
    figure, axes = _plots(len(images), 2, 2.4)
    for row, image in enumerate(images):
        axes[row, 0].imshow(colour(image))
        shown = axes[row, 1].imshow(cosine[row], cmap="viridis", interpolation="nearest")
        down, across = divmod(chosen, side)
        axes[row, 0].plot((across + 0.5) * patch, (down + 0.5) * patch, "rx")
        axes[row, 1].plot(across, down, "rx")
        figure.colorbar(shown, ax=axes[row, 1], shrink=0.8)
    return _save(figure, path)


@torch.no_grad()
def segmentation(model: nn.Module, task: Task, path: Path, scenes: int = 3) -> Path:
    """Optical image, true map and the segmentation head's map at full resolution."""
    model.eval()
    images = torch.from_numpy(np.array(task.test.images[:scenes]))
    guess = model.cpu()(**task.sensor_images(images)).argmax(1)
    figure, axes = _plots(len(images), 3, 2.2)
    for row, image in enumerate(images):
        axes[row, 0].imshow(colour(image))
        for column, classes in ((1, task.test.labels[row]), (2, guess[row])):
            axes[row, column].imshow(classes, cmap="tab10", vmin=-0.5, vmax=9.5, interpolation="nearest")
    for axis, title in zip(axes[0], ("optical", "map", "segmentation head"), strict=True):
        axis.set_title(title, fontsize=8)
    return _save(figure, path)
