"""Graph-clustering sets of SDCN (acm, dblp, cite, usps, hhar, reut), a user's own in either layout, and the embedded default.

Layouts under the data root (nothing is downloaded):

    sdcn/<name>/data.npz                         `x` (N, d), `y` (N,), and `edges` (E, 2) or `edges_k<k>` (E, 2)
    sdcn/data/<name>.txt, <name>_label.txt       SDCN's own: N lines of d numbers; N integers
    sdcn/graph/<name>_graph.txt, <name><k>_graph.txt   two node numbers a line, from 0, in the order of the feature rows
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from common.checkpoint import written_aside
from common.data import checksum, require, root
from projects.scgc.graph import Method, check_edges, knn_edges

GENERATED = "blocks"
CLUSTERS = {"acm": 3, "dblp": 4, "cite": 6, "usps": 10, "hhar": 6, "reut": 4}
WITHOUT_FEATURES = {
    "hhar": "the 561 columns of UCI's 'Human Activity Recognition Using Smartphones', train rows then test rows, as sdcn/data/hhar.txt",
    "reut": "SDCN's own file data/reut.txt (its random 10,000 documents cannot be drawn again), as sdcn/data/reut.txt",
}


@dataclass(frozen=True)
class Blocks:
    """Features of the embedded default: word lists in which a document's own class shows weakly."""

    nodes: int = 600
    """Documents."""
    classes: int = 4
    """Topics."""
    words: int = 200
    """Vocabulary; topic c owns words 25c to 25c + 24."""
    topical: float = 0.2
    """Probability that a word is drawn from the topic's own 25."""


@dataclass(frozen=True)
class Links:
    """Which graph joins the nodes."""

    k: int | None = None
    """Neighbours of each node: of the published lists, or of those built from the features; none where the graph is given."""
    build: Literal["given", "heat", "cos", "ncos"] = "given"
    """Take the published graph, or build one from the features by this similarity."""
    wrong: float = 0.0
    """Added edges between nodes of different classes, as a share of the edges there are (robustness)."""
    shuffled: bool = False
    """Put the graph on shuffled nodes, so that it fits no features (control)."""
    edges: int = 1800
    """Undirected edges of the embedded default."""
    inside: float = 0.85
    """Probability that an edge of the embedded default looks for its second end in the class of the first; 0 = anywhere but there."""

    def __post_init__(self) -> None:
        if self.wrong < 0 or not 0 <= self.inside <= 1:
            raise ValueError(f"graph.wrong={self.wrong}, graph.inside={self.inside}: expected wrong at least 0 and inside 0 to 1")
        if self.build != "given" and self.k is None:
            raise ValueError(f"graph.build={self.build}: expected graph.k, the neighbours of each node; found none")


@dataclass(frozen=True)
class Data:
    """Features x (N, d), labels y (N,) from 0 or None, directed edge lines (E, 2)."""

    name: str
    x: np.ndarray
    y: np.ndarray | None
    edges: np.ndarray
    sha256: str

    @property
    def classes(self) -> int | None:
        return None if self.y is None else int(self.y.max()) + 1


def load(
    name: str,
    *,
    data_root: str | Path | None = None,
    cache: str | Path | None = None,
    k: int | None = None,
    build: Literal["given", "none"] | Method = "given",
    blocks: Blocks | None = None,
    links: Links | None = None,
    seed: int = 0,
) -> Data:
    """A data set by name; `blocks` draws the embedded default from `seed`.

    Args:
        build: "given" = the published graph, "none" = no graph (pre-training reads none), else one built from the features.
    Raises:
        FileNotFoundError: a file is missing; the message names it, and for k-NN graphs the k that exist.
        ValueError: sizes that differ, node numbers outside 0..N-1, labels of one class, features that are not finite or all equal.
    """
    if name == GENERATED:
        return generate(blocks or Blocks(), links or Links(), seed)
    folder = root(data_root) / "sdcn"
    archive = folder / name / "data.npz"
    if archive.is_file():
        return _from_archive(name, archive, folder, k, build, cache)
    if (folder / "data").is_dir():
        return _from_text(name, folder, k, build, cache)
    known = sorted(path.parent.name for path in folder.glob("*/data.npz"))
    raise FileNotFoundError(
        f"{name}: expected {archive} or {folder / 'data' / f'{name}.txt'}, found neither (archives there: {', '.join(known) or 'none'}); see the README, Data"
    )


