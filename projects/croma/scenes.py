"""Generated scenes, the embedded default: a map of six land covers seen by a cloudy optical sensor and a speckled radar.

Forest and grass, bare and built-up ground look alike in the optical bands and differ in radar; grass, crop and bare ground the reverse. Clouds and
illumination touch the optical image alone, speckle the radar alone; the map is shared. So agreement between the sensors carries the map, which the
contrastive loss rewards, and the full label needs both. A scene depends on its number and side alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CLASSES = ("water", "forest", "grass", "crop", "bare", "built-up")
CROP = 3
# optical digital numbers in the order of `bands.OPTICAL`, one row a class
SPECTRA = np.array(
    [
        [700, 620, 520, 380, 360, 330, 330, 300, 290, 250, 160, 120],
        [320, 350, 560, 420, 900, 2300, 2800, 2900, 3000, 2900, 1500, 700],
        [340, 390, 640, 480, 1000, 2400, 2900, 3000, 3100, 3000, 1750, 850],
        [420, 520, 820, 780, 1300, 2700, 3300, 3500, 3600, 3500, 2100, 1200],
        [900, 1100, 1450, 1800, 2050, 2200, 2350, 2450, 2550, 2600, 3000, 2600],
        [1000, 1200, 1400, 1600, 1750, 1950, 2050, 2200, 2250, 2300, 2500, 2250],
    ],
    dtype=np.float32,
)
DECIBELS = np.array([[-20, -27], [-9, -14], [-13, -20], [-12.5, -19], [-13.5, -21], [-4, -12]], dtype=np.float32)
WIDTHS = (6.0, 6.0, 8.0, 7.0) + 12 * (1.0,)  # of the smooth fields: two warps, moisture, cloud, gain of each optical band


class Scenes(NamedTuple):
    """What both sensors saw, and the map."""

    optical: Tensor  # (B, 12, S, S) float32, digital numbers
    radar: Tensor  # (B, 2, S, S) float32, dB
    classes: Tensor  # (B, S, S) int64

    def present(self, least: float = 0.05) -> Tensor:
        """(B, 6) int64: 1 where a class covers more than `least` of the scene."""
        share = torch.nn.functional.one_hot(self.classes.flatten(1), len(CLASSES)).float().mean(1)
        return (share > least).long()

    def majority(self, patch: int = 8) -> Tensor:
        """(B, S/P, S/P) int64, most frequent class of each patch, the lower number where two are as frequent."""
        votes = torch.nn.functional.one_hot(self.classes, len(CLASSES)).permute(0, 3, 1, 2).float()
        return torch.nn.functional.avg_pool2d(votes, patch).argmax(1)


@lru_cache(maxsize=8)
def _filters(side: int) -> np.ndarray:
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    return np.stack([np.exp(-2 * np.pi**2 * width**2 * (fy**2 + fx**2)) for width in WIDTHS])


def _fields(rng: np.random.Generator, side: int) -> np.ndarray:
    """(len(WIDTHS), S, S) smooth fields of mean 0 and deviation 1."""
    noise = rng.standard_normal((len(WIDTHS), side, side))
    smooth = np.fft.irfft2(np.fft.rfft2(noise) * _filters(side), s=(side, side))
    smooth -= smooth.mean((1, 2), keepdims=True)
    return (smooth / smooth.std((1, 2), keepdims=True)).astype(np.float32)


def scene(number: int, side: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Optical (12, S, S), radar (2, S, S) and classes (S, S) of one scene."""
    rng = np.random.default_rng([number, side])
    weights = rng.dirichlet([0.5] * len(CLASSES))
    sites = rng.integers(4, 9) * max(1, round(side**2 / 48**2))
    where, kind = rng.random((sites, 2)) * side, rng.choice(len(CLASSES), sites, p=weights)
    (warp_y, warp_x, moisture, cloud), gain = np.split(_fields(rng, side), [4])
    y, x = np.mgrid[:side, :side].astype(np.float32)
    warped_y, warped_x = y + 3 * warp_y, x + 3 * warp_x
    distance = (warped_y[..., None] - where[:, 0]) ** 2 + (warped_x[..., None] - where[:, 1]) ** 2
    classes = kind[distance.argmin(-1)]

    optical = SPECTRA[classes].transpose(2, 0, 1).copy()
    optical[[7, 8, 9]] *= 1 + 0.10 * moisture
    optical[[10, 11]] *= 1 - 0.15 * moisture
    angle = rng.random() * 2 * np.pi
    rows = 1 + 0.15 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / 5)
    optical *= np.where(classes == CROP, rows, 1)
    optical *= np.exp(0.12 * rng.standard_normal())
    haze = 120 * rng.standard_normal(12)
    haze[0] *= 1.5
    optical += haze[:, None, None]
    optical *= 1 + 0.06 * gain
    optical += 60 * rng.standard_normal(optical.shape, dtype=np.float32)
    opacity = np.clip((cloud - rng.uniform(0.4, 3)) / 0.5, 0, 1)
    optical += opacity * ((5500 + 400 * rng.standard_normal(12))[:, None, None] - optical)

    radar = DECIBELS[classes].transpose(2, 0, 1) + 0.8 * moisture * (classes != 0)
    angle = rng.random() * 2 * np.pi
    ramp = (x - side / 2) * np.cos(angle) + (y - side / 2) * np.sin(angle)
    radar = radar + 0.75 * ramp / np.abs(ramp).max() + rng.standard_normal((2, 1, 1))
    radar += 10 * np.log10(rng.gamma(4, 1 / 4, radar.shape))
    return np.clip(optical, 0, 10000).astype(np.float32), radar.astype(np.float32), classes


def scenes(first: int, count: int, side: int = 48) -> Scenes:
    """Scenes number `first` to `first + count - 1`."""
    if side % 8 or side < 8:
        raise ValueError(f"side={side}: expected a multiple of 8 pixels")
    parts = [scene(number, side) for number in range(first, first + count)]
    optical, radar, classes = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    return Scenes(torch.from_numpy(optical), torch.from_numpy(radar), torch.from_numpy(classes))
