"""Data sets by name: pre-training images with their augmentation, and labelled tasks; real ones under a data root, generated scenes without.

Images are uint8 (N, C, H, W), normalised, optical bands before radar; a NumPy array, memory-mapped where it is large. `prepare` turns a published
layout into such an array once, so that training reads crops of bytes and not GeoTIFFs.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from common.checkpoint import written_aside
from common.data import checksum, require
from common.data import root as data_root_of
from projects.croma import rasters
from projects.croma.bands import (
    EUROSAT,
    OPTICAL,
    RADAR,
    SSL4EO_OPTICAL,
    SSL4EO_RADAR,
    Statistics,
    check_optical,
    fill_missing,
    normalise,
    statistics_of,
    to_bytes,
)
from projects.croma.metrics import VOID
from projects.croma.scenes import CLASSES, Scenes, scenes

PAIR_STATISTICS = SSL4EO_OPTICAL + SSL4EO_RADAR
PretrainingData = Literal["scenes", "pairs", "ssl4eo", "bigearthnet"]
TaskName = Literal["scenes", "scene-maps", "eurosat", "bigearthnet", "folder"]


class Split(NamedTuple):
    """Images (N, C, H, W) uint8 and labels: (N,) int64, (N, L) of 0/1, or (N, H, W) int64 with 255 = void."""

    images: np.ndarray
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A labelled data set, `train`, `val` and `test`; without a validation split of its own `val` is `test`."""

    name: str
    kind: Literal["single", "multi", "segmentation"]
    channels: tuple[str, ...]
    """Which of "optical" and "radar" the images hold, in this order."""
    classes: int
    train: Split
    val: Split
    test: Split
    split: str
    sha256: str
    statistics: Statistics | None = None
    """Constants that scaled the images, in the order of the channels; None = not told."""

    def sensor_images(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) by sensor."""
        if self.channels == ("optical", "radar"):
            return {"optical": images[:, : len(OPTICAL)], "radar": images[:, len(OPTICAL) :]}
        return {self.channels[0]: images}

    def sensor_statistics(self) -> dict[str, Statistics]:
        """Constants by sensor; empty where they were not told."""
        if self.statistics is None:
            return {}
        return by_sensor(self.statistics) if self.channels == ("optical", "radar") else {self.channels[0]: self.statistics}


def by_sensor(statistics: Statistics) -> dict[str, Statistics]:
    """Constants of 14 channels, optical first, apart."""
    every = OPTICAL + RADAR
    return {"optical": statistics.of(every, OPTICAL), "radar": statistics.of(every, RADAR)}


# -- pre-training ---------------------------------------------------------------------------------------------------------


class Crops(Dataset[Tensor]):
    """Random crops of paired images, the same for both sensors: (14, size, size) uint8.

    A square of uniformly drawn side (in pixels, cut to the image) at a uniform place, bilinear with antialias to `size`, flips with
    probability 1/2 each, a random number of quarter turns.

    Args:
        images: arrays (N, 14, H, W), one after another; each may have its own H and W.
        crop: smallest and largest side (Sec. 4: 60 to 180 of 264), at most the whole image.
    """

    def __init__(self, images: Sequence[np.ndarray], size: int, crop: tuple[int, int], *, augment: bool = True) -> None:
        self.images, self.size, self.crop, self.augment = list(images), size, crop, augment
        self.ends = np.cumsum([len(part) for part in self.images])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Tensor:
        part = int(np.searchsorted(self.ends, index, side="right"))
        source = self.images[part]
        image = source[index - (self.ends[part - 1] if part else 0)]
        height, width = image.shape[-2:]
        side = min(int(torch.randint(self.crop[0], self.crop[1] + 1, ())), height, width)
        top, left = int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))
        out = torch.from_numpy(np.array(image[:, top : top + side, left : left + side]))
        if out.shape[-2:] != (self.size, self.size):
            resized = F.interpolate(out[None].float(), size=(self.size, self.size), mode="bilinear", antialias=True)[0]
            out = resized.round_().clamp_(0, 255).to(torch.uint8)
        return turned(out) if self.augment else out


def turned(image: Tensor) -> Tensor:
    """A random flip along each axis and a random number of quarter turns of image (..., S, S)."""
    down, across, quarter = torch.rand(()) < 0.5, torch.rand(()) < 0.5, int(torch.randint(4, ()))
    image = image.flip(-2) if down else image
    image = image.flip(-1) if across else image
    return torch.rot90(image, quarter, (-2, -1)) if quarter else image


def mixing(alpha: float) -> Callable[[list[Tensor]], Tensor]:
    """Collate function: stack, and with `alpha` > 0 mix the batch with itself, x <- l x + (1 - l) x[perm], one l ~ Beta(alpha, alpha) a batch.

    Both sensors share l and the permutation, so a mixed pair stays a pair. Gives uint8, or float in [0, 1] when mixed.
    """

    def collate(samples: list[Tensor]) -> Tensor:
        batch = torch.stack(samples)
        if alpha == 0:
            return batch
        share = float(np.random.beta(alpha, alpha))
        batch = batch.float() / 255
        return share * batch + (1 - share) * batch[torch.randperm(len(batch))]

    return collate


def pretraining_images(
    name: PretrainingData, *, data_root: str | None = None, count: int = 2000, side: int = 48, seed: int = 0, repeats: int = 64
) -> list[np.ndarray]:
    """Arrays (N, 14, H, W) uint8 to pre-train on.

    Args:
        name: "scenes" = `count` generated scenes of `side` pixels; "pairs" = six real BigEarthNet pairs, each `repeats` times, beside such scenes;
            "ssl4eo", "bigearthnet" = what `prepare` wrote (with split lists: the training split).
        seed: offset of the scenes' numbers; those of tasks are others (from 10 million on).
    """
    if name in ("ssl4eo", "bigearthnet"):
        folder = require(
            data_root_of(data_root) / f"{name}-prepared",
            f"{name}, prepared",
            f"run python -m projects.croma.prepare --layout {name} --source <folder as published> --out <data root>/{name}-prepared",
        )
        place = folder / "images.npy"
        place = require(place if place.is_file() else folder / "train" / "images.npy", f"{name}, prepared", "run `prepare` again")
        images = np.load(place, mmap_mode="r")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 14:
            raise ValueError(f"{place}: expected uint8 (N, 14, H, W) as `prepare` writes it, got {images.dtype} {images.shape}")
        return [images]
    generated = pool(seed * 100_000, count, side)[0]
    if name == "scenes":
        return [generated]
    pairs = np.stack([rasters.read_pair(pair, 120, PAIR_STATISTICS).numpy() for pair in six_pairs(data_root)])
    return [np.concatenate([pairs] * repeats), generated]


def pretraining_statistics(name: PretrainingData, side: int = 48) -> Statistics:
    """Constants that scale the images of `pretraining_images`; of "pairs" those of the real ones."""
    return scene_statistics(side) if name == "scenes" else PAIR_STATISTICS


@lru_cache(maxsize=4)
def scene_statistics(side: int) -> Statistics:
    """Constants of the generated scenes, from 500 of them that nothing else uses."""
    some = scenes(20_000_000, 500, min(side, 48))
    return statistics_of(torch.cat([some.optical, some.radar], 1))


@lru_cache(maxsize=4)
def pool(first: int, count: int, side: int) -> tuple[np.ndarray, Scenes]:
    """Generated scenes as normalised bytes (count, 14, side, side), and the scenes themselves; kept, since all runs of a seed use them."""
    found = scenes(first, count, side)
    return to_bytes(normalise(torch.cat([found.optical, found.radar], 1), scene_statistics(side))).numpy(), found


def six_pairs(data_root: str | None) -> list[rasters.PairFiles]:
    """The six example pairs of BigEarthNet: `<data root>/sentinel/bigearthnet`, unpacked beside the user's cache if they are archives."""
    folder = _below(data_root, "bigearthnet")
    archives = sorted(folder.glob("BigEarthNet-S?-Example.tar.bz2"))
    if not archives:
        return rasters.bigearthnet_pairs(folder)
    target = Path.home() / ".cache" / "contramask" / f"bigearthnet-example-{checksum(archives)[:12]}"
    if not target.is_dir():
        with written_aside(target) as aside:
            for archive in archives:
                with tarfile.open(archive) as packed:
                    packed.extractall(aside, filter="data")
    return rasters.bigearthnet_pairs(target)


