"""Pictures of a trained model: reconstructions under a mask, what visible tokens mimic, where the last block attends, and the variants' figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.masking import Mask, random_mask, scatter
from common.patch import patchify, unpatchify
from projects.mr_mae.data import Pictures, centre, normalised
from projects.mr_mae.model import MRMAE, PlainEncoder
from projects.mr_mae.pretrain import Recipe
from projects.mr_mae.teachers import seen_by


def _batch(data: Pictures, recipe: Recipe, count: int) -> tuple[Tensor, Tensor]:
    """uint8 and normalised evaluation views of the first pictures."""
    plain = torch.stack([centre(data.images[i], recipe.image_size) for i in range(count)])
    return plain, normalised(plain, recipe.statistics)


def _shown(patches: Tensor, model: MRMAE, recipe: Recipe) -> Tensor:
    """Patches (B, N, P) of normalised pixels -> images (B, H, W, 3) in 0..1."""
    images = unpatchify(patches, (model.grid, model.grid), (model.patch, model.patch))
    mean, std = (torch.tensor(part)[:, None, None] for part in recipe.statistics)
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


@torch.inference_mode()
def reconstructions(path: Path, model: MRMAE, data: Pictures, recipe: Recipe, *, count: int = 6) -> None:
    """Picture, what stays visible, the decoder's guess (hidden patches in their own mean and deviation where the targets were standardised)."""
    if model.decoder is None:
        return
    _, images = _batch(data, recipe, count)
    model = model.eval().cpu()
    mask = random_mask(count, model.count, model.mask_ratio, generator=torch.Generator().manual_seed(0))
    patches = patchify(images, (model.patch, model.patch))
    rows = mask.masked[..., None].expand(-1, -1, patches.shape[-1])
    truth = patches.gather(1, rows)
    guess = model.decoder(model.encoder(images, mask).tokens, mask)[..., : model.pixels]
    if model.norm_pix:
        guess = guess * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
    grey = _hidden(patches, mask)
    shown = [_shown(x, model, recipe) for x in (patches, grey, scatter(patches, mask.masked, guess))]
    figure = Figure(figsize=(1.5 * count, 4.8), layout="constrained")
    for line, (title, row) in enumerate(zip(("picture", "visible", "rebuilt"), shown, strict=True)):
        for column in range(count):
            axis = figure.add_subplot(3, count, line * count + column + 1, xticks=[], yticks=[])
            axis.imshow(row[column])
            if column == 0:
                axis.set_ylabel(title)
    figure.savefig(path, dpi=110)


def _hidden(patches: Tensor, mask: Mask) -> Tensor:
    return torch.where(mask.hidden[..., None], torch.zeros(()), patches)


@torch.inference_mode()
def mimicked(path: Path, model: MRMAE, data: Pictures, recipe: Recipe, *, count: int = 6) -> None:
    """What the first mimic head says of every patch of whole pictures: its three main directions over all patches shown, as colours."""
    if not len(model.mimics):
        return
    plain, images = _batch(data, recipe, max(count, min(64, len(data))))
    encoded = model.eval().cpu().encoder(images, taps=model.mimic_layers)
    features = model.mimics[0](encoded.tokens, encoded.taps).flatten(0, 1)
    directions = torch.linalg.svd(features - features.mean(0), full_matrices=False).Vh[:3]
    colours = (features - features.mean(0)) @ directions.T
    low, high = colours.quantile(0.02, 0), colours.quantile(0.98, 0)
    maps = ((colours - low) / (high - low)).clamp(0, 1).unflatten(0, (-1, model.grid, model.grid))
    _below(path, plain, maps, "mimic head", count)


def received_attention(model: MRMAE, images: Tensor) -> Tensor:
    """(B, N) share of the last transformer block's attention that each patch of whole images receives, mean over heads and asking patches."""
    encoder = model.encoder
    plain = isinstance(encoder, PlainEncoder)
    attention = encoder.vit.stack.blocks[-1].attn if plain else encoder.blocks3[-1].attn
    prefix = encoder.prefix if plain else int(encoder.cls_token is not None)
    _, x = seen_by(attention, lambda: encoder(images))
    query, key, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) * attention.scale).softmax(-1)[..., prefix:, prefix:]
    return (weights / weights.sum(-1, keepdim=True)).mean((1, 2))


@torch.inference_mode()
def attended(path: Path, model: MRMAE, data: Pictures, recipe: Recipe, *, count: int = 6) -> None:
    """`received_attention` of whole pictures, bright = much."""
    plain, images = _batch(data, recipe, count)
    received = received_attention(model.eval().cpu(), images)
    _below(path, plain, received.unflatten(1, (model.grid, model.grid)), "attention", count)


def _below(path: Path, plain: Tensor, maps: Tensor, title: str, count: int) -> None:
    """The first `count` pictures (B, 3, H, W) and under each its map (grid, grid[, 3])."""
    figure = Figure(figsize=(1.5 * count, 3.3), layout="constrained")
    for column in range(count):
        for line, image in enumerate((plain[column].permute(1, 2, 0), maps[column])):
            axis = figure.add_subplot(2, count, line * count + column + 1, xticks=[], yticks=[])
            axis.imshow(image, interpolation="nearest")
            if column == 0:
                axis.set_ylabel(("picture", title)[line])
    figure.savefig(path, dpi=110)


def orderings(path: Path, figures: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Each variant's figures, one dot a seed, a bar at the mean."""
    metrics = list(next(iter(figures.values())))
    figure = Figure(figsize=(3.6 * len(metrics), 2.8), layout="constrained")
    for number, metric in enumerate(metrics):
        axis = figure.add_subplot(1, len(metrics), number + 1, title=metric)
        shown = {name: found[metric] for name, found in figures.items() if metric in found}
        axis.barh(list(shown), [fmean(values) for values in shown.values()], color="#c6dbef")
        for name, values in shown.items():
            axis.plot(values, [name] * len(values), "o", color="#1f6fb4", markersize=4)
        axis.invert_yaxis()
    figure.savefig(path, dpi=110)
