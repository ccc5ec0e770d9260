"""Encode a scene larger than memory, tile by tile, into a georeferenced GeoTIFF of features or classes.

`python -m projects.croma.infer --weights WEIGHTS --optical scene_s2.tif --radar scene_s1.tif --out features.tif`. Features: one pixel a patch, D bands,
float32. Classes (a fine-tuned `Segmenter`): one pixel a pixel, uint8, 255 = no data. Both keep the CRS; the pixel of features is 8 input pixels wide.
Tiles overlap by a margin that is thrown away, so that no pixel is at the edge of what the encoder saw unless the scene ends there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from common.checkpoint import written_aside
from common.recipe import parse
from projects.croma.bands import FMOW_OPTICAL, SSL4EO_OPTICAL, SSL4EO_RADAR, Statistics, kept_statistics
from projects.croma.finetune import Segmenter, load_downstream
from projects.croma.metrics import VOID
from projects.croma.model import Encoders, Sensors
from projects.croma.rasters import ScenePair, rasterio
from projects.croma.weights import load_encoders

CONSTANTS = {"ssl4eo": SSL4EO_OPTICAL, "fmow": FMOW_OPTICAL}


@dataclass(frozen=True)
class Recipe:
    """A scene, a model, an output file."""

    weights: str = "runs/croma/base/seed-0"
    """Official checkpoint, or a run folder (of fine-tuning for classes)."""
    out: str = "features.tif"
    """GeoTIFF to write."""
    optical: str | None = None
    """12-band (or more, with names) GeoTIFF of digital numbers."""
    radar: str | None = None
    """GeoTIFF of VV and VH in dB."""
    optical_names: list[str] | None = None
    """Its bands, where the file does not describe them."""
    radar_names: list[str] | None = None
    """Its bands, where the file does not describe them."""
    output: Literal["features", "classes"] = "features"
    """Tokens of an encoder, or the classes of a segmentation head."""
    sensors: Sensors = "joint"
    """Whose tokens (output: features)."""
    constants: Literal["kept", "ssl4eo", "fmow"] = "kept"
    """Normalisation: what the run folder keeps (an official checkpoint keeps none: ssl4eo), or published constants for the optical bands."""
    baseline_offset: bool = False
    """The optical product has processing baseline 04.00 or later."""
    tile: PositiveInt = 496
    """Side that the encoder sees, in pixels, a multiple of 8."""
    margin: NonNegativeInt = 56
    """Overlap thrown away on each side, a multiple of 8."""

    def __post_init__(self) -> None:
        if self.tile % 8 or self.margin % 8 or self.tile <= 2 * self.margin:
            raise ValueError(f"tile={self.tile}, margin={self.margin}: expected multiples of 8 and a tile of more than two margins")


@torch.no_grad()
def tile_features(model: Encoders, images: Mapping[str, Tensor], sensors: Sensors) -> Tensor:
    """(D, rows, columns) tokens of images (C, H, W) by sensor."""
    device = next(model.parameters()).device
    given = {name: image[None].to(device) for name, image in images.items()}
    tokens = model(**given, joint=sensors == "joint").tokens(sensors)[0].float().cpu()
    height, width = next(iter(images.values())).shape[-2:]
    return tokens.T.reshape(-1, height // model.patch_size[0], width // model.patch_size[1])


@torch.no_grad()
def tile_classes(model: Segmenter, images: Mapping[str, Tensor]) -> Tensor:
    """(1, H, W) uint8 classes."""
    device = next(model.parameters()).device
    return model(**{name: image[None].to(device) for name, image in images.items()}).argmax(1).to(torch.uint8).cpu()


def write_map(
    model: nn.Module, scene: ScenePair, out: str | Path, *, sensors: Sensors = "joint", tile: int = 496, margin: int = 56
) -> Path:
    """Run a scene through the model and write the GeoTIFF; memory is that of one tile. Tiles without data are not encoded.

    Args:
        model: `Encoders` (features) or `Segmenter` (classes).
        tile, margin: pixels; the scene is extended by its middle value where tiles reach over its edge.
    Returns:
        the file, written aside and renamed: an interrupted run leaves nothing.
    """
    model.eval()
    classes = isinstance(model, Segmenter)
    encoders = model.encoders if classes else model
    step = 1 if classes else encoders.patch_size[0]
    bands = 1 if classes else encoders.embed_dim
    io = rasterio()
    # a last row or column of patches may be only partly covered
    height, width = -(-scene.height // step), -(-scene.width // step)
    t = scene.transform
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": bands,
        "dtype": "uint8" if classes else "float32",
        "crs": scene.crs,
        "transform": type(t)(t.a * step, t.b * step, t.c, t.d * step, t.e * step, t.f),
        "nodata": VOID if classes else float("nan"),
        "compress": "deflate",
        "BIGTIFF": "IF_SAFER",
    }
    block = (tile - 2 * margin) // step
    if block % 16 == 0:  # what the format allows; each block is then written once, whatever the cache holds
        profile |= {"tiled": True, "blockxsize": block, "blockysize": block}
    with written_aside(Path(out)) as aside, io.open(aside, "w", **profile) as target:
        for row, column, high, wide in scene.windows(tile, margin):
            patch = encoders.patch_size[0]
            rows, columns = -(-high // patch) * patch + 2 * margin, -(-wide // patch) * patch + 2 * margin
            images, valid = scene.read(row - margin, column - margin, rows, columns)
            inner = slice(margin // step, (margin + high - 1) // step + 1), slice(margin // step, (margin + wide - 1) // step + 1)
            present = (valid if classes else torch.nn.functional.max_pool2d(valid[None].float(), patch)[0] > 0)[inner]
            values = torch.full((bands, *present.shape), VOID if classes else torch.nan, dtype=torch.uint8 if classes else torch.float32)
            if present.any():
                result = tile_classes(model, images) if classes else tile_features(encoders, images, sensors)
                values = torch.where(present, result[:, inner[0], inner[1]], values)
            window = io.windows.Window(column // step, row // step, values.shape[2], values.shape[1])
            target.write(np.ascontiguousarray(values.numpy()), window=window)
    return Path(out)


def main(recipe: Recipe) -> Path:
    """The file written.

    Raises:
        FileNotFoundError, ValueError: files that are missing or do not fit; sensors that the output needs and that were not given.
    """
    if recipe.output == "classes":
        model: nn.Module = load_downstream(recipe.weights)
        if not isinstance(model, Segmenter):
            raise ValueError(
                f"{recipe.weights}: classes need a segmentation head, found {type(model).__name__}; fine-tune on a task with maps"
            )
        sensors = model.sensors
    else:
        model, sensors = load_encoders(recipe.weights), recipe.sensors
    wanted = ("radar", "optical") if sensors == "joint" else (sensors,)
    paths = {"optical": recipe.optical, "radar": recipe.radar}
    if absent := [name for name in wanted if paths[name] is None]:
        there = [name for name, path in paths.items() if path is not None]
        raise ValueError(f"sensors={sensors} needs {list(wanted)}, got {there or 'no image'}; give --{absent[0]} or choose other sensors")
    names = {name: given for name, given in (("optical", recipe.optical_names), ("radar", recipe.radar_names)) if given is not None}
    statistics: dict[str, Statistics] = {"optical": SSL4EO_OPTICAL, "radar": SSL4EO_RADAR} | kept_statistics(Path(recipe.weights))
    if recipe.constants != "kept":
        statistics["optical"] = CONSTANTS[recipe.constants]
    files = {name: Path(path) if path is not None and name in wanted else None for name, path in paths.items()}
    scene = ScenePair(files["optical"], files["radar"], statistics, names, recipe.baseline_offset)
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return write_map(model.to(device), scene, recipe.out, sensors=sensors, tile=int(recipe.tile), margin=int(recipe.margin))
    finally:
        scene.close()


if __name__ == "__main__":
    print(main(parse(Recipe)))
