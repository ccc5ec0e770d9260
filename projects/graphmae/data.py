"""Graphs for node and graph tasks: citation networks, ogbn-arxiv, PPI, Reddit, TU sets, and two embedded defaults. Molecules: `molecules.py`.

Layouts under the data root (those that torch-geometric's and OGB's own loaders write and read; nothing is downloaded):

    planetoid/<Name>/raw/ind.<name>.{x,tx,allx,y,ty,ally,graph,test.index}      Cora, CiteSeer, PubMed
    tu/<NAME>/raw/<NAME>_{A,graph_indicator,graph_labels[,node_labels]}.txt       MUTAG, PROTEINS, NCI1, IMDB-BINARY, ...
    ogbn_arxiv/{raw/{edge,node-feat,node-label}.csv.gz, split/time/{train,valid,test}.csv.gz}
    ppi/{train,valid,test}_{graph.json,feats.npy,labels.npy,graph_id.npy}
    reddit/{reddit_data.npz,reddit_graph.npz}
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from common.data import checksum, require, root
from projects.graphmae.layers import Graph, prepare
from projects.graphmae.model import Features, check_features

PLANETOID = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}
TU = {
    "mutag": "MUTAG",
    "proteins": "PROTEINS",
    "nci1": "NCI1",
    "imdb-binary": "IMDB-BINARY",
    "imdb-multi": "IMDB-MULTI",
    "collab": "COLLAB",
    "reddit-binary": "REDDIT-BINARY",
}
GENERATED = ("topic-graph", "shapes")
MAX_DEGREE = 400  # one-hot degrees above it share the last column
Name = Literal[
    "topic-graph", "cora", "citeseer", "pubmed", "ogbn-arxiv", "ppi", "reddit", "shapes", "mutag", "proteins", "nci1", "imdb-binary", "imdb-multi", "collab", "reddit-binary"
]  # fmt: skip


# -- what a task is made of --------------------------------------------------------------------------------------------


@dataclass
class NodeBatch:
    """One graph to pre-train on."""

    x: Features
    graph: Graph

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NodeBatch:
        return NodeBatch(self.x.to(device, non_blocking), self.graph.to(device, non_blocking))


@dataclass
class Part:
    """Nodes that the probe sees, within the graph that gives their embeddings; labels (len(nodes),) or (len(nodes), L)."""

    batch: NodeBatch
    nodes: Tensor
    labels: Tensor


@dataclass
class NodeTask:
    """A node classification task: graphs to pre-train on, parts to probe on."""

    name: str
    classes: int
    multi_label: bool
    pretrain: list[NodeBatch]
    train: list[Part]
    val: list[Part]
    test: list[Part]
    sha256: str

    @property
    def in_dim(self) -> int:
        return self.pretrain[0].x.dense.shape[1]


@dataclass
class GraphBatch:
    """Graphs side by side: x (N, d), their edges, graph_of (N,), labels (count,)."""

    x: Tensor
    graph: Graph
    graph_of: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GraphBatch:
        tensors = (t.to(device, non_blocking=non_blocking) for t in (self.x, self.graph_of, self.labels))
        x, graph_of, labels = tensors
        return GraphBatch(x, self.graph.to(device, non_blocking), graph_of, labels)


def _ranges(start: Tensor, count: Tensor) -> Tensor:
    """start[0], start[0] + 1, ... (count[0] of them), start[1], ..."""
    begin = count.cumsum(0) - count
    return torch.arange(int(count.sum())) + (start - begin).repeat_interleave(count)


class Union:
    """Many graphs as one, edges sorted by target; some of them are cut out without sorting again.

    Args:
        graph: all graphs side by side, no edge from one to another; graph_of: (N,) rising number of each node's graph; graphs: how many.
    """

    def __init__(self, name: str, graph: Graph, graph_of: Tensor, graphs: int) -> None:
        if graphs < 1:
            raise ValueError(f"{name}: expected at least one graph, found none")
        self.graph, self.nodes = graph, torch.bincount(graph_of, minlength=graphs)
        if int(self.nodes.min()) == 0:
            raise ValueError(f"{name}: graph {int(self.nodes.argmin())} has no node")
        self.first_node = self.nodes.cumsum(0) - self.nodes
        self.edges = torch.bincount(graph_of[graph.target], minlength=graphs)
        self.first_edge = self.edges.cumsum(0) - self.edges
        self.back, self.in_degree, self.out_degree = graph.transposed[0], graph.in_degree, graph.out_degree

    def cut(self, numbers: Tensor) -> tuple[Tensor, Tensor, Graph, Tensor]:
        """Graphs with these numbers, in this order: their nodes, their edges (places in `graph`), the graph of them, and graph_of."""
        count, edge_count = self.nodes[numbers], self.edges[numbers]
        node, edge = _ranges(self.first_node[numbers], count), _ranges(self.first_edge[numbers], edge_count)
        shift = (self.first_node[numbers] - (count.cumsum(0) - count)).repeat_interleave(edge_count)
        source, target = self.graph.source[edge] - shift, self.graph.target[edge] - shift
        order = self.back[edge] - (self.first_edge[numbers] - (edge_count.cumsum(0) - edge_count)).repeat_interleave(edge_count)
        start, back_start = torch.zeros(len(node) + 1, dtype=torch.int32), torch.zeros(len(node) + 1, dtype=torch.int32)
        start[1:], back_start[1:] = self.in_degree[node].cumsum(0), self.out_degree[node].cumsum(0)
        graph = Graph(source, target, start, len(node))
        graph._kept["transposed"] = order, back_start, target[order].int()
        return node, edge, graph, torch.arange(len(numbers)).repeat_interleave(count)


class GraphSet:
    """Many small graphs with one-hot node features.

    Args:
        kinds: (N,) column of each node's one-hot feature; width: number of columns.
        edges: (2, E), node numbers over the whole set, none from one graph to another; self-loops are removed, then one added to every node.
        graph_of: (N,) rising graph number of each node.
        labels: (G,) int64.
    """

    def __init__(self, name: str, kinds: Tensor, width: int, edges: Tensor, graph_of: Tensor, labels: Tensor, sha256: str) -> None:
        self.name, self.kinds, self.in_dim, self.labels, self.sha256 = name, kinds, width, labels, sha256
        self.union = Union(name, Graph.from_edges(prepare(edges, len(kinds)), len(kinds)), graph_of, len(labels))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def batch(self, graphs: Tensor) -> GraphBatch:
        """The graphs with these numbers, in this order."""
        node, _, graph, graph_of = self.union.cut(graphs)
        x = torch.zeros(len(node), self.in_dim)
        x[torch.arange(len(node)), self.kinds[node]] = 1
        return GraphBatch(x, graph, graph_of, self.labels[graphs])


class Batches(Dataset[Any]):
    """Batches of a `GraphSet` (anything with `len` and `batch(numbers)`), shuffled anew each epoch from (seed, epoch) alone; the short last batch stays.

    One item is one whole batch, so a loader over it does no work per graph.
    """

    def __init__(self, graphs: Any, batch_size: int, seed: int, numbers: Tensor | None = None) -> None:
        self.graphs, self.batch_size, self.seed = graphs, batch_size, seed
        self.numbers = torch.arange(len(graphs)) if numbers is None else numbers
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self.order = self.numbers[torch.randperm(len(self.numbers), generator=generator)]

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch_size)

    def __getitem__(self, number: int) -> Any:
        return self.graphs.batch(self.order[number * self.batch_size : (number + 1) * self.batch_size])

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self, batch_sampler=BatchSampler(SequentialSampler(self), 1, False), collate_fn=_only)


class NeighbourBatches(Batches):
    """Node-induced samples of a graph too large for one step: `batch_size` nodes, then up to `fanout[k]` random sources of each node found so far.

    All edges of the graph between sampled nodes are kept; every sampled node is a node of the batch like any other (masked, reconstructed).
    """

    def __init__(self, whole: NodeBatch, batch_size: int, fanout: Sequence[int], seed: int) -> None:
        self.whole, self.fanout, self.degree = whole, list(fanout), whole.graph.in_degree
        super().__init__(_Numbers(len(self.degree)), batch_size, seed)

    def __getitem__(self, number: int) -> NodeBatch:
        graph = self.whole.graph
        frontier = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        found = torch.zeros(graph.sources, dtype=torch.bool)
        found[frontier] = True
        for most in self.fanout:
            draws = (torch.rand(len(frontier), most) * self.degree[frontier, None]).long()
            frontier = graph.source[graph.start[frontier].long()[:, None] + draws].unique()
            frontier = frontier[~found[frontier]]
            found[frontier] = True
        nodes = found.nonzero().flatten()
        place = torch.full((graph.sources,), -1)
        place[nodes] = torch.arange(len(nodes))
        inner = found[graph.source] & found[graph.target]
        edges = torch.stack([place[graph.source[inner]], place[graph.target[inner]]])
        return NodeBatch(Features(self.whole.x.dense[nodes]), Graph.from_edges(edges, len(nodes)))


class _Numbers:
    """Counts as a collection of `count` things that are their own numbers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def _only(items: list[Any]) -> Any:
    return items[0]


