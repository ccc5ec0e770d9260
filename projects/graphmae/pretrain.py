"""Pre-train GraphMAE for one seed: `python -m projects.graphmae.pretrain --config projects/graphmae/recipes/cora.yaml --data-root D`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from torch import nn

from common.checkpoint import save_model
from common.engine import Training, budget, fit, mean_over_processes, seed_everything
from common.recipe import parse, to_yaml
from common.schedule import cosine
from projects.graphmae.data import Batches, GraphBatch, Name, NeighbourBatches, NodeBatch, NodeTask, load
from projects.graphmae.layers import batch_norms_over_processes
from projects.graphmae.model import GraphMAE

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Architecture:
    """Encoder, decoder, masks and loss; defaults are Cora's."""

    encoder: Literal["gat", "dotgat", "gin", "gcn"] = "gat"
    """Family of the encoder's layers."""
    decoder: Literal["gat", "dotgat", "gin", "gcn", "mlp", "linear"] = "gat"
    """One layer of a family, or a network that sees one node at a time."""
    hidden: PositiveInt = 512
    """Width of each encoder layer's output, all heads together."""
    layers: PositiveInt = 2
    """Encoder layers."""
    heads: PositiveInt = 4
    """Attention heads of the encoder."""
    activation: Literal["prelu", "relu", "gelu", "elu"] = "prelu"
    """After each encoder layer."""
    norm: Literal["layernorm", "batchnorm"] | None = None
    """Before each activation."""
    residual: bool = False
    """Add each layer's input to its output."""
    in_drop: ClosedUnitInterval = 0.2
    """Dropout of every layer's input."""
    attn_drop: ClosedUnitInterval = 0.1
    """Dropout of the attention weights."""
    mask_rate: OpenUnitInterval = 0.5
    """Share of nodes whose features are hidden and reconstructed."""
    replace_rate: ClosedUnitInterval = 0.05
    """Share of these that take another node's features in place of the token."""
    drop_edge_rate: ClosedUnitInterval = 0.0
    """Share of edges that the encoder does not see in a training step."""
    loss: Literal["sce", "mse"] = "sce"
    """Scaled cosine or mean squared error."""
    gamma: PositiveFloat = 3.0
    """Power of the scaled cosine error."""
    mask: bool = True
    """Off: nothing is hidden, all nodes are reconstructed."""
    remask: bool = True
    """Off: the decoder sees the codes of hidden nodes."""
    concat_hidden: bool = False
    """Decode from all layers' outputs side by side."""


@dataclass(frozen=True)
class Probe:
    """Linear probe of node tasks: full-batch Adam on frozen embeddings."""

    lr: PositiveFloat = 0.01
    """Learning rate."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2, added to the gradient."""
    epochs: PositiveInt = 300
    """Passes; one step each (PPI: ten)."""


