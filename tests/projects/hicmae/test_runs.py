"""From recipe to record on small data: learning, exact resume, folds pooled, both tasks, two processes; recipes that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common import results
from common.checkpoint import load_model
from common.engine import Training
from common.recipe import read
from common.results import read_records
from projects.hicmae import EmotionModel, HiCMAE, evaluate, finetune, pretrain
from projects.hicmae.finetune import RECIPES
from projects.hicmae.talkers import SyntheticTalkers
from projects.hicmae.weights import reference_state
from tests.projects.hicmae.test_data import crema  # noqa: F401

SMALL = {
    "image_size": 16,
    "frames": 16,
    "patch_size": 8,
    "tubelet": 2,
    "audio_size": [32, 16],
    "audio_patch_size": 8,
    "embed_dim": 16,
    "num_heads": 2,
}
SMALL |= {"depth": 2, "fusion_depth": 1, "decoder_dim": 8, "decoder_heads": 2, "decoder_depth": 2, "levels": [2]}


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder where this test's records and pictures go."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PROJECTS", tmp_path / "projects")
    return tmp_path / "report" / "demo" / "hicmae"


def before(out: Path, **changes: Any) -> pretrain.Recipe:
    base = read(pretrain.Recipe, RECIPES / "pretrain-talkers.yaml", out=str(out))
    small = {"model": replace(base.model, **SMALL), "batch_size": 4, "clips": 12, "warmup_epochs": 0.0}
    return replace(base, **(small | {"training": Training(epochs=2, checkpoint_every=1, log_every=1)} | changes))


def after(out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> finetune.Recipe:
    """A small recipe whose pre-training is `before`."""
    monkeypatch.setattr(finetune, "read", lambda _kind, _path, **given: before(Path(given["out"]), seed=given["seed"]))
    base = read(finetune.Recipe, RECIPES / "demo.yaml", out=str(out))
    small = {
        "training": Training(epochs=2, log_every=1),
        "batch_size": 4,
        "labels_per_class": 2,
        "test_clips": 8,
        "compare": [],
        "seeds": [0],
    }
    return replace(base, **(small | changes))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_demo_recipe_is_the_full_method() -> None:
    recipe = read(finetune.Recipe, RECIPES / "demo.yaml")
    model = finetune.pretraining(recipe).model
    assert (recipe.data, recipe.pretrain, recipe.modality, recipe.feature_fusion) == ("talkers", "pretrain-talkers", "av", "weighted")
    assert (model.levels, model.skip, model.contrastive_levels, model.target) == ([2, 4], True, None, "difference")
    assert model.contrastive_weight > 0
    assert sum(p.numel() for p in pretrain.build(model).parameters()) == pytest.approx(0.93e6, rel=0.01)


def test_defaults_are_the_paper() -> None:
    recipe, tuned = read(pretrain.Recipe, RECIPES / "pretrain-base.yaml"), read(finetune.Recipe, RECIPES / "crema-d.yaml")
    assert (recipe.model.embed_dim, recipe.model.levels, recipe.model.mask_ratio, recipe.model.audio_mask_ratio) == (
        512,
        [4, 7, 10],
        0.9,
        0.8,
    )
    assert (recipe.base_lr, recipe.batch_size, recipe.training.epochs, recipe.model.contrastive_weight) == (3e-4, 40, 100, 0.0025)
    assert (tuned.base_lr, tuned.layer_decay, tuned.drop_path, tuned.mixup, tuned.smoothing) == (1e-3, 0.75, 0.1, 0.8, 0.1)
    ablated = read(finetune.Recipe, RECIPES / "mafw-none.yaml")
    assert finetune.pretraining(ablated).model.skip is False
    assert finetune.pretraining(ablated).name == "pretrain-base-skip=False-contrastive_weight=0.0"


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = SyntheticTalkers(0, 12, size=16, frames=32, bins=16)
    whole = pretrain.main(before(tmp_path / "a"), clips)
    forward, calls = HiCMAE.forward, []

    def failing(self: HiCMAE, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(HiCMAE, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(before(tmp_path / "b"), clips)
    again = pretrain.main(before(tmp_path / "b"), clips)
    assert len(calls) == 5 + 2  # four of six steps were kept
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    kept = load_model(HiCMAE, before(tmp_path / "b").folder)
    assert torch.equal(kept.decoder.mask_token, whole.decoder.mask_token)
    with pytest.raises(ValueError, match=r"begun with another recipe: .*base_lr"):
        pretrain.main(before(tmp_path / "b", base_lr=1e-4), clips)


def test_pre_training_learns(tmp_path: Path) -> None:
    recipe = before(tmp_path, training=Training(epochs=12, checkpoint_every=0, log_every=1), base_lr=0.3)
    pretrain.main(recipe)
    curve = losses(recipe.folder)
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])


def test_row_trains_compares_draws_and_records(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "HELD_OUT", 8)
    recipe = after(tmp_path / "runs", monkeypatch, seeds=[0, 1], compare=["audio", "video", "scratch", "no-contrast", "last-feature"])
    found = evaluate.main(recipe)
    written = read_records(records)
    rows = {(r["extra"]["row"], r["metric"]) for r in written}
    assert {(row, "WAR (%)") for row in ("full", *recipe.compare)} <= rows
    assert {("full", "retrieval R@1, level 2 (%)"), ("no-contrast", "masked reconstruction loss"), ("full", "linear probe (%)")} <= rows
    assert all(len(r["values"]) == 2 for r in written)
    assert {path.stem for path in records.glob("*.png")} == {
        f"pretrain-talkers_{what}" for what in ("reconstruction", "retrieval", "attention")
    }
    assert evaluate.record_row(recipe, recipe, "full") == found  # nothing is trained again
    evaluate.record_row(recipe, replace(recipe, name="ordering"), "full")  # only the demo's figures stay out of the project's results
    assert len(read_records(tmp_path / "projects/hicmae/results", "ordering")) == 3
    kept = load_model(EmotionModel, replace(recipe, seed=1).folder)
    assert kept.head.out_features == 4


def test_fine_tuning_learns_what_each_modality_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {
        "labels_per_class": 32,
        "training": Training(epochs=30, checkpoint_every=0),
        "test_clips": 60,
        "modality": "a",
        "pretrain": "none",
    }
    recipe = after(tmp_path, monkeypatch, **long, batch_size=16, base_lr=0.1, layer_decay=1.0)
    recipe = replace(recipe, model=replace(recipe.model, **SMALL))
    tested = finetune.main(recipe)
    arousal = tested.scores.unflatten(1, (2, 2)).sum(1).argmax(1)
    assert (arousal == tested.labels % 2).double().mean() > 0.8
    assert tested.figures["WAR (%)"] < 70  # valence cannot be heard


def test_folds_of_a_real_layout_are_pooled(crema: Path, tmp_path: Path, records: Path) -> None:  # noqa: F811
    first = crema / "hicmae" / "crema-d" / "audio_visual" / "split01"
    second = first.with_name("split02")
    second.mkdir()
    for part, rows in (("train", slice(0, 10)), ("test", slice(10, 12))):
        lines = (first / "train.csv").read_text().splitlines()[rows]
        (second / f"{part}.csv").write_text("\n".join(lines) + "\n")
    recipe = read(finetune.Recipe, RECIPES / "crema-d.yaml", out=str(tmp_path / "runs"), data_root=str(crema), workers=0)
    recipe = replace(
        recipe,
        path_map={"/share": str(crema)},
        folds=[1, 2],
        pretrain="none",
        model=replace(recipe.model, **SMALL),
        training=Training(epochs=2, checkpoint_every=0),
        batch_size=4,
    )
    with pytest.warns(UserWarning, match="absent from the test set"):
        evaluate.main(recipe)
    written = {r["metric"]: r for r in read_records(tmp_path / "projects/hicmae/results")}
    assert set(written) == {"WAR (%)", "UAR (%)", "WA-F1 (%)"}
    tested = [finetune.main(replace(recipe, fold=fold)) for fold in (1, 2)]
    right = sum(int((t.scores.argmax(1) == t.labels).sum()) for t in tested)
    assert written["WAR (%)"]["values"] == pytest.approx([100 * right / 8])
    assert len(written["WAR (%)"]["extra"]["folds"][0]) == 2
    assert (replace(recipe, fold=2).folder / "best.json").is_file()

    # the same models as released files, tested without training
    for fold in (1, 2):
        model = load_model(EmotionModel, replace(recipe, fold=fold).folder)
        torch.save({"model": reference_state(model)}, tmp_path / f"fold{fold}.pth")
    given = replace(recipe, name="given", select="given", weights=str(tmp_path / "fold{fold}.pth"))
    with pytest.warns(UserWarning, match=r"another size \(image_size 160 there, 16 here"):
        evaluate.main(given)
    again = read_records(tmp_path / "projects/hicmae/results", "given")
    figures = {r["extra"]["row"]: r["values"][0] for r in again if r["metric"] == "WAR (%)"}
    assert figures == pytest.approx({"given": 100 * right / 8} | {f"given fold {f}": tested[f - 1].figures["WAR (%)"] for f in (1, 2)})
    assert {r["weights"] for r in again} == {"official, converted"}
    with pytest.raises(ValueError, match="select: given tests a fine-tuned model, found no weights"):
        finetune.main(replace(given, name="none", weights=None))


def test_dimensional_task_and_unimodal_rows(crema: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = crema / "hicmae" / "werewolf-xl" / "audio_visual" / "split01"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        lines = (crema / "hicmae" / "crema-d" / "audio_visual" / "split01" / f"{part}.csv").read_text().splitlines()
        (folder / f"{part}.csv").write_text("".join(f"{line.rsplit(' ', 1)[0]} 0.5 {i % 3} {i / 7}\n" for i, line in enumerate(lines)))
    recipe = read(finetune.Recipe, RECIPES / "werewolf-xl.yaml", out=str(tmp_path / "runs"), data_root=str(crema), workers=0)
    recipe = replace(recipe, path_map={"/share": str(crema)}, pretrain="none", model=replace(recipe.model, **SMALL))
    recipe = replace(recipe, training=Training(epochs=1, checkpoint_every=0), batch_size=3, select="last")
    with pytest.warns(UserWarning, match="are constant"):
        tested = finetune.main(recipe)
    assert tested.scores.shape == (6, 3)
    assert {"mean CCC (%)", "PCC valence (%)", "CCC arousal (%)"} <= tested.figures.keys()
    for loss in ("ccc", "pcc"):
        one = replace(recipe, loss=loss, modality="a", name=loss)
        with pytest.warns(UserWarning, match="are constant"):
            assert finetune.main(one).scores.isfinite().all()


def test_fine_tuning_starts_from_a_run_folder_or_a_released_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = after(tmp_path, monkeypatch)
    trained = pretrain.main(before(tmp_path))
    torch.save({"model": reference_state(trained)}, tmp_path / "checkpoint-99.pth")
    for weights in (tmp_path / "checkpoint-99.pth", before(tmp_path).folder):  # the file is taken for one at the published input sizes
        model = finetune.build(replace(recipe, weights=str(weights)), before(tmp_path))
        assert torch.equal(model.encoder_fusion.norm.weight, trained.encoder_fusion.norm.weight)
        assert torch.equal(model.encoder.embed.proj.weight, trained.encoder.embed.proj.weight)


def test_speech_row_of_the_audio_branch(shared_data: Path, tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(pretrain.Recipe, RECIPES / "pretrain-speech.yaml", out=str(tmp_path / "runs"), data_root=str(shared_data))
    first = replace(first, model=replace(first.model, **SMALL), training=Training(steps=2, log_every=1))
    recipe = read(finetune.Recipe, RECIPES / "speech.yaml", out=str(tmp_path / "runs"), data_root=str(shared_data))
    monkeypatch.setattr(finetune, "read", lambda _kind, _path, **given: replace(first, seed=given["seed"]))
    found = evaluate.main(replace(recipe, training=Training(steps=2, log_every=1), seeds=[0]))
    assert 24 * found["WAR (%)"][0] / 100 == pytest.approx(round(24 * found["WAR (%)"][0] / 100))
    written = read_records(tmp_path / "projects/hicmae/results", "speech")
    assert {r["metric"] for r in written} == {"WAR (%)", "UAR (%)", "WA-F1 (%)"}
    assert all(r["data"]["split"] == "actors 10 to 12 (24 clips)" for r in written)
    assert (tmp_path / "report/demo/hicmae/pretrain-speech_reconstruction.png").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: fer2013", "expected one of mafw"),
        ("data: speech", "expected modality a, found av"),
        ("{data: mer-multi, folds: [1, 2]}", "fold 2: mer-multi has folds 1 to 1"),
        ("layer_decay: 2", "layer_decay"),
        ("modalty: a", "modalty"),
        ("compare: [nothing]", "compare"),
    ],
)
def test_recipes_with_a_typo_or_a_wrong_value_name_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read(finetune.Recipe, tmp_path / "r.yaml")


def test_batches_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="batch_size=20: expected at most the 12 clips"):
        pretrain.main(before(tmp_path, batch_size=20))
    with pytest.raises(ValueError, match="batch_size=3: mixup and CutMix pair the clips"):
        finetune.main(after(tmp_path, monkeypatch, batch_size=3, mixup=0.8))
    with pytest.raises(ValueError, match="data speech holds sound alone"):
        pretrain.load(before(tmp_path, data="speech", data_root=str(tmp_path)))


# -- two processes


def _train(rank: int, out: str) -> dict[str, Tensor]:
    recipe = before(Path(out), training=Training(steps=2, log_every=1, checkpoint_every=0))
    return {name: value.clone() for name, value in pretrain.main(recipe).state_dict().items()}


def _scores(rank: int, out: str) -> tuple[Tensor, Tensor]:
    recipe = replace(read(finetune.Recipe, RECIPES / "demo.yaml", out=out), test_clips=7, batch_size=2)
    torch.manual_seed(0)
    small = {name: SMALL[name] for name in finetune.SHARED}
    clips = SyntheticTalkers(1, 7, size=16, frames=32, bins=16)
    return finetune.scores(EmotionModel(4, **small), clips, recipe)


def test_two_processes_end_with_one_model_and_one_test(two_processes: Any, tmp_path: Path) -> None:
    first, second = two_processes(_train, str(tmp_path))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    one, other = two_processes(_scores, str(tmp_path))
    alone = _scores(0, str(tmp_path))
    for found in (one, other):
        torch.testing.assert_close(found[0], alone[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(found[1], torch.arange(7))
