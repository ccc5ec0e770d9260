"""From recipe to record on the embedded default: learning, exact resume, two processes, evaluation, fine-tuning, linear probe, bad recipes."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from common import results
from common.checkpoint import load_model
from common.data import checksum
from common.engine import NonFiniteLoss, Training
from common.recipe import parse, read
from projects.mixed_ae import Classifier, MixedAE, evaluate, finetune, pretrain
from projects.mixed_ae.data import Split, textured
from tests.conftest import ROOT

RECIPES = Path(pretrain.__file__).parent / "recipes"
TABLES = RECIPES.parent / "tables.yaml"
SMALL = pretrain.Architecture(
    image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2
)


def tiny(out: Path | str, **changes: Any) -> pretrain.Recipe:
    given: dict[str, Any] = {
        "name": "tiny",
        "data": "textured",
        "train_images": 32,
        "test_images": 16,
        "crop": False,
        "model": SMALL,
        "batch_size": 8,
        "base_lr": 0.05,
        "warmup": 0.5,
        "training": Training(steps=4, log_every=1, checkpoint_every=1),
        "out": str(out),
    }
    return pretrain.Recipe(**(given | changes))


def objects(count: int = 32) -> Split:
    return textured(count, 0, size=16, patch=4)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder where this test's records and pictures go."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    return tmp_path / "report" / "demo" / "mixed_ae"


def test_the_demo_line_of_the_readme_is_the_whole_method() -> None:
    line = next(line for line in (ROOT / "projects/mixed_ae/README.md").read_text().splitlines() if line.startswith("python"))
    words = shlex.split(line.partition("#")[0])
    assert words[1:3] == ["-m", "projects.mixed_ae.evaluate"]
    recipe = read(evaluate.Recipe, ROOT / words[4])
    method = recipe.pretrain.method
    assert method == pretrain.Method()
    assert (method.mixing, method.ratio, method.homologous, method.segments, method.weight) == ("compose", 0.25, True, True, 0.1)
    assert len(recipe.seeds) == 3


def test_it_learns_and_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = Training(steps=40, log_every=5, checkpoint_every=0)
    pretrain.main(tiny(tmp_path, name="long", training=long), objects())
    curve = lines(tmp_path / "long" / "seed-0")
    assert curve[-1]["loss"] < 0.85 * curve[0]["loss"]
    assert {"reconstruction", "contrast", "accuracy_0", "accuracy_1"} <= curve[0].keys()

    whole = pretrain.main(tiny(tmp_path / "a"), objects())
    forward, calls = MixedAE.forward, []

    def failing(self: MixedAE, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MixedAE, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(tiny(tmp_path / "b"), objects())
    again = pretrain.main(tiny(tmp_path / "b"), objects())
    assert len(calls) == 3 + 2  # two steps were kept
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    kept = load_model(MixedAE, tiny(tmp_path / "b").folder)
    assert torch.equal(kept.segment_embed, whole.segment_embed)


def test_a_loss_that_is_not_finite_says_both_terms(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"step \d.*reconstruction \S+, contrast \S+, largest contrastive logit \S+; lower base_lr"):
        pretrain.main(tiny(tmp_path, base_lr=1e12, warmup=0.0, training=Training(steps=6, log_every=2)), objects())


def test_evaluation_trains_compares_records_and_draws(tmp_path: Path, records: Path) -> None:
    recipe = evaluate.Recipe(
        tiny(tmp_path),
        seeds=[0, 1],
        compare=["mae", "naive", "full-mixing"],
        untrained=True,
        neighbours=5,
        dense_images=16,
        demo=True,
        out=str(tmp_path),
    )
    found = results.read_records(evaluate.main(recipe).parent)
    assert {r["extra"]["row"] for r in found} == {"all", "mae", "naive", "full-mixing", "untrained"}
    by = {(r["extra"]["row"], r["metric"]): r["values"] for r in found}
    assert {metric for row, metric in by if row == "all"} >= {
        evaluate.LINEAR,
        evaluate.KNN,
        evaluate.IOU,
        evaluate.RECOGNISED,
        evaluate.CONTRAST,
    }
    assert all(len(values) == 2 for values in by.values())
    assert ("mae", evaluate.RECOGNISED) not in by
    assert 0 < by["all", evaluate.RECOGNISED][0] < 100
    assert len(list(records.glob("*.png"))) == 3
    evaluate.main(replace(recipe, compare=[], untrained=False))  # nothing is trained again
    again = {r["metric"]: r["values"] for r in results.read_records(records) if r["extra"]["row"] == "all"}
    assert again[evaluate.LINEAR] == by["all", evaluate.LINEAR]


def test_real_files_become_records_of_the_rows(tmp_path: Path, records: Path) -> None:
    """Tiny-ImageNet's recipe on a small file of its format: what is recorded is what its rows in tables.yaml look for."""
    from tests.projects.mixed_ae.test_data import write_parquet

    cells, names = [png(image) for image in objects(32).pixels], [f"class {i}" for i in range(8)]
    for part, kept in (("train", slice(None)), ("val", slice(8))):
        write_parquet(tmp_path / "tinyimagenet" / f"{part}.parquet", cells[kept], objects(32).labels.tolist()[kept], names)
    recipe = read(evaluate.Recipe, RECIPES / "tinyimagenet.yaml")
    small = replace(recipe.pretrain, model=SMALL, batch_size=8, training=Training(steps=2, log_every=1))
    recipe = replace(recipe, pretrain=small, neighbours=5, data_root=str(tmp_path), out=str(tmp_path / "runs"))
    found = results.read_records(evaluate.main(recipe).parent)
    made = {(record["recipe"], record["extra"]["row"], record["metric"]) for record in found}
    rows = [row for row in results.yaml.safe_load(TABLES.read_text())["rows"] if row.get("recipe") == "recipes/tinyimagenet.yaml"]
    assert rows
    assert {(row["recipe"], row["row"], row["metric"]) for row in rows} <= made
    hashes = [checksum(tmp_path / "tinyimagenet" / f"{part}.parquet") for part in ("val", "train")]
    assert all([record["data"]["sha256"], record["data"]["training_sha256"]] == hashes for record in found)
    folder = tmp_path / "projects" / "mixed_ae" / "results"
    assert [path.name for path in folder.rglob("*.png")] == ["tinyimagenet_course.png"]
    assert {path.name for path in records.iterdir()} == {  # they show the data set's images
        "tinyimagenet_reconstructions.png",
        "tinyimagenet_kept_keys.png",
    }


