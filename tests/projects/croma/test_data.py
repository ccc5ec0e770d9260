"""Bands, statistics, generated scenes, rasters in every layout, windows, augmentation; real pairs where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.probes import accuracy, linear_probe_lbfgs
from projects.croma import bands, data, prepare, rasters
from projects.croma import scenes as scenes_module
from projects.croma.bands import OPTICAL, RADAR, Statistics
from projects.croma.scenes import scenes

rasterio = pytest.importorskip("rasterio", reason="needs rasterio: pip install -e '.[geo]'")


def optical(seed: int = 0, count: int = 12, side: int = 16) -> Tensor:
    return 500 + 3000 * torch.rand(count, side, side, generator=torch.Generator().manual_seed(seed))


def radar(seed: int = 0, side: int = 16) -> Tensor:
    return -25 + 20 * torch.rand(2, side, side, generator=torch.Generator().manual_seed(seed))


def write(
    path: Path, values: Tensor, *, names: Any = None, epsg: int = 32633, left: float = 500000.0, pixel: float = 10.0, **more: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": values.shape[0], "height": values.shape[1], "width": values.shape[2]}
    transform = rasterio.Affine(pixel, 0, left, 0, -pixel, 5000000.0)
    with rasterio.open(path, "w", **profile, dtype="float32", crs=f"EPSG:{epsg}", transform=transform, **more) as target:
        target.write(values.numpy().astype(np.float32))
        for number, name in enumerate(names or [], start=1):
            target.set_band_description(number, name)
    return path


# -- bands


def test_bands_are_ordered_by_name_in_any_spelling() -> None:
    given = optical(count=13)
    names = ["B01", "b02", "B3", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "b8a"]
    ordered = bands.check_optical(given, names)
    assert torch.equal(ordered, given[[0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 10, 11]])  # B8A from the end, B10 gone
    assert bands.band_order(bands.EUROSAT) == bands.band_order(names)
    with pytest.raises(ValueError, match=r"expected 12 bands \(B1..B12 without B10\), got 13; pass band names or drop B10"):
        bands.check_optical(given)
    with pytest.raises(ValueError, match=r"missing \['B8A'\]"):
        bands.band_order(names[:-1])
    with pytest.raises(ValueError, match=r"twice \['B2'\]"):
        bands.band_order([*OPTICAL, "B02"])


def test_radar_needs_names_and_decibels() -> None:
    given = radar()
    assert torch.equal(bands.check_radar(given.flip(0), ["VH", "VV"]), given)
    with pytest.raises(ValueError, match="expected channel names"):
        bands.check_radar(given, None)
    with pytest.raises(ValueError, match=r"missing \['VH'\]"):
        bands.check_radar(given[:1], ["VV"])
    with pytest.raises(ValueError, match=r"values look linear .* no negative dB"):
        bands.check_radar(10 ** (given / 10), RADAR)


def test_normalisation_is_two_deviations_each_way_and_truncates() -> None:
    statistics = Statistics((100.0, 0.0), (10.0, 0.0))
    image = torch.tensor([70.0, 80.0, 100.0, 119.0, 130.0]).view(1, 1, 5).expand(2, 1, 5)
    unit = bands.normalise(image, statistics)
    assert unit[0, 0].tolist() == pytest.approx([0, 0, 0.5, 0.975, 1])
    assert unit[1].unique().tolist() == [0.5]  # a channel without spread
    assert bands.to_bytes(unit)[0, 0].tolist() == [0, 0, 127, 248, 255]
    with pytest.raises(ValueError, match="std 0 in channel 1"):
        bands.statistics_of(torch.stack([torch.rand(4, 4), torch.ones(4, 4)])[None])
    with pytest.raises(ValueError, match=r"input range \[-12, 3000\]; CROMA expects \[0, 1\]"):
        bands.check_normalised(torch.tensor([-12.0, 3000.0]))
    assert bands.check_normalised(torch.tensor([0.0, 1.0])).max() == 1


def test_reflectance_already_scaled_and_offsets_of_new_products() -> None:
    with pytest.raises(ValueError, match="expected digital numbers"):
        bands.check_optical(torch.rand(12, 4, 4))
    shifted = bands.check_optical(optical() + 1000, baseline_offset=True)
    torch.testing.assert_close(shifted, optical())


def test_missing_pixels_are_filled_and_too_many_refused() -> None:
    image = torch.ones(2, 10, 10)
    image[1] = 4
    image[1, 0, :5] = torch.nan
    with pytest.warns(UserWarning, match="5 missing values"):
        filled = bands.fill_missing(image, "tile")
    assert filled[1].unique().tolist() == [4]
    image[1, :2] = torch.inf
    with pytest.raises(ValueError, match=r"tile: channel 1 lacks 20.0 %"):
        bands.fill_missing(image, "tile")
    with pytest.raises(ValueError, match="zeros only"):
        bands.fill_missing(torch.zeros(2, 4, 4))


# -- generated scenes


def test_scenes_depend_on_their_number_alone_and_carry_the_classes_between_the_sensors() -> None:
    some = scenes(7, 60)
    again = scenes(10, 1)
    assert torch.equal(some.optical[3], again.optical[0])
    assert torch.equal(some.radar[3], again.radar[0])
    gain = scenes_module._fields(np.random.default_rng(0), 48)[4:]
    assert np.abs(np.corrcoef(gain.reshape(12, -1)) - np.eye(12)).max() < 0.3  # each optical band has its own
    assert set(some.classes.unique().tolist()) <= set(range(6))
    stacked = torch.cat([some.optical, some.radar], 1)
    image = torch.nn.functional.avg_pool2d(bands.normalise(stacked, bands.statistics_of(stacked)), 8).flatten(2).transpose(1, 2)
    labels = some.majority().flatten(1)
    score = {}
    for name, part in (("radar", slice(12, 14)), ("optical", slice(0, 12)), ("both", slice(0, 14))):
        train, test = ((image[rows, :, part].flatten(0, 1), labels[rows].flatten()) for rows in (slice(0, 40), slice(40, 60)))
        score[name] = linear_probe_lbfgs(train, test, classes=6, max_iter=100)[1]
    assert score["both"] > max(score["radar"], score["optical"]) + 0.08
    assert min(score.values()) > 0.45
    with pytest.raises(ValueError, match="multiple of 8"):
        scenes(0, 1, 50)


# -- augmentation


def test_crops_move_both_sensors_alike() -> None:
    ramp = torch.arange(40 * 40).view(1, 40, 40).remainder(251).to(torch.uint8).expand(14, -1, -1)
    crops = data.Crops([np.stack([ramp.numpy()] * 3), np.stack([ramp.numpy()[:, :32, :32]])], 16, (16, 24))
    assert len(crops) == 4
    torch.manual_seed(0)
    drawn = torch.stack([crops[i] for i in (0, 0, 2, 3)])
    assert drawn.shape == (4, 14, 16, 16)
    assert drawn.dtype == torch.uint8
    assert (drawn == drawn[:, :1]).all()
    assert not torch.equal(drawn[0], drawn[1])
    whole = data.Crops([np.stack([ramp.numpy()])], 40, (40, 40), augment=False)
    assert torch.equal(whole[0], ramp)


def test_mixing_keeps_pairs_together() -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    samples = [torch.full((14, 2, 2), 50 * i, dtype=torch.uint8) for i in range(4)]
    mixed = data.mixing(0.3)(samples)
    assert mixed.max() <= 1
    assert (mixed == mixed[:, :1, :1, :1]).all()
    values = torch.tensor([0.0, 50, 100, 150]) / 255
    assert float(mixed.mean()) == pytest.approx(float(values.mean()), abs=1e-6)
    assert not torch.allclose(mixed[:, 0, 0, 0], values)
    assert data.mixing(0.0)(samples).dtype == torch.uint8


# -- rasters


def pair_files(folder: Path, **changes: Any) -> rasters.PairFiles:
    """Bands at 10, 20 and 60 m of one place of 480 m."""
    values = optical(side=48)
    files = {}
    for number, band in enumerate(OPTICAL):
        step = {"B1": 6, "B9": 6, "B2": 1, "B3": 1, "B4": 1, "B8": 1}.get(band, 2)
        files[band] = write(folder / f"{band}.tif", values[number : number + 1, ::step, ::step], pixel=10.0 * step)
    radars = {band: write(folder / f"{band}.tif", radar(side=48)[i : i + 1], **changes) for i, band in enumerate(RADAR)}
    return rasters.PairFiles(files, radars, "place")


def test_bands_of_every_resolution_meet_on_one_grid(tmp_path: Path) -> None:
    pair = pair_files(tmp_path)
    image = rasters.read_pair(pair, 48, data.PAIR_STATISTICS)
    assert (image.shape, image.dtype) == ((14, 48, 48), torch.uint8)
    exact = bands.to_bytes(bands.normalise(torch.cat([optical(side=48), radar(side=48)]), data.PAIR_STATISTICS))
    for channel in (1, 2, 3, 7, 12, 13):  # 10 m bands are not resampled
        assert torch.equal(image[channel], exact[channel])


def test_pairs_of_other_ground_and_missing_bands_are_refused(tmp_path: Path) -> None:
    moved = pair_files(tmp_path / "a", left=500200.0)
    with pytest.raises(ValueError, match=r"radar of place: covers .* but its optical image covers"):
        rasters.read_pair(moved, 48, data.PAIR_STATISTICS)
    other = pair_files(tmp_path / "b", epsg=32634)
    with pytest.raises(ValueError, match="CRS EPSG:32634, but its optical image has EPSG:32633"):
        rasters.read_pair(other, 48, data.PAIR_STATISTICS)
    (tmp_path / "b" / "B8A.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"B8A.tif: no such file"):
        rasters.read_pair(other, 48, data.PAIR_STATISTICS)
    (tmp_path / "b" / "B8A.tif").write_text("no raster")
    with pytest.raises(ValueError, match="expected a GeoTIFF"):
        rasters.read_pair(other, 48, data.PAIR_STATISTICS)


def test_declared_no_data_becomes_missing(tmp_path: Path) -> None:
    values = optical(side=8)
    values[0, 0, 0] = -9999
    found, names = rasters.read_image(write(tmp_path / "a.tif", values, names=OPTICAL, nodata=-9999), None)
    assert names == list(OPTICAL)
    assert found[0, 0, 0].isnan()
    assert int(found.isnan().sum()) == 1
    with pytest.raises(ValueError, match="a name for each of its 12 bands, got 0"):
        rasters.read_image(write(tmp_path / "b.tif", values))


def ssl4eo(root: Path, place: str, radars: int = 2, opticals: int = 2) -> None:
    dates = ["20200801T100000", "20201105T100000", "20210201T100000"]
    for number in range(opticals):
        name = f"{dates[number]}_{dates[number]}_T33UUP"
        for i, band in enumerate(OPTICAL):
            write(root / "s2a" / place / name / f"{band}.tif", optical(number, side=24)[i : i + 1])
    for number in range(radars):
        name = f"S1A_IW_GRDH_1SDV_{dates[number]}_{dates[number]}_033"
        for i, band in enumerate(RADAR):
            write(root / "s1" / place / name / f"{band}.tif", radar(number, side=24)[i : i + 1])


def test_seasons_of_ssl4eo_pair_by_date_and_become_an_array(tmp_path: Path) -> None:
    ssl4eo(tmp_path / "raw", "0000001")
    ssl4eo(tmp_path / "raw", "0000007")
    pairs = rasters.ssl4eo_pairs(tmp_path / "raw")
    assert [pair.name.partition("/")[0] for pair in pairs] == ["0000001", "0000001", "0000007", "0000007"]
    for pair in pairs:
        assert rasters._acquired(pair.optical["B2"].parent.name) == rasters._acquired(pair.radar["VV"].parent.name)
    folder = prepare.main(prepare.Recipe(source=str(tmp_path / "raw"), out=str(tmp_path / "ssl4eo-prepared")))
    images = data.pretraining_images("ssl4eo", data_root=str(tmp_path))[0]
    assert images.shape == (4, 14, 264, 264)
    assert torch.equal(torch.from_numpy(np.array(images[1])), rasters.read_pair(pairs[1], 264, data.PAIR_STATISTICS))
    assert (folder / "names.txt").read_text().splitlines()[0].startswith("0000001/")
    assert not list(tmp_path.glob(".*tmp"))
    np.save(folder / "images.npy", np.zeros((2, 14, 8, 8), dtype=np.float32))
    with pytest.raises(ValueError, match=r"expected uint8 \(N, 14, H, W\).*got float32"):
        data.pretraining_images("ssl4eo", data_root=str(tmp_path))
    ssl4eo(tmp_path / "raw", "0000009", radars=1, opticals=3)
    with pytest.raises(ValueError, match=r"1 places whose seasons do not pair up .*0000009 \(1 and 3\)"):
        rasters.ssl4eo_pairs(tmp_path / "raw")
    (tmp_path / "raw" / "s1" / "0000011").mkdir()
    with pytest.raises(ValueError, match=r"4 places in s1, 3 in s2a, 1 in one only: \['0000011'\]"):
        rasters.ssl4eo_pairs(tmp_path / "raw")
    with pytest.raises(FileNotFoundError, match="s1"):
        rasters.ssl4eo_pairs(tmp_path / "nothing")


def bigearthnet(root: Path, name: str, labels: list[str], partner: str | None = None) -> None:
    for i, band in enumerate(OPTICAL):
        write(root / "S2" / name / f"{name}_{rasters._padded(band)}.tif", optical(side=12)[i : i + 1], pixel=100.0)
    about = {"labels": labels}
    (root / "S2" / name / f"{name}_labels_metadata.json").write_text(json.dumps(about))
    for i, band in enumerate(RADAR):
        write(root / "S1" / f"S1_{name}" / f"S1_{name}_{band}.tif", radar(side=12)[i : i + 1], pixel=100.0)
    (root / "S1" / f"S1_{name}" / f"S1_{name}_labels_metadata.json").write_text(
        json.dumps(about | {"corresponding_s2_patch": partner or name})
    )


def test_bigearthnet_becomes_a_task_by_its_lists(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for name, labels in (("a", ["Airports", "Water bodies"]), ("b", ["Vineyards", "Pastures"]), ("c", ["Mixed forest"])):
        bigearthnet(raw, name, labels)
    (tmp_path / "train.txt").write_text("b\nc\n")
    (tmp_path / "val.txt").write_text("a\n")
    lists = {"train": str(tmp_path / "train.txt"), "val": str(tmp_path / "val.txt")}
    recipe = prepare.Recipe("bigearthnet", str(raw), str(tmp_path / "bigearthnet-prepared"), lists)
    prepare.main(recipe)
    task = data.load_task("bigearthnet", data_root=str(tmp_path))
    assert (task.kind, task.classes, task.channels, task.split) == ("multi", 19, ("optical", "radar"), "2 train, 1 val")
    assert [row.nonzero().flatten().tolist() for row in task.train.labels] == [[3, 4], [10]]
    assert task.test.labels[0].nonzero().flatten().tolist() == [17]  # airports belong to none of the 19
    assert task.train.images.shape == (2, 14, 120, 120)
    assert task.sensor_statistics() == {"optical": bands.SSL4EO_OPTICAL, "radar": bands.SSL4EO_RADAR}
    assert np.array_equal(data.pretraining_images("bigearthnet", data_root=str(tmp_path))[0], task.train.images)
    (tmp_path / "train.txt").write_text("b\nz\n")
    with pytest.raises(ValueError, match=r"1 of 2 patches are not in .*\['z'\]"):
        prepare.main(recipe)
    bigearthnet(raw, "d", [], partner="nowhere")
    with pytest.raises(ValueError, match=r"1 of 4 radar patches have no optical partner: \['S1_d -> nowhere'\]"):
        rasters.bigearthnet_pairs(raw)
    with pytest.raises(FileNotFoundError, match="found no radar patch"):
        rasters.bigearthnet_pairs(tmp_path / "S3")


def test_labels_of_bigearthnet() -> None:
    corine = set(rasters._MERGED) | {
        label for label in rasters.LABELS_19 if label.startswith(("Ind", "Past", "Complex", "Land", "Agro", "Conif", "Mixed", "Beach"))
    }
    assert len(corine) == 32
    assert len(corine | set(rasters._DROPPED)) == 43
    with pytest.raises(ValueError, match="'Lava': expected one of the 43"):
        rasters.labels_19(["Lava"])


def test_a_folder_of_arrays_is_a_task(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        np.save(tmp_path / part / "images.npy", np.zeros((3, 2, 8, 8), dtype=np.uint8))
        np.save(tmp_path / part / "labels.npy", np.array([0, 1, 4 if part == "val" else 2]))
    (tmp_path / "task.json").write_text(json.dumps({"name": "mine", "kind": "single", "channels": ["radar"], "classes": 3}))
    with pytest.raises(ValueError, match=r"val/labels.npy: expected classes 0 to 2, found 4"):
        data.load_task("folder", data_root=str(tmp_path))
    np.save(tmp_path / "val" / "labels.npy", np.array([0, -1, 1]))
    with pytest.raises(ValueError, match=r"val/labels.npy: expected classes 0 to 2, found -1"):
        data.load_task("folder", data_root=str(tmp_path))
    np.save(tmp_path / "val" / "labels.npy", np.array([0, 1, 1]))
    assert len(data.load_task("folder", data_root=str(tmp_path), share=0.5).train.labels) == 2
    (tmp_path / "val").rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"expected val/ or test/"):
        data.load_task("folder", data_root=str(tmp_path))
    (tmp_path / "other").rename(tmp_path / "val")
    np.save(tmp_path / "val" / "images.npy", np.zeros((3, 13, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"uint8 images \(N, 2, H, W\)"):
        data.load_task("folder", data_root=str(tmp_path))


def test_eurosat_may_have_two_splits_and_other_splits_are_refused(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "eurosat_ms" / "River" / f"{number}.tif", optical(number, 13))
    listed = tmp_path / "eurosat_ms" / "split.csv"
    rows = [f"{part},River,River/{number}.tif" for number, part in enumerate(("train", "train", "test"))]
    listed.write_text("split,label,file\n" + "\n".join(rows) + "\n")
    task = data.load_task("eurosat", data_root=str(tmp_path))
    assert (len(task.train.labels), task.val is task.test, task.split) == (2, True, "split.csv: 2 train, 1 test")
    assert len(task.sensor_statistics()["optical"].mean) == 12
    listed.write_text("split,label,file\n" + rows[2] + "\n")
    with pytest.raises(ValueError, match="expected rows of the splits train and test, found 0 and 1"):
        data.load_task("eurosat", data_root=str(tmp_path))
    listed.write_text("split,label,file\n" + rows[2].replace("test", "holdout") + "\n")
    with pytest.raises(ValueError, match="found 'holdout'"):
        data.load_task("eurosat", data_root=str(tmp_path))


def test_missing_data_says_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="eurosat_ms"):
        data.load_task("eurosat", data_root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"python -m projects.croma.prepare --layout ssl4eo"):
        data.pretraining_images("ssl4eo", data_root=str(tmp_path))


# -- real files


def test_the_six_real_pairs(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pairs = data.six_pairs(str(shared_data))
    assert len(pairs) == 6
    raw = [torch.cat([rasters.read_bands(pair.optical, 120)[0], rasters.read_bands(pair.radar, 120)[0]]) for pair in pairs]
    found = bands.statistics_of(torch.stack(raw))
    assert -20 < found.mean[12] < -5  # VV in dB
    assert found.mean[13] < found.mean[12]  # VH is weaker
    images = torch.stack([rasters.read_pair(pair, 120, data.PAIR_STATISTICS) for pair in pairs])
    assert images.shape == (6, 14, 120, 120)
    assert bool((images.float().flatten(2).std(2) > 1).all())
    assert all(int(rasters.labels_19(pair.labels).sum()) >= 1 for pair in pairs)
    mixed = data.pretraining_images("pairs", data_root=str(shared_data), count=3, side=64, repeats=2)
    assert [part.shape for part in mixed] == [(12, 14, 120, 120), (3, 14, 64, 64)]


def test_the_real_tiles_of_eurosat(shared_data: Path) -> None:
    task = data.load_task("eurosat", data_root=str(shared_data))
    assert (len(task.train.labels), len(task.val.labels), len(task.test.labels), task.classes) == (60, 20, 20, 10)
    flat = [torch.from_numpy(split.images).float().flatten(2) / 255 for split in (task.train, task.test)]
    features = [torch.cat([part.mean(2), part.std(2)], 1) for part in flat]
    head, score = linear_probe_lbfgs((features[0], task.train.labels), (features[1], task.test.labels), l2=1e-2)
    assert score > 0.3  # chance 0.1
    assert accuracy(task.train.labels, head(features[0]).argmax(1)) > 0.8