def _from_archive(name: str, path: Path, folder: Path, k: int | None, build: str, cache: str | Path | None) -> Data:
    with np.load(path, allow_pickle=False) as content:
        held = {key: content[key] for key in content.files}
    text = folder / "data" / f"{name}.txt"
    sources = [path]
    if "x" not in held:
        if not text.is_file():
            raise FileNotFoundError(
                f"{name}: {path} holds labels and graphs but no features; get {WITHOUT_FEATURES.get(name, 'them')}, expected at {text}"
            )
        held["x"] = _cached_text(text, cache)
        sources.append(text)
    if build == "given":
        key = "edges" if k is None else f"edges_k{k}"
        if key not in held:
            there = [int(found[1]) for found in (re.fullmatch(r"edges_k(\d+)", name) for name in held) if found]
            choice = f"a k-NN graph with k in {sorted(there)}" if there else "one graph, given, without k"
            raise ValueError(f"{name}: {path} holds {choice}; found graph.k={k}, set it so")
        held["edges"] = held[key]
    return _checked(name, held["x"], held.get("y"), held.get("edges"), k, build, sources)


def _from_text(name: str, folder: Path, k: int | None, build: str, cache: str | Path | None) -> Data:
    features = require(
        folder / "data" / f"{name}.txt", f"{name}, features", "put SDCN's data/ and graph/ folders there; see the README, Data"
    )
    label_file = folder / "data" / f"{name}_label.txt"
    sources = [features]
    x = _cached_text(features, cache)
    y = None
    if label_file.is_file():
        y = np.loadtxt(label_file, ndmin=1)
        if not np.array_equal(y, np.round(y)):
            raise ValueError(f"{name}: {label_file}: expected one integer a line, found {y[y != np.round(y)][0]}")
        y = y.astype(np.int64)
        sources.append(label_file)
    edges = None
    if build == "given":
        graph = folder / "graph" / f"{name}{'' if k is None else k}_graph.txt"
        if not graph.is_file():
            there = sorted(path.name for path in graph.parent.glob(f"{name}*_graph.txt"))
            raise FileNotFoundError(
                f"{name}: expected the graph {graph}, found {', '.join(there) or 'none'}; set graph.k to match (acm, dblp and cite have one graph, without k)"
            )
        edges = read_edges(graph)
        sources.append(graph)
    return _checked(name, x, y, edges, k, build, sources)


def _cached_text(path: Path, cache: str | Path | None) -> np.ndarray:
    """Numbers of a text file; the parsed copy is kept, since 100 MB of text take a minute."""
    folder = Path(cache).expanduser() if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contramask" / "scgc"
    kept = folder / f"{path.stem}-{checksum(path)[:12]}.npy"
    if kept.is_file():
        return np.load(kept, allow_pickle=False)
    try:
        x = np.loadtxt(path, dtype=np.float32, ndmin=2)
    except ValueError as err:
        raise ValueError(f"{path}: expected N lines of d numbers separated by blanks ({err}); mend the file") from err
    with written_aside(kept) as aside, aside.open("wb") as stream:
        np.save(stream, x)
    return x


