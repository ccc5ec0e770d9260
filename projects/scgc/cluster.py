"""Cluster one seed: `python -m projects.scgc.cluster --config projects/scgc/recipes/acm.yaml --data-root D`; pre-trains first if need be.

Full batch by default, one step an epoch. Labels never enter: the assignment before every epoch's first step is kept in assignments.npy, and
`evaluate` scores it afterwards. With several processes each holds a share of the nodes; loss and gradients are those of one process.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from common.checkpoint import latest, load_model, save_model
from common.contrastive import gather_rows
from common.engine import Training, check_recipe, seed_everything
from common.probes import kmeans
from common.recipe import parse, to_yaml
from projects.scgc import pretrain
from projects.scgc.contrast import Structure
from projects.scgc.data import Blocks, Data, Links, load
from projects.scgc.features import Features
from projects.scgc.graph import MOST_ENTRIES, add_wrong_edges, shuffle_nodes, transition, weights
from projects.scgc.metrics import Rule
from projects.scgc.model import SCGC, AutoEncoder, objective
from projects.scgc.pretrain import Network, Plan, Step, follow, is_main, part_of, start_processes
from projects.scgc.weights import load_autoencoder

CHUNK = 8192
"""Nodes whose embeddings are computed at once where no gradient is needed."""


@dataclass(frozen=True)
class Pretraining:
    """The auto-encoder that clustering starts from."""

    training: Training = field(default_factory=lambda: Training(epochs=30))
    """Length and arithmetic of its training."""
    batch_size: PositiveInt = 256
    """Nodes a step."""
    lr: PositiveFloat = 1e-3
    """Learning rate of Adam."""
    seed: NonNegativeInt | None = None
    """One auto-encoder for all repetitions, as published; not given: each repetition trains its own."""
    weights: str | None = None
    """File of a trained auto-encoder (SDCN's <name>.pkl) in place of a training."""


@dataclass(frozen=True)
class Recipe:
    """SCGC or SCGC* on a data set; defaults are ACM's."""

    name: str = "acm"
    """Name of the recipe: its file's, and the run folder's."""
    data: str = "acm"
    """acm, dblp, cite, usps, hhar, reut, a name of your own (README, Data), or blocks, which needs no files."""
    blocks: Blocks = field(default_factory=Blocks)
    """Features of the embedded default."""
    graph: Links = field(default_factory=Links)
    """Which graph joins the nodes."""
    network: Network = field(default_factory=Network)
    """Layer widths."""
    pretrain: Pretraining = field(default_factory=Pretraining)
    """The auto-encoder to start from."""
    variant: Literal["scgc", "scgc_star"] = "scgc"
    """SCGC: decoder, weights P^R. SCGC*: no decoder, weights P + ... + P^R."""
    alpha: NonNegativeFloat = 0.5
    """Weight of the contrastive term; 0 leaves the graph out."""
    beta: NonNegativeFloat = 0.1
    """Weight of the clustering term."""
    order: PositiveInt = 2
    """R: hops of the structure weights."""
    tau: PositiveFloat = 0.25
    """Multiplies the cosine."""
    nu: PositiveFloat = 1.0
    """Degrees of freedom of the soft assignment."""
    clusters: PositiveInt | None = None
    """K; not given: the number of classes."""
    restarts: PositiveInt = 20
    """Starts of K-means."""
    training: Training = field(default_factory=lambda: Training(epochs=200))
    """Length and arithmetic."""
    batch_size: PositiveInt | None = None
    """Nodes a step, over all processes; not given: all."""
    lr: PositiveFloat = 1e-3
    """Learning rate of Adam, constant."""
    max_entries: PositiveInt = MOST_ENTRIES
    """Stored entries that the structure weights may have."""
    seed: NonNegativeInt = 0
    """Of K-means, mini-batches and, unless pretrain.seed is given, the auto-encoder."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: list(range(10)))
    """Repetitions of a table row (evaluate)."""
    compare: list[Literal["kmeans-x", "kmeans-ae", "kmeans-unit", "no-structure", "shuffled"]] = field(default_factory=list)
    """Measured beside the row (evaluate): K-means on features, on the auto-encoder's code and on the trained code at unit length (a diagnostic:
    what the embedding holds where the centres lag behind it), alpha = 0, the graph on shuffled nodes."""
    empty_clusters: Rule = "match"
    """Scores of a clustering with an empty cluster (evaluate; metrics.py)."""
    settled_below: NonNegativeFloat = 0.001
    """Share of nodes that change cluster in an epoch at which the label-free rule stops (evaluate); DEC's 0.1 %."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    cache: str | None = None
    """Folder for parsed copies of text files; default: the user's cache folder."""
    out: str = "runs/scgc"
    """Where run folders go."""

    def __post_init__(self) -> None:
        if self.variant == "scgc_star" and self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha=0, beta=0: SCGC* has no other term, so nothing would be trained; give one of them a weight")

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name / f"seed-{self.seed}"

    @property
    def run(self) -> Recipe:
        """What made the run folder: one seed, without the fields that only `evaluate` reads."""
        default = Recipe()
        unread = {name: getattr(default, name) for name in ("compare", "empty_clusters", "settled_below")}
        return replace(self, seeds=[self.seed], **unread)

    @property
    def autoencoder(self) -> pretrain.Recipe:
        """Recipe of the auto-encoder that this one starts from; SCGC and SCGC* of a data set share it."""
        own = self.pretrain
        return pretrain.Recipe(
            name=f"autoencoder_{self.data}"
            if self.data != "blocks"
            else f"autoencoder_{self.data}_{'_'.join(map(str, self.network.encoder))}",
            data=self.data,
            blocks=self.blocks,
            network=self.network,
            training=own.training,
            batch_size=own.batch_size,
            lr=own.lr,
            seed=self.seed if own.seed is None else own.seed,
            data_root=self.data_root,
            cache=self.cache,
            out=self.out,
        )


