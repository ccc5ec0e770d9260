"""From an edge list to structure weights, k-nearest-neighbour graphs, and graphs that are wrong on purpose.

S = max(C, C') with C_ij the number of times that the pair (i, j) is listed; P = D^-1 (S + I); W = P^R (SCGC) or P + ... + P^R (SCGC*).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.sparse as sp

Method = Literal["heat", "cos", "ncos"]
MOST_ENTRIES = 100_000_000
"""Stored entries of W that are built without asking (1.2 GB)."""


def check_edges(edges: np.ndarray, nodes: int, origin: str = "edges") -> np.ndarray:
    """(E, 2) int64 pairs of node numbers 0..nodes-1.

    Raises:
        ValueError: another shape or type, or a number outside.
    """
    edges = np.asarray(edges)
    if edges.ndim != 2 or edges.shape[1] != 2 or not np.issubdtype(edges.dtype, np.integer):
        raise ValueError(f"{origin}: expected integers (E, 2), one pair of node numbers a line, found {edges.shape} {edges.dtype}")
    if len(edges) and (edges.min() < 0 or edges.max() >= nodes):
        raise ValueError(
            f"{origin}: expected node numbers 0 to {nodes - 1} in the order of the feature rows, found {edges.min()} to {edges.max()}; subtract the first number if they do not start at 0"
        )
    return edges.astype(np.int64)


def symmetric(edges: np.ndarray, nodes: int) -> sp.csr_matrix:
    """S = max(C, C'): (N, N), repeats counted, an edge in either direction counts in both."""
    edges = check_edges(edges, nodes)
    count = sp.csr_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(nodes, nodes))  # equal pairs add up
    return count.maximum(count.T).tocsr()


def transition(edges: np.ndarray, nodes: int) -> sp.csr_matrix:
    """P = D^-1 (S + I), rows sum to 1; a node without edges stays with itself. float64."""
    walk = symmetric(edges, nodes) + sp.identity(nodes, format="csr")
    return (sp.diags(1 / np.asarray(walk.sum(1)).ravel()) @ walk).tocsr()


def weights(step: sp.csr_matrix, order: int, cumulative: bool, most: int = MOST_ENTRIES) -> sp.csr_matrix:
    """Structure weights by sparse products: step^order, or step + ... + step^order (rows then sum to `order`).

    Args:
        step: P. order: R, hops. cumulative: SCGC*.
        most: stored entries allowed.
    Raises:
        ValueError: order below 1, or more entries than `most`; said before they are built.
    """
    if order < 1:
        raise ValueError(f"order={order}: expected at least 1 hop")
    power = total = step
    for hop in range(2, order + 1):
        _room(power, step, hop, most)
        power = (power @ step).tocsr()
        total = total + power
    return total.tocsr() if cumulative else power


def _room(left: sp.csr_matrix, right: sp.csr_matrix, hop: int, most: int, rows: int = 512) -> None:
    """Refuse a product with too many entries; counted in blocks of rows, and only where the cheap bound does not settle it."""
    degree = np.diff(right.indptr)
    bound = np.minimum(np.add.reduceat(np.append(degree[left.indices], 0), left.indptr[:-1]), right.shape[1])
    if bound.sum() <= most:
        return
    ones, other = (sp.csr_matrix((np.ones(m.nnz, np.float32), m.indices, m.indptr), shape=m.shape) for m in (left, right))
    found = sum((ones[start : start + rows] @ other).nnz for start in range(0, left.shape[0], rows))
    if found > most:
        raise ValueError(
            f"order={hop}: the weights would have {found:,} entries ({12 * found / 2**30:.1f} GiB), allowed are {most:,}; use a smaller order, a sparser graph, or raise max_entries"
        )


# -- k-nearest neighbours ----------------------------------------------------------------------------------------------


def knn_edges(x: np.ndarray, k: int, method: Method = "heat", rows: int = 1024) -> np.ndarray:
    """Directed (node, neighbour) pairs as SDCN's graph script writes them: the k + 1 most similar of each node, itself dropped.

    heat: exp(-|x - y|^2 / 2), ranked by the distance. cos: dot product of x > 0. ncos: the same, each row first divided by its sum
    (which is no cosine). A node that is not among its own k + 1 keeps k + 1 neighbours; ties fall arbitrarily.

    Args:
        x: (N, d). rows: nodes compared with all others at a time.
    Returns:
        (about N * k, 2) int64, sorted by node.
    """
    x = np.asarray(x, dtype=np.float64)
    count = len(x)
    if not 1 <= k < count:
        raise ValueError(f"k={k}: expected 1 to {count - 1} neighbours among {count} nodes")
    if method != "heat":
        binary = (x > 0).astype(np.float64)
        if method == "ncos":
            binary /= np.maximum(binary.sum(1, keepdims=True), 1)
        sparse = sp.csr_matrix(binary)
    square = (x**2).sum(1)
    pairs = []
    for start in range(0, count, rows):
        own = np.arange(start, min(start + rows, count))
        if method == "heat":
            similar = 2 * (x[own] @ x.T) - square[own, None] - square
            similar[np.arange(len(own)), own] = 0
            np.minimum(similar, 0, out=similar)
        else:
            similar = (sparse[own] @ sparse.T).toarray()
        nearest = np.argpartition(-similar, k, axis=1)[:, : k + 1]
        other = nearest != own[:, None]
        pairs.append(np.stack([own[:, None].repeat(k + 1, 1)[other], nearest[other]], 1))
    return np.concatenate(pairs)


# -- what a graph is like, and wrong graphs ------------------------------------------------------------------------------


def facts(edges: np.ndarray, nodes: int, labels: np.ndarray | None = None) -> dict[str, float]:
    """Undirected edges, nodes without any, and the share of edges inside a class."""
    half = sp.triu(symmetric(edges, nodes), 1).tocoo()
    touched = np.zeros(nodes, bool)
    touched[half.row] = touched[half.col] = True
    found = {"undirected edges": float(half.nnz), "isolated nodes": float(nodes - touched.sum())}
    if labels is not None and half.nnz:
        found["homophily"] = float((labels[half.row] == labels[half.col]).mean())
    return found


def add_wrong_edges(edges: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The edges and `share` times as many undirected ones between random nodes of different classes, both ways.

    Raises:
        ValueError: fewer pairs of different classes are free than asked for.
    """
    nodes = len(labels)
    upper = sp.triu(symmetric(edges, nodes), 1).tocoo()
    wanted = round(share * upper.nnz)
    taken = set((upper.row.astype(np.int64) * nodes + upper.col).tolist())
    sizes = np.unique(labels, return_counts=True)[1]
    free = (nodes**2 - (sizes.astype(np.int64) ** 2).sum()) // 2 - int((labels[upper.row] != labels[upper.col]).sum())
    if wanted > free:
        raise ValueError(f"wrong edges: expected at most {free} free pairs of nodes of different classes, asked for {wanted}")
    random, new = np.random.default_rng(seed), []
    while len(new) < wanted:
        for i, j in np.sort(random.integers(nodes, size=(wanted, 2)), axis=1):
            key = int(i) * nodes + int(j)
            if len(new) < wanted and labels[i] != labels[j] and key not in taken:
                taken.add(key)
                new.append((i, j))
    added = np.array(new, dtype=np.int64).reshape(-1, 2)
    return np.concatenate([edges, added, added[:, ::-1]])


def shuffle_nodes(edges: np.ndarray, nodes: int, seed: int) -> np.ndarray:
    """The same graph on shuffled nodes: it no longer fits the features. A control."""
    return np.random.default_rng(seed).permutation(nodes)[np.asarray(edges)]
