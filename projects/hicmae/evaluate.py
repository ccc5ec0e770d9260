"""Obtain a table row: train what is missing for every seed and fold, test, pool the folds, save the records, print them.

`python -m projects.hicmae.evaluate --config projects/hicmae/recipes/crema-d.yaml --data-root D`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common.probes import summarise
from common.recipe import parse
from common.results import Record, picture_path, save_record
from projects.hicmae import finetune, pictures, pretrain
from projects.hicmae.finetune import TEST_SEED, Recipe, about, data_facts, measure
from projects.hicmae.model import level_features, similarity
from projects.hicmae.pretrain import is_main
from projects.hicmae.talkers import SyntheticTalkers

PAPER = "hicmae"
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
    tested = [finetune.main(replace(recipe, fold=fold)) for fold in recipe.folds[: about(recipe).folds]]
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
    started = "from scratch" if recipe.pretrain == "none" and recipe.weights is None else "trained here"
    for metric, values in metrics.items():
        if not all(value == value for value in values):
            continue  # an undefined correlation was warned of
        extra: dict[str, Any] = {"row": row} if row else {}
        extra |= {"pre_training": recipe.weights or recipe.pretrain, "tested_epoch": recipe.select}
        extra |= {"last_epoch": [[fold[metric] for fold in beside["last"]] for _, beside in found]}
        extra |= {"folds": [[fold[metric] for fold in beside["folds"]] for _, beside in found]}
        made = Record(
            f"recipes/{base.name}.yaml",
            metric,
            values,
            recipe.seeds,
            "official, fine-tuned here" if recipe.weights else started,
            data_facts(recipe),
            hours,
            extra,
        )
        save_record(PAPER, made, demo=recipe.data == "talkers")
    label = f"{base.name}{f', {row}' if row else ''}"
    print(f"{label}: " + ", ".join(f"{name} {summarise(values)}" for name, values in metrics.items()), flush=True)
    return metrics


# -- what pre-training alone shows (embedded default)


@torch.no_grad()
def pretraining_figures(recipe: Recipe) -> dict[str, float]:
    """Retrieval of sound by picture at each level, and masked reconstruction with and without the clips' own masks, on held-out talkers."""
    before = finetune.pretraining(recipe)
    model = pretrain.main(before).cpu().eval()
    frames, bins = before.model.audio_size
    clips = SyntheticTalkers(TEST_SEED + 777 + before.seed, HELD_OUT, size=before.model.image_size, frames=frames, bins=bins)
    video, audio = (torch.stack([clips[i][part] for i in range(HELD_OUT)]) for part in (0, 1))
    seen = level_features(model.encoder, video, None, model.levels)
    heard = level_features(model.encoder_audio, audio, None, model.levels)
    figures = {f"retrieval R@1, level {n} (%)": 100 * recall(similarity(seen[n], heard[n])) for n in model.levels}
    out = model(video, audio, generator=torch.Generator().manual_seed(0))
    return figures | {"masked reconstruction loss": float(out.video_loss + out.audio_loss), "video loss": float(out.video_loss)}


def recall(logits: Tensor) -> float:
    """Share of rows whose own column is the largest."""
    return float((logits.argmax(1) == torch.arange(len(logits), device=logits.device)).double().mean())


def record_pretraining(recipe: Recipe, base: Recipe, row: str) -> None:
    found = [pretraining_figures(replace(recipe, seed=seed)) for seed in recipe.seeds]
    if not is_main():
        return
    data = data_facts(recipe) | {"split": f"{HELD_OUT} clips of other seeds"}
    for metric in found[0]:
        values = [figures[metric] for figures in found]
        save_record(
            PAPER, Record(f"recipes/{base.name}.yaml", metric, values, recipe.seeds, "trained here", data, 0.0, {"row": row}), demo=True
        )
        print(f"{base.name}, {row}: {metric} {summarise(values)}", flush=True)


def main(recipe: Recipe) -> dict[str, list[float]]:
    """The row's figures, one a seed; what `compare` lists is measured beside it."""
    drawn = recipe.data == "talkers"
    found = record_row(recipe, recipe, "full" if drawn else None)
    for what in recipe.compare:
        record_row(variant(recipe, what), recipe, what)
    if drawn and recipe.pretrain != "none":
        for what in ("full", *(w for w in recipe.compare if w in BEFORE)):
            record_pretraining(recipe if what == "full" else variant(recipe, what), recipe, what)
        if is_main():
            draw(recipe)
    return found


def draw(recipe: Recipe) -> None:
    """Pictures of the first seed: masks and reconstructions, what the fusion attends to, retrieval."""
    recipe = replace(recipe, seed=recipe.seeds[0])
    before = finetune.pretraining(recipe)
    model = pretrain.main(before).cpu().eval()
    frames, bins = before.model.audio_size
    clips = SyntheticTalkers(TEST_SEED + 777 + before.seed, 32, size=before.model.image_size, frames=frames, bins=bins)
    video, audio = (torch.stack([clips[i][part] for i in range(len(clips))]) for part in (0, 1))
    pictures.reconstructions(picture_path(PAPER, "reconstruction"), model, video[:4], audio[:4])
    pictures.retrieval(picture_path(PAPER, "retrieval"), model, video, audio)
    pictures.attention(picture_path(PAPER, "attention"), model, video[:4], audio[:4])


if __name__ == "__main__":
    main(parse(Recipe))
