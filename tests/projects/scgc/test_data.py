"""Readers of both layouts, the embedded default, the published sets, and input that is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.recipe import read as read_recipe
from projects.scgc import cluster, evaluate
from projects.scgc.cluster import Pretraining, Recipe
from projects.scgc.data import Blocks, Links, generate, load, read_edges
from projects.scgc.graph import check_edges, facts, knn_edges

X = np.array([[0.5, 1, 0], [0, 1, 0], [1, 1, 0], [0, 0, 2]], dtype=np.float32)
Y = np.array([1, 1, 2, 3])
RECIPES = Path(__file__).parents[3] / "projects" / "scgc" / "recipes"
EDGES = "0 1\r\n1 0\r\n2 1\r\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A set `own` in SDCN's text layout with a graph given and one of k = 3; returns the data root."""
    for folder in ("data", "graph"):
        (tmp_path / "sdcn" / folder).mkdir(parents=True)
    np.savetxt(tmp_path / "sdcn/data/own.txt", X)
    np.savetxt(tmp_path / "sdcn/data/own_label.txt", Y, fmt="%d")
    (tmp_path / "sdcn/graph/own_graph.txt").write_bytes(EDGES.encode())
    (tmp_path / "sdcn/graph/own3_graph.txt").write_text("3 0\n")
    return tmp_path


def get(root: Path, name: str = "own", **options: object) -> object:
    return load(name, data_root=root, cache=root / "cache", **options)  # type: ignore[arg-type]


def archive(root: Path, name: str = "own", **arrays: np.ndarray) -> Path:
    (root / "sdcn" / name).mkdir(parents=True, exist_ok=True)
    np.savez(root / "sdcn" / name / "data.npz", **arrays)
    return root


def test_text_layout_and_its_parsed_copy(text: Path) -> None:
    data = get(text)
    np.testing.assert_array_equal(data.x, X)
    assert data.y.tolist() == [0, 0, 1, 2]
    assert data.edges.tolist() == [[0, 1], [1, 0], [2, 1]]
    assert get(text, k=3).edges.tolist() == [[3, 0]]
    assert len(list((text / "cache").glob("own-*.npy"))) == 1
    np.savetxt(text / "sdcn/data/own.txt", 2 * X)  # another content, another copy
    np.testing.assert_array_equal(get(text).x, 2 * X)
    assert len(get(text, k=1, build="heat").edges) == 4
    assert get(text, k=5, build="none").edges.shape == (0, 2)  # features alone: a graph that is not there is not asked for


def test_archive_layout(tmp_path: Path) -> None:
    edges = np.array([[0, 1]], dtype=np.int32)
    archive(tmp_path, x=X, y=Y, edges=edges, edges_k3=edges[:, ::-1])
    assert get(tmp_path).edges.tolist() == [[0, 1]]
    assert get(tmp_path, k=3).edges.tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"a k-NN graph with k in \[3\]; found graph.k=5"):
        get(tmp_path, k=5)
    archive(tmp_path, "given", x=X, y=Y, edges=edges)
    with pytest.raises(ValueError, match=r"one graph, given, without k; found graph\.k=3"):
        get(tmp_path, "given", k=3)


def test_embedded_default_is_as_described() -> None:
    data = generate(Blocks(), Links(), seed=0)
    found = facts(data.edges, 600, data.y)
    assert (found["undirected edges"], len(data.edges)) == (1800, 3600)
    assert found["homophily"] == pytest.approx(0.88, abs=0.02)
    assert 60 <= found["isolated nodes"] <= 66  # a tenth, and whom no edge has drawn
    assert np.bincount(data.y).tolist() == [150] * 4
    assert data.x.sum(1).mean() == pytest.approx(20, abs=1)
    own = np.mean([data.x[i, 25 * c : 25 * c + 25].sum() for i, c in enumerate(data.y)])
    assert own / data.x.sum(1).mean() == pytest.approx(0.2 + 0.8 / 8, abs=0.02)
    other = generate(Blocks(), Links(inside=0.0), seed=0)
    assert (other.x == data.x).all()
    assert facts(other.edges, 600, other.y)["homophily"] == 0
    with pytest.raises(ValueError, match="at least 25 words and 10 nodes a class"):
        generate(Blocks(words=60), Links(), 0)
    with pytest.raises(ValueError, match="too many for 600 nodes"):
        generate(Blocks(), Links(edges=50_000), 0)


@pytest.mark.parametrize(
    ("name", "k", "ones", "edges", "alone"),
    [
        ("acm", None, 253_300, 13_128, 561),
        ("dblp", None, 48_810, 3_528, 1_466),
        ("cite", None, 105_165, 4_552, 48),
        ("usps", 3, None, 21_452, 0),
    ],
)
def test_published_sets(name: str, k: int | None, ones: int | None, edges: int, alone: int, shared_data: Path) -> None:
    data = load(name, data_root=shared_data, k=k)
    found = facts(data.edges, len(data.x), data.y)
    assert (found["undirected edges"], found["isolated nodes"]) == (edges, alone)
    assert ones is None or data.x.sum() == ones
    assert data.y.min() == 0