def png(image: Tensor) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "PNG")
    return stream.getvalue()


def test_every_row_measured_by_evaluate_names_what_its_recipe_measures() -> None:
    measured = {evaluate.LINEAR, evaluate.KNN, evaluate.IOU, evaluate.RECOGNISED, evaluate.CONTRAST}
    content = results.yaml.safe_load(TABLES.read_text())
    rows = [row for row in content["rows"] + content["demo"]["rows"] if "row" in row]
    assert {row["recipe"] for row in rows} == {f"recipes/{name}.yaml" for name in ("demo", "ordering", "cifar10", "tinyimagenet")}
    for row in rows:
        recipe = read(evaluate.Recipe, TABLES.parent / row["recipe"])
        assert recipe.demo == (row in content["demo"]["rows"])
        if row["row"] == "information":
            assert recipe.information
            assert row["metric"] in evaluate.FILLERS.values()
        else:
            assert row["row"] in {"all", *recipe.compare, *(["untrained"] if recipe.untrained else [])}
            assert row["metric"] in measured


def test_related_images_meet_in_groups(tmp_path: Path) -> None:
    pretrain.main(tiny(tmp_path, related=0.8, training=Training(steps=1)), None)
    ratio = evaluate.information(0, 4, groups=150)
    assert ratio[evaluate.FILLERS[0.8]] < ratio[evaluate.FILLERS[0.0]]


def test_object_iou() -> None:
    truth, found = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert evaluate.iou(truth, found) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize("protocol", ["finetune", "linear_probe"])