@dataclass
class Clustering:
    """A finished run. `assignments` (epochs, N): clusters before each epoch's first step, row 0 being the K-means start. `seconds` of training."""

    model: SCGC
    assignments: np.ndarray
    seconds: float


def read(recipe: Recipe) -> Data:
    """The recipe's data, with its graph made wrong where the recipe says so."""
    graph = recipe.graph
    data = load(
        recipe.data,
        data_root=recipe.data_root,
        cache=recipe.cache,
        k=graph.k,
        build=graph.build,
        blocks=recipe.blocks,
        links=graph,
        seed=recipe.seed,
    )
    edges = data.edges
    if graph.wrong:
        if data.y is None:
            raise ValueError(f"graph.wrong={graph.wrong}: wrong edges need labels, and {data.name} has none")
        edges = add_wrong_edges(edges, data.y, graph.wrong, recipe.seed)
    if graph.shuffled:
        edges = shuffle_nodes(edges, len(data.x), recipe.seed)
    return replace(data, edges=edges)


def start(recipe: Recipe, data: Data) -> AutoEncoder:
    """The auto-encoder to start from: of the file given, or trained (or read back) by its own recipe."""
    if recipe.pretrain.weights is None:
        return pretrain.main(recipe.autoencoder, data)
    network = recipe.network
    decoder = network.decoder if recipe.variant == "scgc" else None
    model = AutoEncoder(data.x.shape[1], [*network.encoder, network.embedding], decoder)
    load_autoencoder(model, recipe.pretrain.weights)
    return model


def build(recipe: Recipe, data: Data) -> SCGC:
    """The untrained model of a recipe."""
    clusters = recipe.clusters or data.classes
    if clusters is None:
        raise ValueError(f"clusters: {data.name} has no labels to count; give the number of clusters")
    if data.classes not in (None, clusters):
        warnings.warn(f"clusters={clusters}: {data.name} has {data.classes} classes; {clusters} clusters are used", stacklevel=2)
    network = recipe.network
    decoder = list(network.decoder) if recipe.variant == "scgc" else None
    return SCGC(data.x.shape[1], clusters, [*network.encoder, network.embedding], decoder, recipe.nu)


@torch.no_grad()
def embed(encode: Callable[[Features], Tensor], x: Features) -> Tensor:
    """(N, D): `encode` over chunks of nodes, so that memory does not grow with N times the widest layer."""
    return torch.cat([encode(x.rows(slice(at, at + CHUNK))) for at in range(0, len(x), CHUNK)])


def place_centres(model: SCGC, x: Features, restarts: int, seed: int) -> None:
    """K-means on the auto-encoder's embeddings; its centres become the model's.

    Raises:
        ValueError: fewer distinct embeddings than clusters.
    """
    z = embed(model.ae.encode, x)
    clusters = len(model.cluster_layer)
    if (distinct := len(z.unique(dim=0))) < clusters:
        raise ValueError(f"clusters={clusters}: expected at most the {distinct} distinct embeddings of {len(z)} nodes; give fewer clusters")
    with torch.no_grad():
        model.cluster_layer.copy_(kmeans(z, clusters, restarts=restarts, seed=seed).centres)


class Diary:
    """What each epoch began with, on disk: assignments (epochs, N) and column sums of q (epochs, K). A step made again after a kill writes the same."""

    def __init__(self, folder: Path, epochs: int, nodes: int, clusters: int) -> None:
        kind = np.uint8 if clusters <= 256 else np.int32
        self.assignments = self._open(folder / "assignments.npy", kind, (epochs, nodes))
        self.frequencies = self._open(folder / "frequencies.npy", np.float32, (epochs, clusters))

    @staticmethod
    def _open(path: Path, kind: type, shape: tuple[int, int]) -> np.ndarray:
        if not is_main():
            return np.zeros(shape, kind)
        if path.is_file():
            kept = np.load(path, mmap_mode="r+", allow_pickle=False)
            if kept.shape == shape:
                return kept
        path.parent.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)

    def write(self, epoch: int, labels: Tensor, frequency: Tensor) -> None:
        self.assignments[epoch] = labels.cpu().numpy()
        self.frequencies[epoch] = frequency.cpu().numpy()


