"""Point cloud data sets: ShapeNet-55, ModelNet40 (three layouts), its few-shot folds, ScanObjectNN, ShapeNetPart; two small real sets; the solids.

Every set gives clouds by number; files are checked where they are read, and a message names file, what was expected and what to do.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.checkpoint import written_aside
from common.data import require, root
from projects.point_cmae.augment import normalise
from projects.point_cmae.segmenter import PARTS
from projects.point_cmae.solids import PARTS as SOLID_PARTS
from projects.point_cmae.solids import SOLIDS, Solids, solids

Name = Literal[
    "solids",
    "solids-hard",
    "shapenet55",
    "modelnet40",
    "scanobjectnn-bg",
    "scanobjectnn-only",
    "scanobjectnn-hardest",
    "lidarnet",
    "modelnet10-voxels",
]
Split = Literal["pretrain", "train", "test"]
GENERATED = ("solids", "solids-hard")
COUNTS = {"pretrain": 768, "train": 480, "test": 480}
"""Clouds of each split of the solids."""
SCAN_CLASSES = [
    "bag",
    "bin",
    "box",
    "cabinet",
    "chair",
    "desk",
    "display",
    "door",
    "shelf",
    "table",
    "bed",
    "pillow",
    "sink",
    "sofa",
    "toilet",
]
Array = np.ndarray


def check_cloud(points: Array, origin: str, *, least: int = 1) -> Array:
    """Points (n, >= 3) as float32 (n, 3).

    Raises:
        ValueError: another shape, fewer than `least` points, NaN or infinite, all points equal; the message begins with `origin`.
    """
    if points.ndim != 2 or points.shape[1] < 3 or not np.issubdtype(points.dtype, np.number):
        raise ValueError(f"{origin}: expected numbers (n, 3 or more), found {points.dtype} {points.shape}")
    points = points[:, :3].astype(np.float32)
    if len(points) < least:
        raise ValueError(f"{origin}: expected at least {least} points, found {len(points)}; lower the points asked for or drop it")
    if not np.isfinite(points).all():
        raise ValueError(f"{origin}: {int((~np.isfinite(points)).sum())} coordinates are NaN or infinite; fetch it again or drop it")
    if len(points) > 1 and np.ptp(points, axis=0).max() == 0:
        raise ValueError(f"{origin}: all points are equal; drop it")
    return points


def stacked(clouds: Sequence[Array | Tensor], origin: str) -> Tensor:
    """Clouds (n, 3) of one length as (B, n, 3).

    Raises:
        ValueError: clouds of different lengths.
    """
    for number, cloud in enumerate(clouds):
        if len(cloud) != len(clouds[0]):
            raise ValueError(
                f"{origin}: cloud {number} has {len(cloud)} points, cloud 0 has {len(clouds[0])}; resample them to one number first"
            )
    return torch.stack([torch.as_tensor(cloud) for cloud in clouds])


def together(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Labelled clouds as a batch (B, n, 3), (B,): the collate function of `Clouds`."""
    clouds, labels = zip(*items, strict=True)
    return stacked(clouds, "batch"), torch.tensor(labels)


def parsed(path: Path, read: Callable[[Path], Any], what: str) -> Any:
    """`read(path)`; a file that it cannot read is named.

    Raises:
        ValueError: damaged, or not `what`.
    """
    try:
        return read(path)
    except (ValueError, KeyError, IndexError, EOFError, OSError, zipfile.BadZipFile) as err:
        raise ValueError(f"{path}: expected {what}, found a damaged or foreign file ({err}); fetch it again") from err


def _arrays(*names: str) -> Callable[[Path], tuple[Array, ...]]:
    """Reader of these entries of an npz file."""

    def read(path: Path) -> tuple[Array, ...]:
        with np.load(path, allow_pickle=False) as content:
            return tuple(content[name] for name in names)

    return read


def check_labels(labels: Array, classes: int, origin: str) -> Tensor:
    """Class numbers (n,) as int64.

    Raises:
        ValueError: one outside of 0 to classes - 1.
    """
    labels = np.asarray(labels).reshape(-1).astype(np.int64)
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(f"{origin}: label {int(labels[wrong][0])} of sample {int(wrong.argmax())}: expected 0 to {classes - 1}")
    return torch.from_numpy(labels)


