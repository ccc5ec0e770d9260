"""Pre-train the molecule encoder: `python -m projects.graphmae.pretrain_molecules --config projects/graphmae/recipes/molecules-zinc15.yaml --data-root D`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt

from common.checkpoint import save_model
from common.engine import Training, fit, mean_over_processes, seed_everything
from common.recipe import parse, to_yaml
from projects.graphmae.data import Batches
from projects.graphmae.molecule import MoleculeGraphMAE
from projects.graphmae.molecules import MoleculeBatch, load
from projects.graphmae.pretrain import adam, is_main, synchronised


@dataclass(frozen=True)
class Recipe:
    """GraphMAE on molecules without labels; defaults are the paper's for ZINC15."""

    name: str = "molecules-zinc15"
    """Name of the recipe: its file's, and the run folder's."""
    data: Literal["zinc15", "union", "drawn"] = "zinc15"
    """ZINC15's 2 million molecules, the molecules of five MoleculeNet sets, or drawn ones (no files, no RDKit)."""
    layers: PositiveInt = 5
    """Encoder layers."""
    width: PositiveInt = 300
    """Width of an atom's embedding."""
    mask_rate: OpenUnitInterval = 0.25
    """trunc(n * mask_rate + 1) of a molecule's n atoms are hidden."""
    loss: Literal["sce", "ce"] = "sce"
    """Scaled cosine error against the one-hot atom type, or cross entropy."""
    gamma: PositiveFloat = 1.0
    """Power of the scaled cosine error."""
    drop: ClosedUnitInterval = 0.0
    """Dropout after each layer."""
    training: Training = field(default_factory=lambda: Training(epochs=100))
    """Length and arithmetic."""
    lr: PositiveFloat = 1e-3
    """Adam's learning rate, constant, for encoder and decoder."""
    batch_size: PositiveInt = 256
    """Molecules a step and process."""
    seed: NonNegativeInt = 0
    """Seed."""
    path: Literal["efficient", "plain"] = "efficient"
    """How layers compute; the numbers are the same."""
    unreadable: Literal["skip", "stop"] = "skip"
    """What to do at a molecule that RDKit or the tables cannot take."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    cache: str | None = None
    """Folder for prepared copies; default: the user's cache folder."""
    out: str = "runs/graphmae"
    """Where run folders go."""


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.out) / recipe.name / f"seed-{recipe.seed}"


def main(recipe: Recipe, molecules: Any = None) -> MoleculeGraphMAE:
    """Pre-train, or go on where the run folder stands; gives the model with its last weights."""
    molecules = (
        load(recipe.data, data_root=recipe.data_root, cache=recipe.cache, unreadable=recipe.unreadable) if molecules is None else molecules
    )
    seed_everything(recipe.seed)
    model = synchronised(
        MoleculeGraphMAE(recipe.layers, recipe.width, drop=recipe.drop, mask_rate=recipe.mask_rate, gamma=recipe.gamma, loss=recipe.loss)
    )

    def loss(model: MoleculeGraphMAE, batch: MoleculeBatch) -> dict[str, Any]:
        out = model(batch.x, batch.bonds, batch.molecule_of, path=recipe.path)
        return {"loss": mean_over_processes(out.loss * len(out.mask_nodes), len(out.mask_nodes))}

    loader = Batches(molecules, recipe.batch_size, recipe.seed).loader()
    folder = run_folder(recipe)
    fitted = fit(model, loss, loader, adam(model, recipe.lr, 0.0), recipe.training, folder, recipe=recipe, seed=recipe.seed)
    if is_main():
        save_model(fitted.model, folder, recipe=to_yaml(recipe))
    return fitted.model


if __name__ == "__main__":
    main(parse(Recipe))
