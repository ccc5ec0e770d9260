"""Loaders on small files in the layouts of the field, what they refuse, the generated solids, and the real sets where they are at hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from projects.point_cmae import data
from projects.point_cmae.augment import normalise
from projects.point_cmae.data import Unlabelled, few_shot, modelnet40, pickle_to_npz, scanobjectnn, shapenet55, shapenet_part, whole_runs
from projects.point_cmae.evaluate import constant_patch, moments
from projects.point_cmae.segmenter import PARTS
from projects.point_cmae.solids import PARTS as SOLID_PARTS
from projects.point_cmae.solids import SOLIDS, solid, solids

RNG = np.random.default_rng(0)


def cloud(count: int = 2048, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, columns)).astype(np.float32)


# -- ShapeNet-55 -------------------------------------------------------------------------------------------------------------------


def shapenet(folder: Path) -> Path:
    (folder / "ShapeNet55-34" / "shapenet_pc").mkdir(parents=True)
    (folder / "ShapeNet-55").mkdir()
    names = ["02691156-a.npy", "02691156-b.npy", "03001627-c.npy"]
    for name in names:
        np.save(folder / "ShapeNet55-34" / "shapenet_pc" / name, cloud(1500))
    (folder / "ShapeNet-55" / "train.txt").write_text("\n".join(names) + "\n")
    return folder


def test_shapenet55_draws_without_replacement_then_normalises(tmp_path: Path) -> None:
    clouds = shapenet55(shapenet(tmp_path), "pretrain")
    assert (len(clouds), clouds.classes, clouds.labels.tolist()) == (3, ["02691156", "03001627"], [0, 0, 1])
    torch.manual_seed(0)
    one, two = (Unlabelled(clouds, 1024)[0] for _ in range(2))
    assert len(one.unique(dim=0)) == 1024
    assert not torch.equal(one, two)  # a fresh draw each time
    torch.testing.assert_close(one.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert one.norm(dim=1).max() == pytest.approx(1, abs=1e-5)


def test_shapenet55_names_missing_and_spoiled_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ShapeNet-55/train.txt.*Point-BERT"):
        shapenet55(tmp_path, "train")
    folder = shapenet(tmp_path)
    clouds = folder / "ShapeNet55-34" / "shapenet_pc"
    bad = cloud(1500)
    bad[3, 1] = np.nan
    for spoiled, message in (
        (bad, "1 coordinates are NaN"),
        (cloud(500), "at least 1024 points, found 500"),
        (bad * 0 + 1, "NaN|all points"),
    ):
        np.save(clouds / "02691156-a.npy", spoiled)
        with pytest.raises(ValueError, match=f"02691156-a.npy: .*({message})"):
            shapenet55(folder, "train").read(0)
    np.save(clouds / "02691156-a.npy", np.ones((1500, 3)))
    with pytest.raises(ValueError, match="all points are equal"):
        shapenet55(folder, "train").read(0)
    (clouds / "02691156-a.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"02691156-a\.npy: expected a NumPy file of points"):
        shapenet55(folder, "train").read(0)
    with pytest.raises(ValueError, match="at least 2000 points, found 1500"):
        shapenet55(folder, "train", least=2000).read(1)
    (clouds / "02691156-a.npy").unlink()
    (clouds / "03001627-c.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"02691156-a.npy of .*train.txt is missing, and 1 more of 3"):
        shapenet55(folder, "train")


# -- ModelNet40 ----------------------------------------------------------------------------------------------------------------------


def modelnet(folder: Path, kind: str) -> Path:
    base = folder / "ModelNet" / "modelnet40_normal_resampled"
    base.mkdir(parents=True)
    (base / "modelnet40_shape_names.txt").write_text("airplane\nbed\n")
    if kind == "dat":
        content = [[cloud(64, 6), cloud(64, 6) * 2], [np.array([0], np.int32), np.array([1], np.int32)]]
        (base / "modelnet40_test_8192pts_fps.dat").write_bytes(pickle.dumps(content))
    else:
        for name in ("airplane_0001", "bed_0007"):
            (base / name.rpartition("_")[0]).mkdir()
            np.savetxt(base / name.rpartition("_")[0] / f"{name}.txt", cloud(40, 6), delimiter=",")
        (base / "modelnet40_test.txt").write_text("airplane_0001\nbed_0007\n")
    return base


def test_modelnet40_pickles_load_without_running_them_and_convert(tmp_path: Path) -> None:
    base = modelnet(tmp_path, "dat")
    clouds = modelnet40(tmp_path, "test")
    assert (clouds.classes, clouds.labels.tolist()) == (["airplane", "bed"], [0, 1])
    torch.testing.assert_close(clouds[1][0], normalise(torch.from_numpy(cloud(64, 6)[:, :3] * 2)))  # not shuffled in testing
    pickle_to_npz(base / "modelnet40_test_8192pts_fps.dat")
    again = modelnet40(tmp_path, "test")
    assert again.files[0].suffix == ".npz"
    assert torch.equal(again[1][0], clouds[1][0])


def test_clouds_of_different_lengths_are_pointed_out(tmp_path: Path) -> None:
    base = modelnet(tmp_path, "dat")
    content = [[cloud(64, 6), cloud(50, 6)], [np.array([0]), np.array([1])]]
    (base / "modelnet40_test_8192pts_fps.dat").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"fps.dat: cloud 1 has 50 points, cloud 0 has 64; resample"):
        modelnet40(tmp_path, "test")
    with pytest.raises(ValueError, match="batch: cloud 1 has 3 points, cloud 0 has 4"):
        data.together([(torch.ones(4, 3), 0), (torch.ones(3, 3), 1)])


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    path = tmp_path / "evil.dat"
    path.write_bytes(pickle.dumps([[Evil()], [0]]))
    with pytest.raises(ValueError, match=r"evil.dat: expected a pickle of NumPy arrays and lists, found builtins.print; it was not loaded"):
        data.read_pickle(path)
    path.write_bytes(pickle.dumps([[cloud(3)], [0]])[:40])
    with pytest.raises(ValueError, match=r"evil.dat"):
        data.read_pickle(path)
    path.write_bytes(pickle.dumps(np.arange(3.0), protocol=2))  # as old NumPy wrote it
    assert data.read_pickle(path).tolist() == [0, 1, 2]


def test_modelnet40_text_files_are_sampled_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modelnet(tmp_path, "txt")
    sample, check = data.random_start_sample, data.check_cloud
    monkeypatch.setattr(data, "random_start_sample", lambda points, _count, rng: sample(points, 20, rng))
    monkeypatch.setattr(data, "check_cloud", lambda points, origin, least=1: check(points, origin))
    clouds = modelnet40(tmp_path, "test", cache=tmp_path / "cache")
    assert (len(clouds), len(clouds[0][0]), clouds.labels.tolist()) == (2, 20, [0, 1])
    monkeypatch.setattr(data, "random_start_sample", None)
    assert torch.equal(modelnet40(tmp_path, "test", cache=tmp_path / "cache")[1][0], clouds[1][0])


def test_random_start_sample_takes_the_farthest_point_each_time() -> None:
    points = cloud(30)
    picked = data.random_start_sample(points, 10, np.random.default_rng(1))
    for step in range(1, 10):
        nearest = ((points[:, None] - picked[None, :step]) ** 2).sum(-1).min(1)
        assert ((picked[step] - picked[:step]) ** 2).sum(1).min() == pytest.approx(nearest.max(), rel=1e-5)


def h5(path: Path, points: np.ndarray, labels: np.ndarray, **more: Any) -> None:
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as content:
        for name, value in ({"data": points, "label": labels} | more).items():
            if value is not None:
                content[name] = value


def test_modelnet40_hdf5_files_are_put_together(tmp_path: Path) -> None:
    for number in (0, 1):
        h5(tmp_path / "modelnet40_ply_hdf5_2048" / f"ply_data_test{number}.h5", RNG.normal(size=(2, 50, 3)), np.array([[number], [39]]))
    clouds = modelnet40(tmp_path, "test")
    assert (clouds.labels.tolist(), len(clouds.files)) == ([0, 39, 1, 39], 2)
    assert clouds[3][0].norm(dim=1).max() == pytest.approx(1, abs=1e-5)
    with pytest.raises(FileNotFoundError, match=r"ply_data_train0.h5"):
        modelnet40(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"8192pts_fps.dat, text files beside .*, or .*ply_data_test"):
        modelnet40(tmp_path / "empty", "test")


def fold(folder: Path, way: int, shot: int, style: str = "5way_10shot", wrong: int = 0) -> None:
    path = folder / "ModelNetFewshot" / style / "0.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        part: [(cloud(32, 6) + i, i % way + (wrong if i == 3 else 0), 7) for i in range(way * n)]
        for part, n in (("train", shot), ("test", 20))
    }
    path.write_bytes(pickle.dumps(rows))


@pytest.mark.parametrize("style", ["5way_10shot", "5way10shot"])
def test_few_shot_folds_of_both_spellings(tmp_path: Path, style: str) -> None:
    fold(tmp_path, 5, 10, style)
    train, test = few_shot(tmp_path, 5, 10, 0)
    assert (len(train), len(test), len(train.classes)) == (50, 100, 5)
    assert train.train is not test.train
    with pytest.raises(FileNotFoundError, match="fold 4 of 0 to 9"):
        few_shot(tmp_path, 5, 10, 4)


def test_few_shot_folds_of_wrong_counts_or_labels_are_refused(tmp_path: Path) -> None:
    fold(tmp_path, 5, 8)
    with pytest.raises(ValueError, match=r"train: expected 50 clouds for 5-way 10-shot, found 40"):
        few_shot(tmp_path, 5, 10, 0)
    fold(tmp_path, 5, 10, wrong=30)
    with pytest.raises(ValueError, match=r"0.pkl, train: label 33 of sample 3: expected 0 to 4"):
        few_shot(tmp_path, 5, 10, 0)


# -- ScanObjectNN --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "file"),
    [
        ("bg", "main_split/training_objectdataset.h5"),
        ("only", "main_split_nobg/training_objectdataset.h5"),
        ("hardest", "main_split/training_objectdataset_augmentedrot_scale75.h5"),
    ],
)
def test_scanobjectnn_keeps_coordinates_and_shuffles_in_training(tmp_path: Path, variant: Any, file: str) -> None:
    points = RNG.normal(size=(3, 40, 3)).astype(np.float32)
    h5(tmp_path / "ScanObjectNN" / file, points, np.array([0, 14, 3]))
    clouds = scanobjectnn(tmp_path, variant, "train")
    assert (clouds.classes[14], clouds.labels.tolist()) == ("toilet", [0, 14, 3])
    torch.manual_seed(0)
    first = clouds[0][0]
    assert not torch.equal(first, torch.from_numpy(points[0]))
    assert torch.equal(first.sort(0).values, torch.from_numpy(points[0]).sort(0).values)
    with pytest.raises(FileNotFoundError, match=r"test_objectdataset.*scanobjectnn"):
        scanobjectnn(tmp_path, variant, "test")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"labels": np.array([0, 15, 3])}, "label 15 of sample 1: expected 0 to 14"),
        ({"labels": np.array([0, 1])}, r"as many labels, found \(3, 40, 3\) and \(2,\)"),
        ({"data": None}, r"expected entries data .* found \['label'\]"),
        ({"points": np.zeros((3, 40, 3))}, "cloud 0: all points are equal"),
    ],
)
def test_spoiled_hdf5_files_are_refused(tmp_path: Path, spoil: dict[str, Any], message: str) -> None:
    path = tmp_path / "ScanObjectNN" / "main_split" / "test_objectdataset.h5"
    more = {"data": None} if "data" in spoil else {}
    h5(path, spoil.get("points", RNG.normal(size=(3, 40, 3))), spoil.get("labels", np.array([0, 1, 3])), **more)
    with pytest.raises(ValueError, match=message):
        scanobjectnn(tmp_path, "bg", "test")
    path.write_bytes(b"not a file of this kind")
    with pytest.raises(ValueError, match="expected an HDF5 file"):
        scanobjectnn(tmp_path, "bg", "test")


# -- ShapeNetPart --------------------------------------------------------------------------------------------------------------------


def parts_folder(folder: Path, columns: int = 7, part: int = 4) -> Path:
    base = folder / "shapenetcore_partanno_segmentation_benchmark_v0_normal"
    (base / "train_test_split").mkdir(parents=True)
    (base / "synsetoffset2category.txt").write_text("\n".join(f"{name}\t{1000 + i}" for i, name in enumerate(PARTS)))
    (base / "1001").mkdir()
    for name in ("a", "b"):
        rows = np.concatenate([cloud(100, columns - 1), np.full((100, 1), part)], 1)
        np.savetxt(base / "1001" / f"{name}.txt", rows)
    for split, names in (("train", ["a"]), ("val", ["b"]), ("test", ["b"])):
        (base / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps([f"shape_data/1001/{n}" for n in names]))
    return base


def test_shapenet_part_joins_training_and_validation_and_repeats_its_test_draws(tmp_path: Path) -> None:
    parts_folder(tmp_path)
    train, test = shapenet_part(tmp_path, "train", count=64), shapenet_part(tmp_path, "test", count=64)
    assert (len(train), len(test)) == (2, 1)
    points, category, parts = test[0]
    assert (points.shape, category, parts.unique().tolist()) == ((64, 3), 1, [4])
    assert torch.equal(points, test[0][0])
    torch.manual_seed(0)
    assert not torch.equal(train[0][0], train[0][0])


def test_spoiled_part_files_are_refused(tmp_path: Path) -> None:
    base = parts_folder(tmp_path, part=9)
    with pytest.raises(ValueError, match=r"a.txt: part 9: expected 4 to 5 of Bag"):
        shapenet_part(tmp_path, "train")[0]
    (base / "1001" / "a.txt").write_text("x y z\n")
    with pytest.raises(ValueError, match=r"a\.txt: expected rows x y z nx ny nz part, found a damaged"):
        shapenet_part(tmp_path, "train")[0]
    np.savetxt(base / "1001" / "a.txt", cloud(10, 6))
    with pytest.raises(ValueError, match="expected rows x y z nx ny nz part, found 6 columns"):
        shapenet_part(tmp_path, "train")[0]
    (base / "1001" / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"a.txt is missing, and 0 more of 2"):
        shapenet_part(tmp_path, "train")


# -- solids ----------------------------------------------------------------------------------------------------------------------------


def test_solids_depend_on_seed_split_and_number_alone() -> None:
    some = solids("test", 14, seed=3)
    again = solid(3, "test", 13)
    assert torch.equal(some.points[13], torch.from_numpy(again[0]))
    assert some.labels.tolist() == [*range(12), 0, 1]
    assert not torch.equal(solids("train", 1, seed=3).points, some.points[:1])
    torch.testing.assert_close(some.points.norm(dim=2).amax(1), torch.ones(14))
    for label, parts in zip(some.labels.tolist(), some.parts, strict=True):
        ids = list(SOLID_PARTS.values())[label]
        assert set(parts.unique().tolist()) <= set(ids)
    assert list(SOLID_PARTS) == list(SOLIDS)


def test_hard_solids_lose_a_side_and_stand_on_ground() -> None:
    points, _, _ = solid(0, "train", 4, "hard")
    assert points.shape == (2048, 3)
    assert not np.allclose(np.sort(points[:, 0]), np.sort(solid(0, "train", 4)[0][:, 0]))


def test_the_points_of_a_cone_are_uniform_on_its_surface() -> None:
    from projects.point_cmae.solids import _sphere, _tube

    piece = _tube(1.0, 0.0, 2.0)
    points = piece.draw(np.random.default_rng(0), 40_000)
    assert piece.area == pytest.approx(np.pi * np.sqrt(5))
    assert (points[:, 1] < -0.5).mean() == pytest.approx(1 - 0.75**2, abs=0.01)  # the lowest quarter of the height
    flat = _sphere(1.0, 1.0, 0.2).draw(np.random.default_rng(0), 20_000)
    assert (np.abs(flat[:, 2]) < 0.1).mean() < 0.35  # most of the surface of a lens is near its faces


# -- real sets -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("lidarnet", "lidarnet_objects.npz"), ("modelnet10-voxels", "chair_monitor_32.npz")])
def test_damaged_real_sets_are_named(tmp_path: Path, name: Any, file: str) -> None:
    with pytest.raises(FileNotFoundError, match=file):
        data.load(name, "train", data_root=str(tmp_path))
    path = tmp_path / name.replace("-", "_") / file
    path.parent.mkdir()
    np.savez(path, other=np.zeros(2))
    with pytest.raises(ValueError, match=rf"{file}: expected an npz file"):
        data.load(name, "train", data_root=str(tmp_path))


def test_whole_runs_keep_neighbours_and_copies_on_one_side() -> None:
    labels = np.repeat([0, 1], 80)
    clouds = [np.full((3, 3), i, np.float32) for i in range(160)]
    clouds[75] = clouds[12]  # a copy of a tested object, far away
    clouds[70] = clouds[71]
    train, test = whole_runs(clouds, labels)
    assert set(range(10, 20)) <= set(test)
    assert not set(train) & set(test)
    assert min(abs(a - b) for a in train for b in test if labels[a] == labels[b]) == 11
    assert 75 not in train
    assert len({70, 71} & set(train)) == 1


def test_lidarnet_and_voxels_load(shared_data: Path) -> None:
    for name, counts in (("lidarnet", (345, 169)), ("modelnet10-voxels", (984, 338))):
        train, test = (data.load(name, part, data_root=str(shared_data)) for part in ("train", "test"))  # type: ignore[arg-type]
        assert (len(train), len(test)) == counts
        assert torch.equal(test[5][0], test[5][0])
        assert test[5][0].norm(dim=1).max() <= 1 + 1e-5
        kept = {test.read(i).numpy().tobytes() for i in range(len(test))}
        assert not any(train.read(i).numpy().tobytes() in kept for i in range(len(train)))


def test_surface_voxels_have_an_empty_neighbour() -> None:
    grid = np.zeros((5, 5, 5), bool)
    grid[1:4, 1:4, 1:4] = True
    assert len(data.surface_voxels(grid)) == 26
    grid[:] = True
    assert len(data.surface_voxels(grid)) == 125 - 27  # outside counts as empty


def test_baselines_are_what_they_say() -> None:
    points = torch.from_numpy(np.stack([cloud(50) for _ in range(2)]))
    assert moments(points).shape == (2, 30)
    torch.testing.assert_close(moments(points)[:, :3], points.mean(1))
    patches = torch.randn(20, 1, 3, generator=torch.Generator().manual_seed(0))
    assert (constant_patch(patches, 400) - patches.mean(0)).norm() < 0.15  # of single points the mean is best


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of solids, solids-hard, shapenet55"):
        data.load("modelnet", "train", data_root=str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all points are equal"):
        normalise(torch.ones(4, 3))
