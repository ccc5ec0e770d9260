"""SCGC against its reference: one runner a kind of case; the sparse forms run beside the dense ones and must agree."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from projects.scgc.contrast import Structure, contrast, cosine_without_self, dense
from projects.scgc.features import Features
from projects.scgc.graph import knn_edges, transition, weights
from projects.scgc.metrics import overwrite_empty, scores
from projects.scgc.model import SCGC, AutoEncoder, Output, objective, soft_assignment, target
from projects.scgc.pretrain import reconstruction_loss
from projects.scgc.weights import load_autoencoder, load_reference
from tests.parity import Case, Runner, cases, check, fill

METRICS = ("ACC", "NMI", "ARI", "F1")


def model_of(case: Case) -> SCGC:
    config = case.config
    decoder = config["decoder"][:-1] if config["decoder"] else None
    model = SCGC(config["n_input"], config["n_clusters"], config["encoder"], decoder, config["v"])
    load_reference(model, case.state)
    return model


def features_of(case: Case) -> Tensor:
    rule = case.raw["inputs"]["x"]
    x = case.inputs["x"]
    if isinstance(x, str):  # "3 * fill.normal('x', (41, 30))"
        factor, _, call = rule.rpartition("* ") if "*" in rule else ("1", "", rule)
        x = float(factor or 1) * torch.from_numpy(eval(call, {"fill": fill}))
    return x


def clustering(case: Case) -> dict[str, Tensor]:
    config, model = case.config, model_of(case)
    x = Features(features_of(case))
    edges = case.files["edges"].numpy()
    step = transition(edges, config["nodes"])
    matrix = weights(step, config["order"], config["cumulative"])
    structure = Structure.of(matrix)

    def forward(model: SCGC) -> tuple[object, Output]:
        code = model(x)
        settings = {name: config[name] for name in ("tau", "alpha", "beta")}
        return code, objective(code, structure, width=config["n_input"], **settings)

    code, out = forward(model)
    out.loss.backward()
    full = torch.from_numpy(matrix.toarray()).float()
    alone = contrast(code.z, structure, config["tau"]).per_row.mean() if config["alpha"] == 0 else out.contrast  # alpha 0 leaves it out
    torch.testing.assert_close(alone, dense(code.z, full, config["tau"]).per_row.mean(), rtol=1e-5, atol=1e-6)
    if model.ae.has_decoder:
        sparse = model(Features(x.matrix, sparse=True))
        torch.testing.assert_close(sparse.squared_error, code.squared_error, rtol=1e-5, atol=1e-5)
    named = dict(model.named_parameters())
    found = {
        "adj": torch.from_numpy(step.toarray()).float(),
        "weights": full,
        "z": code.z,
        "q": soft_assignment(code.z, model.cluster_layer, model.nu),
        "p": target(code.q),
        "similarity": cosine_without_self(code.z),
        "loss_kl": out.cluster[None],
        "loss_contrast": alone[None],
        "loss_total": out.loss[None],
        "grad_cluster_layer": model.cluster_layer.grad,
        "grad_norms": torch.stack([named[name].grad.norm() for name in case.raw["grad_names"]]),
    }
    if model.ae.has_decoder:
        found |= {"x_bar": model.ae.reconstruct(code.z), "loss_recon": out.reconstruction[None]}
    found |= {f"enc_h{number}": hidden for number, hidden in enumerate(model.ae.hidden_states(x), start=1)}
    found |= {f"grad.{name}": parameter.grad for name, parameter in named.items()}

    model = model_of(case)
    update, totals = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True), []
    for _ in range(config["steps"]):
        _, out = forward(model)
        update.zero_grad()
        out.loss.backward()
        update.step()
        totals.append(out.loss.detach())
    after = model(x)
    return found | {
        "trajectory_total": torch.stack(totals),
        "after_z": after.z,
        "after_q": after.q,
        "after_cluster_layer": model.cluster_layer,
    }


def pretrain(case: Case) -> dict[str, Tensor]:
    config = case.config
    model = AutoEncoder(config["n_input"], config["encoder"], config["decoder"][:-1])
    load_autoencoder(model, case.state)
    x = Features(features_of(case))
    name, _, lr = config["optimiser"].partition(" ")  # "Adam 1e-3"
    assert name == "Adam"
    update = torch.optim.Adam(model.parameters(), lr=float(lr), fused=True)
    batches, epochs = [], []
    for order in case.files["orders"]:
        for nodes in order.split(config["batch"]):
            loss = reconstruction_loss(model, x.rows(nodes))
            update.zero_grad()
            loss.backward()
            update.step()
            batches.append(loss.detach())
        with torch.no_grad():
            epochs.append(reconstruction_loss(model, x))
    return {"batch_losses": torch.stack(batches), "epoch_losses": torch.stack(epochs), "z": model.encode(x)}


def graphs(case: Case) -> dict[str, Tensor]:
    step = transition(case.files["edges"].numpy(), case.config["nodes"])
    found = {"adj": step}
    for order in case.config["orders"]:
        found |= {f"power_{order}": weights(step, order, False), f"cumulative_{order}": weights(step, order, True)}
    return {name: torch.from_numpy(matrix.toarray()) for name, matrix in found.items()}


def knn(case: Case) -> dict[str, Tensor]:
    """Neighbours as sets, for the nodes without a tie; the stored edges come back where the sets are equal."""
    found = knn_edges(case.files["x"].numpy(), case.config["topk"], case.config["method"])
    want, rows = case.expected["edges"].numpy(), case.files["rows"]
    for node in rows.tolist():
        assert set(found[found[:, 0] == node, 1]) == set(want[want[:, 0] == node, 1]), node
    return {"edges": case.expected["edges"], "rows": rows}


def metrics(case: Case) -> dict[str, Tensor]:
    found = {}
    for entry in case.config["sets"]:
        index = entry["index"]
        labels, clusters = (case.files[f"{name}_{index}"].numpy() for name in ("true", "pred"))
        result = scores(labels, clusters, "reference")
        found[f"scores_{index}"] = torch.tensor([result[name] for name in METRICS], dtype=torch.float64)
        found |= {f"{name}_{index}": case.files[f"{name}_{index}"] for name in ("true", "pred")}  # inputs that the case lists as outputs
        found[f"pred_after_{index}"] = torch.from_numpy(overwrite_empty(labels, clusters))
    return found


def expect_facts(case: Case) -> None:
    """The case keeps its figures under `facts`: make them what is expected, as `<data set>.<fact>`."""
    for name, about in case.raw.get("facts", {}).items():
        flat = {f"row7.{column}": value for column, value in about["row7"].items()} | about
        for key, value in flat.items():
            if isinstance(value, int | float):
                case.expected[f"{name}.{key}"] = torch.tensor(float(value), dtype=torch.float64)


def real_graphs(case: Case) -> dict[str, Tensor]:
    root = Path(os.environ.get("CONTRAMASK_DATA") or Path(__file__).parents[4] / "shared" / "data")
    if not (root / "sdcn").is_dir():
        pytest.skip("real data not found: set CONTRAMASK_DATA to its root")
    expect_facts(case)
    found: dict[str, float] = {}
    for name, about in case.raw["facts"].items():
        with np.load(root / "sdcn" / name / "data.npz", allow_pickle=False) as archive:  # hhar and reut have a graph but no features
            nodes, edges = len(archive["y"]), archive["edges" if about["k"] is None else f"edges_k{about['k']}"]
        step = transition(edges, nodes)
        row = step[7]
        assert set(map(str, row.indices)) == set(about["row7"]), name
        found |= {f"{name}.row7.{j}": value for j, value in zip(row.indices, row.data, strict=True)}
        found |= {f"{name}.nodes": step.shape[0], f"{name}.k": about["k"] or 0, f"{name}.nonzeros": step.nnz}
        found[f"{name}.frobenius"] = np.sqrt(step.multiply(step).sum())
        z = torch.from_numpy(np.array(fill.normal(f"z_{name}", (nodes, 10))))
        for key in about:
            if key.startswith("contrast"):  # contrast_order1_tau0.25
                order, tau = key.removeprefix("contrast_order").split("_tau")
                structure = Structure.of(weights(step, int(order), False))
                found[f"{name}.{key}"] = float(contrast(z, structure, float(tau)).per_row.mean())
            elif key.startswith(("power", "cumulative")):  # power_2_frobenius, cumulative_2_frobenius, power_2_nonzeros
                kind, order, what = key.split("_")
                matrix = weights(step, int(order), kind == "cumulative")
                found[f"{name}.{key}"] = matrix.nnz if what == "nonzeros" else np.sqrt(matrix.multiply(matrix).sum())
        assert all(found[f"{name}.{key}"] == value for key, value in about.items() if key.endswith("nonzeros")), name
    return {key: torch.tensor(float(value), dtype=torch.float64) for key, value in found.items()}


RUNNERS: dict[str, Runner] = {
    "scgc": clustering,
    "scgc_star": clustering,
    "pretrain": pretrain,
    "graph_rules": graphs,
    "graph_repeats": graphs,
    "knn": knn,
    "metrics": metrics,
    "real_graphs": real_graphs,
}


@pytest.mark.parametrize("case", cases("scgc"), ids=str)
def test_parity(case: Case) -> None:
    expect_facts(case)
    check(case, RUNNERS)
