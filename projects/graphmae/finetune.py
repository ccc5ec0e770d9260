"""Molecule transfer: fine-tune the pre-trained encoder on a MoleculeNet set, scaffold split, for every seed; save the record, print it.

`python -m projects.graphmae.finetune --config projects/graphmae/recipes/bace-union.yaml --data-root D` also pre-trains what is missing.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from common.checkpoint import save_model, write_text
from common.engine import Training, budget, check_recipe, fit, mean_over_processes, seed_everything
from common.probes import roc_auc, summarise
from common.recipe import parse, read, to_yaml
from common.results import Record, save_record
from common.schedule import step_decay
from projects.graphmae import pretrain_molecules
from projects.graphmae.data import Batches
from projects.graphmae.molecule import Classifier, masked_bce
from projects.graphmae.molecules import MoleculeBatch, MoleculeSet, load, split
from projects.graphmae.pretrain import adam, is_main, synchronised
from projects.graphmae.weights import load_reference

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Everything is trained; the figure is the last epoch's mean ROC-AUC on the test molecules."""

    name: str = "bace-union"
    """Name of the recipe: its file's, and the run folder's."""
    data: Literal["bace", "bbbp", "clintox", "sider", "tox21", "toxcast", "muv", "hiv", "drawn"] = "bace"
    """MoleculeNet set."""
    start: str = "molecules-union"
    """Pre-training recipe (its file's name), the file of an encoder (the reference's pretrained.pth), or `none`."""
    training: Training = field(default_factory=lambda: Training(epochs=100, checkpoint_every=1000))
    """Length and arithmetic."""
    lr: PositiveFloat = 1e-3
    """Adam's learning rate."""
    decay_every: PositiveInt | None = None
    """Epochs after which the rate is multiplied by 0.3, again and again (BACE: 30)."""
    batch_size: PositiveInt = 32
    """Molecules a step and process."""
    drop: ClosedUnitInterval = 0.5
    """Dropout after each layer."""
    layers: PositiveInt = 5
    """Encoder layers."""
    width: PositiveInt = 300
    """Width of an atom's embedding."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: list(range(10)))
    """Seeds of a table row."""
    seed: NonNegativeInt = 0
    """Seed of one run."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    cache: str | None = None
    """Folder for prepared copies; default: the user's cache folder."""
    out: str = "runs/graphmae"
    """Where run folders go."""


def encoder_state(recipe: Recipe) -> dict[str, Tensor] | Path | None:
    """Weights to start from: those of a pre-training run (made now if it is not there), a file, or None."""
    if recipe.start == "none":
        return None
    file = RECIPES / f"{recipe.start}.yaml"
    if not file.is_file():
        return Path(recipe.start)
    return pretrain_molecules.main(
        read(pretrain_molecules.Recipe, file, data_root=recipe.data_root, cache=recipe.cache, out=recipe.out)
    ).encoder.state_dict()


@torch.no_grad()
def mean_auc(model: Classifier, molecules: MoleculeSet, numbers: Tensor, batch_size: int = 256) -> float:
    """ROC-AUC averaged over the tasks that have both classes among these molecules, rows with a missing label left out."""
    model.eval()
    device = model.graph_pred_linear.weight.device
    scores, labels = [], []
    for part in numbers.split(batch_size):
        batch = molecules.batch(part).to(device)
        scores.append(model(batch.x, batch.bonds, batch.molecule_of, len(part)))
        labels.append(batch.labels)
    truth = torch.cat(labels)
    return roc_auc(truth, torch.cat(scores), present=truth != 0)


def run(recipe: Recipe, molecules: MoleculeSet, parts: dict[str, Tensor], start: dict[str, Tensor] | Path | None) -> dict[str, Any]:
    """Fine-tune and evaluate one seed, or read what an earlier call found; kept in the run folder as score.json."""
    recipe = replace(recipe, seeds=[recipe.seed])
    folder = Path(recipe.out) / recipe.name / f"seed-{recipe.seed}"
    check_recipe(folder, to_yaml(recipe))
    if (kept := folder / "score.json").is_file():
        return json.loads(kept.read_text())
    seed_everything(recipe.seed)
    model = Classifier(molecules.labels.shape[1], recipe.layers, recipe.width, drop=recipe.drop)
    if start is not None:
        load_reference(model.gnn, start)
    model = synchronised(model)
    loader = Batches(molecules, recipe.batch_size, recipe.seed, parts["train"]).loader()

    per_epoch = budget(loader, recipe.training).per_epoch

    def lr_at(step: int) -> float:
        return (
            step_decay(step // per_epoch, every=recipe.decay_every, factor=0.3, peak=float(recipe.lr))
            if recipe.decay_every
            else float(recipe.lr)
        )

    def loss(model: Classifier, batch: MoleculeBatch) -> dict[str, Tensor]:
        total, count = masked_bce(model(batch.x, batch.bonds, batch.molecule_of, len(batch.labels)), batch.labels)
        return {"loss": mean_over_processes(total, count)}

    fitted = fit(model, loss, loader, adam(model, recipe.lr, 0.0), recipe.training, folder, recipe=recipe, seed=recipe.seed, lr_at=lr_at)
    if is_main():
        save_model(fitted.model, folder, recipe=to_yaml(recipe))
    began = time.monotonic()
    found: dict[str, Any] = {part: 100 * mean_auc(fitted.model, molecules, parts[part]) for part in ("val", "test")}
    found |= {"loss": fitted.history[-1]["loss"], "seconds": round(fitted.history[-1]["seconds"] + time.monotonic() - began, 1)}
    if is_main():
        write_text(kept, json.dumps(found))
    return found


def main(recipe: Recipe) -> Path | None:
    """Every seed of the recipe; gives the record's path (None on processes other than the first)."""
    molecules = load(recipe.data, data_root=recipe.data_root, cache=recipe.cache)
    parts = split(molecules)
    start = encoder_state(recipe)
    scores = {}
    for seed in recipe.seeds:
        scores[seed] = run(replace(recipe, seed=seed), molecules, parts, start)
        print(f"{recipe.name}: seed {seed}: {scores[seed]['test']:.2f} ROC-AUC (%) ({scores[seed]['seconds']:.0f} s)", flush=True)
    if not is_main():
        return None
    weights = {
        "none": "trained here, no pre-training",
        "molecules-union": "trained here, pre-trained on the union of five MoleculeNet sets",
    }
    record = Record(
        recipe=f"recipes/{recipe.name}.yaml",
        metric="ROC-AUC (%)",
        values=[s["test"] for s in scores.values()],
        seeds=list(scores),
        weights=weights.get(
            recipe.start, "trained here" if (RECIPES / f"{recipe.start}.yaml").is_file() else f"fine-tuned from {Path(recipe.start).name}"
        ),
        data={"name": molecules.name, "split": "scaffold" if molecules.smiles else "in order", "sha256": molecules.sha256},
        hours=sum(s["seconds"] for s in scores.values()) / 3600,
        extra={
            "protocol": "last epoch",
            "pre_training": recipe.start,
            "validation": [s["val"] for s in scores.values()],
            "molecules": {name: len(part) for name, part in parts.items()},
        },
    )
    path = save_record("graphmae", record, demo=recipe.data == "drawn")
    print(f"{recipe.name}: {summarise([s['test'] for s in scores.values()])} ROC-AUC (%), recorded in {path}")
    return path


if __name__ == "__main__":
    main(parse(Recipe))
