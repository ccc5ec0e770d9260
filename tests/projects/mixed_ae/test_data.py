"""Textured objects, readers, groups of a batch, and what is said of data that does not serve."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from projects.mixed_ae.data import (
    Name,
    Samples,
    Scenes,
    Split,
    batches,
    check_labelled,
    folder,
    load,
    normalised,
    parquet,
    textured,
    textured_object,
)


def test_textured_objects_depend_on_seed_and_number_alone() -> None:
    image, label, mask = textured_object(3, 5)
    again, same, _ = textured_object(3, 5)
    assert np.array_equal(image, again)
    assert label == same
    assert not np.array_equal(image, textured_object(4, 5)[0])
    assert (image.shape, image.dtype, mask.shape) == ((3, 64, 64), np.uint8, (64, 64))
    for number in range(30):
        _, label, mask = textured_object(0, number)
        assert 0 <= label < 8
        assert 0.145 < mask.mean() < 0.405
    split = textured(3, 3, first=4)
    assert torch.equal(split.pixels[1], torch.from_numpy(image))
    torch.testing.assert_close(split.objects.mean(1)[1], torch.tensor(float(textured_object(3, 5)[2].mean())))


def test_object_and_background_differ_in_hue_and_related_images_share_a_scene() -> None:
    image, _, mask = textured_object(0, 1)
    inside, outside = image[:, mask].mean(1), image[:, ~mask].mean(1)
    assert np.abs(inside - outside).max() > 25

    def corners(related: float) -> float:
        patches = np.stack([textured_object(0, n, related=related)[0][:, :8, :8].astype(float).mean((1, 2)) for n in range(80)])
        members = patches.reshape(20, 4, 3)
        return float(members.mean(1).var(0).sum() / patches.var(0).sum())  # share of the variance that lies between groups

    assert corners(0.9) > 0.6 > 0.4 > corners(0.0)


def _jpeg(value: int, size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).save(stream, "JPEG")  # grey: becomes three channels
    return stream.getvalue()


def test_folders_with_classes_or_without(tmp_path: Path) -> None:
    for kind, values in {"b": (10,), "a": (200, 90)}.items():
        (tmp_path / "x" / "train" / kind).mkdir(parents=True)
        for value in values:
            (tmp_path / "x" / "train" / kind / f"{value}.JPEG").write_bytes(_jpeg(value))
    split = folder(tmp_path / "x" / "train")
    assert split.labels.tolist() == [0, 0, 1]
    assert [int(split.image(i).float().mean().round()) for i in range(3)] == [200, 90, 10]
    assert split.image(0).shape == (3, 8, 8)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.jpg").write_bytes(_jpeg(7))
    train, test = load("folder", data_root=str(tmp_path), where="flat")
    assert train.labels.tolist() == test.labels.tolist() == [-1]
    bare, _ = load("folder", data_root=str(tmp_path), where="x/train")  # classes, but no train and val: the same images would be the test
    assert bare.labels.tolist() == [-1] * 3
    with pytest.raises(ValueError, match=r"train: expected labels.*serve pre-training alone"):
        check_labelled(bare)
    (tmp_path / "x" / "val" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"expected the same classes in train and val, found 1 in one alone \(a\)"):
        load("folder", data_root=str(tmp_path), where="x")
    (tmp_path / "x" / "val" / "a").mkdir()
    (tmp_path / "x" / "val" / "b" / "1.png").write_bytes(_jpeg(5))
    assert load("folder", data_root=str(tmp_path), where="x")[1].labels.tolist() == [1]
    image, label = Samples(train, 16, "crop")[0]
    assert (image.shape, int(label)) == ((3, 16, 16), -1)
    assert Samples(train, 16, "centre")[0][0].shape == (3, 16, 16)


def test_files_that_do_not_serve_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected images"):
        folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        folder(tmp_path / "nowhere")
    (tmp_path / "bad.jpg").write_bytes(_jpeg(7)[:80])
    with pytest.raises(ValueError, match=r"bad\.jpg: expected an image that Pillow reads"):
        folder(tmp_path).image(0)
    with pytest.raises(FileNotFoundError, match=r"train\.parquet"):
        load("cifar10", data_root=str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"train\.parquet: expected a Parquet file with columns image"):
        load("cifar10", data_root=str(tmp_path))


def write_parquet(path: Path, cells: list[bytes], labels: list[int], names: list[str]) -> Path:
    """The format of the shared files: Hugging Face features, image = struct of bytes and path."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [{"bytes": cell, "path": f"{i}.JPEG"} for i, cell in enumerate(cells)], "label": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.mark.parametrize(("name", "test", "side", "classes"), [("tinyimagenet", "val", 64, 20), ("cifar10", "test", 32, 10)])