def _below(data_root: str | None, name: str) -> Path:
    """`<data root>/<name>`, or `<data root>/sentinel/<name>`."""
    root = data_root_of(data_root)
    for place in (root / name, root / "sentinel" / name):
        if place.is_dir():
            return place
    return require(root / name, name, f"put it there, or into {root / 'sentinel' / name}; projects/croma/README.md says from where")


# -- tasks ----------------------------------------------------------------------------------------------------------------

TASK_SCENES = 10_000_000


def load_task(
    name: TaskName, *, data_root: str | None = None, train: int = 500, test: int = 200, side: int = 48, share: float = 1.0
) -> Task:
    """A labelled task.

    Args:
        name: "scenes" = generated, classes present (multi-label); "scene-maps" = the same scenes with their maps; "eurosat" = 13-band EuroSAT tiles,
            `<data root>/[sentinel/]eurosat_ms/<class>/*.tif` with `split.csv`; "bigearthnet" = what `prepare` wrote, 19 labels;
            "folder" = `<data root>/<train|val|test>/{images,labels}.npy` with task.json (name, kind, channels, classes; statistics: means and
            deviations of the channels, where `infer` is to know them).
        train, test, side: of the generated scenes.
        share: of the training split, every 1/share-th sample (the papers' 10 % protocols).
    Raises:
        FileNotFoundError: data that is not there; the message says where it goes.
        ValueError: labels outside the classes, images of other shapes.
    """
    if name in ("scenes", "scene-maps"):
        return _scene_task(name, train, test, side)
    task = _eurosat(_below(data_root, "eurosat_ms")) if name == "eurosat" else _folder(_prepared(name, data_root))
    every = max(1, round(1 / share))
    return replace(task, train=Split(task.train.images[::every], task.train.labels[::every])) if every > 1 else task


