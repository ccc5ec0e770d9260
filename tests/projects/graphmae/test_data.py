"""Readers on small files in the real formats, which the tests write; what they refuse; batches cut out of joined graphs."""

from __future__ import annotations

import gzip
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from projects.graphmae import data, molecules
from projects.graphmae.layers import Graph, prepare
from projects.graphmae.model import Features


def write_planetoid(folder: Path, name: str = "cora") -> None:
    """530 nodes on a ring, 5 words, 2 classes; 20 for training, the next 500 for validation, the last 10 for testing in falling order."""
    rng = np.random.default_rng(0)
    x = (rng.random((530, 5)) < 0.5).astype(np.float32)
    x[:, 0], x[3] = 1, 0  # row 3 is zero
    y = np.eye(2, dtype=np.int32)[np.arange(530) % 2]
    folder.mkdir(parents=True)
    late = np.arange(529, 519, -1)
    parts = {
        "x": sp.csr_matrix(x[:20]),
        "y": y[:20],
        "allx": sp.csr_matrix(x[:520]),
        "ally": y[:520],
        "tx": sp.csr_matrix(x[late]),
        "ty": y[late],
    }
    parts["graph"] = {i: [(i + 1) % 530, i, (i - 1) % 530] for i in range(530)}
    for part, content in parts.items():
        (folder / f"ind.{name}.{part}").write_bytes(pickle.dumps(content, protocol=2))
    (folder / f"ind.{name}.test.index").write_text("".join(f"{i}\n" for i in late))


def test_planetoid_rows_sum_to_one_and_loops_are_single(tmp_path: Path) -> None:
    write_planetoid(tmp_path / "planetoid/Cora/raw")
    with pytest.warns(UserWarning, match=r"Cora: 1 rows of features are zero"):
        task = data.planetoid("cora", str(tmp_path), str(tmp_path / "cache"))
    x = task.pretrain[0].x.dense
    assert x.shape == (530, 5)
    torch.testing.assert_close(x.sum(1), (torch.arange(530) != 3).float())
    assert [len(part[0].nodes) for part in (task.train, task.val, task.test)] == [20, 500, 10]
    assert task.test[0].labels.tolist() == [0, 1] * 5
    assert torch.equal(task.pretrain[0].graph.in_degree, torch.full((530,), 3))
    assert not list((tmp_path / "planetoid").rglob("processed"))


def write_tu(
    folder: Path,
    name: str = "MUTAG",
    *,
    edges: str = "1, 2\n2, 1\n1, 2\n2, 3\n3, 2\n4, 5\n5, 4\n4, 4\n",
    labels: str | None = "0\n2\n0\n1\n1\n",
) -> Path:
    folder = folder / "tu" / name / "raw"
    folder.mkdir(parents=True)
    (folder / f"{name}_A.txt").write_text(edges)
    (folder / f"{name}_graph_indicator.txt").write_text("1\n1\n1\n2\n2\n")
    (folder / f"{name}_graph_labels.txt").write_text("-1\n1\n")
    if labels is not None:
        (folder / f"{name}_node_labels.txt").write_text(labels)
    return folder


def test_tu_labels_become_columns_and_doubled_edges_are_merged_with_a_warning(tmp_path: Path) -> None:
    write_tu(tmp_path)
    with pytest.warns(UserWarning, match=r"MUTAG: 1 edges are written more than once; merged"):
        graphs = data.tu("mutag", str(tmp_path), str(tmp_path / "cache"))
    whole = graphs.batch(torch.arange(2))
    assert graphs.in_dim == 3
    assert whole.x.argmax(1).tolist() == [0, 2, 0, 1, 1]
    assert whole.labels.tolist() == [0, 1]
    assert whole.graph.in_degree.tolist() == [2, 3, 2, 2, 2]  # with one self-loop each