# -- files -------------------------------------------------------------------------------------------------------------


def _pyg() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_geometric.datasets
            import torch_geometric.transforms
    except ImportError as err:
        raise ImportError("GraphMAE's data readers need torch-geometric: pip install -e '.[graph]'") from err
    return torch_geometric


def cache_folder(cache: str | None) -> Path:
    """Where prepared copies of data sets go: the argument, else the user's cache folder."""
    return (
        Path(cache).expanduser() if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contramask" / "graphmae"
    )


@contextmanager
def _loading(what: str, folder: Path) -> Iterator[None]:
    """Names the files and the prepared copy when a reader cannot make sense of them."""
    try:
        yield
    except (ImportError, FileNotFoundError):
        raise
    except Exception as err:
        raise ValueError(
            f"{what}: its files cannot be read ({type(err).__name__}: {err}); fetch them again, and delete {folder} if they were changed"
        ) from err


def _linked(raw: Sequence[Path], cache: Path, name: str, sha256: str, inside: str = "raw") -> Path:
    """A folder in the cache with links to the raw files, beside which loaders may write; one for each content of the files."""
    folder = cache / f"{name}-{sha256[:12]}"
    place = folder / inside if inside else folder
    place.mkdir(parents=True, exist_ok=True)
    for file in raw:
        link = place / file.name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
    return folder


