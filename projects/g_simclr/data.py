"""Images in memory as bytes, and their readers: parquet through `datasets`, image folders, CIFAR-10's own files, and scikit-learn's digits.

A data set NAME is a folder of that name under the data root with, in this order of preference:

    cifar-10-batches-py/             the Python version of CIFAR-10 (pickles, read by torchvision: only those you trust)
    train.parquet, test.parquet      columns `image` (bytes) and, where there are labels, `label`
    train/, test/                    files in one folder a class, or flat with the class before the first underscore, or without labels

`digits` needs no file. Images are decoded as RGB; with `image_size` they are resized bilinearly, the aspect ratio not kept. Decoded copies are
kept in the user's cache folder, never beside the data.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from common.checkpoint import written_aside
from common.data import checksum, require, root

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
ANYWHERE = "see the project's README, Data"


@dataclass
class Images(Dataset[Tensor]):
    """Images of one split.

    pixels: (N, C, H, W) uint8, `full` meaning white. labels: (N,) int64 or None. classes: names. digests: (N, 16) uint8, one an image, which
    tell the order of the images. sha256: of the files.
    """

    name: str
    pixels: Tensor
    labels: Tensor | None
    classes: list[str]
    digests: Tensor
    sha256: str
    full: int = 255

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]

    @property
    def order(self) -> str:
        """Hash of which image stands where."""
        return hashlib.sha256(self.digests.numpy().tobytes()).hexdigest()

    def floats(self, pixels: Tensor) -> Tensor:
        """Bytes as floats in 0..1."""
        return pixels.float() / self.full

    def batches(self, size: int = 128) -> Iterator[Tensor]:
        """All images in order, as floats; small enough parts for a processor's cache."""
        return (self.floats(part) for part in self.pixels.split(size))

    def part(self, numbers: Tensor) -> Images:
        labels = None if self.labels is None else self.labels[numbers]
        return Images(self.name, self.pixels[numbers], labels, self.classes, self.digests[numbers], self.sha256, self.full)

    def known(self) -> Tensor:
        """Labels, where a protocol needs them.

        Raises:
            ValueError: there are none.
        """
        if self.labels is None:
            raise ValueError(f"{self.name}: expected labels for the probes, found none; use class folders or prefix_ file names")
        return self.labels


@dataclass
class Splits:
    """Training and test images of a data set."""

    train: Images
    test: Images

    def held_out(self, share: float = 0.1, seed: int = 0) -> tuple[Images, Images]:
        """Training images without a validation part, and that part: drawn once, whichever the seed of the run."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        count = max(1, int(share * len(order)))
        return self.train.part(order[count:].sort().values), self.train.part(order[:count].sort().values)


def load(name: str, *, data_root: str | None = None, image_size: int | None = None, cache: str | None = None) -> Splits:
    """A data set by name, see the module's docstring.

    Raises:
        FileNotFoundError: nothing of that name under the data root.
        ValueError: an image that does not decode, images of several sizes without `image_size`, an empty class, labels that do not fit.
    """
    if name == "digits":
        return digits()
    folder = require(root(data_root) / name, f"data set {name}", ANYWHERE)
    if (folder / "cifar-10-batches-py").is_dir():
        return _python_cifar(name, folder, image_size)
    parts = {}
    for part in ("train", "test"):
        single = folder / f"{part}.parquet"
        source = (
            single if single.is_file() else require(folder / part, f"{name}, {part} images ({part}.parquet or a folder {part}/)", ANYWHERE)
        )
        parts[part] = _prepared(f"{name} {part}", source, image_size, cache)
    train, test = parts["train"], parts["test"]
    if train.labels is not None and test.labels is not None and train.classes[: len(test.classes)] != test.classes:
        raise ValueError(
            f"{name}: expected the same classes in both splits, found {train.classes[:8]} in train and {test.classes[:8]} in test"
        )
    for part, images in parts.items():
        if twice := len(images) - len(np.unique(_keys(images.digests))):
            warnings.warn(f"{name}: {twice} images of the {part} split repeat another one of it", stacklevel=2)
    both = len(np.intersect1d(_keys(train.digests), _keys(test.digests)))
    if both:
        warnings.warn(f"{name}: {both} images stand in the training and in the test split", stacklevel=2)
    if train.labels is not None and (absent := sorted(set(range(len(train.classes))) - set(train.labels.tolist()))):
        warnings.warn(f"{name}: no training image of {', '.join(train.classes[c] for c in absent)}", stacklevel=2)
    return Splits(train, test)


def digits(seed: int = 0) -> Splits:
    """scikit-learn's handwritten digits, 8 x 8 pixels of 17 greys: 1,400 training and 397 test images, split by a seeded permutation."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    pixels = torch.from_numpy(images[order].astype(np.uint8)).view(-1, 1, 8, 8)
    truth = torch.from_numpy(labels[order]).long()
    both = (
        Images(
            "digits",
            pixels[part],
            truth[part],
            [str(i) for i in range(10)],
            _digests(map(_bytes, pixels[part])),
            "ships with scikit-learn",
            16,
        )
        for part in (slice(1400), slice(1400, None))
    )
    return Splits(*both)


