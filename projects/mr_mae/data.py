"""Pictures with labels (drawn parts, CIFAR-10, Tiny-ImageNet, ImageNet folders) and the views of them that students and teachers see."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data import checksum, require, root
from projects.mr_mae import parts
from projects.mr_mae.cache import FeatureStore
from projects.mr_mae.teachers import IMAGENET, Statistics

Name = Literal["parts", "cifar10", "tinyimagenet", "imagenet"]
Augment = Literal["none", "flip", "crop"]
HALF: Statistics = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Readable(Protocol):
    """uint8 pictures (3, H, W) by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass
class Pictures:
    """A split: pictures, labels (n,) int64, names of the classes, and what a record says of the data."""

    images: Readable
    labels: Tensor
    classes: list[str]
    about: dict[str, str]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, limit: int | None) -> Pictures:
        """The first `limit` pictures of a permutation seeded with 0 (class-ordered files would give few classes otherwise)."""
        if limit is None or limit >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:limit]
        images = self.images[chosen] if isinstance(self.images, Tensor) else Chosen(self.images, chosen.tolist())
        return Pictures(images, self.labels[chosen], self.classes, self.about | {"split": f"{self.about['split']}, {limit} pictures"})


class Chosen:
    """Some of the pictures."""

    def __init__(self, images: Readable, numbers: list[int]) -> None:
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[self.numbers[index]]


def load(name: Name, split: Literal["train", "test"], *, data_root: str | None = None, limit: int | None = None, seed: int = 0) -> Pictures:
    """A split of a data set.

    Args:
        data_root: see `common.data.root`; holds `cifar10/`, `tinyimagenet/` (parquet) or `imagenet/{train,val}/<class>/`.
        limit: pictures, drawn the same for all seeds; None = all (parts: 4,096 for training, 1,024 for testing).
        seed: of drawn parts; each draws its own set.
    """
    if name == "parts":
        count = limit or (4096 if split == "train" else 1024)
        drawn = parts.draw(count, seed, 0 if split == "train" else 1_000_000)
        classes = [f"{shape} {fill}" for shape in parts.SHAPES for fill in parts.FILLS]
        return Pictures(
            drawn.images, drawn.labels, classes, {"name": "drawn parts", "split": f"{split}, {count} pictures", "sha256": f"seed {seed}"}
        )
    folder = root(data_root) / name
    found = _folder(folder, split) if name == "imagenet" else _parquet(folder, name, split)
    return found.subset(limit)


def _parquet(folder: Path, name: str, split: str) -> Pictures:
    import pyarrow.parquet as pq
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    file = require(folder / {"cifar10": f"{split}.parquet", "tinyimagenet": "train.parquet" if split == "train" else "val.parquet"}[name],
                   f"{name}, {split}", "a parquet file with the columns image (JPEG bytes) and label belongs there")  # fmt: skip
    if absent := {"image", "label"} - set(pq.read_schema(file).names):
        raise ValueError(f"{file}: expected the columns image and label, found no {' and no '.join(sorted(absent))}; see README, Data")
    table = pq.read_table(file, columns=["image", "label"])
    images: list[Tensor] = []
    for number, row in enumerate(table.column("image").to_pylist()):
        place = f"{file}: row {number} ({row.get('path')})"
        try:
            images.append(pil_to_tensor(Image.open(io.BytesIO(row["bytes"])).convert("RGB")))
        except OSError as err:
            raise ValueError(f"{place}: expected an image, found bytes that cannot be read ({err})") from err
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{place}: expected {tuple(images[0].shape)} as in row 0, found {tuple(images[-1].shape)}")
    labels = torch.tensor(table.column("label").to_pylist(), dtype=torch.int64)
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    classes = features.get("label", {}).get("names") or [str(label) for label in range(int(labels.max()) + 1)]
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(f"{file}: expected labels 0 to {len(classes) - 1}, found {int(labels.min())} to {int(labels.max())}")
    return Pictures(torch.stack(images), labels, classes, {"name": name, "split": split, "sha256": checksum(file)})


