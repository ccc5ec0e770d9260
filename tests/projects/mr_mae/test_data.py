"""Drawn parts, files on disk, and the views of pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from projects.mr_mae import parts
from projects.mr_mae.data import Pictures, Views, centre, crop_box, load, view
from projects.mr_mae.teachers import IMAGENET


def jpeg(colour: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(out, "JPEG")
    return out.getvalue()


# -- drawn parts


def test_a_drawn_picture_depends_on_its_seed_and_number_alone() -> None:
    some, more = parts.draw(6, 3), parts.draw(4, 3, 2, 4, 3)
    assert torch.equal(some.images[2:], more.images)
    for a, b in zip(some, more, strict=True):
        torch.testing.assert_close(a[2:], b)
    assert not torch.equal(some.images, parts.draw(6, 4).images)
    assert (some.images.shape, some.images.dtype) == ((6, 3, 64, 64), torch.uint8)


def test_the_oracle_knows_class_and_place_and_little_of_the_pixels() -> None:
    drawn = parts.draw(300, 0)
    assert drawn.labels.unique().numel() == 10
    torch.testing.assert_close(drawn.score.sum(1), torch.ones(300))
    tokens = parts.oracle(drawn)
    assert tokens.shape == (300, 16, 96)
    top = drawn.score.argmax(1)
    features = tokens[torch.arange(300), top]  # the patch that shows most of the object
    kinds = torch.stack([features[drawn.labels == label].mean(0) for label in range(10)])
    assert (torch.cdist(features, kinds).argmin(1) == drawn.labels).float().mean() > 0.6
    assert torch.equal(tokens, parts.oracle(drawn))
    share = drawn.semantics[..., 0]
    assert (drawn.score[share > 0.999] < 1e-3).all()  # background patches have no attention


# -- files


def write_parquet(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)


def test_parquet_pictures_come_in_order_with_their_checksum(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": jpeg((200, 0, 0) if i % 2 else (0, 0, 200)), "path": f"{i}.jpg"}, "label": i % 2} for i in range(6)]
    write_parquet(tmp_path / "cifar10", "train.parquet", rows)
    pictures = load("cifar10", "train", data_root=str(tmp_path))
    assert pictures.labels.tolist() == [0, 1] * 3
    assert pictures.images[1][0].float().mean() > 190
    assert len(pictures.about["sha256"]) == 64
    few = load("cifar10", "train", data_root=str(tmp_path), limit=4)
    assert (len(few), few.about["split"]) == (4, "train, 4 pictures")
    assert torch.equal(few.images[0], pictures.images[int(torch.randperm(6, generator=torch.Generator().manual_seed(0))[0])])


def test_unreadable_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar10, train: expected .*train.parquet"):
        load("cifar10", "train", data_root=str(tmp_path))
    write_parquet(tmp_path / "cifar10", "train.parquet", [{"image": {"bytes": b"no picture", "path": "3.jpg"}, "label": 0}])
    with pytest.raises(ValueError, match=r"row 0 \(3.jpg\): expected an image"):
        load("cifar10", "train", data_root=str(tmp_path))


def test_tiny_imagenet_is_read_as_hugging_face_writes_it(tmp_path: Path) -> None:
    label = {"_type": "ClassLabel", "names": ["goldfish", "centipede"]}
    about = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}
    (tmp_path / "tinyimagenet").mkdir()
    modes = {"n01443537_0.JPEG": jpeg((200, 0, 0), "RGB", (64, 64)), "n01784675_0.JPEG": jpeg((9,), "L", (64, 64))}
    rows = [{"image": {"bytes": content, "path": path}, "label": i} for i, (path, content) in enumerate(modes.items())]
    for name, chosen in (("train", rows), ("val", rows[1:])):
        pq.write_table(pa.Table.from_pylist(chosen).replace_schema_metadata(about), tmp_path / "tinyimagenet" / f"{name}.parquet")
    train, test = (load("tinyimagenet", split, data_root=str(tmp_path)) for split in ("train", "test"))
    assert (train.images.shape, train.images.dtype, train.labels.tolist()) == ((2, 3, 64, 64), torch.uint8, [0, 1])
    assert (test.labels.tolist(), test.classes) == ([1], ["goldfish", "centipede"])  # classes that a split lacks count too
    assert torch.equal(test.images[0, 0], test.images[0, 2])  # grey stays grey in three channels
    assert train.about["sha256"] != test.about["sha256"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"picture": 1, "label": 0}, r"expected the columns image and label, found no image; see README, Data"),
        ({"image": {"bytes": jpeg((1, 2, 3)), "path": "a"}, "label": -1}, r"expected labels 0 to 0, found -1 to 0"),
        (
            {"image": {"bytes": jpeg((1, 2, 3), "RGB", (9, 9)), "path": "a"}, "label": 0},
            r"row 1 \(a\): expected \(3, 6, 8\) .*found \(3, 9, 9\)",
        ),
    ],
)
def test_wrong_parquet_files_are_explained(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"image": {"bytes": jpeg((1, 2, 3)), "path": "b"}, "label": 0}
    write_parquet(tmp_path / "tinyimagenet", "train.parquet", [row] if "picture" in row else [good, row])
    with pytest.raises(ValueError, match=message):
        load("tinyimagenet", "train", data_root=str(tmp_path))


def folders(root: Path, layout: dict[str, list[str]]) -> Path:
    for name, files in layout.items():
        (root / "imagenet" / name).mkdir(parents=True)
        for number, file in enumerate(files):
            (root / "imagenet" / name / file).write_bytes(jpeg((10,), "L") if number else jpeg((9, 9, 9, 9), "CMYK", (40, 30)))
    return root


def test_class_folders_are_read_as_rgb_whatever_their_mode(tmp_path: Path) -> None:
    root = folders(tmp_path, {"train/n01": ["a.JPEG", "b.JPEG"], "train/n02": ["c.JPEG"], "val/n01": ["d.JPEG"], "val/n02": ["e.JPEG"]})
    train = load("imagenet", "train", data_root=str(root))
    assert (train.labels.tolist(), train.classes) == ([0, 0, 1], ["n01", "n02"])
    assert [tuple(train.images[i].shape) for i in range(3)] == [(3, 30, 40), (3, 6, 8), (3, 30, 40)]
    assert centre(train.images[0], 16).shape == (3, 16, 16)
    assert load("imagenet", "test", data_root=str(root)).labels.tolist() == [0, 1]
    (root / "imagenet/train/n01/a.JPEG").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"a.JPEG: expected a picture"):
        train.images[0]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"train": ["a.JPEG"], "val/n01": ["b.JPEG"]}, r"expected one sub-folder a class with pictures inside, found none"),
        ({"train/n01": [], "val/n01": ["b.JPEG"]}, r"found none in \['n01'\]"),
        ({"train/n01": ["a.JPEG"], "val/n02": ["b.JPEG"]}, r"expected the same classes in train and val, found 2 in one only"),
        ({"train/n01": ["a.JPEG"], "val": ["b.JPEG"]}, r"val: expected one sub-folder a class"),
    ],
)
def test_wrong_folders_are_explained(tmp_path: Path, layout: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("imagenet", "train", data_root=str(folders(tmp_path, layout)))
    with pytest.raises(FileNotFoundError, match=r"<root>/imagenet/\{train,val\}/<class>"):
        load("imagenet", "train", data_root=str((tmp_path / "elsewhere").mkdir() or tmp_path / "elsewhere"))


def test_real_cifar10_has_fifty_thousand_pictures(shared_data: Path) -> None:
    test = load("cifar10", "test", data_root=str(shared_data), limit=None)
    assert (test.images.shape, test.labels.bincount().tolist()) == ((10_000, 3, 32, 32), [1000] * 10)


def test_real_tiny_imagenet_has_twenty_classes(shared_data: Path) -> None:
    train, test = (load("tinyimagenet", split, data_root=str(shared_data)) for split in ("train", "test"))
    assert (train.images.shape, train.labels.bincount().tolist()) == ((4000, 3, 64, 64), [200] * 20)
    assert (test.images.shape, test.labels.bincount().tolist()) == ((1000, 3, 64, 64), [50] * 20)
    assert (len(test.classes), test.classes[0], test.classes[-1]) == (20, "goldfish", "meat loaf")


# -- views


def test_pictures_that_no_crop_fits_give_their_largest_middle() -> None:
    assert crop_box(12, 100, scale=(1.0, 1.0)) == (0, 42, 12, 16)
    assert crop_box(100, 12, scale=(1.0, 1.0)) == (42, 0, 16, 12)


def test_crops_keep_to_scale_aspect_and_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    for reject in (True, False):
        boxes = [crop_box(40, 60, scale=(0.2, 1.0), reject=reject, generator=generator) for _ in range(300)]
        assert all(t >= 0 and t + h <= 40 and left >= 0 and left + w <= 60 for t, left, h, w in boxes)
        shares = torch.tensor([h * w / 2400 for _, _, h, w in boxes])
        assert 0.18 < shares.min() < 0.3
        aspects = torch.tensor([w / h for _, _, h, w in boxes])
        assert aspects.min() > 0.7
        assert aspects.max() < (1.6 if reject else 1.9)


def pictures() -> Pictures:
    images = torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Pictures(images, torch.arange(5), list("abcde"), {})


def test_views_by_kind() -> None:
    image = pictures().images[0]
    assert torch.equal(view(image, 16, "none"), image)
    seen = {tuple(view(image, 16, "flip", generator=torch.Generator().manual_seed(s)).flatten()[:3].tolist()) for s in range(8)}
    assert len(seen) == 2
    assert view(image, 8, "crop").shape == (3, 8, 8)


def test_fixed_views_are_the_same_each_time_and_their_features_are_found() -> None:
    class Store:
        def __getitem__(self, index: int) -> Any:
            from projects.mr_mae.teachers import Features

            return Features(torch.full((4, 2), float(index)), None)

    data = Views(pictures(), 16, "crop", IMAGENET, fixed=3, stores=[Store()])  # type: ignore[list-item]
    for _ in range(12):
        item = data[4]
        number = int(item["tokens"][0][0, 0]) - 4 * 3
        assert torch.equal(item["images"], data.fixed_view(4, number))
    assert "score" not in item
    assert not torch.equal(data.fixed_view(4, 0), data.fixed_view(4, 1))
    with pytest.raises(ValueError, match="expected a number of fixed views"):
        Views(pictures(), 16, "crop", stores=[Store()])  # type: ignore[list-item]