# -- readers -----------------------------------------------------------------------------------------------------------


def _bytes(image: Tensor) -> bytes:
    return image.numpy().tobytes()


def _digests(contents: Any) -> Tensor:
    rows = [np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), dtype=np.uint8) for content in contents]
    return torch.from_numpy(np.stack(rows))


def _keys(digests: Tensor) -> np.ndarray:
    return np.ascontiguousarray(digests.numpy()).view("V16").ravel()


def decode(content: bytes, what: str, image_size: int | None = None) -> Tensor:
    """Encoded image -> (3, H, W) uint8; grey, CMYK and RGBA become RGB.

    Raises:
        ValueError: bytes that are no image, or a truncated one; `what` names it.
    """
    try:
        from PIL import Image
    except ImportError as err:
        raise ImportError("image files need Pillow: pip install -e '.[vision]'") from err
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as err:
        raise ValueError(f"{what}: expected an image, found bytes that do not decode ({err}); fetch it again or remove it") from err
    if image_size is not None and pixels.shape[1:] != (image_size, image_size):
        resized = F.interpolate(pixels[None].float(), size=(image_size, image_size), mode="bilinear", align_corners=False)
        pixels = resized[0].round().clamp(0, 255).to(torch.uint8)
    return pixels.contiguous()


def _stacked(images: Sequence[Tensor], what: str) -> Tensor:
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) != 1:
        raise ValueError(f"{what}: expected images of one size, found {len(sizes)} sizes, {sorted(sizes)[:3]} among them; set image_size")
    return torch.stack(list(images))


def read_parquet(path: Path, image_size: int | None = None, cache: Path | None = None) -> Images:
    """A parquet file with columns `image` (bytes, or a struct with `bytes`) and perhaps `label` (numbers, with class names where they are known)."""
    import datasets

    try:
        rows = datasets.Dataset.from_parquet(str(path), cache_dir=None if cache is None else str(cache / "arrow"))
    except Exception as err:
        raise ValueError(
            f"{path}: expected a parquet file, found one that cannot be read ({type(err).__name__}: {err}); fetch it again"
        ) from err
    if "image" not in rows.column_names:
        raise ValueError(f"{path}: expected a column `image`, found {rows.column_names}")
    if isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))
    contents = [cell["bytes"] if isinstance(cell, dict) else cell for cell in rows["image"]]
    empty = next((i for i, content in enumerate(contents) if not content), None)
    if empty is not None:
        raise ValueError(f"{path}: row {empty} holds no image bytes")
    pixels = _stacked([decode(content, f"{path}, row {i}", image_size) for i, content in enumerate(contents)], str(path))
    labels, classes = None, []
    if "label" in rows.column_names:
        given = list(rows["label"])
        named = getattr(rows.features["label"], "names", None)
        wrong = next((i for i, label in enumerate(given) if not isinstance(label, int) or label < 0), None)
        if wrong is not None:
            raise ValueError(f"{path}: row {wrong}: expected a class number from 0 on, found {given[wrong]!r}")
        labels = torch.tensor(given)
        classes = list(named) if named else [str(i) for i in range(max(given) + 1)]
    return Images(path.stem, pixels, labels, classes, _digests(contents), checksum(path))


