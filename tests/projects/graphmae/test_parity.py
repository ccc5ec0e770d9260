"""GraphMAE against its reference: one runner a kind of case; networks run on both paths and must agree with each other too."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.probes import linear_probe_sgd, roc_auc, svm_kfold
from common.schedule import cosine
from projects.graphmae.data import GraphSet, NodeTask, load
from projects.graphmae.model import Features, GraphMAE, Output, draw_masks, readout, sce
from projects.graphmae.molecule import Bonds, Classifier, MoleculeGraphMAE, masked_bce
from projects.graphmae.molecules import features, scaffold_split
from projects.graphmae.weights import load_reference
from tests.parity import Case, Runner, cases, check, fill

SETS = ("mask_nodes", "token_nodes", "noise_nodes", "noise_source_nodes", "kept_edges")


def model_of(case: Case) -> GraphMAE:
    own = {"in_dim", "encoder", "decoder", "hidden", "layers", "heads", "decoder_heads", "activation", "negative_slope", "norm", "residual"}
    own |= {"mask_rate", "replace_rate", "drop_edge_rate", "loss", "gamma", "concat_hidden"}
    model = GraphMAE(**{name: value for name, value in case.config.items() if name in own}, in_drop=0.0, attn_drop=0.0)
    fixed = {
        name: torch.full(about["shape"], about["value"], dtype=model.state_dict()[name].dtype)
        for name, about in case.raw["not_filled"].items()
    }
    load_reference(model, case.state | fixed)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def features_of(case: Case) -> Tensor:
    x, then = case.inputs["x"], case.raw["inputs"]["x"].get("then", "")
    if then.startswith("one_hot"):
        return F.one_hot((x[:, 0] * case.config["in_dim"]).long(), case.config["in_dim"]).float()
    if then.startswith("(u > 0.7)"):
        words = (x > 0.7).float()
        return words / words.sum(1, keepdim=True).clamp(min=1)
    return x


def run_both(model: GraphMAE, x: Tensor | Features, edges: Tensor, sets: Mapping[str, Tensor]) -> Output:
    """Plain and efficient path from the same state: equal to rounding, gradients too; leaves the plain one's gradients and buffers behind."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = model(x, edges, **sets)
    fast.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.load_state_dict(before)
    plain = model(x, edges, **sets, path="plain")
    plain.loss.backward()
    torch.testing.assert_close(fast.loss, plain.loss, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(fast.prediction, plain.prediction, rtol=1e-5, atol=2e-6)
    for name, parameter in model.named_parameters():
        close = (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-6
        assert close, name  # a bias before a batch norm has no gradient but rounding
    return plain


def with_gradients(case: Case, model: GraphMAE, out: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, parameter in model.named_parameters():
        out |= {f"grad.{name}": parameter.grad, f"grad_norm.{name}": parameter.grad.norm()}
    return out


def pretrain(case: Case) -> dict[str, Tensor]:
    model, x, edges = model_of(case), features_of(case), case.inputs["edge_index"].long()
    sets = {name: case.inputs[name] for name in SETS if name in case.inputs}
    model.eval()
    with torch.no_grad():
        embed = model.embed(x, edges)
    model.train()
    result = run_both(model, x, edges, sets)
    sparse = model(Features(x, sparse_below=2.0), edges, **sets)
    torch.testing.assert_close(sparse.loss, result.loss, rtol=2e-6, atol=1e-7)
    trace = result.trace
    out = {"masked_x": trace.masked_x, "code": trace.code, "recon": trace.reconstruction, "loss": result.loss, "embed": embed}
    out |= {f"hidden.{level}": state for level, state in enumerate(trace.hidden)}
    model = model_of(case).train()  # buffers after one forward
    model(x, edges, **sets).loss.backward()
    out |= {f"after.{name}": value for name, value in model.state_dict().items()}
    if "batch" in case.inputs:
        graph_of = case.inputs["batch"].long()
        out |= {f"pooled.{how}": readout(embed, graph_of, int(graph_of.max()) + 1, how) for how in ("mean", "max", "sum")}
    return with_gradients(case, model, out)


def train_steps(case: Case) -> dict[str, Tensor]:
    model, x, edges, config = model_of(case), features_of(case), case.inputs["edge_index"].long(), case.config
    update = torch.optim.Adam(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"], fused=True)
    losses = []
    for step in range(config["steps"]):
        for group in update.param_groups:
            group["lr"] = cosine(step, total=config["schedule_epochs"], peak=config["lr"])
        sets = {name: case.inputs[f"s{step}.{name}"] for name in SETS if f"s{step}.{name}" in case.inputs}
        loss = model(x, edges, **sets).loss
        update.zero_grad()
        loss.backward()
        update.step()
        losses.append(loss.detach().double())
    out = {"loss": torch.stack(losses), "embed": model.eval().embed(x, edges)}
    for name, parameter in model.named_parameters():
        out |= {name: parameter, f"norm.{name}": parameter.norm()}
    return out


def losses(case: Case) -> dict[str, Tensor]:
    p, t = case.inputs["prediction"].clone(), case.inputs["target"].clone()
    t[:6] += 2 * p[:6]
    out = {"mse": F.mse_loss(p, t), "sig": torch.sigmoid(-F.cosine_similarity(p, t, eps=1e-12)).mean()}
    for gamma in case.config["gammas"]:
        leaf = p.clone().requires_grad_()
        loss = sce(leaf, t, gamma)
        out |= {f"sce.gamma{gamma}": loss, f"sce_grad_norm.gamma{gamma}": torch.autograd.grad(loss, leaf)[0].norm()}
        zero_p, zero_t = p.clone(), t.clone()
        zero_p[1], zero_t[[0, 3]] = 0, 0
        out[f"sce.gamma{gamma}.zero_rows"] = sce(zero_p, zero_t, gamma)
    return out


def mask_noise(case: Case) -> dict[str, Tensor]:
    out = {}
    for i, (nodes, mask_rate, replace_rate) in enumerate(case.config["rows"]):
        given = tuple(case.inputs.get(f"{i}.{p}") for p in ("p1", "p2", "p3"))
        masks = draw_masks(nodes, mask_rate, replace_rate, permutations=given)
        source = torch.arange(nodes)
        source[masks.noise_nodes], source[masks.token_nodes] = masks.noise_source_nodes, -1
        counts = [len(masks.mask_nodes), len(masks.token_nodes), len(masks.noise_nodes)]
        unchanged = int((source[masks.mask_nodes] == masks.mask_nodes).sum() - (masks.noise_nodes == masks.noise_source_nodes).sum())
        out |= {
            f"{i}.row_source": source,
            f"{i}.mask_nodes": masks.mask_nodes,
            f"{i}.keep_nodes": given[0][counts[0] :],
            f"{i}.counts": torch.tensor([*counts, unchanged]),
        }
    return out


def lr_schedule(case: Case) -> dict[str, Tensor]:
    epochs = case.config["epochs"]
    return {"lr": torch.tensor([cosine(epoch, total=epochs, peak=case.config["lr"]) for epoch in range(epochs)], dtype=torch.float64)}


def dataset(name: str) -> NodeTask | GraphSet:
    """Real data of a case; the test is skipped where it is not at hand."""
    root = Path(os.environ.get("CONTRAMASK_DATA") or Path(__file__).parents[3].parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip("real data not found: set CONTRAMASK_DATA to its root")
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(name, data_root=str(root), cache=cache)


def filled(case: Case) -> dict[str, Tensor]:
    model, task = model_of(case), dataset(case.config["dataset"])
    batch = task.pretrain[0]
    facts = [len(batch.x.dense), len(batch.graph.source), task.in_dim, task.classes, int((~batch.x.dense.any(1)).sum())]
    facts += [len(part[0].nodes) for part in (task.train, task.val, task.test)]
    with torch.no_grad():
        embed = model.eval().embed(batch.x, batch.graph)
    sets = {name: case.inputs[name] for name in SETS if name in case.inputs}
    result = run_both(model.train(), batch.x, batch.graph, sets)
    return with_gradients(case, model, {"facts": torch.tensor(facts), "embed": embed, "loss": result.loss})


def graph_batch(case: Case) -> dict[str, Tensor]:
    model, graphs = model_of(case), dataset(case.config["dataset"].lower())
    count = int(case.config["graphs"].split()[2])
    batch = graphs.batch(torch.arange(count))
    with torch.no_grad():
        embed = model.eval().embed(batch.x, batch.graph)
    sets = {name: case.inputs[name] for name in SETS if name in case.inputs}
    result = run_both(model.train(), batch.x, batch.graph, sets)
    out = {f"pooled.{how}": readout(embed, batch.graph_of, count, how) for how in ("mean", "max", "sum")}
    return with_gradients(case, model, out | {"loss": result.loss})


def tu_features(case: Case) -> dict[str, Tensor]:
    out = {}
    for name in case.config["datasets"]:
        graphs = dataset(name.lower())
        whole = graphs.batch(torch.arange(len(graphs)))
        facts = [len(graphs), len(whole.x), len(whole.graph.source), graphs.in_dim, graphs.classes]
        third = graphs.batch(torch.tensor([3])).x.argmax(1)
        out |= {
            f"{name}.facts": torch.tensor(facts),
            f"{name}.feature_sum": whole.x.sum(0),
            f"{name}.labels": graphs.labels,
            f"{name}.graph3": third,
        }
    return out


def labelled(case: Case) -> tuple[Tensor, Tensor]:
    x, classes = case.inputs["embedding"], case.config["classes"]
    labels = (case.inputs["u"][:, 0] * classes).long()
    name = case.raw["inputs"]["embedding"]["name"].removesuffix("x") + "c"
    return x + 0.3 * torch.from_numpy(fill.normal(name, (classes, x.shape[1])))[labels], labels


def head_of(case: Case) -> torch.nn.Linear:
    head = torch.nn.Linear(*reversed(case.state["linear.weight"].shape))
    head.load_state_dict({name.removeprefix("linear."): value for name, value in case.state.items()})
    return head


def linear_probe(case: Case) -> dict[str, Tensor]:
    (x, labels), config = labelled(case), case.config
    fifth = torch.arange(len(x)) % 5
    train, val, test = ((x[part], labels[part]) for part in (fifth == 0, (fifth == 1) | (fifth == 2), fifth > 2))
    found = linear_probe_sgd(
        train,
        val,
        test,
        epochs=config["epochs"],
        lr=config["lr"],
        weight_decay=config["weight_decay"],
        head=head_of(case),
        classes=config["classes"],
    )
    out = {
        "val_accuracy": found.val,
        "test_accuracy": found.test,
        "final_test": found.final,
        "best_val_test": found.early_stopping,
        "best_epoch": found.best_epoch,
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in out.items()} | {
        "weight": found.head.weight,
        "bias": found.head.bias,
    }


def linear_probe_multilabel(case: Case) -> dict[str, Tensor]:
    config = case.config
    sizes = dict(zip(("train", "val", "test"), config["graphs_train_val_test"], strict=True))
    splits = {
        part: [(case.inputs[f"{part}.{i}.x"], case.inputs[f"{part}.{i}.y"].float()) for i in range(len(count))]
        for part, count in sizes.items()
    }
    found = linear_probe_sgd(
        **splits, epochs=config["epochs"], lr=config["lr"], weight_decay=config["weight_decay"], multi_label=True, head=head_of(case)
    )
    out = {"val_f1": found.val, "test_f1": found.test, "final_test": found.final, "best_val_test": found.early_stopping}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in out.items()} | {"weight": found.head.weight}


def svm_protocol(case: Case) -> dict[str, Tensor]:
    folds = torch.from_numpy(svm_kfold(*labelled(case)))
    return {"mean": folds.mean(), "std": folds.std(correction=0)}


def chem_features(case: Case) -> dict[str, Tensor]:
    pytest.importorskip("rdkit")
    out = {}
    for i, smiles in enumerate(case.config["smiles"]):
        out |= {
            f"{i}.{name}": torch.from_numpy(part) for name, part in zip(("x", "edge_index", "edge_attr"), features(smiles), strict=True)
        }
    return out


def chem_scaffold_split(case: Case) -> dict[str, Tensor]:
    pytest.importorskip("rdkit")
    parts = scaffold_split(case.config["smiles"], *case.config["fractions"][:2])
    return {"train": parts["train"], "valid": parts["val"], "test": parts["test"]}


def chem_rocauc(case: Case) -> dict[str, Tensor]:
    labels = case.inputs["y"]
    return {"mean_auc": torch.tensor(roc_auc(labels, case.inputs["scores"], present=labels != 0), dtype=torch.float64)}


def bonds_of(case: Case) -> tuple[Tensor, Bonds, Tensor]:
    x = case.inputs["x"].long()
    return x, Bonds.of(case.inputs["edge_index"], case.inputs["edge_attr"], len(x)), case.inputs["batch"].long()


def zeros_for(case: Case) -> dict[str, Tensor]:
    return {name: torch.full(about["shape"], about["value"], dtype=torch.int64) for name, about in case.raw["not_filled"].items()}


def chem_pretrain(case: Case) -> dict[str, Tensor]:
    config, (x, bonds, molecule_of), out = case.config, bonds_of(case), {}
    given = case.inputs["masked_atoms"].long()
    for gamma in config["gammas"]:
        paths = {}
        for path in ("efficient", "plain"):
            model = MoleculeGraphMAE(config["layers"], config["emb_dim"], jk=config["JK"], mask_rate=config["mask_rate"], gamma=gamma)
            load_reference(model, case.state | zeros_for(case))
            with torch.no_grad():
                out["embed"] = model.eval().encoder(x, bonds, path)
            result = model.train()(x, bonds, molecule_of, masked_atoms=given, path=path)
            result.loss.backward()
            paths[path] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"loss": result.loss.detach()}
        for name, value in paths["plain"].items():
            torch.testing.assert_close(paths["efficient"][name], value, rtol=1e-4, atol=1e-6)
            out[f"loss.gamma{gamma}" if name == "loss" else f"grad_norm.gamma{gamma}.{name}"] = value.norm()
        place = torch.searchsorted(result.mask_nodes, given)
        out |= {"pred": result.prediction[place], "target_type": x[given, 0]}
    masked = x.clone()
    masked[given] = torch.tensor([119, 0])
    load_reference(model, case.state | zeros_for(case))
    return out | {"node_rep": model.train().encoder(masked, bonds)}


def chem_finetune(case: Case) -> dict[str, Tensor]:
    config, (x, bonds, molecule_of) = case.config, bonds_of(case)
    model = Classifier(config["tasks"], config["layers"], config["emb_dim"], jk=config["JK"], drop=0.0, pooling=config["pooling"])
    load_reference(model, case.state | zeros_for(case))
    with torch.no_grad():
        out = {"logits_eval": model.eval()(x, bonds, molecule_of, len(case.inputs["y"]))}
    logits = model.train()(x, bonds, molecule_of, len(case.inputs["y"]))
    total, count = masked_bce(logits, case.inputs["y"])
    (total / count).backward()
    return with_gradients(case, model, out | {"logits_train": logits, "loss": total / count})


def scalars_as_stored(runner: Runner) -> Runner:
    """The files hold 0-d outputs with one dimension."""
    return lambda case: {
        name: value.reshape(1) if tuple(getattr(case.expected.get(name), "shape", ())) == (1,) else value
        for name, value in runner(case).items()
    }


RUNNERS = {
    runner.__name__: scalars_as_stored(runner)
    for runner in (
        pretrain,
        train_steps,
        losses,
        mask_noise,
        lr_schedule,
        filled,
        graph_batch,
        tu_features,
        linear_probe,
        linear_probe_multilabel,
        svm_protocol,
        chem_features,
        chem_scaffold_split,
        chem_rocauc,
        chem_pretrain,
        chem_finetune,
    )
}


@pytest.mark.parametrize("case", cases("graphmae"), ids=str)
def test_case(case: Case) -> None:
    check(case, RUNNERS)
