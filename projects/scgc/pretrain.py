"""Pre-train the auto-encoder for one seed: `python -m projects.scgc.pretrain --config projects/scgc/recipes/autoencoder_acm.yaml --data-root D`.

SDCN's recipe: features only, 30 epochs in batches of 256, Adam at 1e-3, mean squared error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from common.checkpoint import save_model
from common.engine import Fitted, Training, fit, mean_over_processes, seed_everything
from common.recipe import parse, to_yaml
from projects.scgc.data import Blocks, Data, load
from projects.scgc.features import Features
from projects.scgc.model import EMBEDDING, WIDTHS, AutoEncoder


@dataclass(frozen=True)
class Network:
    """Widths of the fully connected auto-encoder."""

    encoder: list[PositiveInt] = field(default_factory=lambda: list(WIDTHS))
    """Hidden layers of the encoder."""
    embedding: PositiveInt = EMBEDDING
    """Width of the code that is clustered."""
    decoder: list[PositiveInt] = field(default_factory=lambda: list(WIDTHS[::-1]))
    """Hidden layers of the decoder."""


@dataclass(frozen=True)
class Recipe:
    """Auto-encoder of a data set."""

    name: str = "autoencoder_acm"
    """Of the run folder."""
    data: str = "acm"
    """Data set; blocks needs no files."""
    blocks: Blocks = field(default_factory=Blocks)
    """Features of the embedded default."""
    network: Network = field(default_factory=Network)
    """Layer widths."""
    training: Training = field(default_factory=lambda: Training(epochs=30))
    """Length and arithmetic."""
    batch_size: PositiveInt = 256
    """Nodes a step, over all processes; the last batch of an epoch is smaller."""
    lr: PositiveFloat = 1e-3
    """Learning rate of Adam, constant."""
    seed: NonNegativeInt = 0
    """Of weights and shuffles (and of the embedded default's documents)."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    cache: str | None = None
    """Folder for parsed copies of text files; default: the user's cache folder."""
    out: str = "runs/scgc"
    """Where run folders go."""

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Step:
    """One optimiser step: its epoch, whether it is the epoch's first, and its nodes (None = all, in order)."""

    epoch: int
    first: bool
    nodes: Tensor | None


class Plan(Sequence[Step]):
    """Every step of a training, drawn from (seed, epoch) alone; every process reads the same plan and takes its share of the nodes.

    Args:
        nodes: N. batch_size: None or at least N = all nodes in order at every step.
    """

    def __init__(self, nodes: int, batch_size: int | None, training: Training, seed: int) -> None:
        self.nodes, self.seed = nodes, seed
        self.batch_size = None if batch_size is None or batch_size >= nodes else int(batch_size)
        self.per_epoch = 1 if self.batch_size is None else -(-nodes // self.batch_size)
        self.total = int(training.steps or self.per_epoch * (training.epochs or 0))
        if training.accumulation != 1:
            raise ValueError(f"training.accumulation={training.accumulation}: expected 1; give the batch size that a step should have")

    def __len__(self) -> int:
        return self.total

    @property
    def epochs(self) -> int:
        return -(-self.total // self.per_epoch)

    @property
    def smallest(self) -> int:
        """Nodes of an epoch's last batch."""
        return self.nodes if self.batch_size is None else self.nodes - (self.per_epoch - 1) * self.batch_size

    def __getitem__(self, step: int) -> Step:  # type: ignore[override]
        if not 0 <= step < self.total:
            raise IndexError(step)
        epoch, inside = divmod(step, self.per_epoch)
        if self.batch_size is None:
            return Step(epoch, True, None)
        order = torch.randperm(self.nodes, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return Step(epoch, inside == 0, order[inside * self.batch_size : (inside + 1) * self.batch_size])

    def __iter__(self) -> Iterator[Step]:
        return (self[step] for step in range(self.total))


def shares(count: int, processes: int) -> list[int]:
    """Nodes of each process, as even as can be."""
    if count < processes:
        raise ValueError(f"batch of {count} nodes: expected at least one for each of {processes} processes; use a larger batch")
    return [count // processes + (rank < count % processes) for rank in range(processes)]


def part_of(count: int) -> tuple[slice, list[int] | None]:
    """This process's share of `count` nodes, and the counts of all processes (None when alone)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return slice(0, count), None
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    counts = shares(count, processes)
    start = sum(counts[:rank])
    return slice(start, start + counts[rank]), None if processes == 1 else counts


def start_processes() -> torch.device:
    """Join the processes of this launch, if any, and give the device to train on."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device


def is_main() -> bool:
    """Whether this process writes what all share."""
    return int(os.environ.get("RANK", "0")) == 0


def adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam with torch's defaults; a plain float, since a recipe's own number type could not be read back from a saved state."""
    return torch.optim.Adam(model.parameters(), lr=float(lr), fused=True)


def follow(model: nn.Module, loss: object, plan: Plan, lr: float, training: Training, folder: Path, *, recipe: object, seed: int) -> Fitted:
    """`common.engine.fit` over a plan: to the engine the whole plan is one epoch, so states are kept every tenth of it unless said otherwise."""
    part_of(plan.smallest)  # refuses too many processes now, not at the end of an epoch
    every = max(1, len(plan) // 10) if training.checkpoint_every is None else training.checkpoint_every
    return fit(
        model,
        loss,  # type: ignore[arg-type]
        plan,
        adam(model, lr),
        replace(training, epochs=None, steps=len(plan), checkpoint_every=every),
        folder,
        recipe=recipe,
        seed=seed,
    )


def reconstruction_loss(model: nn.Module, x: Features) -> Tensor:
    """0-d: mean squared error over all entries of all processes' nodes."""
    return mean_over_processes(model(x), x.shape[0] * x.shape[1])


def main(recipe: Recipe, data: Data | None = None) -> AutoEncoder:
    """Train, go on where the run folder stands, or return the finished auto-encoder; config.json and model.safetensors are left there.

    Args:
        data: where the caller has it loaded already.
    """
    device = start_processes()
    if data is None:
        data = load(recipe.data, data_root=recipe.data_root, cache=recipe.cache, build="none", blocks=recipe.blocks, seed=recipe.seed)
    x = Features(data.x).to(device)
    seed_everything(recipe.seed)
    model = AutoEncoder(x.shape[1], [*recipe.network.encoder, recipe.network.embedding], recipe.network.decoder)
    plan = Plan(len(x), recipe.batch_size, recipe.training, recipe.seed)

    def loss(model: nn.Module, step: Step) -> dict[str, Tensor]:
        nodes = torch.arange(len(x)) if step.nodes is None else step.nodes
        own, _ = part_of(len(nodes))
        return {"loss": reconstruction_loss(model, x.rows(nodes[own].to(device)))}

    model = follow(model, loss, plan, recipe.lr, recipe.training, recipe.folder, recipe=recipe, seed=recipe.seed).model
    if is_main():
        save_model(model, recipe.folder, recipe=to_yaml(recipe))
    return model


if __name__ == "__main__":
    main(parse(Recipe))