def read_folder(folder: Path, image_size: int | None = None) -> Images:
    """Image files in one folder a class, or flat (class = what stands before the first underscore, or no labels where a name has none)."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = sorted((path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES), key=lambda path: str(path.relative_to(folder)))
    if not found:
        raise ValueError(f"{folder}: expected image files ({', '.join(sorted(SUFFIXES))}), found none")
    flat = [path for path in found if path.parent == folder]
    if inside and flat:
        raise ValueError(
            f"{folder}: expected class folders or files, found {len(inside)} folders and {len(flat)} files side by side, {flat[0].name} among them"
        )
    if inside:
        classes = [path.name for path in inside]
        of = [path.relative_to(folder).parts[0] for path in found]
        if absent := sorted(set(classes) - set(of)):
            raise ValueError(f"{folder}: class {absent[0]} holds no image")
    else:
        of = [path.name.partition("_")[0] if "_" in path.name else "" for path in found]
        classes = [] if "" in of else sorted(set(of))
    labels = torch.tensor([classes.index(name) for name in of]) if classes else None
    pixels = _stacked([decode(path.read_bytes(), str(path), image_size) for path in found], str(folder))
    return Images(folder.name, pixels, labels, classes, _digests(path.read_bytes() for path in found), checksum(found))


def _python_cifar(name: str, folder: Path, image_size: int | None) -> Splits:
    from torchvision.datasets import CIFAR10

    if image_size not in (None, 32):
        raise ValueError(f"{name}: its Python version is read as it is, 32 x 32; found image_size={image_size}")
    sha256 = checksum(folder / "cifar-10-batches-py")
    parts = []
    for train in (True, False):
        try:
            data = CIFAR10(str(folder), train=train)
        except Exception as err:  # a missing or altered file, a pickle cut short
            raise ValueError(
                f"{folder / 'cifar-10-batches-py'}: expected CIFAR-10's Python version, found other files ({err}); unpack the archive again"
            ) from err
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Images(name, pixels, torch.tensor(data.targets), data.classes, _digests(map(_bytes, pixels)), sha256))
    return Splits(*parts)


def cache_folder(cache: str | None) -> Path:
    """Where decoded copies go: the argument, else the user's cache folder."""
    given = Path(cache).expanduser() if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contramask"
    return given / "g_simclr"


def _prepared(name: str, source: Path, image_size: int | None, cache: str | None) -> Images:
    """The decoded split from the cache, or decoded now and put there; the cached file is named after the content of the source."""
    place = cache_folder(cache)
    sha256 = checksum(source)
    copy = place / f"{name.replace(' ', '-')}-{sha256[:16]}-{image_size or 'as-is'}.safetensors"
    if not copy.is_file():
        images = read_parquet(source, image_size, place) if source.is_file() else read_folder(source, image_size)
        about = {"classes": json.dumps(images.classes), "labelled": str(images.labels is not None)}
        labels = torch.zeros(0, dtype=torch.int64) if images.labels is None else images.labels
        with written_aside(copy) as aside:
            save_file({"pixels": images.pixels, "labels": labels, "digests": images.digests}, aside, metadata=about)
    with safe_open(copy, framework="pt") as file:
        about = file.metadata()
        pixels, labels, digests = (file.get_tensor(key) for key in ("pixels", "labels", "digests"))
    return Images(name, pixels, labels if about["labelled"] == "True" else None, json.loads(about["classes"]), digests, sha256)
