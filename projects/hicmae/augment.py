"""Augmentation of fine-tuning clips (Sec. 5): RandAugment, crop, flip and erasing, one draw for all frames; mixup and CutMix of the video alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, AugmentOp
from torch import Tensor

OPERATIONS = tuple(_RAND_INCREASING_TRANSFORMS)
"""timm's fifteen whose strength grows with the magnitude; their pixels are the reference's."""
Box = tuple[int, int, int, int]


def operation(name: str, magnitude: float) -> Callable[[Image.Image], Image.Image]:
    """One of `OPERATIONS` at a magnitude of 0 to 10; its sign is drawn here, once, so that every frame gets the same."""
    op = AugmentOp(name, hparams={"interpolation": Image.Resampling.BICUBIC, "img_mean": (128, 128, 128)})
    arguments = op.level_fn(magnitude, op.hparams) if op.level_fn is not None else ()
    # bound as keywords the level would depend on each function's own parameter name
    return lambda image: op.aug_fn(image, *arguments, **op.kwargs)


def rand_augment(frames: Sequence[Image.Image], *, count: int = 4, magnitude: float = 7.0, spread: float = 0.5) -> list[Image.Image]:
    """`count` operations drawn with replacement, each applied with probability 0.5 at N(magnitude, spread) clipped to 0..10; Python's `random` draws."""
    frames = list(frames)
    for name in random.choices(OPERATIONS, k=count):
        if random.random() < 0.5:
            apply = operation(name, max(0.0, min(10.0, random.gauss(magnitude, spread))))
            frames = [apply(frame) for frame in frames]
    return frames


def draw_crop(height: int, width: int, area: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Box:
    """(top, left, height, width): area share uniform, aspect ratio log-uniform; after ten tries that do not fit, the largest middle box."""
    for _ in range(10):
        size = random.uniform(*area) * height * width
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(clip: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """Box of clip (C, T, H, W) brought to `size` (rows, columns): bilinear, half-pixel centres, no antialiasing."""
    top, left, height, width = box
    part = clip[:, :, top : top + height, left : left + width]
    return F.interpolate(part, size=size, mode="bilinear", align_corners=False)


def draw_erased(height: int, width: int, area: tuple[float, float] = (0.02, 1 / 3), ratio: tuple[float, float] = (0.3, 3.3)) -> Box | None:
    """(top, left, height, width) of the box to erase; None when ten draws do not fit."""
    for _ in range(10):
        size = random.uniform(*area) * height * width
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if h < height and w < width:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    return None


def erase(clip: Tensor, box: Box) -> Tensor:
    """Clip (C, T, H, W) with N(0, 1) noise in the box, drawn anew for every frame."""
    top, left, height, width = box
    clip = clip.clone()
    clip[:, :, top : top + height, left : left + width] = torch.randn(*clip.shape[:2], height, width)
    return clip


def training_view(frames: Sequence[Image.Image], size: int, to_tensor: Callable[[Sequence[Image.Image]], Tensor]) -> Tensor:
    """A fine-tuning clip (3, T, size, size) from its frames: all of the above in order; erasing with probability 0.25."""
    clip = to_tensor(rand_augment([frame.resize((size, size), Image.Resampling.BILINEAR) for frame in frames]))
    clip = resized_crop(clip, draw_crop(size, size), (size, size))
    if random.random() < 0.5:
        clip = clip.flip(-1)
    if random.random() < 0.25 and (box := draw_erased(size, size)):
        clip = erase(clip, box)
    return clip


# -- mixing


def smooth_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B, classes): smoothing / classes everywhere, 1 - smoothing more at the label."""
    return torch.full((len(labels), classes), smoothing / classes, device=labels.device).scatter_add_(
        1, labels[:, None], torch.full((len(labels), 1), 1 - smoothing, device=labels.device)
    )


def mix(video: Tensor, labels: Tensor, classes: int, share: float, box: Box | None = None, smoothing: float = 0.1) -> tuple[Tensor, Tensor]:
    """A batch mixed with its reverse: video (B, 3, T, H, W) and soft labels (B, classes).

    Args:
        share: of a clip itself. box: (top, bottom, left, right) that the partner fills (CutMix), which then sets the share; None = mixup.
    """
    partner = video.flip(0)
    if box is None:
        mixed = video * share + partner * (1 - share)
    else:
        top, bottom, left, right = box
        mixed = video.clone()
        mixed[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (video.shape[-2] * video.shape[-1])
    soft = smooth_labels(labels, classes, smoothing)
    return mixed, soft * share + soft.flip(0) * (1 - share)


def draw_mix(height: int, width: int, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0) -> tuple[float, Box | None]:
    """Share and box for `mix`: mixup or CutMix by an even chance, its share from Beta(alpha, alpha); an alpha of 0 leaves that one out."""
    if cutmix_alpha > 0 and (mixup_alpha == 0 or random.random() < 0.5):
        share = random.betavariate(cutmix_alpha, cutmix_alpha)
        side = math.sqrt(1 - share)
        y, x, h, w = random.randrange(height), random.randrange(width), int(height * side) // 2, int(width * side) // 2
        return share, (max(y - h, 0), min(y + h, height), max(x - w, 0), min(x + w, width))
    return random.betavariate(mixup_alpha, mixup_alpha), None


def mixing(classes: int, smoothing: float = 0.1, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0) -> Callable[[list[Any]], Any]:
    """A collate function (video, audio, label, number of the clip) -> batch with mixed video and soft labels; the sound is left alone.

    Raises:
        ValueError: at the batch, if it is odd (a clip would be mixed with itself).
    """
    return partial(_mixed_batch, classes, smoothing, mixup_alpha, cutmix_alpha)


def _mixed_batch(classes: int, smoothing: float, mixup_alpha: float, cutmix_alpha: float, items: list[Any]) -> Any:
    video, audio, labels, numbers = torch.utils.data.default_collate(items)
    if mixup_alpha == cutmix_alpha == 0:
        return video, audio, smooth_labels(labels, classes, smoothing), numbers
    if len(labels) % 2:
        raise ValueError(f"batch of {len(labels)} clips: mixup needs an even one; change batch_size")
    share, box = draw_mix(*video.shape[-2:], mixup_alpha, cutmix_alpha)
    video, soft = mix(video, labels, classes, share, box, smoothing)
    return video, audio, soft, numbers