def test_tu_without_labels_takes_degrees_before_self_loops(tmp_path: Path) -> None:
    write_tu(tmp_path, labels=None, edges="1, 2\n2, 1\n2, 3\n3, 2\n4, 5\n5, 4\n4, 4\n")
    graphs = data.tu("mutag", str(tmp_path), str(tmp_path / "cache"))
    assert graphs.in_dim == 3
    assert graphs.kinds.tolist() == [1, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda raw: (raw / "MUTAG_A.txt").unlink(), FileNotFoundError, r"MUTAG, TU format: expected .*MUTAG_A.txt.*download"),
        (
            lambda raw: (raw / "MUTAG_graph_indicator.txt").write_text("1\n1\n3\n3\n3\n"),
            ValueError,
            "rising without gaps; found a step at line 3",
        ),
        (lambda raw: (raw / "MUTAG_node_labels.txt").write_text("0\n1\n"), ValueError, r"expected a label for each of 5 nodes, found 2"),
        (lambda raw: (raw / "MUTAG_A.txt").write_text("1, 2\n2, 9\n"), ValueError, r"line 2 names a node outside 1 to 5"),
        (lambda raw: (raw / "MUTAG_A.txt").write_text("1, 2\n2, wrong\n"), ValueError, r"its files cannot be read .* delete .*MUTAG-"),
    ],
    ids=["missing", "gap", "labels", "node", "text"],
)
def test_tu_files_that_cannot_be_are_named(tmp_path: Path, change: Callable[[Path], object], error: type[Exception], message: str) -> None:
    change(write_tu(tmp_path))
    with pytest.raises(error, match=message):
        data.tu("mutag", str(tmp_path), str(tmp_path / "cache"))


def test_a_changed_file_is_read_anew_not_from_the_cache(tmp_path: Path) -> None:
    raw = write_tu(tmp_path, edges="1, 2\n2, 1\n4, 5\n5, 4\n")
    first = data.tu("mutag", str(tmp_path), str(tmp_path / "cache"))
    (raw / "MUTAG_node_labels.txt").write_text("0\n0\n0\n0\n1\n")
    second = data.tu("mutag", str(tmp_path), str(tmp_path / "cache"))
    assert first.in_dim == 3
    assert second.in_dim == 2
    assert first.sha256 != second.sha256


def test_arxiv_is_made_bidirected_and_standardised(tmp_path: Path) -> None:
    folder = tmp_path / "ogbn_arxiv"
    files = {"raw/edge": "0,1\n1,0\n2,3\n3,3\n", "raw/node-feat": "1,5\n2,5\n3,5\n6,5\n", "raw/node-label": "0\n1\n1\n0\n"}
    files |= {"split/time/train": "0\n1\n", "split/time/valid": "2\n", "split/time/test": "3\n"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
    task = data.arxiv(str(tmp_path))
    x = task.pretrain[0].x.dense
    torch.testing.assert_close(x[:, 0], (torch.tensor([1.0, 2, 3, 6]) - 3) / (14 / 4) ** 0.5)
    assert not x[:, 1].any()  # a constant column
    graph = task.pretrain[0].graph
    assert sorted(zip(graph.source.tolist(), graph.target.tolist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 2),
        (2, 3),
        (3, 2),
        (3, 3),
    ]
    (folder / "split/time/test.csv.gz").write_bytes(gzip.compress(b"2\n"))
    with pytest.raises(ValueError, match=r"the test split shares 1 nodes"):
        data.arxiv(str(tmp_path))


def test_ppi_takes_two_graphs_a_step_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, graphs in (("train", 3), ("valid", 2), ("test", 2)):
        sizes = [3, 4, 2][:graphs]
        links = [
            {"source": first + i, "target": first + i + 1}
            for first, n in zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True)
            for i in range(n - 1)
        ]
        (tmp_path / "ppi").mkdir(exist_ok=True)
        text = {"directed": True, "multigraph": False, "graph": {}, "nodes": [{"id": i} for i in range(sum(sizes))], "links": links}
        (tmp_path / f"ppi/{part}_graph.json").write_text(json.dumps(text))
        np.save(tmp_path / f"ppi/{part}_feats.npy", rng.random((sum(sizes), 5)))
        np.save(tmp_path / f"ppi/{part}_labels.npy", rng.integers(0, 2, (sum(sizes), 4)))
        np.save(tmp_path / f"ppi/{part}_graph_id.npy", np.repeat(np.arange(graphs) + 1, sizes))
    task = data.ppi(str(tmp_path), str(tmp_path / "cache"))
    assert task.multi_label
    assert (task.classes, task.in_dim) == (4, 5)
    assert [len(batch.x.dense) for batch in task.pretrain] == [7, 2]
    assert [len(part.labels) for part in task.test] == [7]
    assert task.pretrain[1].graph.in_degree.min() == 1