class Clouds(Dataset[tuple[Tensor, int]]):
    """Labelled clouds of one split.

    Args:
        name, classes: of the data set; files: those that a record's checksum is over.
        read: number of a cloud -> its points (n, 3), normalised as the data set wants it.
        size: points of an item, drawn where a cloud has another number (missing ones are drawn twice); None: all clouds have equally many.
        train: items come in random order of points, drawn from torch's generator; else their draws depend on the number alone.
    """

    def __init__(
        self,
        name: str,
        labels: Tensor,
        classes: Sequence[str],
        read: Callable[[int], Tensor],
        *,
        files: Sequence[Path] = (),
        size: int | None = None,
        train: bool = False,
    ) -> None:
        self.name, self.labels, self.classes, self.read = name, labels, list(classes), read
        self.files, self.size, self.train = list(files), size, train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        points = self.read(index)
        generator = None if self.train else torch.Generator().manual_seed(index)
        if self.size is not None and self.size != len(points):
            points = draw(points, self.size, generator)
        elif self.train:
            points = points[torch.randperm(len(points))]
        return points, int(self.labels[index])

    def part(self, numbers: Tensor) -> Clouds:
        """The clouds of these numbers alone."""
        read = self.read
        kept = numbers.tolist()
        return Clouds(
            self.name, self.labels[numbers], self.classes, lambda i: read(kept[i]), files=self.files, size=self.size, train=self.train
        )


class Unlabelled(Dataset[Tensor]):
    """For pre-training: `count` random points of each cloud without replacement (missing ones drawn twice), then normalised."""

    def __init__(self, clouds: Clouds, count: int) -> None:
        self.clouds, self.count = clouds, count

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> Tensor:
        return normalise(draw(self.clouds.read(index), self.count, None))