def _scene_task(name: str, train: int, test: int, side: int) -> Task:
    splits = []
    for first, count in ((0, train), (train, test)):
        images, found = pool(TASK_SCENES + first, count, side)
        splits.append(Split(images, found.present() if name == "scenes" else found.classes))
    kind: Any = "multi" if name == "scenes" else "segmentation"
    about = f"scenes {TASK_SCENES} to {TASK_SCENES + train + test - 1}, the last {test} for test"
    constants = scene_statistics(side)
    return Task(name, kind, ("optical", "radar"), len(CLASSES), splits[0], splits[1], splits[1], about, "generated", constants)


def _eurosat(folder: Path) -> Task:
    listed = require(folder / "split.csv", "EuroSAT (13 bands)", "a CSV with the columns split (train, test, perhaps val), label, file")
    with listed.open() as stream:
        rows = list(csv.DictReader(stream))
    classes = sorted({row["label"] for row in rows})
    images: dict[str, list[Tensor]] = {part: [] for part in ("train", "val", "test")}
    labels: dict[str, list[int]] = {part: [] for part in images}
    for row in rows:
        if row["split"] not in images:
            raise ValueError(f"{listed}: expected the splits train, val and test, found {row['split']!r}")
        values, names = rasters.read_image(folder / row["file"], EUROSAT)
        images[row["split"]].append(fill_missing(check_optical(values, names), row["file"]))
        labels[row["split"]].append(classes.index(row["label"]))
    if not images["train"] or not images["test"]:
        raise ValueError(f"{listed}: expected rows of the splits train and test, found {len(images['train'])} and {len(images['test'])}")
    statistics = statistics_of(torch.stack(images["train"]))  # L1C: its own constants, from the training split
    splits = {
        part: Split(to_bytes(normalise(torch.stack(found), statistics)).numpy(), torch.tensor(labels[part]))
        for part, found in images.items()
        if found
    }
    about = f"split.csv: {', '.join(f'{len(labels[part])} {part}' for part in splits)}"
    return Task(
        "EuroSAT",
        "single",
        ("optical",),
        len(classes),
        splits["train"],
        splits.get("val", splits["test"]),
        splits["test"],
        about,
        checksum([listed, *(folder / row["file"] for row in rows)]),
        statistics,
    )


def _prepared(name: str, data_root: str | None) -> Path:
    root = data_root_of(data_root)
    if name == "folder":
        return root
    how = f"run python -m projects.croma.prepare --layout {name} --source <folder as published> --out {root / f'{name}-prepared'} --split <lists>"
    return require(root / f"{name}-prepared", f"{name}, prepared", how)


def _folder(folder: Path) -> Task:
    about = json.loads(require(folder / "task.json", "a task folder", "give name, kind, channels and classes").read_text())
    splits = {}
    for part in ("train", "val", "test"):
        place = folder / part
        if part != "train" and not place.is_dir():
            continue
        images = np.load(require(place / "images.npy", f"{part} split", "uint8 (N, C, H, W)"), mmap_mode="r")
        labels = torch.from_numpy(np.load(require(place / "labels.npy", f"{part} split", "labels of the images"))).long()
        expected = {("optical",): 12, ("radar",): 2, ("optical", "radar"): 14}.get(tuple(about["channels"]))
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != expected or len(images) != len(labels):
            raise ValueError(
                f"{place}: expected uint8 images (N, {expected}, H, W) for channels {about['channels']} and N labels, "
                f"got {images.dtype} {images.shape} and {tuple(labels.shape)}"
            )
        top = 2 if about["kind"] == "multi" else about["classes"]
        outside = (labels < 0) | (labels >= top)
        bad = labels[outside & (labels != VOID) if about["kind"] == "segmentation" else outside]
        if bad.numel():
            raise ValueError(f"{place}/labels.npy: expected classes 0 to {top - 1}, found {int(bad[0])}")
        splits[part] = Split(images, labels)
    test = splits.get("test") or splits.get("val")
    if test is None:
        raise FileNotFoundError(f"{folder}: expected val/ or test/ with images.npy and labels.npy beside train/, found neither")
    listed = ", ".join(f"{len(split.labels)} {part}" for part, split in splits.items())
    digest = checksum([folder / "task.json", *sorted(folder.glob("*/labels.npy"))])
    return Task(
        about["name"],
        about["kind"],
        tuple(about["channels"]),
        about["classes"],
        splits["train"],
        splits.get("val") or test,
        test,
        listed,
        digest,
        Statistics(*map(tuple, about["statistics"])) if "statistics" in about else None,
    )


def batches(images: np.ndarray, size: int = 64) -> Any:
    """Tensors (b, C, H, W) uint8 of an array, in order."""
    for start in range(0, len(images), size):
        yield torch.from_numpy(np.ascontiguousarray(images[start : start + size]))