def test_reddit_pre_trains_on_the_training_subgraph(tmp_path: Path) -> None:
    (tmp_path / "reddit").mkdir()
    x, y, kind = np.arange(12.0, dtype=np.float32).reshape(6, 2), np.array([0, 1, 0, 1, 0, 1]), np.array([1, 1, 1, 2, 3, 3])
    np.savez(tmp_path / "reddit/reddit_data.npz", feature=x, label=y, node_types=kind)
    edges = np.array([[0, 1, 1, 2, 4, 5], [1, 0, 3, 4, 2, 0]])
    sp.save_npz(tmp_path / "reddit/reddit_graph.npz", sp.coo_matrix((np.ones(6), edges), shape=(6, 6)))
    task = data.reddit(str(tmp_path), str(tmp_path / "cache"))
    assert len(task.pretrain[0].x.dense) == 3
    assert len(task.pretrain[0].graph.source) == 2 + 3
    assert task.train[0].batch is task.pretrain[0]
    assert len(task.test[0].batch.x.dense) == 6
    torch.testing.assert_close(task.test[0].batch.x.dense.mean(0), torch.zeros(2), atol=1e-6, rtol=0)


def test_missing_data_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cora", "ogbn-arxiv", "ppi", "reddit", "mutag"):
        with pytest.raises(FileNotFoundError, match=r"download"):
            data.load(name, data_root=str(tmp_path))
    monkeypatch.delenv("CONTRAMASK_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"CONTRAMASK_DATA"):
        data.load("cora")
    with pytest.raises(ValueError, match=r"data='corra': expected one of"):
        data.load("corra")


def test_splits_and_labels_are_checked() -> None:
    x, edges, labels = torch.rand(4, 3), torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1, 5, 0])
    parts = {"train": torch.tensor([0]), "val": torch.tensor([1]), "test": torch.tensor([2])}
    with pytest.raises(ValueError, match=r"expected labels 0 to 1, found 5 to 5 in test"):
        data.node_task("t", x, edges, labels, parts, "", classes=2)
    with pytest.raises(ValueError, match=r"the val split is empty"):
        data.node_task("t", x, edges, labels, parts | {"val": torch.tensor([], dtype=torch.int64)}, "")
    with pytest.raises(ValueError, match=r"found edge 0: 0 -> 7"):
        data.node_task("t", x, torch.tensor([[0], [7]]), labels.clamp(max=1), parts, "")


# -- batches and the generated sets


def test_a_batch_cut_out_is_the_graph_sorted_afresh() -> None:
    graphs = data.shapes(graphs=9)
    numbers = torch.tensor([7, 2, 5])
    batch = graphs.batch(numbers)
    fresh = Graph.from_edges(torch.stack([batch.graph.source, batch.graph.target]), len(batch.x))
    for a, b in (
        (batch.graph.source, fresh.source),
        (batch.graph.start, fresh.start),
        *zip(batch.graph.transposed, fresh.transposed, strict=True),
    ):
        assert torch.equal(a, b)
    assert (batch.graph_of[batch.graph.source] == batch.graph_of[batch.graph.target]).all()
    assert batch.labels.tolist() == [1, 2, 2]


def test_batches_cover_every_graph_once_and_are_shuffled_by_seed_and_epoch() -> None:
    batches = data.Batches(data.shapes(graphs=10), 4, seed=3)
    first = batches.order.clone()
    assert [len(batches[i].labels) for i in range(len(batches))] == [4, 4, 2]
    batches.set_epoch(1)
    assert not torch.equal(first, batches.order)
    assert sorted(batches.order.tolist()) == list(range(10))
    assert torch.equal(data.Batches(data.shapes(graphs=10), 4, seed=3).order, first)


def test_neighbour_batches_keep_all_edges_between_sampled_nodes() -> None:
    edges = prepare(torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]]), 6)
    whole = data.NodeBatch(Features(torch.eye(6)), Graph.from_edges(edges, 6))
    torch.manual_seed(0)
    sample = data.NeighbourBatches(whole, 2, [3, 3], seed=0)[0]
    nodes = sample.x.dense.argmax(1)
    inside = torch.isin(edges, nodes).all(0)
    assert len(sample.graph.source) == int(inside.sum())
    assert 2 <= len(nodes) <= 6
    assert sum(len(data.NeighbourBatches(whole, 4, [1], 0).order[i * 4 : (i + 1) * 4]) for i in range(2)) == 6


