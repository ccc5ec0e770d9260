"""Images for MixedAE: folders (ImageNet's layout, or flat), CIFAR-10 and Tiny-ImageNet as Parquet files, and "textured objects", the embedded default.

Under the data root: `<folder>/train/<class>/*` and `<folder>/val/<class>/*` (or any folder of images for pre-training), `cifar10/{train,test}.parquet`,
`tinyimagenet/{train,val}.parquet` with columns `image` (encoded bytes) and `label`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data import checksum, require, root
from projects.mixed_ae.model import check_batch

Name = Literal["textured", "cifar10", "tinyimagenet", "folder"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARQUET = {"cifar10": ("train.parquet", "test.parquet"), "tinyimagenet": ("train.parquet", "val.parquet")}
ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Split:
    """Decoded images in memory, or the paths of files."""

    name: str
    pixels: Tensor | list[Path]
    """(N, 3, S, S) uint8, or N files."""
    labels: Tensor
    """(N,) int64; -1 where nobody says what is to be classified."""
    objects: Tensor | None = None
    """(N, L) share of each patch that the object covers (textured objects)."""
    sha256: str = "generated"

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """(3, H, W) uint8.

        Raises:
            ValueError: a file that is no readable image; the message names it.
        """
        if isinstance(self.pixels, Tensor):
            return self.pixels[index]
        return _decode(self.pixels[index])


def _decode(source: Path | bytes, name: str = "") -> Tensor:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            return torch.from_numpy(np.asarray(file.convert("RGB")).copy()).permute(2, 0, 1)
    except (OSError, SyntaxError) as err:
        raise ValueError(
            f"{name or source}: expected an image that Pillow reads, found one that it does not ({err}); remove or replace it"
        ) from err


# ---------------------------------------------------------------- the embedded default


def textured_object(seed: int, index: int, *, size: int = 64, related: float = 0.0, group: int = 4) -> tuple[np.ndarray, int, np.ndarray]:
    """One image (3, size, size) uint8, its class 0..7, and its object's mask (size, size) bool; depends on the arguments alone.

    The class is the orientation (4) and frequency (2) of the grating on the object, an ellipse or polygon over 15 to 40 % of the image. Palette and grain
    are the image's own, so that its patches can be recognised by them. With `related` the images jK..jK+K-1 share that weight of one scene's background.
    """
    rng = np.random.default_rng((seed, index))
    label, shape = int(rng.integers(8)), int(rng.integers(2))
    y, x = np.mgrid[:size, :size] / size - 0.5
    hue, saturation = rng.uniform(), rng.uniform(0.4, 0.9)
    background = _textured(x, y, rng.uniform(0, np.pi), rng.uniform(4, 12), rng.uniform(0, 2 * np.pi), hue, saturation)
    if related > 0:
        scene = np.random.default_rng((seed, index // group, 1))
        shared = _textured(
            x, y, scene.uniform(0, np.pi), scene.uniform(4, 12), scene.uniform(0, 2 * np.pi), scene.uniform(), scene.uniform(0.4, 0.9)
        )
        background = related * shared + (1 - related) * background
    other = (hue + rng.uniform(0.35, 0.65)) % 1
    thing = _textured(x, y, label % 4 * np.pi / 4, (6, 11)[label // 4], rng.uniform(0, 2 * np.pi), other, saturation)
    # star-shaped outline: distance from the centre over the outline's radius; a quantile of it covers exactly the share wanted
    dx, dy = x - rng.uniform(-0.15, 0.15), y - rng.uniform(-0.15, 0.15)
    turn, squash = rng.uniform(0, np.pi), rng.uniform(0.6, 1.0)
    u, v = dx * np.cos(turn) + dy * np.sin(turn), (dy * np.cos(turn) - dx * np.sin(turn)) / squash
    level = np.hypot(u, v)
    corners = int(rng.integers(3, 7))
    if shape:
        level = level * np.cos(np.arctan2(v, u) % (2 * np.pi / corners) - np.pi / corners)
    mask = level <= np.quantile(level, rng.uniform(0.15, 0.40))
    image = np.where(mask, thing, background) + rng.normal(0, rng.uniform(0.02, 0.10), (3, size, size))
    return (image.clip(0, 1) * 255).astype(np.uint8), label, mask


def _textured(x: np.ndarray, y: np.ndarray, angle: float, cycles: float, phase: float, hue: float, saturation: float) -> np.ndarray:
    """(3, S, S) in 0..1: one hue whose brightness is a sine grating."""
    value = 0.6 + 0.3 * np.sin(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    pure = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation + saturation * pure)[:, None, None]


def textured(count: int, seed: int, *, size: int = 64, patch: int = 8, related: float = 0.0, group: int = 4, first: int = 0) -> Split:
    """`count` textured objects from number `first` on."""
    made = [textured_object(seed, first + i, size=size, related=related, group=group) for i in range(count)]
    masks = torch.from_numpy(np.stack([mask for _, _, mask in made])).float()[:, None]
    objects = torch.nn.functional.avg_pool2d(masks, patch).flatten(1)
    pixels = torch.from_numpy(np.stack([image for image, _, _ in made]))
    return Split("textured objects", pixels, torch.tensor([label for _, label, _ in made]), objects)


# ---------------------------------------------------------------- real data


def parquet(path: Path, what: str) -> Split:
    """Images of one size from a Parquet file with columns `image` (struct with `bytes`) and `label`.

    Raises:
        FileNotFoundError, ValueError: no such file; columns or an image that cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    require(path, what, "put the Parquet file with columns image and label there")
    try:
        columns = pyarrow.parquet.read_table(path, columns=["image", "label"]).to_pydict()
        encoded = [entry["bytes"] for entry in columns["image"]]
    except (pyarrow.ArrowException, KeyError, TypeError, OSError) as err:
        raise ValueError(f"{path}: expected a Parquet file with columns image (bytes) and label, found another ({err})") from err
    pixels = [_decode(data, f"{path}, row {i}") for i, data in enumerate(encoded)]
    if not pixels:
        raise ValueError(f"{path}: expected images, found no row; fetch the file again")
    if other := next((i for i, image in enumerate(pixels) if image.shape != pixels[0].shape), None):
        raise ValueError(
            f"{path}, row {other}: expected {tuple(pixels[0].shape[1:])} pixels as in row 0, found {tuple(pixels[other].shape[1:])}; "
            "bring all to one size, or unpack the file and use data=folder"
        )
    return Split(what, torch.stack(pixels), torch.tensor(columns["label"]), sha256=checksum(path))


