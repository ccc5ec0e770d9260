"""GeoTIFFs through rasterio: bands at their own resolution, co-registered pairs, windows of scenes larger than memory, published layouts.

Everything comes back as float32 with NaN where the file has no data; `bands.py` names, checks and scales it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from projects.croma.bands import (
    OPTICAL,
    RADAR,
    Statistics,
    band_name,
    band_order,
    check_optical,
    check_radar,
    fill_missing,
    normalise,
    to_bytes,
)

LABELS_19 = (
    "Urban fabric",
    "Industrial or commercial units",
    "Arable land",
    "Permanent crops",
    "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub",
    "Beaches, dunes, sands",
    "Inland wetlands",
    "Coastal wetlands",
    "Inland waters",
    "Marine waters",
)
_MERGED = {  # CORINE classes that share one of the 19 labels under another name
    "Continuous urban fabric": 0,
    "Discontinuous urban fabric": 0,
    "Non-irrigated arable land": 2,
    "Permanently irrigated land": 2,
    "Rice fields": 2,
    "Vineyards": 3,
    "Fruit trees and berry plantations": 3,
    "Olive groves": 3,
    "Annual crops associated with permanent crops": 3,
    "Broad-leaved forest": 8,
    "Natural grassland": 11,
    "Sparsely vegetated areas": 11,
    "Moors and heathland": 12,
    "Sclerophyllous vegetation": 12,
    "Transitional woodland/shrub": 13,
    "Inland marshes": 15,
    "Peatbogs": 15,
    "Salt marshes": 16,
    "Salines": 16,
    "Water courses": 17,
    "Water bodies": 17,
    "Coastal lagoons": 18,
    "Estuaries": 18,
    "Sea and ocean": 18,
}
_DROPPED = (
    "Road and rail networks and associated land",
    "Port areas",
    "Airports",
    "Mineral extraction sites",
    "Dump sites",
    "Construction sites",
    "Green urban areas",
    "Sport and leisure facilities",
    "Bare rock",
    "Burnt areas",
    "Intertidal flats",
)


def rasterio() -> Any:
    try:
        import rasterio as module
    except ImportError as err:
        raise ImportError("CROMA's readers need rasterio: pip install -e '.[geo]'") from err
    return module


def labels_19(names: Sequence[str]) -> Tensor:
    """(19,) int64 of 0 and 1 from BigEarthNet's 43-class names; 11 of the 43 belong to none.

    Raises:
        ValueError: a name that is none of the 43.
    """
    out = torch.zeros(len(LABELS_19), dtype=torch.int64)
    for name in names:
        if name in _MERGED or name in LABELS_19:
            out[_MERGED[name] if name in _MERGED else LABELS_19.index(name)] = 1
        elif name not in _DROPPED:
            raise ValueError(f"BigEarthNet label {name!r}: expected one of the 43 CORINE classes of level 3")
    return out


# -- one image from a file a band -----------------------------------------------------------------------------------------


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"raster {path}: no such file; expected a GeoTIFF")
    try:
        return rasterio().open(path)
    except rasterio().errors.RasterioIOError as err:
        raise ValueError(f"raster {path}: expected a GeoTIFF, found a file that cannot be read ({err})") from err


def _missing_to_nan(values: Any) -> np.ndarray:
    return np.ma.filled(values.astype(np.float32), np.nan)


def read_bands(files: Mapping[str, Path], side: int) -> tuple[Tensor, Any, tuple[float, ...]]:
    """Bands, a file each, as (C, side, side) in the order of `files`, bilinear from their own resolution; the CRS and the bounds.

    Raises:
        FileNotFoundError: a band's file is missing.
        ValueError: bands of different CRS or ground.
    """
    layers, crs, bounds = [], None, None
    for name, path in files.items():
        with _open(Path(path)) as source:
            if bounds is None:
                crs, bounds, first = source.crs, tuple(source.bounds), name
            _same_ground(f"band {name} of {path}", source.crs, tuple(source.bounds), f"band {first}", crs, bounds, abs(source.transform.a))
            values = source.read(1, out_shape=(side, side), masked=True, resampling=rasterio().enums.Resampling.bilinear)
            layers.append(_missing_to_nan(values))
    return torch.from_numpy(np.stack(layers)), crs, bounds  # type: ignore[return-value]


def _same_ground(
    what: str, crs: Any, bounds: Sequence[float], other: str, other_crs: Any, other_bounds: Sequence[float], pixel: float
) -> None:
    if crs != other_crs:
        raise ValueError(f"{what}: CRS {crs}, but {other} has {other_crs}; reproject one of them")
    if max(abs(a - b) for a, b in zip(bounds, other_bounds, strict=True)) > pixel / 2:
        raise ValueError(
            f"{what}: covers {tuple(round(b, 1) for b in bounds)}, but {other} covers {tuple(round(b, 1) for b in other_bounds)}"
        )


class PairFiles(NamedTuple):
    """Files of one radar-optical pair by band, and what is known of the place."""

    optical: dict[str, Path]
    radar: dict[str, Path]
    name: str
    labels: tuple[str, ...] = ()


def read_pair(pair: PairFiles, side: int, statistics: Statistics, *, baseline_offset: bool = False) -> Tensor:
    """One normalised pair, (14, side, side) uint8, optical bands first.

    Raises:
        FileNotFoundError, ValueError: see `read_bands` and `bands.py`; a pair whose sensors cover different ground.
    """
    optical, crs, bounds = read_bands(pair.optical, side)
    radar, radar_crs, radar_bounds = read_bands(pair.radar, side)
    _same_ground(f"radar of {pair.name}", radar_crs, radar_bounds, "its optical image", crs, bounds, (bounds[2] - bounds[0]) / side)
    optical = fill_missing(check_optical(optical, list(pair.optical), baseline_offset=baseline_offset), f"optical image of {pair.name}")
    radar = fill_missing(check_radar(radar, list(pair.radar)), f"radar image of {pair.name}")
    return to_bytes(normalise(torch.cat([optical, radar]), statistics))


# -- published layouts ----------------------------------------------------------------------------------------------------


def bigearthnet_pairs(root: str | Path) -> list[PairFiles]:
    """Pairs of BigEarthNet v1: below `root` one folder a patch, `<patch>/<patch>_B01.tif` and `<patch>/<patch>_VV.tif`, radar pointing to its partner.

    Raises:
        FileNotFoundError: no radar patch below the root.
        ValueError: radar patches whose optical partner is missing (the first five are named).
    """
    root = Path(root)
    every = {path.name.removesuffix("_labels_metadata.json"): path.parent for path in root.rglob("*_labels_metadata.json")}
    radars = {name: folder for name, folder in every.items() if (folder / f"{name}_VV.tif").is_file()}
    if not radars:
        raise FileNotFoundError(
            f"BigEarthNet {root}: expected BigEarthNet-S1-v1.0/<patch>/<patch>_VV.tif and BigEarthNet-S2-v1.0/<patch>/<patch>_B01.tif below, found no radar patch"
        )
    pairs, alone = [], []
    for name, folder in sorted(radars.items()):
        about = json.loads((folder / f"{name}_labels_metadata.json").read_text())
        partner = about["corresponding_s2_patch"]
        if partner not in every or partner in radars:
            alone.append(f"{name} -> {partner}")
            continue
        optical = {band: every[partner] / f"{partner}_{_padded(band)}.tif" for band in OPTICAL}
        radar = {band: folder / f"{name}_{band}.tif" for band in RADAR}
        pairs.append(PairFiles(optical, radar, partner, tuple(about["labels"])))
    if alone:
        raise ValueError(f"BigEarthNet {root}: {len(alone)} of {len(radars)} radar patches have no optical partner: {alone[:5]}")
    return pairs


def _padded(band: str) -> str:
    return band if band == "B8A" else f"B{int(band[1:]):02d}"


def ssl4eo_pairs(root: str | Path, optical: str = "s2a") -> list[PairFiles]:
    """Pairs of SSL4EO-S12: `<root>/<product>/<7-digit place>/<acquisition>/<band>.tif`; the seasons of a place are paired by the rank of their date.

    Args:
        optical: product, "s2a" (L2A, 12 bands) or "s2c" (L1C, 13 bands; B10 is left out).
    Raises:
        FileNotFoundError: a product's folder is missing.
        ValueError: places in one product only, or with different numbers of seasons (counts and the first five are named).
    """
    root = Path(root)
    found: dict[str, dict[str, Path]] = {}
    for product in ("s1", optical):
        folder = root / product
        if not folder.is_dir():
            raise FileNotFoundError(f"SSL4EO-S12: expected {folder}/<7-digit place>/<acquisition>/<band>.tif, found no such folder")
        found[product] = {path.name: path for path in sorted(folder.iterdir()) if re.fullmatch(r"\d{7}", path.name)}
    apart = sorted(found["s1"].keys() ^ found[optical].keys())
    if apart:
        raise ValueError(
            f"SSL4EO-S12 {root}: {len(found['s1'])} places in s1, {len(found[optical])} in {optical}, {len(apart)} in one only: {apart[:5]}"
        )
    pairs, uneven = [], []
    for place, folder in found["s1"].items():
        radars = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: _acquired(path.name))
        opticals = sorted((path for path in found[optical][place].iterdir() if path.is_dir()), key=lambda path: _acquired(path.name))
        if len(radars) != len(opticals):
            uneven.append(f"{place} ({len(radars)} and {len(opticals)})")
            continue
        for r, o in zip(radars, opticals, strict=True):
            pairs.append(PairFiles({b: o / f"{b}.tif" for b in OPTICAL}, {b: r / f"{b}.tif" for b in RADAR}, f"{place}/{o.name}"))
    if uneven:
        raise ValueError(f"SSL4EO-S12 {root}: {len(uneven)} places whose seasons do not pair up (radar and optical): {uneven[:5]}")
    return pairs


def _acquired(name: str) -> str:
    """Date and time of an acquisition: the first 15 characters of an optical name, the first such group of a radar one."""
    found = re.search(r"\d{8}T\d{6}", name)
    if found is None:
        raise ValueError(f"acquisition {name!r}: expected a date as YYYYMMDDThhmmss in its name")
    return found[0]


def read_image(path: str | Path, names: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
    """A whole multi-band GeoTIFF, (C, H, W) float32 with NaN for no data, and its band names (given, or the file's descriptions).

    Raises:
        ValueError: neither the file nor the caller names the bands, or another number of names.
    """
    with _open(Path(path)) as source:
        return torch.from_numpy(_missing_to_nan(source.read(masked=True))), _names(source, path, names)


def _names(source: Any, path: str | Path, names: Sequence[str] | None) -> list[str]:
    found = list(names) if names is not None else [text for text in source.descriptions if text]
    if len(found) != source.count:
        raise ValueError(
            f"raster {path}: expected a name for each of its {source.count} bands, got {len(found)} ({'given' if names is not None else 'described in the file'}); "
            "pass band names"
        )
    return [band_name(name) for name in found]


def _check_overview(sensor: str, source: Any, names: Sequence[str]) -> None:
    """What `bands.py` refuses, on every n-th pixel of a raster."""
    shape = (source.count, min(source.height, 256), min(source.width, 256))
    values = torch.from_numpy(_missing_to_nan(source.read(out_shape=shape, masked=True)))
    if not values.isfinite().any():
        raise ValueError(f"{sensor}: {source.name} holds no data")
    check_optical(values, names) if sensor == "optical" else check_radar(values, names)


# -- scenes of any size ---------------------------------------------------------------------------------------------------


@dataclass
class ScenePair:
    """Co-registered rasters of one or both sensors, read in windows.

    Args:
        optical, radar: paths; statistics, names: of each given sensor, by "optical" and "radar".
        baseline_offset: see `bands.check_optical`.
    Raises:
        ValueError: different CRS, pixel grid or size (the message gives both), bands missing, radar that looks linear, optical already scaled.
    """

    optical: Path | None
    radar: Path | None
    statistics: Mapping[str, Statistics]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    baseline_offset: bool = False

    def __post_init__(self) -> None:
        if self.optical is None and self.radar is None:
            raise ValueError("expected an optical or a radar raster, or both, got neither")
        self._sources: dict[str, Any] = {}
        self._at: dict[str, list[int]] = {}
        for sensor, path in (("optical", self.optical), ("radar", self.radar)):
            if path is None:
                continue
            source = _open(Path(path))
            self._sources[sensor] = source
            names = _names(source, path, self.names.get(sensor))
            self._at[sensor] = band_order(names, OPTICAL if sensor == "optical" else RADAR)
            _check_overview(sensor, source, names)
        first, *others = self._sources.items()
        self.crs, self.transform, self.height, self.width = first[1].crs, first[1].transform, first[1].height, first[1].width
        for sensor, source in others:
            if source.crs != self.crs:
                raise ValueError(f"{sensor}: CRS {source.crs}, but {first[0]} has {self.crs}; reproject one to the other's grid")
            if (source.height, source.width) != (self.height, self.width) or not source.transform.almost_equals(
                self.transform, 1e-3 * abs(self.transform.a)
            ):
                raise ValueError(
                    f"{sensor}: {source.width} x {source.height} pixels from {tuple(source.transform)[:6]}, but {first[0]} has "
                    f"{self.width} x {self.height} from {tuple(self.transform)[:6]}; resample one to the other's grid"
                )

    def read(self, row: int, column: int, height: int, width: int) -> tuple[dict[str, Tensor], Tensor]:
        """A window, which may reach over the edge: normalised images (C, height, width) by sensor, float32, and where there is data (height, width).

        Pixels without data take their channel's mean: the middle of the scale.
        """
        window = rasterio().windows.Window(column, row, width, height)
        images, valid = {}, torch.ones(height, width, dtype=torch.bool)
        for sensor, source in self._sources.items():
            over = row < 0 or column < 0 or row + height > self.height or column + width > self.width
            values = torch.from_numpy(_missing_to_nan(source.read(window=window, boundless=over, masked=True)))
            inside = torch.zeros(height, width, dtype=torch.bool)
            inside[max(0, -row) : self.height - row, max(0, -column) : self.width - column] = True
            values = torch.where(inside & values.isfinite(), values, torch.nan)
            values = values[self._at[sensor]]
            if sensor == "optical":  # zero in all bands is what products write where they saw nothing
                values = torch.where(values.nan_to_num(1).any(0), values, torch.nan)
            if sensor == "optical" and self.baseline_offset:
                values = (values - 1000).clamp(min=0)
            scaled = normalise(values, self.statistics[sensor])
            valid &= values.isfinite().all(0)
            images[sensor] = scaled.nan_to_num(0.5)
        return images, valid

    def windows(self, tile: int, margin: int = 0) -> Iterator[tuple[int, int, int, int]]:
        """(row, column, height, width) of tiles of at most `tile` that cover the scene, without their margins."""
        step = tile - 2 * margin
        for row in range(0, self.height, step):
            for column in range(0, self.width, step):
                yield row, column, min(step, self.height - row), min(step, self.width - column)

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