def draw(points: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of the points (n, 3) in random order: without replacement if there are as many, else all and some again."""
    order = torch.randperm(len(points), generator=generator)
    if count > len(points):
        order = torch.cat([order, torch.randint(len(points), (count - len(points),), generator=generator)])
    return points[order[:count]]


# -- pickles ---------------------------------------------------------------------------------------------------------------------

_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_pickle(path: Path) -> Any:
    """Content of a pickle that holds numbers, strings, lists, dictionaries and NumPy arrays; nothing else in it is run.

    Raises:
        ValueError: it names anything else, or is damaged.
    """
    with path.open("rb") as stream:
        try:
            return _ArraysOnly(stream, encoding="latin1").load()
        except pickle.UnpicklingError as err:
            raise ValueError(f"{path}: expected a pickle of NumPy arrays and lists, found {err}; it was not loaded") from err
        except (EOFError, IndexError, AttributeError, ValueError) as err:
            raise ValueError(f"{path}: expected a pickle, found a damaged one ({err}); fetch it again") from err


def pickle_to_npz(path: Path) -> Path:
    """A ModelNet40 `.dat` as `.npz` beside it (points (n, 8192, 3) float32, labels (n,)), which `modelnet40` prefers; gives its path."""
    points, labels = _dat(path)
    target = path.with_suffix(".npz")
    with written_aside(target) as aside, aside.open("wb") as stream:
        np.savez(stream, points=points, labels=labels)
    return target


def _dat(path: Path) -> tuple[Array, Array]:
    content = read_pickle(path)
    if not isinstance(content, list | tuple) or len(content) != 2 or len(content[0]) != len(content[1]):
        raise ValueError(f"{path}: expected [list of (8192, 6) arrays, list of labels] of equal lengths, found {type(content).__name__}")
    points = stacked([check_cloud(np.asarray(cloud), f"{path}, cloud {i}") for i, cloud in enumerate(content[0])], str(path))
    return points.numpy(), np.array([int(np.asarray(label).reshape(-1)[0]) for label in content[1]])


# -- data sets of the paper --------------------------------------------------------------------------------------------------------


def shapenet55(folder: Path, split: Split, *, least: int = 1024) -> Clouds:
    """ShapeNet-55 as Point-BERT released it, (8192, 3) points a file, at least `least`; pre-training uses the training list.

    Raises:
        FileNotFoundError: no list, or a listed file is not there: the first is named, the others counted.
        ValueError: (at reading) a file that `check_cloud` refuses.
    """
    part = "test" if split == "test" else "train"
    how = "get ShapeNet55 by the links of github.com/lulutang0608/Point-BERT (DATASET.md): ShapeNet55-34/shapenet_pc/*.npy and ShapeNet-55/*.txt"
    lists = [
        folder / "ShapeNet-55" / f"{part}.txt",
        folder / "ShapeNet-55_MAE" / f"{part}.txt",
        folder / "ShapeNet55-34" / "ShapeNet-55" / f"{part}.txt",
    ]
    listed = next((path for path in lists if path.is_file()), None) or require(lists[0], "ShapeNet-55, list of files", how)
    clouds = require(folder / "ShapeNet55-34" / "shapenet_pc", "ShapeNet-55, folder of clouds", how)
    files = [clouds / line.strip() for line in listed.read_text().splitlines() if line.strip()]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"ShapeNet-55: {missing[0]} of {listed} is missing, and {len(missing) - 1} more of {len(files)}; {how}")
    synsets = [file.name.partition("-")[0] for file in files]
    classes = sorted(set(synsets))

    def read(index: int) -> Tensor:
        file = files[index]
        points = parsed(file, partial(np.load, allow_pickle=False), "a NumPy file of points (n, 3)")
        return torch.from_numpy(check_cloud(points, str(file), least=least))

    labels = torch.tensor([classes.index(synset) for synset in synsets])
    return Clouds("ShapeNet-55", labels, classes, read, files=[listed], size=None, train=split != "test")


def modelnet40(folder: Path, split: Split, *, cache: Path | None = None) -> Clouds:
    """ModelNet40 in whichever of its layouts is there: 8192-point pickles (or their .npz), text files, or the 2048-point HDF5 files.

    Text files are sampled to 8192 points by farthest points from a random start (slow, hours for all), kept in `cache` if given.
    """
    part = "test" if split == "test" else "train"
    resampled, hdf5 = folder / "ModelNet" / "modelnet40_normal_resampled", folder / "modelnet40_ply_hdf5_2048"
    names = resampled / "modelnet40_shape_names.txt"
    stored = resampled / f"modelnet40_{part}_8192pts_fps"
    kept = cache / f"modelnet40_{part}_8192pts_fps.npz" if cache is not None else None
    if stored.with_suffix(".npz").is_file() or stored.with_suffix(".dat").is_file():
        file = next(path for path in (stored.with_suffix(".npz"), stored.with_suffix(".dat")) if path.is_file())
        points, labels = _npz(file) if file.suffix == ".npz" else _dat(file)
    elif kept is not None and kept.is_file():
        file, (points, labels) = kept, _npz(kept)
    elif names.is_file():
        file = resampled / f"modelnet40_{part}.txt"
        points, labels = _from_text(resampled, part, names)
        if kept is not None:
            with written_aside(kept) as aside, aside.open("wb") as stream:
                np.savez(stream, points=points, labels=labels)
    elif hdf5.is_dir():
        return _modelnet_hdf5(hdf5, part, split)
    else:
        raise FileNotFoundError(
            f"ModelNet40: expected {stored}.dat, text files beside {names}, or {hdf5}/ply_data_{part}*.h5, found none; "
            "get them by the links of github.com/lulutang0608/Point-BERT (DATASET.md)"
        )
    classes = names.read_text().split() if names.is_file() else [str(i) for i in range(40)]
    clouds = normalise(torch.from_numpy(points))
    return Clouds(
        "ModelNet40", check_labels(labels, len(classes), str(file)), classes, clouds.__getitem__, files=[file], train=split != "test"
    )


def _npz(path: Path) -> tuple[Array, Array]:
    points, labels = parsed(path, _arrays("points", "labels"), "an npz file of points (n, N, 3) and labels (n,)")
    if points.ndim != 3 or points.shape[2] != 3 or len(points) != len(labels):
        raise ValueError(f"{path}: expected points (n, N, 3) and as many labels, found {points.shape} and {labels.shape}")
    return points, labels


def _from_text(folder: Path, part: str, names: Path) -> tuple[Array, Array]:
    classes = names.read_text().split()
    how = "the list names objects as airplane_0001, their files are airplane/airplane_0001.txt"
    listed = require(folder / f"modelnet40_{part}.txt", "ModelNet40, list of objects", how).read_text().split()
    points, labels = [], []
    for number, name in enumerate(listed):
        kind = name.rpartition("_")[0]
        if kind not in classes:
            raise ValueError(f"{folder}/modelnet40_{part}.txt: {name}: expected a class of {names.name}, found {kind}")
        path = require(folder / kind / f"{name}.txt", "ModelNet40, cloud", how)
        rows = parsed(path, partial(np.loadtxt, delimiter=",", dtype=np.float32, ndmin=2), "rows x,y,z,nx,ny,nz")
        cloud = check_cloud(rows, str(path), least=8192)
        points.append(random_start_sample(cloud, 8192, np.random.default_rng([int(part == "test"), number])))
        labels.append(classes.index(kind))
    return np.stack(points), np.array(labels)


def random_start_sample(points: Array, count: int, rng: np.random.Generator) -> Array:
    """Farthest points from a random start, none skipped near the origin: how the 8192-point files were made."""
    running = np.full(len(points), np.inf, np.float32)
    picked = [int(rng.integers(len(points)))]
    while len(picked) < count:
        np.minimum(running, ((points - points[picked[-1]]) ** 2).sum(1), out=running)
        picked.append(int(running.argmax()))
    return points[picked]


def _h5(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    try:
        import h5py
    except ImportError as err:
        raise ImportError("ScanObjectNN and ModelNet40's HDF5 files need h5py: pip install h5py") from err
    try:
        with h5py.File(path, "r") as content:
            if not {"data", "label"} <= set(content):
                raise ValueError(f"{path}: expected entries data (n, 2048, 3) and label (n,), found {sorted(content)}")
            points, labels = np.asarray(content["data"], np.float32), np.asarray(content["label"])
    except OSError as err:
        raise ValueError(f"{path}: expected an HDF5 file, found a damaged or foreign one ({err}); fetch it again") from err
    if points.ndim != 3 or points.shape[2] != 3 or len(points) != len(labels):
        raise ValueError(f"{path}: expected data (n, N, 3) and as many labels, found {points.shape} and {labels.shape}")
    for number, cloud in enumerate(points):
        check_cloud(cloud, f"{path}, cloud {number}")
    return torch.from_numpy(points), check_labels(labels, classes, str(path))


def _modelnet_hdf5(folder: Path, part: str, split: Split) -> Clouds:
    files = sorted(folder.glob(f"ply_data_{part}*.h5"))
    if not files:
        raise FileNotFoundError(f"ModelNet40: expected {folder}/ply_data_{part}0.h5 and further, found none; get modelnet40_ply_hdf5_2048")
    read = [_h5(file, 40) for file in files]
    names = folder / "shape_names.txt"
    classes = names.read_text().split() if names.is_file() else [str(i) for i in range(40)]
    clouds = normalise(torch.cat([points for points, _ in read]))
    labels = torch.cat([labels for _, labels in read])
    return Clouds("ModelNet40 (HDF5, 2048 points)", labels, classes, clouds.__getitem__, files=files, train=split != "test")


def few_shot(folder: Path, way: int, shot: int, fold: int) -> tuple[Clouds, Clouds]:
    """Training and test clouds of one fold of ModelNet40 few-shot: `<W>way_<S>shot/<fold>.pkl`, or `<W>way<S>shot/`; labels 0 to way - 1.

    Raises:
        FileNotFoundError: no such fold, or no such way and shot.
        ValueError: counts other than way * shot and way * 20, or labels out of range.
    """
    base = folder / "ModelNetFewshot"
    places = [base / f"{way}way_{shot}shot" / f"{fold}.pkl", base / f"{way}way{shot}shot" / f"{fold}.pkl"]
    path = next((path for path in places if path.is_file()), None) or require(
        places[0], f"ModelNet40 few-shot, fold {fold} of 0 to 9", "get it by the links of github.com/lulutang0608/Point-BERT (DATASET.md)"
    )
    content = read_pickle(path)
    if not isinstance(content, dict) or not {"train", "test"} <= set(content):
        raise ValueError(f"{path}: expected a dictionary with train and test, found {type(content).__name__}")
    out = []
    for part, count in (("train", way * shot), ("test", way * 20)):
        rows = content[part]
        if len(rows) != count:
            raise ValueError(f"{path}: {part}: expected {count} clouds for {way}-way {shot}-shot, found {len(rows)}")
        if not all(isinstance(row, tuple | list) and len(row) >= 2 for row in rows):
            raise ValueError(f"{path}: {part}: expected rows (points, label, class id), found others")
        points = stacked([check_cloud(np.asarray(row[0]), f"{path}, {part} cloud {i}") for i, row in enumerate(rows)], f"{path}, {part}")
        labels = check_labels(np.array([int(row[1]) for row in rows]), way, f"{path}, {part}")
        clouds = normalise(points)
        name = f"ModelNet40 few-shot, {way}-way {shot}-shot"
        out.append(Clouds(name, labels, [str(i) for i in range(way)], clouds.__getitem__, files=[path], train=part == "train"))
    return out[0], out[1]


def scanobjectnn(folder: Path, variant: Literal["bg", "only", "hardest"], split: Split) -> Clouds:
    """ScanObjectNN OBJ-BG, OBJ-ONLY or PB-T50-RS, 2048 points, coordinates as they are (not normalised)."""
    part = "test" if split == "test" else "training"
    base = folder / "ScanObjectNN" / ("main_split_nobg" if variant == "only" else "main_split")
    end = "_augmentedrot_scale75" if variant == "hardest" else ""
    how = "ask for it at hkust-vgd.github.io/scanobjectnn (terms of use) and put h5_files' main_split and main_split_nobg into ScanObjectNN"
    path = require(base / f"{part}_objectdataset{end}.h5", f"ScanObjectNN, {variant}", how)
    points, labels = _h5(path, len(SCAN_CLASSES))
    title = {"bg": "OBJ-BG", "only": "OBJ-ONLY", "hardest": "PB-T50-RS"}[variant]
    return Clouds(f"ScanObjectNN {title}", labels, SCAN_CLASSES, points.__getitem__, files=[path], train=split != "test")


class Parts(Dataset[tuple[Tensor, int, Tensor]]):
    """Clouds with a category and a part a point: (points (count, 3), category, parts (count,)).

    Points are drawn with replacement at every access, in testing too, where the draw depends on the number alone.

    Args:
        read: number -> points (n, 3) normalised, parts (n,).
        parts: part ids of each category, in the order of the category numbers.
    """

    def __init__(
        self,
        name: str,
        categories: Tensor,
        parts: dict[str, range],
        read: Callable[[int], tuple[Tensor, Tensor]],
        *,
        count: int,
        train: bool,
        files: Sequence[Path] = (),
    ) -> None:
        self.name, self.categories, self.parts, self.read = name, categories, parts, read
        self.count, self.train, self.files = count, train, list(files)

    def __len__(self) -> int:
        return len(self.categories)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        points, parts = self.read(index)
        generator = None if self.train else torch.Generator().manual_seed(index)
        pick = torch.randint(len(points), (self.count,), generator=generator)
        return points[pick], int(self.categories[index]), parts[pick]


def shapenet_part(folder: Path, split: Split, *, count: int = 2048) -> Parts:
    """ShapeNetPart: training and validation lists together for "train".

    Raises:
        FileNotFoundError: a list or a listed file is missing.
        ValueError: rows without 7 columns, or a part outside of its category's.
    """
    base = folder / "shapenetcore_partanno_segmentation_benchmark_v0_normal"
    how = "get shapenetcore_partanno_segmentation_benchmark_v0_normal.zip from shapenet.cs.stanford.edu/media and unpack it there"
    lines = require(base / "synsetoffset2category.txt", "ShapeNetPart, categories", how).read_text().splitlines()
    order = {line.split()[1]: number for number, line in enumerate(line for line in lines if line.strip())}
    names = [line.split()[0] for line in lines if line.strip()]
    if names != list(PARTS):
        raise ValueError(f"{base}/synsetoffset2category.txt: expected the 16 categories {', '.join(PARTS)}, found {', '.join(names)}")
    lists = [base / "train_test_split" / f"shuffled_{part}_file_list.json" for part in (["test"] if split == "test" else ["train", "val"])]
    files = [
        file
        for path in lists
        for file in parsed(
            require(path, "ShapeNetPart, list of objects", how),
            lambda path: [base / f"{Path(entry).parts[1]}/{Path(entry).parts[2]}.txt" for entry in json.loads(path.read_text())],
            "a JSON list of shape_data/<synset>/<id>",
        )
    ]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"ShapeNetPart: {missing[0]} is missing, and {len(missing) - 1} more of {len(files)}; {how}")
    categories = torch.tensor([order[file.parent.name] for file in files])
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def read(index: int) -> tuple[Tensor, Tensor]:
        if index not in kept:
            rows = parsed(files[index], partial(np.loadtxt, dtype=np.float32, ndmin=2), "rows x y z nx ny nz part")
            if rows.shape[1] != 7:
                raise ValueError(f"{files[index]}: expected rows x y z nx ny nz part, found {rows.shape[1]} columns")
            ids = list(PARTS.values())[int(categories[index])]
            parts = rows[:, 6].astype(np.int64)
            if ((parts < ids.start) | (parts >= ids.stop)).any():
                wrong = int(parts[(parts < ids.start) | (parts >= ids.stop)][0])
                raise ValueError(f"{files[index]}: part {wrong}: expected {ids.start} to {ids.stop - 1} of {names[int(categories[index])]}")
            kept[index] = normalise(torch.from_numpy(check_cloud(rows, str(files[index])))), torch.from_numpy(parts)
        return kept[index]

    return Parts("ShapeNetPart", categories, PARTS, read, count=count, train=split != "test", files=lists)


# -- small real sets -----------------------------------------------------------------------------------------------------------------


def lidarnet(folder: Path, split: Split, *, size: int = 512) -> Clouds:
    """724 objects of a street seen by LiDAR (bush, car, pedestrian, pole), each normalised; see `whole_runs` for the split."""
    path = require(
        folder / "lidarnet" / "lidarnet_objects.npz", "LiDARNet objects", "the file lidarnet_objects.npz of this repository's shared data"
    )
    xyz, offset, labels, classes = parsed(path, _arrays("xyz", "offset", "label", "class_names"), "an npz file of objects")
    clouds = [xyz[offset[i] : offset[i + 1]] for i in range(len(labels))]
    train, test = whole_runs(clouds, labels)
    numbers = test if split == "test" else train
    read = [normalise(torch.from_numpy(check_cloud(clouds[i], f"{path}, object {i}"))) for i in numbers]
    kept = check_labels(labels[numbers], len(classes), str(path))
    return Clouds("LiDARNet", kept, classes.tolist(), read.__getitem__, files=[path], size=size, train=split != "test")


def whole_runs(clouds: Sequence[Array], labels: Array, *, runs: int = 8, guard: int = 10) -> tuple[list[int], list[int]]:
    """Split by runs of successive files, so that scans of one object (its track) stay on one side: (training numbers, test numbers).

    Successive files of a class are often the same object a moment later, sometimes two objects in turn, sometimes copies. Each class is cut into
    `runs` runs of successive files; every fourth is tested. Training objects within `guard` files of a tested run are left out, and so is every
    exact copy: of a tested object anywhere, and a second one inside a side.
    """
    train, test = [], []
    for label in np.unique(labels):
        numbers = np.flatnonzero(labels == label)
        run = np.arange(len(numbers)) * runs // len(numbers)
        tested = run % 4 == 1
        places = np.flatnonzero(tested)
        near = np.abs(np.arange(len(numbers))[:, None] - places).min(1) <= guard
        test += numbers[tested].tolist()
        train += numbers[~tested & ~near].tolist()
    seen: set[bytes] = set()
    kept: list[list[int]] = []
    for side in (test, train):
        fresh = []
        for number in side:
            key = np.ascontiguousarray(clouds[number]).tobytes()
            if key not in seen:
                fresh.append(number)
            seen.add(key)
        kept.append(fresh)
    return kept[1], kept[0]


def modelnet10_voxels(folder: Path, split: Split, *, size: int = 1024, least: int = 200) -> Clouds:
    """Chairs and monitors of ModelNet10 as voxels of 32^3: centres of surface voxels, each moved by up to half a voxel, normalised.

    Surface voxels have an empty one of their six neighbours; grids with fewer than `least` of them are dropped. Every fourth object of a class is tested;
    a training grid equal to a tested one is left out.
    """
    path = require(
        folder / "modelnet10_voxels" / "chair_monitor_32.npz",
        "ModelNet10 voxels",
        "the file chair_monitor_32.npz of this repository's shared data",
    )
    bits, labels, classes = parsed(path, _arrays("voxels", "label", "class_names"), "an npz file of packed voxels")
    tested = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        tested[np.flatnonzero(labels == label)[3::4]] = True
    copies = {bits[i].tobytes() for i in np.flatnonzero(tested)}
    clouds, kept = [], []
    for number in np.flatnonzero(tested if split == "test" else ~tested):
        if split != "test" and bits[number].tobytes() in copies:
            continue
        surface = surface_voxels(np.unpackbits(bits[number]).reshape(32, 32, 32).astype(bool))
        if len(surface) >= least:
            jitter = np.random.default_rng(int(number)).uniform(-0.5, 0.5, surface.shape)
            clouds.append(normalise(torch.from_numpy((surface + jitter).astype(np.float32))))
            kept.append(int(number))
    return Clouds(
        "ModelNet10 voxels (chair, monitor)",
        check_labels(labels[kept], len(classes), str(path)),
        classes.tolist(),
        clouds.__getitem__,
        files=[path],
        size=size,
        train=split != "test",
    )


def surface_voxels(grid: Array) -> Array:
    """(n, 3) indices of occupied voxels of a bool grid with an empty neighbour among six; outside counts as empty."""
    padded = np.pad(grid, 1)
    inner = np.ones_like(grid)
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(grid & ~inner)


# -- by name ---------------------------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Clouds of each split of the generated sets."""

    pretrain: int = COUNTS["pretrain"]
    train: int = COUNTS["train"]
    test: int = COUNTS["test"]


def _generated(name: str, split: Split, seed: int, sizes: Sizes) -> Solids:
    return solids(split, getattr(sizes, split), seed=seed, variant="hard" if name == "solids-hard" else "plain")


def load(
    name: Name, split: Split, *, data_root: str | None = None, size: int | None = None, seed: int = 0, sizes: Sizes | None = None
) -> Clouds:
    """A split of a data set; "pretrain" is the training split where a set has no unlabelled one of its own.

    Args:
        size: points of an item, for the sets whose clouds differ in number (default: theirs); least points of a cloud of ShapeNet-55.
        seed, sizes: of the generated sets.
    """
    if name in GENERATED:
        made = _generated(name, split, seed, sizes or Sizes())
        return Clouds(name, made.labels, list(SOLIDS), made.points.__getitem__, train=split != "test")
    folder = root(data_root)
    if name.startswith("scanobjectnn-"):
        variant: Any = name.removeprefix("scanobjectnn-")
        return scanobjectnn(folder, variant, split)
    if name in ("lidarnet", "modelnet10-voxels"):
        small = lidarnet if name == "lidarnet" else modelnet10_voxels
        return small(folder, split, **({} if size is None else {"size": size}))
    if name == "modelnet40":
        return modelnet40(folder, split, cache=Path.home() / ".cache" / "contramask" / "point_cmae")
    if name == "shapenet55":
        return shapenet55(folder, split, **({} if size is None else {"least": size}))
    raise ValueError(f"data={name!r}: expected one of {', '.join(Name.__args__)}")  # type: ignore[attr-defined]


def load_parts(
    name: Literal["shapenet-part", "solids"],
    split: Split,
    *,
    count: int = 2048,
    data_root: str | None = None,
    seed: int = 0,
    sizes: Sizes | None = None,
) -> Parts:
    """A split of a part data set, `count` points an item."""
    if name == "shapenet-part":
        return shapenet_part(root(data_root), split, count=count)
    made = _generated("solids", split, seed, sizes or Sizes())
    return Parts("solids", made.labels, SOLID_PARTS, lambda i: (made.points[i], made.parts[i]), count=count, train=split != "test")