class Files:
    """Pictures read from files when asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image
        from torchvision.transforms.v2.functional import pil_to_tensor

        try:
            with Image.open(self.files[index]) as image:
                return pil_to_tensor(image.convert("RGB"))  # greyscale, CMYK and palette files exist
        except OSError as err:
            raise ValueError(f"image {self.files[index]}: expected a picture, found a file that cannot be read ({err})") from err


def _classes(folder: Path) -> dict[str, list[Path]]:
    require(folder, "ImageNet folder", "expected one sub-folder a class, <root>/imagenet/{train,val}/<class>/*.JPEG")
    found = {sub.name: sorted(f for f in sub.iterdir() if f.is_file()) for sub in sorted(folder.iterdir()) if sub.is_dir()}
    if not found:
        raise ValueError(
            f"{folder}: expected one sub-folder a class with pictures inside, found none; sort the pictures into <class>/ first"
        )
    if empty := [name for name, files in found.items() if not files]:
        raise ValueError(f"{folder}: expected pictures in every class folder, found none in {empty[:3]}")
    return found


def _folder(folder: Path, split: str) -> Pictures:
    train, val = _classes(folder / "train"), _classes(folder / "val")
    if differing := sorted(train.keys() ^ val.keys()):
        raise ValueError(f"{folder}: expected the same classes in train and val, found {len(differing)} in one only: {differing[:3]}")
    chosen, classes = train if split == "train" else val, list(train)
    files = [(file, label) for label, name in enumerate(classes) for file in chosen[name]]
    listing = hashlib.sha256("\n".join(f"{file.relative_to(folder)} {file.stat().st_size}" for file, _ in files).encode()).hexdigest()
    about = {"name": folder.name, "split": split, "sha256": f"{listing} (names and sizes)"}
    return Pictures(Files([file for file, _ in files]), torch.tensor([label for _, label in files]), classes, about)


def normalised(image: Tensor, statistics: Statistics) -> Tensor:
    """uint8 (..., 3, H, W) -> float by mean and deviation."""
    mean, std = (torch.tensor(part)[:, None, None] for part in statistics)
    return (image.float() / 255 - mean) / std


def crop_box(
    height: int, width: int, *, scale: tuple[float, float], reject: bool = True, generator: torch.Generator | None = None
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop: share of the area in `scale`, aspect in 3/4..4/3 (log-uniform).

    Args:
        reject: draw until the crop fits, ten times, then the largest middle of an allowed aspect (torchvision); False: draw once and cut to the picture
            (MAE's linear probe).
    """
    for _ in range(10 if reject else 1):
        area, aspect = torch.rand(2, generator=generator).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(math.log(3 / 4) + aspect * math.log(16 / 9))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not reject:
            w, h = min(w, width), min(h, height)
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return top, left, h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def cropped(image: Tensor, size: int, box: tuple[int, int, int, int]) -> Tensor:
    """The box of a uint8 picture, bicubic to size x size."""
    from torchvision.transforms.v2.functional import InterpolationMode, resized_crop

    return resized_crop(image, *box, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)


def centre(image: Tensor, size: int) -> Tensor:
    """Evaluation view: shorter side to size x 256/224 (bicubic), middle size x size; pictures that are size x size already stay whole."""
    from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

    if image.shape[1:] == (size, size):
        return image
    return center_crop(resize(image, [round(size * 256 / 224)], interpolation=InterpolationMode.BICUBIC, antialias=True), [size, size])


def view(
    image: Tensor,
    size: int,
    augment: Augment,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    reject: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A uint8 picture as size x size: the evaluation view, that or its mirror image, or a random resized crop with random mirroring."""
    if augment == "crop":
        image = cropped(image, size, crop_box(*image.shape[1:], scale=scale, reject=reject, generator=generator))
    else:
        image = centre(image, size)
    return image.flip(-1) if augment != "none" and torch.rand((), generator=generator) < 0.5 else image


class Views(Dataset[dict[str, Any]]):
    """What a training step reads: {"images": (3, S, S) normalised, "label", and with cached features "tokens": one (N, Dt) a teacher, "score": (N,)}.

    Args:
        fixed: number of views of each picture that are drawn once and for all (their features can be cached); 0 = drawn anew each time.
        stores: cached features of these fixed views, one a teacher.
        scale, reject: of crops, see `crop_box`.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: int,
        augment: Augment,
        statistics: Statistics = IMAGENET,
        *,
        fixed: int = 0,
        stores: Sequence[FeatureStore] = (),
        scale: tuple[float, float] = (0.2, 1.0),
        reject: bool = True,
    ) -> None:
        if stores and not fixed:
            raise ValueError(
                "cached teacher features: expected a number of fixed views, found views drawn anew each time; set views, or switch the cache off"
            )
        self.pictures, self.size, self.augment, self.statistics = pictures, size, augment, statistics
        self.fixed, self.stores, self.scale, self.reject = fixed, list(stores), scale, reject

    def __len__(self) -> int:
        return len(self.pictures)

    def fixed_view(self, index: int, number: int) -> Tensor:
        """View `number` of a picture, the same whenever it is asked for."""
        generator = torch.Generator().manual_seed(index * 1009 + number)
        options: dict[str, Any] = {"scale": self.scale, "reject": self.reject, "generator": generator}
        return normalised(view(self.pictures.images[index], self.size, self.augment, **options), self.statistics)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"label": self.pictures.labels[index]}
        if not self.fixed:
            options: dict[str, Any] = {"scale": self.scale, "reject": self.reject}
            return item | {"images": normalised(view(self.pictures.images[index], self.size, self.augment, **options), self.statistics)}
        number = int(torch.randint(self.fixed, ()))
        item["images"] = self.fixed_view(index, number)
        if self.stores:
            found = [store[index * self.fixed + number] for store in self.stores]
            item["tokens"] = [features.tokens for features in found]
            if found[0].score is not None:
                item["score"] = found[0].score
        return item