def folder(path: Path) -> Split:
    """Files of `<path>/<class>/*` with the class's place in the sorted list as label, or of a flat folder with label -1.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    require(path, "images", "put them there as <class>/<file>, or as files alone for pre-training")
    classes = sorted(p for p in path.iterdir() if p.is_dir())
    pairs = [(file, i) for i, kind in enumerate(classes) for file in sorted(kind.rglob("*")) if file.suffix.lower() in ENDINGS]
    if not classes:
        pairs = [(file, -1) for file in sorted(path.iterdir()) if file.suffix.lower() in ENDINGS]
    if not pairs:
        raise FileNotFoundError(f"{path}: expected images ({', '.join(sorted(ENDINGS))}), found none")
    return Split(path.name, [file for file, _ in pairs], torch.tensor([label for _, label in pairs]), sha256="not computed for folders")


def load(
    name: Name, *, data_root: str | None, where: str = "imagenet", seed: int = 0, size: int = 64, patch: int = 8, **counts: Any
) -> tuple[Split, Split]:
    """Training and test split; textured objects are drawn for `seed`.

    Args:
        where: folder under the data root that holds `train` and `val` (name = "folder"); one without `train` serves pre-training alone: no labels.
        counts: of textured objects: train, test, related, group.
    Raises:
        FileNotFoundError, ValueError: as the readers say; `train` and `val` with other classes.
    """
    if name == "textured":
        train, test = counts.get("train", 4096), counts.get("test", 1024)
        options: dict[str, Any] = {"size": size, "patch": patch, "related": counts.get("related", 0.0), "group": counts.get("group", 4)}
        return textured(train, seed, **options), textured(test, seed, first=10**6, **options)
    base = root(data_root)
    if name == "folder":
        inside = base / where
        if not (inside / "train").is_dir():
            every = folder(inside)
            every = replace(every, labels=torch.full_like(every.labels, -1))  # measuring on what was trained on would be no test
            return every, every
        kinds = [sorted(p.name for p in (inside / part).glob("*") if p.is_dir()) for part in ("train", "val")]
        if kinds[1] and kinds[0] != kinds[1]:
            alone = sorted(set(kinds[0]) ^ set(kinds[1]))
            raise ValueError(
                f"{inside}: expected the same classes in train and val, found {len(alone)} in one alone ({', '.join(alone[:3])})"
            )
        return folder(inside / "train"), folder(inside / "val")
    files = PARQUET[name]
    return parquet(base / name / files[0], f"{name}, training"), parquet(base / name / files[1], f"{name}, test")


def check_labelled(*splits: Split) -> None:
    """Refuse images without labels, which serve pre-training alone."""
    for split in splits:
        if int(split.labels.min()) < 0:
            raise ValueError(
                f"{split.name}: expected labels, from train/<class>/* and val/<class>/*; found images without classes, which serve pre-training alone"
            )


# ---------------------------------------------------------------- samples and batches


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """(image (3, size, size) float, label) of a split.

    Args:
        transform: "crop" = random resized crop of `scale`, bicubic, and a flip (MAE); "centre" = resize by 256/224 and centre crop; "none" = as it is.
    """

    def __init__(
        self, split: Split, size: int, transform: Literal["crop", "centre", "none"], scale: tuple[float, float] = (0.2, 1.0)
    ) -> None:
        self.split, self.size = split, size
        self.transform: Callable[[Tensor], Tensor] = _transform(size, transform, scale)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.split.image(index)), self.split.labels[index]


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) -> float with ImageNet's mean and deviation taken off."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def _transform(size: int, kind: str, scale: tuple[float, float]) -> Callable[[Tensor], Tensor]:
    if kind == "none":
        return normalised
    try:
        from torchvision.transforms import InterpolationMode, v2
    except ImportError as err:
        raise ImportError("crops need torchvision: pip install -e '.[vision]'") from err
    options: dict[str, Any] = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    if kind == "crop":
        return v2.Compose([v2.RandomResizedCrop(size, scale=scale, **options), v2.RandomHorizontalFlip(), normalised])
    return v2.Compose([v2.Resize(round(size * 256 / 224), **options), v2.CenterCrop(size), normalised])


class Scenes(Sampler[int]):
    """Shuffles whole scenes of `group` consecutive images, so that related images meet in a group."""

    def __init__(self, count: int, group: int) -> None:
        self.count, self.group = count // group * group, group
        self.generator: torch.Generator | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        scenes = torch.randperm(self.count // self.group, generator=self.generator)
        yield from (scenes[:, None] * self.group + torch.arange(self.group)).flatten().tolist()


class _Groups:
    """Collates a batch and warns once of a group whose images are all the same."""

    def __init__(self, group: int) -> None:
        self.group, self.warned = group, False

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
        images = torch.stack([image for image, _ in samples])
        members = images.unflatten(0, (-1, self.group))
        if not self.warned and bool((members[:, 1:] == members[:, :1]).flatten(1).all(1).any()):
            self.warned = True
            warnings.warn(
                f"all {self.group} images of a group are identical: they cannot be told apart, and their contrastive labels mean nothing; remove duplicates",
                stacklevel=2,
            )
        return images


def batches(samples: Samples, batch_size: int, group: int, *, workers: int = 0, scenes: bool = False) -> DataLoader[Any]:
    """Shuffled batches (batch_size, 3, S, S) of whole groups, the last one dropped; groups never cross processes, which get whole batches.

    Args:
        group: K; 1 for MAE.
        scenes: keep consecutive images together (related images).
    Raises:
        ValueError: a batch that is not made of whole groups, or fewer images than one batch.
    """
    check_batch(batch_size, group, "batch_size")
    if len(samples) < batch_size:
        raise ValueError(
            f"{samples.split.name}: expected at least {batch_size} images (one batch), found {len(samples)}; use a smaller batch"
        )
    order: dict[str, Any] = {"sampler": Scenes(len(samples), group)} if scenes else {"shuffle": True}
    collate = _Groups(group) if group > 1 else _stack
    return DataLoader(
        samples,
        batch_size,
        drop_last=True,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **order,
    )


def _stack(samples: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([image for image, _ in samples])
