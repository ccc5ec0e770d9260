"""Bands and their scale: names and order, the +-2 sigma normalisation, and what is refused or repaired before an image reaches the model.

Optical: 12 Sentinel-2 bands, B1 to B12 with B8A and without B10, digital numbers (reflectance x 10,000). Radar: Sentinel-1 VV and VH in dB.
A normalised image holds the optical bands first, then the radar bands, as uint8 (byte / 255 is what the model sees) or float in [0, 1].
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.checkpoint import write_text

OPTICAL = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12")
RADAR = ("VV", "VH")
EUROSAT = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B9", "B10", "B11", "B12", "B8A")
"""Order of the files as distributed: B8A last."""
LARGEST_MISSING = 0.1
"""Share of a channel that may be missing and is then filled."""
KEPT = "statistics.json"
"""File of a run folder with the constants of its images."""


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel over a training split."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __add__(self, other: Statistics) -> Statistics:  # type: ignore[override]
        """Channels of both, ours first."""
        return Statistics(self.mean + other.mean, self.std + other.std)

    def of(self, names: Sequence[str], wanted: Sequence[str]) -> Statistics:
        """The channels `wanted`, in that order, of statistics over `names`."""
        at = [tuple(names).index(name) for name in wanted]
        return Statistics(tuple(self.mean[i] for i in at), tuple(self.std[i] for i in at))


# published with SSL4EO-S12, s1 (dB) and s2a (digital numbers)
SSL4EO_RADAR = Statistics((-12.548, -20.192), (5.257, 5.912))
SSL4EO_OPTICAL = Statistics(
    (752.40, 884.30, 1144.16, 1297.47, 1624.91, 2194.64, 2422.21, 2517.76, 2581.65, 2645.52, 2368.51, 1805.07),
    (1108.03, 1155.15, 1183.63, 1368.11, 1370.27, 1355.55, 1416.51, 1474.79, 1439.31, 1582.28, 1455.52, 1343.48),
)
# SatMAE's over fMoW-Sentinel (L1C), its thirteenth band B10 left out
FMOW_OPTICAL = Statistics(
    (1370.19, 1184.38, 1120.77, 1136.26, 1263.74, 1645.40, 1846.87, 1762.60, 1972.62, 582.73, 1732.16, 1247.92),
    (633.15, 650.28, 712.13, 965.23, 948.98, 1108.07, 1258.36, 1233.15, 1364.39, 472.38, 1310.37, 1087.60),
)


def keep_statistics(folder: Path, by_sensor: Mapping[str, Statistics]) -> None:
    """Write the constants of "optical" and "radar" that a model was trained with beside its weights."""
    write_text(folder / KEPT, json.dumps({sensor: found._asdict() for sensor, found in by_sensor.items()}, indent=1) + "\n")


def kept_statistics(folder: Path) -> dict[str, Statistics]:
    """What `keep_statistics` wrote; empty where there is nothing (an official checkpoint is a file)."""
    path = folder / KEPT
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {sensor: Statistics(tuple(each["mean"]), tuple(each["std"])) for sensor, each in found.items()}


def band_name(name: str) -> str:
    """`b02`, `B02` or `B2` -> `B2`; `vv` -> `VV`."""
    upper = name.strip().upper()
    return f"B{upper[1:].lstrip('0')}" if upper.startswith("B") else upper


def band_order(names: Sequence[str], wanted: Sequence[str] = OPTICAL) -> list[int]:
    """Positions of the `wanted` bands among `names` (any spelling, any order, more than wanted).

    Raises:
        ValueError: a band is missing or named twice.
    """
    found = [band_name(name) for name in names]
    missing = [band for band in wanted if band not in found]
    twice = sorted({band for band in found if found.count(band) > 1})
    if missing or twice:
        raise ValueError(f"bands: expected {list(wanted)}, got {found}: missing {missing or 'none'}, twice {twice or 'none'}")
    return [found.index(band) for band in wanted]


def check_radar(radar: Tensor, names: Sequence[str] | None) -> Tensor:
    """Radar (..., C, H, W) in dB as VV, VH.

    Args:
        names: of the channels, which no number tells apart; reordered if need be.
    Raises:
        ValueError: names are missing, or values that look linear.
    """
    if names is None:
        raise ValueError(
            f"radar: expected channel names (VV and VH cannot be told apart by their values), got none for {radar.shape[-3]} channels"
        )
    radar = radar.index_select(-3, torch.tensor(band_order(names, RADAR)))
    present = radar[radar.isfinite()]
    if present.numel() and (float(present.median()) > 0 or not bool((present < 0).any())):
        raise ValueError(
            f"radar: values look linear (median {float(present.median()):.3g}, {'some' if bool((present < 0).any()) else 'no'} negative dB); "
            "expected dB: 10 log10 of linear power"
        )
    return radar


def check_optical(optical: Tensor, names: Sequence[str] | None = None, *, baseline_offset: bool = False) -> Tensor:
    """Optical (..., C, H, W) digital numbers as the 12 bands in order, float32.

    Args:
        names: of the channels; None = they are the 12 in order already.
        baseline_offset: the product has processing baseline 04.00 or later, whose numbers are 1000 too high: taken off.
    Raises:
        ValueError: another number of bands without names, a band missing, values already scaled to [0, 1].
    """
    count = optical.shape[-3]
    if names is None and count != len(OPTICAL):
        raise ValueError(f"optical: expected 12 bands (B1..B12 without B10), got {count}; pass band names or drop B10")
    if names is not None:
        if len(names) != count:
            raise ValueError(f"optical: expected one name a band, got {len(names)} names for {count} bands")
        optical = optical.index_select(-3, torch.tensor(band_order(names)))
    optical = optical.float()
    present = optical[optical.isfinite()]
    if present.numel() and 0 < float(present.max()) < 2:
        raise ValueError(
            f"optical: expected digital numbers (reflectance x 10,000), got at most {float(present.max()):.3g}; multiply by 10,000 or pass normalised images"
        )
    return (optical - 1000).clamp(min=0) if baseline_offset else optical


def fill_missing(image: Tensor, what: str = "image") -> Tensor:
    """Replace NaN and infinite entries of image (C, H, W) by their channel's mean, with a warning that counts them.

    Raises:
        ValueError: more than 10 % of a channel is missing, or the whole image is 0 (no data).
    """
    missing = ~image.isfinite()
    if not missing.any():
        if not image.any():
            raise ValueError(f"{what}: expected an image, found zeros only (no data)")
        return image
    share = missing.float().mean((-2, -1))
    if float(share.max()) > LARGEST_MISSING:
        raise ValueError(
            f"{what}: channel {int(share.argmax())} lacks {100 * float(share.max()):.1f} % of its pixels; expected at most 10 %"
        )
    warnings.warn(f"{what}: {int(missing.sum())} missing values filled with their channel's mean", stacklevel=2)
    mean = torch.where(missing, 0, image).sum((-2, -1)) / (~missing).sum((-2, -1))
    return torch.where(missing, mean[:, None, None], image)


def statistics_of(images: Tensor) -> Statistics:
    """Mean and unbiased standard deviation of each channel of images (B, C, H, W).

    Raises:
        ValueError: a channel is constant, so that nothing can be scaled by its deviation.
    """
    wide = images.double().transpose(0, 1).flatten(1)
    std = wide.std(1)
    if bool((std == 0).any()):
        raise ValueError(
            f"statistics: std 0 in channel {int((std == 0).nonzero()[0])}; expected images that vary, use statistics of the training split"
        )
    return Statistics(tuple(wide.mean(1).tolist()), tuple(std.tolist()))


def normalise(images: Tensor, statistics: Statistics | None) -> Tensor:
    """(x - (mean - 2 std)) / (4 std), cut to [0, 1]; images (..., C, H, W), float32. A channel with std 0 becomes 0.5.

    Args:
        statistics: of the training split; None = those of these images, which fails on small or uniform batches: only on request.
    """
    given = statistics_of(images if images.ndim == 4 else images[None]) if statistics is None else statistics
    if len(given.mean) != images.shape[-3]:
        raise ValueError(f"statistics of {len(given.mean)} channels for images with {images.shape[-3]}")
    mean, std = (torch.tensor(part, dtype=torch.float32, device=images.device)[:, None, None] for part in given)
    low = mean - 2 * std
    scaled = (images - low) / (mean + 2 * std - low)
    return torch.where(std > 0, scaled, 0.5).clamp(0, 1)


def to_bytes(unit: Tensor) -> Tensor:
    """[0, 1] -> uint8, truncated as the release note does, not rounded."""
    return (unit * 255).clamp(0, 255).to(torch.uint8)


def check_normalised(images: Tensor) -> Tensor:
    """The images if they are uint8 or within [0, 1].

    Raises:
        ValueError: not finite, or out of range: digital numbers or dB that were not normalised.
    """
    if images.dtype == torch.uint8:
        return images
    low, high = (float(value) for value in images.aminmax())
    if not -1e-4 <= low <= high <= 1 + 1e-4:  # also false for NaN
        raise ValueError(
            f"input range [{low:.4g}, {high:.4g}]; CROMA expects [0, 1] after the +-2 sigma scaling (projects.croma.bands.normalise)"
        )
    return images