def read_edges(path: Path) -> np.ndarray:
    """(E, 2) node numbers of a graph file, one `i j` a line.

    Raises:
        ValueError: a line of another form; its number is given.
    """
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        if not re.fullmatch(r"\s*-?\d+\s+-?\d+\s*", line):
            raise ValueError(
                f"{path}, line {number}: expected two whole numbers `i j`, found {line[:60]!r}; no commas and no weights (a repeated line counts twice)"
            )
        pairs.append(tuple(map(int, line.split())))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _checked(
    name: str, x: np.ndarray, y: np.ndarray | None, edges: np.ndarray | None, k: int | None, build: str, sources: list[Path]
) -> Data:
    where = ", ".join(map(str, sources))
    if x.ndim != 2:
        raise ValueError(f"{name}: features: expected (N, d), found {x.shape} ({where})")
    check_features(x, f"{name} ({where})")
    if y is not None:
        if len(y) != len(x):
            raise ValueError(f"{name}: expected as many labels as feature rows, found {len(y)} labels and {len(x)} rows ({where})")
        y = check_labels(y, name)
        if name in CLUSTERS and y.max() + 1 != CLUSTERS[name]:
            warnings.warn(
                f"{name}: the published set has {CLUSTERS[name]} classes, these labels {y.max() + 1}; the latter is used", stacklevel=3
            )
    if build == "none":
        edges = np.zeros((0, 2), dtype=np.int64)
    elif build != "given":
        edges = knn_edges(x, k or 0, build)  # type: ignore[arg-type]
    edges = check_edges(np.asarray(edges), len(x), f"{name}: edges ({where})")
    return Data(name, x, y, edges, checksum(sources))


def check_features(x: np.ndarray, origin: str) -> None:
    """Refuse features with an entry that is not finite, or that are all equal."""
    bad = ~np.isfinite(x)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(f"{origin}: features: expected finite numbers, found {x[row, column]} in row {row}, column {column}")
    if (x == x[0]).all():
        raise ValueError(f"{origin}: features: expected rows that differ, found {len(x)} equal ones")


def check_labels(y: np.ndarray, origin: str) -> np.ndarray:
    """Labels as 0..K-1, whatever they start at; a gap is closed with a warning.

    Raises:
        ValueError: fewer than two distinct labels.
    """
    values, numbers = np.unique(y, return_inverse=True)
    if len(values) < 2:
        raise ValueError(f"{origin}: labels: expected at least 2 classes, found {values.tolist()}")
    if values[-1] - values[0] != len(values) - 1:
        warnings.warn(f"{origin}: labels have gaps, found {values.tolist()}; {len(values)} classes are used", stacklevel=4)
    return numbers.astype(np.int64)


# -- embedded default ----------------------------------------------------------------------------------------------------


def generate(blocks: Blocks, links: Links, seed: int) -> Data:
    """Documents whose words say little of their topic and whose links say much; a tenth of the documents has no link.

    Features depend on (blocks, seed) alone, so graphs of other kinds join the same documents.
    """
    if blocks.words < 25 * blocks.classes or blocks.nodes < 10 * blocks.classes:
        raise ValueError(
            f"blocks: expected at least 25 words and 10 nodes a class, found {blocks.words} words, {blocks.nodes} nodes, {blocks.classes} classes"
        )
    random = np.random.default_rng([seed, 0])
    y = random.permutation(np.arange(blocks.nodes) % blocks.classes)
    x = np.zeros((blocks.nodes, blocks.words), dtype=np.uint8)
    for node in range(blocks.nodes):
        count = 1 + random.poisson(20)
        own = 25 * y[node] + random.integers(25, size=count)
        x[node, np.where(random.random(count) < blocks.topical, own, random.integers(blocks.words, size=count))] = 1
    random = np.random.default_rng([seed, 1])
    active = np.sort(random.permutation(blocks.nodes)[: round(0.9 * blocks.nodes)])
    members = [active[y[active] == c] for c in range(blocks.classes)]
    others = [active[y[active] != c] for c in range(blocks.classes)]
    if links.edges > len(active) * (len(active) - 1) // 4 // blocks.classes:
        raise ValueError(f"graph.edges={links.edges}: too many for {blocks.nodes} nodes; expected a sparse graph")
    found: set[tuple[int, int]] = set()
    while len(found) < links.edges:
        i = int(random.choice(active))
        if random.random() < links.inside:
            pool = members[y[i]]
        else:
            pool = active if links.inside > 0 else others[y[i]]
        j = int(random.choice(pool))
        if i != j:
            found.add((min(i, j), max(i, j)))
    half = np.array(sorted(found), dtype=np.int64)
    return Data(GENERATED, x, y, np.concatenate([half, half[:, ::-1]]), f"generated from seed {seed}")