def test_topic_graph_is_what_it_says() -> None:
    task = data.topic_graph(0)
    again = data.topic_graph(0)
    batch = task.pretrain[0]
    assert torch.equal(batch.x.dense, again.pretrain[0].x.dense)
    assert batch.x.dense.shape == (1200, 300)
    assert [len(part[0].nodes) for part in (task.train, task.val, task.test)] == [120, 200, 880]
    assert torch.bincount(task.train[0].labels).tolist() == [20] * 6
    labels = torch.full((1200,), -1)
    for part in (task.train[0], task.val[0], task.test[0]):
        labels[part.nodes] = part.labels
    real = batch.graph.source != batch.graph.target
    assert int(real.sum()) / 2 == pytest.approx(2370, rel=0.05)
    same = labels[batch.graph.source[real]] == labels[batch.graph.target[real]]
    assert float(same.float().mean()) == pytest.approx(0.66, abs=0.03)


def test_drawn_molecules_need_no_rdkit_and_have_both_labels() -> None:
    drawn = molecules.load("drawn")
    parts = molecules.split(drawn)
    for part in parts.values():
        assert set(drawn.labels[part].flatten().tolist()) == {1.0, -1.0}
    batch = drawn.batch(torch.tensor([3, 1]))
    assert batch.bonds.counts[:, 4].tolist() == [1.0] * len(batch.x)  # one self-loop each
    assert torch.equal(batch.bonds.counts[:, :6].sum(1).long(), batch.bonds.graph.in_degree)


# -- molecules from files


def write_csv(root: Path, name: str, text: str) -> None:
    path = root / "moleculenet" / name / "raw" / molecules.SETS[name].file
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_labels_are_one_minus_one_or_missing_and_unreadable_rows_are_skipped_with_a_count(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    rows = ["1,,0" + ",0" * 9 + ",T1,CCO", "0,1,0" + ",0" * 9 + ",T2,C1CC", "0,0,0" + ",0" * 9 + ",T3,*C", ",,1" + ",1" * 9 + ",T4,C"]
    write_csv(tmp_path, "tox21", ",".join([*molecules.TOX21, "mol_id", "smiles"]) + "\n" + "\n".join(rows) + "\n")
    with pytest.warns(
        UserWarning, match=r"tox21: 2 of 4 molecules skipped \(row 2: 'C1CC': RDKit cannot read it; row 3: .*atomic number 0"
    ):
        found = molecules.moleculenet("tox21", str(tmp_path), str(tmp_path / "cache"))
    assert found.labels[:, :3].tolist() == [[1, 0, -1], [0, 0, 1]]
    assert found.smiles == ["CCO", "C"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(molecules.moleculenet("tox21", str(tmp_path), str(tmp_path / "cache"))) == 2  # from the cache
    with pytest.raises(ValueError, match=r"tox21: row 2: 'C1CC': RDKit cannot read it"):
        molecules.moleculenet("tox21", str(tmp_path), str(tmp_path / "other"), "stop")


def test_molecule_files_that_cannot_be_are_named(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    write_csv(tmp_path, "bace", "smiles,Class\nC,1\n")
    with pytest.raises(ValueError, match=r"expected a column 'mol', found"):
        molecules.moleculenet("bace", str(tmp_path))
    write_csv(tmp_path, "clintox", "smiles,FDA_APPROVED,CT_TOX\nC,1,2\n")
    with pytest.raises(ValueError, match=r"line 2 has label '2'; expected 0, 1 or nothing"):
        molecules.moleculenet("clintox", str(tmp_path))
    write_csv(tmp_path, "hiv", "smiles,activity\nC,1\n")
    with pytest.raises(ValueError, match=r"expected label columns"):
        molecules.moleculenet("hiv", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"download muv.csv"):
        molecules.load("muv", data_root=str(tmp_path))
    with pytest.raises(ValueError, match=r"bond 0 is DATIVE"):
        molecules.features("[NH3]->[Pt]")


def test_bbbp_splits_by_canonical_smiles_and_zinc_reads_compressed_files(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    write_csv(tmp_path, "bbbp", "num,name,p_np,smiles\n1,a,1,OCC\n2,b,0,C(O)C\n")
    found = molecules.moleculenet("bbbp", str(tmp_path), str(tmp_path / "cache"))
    assert found.smiles == ["CCO", "CCO"]
    (tmp_path / "zinc15").mkdir()
    (tmp_path / "zinc15/zinc_standard_agent.csv.gz").write_bytes(gzip.compress(b"smiles,zinc_id\nCCO,ZINC1\nc1ccccc1,ZINC2\n"))
    zinc = molecules.load("zinc15", data_root=str(tmp_path), cache=str(tmp_path / "cache"))
    assert len(zinc.batch(torch.tensor([1])).x) == 6
