"""From recipe to record on embedded data: learning, exact resume, probes, fine-tuning, maps of scenes, two processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import results
from common.checkpoint import load_model
from common.engine import Training
from common.recipe import read
from common.results import read_records
from projects.croma import bands, data, evaluate, finetune, infer, pretrain, probing
from projects.croma.finetune import Segmenter
from projects.croma.model import CROMA, Encoders
from projects.croma.rasters import ScenePair
from projects.croma.scenes import scenes
from projects.croma.weights import load_encoders

# rasterio's own use of affine
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
RECIPES = Path(pretrain.__file__).parent / "recipes"
ARCHITECTURE = pretrain.Architecture(embed_dim=16, depth=2, num_heads=2, decoder_dim=8, decoder_heads=2)


def tiny(out: str | Path, **changes: Any) -> pretrain.Recipe:
    base = pretrain.Recipe(
        name="tiny",
        data="scenes",
        model=ARCHITECTURE,
        training=Training(steps=4, checkpoint_every=1, log_every=1),
        batch_size=8,
        base_lr=0.1,
        size=16,
        crop=(16, 24),
        scenes=24,
        scene_side=24,
        out=str(out),
    )
    return replace(base, **changes)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    return tmp_path / "report" / "demo" / "croma"


def test_demo_recipe_is_the_full_method() -> None:
    recipe = read(evaluate.Recipe, RECIPES / "demo.yaml")
    model = recipe.pretrain.model
    assert (model.positions, model.mask_ratio, model.shared_mask, model.targets) == ("alibi", 0.75, False, "both")
    assert (model.contrastive_weight, model.reconstruction_weight, model.gather_gradient, len(recipe.seeds)) == (1, 1, "none", 3)


def test_default_recipe_is_the_base_model() -> None:
    recipe = pretrain.Recipe()
    assert (recipe.model.embed_dim, recipe.model.depth, recipe.model.num_heads, recipe.size, recipe.crop) == (768, 12, 16, 120, (60, 180))
    assert recipe.base_lr * 7200 / 256 == pytest.approx(1.125e-4)


def test_training_lowers_both_losses(tmp_path: Path) -> None:
    recipe = tiny(
        tmp_path, training=Training(steps=40, checkpoint_every=0, log_every=5), mixup=0.0, crop=(16, 16), scene_side=16, augment=False
    )
    pretrain.main(recipe)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["reconstruction"] < 0.9 * lines[0]["reconstruction"]
    assert lines[-1]["contrastive"] < lines[0]["contrastive"]
    assert load_encoders(recipe.folder).embed_dim == 16
    assert load_model(CROMA, recipe.folder).decoder.embed.out_features == 8


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain.main(tiny(tmp_path / "a"))
    forward, calls = CROMA.forward, []

    def failing(self: CROMA, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CROMA, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(tiny(tmp_path / "b"))
    again = pretrain.main(tiny(tmp_path / "b"))
    assert len(calls) == 3 + 2  # two steps were kept
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_may_start_from_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from projects.croma.weights import released_state

    torch.manual_seed(3)
    torch.save(released_state(Encoders(16, 2, 2)), tmp_path / "w.pt")
    pretrain.main(tiny(tmp_path, init=str(tmp_path / "w.pt"), training=Training(steps=1)))
    assert "parameters start fresh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "needs at least 2 samples"),
        ({"batch_size": 64}, "24 pairs are fewer than one batch of 64 x 1"),
        ({"size": 20}, "size=20: expected a multiple of the patch, 8; the next is 24"),
        ({"crop": (30, 20)}, "smallest, largest"),
    ],
)
def test_recipes_that_cannot_run_say_so(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain.main(tiny(tmp_path, **changes))
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(("text", "message"), [("model: {mask_ratio: 1.5}", "mask_ratio"), ("model: {heads: 2}", "heads"), ("model: {embed_dim: 10, num_heads: 4}", "multiple")])  # fmt: skip
def test_typos_and_wrong_values_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read(pretrain.Recipe, tmp_path / "r.yaml")


def test_two_processes_end_with_one_model(two_processes: Any, tmp_path: Path) -> None:
    from tests.projects.croma import ranks

    first, second = two_processes(ranks.pretrain, str(tmp_path))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# -- evaluation


def test_the_embedded_default_trains_probes_compares_draws_and_records(tmp_path: Path, records: Path) -> None:
    recipe = evaluate.Recipe(
        name="demo", experiment="scenes", pretrain=tiny("unused"), train=12, test=8, larger=[2], compare=["raw-means", "untrained", "sincos-interpolated"],
        demo=True, seeds=[0, 1], out=str(tmp_path / "runs"),
    )  # fmt: skip
    found = evaluate.main(recipe)
    assert set(found) == {"full", "raw-means", "untrained", "sincos-interpolated"}
    assert found["raw-means"].keys() == found["full"].keys() - {"retrieval (%)"}
    saved = read_records(records)
    assert len(saved) == 3 * 8 + 7
    assert all(len(one["values"]) == 2 for one in saved)
    for name in ("reconstruction", "class_map", "similarity"):
        assert (records / f"{name}.png").stat().st_size > 5_000
    assert evaluate.main(recipe) == found  # nothing is trained again
    with pytest.raises(ValueError, match=r"begun with another recipe: .*train"):
        evaluate.main(replace(recipe, train=13))


def separable(count: int = 40, kind: str = "single") -> data.Task:
    """Dark and bright images."""
    labels = torch.arange(count) % 2
    images = (labels * 100 + 60)[:, None, None, None].expand(count, 14, 16, 16).to(torch.uint8).numpy().copy()
    images += np.random.default_rng(0).integers(0, 30, images.shape, dtype=np.uint8)
    target = torch.stack([labels, 1 - labels], 1) if kind == "multi" else labels
    if kind == "segmentation":
        target = labels[:, None, None].expand(count, 16, 16).clone()
        target[:, 0, 0] = 255
    split = data.Split(images, target)
    return data.Task("bright", kind, ("optical", "radar"), 2, split, split, split, "all", "none")  # type: ignore[arg-type]


def test_every_protocol_finds_what_is_plain_to_see() -> None:
    torch.manual_seed(0)
    model = Encoders(16, 2, 2)
    how = probing.Probes(lrs=(1e-2, 1e-1), epochs=20, batch_size=16, hidden=8, neighbours=5)
    for sensors in ("radar", "optical", "joint"):
        features = probing.vectors(model, separable(), sensors)
        for protocol in ("linear", "mlp", "knn", "kmeans"):
            assert next(iter(probing.probe(features, separable(), protocol, how).values())) == 100, (sensors, protocol)
    several = separable(kind="multi")
    features = probing.vectors(model, several, "joint", "concat")
    assert features["train"].shape == (40, 48)
    for protocol in ("linear", "knn"):
        found = probing.probe(features, several, protocol, how)
        assert (found["mAP micro (%)"], found["mAP macro (%)"]) == (100, 100)
    with pytest.raises(ValueError, match="several labels"):
        probing.probe(features, several, "kmeans", how)
    with pytest.raises(ValueError, match=r"sensors=joint: bright has \['optical'\] only, \['radar'\] is missing"):
        probing.vectors(model, replace(several, channels=("optical",)), "joint")


def fine(tmp_path: Path, **changes: Any) -> finetune.Recipe:
    base = finetune.Recipe(
        name="fine", pretrain=tiny("unused"), untrained=True, task="scenes", training=Training(epochs=8, log_every=100), batch_size=8,
        lrs=[1e-4, 3e-2], out=str(tmp_path / "runs"), demo=True,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize(("kind", "frozen"), [("single", False), ("multi", False), ("segmentation", True), ("segmentation", False)])
def test_fine_tuning_learns_and_records(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch, kind: str, frozen: bool) -> None:
    task = separable(kind=kind)
    monkeypatch.setattr(finetune, "load_task", lambda *_, **__: task)
    recipe = fine(tmp_path, frozen=frozen, mixup=0.8 if kind == "single" else 0.0)
    before = {name: value.clone() for name, value in finetune.model_of(recipe, task, 0).state_dict().items()}
    found = finetune.main(recipe)
    metric = {"single": "top-1 (%)", "multi": "mAP micro (%)", "segmentation": "mIoU (%)"}[kind]
    assert found[metric][0] > (80 if frozen else 95)
    record = read_records(records, "fine")[0]
    assert record["extra"]["lr"][0] in (1e-4, 3e-2)
    after = finetune.load_downstream(finetune.folder_of(recipe, 3e-2, 0))
    assert isinstance(after, Segmenter) == (kind == "segmentation")
    assert bands.kept_statistics(finetune.folder_of(recipe, 3e-2, 0)) == task.sensor_statistics()
    moved = not torch.equal(after.encoders.radar_encoder.embed.weight, before["encoders.radar_encoder.embed.weight"])
    assert moved != frozen
    if kind == "segmentation":
        assert (records / "segmentation_fine.png").stat().st_size > 2_000


# -- scenes larger than a tile


def scene_files(folder: Path, height: int = 52, width: int = 76) -> tuple[ScenePair, dict[str, Any]]:
    rasterio = pytest.importorskip("rasterio")
    found = scenes(3, 1, 80)
    profile = {"driver": "GTiff", "height": height, "width": width, "crs": "EPSG:32633", "dtype": "float32", "nodata": -9999.0}
    profile["transform"] = rasterio.Affine(10, 0, 500000, 0, -10, 5000000)
    paths = {}
    for name, values, order in (("optical", found.optical[0], bands.OPTICAL), ("radar", found.radar[0], bands.RADAR)):
        values = values[:, :height, :width].clone()
        values[:, 40:, :8] = -9999  # a corner without data
        paths[name] = folder / f"{name}.tif"
        with rasterio.open(paths[name], "w", count=len(values), **profile) as target:
            target.write(values.numpy())
            target.descriptions = order
    return ScenePair(paths["optical"], paths["radar"], {"optical": bands.SSL4EO_OPTICAL, "radar": bands.SSL4EO_RADAR}), paths


def test_features_of_a_scene_keep_its_georeference(tmp_path: Path) -> None:
    import rasterio

    scene, _ = scene_files(tmp_path)
    torch.manual_seed(0)
    model = Encoders(16, 2, 2)
    whole = infer.write_map(model, scene, tmp_path / "whole.tif", tile=80, margin=0)
    with rasterio.open(whole) as found:
        assert (found.count, found.height, found.width, found.crs.to_epsg()) == (16, 7, 10, 32633)
        assert tuple(found.transform)[:6] == (80, 0, 500000, 0, -80, 5000000)
        features = found.read()
    assert np.isnan(features[:, 5:, 0]).all()
    assert not np.isnan(features[:, :5]).any()
    # one tile holds the scene, extended to whole patches: the model's own tokens
    images, _ = scene.read(0, 0, 56, 80)
    with torch.no_grad():
        tokens = model(**{name: image[None] for name, image in images.items()}).joint[0].T.reshape(16, 7, 10)
    np.testing.assert_allclose(features[:, :5], tokens[:, :5].numpy(), rtol=1e-4, atol=1e-5)
    # tiles with a margin are close to the whole, since distant patches hardly count; every pixel is written once
    tiled = infer.write_map(model, scene, tmp_path / "tiled.tif", tile=48, margin=16)
    with rasterio.open(tiled) as found:
        again = found.read()
    assert np.isnan(again).sum() == np.isnan(features).sum()
    inside = ~np.isnan(features)
    assert np.corrcoef(again[inside], features[inside])[0, 1] > 0.99


def test_classes_of_a_scene_are_written_pixel_by_pixel(tmp_path: Path) -> None:
    import rasterio

    scene, _ = scene_files(tmp_path)
    torch.manual_seed(0)
    model = Segmenter({"embed_dim": 16, "depth": 2, "num_heads": 2}, classes=5).eval()
    with rasterio.open(infer.write_map(model, scene, tmp_path / "classes.tif", tile=48, margin=8)) as found:
        classes = found.read(1)
        assert (found.nodata, found.dtypes[0], classes.shape) == (255, "uint8", (52, 76))
        assert tuple(found.transform)[:6] == (10, 0, 500000, 0, -10, 5000000)
    assert (classes[40:, :8] == 255).all()
    assert classes[:40].max() < 5
    with rasterio.open(infer.write_map(model, scene, tmp_path / "once.tif", tile=80, margin=0)) as found:
        images, _ = scene.read(0, 0, 56, 80)
        expected = model(**{name: image[None] for name, image in images.items()}).argmax(1)[0, :40, :76]
        np.testing.assert_array_equal(found.read(1)[:40], expected.numpy())


def test_a_scene_larger_than_memory_is_read_and_written_tile_by_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 x 3,000 pixels of 14 bands are 504 MB; 200 x 200 of them hold data."""
    import tracemalloc

    import rasterio

    found, side, row, column = scenes(3, 1, 200), 3000, 1560, 904
    profile = {"driver": "GTiff", "height": side, "width": side, "crs": "EPSG:32633", "dtype": "float32", "nodata": -9999.0}
    profile |= {"transform": rasterio.Affine(10, 0, 500000, 0, -10, 5000000), "tiled": True, "SPARSE_OK": True}
    paths = {}
    for name, values, order in (("optical", found.optical[0], bands.OPTICAL), ("radar", found.radar[0], bands.RADAR)):
        paths[name] = tmp_path / f"{name}.tif"
        with rasterio.open(paths[name], "w", count=len(values), **profile) as target:
            target.write(values.numpy(), window=rasterio.windows.Window(column, row, 200, 200))
            target.descriptions = order
    scene = ScenePair(paths["optical"], paths["radar"], {"optical": bands.SSL4EO_OPTICAL, "radar": bands.SSL4EO_RADAR})
    read, windows, encoded = ScenePair.read, [], []
    monkeypatch.setattr(ScenePair, "read", lambda self, *window: windows.append(window) or read(self, *window))
    tile_features = infer.tile_features
    monkeypatch.setattr(infer, "tile_features", lambda *given: encoded.append(0) or tile_features(*given))
    torch.manual_seed(0)
    model = Encoders(16, 2, 2)
    tracemalloc.start()
    out = infer.write_map(model, scene, tmp_path / "features.tif", tile=192, margin=32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # NumPy's arrays, whatever the scene's size; a tile of 14 bands is 2 MB
    assert max(window[2] * window[3] for window in windows) <= 192**2
    assert len(windows) == 24**2
    assert 0 < len(encoded) <= 9  # tiles without data are not encoded
    with rasterio.open(out) as written:
        assert (written.shape, written.block_shapes[0]) == ((375, 375), (16, 16))
        assert tuple(written.transform)[:6] == (80, 0, 500000, 0, -80, 5000000)
        features = written.read()
    present = ~np.isnan(features).any(0)
    rows, columns = np.nonzero(present)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (195, 219, 113, 137)
    # a patch in the middle of the data: that of its own tile
    top, left = 195 // 16 * 16, 113 // 16 * 16
    images, _ = scene.read(8 * top - 32, 8 * left - 32, 192, 192)
    expected = tile_features(model, images, "joint")[:, 4:20, 4:20].numpy()
    inside = present[top : top + 16, left : left + 16]
    np.testing.assert_allclose(features[:, top : top + 16, left : left + 16][:, inside], expected[:, inside], rtol=1e-4, atol=1e-5)


def test_infer_scales_by_what_the_run_folder_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, paths = scene_files(tmp_path)
    pretrain.main(tiny(tmp_path, training=Training(steps=1)))
    used = []
    monkeypatch.setattr(infer, "write_map", lambda model, scene, out, **_: used.append(dict(scene.statistics)) or out)
    recipe = infer.Recipe(str(tiny(tmp_path).folder), str(tmp_path / "f.tif"), str(paths["optical"]), str(paths["radar"]))
    for constants in ("kept", "fmow"):
        infer.main(replace(recipe, constants=constants))
    own = data.by_sensor(data.scene_statistics(24))
    assert used == [own, own | {"optical": bands.FMOW_OPTICAL}]
    (tiny(tmp_path).folder / bands.KEPT).unlink()
    infer.main(recipe)
    assert used[-1] == {"optical": bands.SSL4EO_OPTICAL, "radar": bands.SSL4EO_RADAR}


def test_infer_runs_from_its_recipe_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    import rasterio

    _, paths = scene_files(tmp_path)
    run = pretrain.main(tiny(tmp_path, training=Training(steps=1)))
    folder = tiny(tmp_path).folder
    recipe = infer.Recipe(str(folder), str(tmp_path / "f.tif"), str(paths["optical"]), str(paths["radar"]), tile=48, margin=8)
    with rasterio.open(infer.main(recipe)) as found:
        assert found.count == run.encoders.embed_dim
    with pytest.raises(ValueError, match=r"sensors=joint needs .* got \['optical'\]; give --radar"):
        infer.main(replace(recipe, radar=None))
    infer.main(replace(recipe, radar=None, sensors="optical"))
    with pytest.raises(ValueError, match=r"classes need a segmentation head|is it the checkpoint of another model"):
        infer.main(replace(recipe, output="classes"))
    with rasterio.open(paths["radar"]) as source:
        profile, values = source.profile, source.read()
    for change, message in (
        ({"crs": "EPSG:32634"}, "CRS EPSG:32634, but optical has EPSG:32633"),
        ({"transform": rasterio.Affine(10, 0, 500005, 0, -10, 5000000)}, "resample one to the other's grid"),
    ):
        with rasterio.open(tmp_path / "other.tif", "w", **{**profile, **change}) as target:
            target.write(values)
            target.descriptions = bands.RADAR
        with pytest.raises(ValueError, match=message):
            infer.main(replace(recipe, radar=str(tmp_path / "other.tif"), out=str(tmp_path / "no.tif")))
    with rasterio.open(tmp_path / "linear.tif", "w", **profile) as target:
        target.write(np.where(values > -9999, 10 ** (values / 10), -9999).astype("float32"))
    with pytest.raises(ValueError, match="a name for each of its 2 bands"):
        infer.main(replace(recipe, radar=str(tmp_path / "linear.tif")))
    with pytest.raises(ValueError, match="values look linear"):
        infer.main(replace(recipe, radar=str(tmp_path / "linear.tif"), radar_names=["VV", "VH"]))
    assert not (tmp_path / "no.tif").exists()
    with pytest.raises(ValueError, match="multiples of 8"):
        infer.Recipe(tile=50)