def losses(recipe: Recipe, x: Features, structure: Structure, diary: Diary) -> Callable[[nn.Module, Step], dict[str, Tensor]]:
    """The loss of one step of a plan, for `common.engine.fit`: named terms of this process's share of the nodes."""
    device = x.matrix.device
    everyone, counts_all = part_of(len(x))
    x_all = x if counts_all is None else x.rows(everyone)
    rows_all = structure if counts_all is None else structure.own(everyone.start, everyone.stop)
    settings = {"width": x.shape[1], "tau": float(recipe.tau), "alpha": float(recipe.alpha), "beta": float(recipe.beta)}
    frequency: Tensor | None = None

    def note(epoch: int, q: Tensor) -> Tensor:
        """Write down where the epoch begins; returns the column sums of q over all nodes."""
        sums, labels = q.sum(0), q.argmax(1)
        if counts_all is not None:
            torch.distributed.all_reduce(sums)
            labels = gather_rows(labels, "none", counts=counts_all)
        diary.write(epoch, labels, sums)
        return sums

    def loss(model: nn.Module, step: Step) -> dict[str, Tensor]:
        nonlocal frequency
        if step.nodes is None:
            code = model(x_all)
            frequency = note(step.epoch, code.q.detach())
            out = objective(code, rows_all, frequency=frequency, counts=counts_all, **settings)
        else:
            if step.first:
                frequency = note(step.epoch, embed(lambda part: model(part, reconstruct=False).q, x_all))
            elif frequency is None:  # going on inside an epoch
                frequency = torch.from_numpy(np.array(diary.frequencies[step.epoch])).to(device)
                if counts_all is not None:
                    torch.distributed.broadcast(frequency, 0)
            nodes = step.nodes.to(device)
            own, counts = part_of(len(nodes))
            among = structure.among(nodes)
            code = model(x.rows(nodes[own]))
            rows = among if counts is None else among.own(own.start, own.stop)
            out = objective(code, rows, frequency=frequency, counts=counts, **settings)
        dead = int((code.z.detach() == 0).all(1).sum())
        if dead:
            raise ValueError(
                f"epoch {step.epoch}: {dead} embeddings are exactly zero and have no direction; the last saved state is kept, lower the learning rate"
            )
        terms = {"loss": out.loss, "contrast": out.contrast, "cluster": out.cluster, "reconstruction": out.reconstruction}
        return {name: term for name, term in terms.items() if term is not None}

    return loss


def main(recipe: Recipe, data: Data | None = None) -> Clustering:
    """Train one seed, go on where its folder stands, or return the finished run; the model, its recipe and the assignments are left there.

    Args:
        data: as `read` gives it, where the caller has it already.
    """
    device = start_processes()
    recipe = recipe.run
    check_recipe(recipe.folder, to_yaml(recipe))
    data = read(recipe) if data is None else data
    plan = Plan(len(data.x), recipe.batch_size, recipe.training, recipe.seed)
    folder, finished = recipe.folder, latest(recipe.folder / "state")
    if finished is not None and finished.name == f"step-{len(plan):08d}" and (folder / "model.safetensors").is_file():
        kept = np.load(folder / "assignments.npy", allow_pickle=False)
        return Clustering(load_model(SCGC, folder).to(device), kept, _seconds(recipe))
    x = Features(data.x).to(device)
    model = build(recipe, data)
    if finished is None:
        load_autoencoder(model.ae, start(recipe, data).state_dict())
        model.to(device)
        place_centres(model, x, recipe.restarts, recipe.seed)
    seed_everything(recipe.seed)
    matrix = weights(transition(data.edges, len(data.x)), recipe.order, recipe.variant == "scgc_star", recipe.max_entries)
    diary = Diary(folder, plan.epochs, len(data.x), len(model.cluster_layer))
    loss = losses(recipe, x, Structure.of(matrix).to(device), diary)
    model = follow(model, loss, plan, recipe.lr, recipe.training, folder, recipe=recipe, seed=recipe.seed).model
    if is_main():
        save_model(model, folder, recipe=to_yaml(recipe))
    return Clustering(model, np.array(diary.assignments), _seconds(recipe))


def _seconds(recipe: Recipe) -> float:
    """Wall time of the training steps of a run and of the auto-encoder's, however often they were interrupted."""
    logs = [folder / "metrics.jsonl" for folder in (recipe.folder, recipe.autoencoder.folder)]
    return sum(json.loads(log.read_text().splitlines()[-1])["seconds"] for log in logs if log.is_file())


if __name__ == "__main__":
    main(parse(Recipe))
