"""Obtain a table row: train what is missing for every seed and fold, test, pool the folds, save the records, print them.

`python -m projects.hicmae.evaluate --config projects/hicmae/recipes/crema-d.yaml --data-root D`
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.probes import linear_probe_lbfgs, summarise
from common.recipe import parse
from common.results import Record, picture_path, save_record
from projects.hicmae import finetune, pictures, pretrain
from projects.hicmae.finetune import TEST_SEED, Recipe, about, data_facts, measure
from projects.hicmae.model import HiCMAE, level_features, similarity
from projects.hicmae.pretrain import is_main
from projects.hicmae.talkers import SyntheticTalkers

PAPER, DEMO = "hicmae", "demo"
HELD_OUT = 100
"""Talkers in the retrieval and reconstruction checks."""

BEFORE: dict[str, dict[str, Any]] = {"no-contrast": {"contrastive_weight": 0.0}, "no-skip": {"skip": False}, "top-contrast": {}}
"""Ablations of pre-training; `top-contrast` keeps the deepest level."""
AFTER: dict[str, dict[str, Any]] = {
    "audio": {"modality": "a"},
    "video": {"modality": "v"},
    "last-feature": {"feature_fusion": "last"},
}
"""Variants of fine-tuning alone."""


def pooled(recipe: Recipe) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures over the test samples of all folds together, and what stands beside them."""
    tested = [finetune.main(replace(recipe, fold=fold)) for fold in recipe.folds]
    figures = measure(torch.cat([t.labels for t in tested]), torch.cat([t.scores for t in tested]), about(recipe))
    beside = {"seconds": sum(t.seconds for t in tested), "last": [t.last for t in tested], "folds": [t.figures for t in tested]}
    return figures, beside


def variant(recipe: Recipe, what: str) -> Recipe:
    """The recipe with one thing changed."""
    name, before = f"{recipe.name}-{what}", finetune.pretraining(recipe)
    if what in BEFORE:
        changes = {"contrastive_levels": before.model.levels[-1:]} if what == "top-contrast" and before else BEFORE[what]
        return replace(recipe, name=name, ablate=recipe.ablate | changes, compare=[])
    if what == "scratch":
        return replace(recipe, name=name, pretrain="none", weights=None, model=before.model if before else recipe.model, compare=[])
    return replace(recipe, name=name, compare=[], **AFTER[what])


def record_row(recipe: Recipe, base: Recipe, row: str | None = None) -> dict[str, list[float]]:
    """Every seed of a row (or of what is measured beside it), one record a figure; gives the figures."""
    found = [pooled(replace(recipe, seed=seed)) for seed in recipe.seeds]
    metrics = {name: [figures[name] for figures, _ in found] for name in found[0][0]}
    if not is_main():
        return metrics
    hours = sum(beside["seconds"] for _, beside in found) / 3600
    for metric, values in metrics.items():
        if not all(value == value for value in values):
            continue  # an undefined correlation was warned of
        extra: dict[str, Any] = {"row": row} if row else {}
        extra |= {"pre_training": recipe.weights or recipe.pretrain, "tested_epoch": recipe.select}
        extra |= {"last_epoch": [[fold[metric] for fold in beside["last"]] for _, beside in found]}
        extra |= {"folds": [[fold[metric] for fold in beside["folds"]] for _, beside in found]}
        made = Record(f"recipes/{base.name}.yaml", metric, values, recipe.seeds, _origin(recipe), data_facts(recipe), hours, extra)
        save_record(PAPER, made, demo=base.name == DEMO)
        if recipe.select == "given":  # the reference publishes the figures of each fold's model
            for number, fold in enumerate(recipe.folds):
                figures = [beside["folds"][number][metric] for _, beside in found]
                about_it = {"data": data_facts(replace(recipe, folds=[fold])), "extra": {"row": f"{base.name} fold {fold}"}}
                save_record(PAPER, replace(made, values=figures, **about_it))
    label = f"{base.name}{f', {row}' if row else ''}"
    print(f"{label}: " + ", ".join(f"{name} {summarise(values)}" for name, values in metrics.items()), flush=True)
    return metrics


def _origin(recipe: Recipe) -> str:
    """Where the tested weights came from, for the record."""
    if recipe.weights is not None and not Path(recipe.weights.replace("{fold}", str(recipe.folds[0]))).is_dir():
        return "official, converted" if recipe.select == "given" else "official, fine-tuned here"
    return "from scratch" if recipe.pretrain == "none" and recipe.weights is None else "trained here"


# -- what pre-training alone shows (embedded default)


