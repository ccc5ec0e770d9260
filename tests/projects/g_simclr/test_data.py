"""Readers on files written here: parquet, image folders, CIFAR-10's own format; and what each refuses. Keras checkpoints likewise."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common import results
from projects.g_simclr import data, evaluate, pretrain
from projects.g_simclr.autoencoder import DenoisingAutoencoder
from projects.g_simclr.data import decode, digits, load, read_folder, read_parquet
from projects.g_simclr.encoders import CifarResNet, KerasResNet50
from projects.g_simclr.model import GSimCLR
from projects.g_simclr.weights import canonical, keras_layers, load_reference, names, read_h5


def encoded(colour: tuple[int, ...] = (200, 10, 30), size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, kind)
    return stream.getvalue()


def write_parquet(path: Path, contents: list[bytes], labels: list[int] | None = None) -> Path:
    import datasets

    features: dict[str, Any] = {"image": datasets.Image()}
    columns: dict[str, Any] = {"image": [{"bytes": content, "path": None} for content in contents]}
    if labels is not None:
        features["label"], columns["label"] = datasets.ClassLabel(names=["cat", "dog"]), labels
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(path))
    return path


def write_folder(folder: Path, names: list[str], size: tuple[int, int] = (8, 8)) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded((number, 2 * number, 3), size))
    return folder


def test_digits_are_split_once() -> None:
    first, again = digits(), digits()
    assert (len(first.train), len(first.test), int(first.train.pixels.max()), first.train.full) == (1400, 397, 16, 16)
    assert first.train.order == again.train.order != digits(seed=1).train.order
    assert float(first.train.floats(first.train.pixels).max()) == 1.0
    train, held_out = first.held_out()
    assert (len(train), len(held_out)) == (1260, 140)
    assert train.order != first.held_out(seed=1)[0].order


def test_parquet_gives_bytes_labels_and_class_names(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_parquet(root / "train.parquet", [encoded((1, 2, 3)), encoded((4, 5, 6))], [1, 0])
    write_parquet(root / "test.parquet", [encoded((7, 8, 9))], [1])
    for _ in range(2):  # decoded, then from the cache
        found = load("pets", data_root=str(tmp_path), cache=str(tmp_path / "cache"))
        assert found.train.pixels[:, :, 0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert (found.train.known().tolist(), found.train.classes, len(found.test)) == ([1, 0], ["cat", "dog"], 1)
    assert not list(root.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["b/1.png", "a/2.png", "a/1.png"], ["a", "b"], [0, 0, 1]),
        (["dog_1.png", "cat_x_1.png", "dog_2.png"], ["cat", "dog"], [0, 1, 1]),
        (["1.png", "2.png"], [], None),
    ],
)
def test_folders_name_their_classes_or_none(tmp_path: Path, names: list[str], classes: list[str], labels: list[int] | None) -> None:
    found = read_folder(write_folder(tmp_path, names))
    assert found.classes == classes
    assert (found.labels is None) if labels is None else (found.known().tolist() == labels)
    if labels is None:
        with pytest.raises(ValueError, match="expected labels for the probes, found none"):
            found.known()


def test_a_folder_under_the_root_is_read_and_resized(tmp_path: Path) -> None:
    write_folder(tmp_path / "five" / "train", ["a_1.png", "b_2.png"], (12, 6))
    write_folder(tmp_path / "five" / "test", ["a_1.png", "b_9.png"], (5, 9))
    with pytest.raises(ValueError, match=r"b_2|one size|sizes") as refused:
        read_folder(
            write_folder(tmp_path / "mixed", ["a_1.png"], (4, 4)) and write_folder(tmp_path / "mixed", ["a_2.png", "a_3.png"], (5, 4))
        )
    assert "set image_size" in str(refused.value)
    found = load("five", data_root=str(tmp_path), image_size=8, cache=str(tmp_path / "cache"))
    assert found.train.pixels.shape == (2, 3, 8, 8)
    assert found.train.pixels[1, :, 0, 0].tolist() == [1, 2, 3]


def test_the_python_version_of_cifar10_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        rows = np.full((2, 3072), number, dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [number, 9 - number]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    found = load("cifar10", data_root=str(tmp_path))
    assert (found.train.pixels.shape, found.test.known().tolist()) == ((10, 3, 32, 32), [5, 4])
    with pytest.raises(ValueError, match="found image_size=16"):
        load("cifar10", data_root=str(tmp_path), image_size=16)
    (folder / "data_batch_3").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="expected CIFAR-10's Python version, found other files"):
        load("cifar10", data_root=str(tmp_path))


@pytest.mark.parametrize(("mode", "colour"), [("L", 90), ("CMYK", (0, 0, 0, 0)), ("RGBA", (9, 8, 7, 100))])
def test_other_colour_modes_become_rgb(mode: str, colour: Any) -> None:
    image = decode(encoded(colour, mode=mode, kind="TIFF"), "it")
    assert image.shape == (3, 8, 8)
    assert image[:, 0, 0].tolist() == {"L": [90] * 3, "CMYK": [255] * 3, "RGBA": [9, 8, 7]}[mode]


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    whole = encoded(size=(64, 64), kind="JPEG")
    path = write_parquet(tmp_path / "train.parquet", [encoded(), whole[: len(whole) // 2]])
    with pytest.raises(ValueError, match=r"train\.parquet, row 1: expected an image"):
        read_parquet(path, cache=tmp_path)
    folder = write_folder(tmp_path / "folder", ["a_1.png"])
    (folder / "a_2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a_2\.png: expected an image"):
        read_folder(folder)


def test_bad_collections_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected image files"):
        read_folder(tmp_path / "empty")
    folder = write_folder(tmp_path / "one", ["a/1.png"])
    (folder / "b").mkdir()
    with pytest.raises(ValueError, match="class b holds no image"):
        read_folder(folder)
    with pytest.raises(ValueError, match="side by side"):
        read_folder(write_folder(tmp_path / "both", ["a/1.png", "c.png"]))
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a parquet file"):
        read_parquet(tmp_path / "bad.parquet", cache=tmp_path)
    with pytest.raises(FileNotFoundError, match="data set nowhere"):
        load("nowhere", data_root=str(tmp_path))
    write_folder(tmp_path / "halves" / "train", ["a_1.png", "b_1.png"])
    with pytest.raises(FileNotFoundError, match="test images"):
        load("halves", data_root=str(tmp_path), cache=str(tmp_path))
    write_folder(tmp_path / "halves" / "test", ["a_1.png", "c_1.png"])
    with pytest.raises(ValueError, match="expected the same classes"):
        load("halves", data_root=str(tmp_path), cache=str(tmp_path))


@pytest.mark.parametrize("label", [None, -1, 1.5])
def test_labels_that_are_no_class_numbers_are_refused_by_row(tmp_path: Path, label: Any) -> None:
    import datasets

    rows = {"image": [encoded(), encoded()], "label": [0 if label is None else 0 * label, label]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=r"train\.parquet: row \d: expected a class number from 0 on, found"):
        read_parquet(tmp_path / "train.parquet", cache=tmp_path)


def test_images_that_stand_twice_and_classes_without_images_warn(tmp_path: Path) -> None:
    root = tmp_path / "twice"
    write_folder(root / "train", ["cat_1.png", "dog_2.png"])
    write_folder(root / "test", ["cat_7.png"])  # the same picture under another name
    (root / "train" / "cat_3.png").write_bytes((root / "train" / "cat_1.png").read_bytes())
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        found = load("twice", data_root=str(tmp_path), cache=str(tmp_path / "cache"))
    assert {str(warning.message) for warning in given} == {
        "twice: 1 images of the train split repeat another one of it",
        "twice: 1 images stand in the training and in the test split",
    }
    assert found.test.known().tolist() == [0]  # no dog among the test images, and no complaint
    for part in ("train", "test"):
        write_parquet(tmp_path / "cats" / f"{part}.parquet", [encoded((len(part), 0, 0))], [0])
    with pytest.warns(UserWarning, match="cats: no training image of dog"):
        load("cats", data_root=str(tmp_path), cache=str(tmp_path / "cache"))


def test_real_cifar10_is_what_its_readme_says(shared_data: Path, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_parquet(str(shared_data / "cifar10" / "test.parquet"), cache_dir=str(tmp_path)).select(range(64))
    rows.to_parquet(str(tmp_path / "part.parquet"))
    found = data.read_parquet(tmp_path / "part.parquet", cache=tmp_path)
    assert found.pixels.shape == (64, 3, 32, 32)
    assert len(rows.features["label"].names if hasattr(rows.features["label"], "names") else range(10)) == 10
    assert int(found.known().max()) <= 9


# -- Keras files -------------------------------------------------------------------------------------------------------


def keras_arrays(model: torch.nn.Module, offset: int = 166) -> dict[str, np.ndarray]:
    """A model's parameters as the reference's file holds them: Keras' names with a session's offset, kernels transposed."""
    kinds = {"conv": "conv2d", "bn": "batch_normalization", "dense": "dense"}
    parts = {"conv": {"weight": "kernel", "bias": "bias"}, "dense": {"weight": "kernel", "bias": "bias"}}
    parts["bn"] = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    state, out = model.state_dict(), {}
    for layer, ours in names(model).items():
        kind, _, number = layer.partition(".")
        for part, theirs in parts[kind].items():
            value = state[f"{ours}.{part}"].numpy()
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
            shown = int(number) + (offset if kind != "dense" else 0)
            out[f"{kinds[kind]}{f'_{shown}' if shown else ''}/{theirs}:0"] = value
    return out


def write_h5(path: Path, arrays: dict[str, np.ndarray], whole_model: bool) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if whole_model else file
        # trainable arrays first, then the moving statistics, as Keras lists them; all nested under a network's name
        listed = sorted(arrays, key=lambda name: "moving" in name)
        group.attrs["layer_names"] = [b"input_1", b"functional_3"]
        group.create_group("input_1").attrs["weight_names"] = np.array([], dtype="S1")
        nested = group.create_group("functional_3")
        nested.attrs["weight_names"] = [name.encode() for name in listed]
        for name in listed:
            nested[name] = arrays[name]
    return path


def random_state(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value))
    return model


@pytest.mark.parametrize("whole_model", [False, True])
def test_a_keras_file_of_a_session_is_read_by_number(tmp_path: Path, whole_model: bool) -> None:
    theirs = random_state(GSimCLR(blocks=2))
    path = write_h5(tmp_path / "gsimclr.h5", keras_arrays(theirs), whole_model)
    ours = GSimCLR(blocks=2)
    load_reference(ours, path)
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, other) or name.endswith("num_batches_tracked"), name
    with pytest.raises(ValueError, match=r"expected 13 convolutions for this GSimCLR, found 22"):
        load_reference(GSimCLR(blocks=1), path)


def test_the_autoencoders_last_layer_has_a_name_of_its_own(tmp_path: Path) -> None:
    theirs = random_state(DenoisingAutoencoder(widths=(4, 8)))
    arrays = keras_arrays(theirs, offset=0)
    arrays = {name.replace("conv2d_4/", "auto_output/"): value for name, value in arrays.items()}
    ours = DenoisingAutoencoder(widths=(4, 8))
    load_reference(ours, read_h5(write_h5(tmp_path / "autoencoder.h5", arrays, True)))
    assert torch.equal(ours.decoder[-1].weight, theirs.decoder[-1].weight)


def test_a_checkpoint_of_the_reference_is_probed_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in (("ROOT", tmp_path), ("PROJECTS", tmp_path / "projects")):
        monkeypatch.setattr(results, name, place)
    torch.manual_seed(0)
    theirs = GSimCLR(blocks=1)
    path = write_h5(tmp_path / "gsimclr_cifar10.h5", keras_arrays(theirs), False)
    pixels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    images = data.Images("noise", pixels, torch.arange(40) % 2, ["a", "b"], torch.zeros(40, 16, dtype=torch.uint8), "none")
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: data.Splits(images, images))
    monkeypatch.setattr(pretrain, "main", lambda *_: pytest.fail("trained"))
    recipe = pretrain.Recipe(blocks=1, weights=str(path), arms=["reference"], seeds=[0], probe=pretrain.Probe(epochs=2))
    found = results.read_records(evaluate.main(recipe).parent)
    assert {record["extra"]["row"] for record in found} == {f"G-SimCLR, reference P{i}" for i in (1, 2, 3)}
    assert {record["weights"] for record in found} == {"official, converted"}
    ours = evaluate.features(theirs, images)
    again = pretrain.build(recipe, 3)
    load_reference(again, path)
    torch.testing.assert_close(evaluate.features(again, images), ours)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "text.h5").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="expected an HDF5 file"):
        read_h5(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_group("weights")
    with pytest.raises(ValueError, match="expected Keras' attribute layer_names"):
        read_h5(tmp_path / "other.h5")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_h5(tmp_path / "absent.h5")
    with pytest.raises(ValueError, match="layer lstm/kernel:0: expected conv2d"):
        canonical({"lstm/kernel:0": torch.zeros(2, 2)})


def test_resnet50_keeps_keras_names() -> None:
    listed = keras_layers()
    assert (len(listed), listed[:3], listed[-1]) == (53, ["conv1", "conv2_block1_0", "conv2_block1_1"], "conv5_block3_3")
    with torch.device("meta"):
        found = names(KerasResNet50())
    assert found["conv3_block1_0_conv"] == "stack.3.shortcut.0"
    assert found["conv3_block1_1_bn"] == "stack.3.body.1"
    assert names(CifarResNet(1))["conv.1"] == "stack.0.shortcut"


def test_arrays_come_out_in_pytorchs_layout() -> None:
    kernel: Tensor = torch.arange(24.0).view(1, 2, 3, 4)
    found = canonical({"conv2d_9/kernel:0": kernel, "conv2d_9/bias:0": torch.zeros(4), "dense_4/kernel:0": torch.zeros(5, 6)})
    assert found["conv.0.weight"].shape == (4, 3, 1, 2)
    assert found["dense.0.weight"].shape == (6, 5)
    assert float(found["conv.0.weight"][3, 2, 0, 1]) == float(kernel[0, 1, 2, 3])