def test_built_neighbours_are_the_published_ones(shared_data: Path) -> None:
    """The heat k-NN graph of all 9,298 digits, without one difference."""
    data = load("usps", data_root=shared_data, k=3)
    built = knn_edges(data.x, 3)
    assert {tuple(pair) for pair in built.tolist()} == {tuple(pair) for pair in data.edges.tolist()}


# -- input that is wrong -------------------------------------------------------------------------------------------------


def test_sizes_that_differ(text: Path) -> None:
    np.savetxt(text / "sdcn/data/own_label.txt", Y[:3], fmt="%d")
    with pytest.raises(ValueError, match=r"expected as many labels as feature rows, found 3 labels and 4 rows \(.*own.txt.*own_label.txt"):
        get(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0,1", r"line 2: expected two whole numbers `i j`, found '0,1'; no commas"),
        ("0 1 0.5", "line 2: .*no weights"),
        ("7", "line 2: expected two"),
        ("a b", "line 2: expected two"),
    ],
)
def test_edge_lines(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "graph.txt").write_text(f"0 1\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_edges(tmp_path / "graph.txt")


def test_node_numbers(text: Path) -> None:
    (text / "sdcn/graph/own_graph.txt").write_text("1 4\n2 3\n")
    with pytest.raises(ValueError, match="expected node numbers 0 to 3 in the order of the feature rows, found 1 to 4"):
        get(text)
    with pytest.raises(ValueError, match=r"expected integers \(E, 2\)"):
        check_edges(np.zeros((3, 3), dtype=int), 4)


def test_missing_files(text: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"own5_graph\.txt, found own3_graph\.txt, own_graph\.txt; set graph\.k"):
        get(text, k=5)
    with pytest.raises(FileNotFoundError, match="acm, dblp and cite have one graph, without k"):
        get(text, k=5)
    with pytest.raises(FileNotFoundError, match=r"other, features: expected .*other.txt"):
        get(text, "other")
    empty = tmp_path / "empty"
    (empty / "sdcn").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="found neither"):
        get(empty)


@pytest.mark.parametrize("name", ["hhar", "reut"])
def test_sets_without_features(name: str, tmp_path: Path) -> None:
    archive(tmp_path, name, y=Y, edges_k3=np.array([[0, 1]]))
    with pytest.raises(FileNotFoundError, match=f"{name}: .*holds labels and graphs but no features; get .*sdcn/data/{name}.txt"):
        get(tmp_path, name, k=3)
    (tmp_path / "sdcn/data").mkdir()
    np.savetxt(tmp_path / f"sdcn/data/{name}.txt", X)
    with pytest.warns(UserWarning, match=f"{name}: the published set has . classes, these labels 3"):
        assert get(tmp_path, name, k=3).x.shape == (4, 3)
    assert len(list((tmp_path / "cache").glob(f"{name}-*.npy"))) == 1


def test_features_and_labels(tmp_path: Path) -> None:
    edges = np.array([[0, 1]])
    bad = X.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="expected finite numbers, found nan in row 2, column 1"):
        get(archive(tmp_path, x=bad, y=Y, edges=edges))
    with pytest.raises(ValueError, match="expected rows that differ, found 4 equal ones"):
        get(archive(tmp_path, x=np.ones((4, 3)), y=Y, edges=edges))
    with pytest.raises(ValueError, match=r"at least 2 classes, found \[2\]"):
        get(archive(tmp_path, x=X, y=np.full(4, 2), edges=edges))
    with pytest.warns(UserWarning, match=r"gaps, found \[0, 5\]; 2 classes"):
        assert get(archive(tmp_path, x=X, y=np.array([0, 5, 5, 0]), edges=edges)).classes == 2


def test_labels_in_text_are_whole_numbers(text: Path) -> None:
    (text / "sdcn/data/own_label.txt").write_text("0\n1\n1.5\n0\n")
    with pytest.raises(ValueError, match=r"one integer a line, found 1\.5"):
        get(text)


@pytest.mark.parametrize(
    "field",
    [{"order": 0}, {"tau": 0.0}, {"alpha": -1.0}, {"beta": -0.1}, {"nu": 0.0}, {"variant": "scgc_star", "alpha": 0.0, "beta": 0.0}],
    ids=str,
)
def test_recipes_name_the_value_that_is_out_of_range(field: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="|".join(field)):
        read_recipe(Recipe, **field)


