"""Two views of a batch, drawn in torch on whatever device the images are: flip, colour jitter, colour drop (Sec. 3 of the paper; its code).

The jitter's four steps are TensorFlow's (`tf.image.adjust_*`), which differ from torchvision's: brightness adds, contrast keeps each channel's
own mean, saturation scales HSV's S, and values are clipped only at the very end. Nothing is cropped or blurred.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)
Amount = Tensor | float  # one number, or one an image: (B, 1, 1, 1)


@dataclass(frozen=True)
class Augmentation:
    """How views are drawn; defaults are CIFAR-10's (ImageNet subset: 0.5, 0.8, 1.0, 0.2)."""

    flip: ClosedUnitInterval = 0.5
    """Probability of a left-right flip."""
    jitter: ClosedUnitInterval = 0.5
    """Probability of the colour jitter."""
    strength: NonNegativeFloat = 0.2
    """Of the jitter: brightness, contrast and saturation move by up to 0.8 of it, hue by 0.2 of it."""
    grey: ClosedUnitInterval = 0.5
    """Probability that colour is dropped."""
    per_batch: bool = False
    """One draw for all images of a batch and view, as the reference does, in place of one an image."""
    shift: NonNegativeInt = 0
    """Largest move in pixels, up or down and left or right; the border is black (digits)."""
    gain: ClosedUnitInterval = 0.0
    """Pixels are multiplied by 1 ± up to this (digits)."""
    noise: NonNegativeFloat = 0.0
    """Deviation of noise that is added (digits)."""

    @property
    def colours(self) -> bool:
        return self.jitter > 0 or self.grey > 0


def adjust_brightness(images: Tensor, change: Amount) -> Tensor:
    return images + change


def adjust_contrast(images: Tensor, factor: Amount) -> Tensor:
    """Around the mean of each channel of each image."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * factor + mean


def adjust_saturation(images: Tensor, factor: Amount) -> Tensor:
    """HSV saturation times `factor`, clipped to 0..1; hue and value stay. Pixels may lie outside 0..1; where max <= 0 the result is grey."""
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    saturation = torch.where(high > 0, (high - low) / high, 0.0)
    ratio = torch.where(saturation > 0, (saturation * factor).clamp(0, 1) / saturation, 0.0)
    return high - (high - images) * ratio


def adjust_hue(images: Tensor, turns: Amount) -> Tensor:
    """HSV hue plus `turns`; largest and smallest channel of a pixel keep their values, of whichever sign."""
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    width = high - low
    safe = torch.where(width > 0, width, 1.0)
    hue = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    turns = turns[:, 0] if isinstance(turns, Tensor) else turns
    hue = (hue + 6 * turns) % 6
    share = torch.stack([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], 1).clamp(0, 1)
    return low[:, None] + width[:, None] * share


def colour_jitter(images: Tensor, brightness: Amount, contrast: Amount, saturation: Amount, hue: Amount) -> Tensor:
    """The four steps in the reference's fixed order, then clipped to 0..1. images: (B, 3, H, W)."""
    images = adjust_contrast(adjust_brightness(images, brightness), contrast)
    return adjust_hue(adjust_saturation(images, saturation), hue).clamp(0, 1)


def drop_colour(images: Tensor) -> Tensor:
    """Luma in all three channels."""
    weights = images.new_tensor(GREY).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).expand_as(images)


def _shifted(images: Tensor, most: int, generator: torch.Generator | None, per_batch: bool) -> Tensor:
    batch, _, high, wide = images.shape
    moves = torch.randint(2 * most + 1, (2, 1 if per_batch else batch), device=images.device, generator=generator).expand(2, batch)
    padded = F.pad(images, (most,) * 4)
    rows = moves[0, :, None] + torch.arange(high, device=images.device)
    columns = moves[1, :, None] + torch.arange(wide, device=images.device)
    number = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(images: Tensor, how: Augmentation, generator: torch.Generator | None = None) -> Tensor:
    """One random view of each image, (B, C, H, W) floats in 0..1 -> the same shape.

    Args:
        generator: on the images' device; default: the global one.
    Raises:
        ValueError: pixels that are not floats in 0..1, or colour steps on images without colours.
    """
    if not images.is_floating_point() or (len(images) and float(images.max()) > 1 + 1e-4):
        found = f"max {float(images.max()):g}" if images.is_floating_point() else str(images.dtype)
        raise ValueError(f"images: expected [0,1] floats, found {found}; divide by 255")
    if how.colours and images.shape[1] != 3:
        raise ValueError(
            f"images of {images.shape[1]} channel(s): colour jitter and colour drop need 3; convert them to RGB or set augmentation.jitter and augmentation.grey to 0"
        )
    draws = 1 if how.per_batch else len(images)

    def coin(probability: float) -> Tensor:
        return torch.rand(draws, device=images.device, generator=generator).expand(len(images)) < probability

    def uniform(reach: float, middle: float) -> Tensor:
        spread = torch.rand(draws, device=images.device, generator=generator).expand(len(images)) * 2 - 1
        return (middle + reach * spread).view(-1, 1, 1, 1)

    if how.flip > 0:
        images = torch.where(coin(how.flip).view(-1, 1, 1, 1), images.flip(3), images)
    if how.jitter > 0:
        reach = 0.8 * how.strength
        amounts = torch.cat([uniform(reach, 0), uniform(reach, 1), uniform(reach, 1), uniform(0.2 * how.strength, 0)], 1)
        chosen = coin(how.jitter).nonzero().flatten()
        some = amounts[chosen, :, :, :, None].unbind(1)
        images = images.index_copy(0, chosen, colour_jitter(images[chosen], *some))
    if how.grey > 0:
        images = torch.where(coin(how.grey).view(-1, 1, 1, 1), drop_colour(images), images)
    if how.shift > 0:
        images = _shifted(images, how.shift, generator, how.per_batch)
    if how.gain > 0:
        images = images * uniform(how.gain, 1)
    if how.noise > 0:
        images = images + how.noise * torch.randn(images.shape, device=images.device, generator=generator)
    return images