def test_fine_tuning_and_linear_probe_start_from_the_run(protocol: Any, tmp_path: Path, records: Path) -> None:
    recipe = finetune.Recipe(
        name=f"tiny_{protocol}",
        pretrain=tiny(tmp_path, crop=True),
        protocol=protocol,
        batch_size=8,
        base_lr=0.05,
        warmup=0.5,
        training=Training(steps=6, log_every=1, checkpoint_every=0),
        out=str(tmp_path),
    )
    for _ in range(2):  # the second finds the scores
        path = finetune.main(recipe)
    record, again = results.read_records(path.parent)
    assert record["metric"] == "top-1 (%)"
    assert record["extra"] == {"protocol": protocol, "start": "pretrained"}
    assert again["values"] == record["values"]
    if protocol == "finetune":
        tuned, source = load_model(Classifier, recipe.folder), load_model(MixedAE, tiny(tmp_path, crop=True).folder)
        assert not torch.equal(tuned.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
        scratch = finetune.build(replace(recipe, start="scratch"), 8)
        started = finetune.build(recipe, 8)
        assert torch.equal(started.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
        assert not torch.equal(scratch.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_rates_fall_with_depth_as_in_mae(tmp_path: Path) -> None:
    recipe = finetune.Recipe(pretrain=tiny(tmp_path), layer_decay=0.5, weight_decay=0.05, start="scratch")
    model = finetune.build(recipe, 3)
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in finetune.optimizer(model, recipe, 1e-3).param_groups for p in g["params"]}
    rates = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert rates["cls_token"] == rates["pos_embed"] == (0.125, 0.0)
    assert rates["patch_embed.proj.weight"] == (0.125, 0.05)
    assert rates["blocks.0.attn.qkv.weight"] == (0.25, 0.05)
    assert rates["blocks.1.mlp.fc1.bias"] == (0.5, 0.0)
    assert rates["head.weight"] == (1.0, 0.05)
    assert rates["fc_norm.weight"] == (1.0, 0.0)


def test_a_flat_folder_cannot_be_classified(tmp_path: Path) -> None:
    flat = replace(objects(8), labels=torch.full((8,), -1))
    with pytest.raises(ValueError, match="expected labels, from train/<class>"):
        finetune.train(finetune.Recipe(pretrain=tiny(tmp_path), out=str(tmp_path)), (flat, flat))
    with pytest.raises(ValueError, match="mixup pairs images, expected an even number"):
        finetune.loader_of(finetune.Recipe(pretrain=tiny(tmp_path, crop=True), batch_size=7), objects(), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "6"], "batch_size of 6 images: expected whole groups of 4; the nearest valid size is 8"),
        (["--method.ratio", "0.3"], "expected one over a whole number"),
        (["--method.ratio", "0.125"], "196 patches, which groups of 8 do not divide"),
        (["--method.temperature", "0"], "temperature"),
        (["--method.weight", "-1"], "weight"),
        (["--method.count", "500"], "count=500: expected 1 to 196"),
        (["--method.mixing", "none"], "has no groups"),
        (["--method.mixing", "cutmix"], "mixing"),
        (["--related", "1"], "related=1"),
    ],
)
def test_recipes_that_cannot_work_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(pretrain.Recipe, arguments)
    assert message in capsys.readouterr().err


def test_published_recipes_say_what_the_paper_says() -> None:
    recipe = read(pretrain.Recipe, RECIPES / "imagenet_1600.yaml")
    model, method = recipe.model, recipe.method
    assert (model.image_size, model.patch_size, model.embed_dim, model.depth, model.decoder_dim, model.decoder_depth) == (
        224,
        16,
        768,
        12,
        512,
        8,
    )
    assert (method.ratio, method.temperature, method.weight, recipe.base_lr, recipe.warmup, recipe.training.epochs) == (
        0.25,
        0.25,
        0.1,
        1.5e-4,
        40,
        1600,
    )
    tuned = read(finetune.Recipe, RECIPES / "imagenet_1600_finetune.yaml")
    assert (tuned.layer_decay, tuned.drop_path, tuned.augment.mixup, tuned.training.epochs) == (0.65, 0.1, 0.8, 100)
    naive = pretrain.variant(recipe, "naive")
    for name in ("mae", "naive"):
        baseline = read(finetune.Recipe, RECIPES / f"imagenet_1600_{name}_finetune.yaml")
        assert baseline == replace(tuned, name=baseline.name, pretrain=pretrain.variant(tuned.pretrain, name))
    assert naive.name == "imagenet_1600-naive"
    assert (naive.method.segments, naive.method.homologous, naive.method.weight) == (False, False, 0.0)


# -- two processes


def _train(rank: int, out: str) -> dict[str, Tensor]:
    recipe = tiny(out, training=Training(steps=2, log_every=1, checkpoint_every=1))
    return {name: value.clone() for name, value in pretrain.main(recipe, objects()).state_dict().items()}


def test_two_processes_end_with_one_model(two_processes: Any, tmp_path: Path) -> None:
    first, second = two_processes(_train, str(tmp_path))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _gradient(rank: int, halves: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = pretrain.build(tiny("unused")).double()
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    noise = torch.rand(2, 16)
    net: Any = model
    if halves:
        net = torch.nn.parallel.DistributedDataParallel(model)
        images, noise = images[4 * rank : 4 * rank + 4], noise[rank : rank + 1]
    net(images, noise=noise).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_two_processes_have_the_gradient_of_one(two_processes: Any) -> None:
    first, _ = two_processes(_gradient, True)
    whole = _gradient(0, False)
    for name, value in whole.items():
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-12)
