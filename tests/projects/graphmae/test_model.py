"""Layers and model: the two paths agree, and each rule of the method that is easy to get wrong."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from projects.graphmae.layers import BatchNormOverProcesses, GATLayer, Graph, PReLU, keep_mask, prepare
from projects.graphmae.model import Features, GraphMAE, check_features, draw_masks, map_sparse_rows, readout, sce
from projects.graphmae.molecule import Bonds, MoleculeGraphMAE, draw_masked_atoms


def directed(nodes: int = 30, edges: int = 90, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return prepare(torch.randint(0, nodes, (2, edges), generator=generator).unique(dim=1), nodes)


def small(**settings: Any) -> GraphMAE:
    torch.manual_seed(0)
    return GraphMAE(**({"in_dim": 70, "hidden": 8, "heads": 2, "in_drop": 0.0, "attn_drop": 0.0, "replace_rate": 0.2} | settings)).double()


def words(nodes: int = 30, dim: int = 70) -> Tensor:
    x = (torch.rand(nodes, dim, generator=torch.Generator().manual_seed(1)) < 0.08).double()
    return x / x.sum(1, keepdim=True).clamp(min=1)


FAMILIES = [
    (e, d)
    for e, d in product(("gat", "dotgat", "gin", "gcn"), ("gat", "dotgat", "gin", "gcn", "mlp", "linear"))
    if e == d or e == "gat" or d == "gat"
]
SWITCHES: list[dict[str, Any]] = [
    {"norm": "layernorm", "residual": True, "concat_hidden": True, "layers": 3},
    {"norm": "batchnorm", "residual": True},
    {"remask": False, "activation": "gelu"},
    {"mask": False, "loss": "mse"},
    {"layers": 1, "activation": "elu"},
    {"drop_edge_rate": 0.4},
]


@pytest.mark.parametrize(
    "settings",
    [{"encoder": e, "decoder": d} for e, d in FAMILIES]
    + [{"encoder": f, "decoder": f} | s for f in ("gat", "dotgat", "gin", "gcn") for s in SWITCHES],
    ids=str,
)
def test_paths_agree_in_float64(settings: dict[str, Any]) -> None:
    model, x, edges = small(**settings), words(), directed()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # the token starts at zero, where its own gradient is easily right
        model.enc_mask_token.normal_(generator=torch.Generator().manual_seed(2))
    gradients = []
    for path, given in (("plain", x), ("efficient", x), ("efficient", Features(x))):
        model.zero_grad()
        out = model(given, edges, generator=torch.Generator().manual_seed(3), path=path)
        out.loss.backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            | {"loss": out.loss.detach(), "prediction": out.prediction.detach()}
        )
    assert isinstance(given, Features)
    assert given.sparse is not None
    plain = gradients[0]
    for fast in gradients[1:]:
        assert fast.keys() == plain.keys()
        for name, value in plain.items():
            assert float((fast[name] - value).norm()) <= 1e-12 * float(value.norm()) + 1e-14, name


def test_embedding_of_both_paths_agrees_without_masks_or_dropout() -> None:
    model, x, edges = small(in_drop=0.5, attn_drop=0.5, drop_edge_rate=0.5).eval(), words(), directed()
    with torch.no_grad():
        torch.testing.assert_close(model.embed(Features(x), edges), model.embed(x, edges, path="plain"), rtol=0, atol=1e-14)


def test_sparse_input_drops_stored_values_and_token_entries_at_the_given_rate() -> None:
    model, _edges = small(in_drop=0.5, hidden=64, replace_rate=0.0), directed(400, 400)
    x = words(400)
    with torch.no_grad():
        model.enc_mask_token.fill_(1.0)
        model.encoder.layers_[0].fc.weight.fill_(1.0)
    features = Features(x)
    torch.manual_seed(0)
    source = torch.where(torch.arange(400) % 2 == 0, -1, torch.arange(400))
    with torch.no_grad():
        mapped = map_sparse_rows(features, model.encoder.layers_[0].input_weight, source, model.enc_mask_token, 0.5, True)
    assert abs(float(mapped[::2].mean()) - 70) < 1.5  # 70 entries of 1, half dropped, the rest doubled
    assert abs(float(mapped[1::2].mean()) - float(x[1::2].sum(1).mean())) < 0.15
    assert float(mapped[::2].std()) > 5  # every node drops its own entries


# -- masks


def test_counts_truncate_and_one_masked_node_can_be_left_as_it_is() -> None:
    masks = draw_masks(2708, 0.5, 0.05, generator=torch.Generator().manual_seed(0))
    assert [len(part) for part in (masks.mask_nodes, masks.token_nodes, masks.noise_nodes, masks.noise_source_nodes)] == [
        1354,
        1286,
        67,
        67,
    ]
    everything = torch.cat([masks.token_nodes, masks.noise_nodes])
    assert len(everything.unique()) == 1353
    assert torch.isin(everything, masks.mask_nodes).all()


def test_too_few_masked_nodes_to_replace_any_replaces_none() -> None:
    masks = draw_masks(12, 0.5, 0.1, generator=torch.Generator().manual_seed(0))
    assert (len(masks.mask_nodes), len(masks.token_nodes), len(masks.noise_nodes)) == (6, 5, 0)


def test_masks_depend_on_the_generator_alone() -> None:
    first, again, other = (draw_masks(50, 0.5, 0.1, generator=torch.Generator().manual_seed(s)).mask_nodes for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unmasked_variant_reconstructs_every_node_and_changes_no_feature() -> None:
    out = small(mask=False)(words(), directed(), path="plain")
    assert len(out.mask_nodes) == 30
    assert torch.equal(out.trace.masked_x, words())


def test_loss_is_over_unchanged_masked_nodes_too_and_they_are_remasked() -> None:
    model, x, edges = small(replace_rate=0.0), words(), directed()
    masked = torch.arange(10)
    out = model(
        x, edges, mask_nodes=masked, token_nodes=masked[:5], noise_nodes=masked[5:6], noise_source_nodes=torch.tensor([29]), path="plain"
    )
    assert torch.equal(out.trace.masked_x[6:10], x[6:10])  # neither token nor noise
    torch.testing.assert_close(out.loss, sce(out.trace.reconstruction[:10], x[:10], 3.0))
    alone = Graph.from_edges(edges, 30)
    blind = model.decoder.layers_[0](alone, out.trace.code.masked_fill((torch.arange(30) < 10)[:, None], 0), "plain")
    torch.testing.assert_close(blind, out.trace.reconstruction)


@pytest.mark.parametrize("atoms", [1, 2, 3, 4, 8, 23])
def test_molecules_hide_a_truncated_share_plus_one_of_their_own_atoms(atoms: int) -> None:
    molecule_of = torch.tensor([0] * 7 + [1] * atoms)
    hidden = draw_masked_atoms(molecule_of, 0.25, torch.Generator().manual_seed(0))
    assert torch.bincount(molecule_of[hidden]).tolist() == [2, min(int(atoms * 0.25 + 1), atoms)]
    assert hidden.tolist() == sorted(set(hidden.tolist()))


# -- layers


def test_prelu_has_one_slope_a_layer_and_torchs_gradients() -> None:
    model = small(layers=3)
    slopes = [layer.activation.weight for layer in model.encoder.layers_]
    assert len({id(s) for s in slopes}) == 3
    assert all(s.tolist() == [0.25] for s in slopes)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PReLU().double(), (x,))


def test_initialisation_is_xavier_normal_with_gain_root_two() -> None:
    torch.manual_seed(0)
    layer = GATLayer(400, 512, 4, feat_drop=0, attn_drop=0, negative_slope=0.2, residual=False, norm=None, act="prelu")
    assert float(layer.fc.weight.std()) == pytest.approx(math.sqrt(2) * math.sqrt(2 / (400 + 512)), rel=0.01)
    assert float(layer.attn_l.std()) == pytest.approx(math.sqrt(2) * math.sqrt(2 / (512 + 128)), rel=0.1)
    assert not layer.bias.any()
    assert not GraphMAE(10, hidden=8, heads=2).enc_mask_token.any()


def test_encoder_ends_with_its_activation_and_the_decoder_does_not() -> None:
    model = small(activation="relu")
    out = model(words(), directed(), path="plain")
    assert float(out.trace.hidden[-1].min()) == 0
    assert float(out.trace.reconstruction.min()) < 0


def test_prepare_leaves_one_self_loop_and_dropping_edges_adds_one_more() -> None:
    edges = prepare(torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 2, 0]]), 3)
    loops = edges[0] == edges[1]
    assert int(loops.sum()) == 3
    graph = Graph.from_edges(edges, 3)
    all_kept = graph.with_edges(torch.ones(len(graph.source), dtype=torch.bool))
    assert torch.bincount(all_kept.target[all_kept.source == all_kept.target]).tolist() == [2, 2, 2]
    none_kept = graph.with_edges(torch.zeros(len(graph.source), dtype=torch.bool))
    assert none_kept.source.tolist() == none_kept.target.tolist() == [0, 1, 2]


def test_dropped_edges_reach_the_encoder_only() -> None:
    model, x, edges = small(replace_rate=0.0), words(), directed()
    kept, masked = torch.arange(0, edges.shape[1], 2), torch.arange(10)
    out = model(x, edges, mask_nodes=masked, kept_edges=kept, path="plain")
    whole = Graph.from_edges(edges, 30)
    code = out.trace.code.masked_fill((torch.arange(30) < 10)[:, None], 0)
    torch.testing.assert_close(model.decoder.layers_[0](whole, code, "plain"), out.trace.reconstruction)


def test_restricted_graph_keeps_its_transpose() -> None:
    graph = Graph.from_edges(directed(), 30)
    part = graph.into(torch.tensor([2, 5, 17]))
    order, start, column = part.transposed
    fresh = Graph(part.source, part.target, part.start, 30).transposed
    assert all(torch.equal(a, b) for a, b in zip((order, start, column), fresh, strict=True))


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_dropout_mask_has_its_rate_and_mean_one(p: float) -> None:
    torch.manual_seed(0)
    mask = keep_mask((1001, 999), p, torch.device("cpu"), torch.float32)
    assert float((mask == 0).float().mean()) == pytest.approx(p, abs=2e-3)
    assert float(mask.mean()) == pytest.approx(1, abs=3e-3)


def test_mixed_precision_keeps_sparse_products_in_full_precision() -> None:
    model, x, edges = small().float(), words().float(), directed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, edges, generator=torch.Generator().manual_seed(0))
        plain = model(x, edges, generator=torch.Generator().manual_seed(0), path="plain")
    assert float(out.loss) == pytest.approx(float(plain.loss), rel=0.03)
    out.loss.backward()


def test_readouts() -> None:
    nodes, graph_of = torch.tensor([[1.0, -1], [3, -5], [2, 2]]), torch.tensor([0, 0, 1])
    assert readout(nodes, graph_of, 2, "mean").tolist() == [[2, -3], [2, 2]]
    assert readout(nodes, graph_of, 2, "max").tolist() == [[3, -1], [2, 2]]
    assert readout(nodes, graph_of, 2, "sum").tolist() == [[4, -6], [2, 2]]


def test_zero_rows_add_one_to_the_loss_and_gamma_makes_easy_rows_small() -> None:
    p, t = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[0.0, 0], [1, 1]])
    assert float(sce(p, t, 3)) == pytest.approx(0.5)
    assert float(sce(torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 1]]), 3)) == pytest.approx((1 - math.sqrt(0.5)) ** 3)


# -- molecules


def test_molecule_paths_agree_and_the_input_is_not_changed() -> None:
    torch.manual_seed(0)
    edges = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
    bonds = Bonds.of(edges, torch.tensor([[0, 0], [0, 0], [3, 1], [3, 2], [1, 0], [1, 0]]), 5)
    x, molecule_of = torch.tensor([[5, 0], [6, 1], [7, 0], [5, 2], [8, 0]]), torch.tensor([0, 0, 0, 1, 1])
    for jk in ("last", "concat", "max", "sum"):
        model = MoleculeGraphMAE(2, 6, jk=jk).double()
        grads = []
        for path in ("plain", "efficient"):
            model.zero_grad()
            model(x, bonds, molecule_of, masked_atoms=torch.tensor([1, 3]), path=path).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    assert x[1].tolist() == [6, 1]
    assert float(MoleculeGraphMAE(2, 6, loss="ce")(x, bonds, molecule_of).loss) > 0


# -- several processes


def _halves(rank: int, halves: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(10, 3, dtype=torch.float64)
    norm = BatchNormOverProcesses(3).double()
    mine = x[:4] if rank == 0 else x[4:]
    (norm(mine).square() * torch.arange(3)).sum().backward()
    grad = norm.weight.grad.clone()
    torch.distributed.all_reduce(grad)
    return grad, norm.running_var


def test_batch_norm_over_two_processes_is_that_of_one(two_processes: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 3, dtype=torch.float64)
    norm = torch.nn.BatchNorm1d(3).double()
    (norm(x).square() * torch.arange(3)).sum().backward()
    for grad, variance in two_processes(_halves, True):
        torch.testing.assert_close(grad, norm.weight.grad)
        torch.testing.assert_close(variance, norm.running_var)


# -- bad input


def given(**sets: list[int]) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in sets.items()}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (given(mask_nodes=[1, 1, 2]), "mask_nodes: expected each node once, found 1 repeated"),
        (given(mask_nodes=[1, 40]), "mask_nodes: expected node numbers 0 to 29"),
        (given(mask_nodes=[1, 2], token_nodes=[3]), "token_nodes: 1 of 1 are not in mask_nodes"),
        (given(mask_nodes=[1, 2], token_nodes=[1, 2], noise_nodes=[2], noise_source_nodes=[0]), "found 1 nodes in both"),
        (given(mask_nodes=[1, 2], token_nodes=[1], noise_nodes=[2], noise_source_nodes=[0, 3]), "found 1 and 2"),
        (given(mask_nodes=[1, 2], noise_nodes=[2], noise_source_nodes=[0]), "without token_nodes"),
        (given(mask_nodes=list(range(30))), "30 of 30 nodes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_index_sets_that_cannot_be_are_named(sets: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(words(), directed(), **sets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 9}, "hidden=9: expected a multiple of heads=2"),
        ({"gamma": 0.5}, "gamma=0.5"),
        ({"norm": "graphnorm"}, "norm='graphnorm': expected one of"),
        ({"activation": "swish"}, "activation='swish': expected one of"),
        ({"encoder": "sage"}, "'sage': expected one of"),
        ({"decoder": "sage"}, "decoder='sage': expected one of"),
        ({"mask_rate": 1.0}, "mask_rate=1.0"),
        ({"replace_rate": 1.0}, "replace_rate=1.0: expected 0 <= replace_rate < 1"),
        ({"decoder_heads": 2}, "decoder_heads=2: expected 1"),
        ({"loss": "l1"}, "loss='l1'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_gin_takes_any_width_whatever_the_heads() -> None:
    assert GraphMAE(5, encoder="gin", decoder="gin", hidden=9, heads=4)(torch.rand(6, 5), directed(6, 10)).loss.isfinite()


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (torch.tensor([[0, 1, 2], [1, 9, 0]]), "found edge 1: 1 -> 9"),
        (torch.tensor([[0, 1, -1], [1, 0, 0]]), "found edge 2: -1 -> 0"),
        (torch.tensor([[0.0], [1.0]]), "expected integers"),
        (torch.tensor([0, 1]), "expected integers"),
        (torch.tensor([[0, 1], [1, 1]]), "2 of 3 nodes have no incoming edge; add self-loops"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_edges_that_cannot_be_are_named(edges: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph.from_edges(edges, 3)


def test_features_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"1 columns and 2 rows"):
        check_features(torch.tensor([[1.0, torch.nan], [0, torch.inf]]))
    with pytest.raises(ValueError, match=r"all 2 rows are zero"):
        check_features(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected floating point"):
        check_features(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected floating point \(N, 70\), found \(30, 5\)"):
        small()(torch.rand(30, 5), directed())
    with pytest.raises(ValueError, match=r"mask_rate=0.01 masks 0 of 30 nodes"):
        small(mask_rate=0.01)(words(), directed())
    with pytest.raises(ValueError, match=r"expected mean, max or sum"):
        readout(torch.rand(2, 2), torch.tensor([0, 1]), 2, "median")


def test_bonds_outside_the_tables_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected bond type 0 to 5, found 6 to 6"):
        Bonds.of(torch.tensor([[0], [1]]), torch.tensor([[6, 0]]), 2)
    with pytest.raises(ValueError, match=r"edge_attr: expected \(1, 2\)"):
        Bonds.of(torch.tensor([[0], [1]]), torch.tensor([[0, 0], [0, 0]]), 2)