@dataclass(frozen=True)
class Recipe:
    """GraphMAE on a node or graph classification data set; defaults are Cora's."""

    name: str = "cora"
    """Name of the recipe: its file's, and the run folder's."""
    data: Name = "cora"
    """Data set; topic-graph and shapes need no files."""
    model: Architecture = field(default_factory=Architecture)
    """The method."""
    training: Training = field(default_factory=lambda: Training(epochs=1500, checkpoint_every=250))
    """Length and arithmetic of pre-training."""
    lr: PositiveFloat = 1e-3
    """Adam's learning rate."""
    weight_decay: NonNegativeFloat = 2e-4
    """L2, added to the gradient of every parameter."""
    cosine: bool = True
    """Let the rate fall to zero along half a cosine, changing once an epoch."""
    batch_size: PositiveInt = 32
    """Graphs a step and process (graph tasks)."""
    neighbours: list[PositiveInt] = field(default_factory=list)
    """Neighbours drawn per hop around `batch_size` nodes a step; empty: the whole graph is one step (node tasks)."""
    readout: Literal["mean", "max", "sum"] = "mean"
    """From node to graph embeddings (graph tasks)."""
    probe: Probe = field(default_factory=Probe)
    """Linear probe (node tasks)."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: list(range(20)))
    """Seeds of a table row."""
    compare: list[
        Literal["raw", "untrained", "no-mask", "no-remask", "mlp-decoder", "mse", "readout-mean", "readout-max", "readout-sum"]
    ] = field(default_factory=list)
    """Measured beside the row: raw features, the untrained encoder, variants that each switch one thing off, and the trained encoder under another readout (graph tasks)."""
    seed: NonNegativeInt = 0
    """Seed of one run."""
    path: Literal["efficient", "plain"] = "efficient"
    """How layers compute; the numbers are the same."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    cache: str | None = None
    """Folder for prepared copies; default: the user's cache folder."""
    out: str = "runs/graphmae"
    """Where run folders go."""

    def __post_init__(self) -> None:
        if self.model.gamma < 1:
            raise ValueError(f"model.gamma={self.model.gamma}: expected at least 1")
        if self.model.replace_rate >= 1 or self.model.drop_edge_rate >= 1:
            raise ValueError(
                f"model.replace_rate={self.model.replace_rate}, model.drop_edge_rate={self.model.drop_edge_rate}: expected less than 1"
            )
        if self.model.encoder in ("gat", "dotgat") and self.model.hidden % self.model.heads:
            raise ValueError(f"model.hidden={self.model.hidden}: expected a multiple of model.heads={self.model.heads}")


def build(recipe: Recipe, in_dim: int) -> GraphMAE:
    return GraphMAE(in_dim, **vars(recipe.model))


def run_folder(recipe: Recipe, seed: int | None = None) -> Path:
    return Path(recipe.out) / recipe.name / f"seed-{recipe.seed if seed is None else seed}"


def adam(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Adam:
    """Adam with L2 in the gradient of every parameter: token, biases, slopes and norms too (plain floats: a recipe's own types could not be read back from a saved state)."""
    return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=float(lr), weight_decay=float(weight_decay), fused=True)


def synchronised(model: M) -> M:
    """With several processes, batch norms over the nodes of all of them, as one big batch would have."""
    return batch_norms_over_processes(model) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else model


def is_main() -> bool:
    """Whether this process writes what all share."""
    return int(os.environ.get("RANK", "0")) == 0


def main(recipe: Recipe, task: Any = None) -> GraphMAE:
    """Pre-train, or go on where the run folder stands, and give the model with its last weights; they are in the run folder too.

    Args:
        task: the loaded data set, where the caller has it already.
    """
    recipe = replace(recipe, seeds=[recipe.seed], compare=[])  # a run is one seed, whichever row it belongs to
    folder = run_folder(recipe)
    task = load(recipe.data, data_root=recipe.data_root, cache=recipe.cache, seed=recipe.seed) if task is None else task
    seed_everything(recipe.seed)
    model = synchronised(build(recipe, task.in_dim))
    loader: Any
    if not isinstance(task, NodeTask):
        loader = Batches(task, recipe.batch_size, recipe.seed).loader()
    elif recipe.neighbours:
        loader = NeighbourBatches(task.pretrain[0], recipe.batch_size, recipe.neighbours, recipe.seed).loader()
    else:
        loader = task.pretrain

    plan = budget(loader, recipe.training)

    def lr_at(step: int) -> float:
        return (
            cosine(step // plan.per_epoch, total=plan.total / plan.per_epoch, peak=float(recipe.lr)) if recipe.cosine else float(recipe.lr)
        )

    def loss(model: nn.Module, batch: NodeBatch | GraphBatch) -> dict[str, torch.Tensor]:
        out = model(batch.x, batch.graph, path=recipe.path)
        # the mean over masked nodes of all processes, as one big batch would have it
        return {"loss": mean_over_processes(out.loss * len(out.mask_nodes), len(out.mask_nodes))}

    fitted = fit(
        model,
        loss,
        loader,
        adam(model, recipe.lr, recipe.weight_decay),
        recipe.training,
        folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lr_at,
    )
    trained = fitted.model
    if is_main():
        save_model(trained, folder, recipe=to_yaml(recipe))
    return trained


if __name__ == "__main__":
    main(parse(Recipe))
