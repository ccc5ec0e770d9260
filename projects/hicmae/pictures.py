"""Pictures of a pre-trained model: masks and reconstructions, similarity of both modalities at each level, attention from sound to picture."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from common.masking import gather, scatter
from common.patch import patchify, unpatchify
from projects.hicmae.model import MEAN, STD, HiCMAE, level_features, similarity

STYLE = {"font.size": 8, "axes.titlesize": 9, "savefig.dpi": 120}


def _pixels(video: Tensor) -> Tensor:
    """(B, 3, T, H, W) back in 0..1."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (MEAN, STD))
    return (video * std + mean).clamp(0, 1)


def rebuilt_video(model: HiCMAE, video: Tensor, prediction: Tensor, index: Tensor) -> Tensor:
    """Pixels (B, 3, T, H, W) with the hidden cubes as predicted: differences summed up, each cube's own mean and deviation put back."""
    cubes = patchify(_pixels(video), model.patch)
    own = gather(cubes, index).unflatten(-1, (-1, 3))
    shown = prediction.unflatten(-1, (-1, 3))
    if model.target == "difference":
        first, *later = shown.unflatten(2, (model.patch[0], -1)).unbind(2)
        shown = torch.cat([first, *(first + part for part in later)], 2)
    if model.target != "raw_pixels":
        shown = shown * own.std(-2, keepdim=True) + own.mean(-2, keepdim=True)
    return unpatchify(scatter(cubes, index, shown.flatten(-2)), model.grid, model.patch).clamp(0, 1)


def rebuilt_audio(model: HiCMAE, audio: Tensor, prediction: Tensor, index: Tensor) -> Tensor:
    """Spectrogram (B, 1, time, mel) with the hidden patches as predicted, each patch's own mean and deviation put back."""
    patches = patchify(audio, model.audio_patch)
    own = gather(patches, index)
    if model.target != "raw_pixels":
        prediction = prediction * own.std(-1, keepdim=True) + own.mean(-1, keepdim=True)
    return unpatchify(scatter(patches, index, prediction), model.audio_grid, model.audio_patch)


@torch.no_grad()
def reconstructions(path: Path, model: HiCMAE, video: Tensor | None, audio: Tensor | None) -> None:
    """Of each modality that the model has: input, what is visible, what was rebuilt; one row a clip."""
    out = model(video, audio, generator=torch.Generator().manual_seed(0))
    columns: list[tuple[str, Tensor]] = []
    if out.video_mask is not None:
        index, pixels = out.video_mask.masked, _pixels(video)
        seen = scatter(patchify(pixels, model.patch), index, torch.full_like(out.video_prediction, 0.5))
        columns += [("frame", pixels), ("visible", unpatchify(seen, model.grid, model.patch))]
        columns += [("rebuilt", rebuilt_video(model, video, out.video_prediction, index))]
    if out.audio_mask is not None:
        index, low, high = out.audio_mask.masked, float(audio.min()), float(audio.max())
        heard = scatter(patchify(audio, model.audio_patch), index, torch.full_like(out.audio_prediction, low))
        columns += [("spectrogram", audio), ("visible", unpatchify(heard, model.audio_grid, model.audio_patch))]
        columns += [("rebuilt", rebuilt_audio(model, audio, out.audio_prediction, index))]
    count = len(columns[0][1])
    with rc_context(STYLE):
        figure = Figure(figsize=(1.5 * len(columns), 1.5 * count), layout="constrained")
        for row, line in enumerate(figure.subplots(count, len(columns), squeeze=False)):
            for axis, (title, shown) in zip(line, columns, strict=True):
                if shown.ndim == 5:
                    axis.imshow(shown[row, :, shown.shape[2] // 2].permute(1, 2, 0))
                else:
                    axis.imshow(shown[row, 0].T, origin="lower", aspect="auto", vmin=low, vmax=high)
                axis.set(xticks=[], yticks=[])
                if row == 0:
                    axis.set_title(title)
        figure.savefig(path)


@torch.no_grad()
def retrieval(path: Path, model: HiCMAE, video: Tensor, audio: Tensor) -> None:
    """Cosine between every clip's picture and every clip's sound, at each level."""
    seen = level_features(model.encoder, video, None, model.levels)
    heard = level_features(model.encoder_audio, audio, None, model.levels)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.8 * len(model.levels), 2.8), layout="constrained")
        for axis, level in zip(figure.subplots(1, len(model.levels), squeeze=False)[0], model.levels, strict=True):
            axis.imshow(similarity(seen[level], heard[level], 1.0))
            axis.set(title=f"level {level}: video (rows) by audio", xticks=[], yticks=[])
        figure.savefig(path)


@torch.no_grad()
def attention_maps(model: HiCMAE, video: Tensor, audio: Tensor) -> Tensor:
    """(B, rows, columns): how much the sound reads from each place of the picture in the last fusion layer, mean over heads, sound tokens and time."""
    v = level_features(model.encoder, video, None, ())[len(model.encoder.stack.blocks)]
    a = level_features(model.encoder_audio, audio, None, ())[len(model.encoder_audio.stack.blocks)]
    fusion = model.encoder_fusion
    *pairs, (_, last) = zip(fusion.blocks, fusion.blocks_audio, strict=True)
    for block, block_audio in pairs:
        v, a = block(v, a), block_audio(a, v)
    cross = last.cross_attn
    query, key = cross.q(last.cross_norm1(a)), cross.kv(last.cross_norm2(v)).chunk(2, -1)[0]
    q, k = (part.unflatten(-1, (cross.num_heads, -1)).transpose(1, 2) for part in (query, key))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))
    return weights.unflatten(1, model.grid).mean(1)


@torch.no_grad()
def attention(path: Path, model: HiCMAE, video: Tensor, audio: Tensor) -> None:
    """Where in the picture the sound's tokens look, over the middle frame."""
    maps = attention_maps(model, video, audio)
    middle = video.shape[2] // 2
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * len(video), 2.2), layout="constrained")
        for i, axis in enumerate(figure.subplots(1, len(video), squeeze=False)[0]):
            axis.imshow(_pixels(video[i : i + 1])[0, :, middle].permute(1, 2, 0), extent=(0, 1, 0, 1))
            axis.imshow(maps[i], extent=(0, 1, 0, 1), alpha=0.5, cmap="magma")
            axis.set(xticks=[], yticks=[])
        figure.savefig(path)