def test_parquet_files_are_read_in_their_real_format(name: Name, test: str, side: int, classes: int, tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(classes)]
    write_parquet(tmp_path / name / "train.parquet", [_jpeg(30, side), _jpeg(220, side)], [classes - 1, 0], names)
    write_parquet(tmp_path / name / f"{test}.parquet", [_jpeg(90, side)], [3], names)
    train, held = load(name, data_root=str(tmp_path))
    assert (train.pixels.shape, train.pixels.dtype, held.pixels.shape) == ((2, 3, side, side), torch.uint8, (1, 3, side, side))
    assert train.pixels.float().mean((1, 2, 3)).round().tolist() == [30, 220]
    assert (train.labels.tolist(), held.labels.tolist()) == ([classes - 1, 0], [3])
    assert len(train.sha256) == 64
    assert train.sha256 != held.sha256


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with pytest.raises(ValueError, match="row 1: expected an image"):
        parquet(write_parquet(path, [_jpeg(30), b"no image"], [0, 0], ["a"]), "two")
    with pytest.raises(ValueError, match=r"row 1: expected \(8, 8\) pixels as in row 0, found \(16, 16\); bring all to one size"):
        parquet(write_parquet(path, [_jpeg(30), _jpeg(30, 16)], [0, 0], ["a"]), "two")
    with pytest.raises(ValueError, match="expected images, found no row"):
        parquet(write_parquet(path, [], [], ["a"]), "none")


def test_batches_hold_whole_groups() -> None:
    samples = Samples(textured(10, 0, size=16, patch=4), 16, "none")
    loader = batches(samples, 4, 4)
    assert [batch.shape for batch in loader] == [(4, 3, 16, 16)] * 2  # the last two images are dropped
    with pytest.raises(ValueError, match="batch_size of 6 images: expected whole groups of 4; the nearest valid size is 8"):
        batches(samples, 6, 4)
    with pytest.raises(ValueError, match=r"expected at least 12 images \(one batch\), found 10"):
        batches(samples, 12, 4)
    torch.testing.assert_close(
        normalised(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))[0, :, 0, 0] * torch.tensor([0.229, 0.224, 0.225]),
        1 - torch.tensor([0.485, 0.456, 0.406]),
    )


def test_scenes_stay_together() -> None:
    sampler = Scenes(14, 4)
    sampler.generator = torch.Generator().manual_seed(0)
    order = torch.tensor(list(sampler)).view(-1, 4)
    assert len(sampler) == 12
    assert torch.equal(order % 4, torch.arange(4).expand(3, 4))
    assert sorted(order[:, 0].tolist()) == [0, 4, 8]


def test_a_group_of_one_image_over_and_over_is_warned_of() -> None:
    pixels = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    pixels[4:] = torch.arange(4)[:, None, None, None]
    loader = batches(Samples(Split("twins", pixels[:4], torch.zeros(4, dtype=torch.int64)), 4, "none"), 4, 4)
    with pytest.warns(UserWarning, match="all 4 images of a group are identical"):
        list(loader)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(batches(Samples(Split("apart", pixels[4:], torch.zeros(4, dtype=torch.int64)), 4, "none"), 4, 4))
        list(batches(Samples(Split("MAE", pixels[:4], torch.zeros(4, dtype=torch.int64)), 4, "none"), 4, 1))


def test_the_real_tiny_imagenet_file(shared_data: Path) -> None:
    split = parquet(shared_data / "tinyimagenet" / "val.parquet", "Tiny-ImageNet")
    assert (len(split), split.pixels.shape[1:]) == (1000, (3, 64, 64))
    assert split.labels.bincount().tolist() == [50] * 20