# alpha, beta, R, tau, lr of SCGC and of SCGC*, and k: the commands of the reference's README
PUBLISHED = {
    "usps": ((1, 0.1, 4, 0.5, 1e-3), (4, 0.1, 4, 0.25, 1e-3), 3),
    "hhar": ((1, 10, 4, 2.25, 1e-3), (1, 10, 3, 2.25, 1e-3), 5),
    "reut": ((3, 0.1, 3, 1, 1e-3), (0.5, 0.1, 3, 0.25, 1e-3), 3),
    "acm": ((0.5, 0.1, 2, 0.25, 1e-3), (1, 0.1, 1, 0.25, 1e-3), None),
    "dblp": ((0.5, 0.1, 1, 0.25, 1e-3), (1, 0.1, 1, 0.25, 1e-3), None),
    "cite": ((1, 0.1, 1, 0.25, 1e-4), (1, 0.1, 1, 0.25, 1e-4), None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_configurations(name: str) -> None:
    scgc, star, k = PUBLISHED[name]
    for variant, suffix, want in (("scgc", "", scgc), ("scgc_star", "_star", star)):
        recipe = read_recipe(Recipe, RECIPES / f"{name}{suffix}.yaml")
        assert (recipe.name, recipe.data, recipe.variant, recipe.graph.k) == (f"{name}{suffix}", name, variant, k)
        assert (recipe.alpha, recipe.beta, recipe.order, recipe.tau, recipe.lr) == want
        assert (recipe.network.encoder, recipe.network.embedding, recipe.network.decoder) == ([500, 500, 2000], 10, [2000, 500, 500])
        assert (recipe.nu, recipe.restarts, recipe.training.epochs, recipe.batch_size, len(recipe.seeds)) == (1, 20, 200, None, 10)
        assert (recipe.pretrain.training.epochs, recipe.pretrain.batch_size, recipe.pretrain.lr) == (30, 256, 1e-3)
    assert read_recipe(Recipe, RECIPES / f"{name}_star.yaml").autoencoder == read_recipe(Recipe, RECIPES / f"{name}.yaml").autoencoder


@pytest.mark.parametrize(("suffix", "alpha"), [("", 0.5), ("_star", 1)])
def test_the_ordering_is_the_demo_on_more_draws(suffix: str, alpha: float) -> None:
    demo, longer = (read_recipe(Recipe, RECIPES / f"{name}{suffix}.yaml") for name in ("demo", "ordering"))
    assert replace(longer, name=demo.name, seeds=demo.seeds, compare=demo.compare) == demo
    assert (demo.blocks, demo.graph, demo.seeds, len(longer.seeds)) == (Blocks(), Links(), [0, 1, 2, 3], 10)
    assert (demo.alpha, demo.beta, demo.order, demo.tau, demo.lr, demo.training.epochs) == (alpha, 0.1, 1, 0.25, 3e-3, 200)


def test_graph_options() -> None:
    with pytest.raises(ValueError, match=r"graph.build=heat: expected graph.k"):
        Links(build="heat")
    with pytest.raises(ValueError, match=r"graph\.wrong=-1"):
        Links(wrong=-1)


def test_more_clusters_than_distinct_nodes(tmp_path: Path) -> None:
    x = np.repeat(X[:2], 6, axis=0)
    root = archive(tmp_path, x=x, y=np.arange(12) % 3, edges=np.array([[0, 1]]))
    quick = Pretraining(training=replace(Recipe().pretrain.training, epochs=1))
    recipe = Recipe(name="few", data="own", data_root=str(root), pretrain=quick, order=1, out=str(tmp_path / "runs"))
    with pytest.raises(ValueError, match="clusters=3: expected at most the 2 distinct embeddings of 12 nodes"):
        cluster.main(recipe)


def test_without_labels_assignments_are_kept_and_scores_are_not_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).random((40, 6)).astype(np.float32)
    root = archive(tmp_path, x=x, edges=np.array([[0, 1], [2, 3]]))
    short = replace(Recipe().training, epochs=2)
    recipe = Recipe(name="bare", data="own", data_root=str(root), pretrain=Pretraining(training=short), training=short, order=1, seeds=[0])
    recipe = replace(recipe, out=str(tmp_path / "runs"))
    with pytest.raises(ValueError, match="own has no labels to count; give the number of clusters"):
        cluster.main(recipe)
    assert evaluate.main(replace(recipe, clusters=3)) == {}
    labelled = replace(cluster.read(recipe), y=np.arange(40) % 2)
    with pytest.warns(UserWarning, match="clusters=3: own has 2 classes; 3 clusters are used"):
        assert len(cluster.build(replace(recipe, clusters=3), labelled).cluster_layer) == 3
    assert "metrics are skipped" in capsys.readouterr().out
    assert np.load(tmp_path / "runs/bare/seed-0/assignments.npy").shape == (2, 40)
    with pytest.raises(ValueError, match="wrong edges need labels"):
        cluster.read(replace(recipe, graph=Links(wrong=0.5)))