def _masked_nodes(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def _check_split(name: str, labels: Tensor, classes: int, parts: dict[str, Tensor]) -> None:
    seen: Tensor | None = None
    for part, nodes in parts.items():
        if len(nodes) == 0:
            raise ValueError(f"{name}: the {part} split is empty")
        if seen is not None and torch.isin(nodes, seen).any():
            raise ValueError(f"{name}: the {part} split shares {int(torch.isin(nodes, seen).sum())} nodes with those before it")
        seen = nodes if seen is None else torch.cat([seen, nodes])
        if labels.ndim == 1 and (int(labels[nodes].min()) < 0 or int(labels[nodes].max()) >= classes):
            raise ValueError(
                f"{name}: expected labels 0 to {classes - 1}, found {int(labels[nodes].min())} to {int(labels[nodes].max())} in {part}"
            )


def node_task(
    name: str, x: Tensor, edges: Tensor, labels: Tensor, parts: dict[str, Tensor], sha256: str, classes: int | None = None
) -> NodeTask:
    """One graph, all of it seen in pre-training; self-loops are removed, then one added to every node.

    Args:
        x: (N, d); edges: (2, E); labels: (N,); parts: node numbers under train, val, test.
    Raises:
        ValueError: features, edges, labels or splits that cannot be right.
    """
    check_features(x)
    zero = int((~x.any(1)).sum())
    if zero:
        warnings.warn(f"{name}: {zero} rows of features are zero; such a node adds 1 to the loss when masked", stacklevel=2)
    classes = int(labels.max()) + 1 if classes is None else classes
    _check_split(name, labels, classes, parts)
    batch = NodeBatch(Features(x), Graph.from_edges(prepare(edges, len(x)), len(x)))
    split = {part: [Part(batch, nodes, labels[nodes])] for part, nodes in parts.items()}
    return NodeTask(name, classes, False, [batch], split["train"], split["val"], split["test"], sha256)


def planetoid(name: str, data_root: str | None = None, cache: str | None = None) -> NodeTask:
    """Cora, CiteSeer or PubMed with the public split; rows of the features divided by their sum (zero rows stay zero)."""
    official = PLANETOID[name]
    folder = root(data_root) / "planetoid" / official / "raw"
    how = f"download ind.{name}.* from github.com/kimiyoung/planetoid (data/) into {folder}"
    files = [
        require(folder / f"ind.{name}.{part}", f"{official}, Planetoid format", how)
        for part in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
    ]
    sha256 = checksum(files)
    pyg = _pyg()
    place = _linked(files, cache_folder(cache), official, sha256, f"{official}/raw")
    with _loading(official, place), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pyg.datasets.Planetoid(str(place), official, transform=pyg.transforms.NormalizeFeatures())[0]
    parts = {"train": data.train_mask, "val": data.val_mask, "test": data.test_mask}
    return node_task(official, data.x, data.edge_index, data.y, {part: _masked_nodes(mask) for part, mask in parts.items()}, sha256)


def _standardised(x: Tensor) -> Tensor:
    """Zero mean and unit (population) deviation per column over ALL nodes, as the reference's scaler does; a constant column becomes zero."""
    deviation = x.double().std(0, unbiased=False)
    return ((x.double() - x.double().mean(0)) / torch.where(deviation == 0, torch.ones_like(deviation), deviation)).float()


def arxiv(data_root: str | None = None) -> NodeTask:
    """ogbn-arxiv in OGB's files, split by year: made bidirected with parallel edges merged, features standardised over all nodes."""
    folder = root(data_root) / "ogbn_arxiv"
    how = f"download snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip and unpack it as {folder}"
    raw = [require(folder / "raw" / f"{part}.csv.gz", "ogbn-arxiv, OGB format", how) for part in ("edge", "node-feat", "node-label")]
    split = [require(folder / "split" / "time" / f"{part}.csv.gz", "ogbn-arxiv, split by year", how) for part in ("train", "valid", "test")]
    with _loading("ogbn-arxiv", folder):
        edges, x, labels = (
            np.loadtxt(file, delimiter=",", dtype=kind, ndmin=2) for file, kind in zip(raw, (np.int64, np.float32, np.int64), strict=True)
        )
        parts = [torch.from_numpy(np.loadtxt(file, dtype=np.int64, ndmin=1)) for file in split]
    forward = torch.from_numpy(edges.T)
    both = torch.unique(torch.cat([forward, forward.flip(0)], dim=1), dim=1)
    return node_task(
        "ogbn-arxiv",
        _standardised(torch.from_numpy(x)),
        both,
        torch.from_numpy(labels[:, 0]),
        dict(zip(("train", "val", "test"), parts, strict=True)),
        checksum([*raw, *split]),
    )


def ppi(data_root: str | None = None, cache: str | None = None) -> NodeTask:
    """PPI, 20/2/2 graphs, 121 labels a node, raw features; pre-training takes the training graphs two at a time, in order."""
    folder = root(data_root) / "ppi"
    how = f"download data.dgl.ai/dataset/ppi.zip and unpack it as {folder}"
    parts = ("train", "valid", "test")
    files = [
        require(folder / f"{part}_{kind}", "PPI, GraphSAGE format", how)
        for part in parts
        for kind in ("graph.json", "feats.npy", "labels.npy", "graph_id.npy")
    ]
    sha256 = checksum(files)
    pyg = _pyg()
    place = _linked(files, cache_folder(cache), "PPI", sha256)
    loaded: dict[str, list[Any]] = {}
    with _loading("PPI", place), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in parts:
            loaded[part] = list(pyg.datasets.PPI(str(place), "val" if part == "valid" else part))
    split: dict[str, list[Part]] = {}
    for part, graphs in loaded.items():
        pairs = [graphs[i : i + 2] for i in range(0, len(graphs), 2)]
        split[part] = [_joined(pair) for pair in pairs]
    return NodeTask(
        "PPI", loaded["train"][0].y.shape[1], True, [p.batch for p in split["train"]], split["train"], split["valid"], split["test"], sha256
    )


def _joined(graphs: Sequence[Any]) -> Part:
    """Graphs side by side as one, every node to be classified."""
    sizes = torch.tensor([graph.num_nodes for graph in graphs])
    shifts = (sizes.cumsum(0) - sizes).tolist()
    edges = torch.cat([graph.edge_index + shift for graph, shift in zip(graphs, shifts, strict=True)], dim=1)
    x = torch.cat([graph.x for graph in graphs])
    check_features(x)
    batch = NodeBatch(Features(x), Graph.from_edges(prepare(edges, len(x)), len(x)))
    return Part(batch, torch.arange(len(x)), torch.cat([graph.y for graph in graphs]))


def reddit(data_root: str | None = None, cache: str | None = None) -> NodeTask:
    """Reddit: features standardised over all nodes; pre-training and the training nodes' embeddings see only the subgraph of the training nodes."""
    folder = root(data_root) / "reddit"
    how = f"download data.dgl.ai/dataset/reddit.zip and unpack it as {folder}"
    files = [require(folder / file, "Reddit, GraphSAGE format", how) for file in ("reddit_data.npz", "reddit_graph.npz")]
    sha256 = checksum(files)
    pyg = _pyg()
    place = _linked(files, cache_folder(cache), "Reddit", sha256)
    with _loading("Reddit", place), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pyg.datasets.Reddit(str(place))[0]
    x = _standardised(data.x)
    parts = {part: _masked_nodes(mask) for part, mask in (("train", data.train_mask), ("val", data.val_mask), ("test", data.test_mask))}
    whole = node_task("Reddit", x, data.edge_index, data.y, parts, sha256)
    nodes = parts["train"]
    number = torch.full((len(x),), -1)
    number[nodes] = torch.arange(len(nodes))
    inside = number[data.edge_index]
    inner = inside[:, (inside >= 0).all(0)]
    batch = NodeBatch(Features(x[nodes]), Graph.from_edges(prepare(inner, len(nodes)), len(nodes)))
    train = Part(batch, torch.arange(len(nodes)), data.y[nodes])
    return NodeTask("Reddit", whole.classes, False, [batch], [train], whole.val, whole.test, sha256)


def tu(name: str, data_root: str | None = None, cache: str | None = None) -> GraphSet:
    """A TU set: one-hot node labels, or where there are none one-hot in-degrees (before self-loops, capped at 400); parallel edges merged.

    Continuous attributes are never used. IMDB and COLLAB circulate with every edge written twice; the reference kept both, we keep one.
    """
    official = TU[name]
    folder = root(data_root) / "tu" / official / "raw"
    how = f"download www.chrsmrrs.com/graphkerneldatasets/{official}.zip and put its text files into {folder}"
    files = [require(folder / f"{official}_{part}.txt", f"{official}, TU format", how) for part in ("A", "graph_indicator", "graph_labels")]
    labelled = folder / f"{official}_node_labels.txt"
    files += [labelled] if labelled.is_file() else []
    sha256 = checksum(files)
    pyg = _pyg()
    place = _linked(files, cache_folder(cache), official, sha256, f"{official}/raw")
    fresh = not (place / official / "processed").is_dir()
    with _loading(official, place):
        indicator = np.loadtxt(files[1], dtype=np.int64, ndmin=1)
    steps = np.diff(indicator)
    if len(indicator) == 0 or indicator[0] != 1 or steps.min(initial=0) < 0 or steps.max(initial=0) > 1:
        raise ValueError(
            f"{files[1]}: expected graph numbers from 1, rising without gaps; found a step at line {int(np.argmax((steps < 0) | (steps > 1))) + 2}"
        )
    if labelled.is_file():
        with labelled.open("rb") as stream:
            lines = sum(1 for line in stream if line.strip())
        if lines != len(indicator):
            raise ValueError(f"{labelled}: expected a label for each of {len(indicator)} nodes, found {lines}")
    if fresh:
        with _loading(official, place):
            pairs = np.loadtxt(files[0], dtype=np.int64, delimiter=",", ndmin=2)
        outside = (pairs < 1) | (pairs > len(indicator))
        if outside.any():
            raise ValueError(f"{files[0]}: line {int(outside.any(1).argmax()) + 1} names a node outside 1 to {len(indicator)}")
    with _loading(official, place), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graphs = list(pyg.datasets.TUDataset(str(place), official))
    sizes = torch.tensor([graph.num_nodes for graph in graphs])
    shifts = (sizes.cumsum(0) - sizes).tolist()
    edges = torch.cat([graph.edge_index + shift for graph, shift in zip(graphs, shifts, strict=True)], dim=1)
    if fresh:
        merged = int((pairs[:, 0] != pairs[:, 1]).sum()) - edges.shape[1]
        if merged:
            warnings.warn(f"{official}: {merged} edges are written more than once; merged", stacklevel=2)
    nodes = int(sizes.sum())
    if graphs[0].x is not None:
        x = torch.cat([graph.x for graph in graphs])
        kinds, width = x.argmax(1), x.shape[1]
    else:
        degree = torch.bincount(edges[1], minlength=nodes)
        kinds, width = degree.clamp(max=MAX_DEGREE), min(int(degree.max()), MAX_DEGREE) + 1
    labels = torch.cat([graph.y.flatten() for graph in graphs])
    return GraphSet(official, kinds, width, edges, torch.arange(len(graphs)).repeat_interleave(sizes), labels, sha256)


# -- embedded defaults -------------------------------------------------------------------------------------------------


def topic_graph(seed: int = 0, nodes: int = 1200, words: int = 300, topics: int = 6) -> NodeTask:
    """Documents that cite each other: one document's words say little about its topic, its neighbours' words much (spec, "topic graph").

    Each topic owns 20 words. A document has 1 + Poisson(13) words, 15 % of them from its topic's, the others from a background common to all;
    it cites 1 + Poisson(1) others, 60 % of them of its own topic. Features 0/1, rows divided by their sum. 20 training documents a topic,
    200 for validation.
    """
    rng = np.random.default_rng(seed)
    topic = rng.integers(topics, size=nodes)
    signature = rng.permutation(words)[: 20 * topics].reshape(topics, 20)
    background = rng.dirichlet(np.full(words, 0.5))
    x = np.zeros((nodes, words), dtype=np.float32)
    length = 1 + rng.poisson(13, size=nodes)
    own = rng.binomial(length, 0.15)
    for i in range(nodes):
        x[i, rng.choice(signature[topic[i]], own[i])] = 1
        x[i, rng.choice(words, length[i] - own[i], p=background)] = 1
    x /= x.sum(1, keepdims=True)
    members = [np.flatnonzero(topic == t) for t in range(topics)]
    source = np.arange(nodes).repeat(1 + rng.poisson(1, size=nodes))
    same = rng.random(len(source)) < 0.6
    target = np.where(same, [rng.choice(members[topic[i]]) for i in source], rng.integers(nodes, size=len(source)))
    edges = torch.from_numpy(np.stack([source, target])[:, source != target])
    edges = torch.unique(torch.cat([edges, edges.flip(0)], dim=1), dim=1)
    train = np.concatenate([rng.permutation(group)[:20] for group in members])
    rest = rng.permutation(np.setdiff1d(np.arange(nodes), train))
    parts = {name: torch.from_numpy(np.sort(part)) for name, part in (("train", train), ("val", rest[:200]), ("test", rest[200:]))}
    return node_task("topic graph", torch.from_numpy(x), edges, torch.from_numpy(topic), parts, "generated", topics)


def shapes(seed: int = 0, graphs: int = 120) -> GraphSet:
    """Rings, trees and chains of cliques of 10 to 20 nodes (classes 0, 1, 2), each node of one of 4 random types: a smoke test of the graph task."""
    rng = np.random.default_rng(seed)
    kinds: list[np.ndarray] = []
    edges: list[np.ndarray] = []
    graph_of: list[np.ndarray] = []
    labels = np.arange(graphs) % 3
    first = 0
    for g, label in enumerate(labels):
        size = int(rng.integers(10, 21))
        if label == 0:
            pairs = np.stack([np.arange(size), (np.arange(size) + 1) % size])
        elif label == 1:
            pairs = np.stack([np.arange(1, size), [int(rng.integers(i)) for i in range(1, size)]])
        else:
            clique = np.arange(size) // 4
            inside = np.argwhere(np.triu(clique[:, None] == clique[None], 1)).T
            chain = np.stack([np.arange(3, size - 1, 4), np.arange(4, size, 4)])
            pairs = np.concatenate([inside, chain], axis=1)
        edges.append(np.concatenate([pairs, pairs[::-1]], axis=1) + first)
        kinds.append(rng.integers(4, size=size))
        graph_of.append(np.full(size, g))
        first += size
    joined = (torch.from_numpy(np.concatenate(parts, axis=-1)) for parts in (kinds, edges, graph_of))
    kind, edge, owner = joined
    return GraphSet("shapes", kind, 4, edge, owner, torch.from_numpy(labels), "generated")


def load(name: str, *, data_root: str | None = None, cache: str | None = None, seed: int = 0) -> NodeTask | GraphSet:
    """The data set of a recipe; `seed` makes the two generated ones."""
    if name == "topic-graph":
        return topic_graph(seed)
    if name == "shapes":
        return shapes(seed)
    if name in PLANETOID:
        return planetoid(name, data_root, cache)
    if name in TU:
        return tu(name, data_root, cache)
    if name == "ogbn-arxiv":
        return arxiv(data_root)
    if name in ("ppi", "reddit"):
        return {"ppi": ppi, "reddit": reddit}[name](data_root, cache)
    raise ValueError(f"data={name!r}: expected one of topic-graph, shapes, {', '.join([*PLANETOID, *TU])}, ogbn-arxiv, ppi, reddit")