@torch.no_grad()
def pretraining_figures(recipe: Recipe) -> dict[str, float]:
    """Retrieval of sound by picture at each level and masked reconstruction of held-out talkers, and a linear probe on the recipe's labelled ones."""
    before = finetune.pretraining(recipe)
    model = pretrain.main(before).cpu().eval()
    frames, bins = before.model.audio_size
    clips = SyntheticTalkers(TEST_SEED + 777 + before.seed, HELD_OUT, size=before.model.image_size, frames=frames, bins=bins)
    video, audio = (torch.stack([clips[i][part] for i in range(HELD_OUT)]) for part in (0, 1))
    seen = level_features(model.encoder, video, None, model.levels)
    heard = level_features(model.encoder_audio, audio, None, model.levels)
    figures = {f"retrieval R@1, level {n} (%)": 100 * recall(similarity(seen[n], heard[n])) for n in model.levels}
    out = model(video, audio, generator=torch.Generator().manual_seed(0))
    figures |= {"masked reconstruction loss": float(out.video_loss + out.audio_loss), "video loss": float(out.video_loss)}
    return figures | {"linear probe (%)": 100 * linear_probe(model, recipe, before)}


def linear_probe(model: HiCMAE, recipe: Recipe, before: pretrain.Recipe) -> float:
    """Test accuracy of a logistic regression on the mean tokens of both encoders' last levels, nothing masked, encoders frozen."""
    clips, parts = finetune.load(recipe, before.model), []
    for data in (clips.train, clips.test):
        found: list[tuple[Tensor, Tensor]] = []
        for video, audio, label, _ in DataLoader(data, 64):
            seen, heard = level_features(model.encoder, video, None, ()), level_features(model.encoder_audio, audio, None, ())
            found.append((torch.cat([levels[max(levels)].mean(1) for levels in (seen, heard)], 1).double(), label))
        parts.append(tuple(torch.cat(side) for side in zip(*found, strict=True)))
    with torch.enable_grad():
        return linear_probe_lbfgs(parts[0], parts[1])[1]  # type: ignore[arg-type]


def recall(logits: Tensor) -> float:
    """Share of rows whose own column is the largest."""
    return float((logits.argmax(1) == torch.arange(len(logits), device=logits.device)).double().mean())


def record_pretraining(recipe: Recipe, base: Recipe, row: str) -> None:
    found = [pretraining_figures(replace(recipe, seed=seed)) for seed in recipe.seeds]
    if not is_main():
        return
    held_out = data_facts(recipe) | {"split": f"{HELD_OUT} clips of other seeds"}
    folders = [finetune.pretraining(replace(recipe, seed=seed)).folder for seed in recipe.seeds]
    hours = sum(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] for folder in folders) / 3600
    for metric in found[0]:
        values = [figures[metric] for figures in found]
        data = data_facts(recipe) if metric.startswith("linear probe") else held_out
        made = Record(f"recipes/{base.name}.yaml", metric, values, recipe.seeds, "trained here", data, hours, {"row": row})
        save_record(PAPER, made, demo=base.name == DEMO)
        print(f"{base.name}, {row}: {metric} {summarise(values)}", flush=True)


def main(recipe: Recipe) -> dict[str, list[float]]:
    """The row's figures, one a seed; what `compare` lists is measured beside it."""
    drawn = recipe.data == "talkers"
    found = record_row(recipe, recipe, "full" if drawn else recipe.name if recipe.select == "given" else None)
    for what in recipe.compare:
        record_row(variant(recipe, what), recipe, what)
    if drawn and recipe.pretrain != "none":
        for what in ("full", *(w for w in recipe.compare if w in BEFORE)):
            record_pretraining(recipe if what == "full" else variant(recipe, what), recipe, what)
        if is_main():
            draw(recipe)
    if recipe.data == "speech" and recipe.pretrain != "none" and is_main():
        draw_speech(recipe)
    return found


def draw(recipe: Recipe) -> None:
    """Pictures of the first seed: masks and reconstructions, what the fusion attends to, retrieval."""
    recipe = replace(recipe, seed=recipe.seeds[0])
    before = finetune.pretraining(recipe)
    model = pretrain.main(before).cpu().eval()
    frames, bins = before.model.audio_size
    clips = SyntheticTalkers(TEST_SEED + 777 + before.seed, 32, size=before.model.image_size, frames=frames, bins=bins)
    video, audio = (torch.stack([clips[i][part] for i in range(len(clips))]) for part in (0, 1))
    paths = [
        picture_path(PAPER, f"{before.name}_{what}", demo=recipe.name == DEMO) for what in ("reconstruction", "retrieval", "attention")
    ]
    pictures.reconstructions(paths[0], model, video[:4], audio[:4])
    pictures.retrieval(paths[1], model, video, audio)
    pictures.attention(paths[2], model, video[:4], audio[:4])


def draw_speech(recipe: Recipe) -> None:
    """Masks and reconstructions of held-out speech by the first seed's audio branch."""
    recipe = replace(recipe, seed=recipe.seeds[0])
    before = finetune.pretraining(recipe)
    model = pretrain.main(before).cpu().eval()
    clips = finetune.load(recipe, before.model).test
    audio = torch.stack([clips[i * recipe.segments][1] for i in range(4)])
    pictures.reconstructions(picture_path(PAPER, f"{before.name}_reconstruction"), model, None, audio)


if __name__ == "__main__":
    main(parse(Recipe))
