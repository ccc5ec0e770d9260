"""Obtain a table row: train what is missing, evaluate by the paper's protocol, save the record, print it.

`python -m projects.graphmae.evaluate --config projects/graphmae/recipes/cora.yaml --data-root D`; molecules: `projects.graphmae.finetune`.
Node tasks: linear probe on the frozen encoder. Graph tasks: readout, then an RBF SVM in 10 folds. With several processes (torchrun) node tasks
spread their seeds over the processes, which is exact; graph tasks share each seed's batches.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import write_text
from common.engine import check_recipe, seed_everything
from common.probes import linear_probe_sgd, summarise, svm_kfold
from common.recipe import parse, to_yaml
from common.results import Record, picture_path, save_record
from common.weights import load_into, read_state_dict
from projects.graphmae.data import GENERATED, GraphSet, NodeBatch, NodeTask, Part, load
from projects.graphmae.model import GraphMAE, readout
from projects.graphmae.pretrain import Recipe, build, is_main, run_folder
from projects.graphmae.pretrain import main as pretrain

Embed = Callable[[Any], Tensor]


def frozen(model: GraphMAE) -> Embed:
    """Node embeddings of a batch, encoder in eval mode, nothing masked or dropped."""
    model.eval()
    device = model.enc_mask_token.device

    @torch.no_grad()
    def embed(batch: Any) -> Tensor:
        batch = batch.to(device)
        return model.embed(batch.x, batch.graph)

    return embed


def probe_nodes(embed: Embed, task: NodeTask, recipe: Recipe) -> dict[str, float]:
    """Linear probe: test scores in per cent at the best validation epoch (the last of equal ones) and after the last epoch."""
    done: dict[int, Tensor] = {}

    def split(parts: list[Part]) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for part in parts:
            if id(part.batch) not in done:
                done[id(part.batch)] = embed(part.batch)
            states = done[id(part.batch)]
            pairs.append((states[part.nodes.to(states.device)], part.labels.to(states.device)))
        return pairs

    probe = recipe.probe
    found = linear_probe_sgd(
        split(task.train),
        split(task.val),
        split(task.test),
        epochs=probe.epochs,
        lr=probe.lr,
        weight_decay=probe.weight_decay,
        multi_label=task.multi_label,
        classes=task.classes,
    )
    return {
        "early_stopping": 100 * found.early_stopping,
        "final": 100 * found.final,
        "best_epoch": found.best_epoch,
        "validation": 100 * found.val[found.best_epoch],
    }


def embed_graphs(embed: Embed, graphs: GraphSet, how: Any, batch_size: int = 256) -> Tensor:
    """(G, h) readouts of all graphs, in order."""
    parts = []
    for numbers in torch.arange(len(graphs)).split(batch_size):
        batch = graphs.batch(numbers)
        states = embed(batch)
        parts.append(readout(states, batch.graph_of.to(states.device), len(numbers), how))
    return torch.cat(parts).cpu()


def probe_graphs(embed: Embed, graphs: GraphSet, recipe: Recipe) -> dict[str, Any]:
    """Mean accuracy in per cent of an RBF SVM over 10 stratified folds (the same for every seed), C chosen inside the training folds."""
    folds = svm_kfold(embed_graphs(embed, graphs, recipe.readout), graphs.labels)
    found = summarise(100 * folds)
    return {"accuracy": found.mean, "std_over_folds": found.std}


def score_seed(recipe: Recipe, task: NodeTask | GraphSet) -> dict[str, Any]:
    """Train and evaluate one seed, or read what an earlier call found; kept in the run folder as score.json."""
    folder = run_folder(recipe)
    kept = folder / "score.json"
    check_recipe(folder, to_yaml(replace(recipe, seeds=[recipe.seed], compare=[])))
    if kept.is_file():
        return json.loads(kept.read_text())
    model = pretrain(recipe, task)
    seed_everything(recipe.seed)
    began = time.monotonic()
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = _probed(frozen(model), task, recipe) | {"loss": history[-1]["loss"]}
    found["seconds"] = round(history[-1]["seconds"] + time.monotonic() - began, 1)
    if is_main() or isinstance(task, NodeTask):
        write_text(kept, json.dumps(found))
    return found


def record(recipe: Recipe, task: NodeTask | GraphSet, scores: dict[int, dict[str, Any]], row: str | None = None) -> Record:
    """Scores by seed as a record; `row` names what was measured beside the recipe's own row."""
    node = isinstance(task, NodeTask)
    extra: dict[str, Any] = {"row": row} if row else {}
    extra |= {"loss": [s["loss"] for s in scores.values()]} if all("loss" in s for s in scores.values()) else {}
    if node:
        extra |= {"protocol": "linear probe, epoch of best validation score", "last_epoch": [s["final"] for s in scores.values()]}
    else:
        extra |= {"protocol": "10-fold RBF SVM", "std_over_folds": [s["std_over_folds"] for s in scores.values()]}
    return Record(
        recipe=f"recipes/{recipe.name}.yaml",
        metric=metric(task, row),
        values=[s["value"] for s in scores.values()],
        seeds=list(scores),
        weights={"raw": "none", "untrained": "untrained"}.get(row or "", "trained here"),
        data={"name": task.name, "split": "public" if node else "10 stratified folds", "sha256": task.sha256},
        hours=sum(s["seconds"] for s in scores.values()) / 3600,
        extra=extra,
    )


def metric(task: NodeTask | GraphSet, row: str | None = None) -> str:
    if row in READOUTS:
        return f"accuracy, {READOUTS[row]} readout (%)"
    return "micro F1 (%)" if isinstance(task, NodeTask) and task.multi_label else "accuracy (%)"


VARIANTS: dict[str, dict[str, Any]] = {
    "no-mask": {"mask": False},
    "no-remask": {"remask": False},
    "mlp-decoder": {"decoder": "mlp"},
    "mse": {"loss": "mse"},
}
READOUTS = {"readout-mean": "mean", "readout-max": "max", "readout-sum": "sum"}


def beside(recipe: Recipe, what: str, task: NodeTask | GraphSet) -> dict[str, Any]:
    """Scores of one seed: a baseline (raw features, untrained encoder), the trained encoder under another readout, or a variant with one thing switched off."""
    if what in VARIANTS:
        return score_seed(replace(recipe, name=f"{recipe.name}-{what}", model=replace(recipe.model, **VARIANTS[what])), task)
    seed_everything(recipe.seed)
    began = time.monotonic()
    if what in READOUTS:
        embed, recipe = frozen(trained(recipe, task)), replace(recipe, readout=READOUTS[what])
    else:
        embed = raw if what == "raw" else frozen(build(recipe, task.in_dim))
    return _probed(embed, task, recipe) | {"seconds": round(time.monotonic() - began, 1)}


def trained(recipe: Recipe, task: NodeTask | GraphSet) -> GraphMAE:
    """The model that the recipe's seed left in its run folder."""
    model = build(recipe, task.in_dim)
    load_into(model, read_state_dict(run_folder(recipe) / "model.safetensors"))
    return model


def raw(batch: Any) -> Tensor:
    """The features themselves, l2-normalised (a row of a bag of words that sums to one is too short for the probe's learning rate)."""
    return batch.x.unit if isinstance(batch, NodeBatch) else batch.x


def _probed(embed: Embed, task: NodeTask | GraphSet, recipe: Recipe) -> dict[str, Any]:
    found = probe_nodes(embed, task, recipe) if isinstance(task, NodeTask) else probe_graphs(embed, task, recipe)
    return found | {"value": found["early_stopping" if isinstance(task, NodeTask) else "accuracy"]}


def _alone() -> tuple[int, int]:
    """(rank, processes) of this launch; from here on this process is one of its own, on its own GPU if there are any."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    return rank, processes


def main(recipe: Recipe) -> Path | None:
    """Every seed of the recipe, and what its `compare` lists; gives the record's path (None on processes other than the first)."""
    generated = recipe.data in GENERATED
    tasks: dict[int, NodeTask | GraphSet] = {}

    def task_of(seed: int) -> NodeTask | GraphSet:
        key = seed if generated else 0  # each seed draws its own embedded data set
        if key not in tasks:
            tasks[key] = load(recipe.data, data_root=recipe.data_root, cache=recipe.cache, seed=key)
        return tasks[key]

    task = task_of(recipe.seeds[0])
    if isinstance(task, NodeTask) and (unfit := sorted(READOUTS.keys() & set(recipe.compare))):
        raise ValueError(f"compare: {unfit} are for graph tasks, {recipe.data} is a node task; leave them out")
    rank, processes = _alone() if isinstance(task, NodeTask) else (0, 1)
    for seed in recipe.seeds[rank::processes]:
        found = score_seed(replace(recipe, seed=seed), task_of(seed))
        print(f"{recipe.name}: seed {seed}: {found['value']:.2f} {metric(task)} ({found['seconds']:.0f} s)", flush=True)
    if rank:
        return None
    files = {seed: run_folder(recipe, seed) / "score.json" for seed in recipe.seeds}
    while not all(file.is_file() for file in files.values()):  # other processes are at work on theirs
        time.sleep(1)
    scores = {seed: json.loads(file.read_text()) for seed, file in files.items()}
    path = None
    if is_main():
        path = save_record("graphmae", record(recipe, task, scores, "full" if generated else None), demo=generated)
        print(f"{recipe.name}: {summarise([s['value'] for s in scores.values()])} {metric(task)}, recorded in {path}")
    for what in recipe.compare:  # by all processes of a graph task: a variant is trained by all
        others = {seed: beside(replace(recipe, seed=seed), what, task_of(seed)) for seed in recipe.seeds}
        if is_main():
            save_record("graphmae", record(recipe, task, others, what), demo=generated)
            print(f"{recipe.name}, {what}: {summarise([s['value'] for s in others.values()])} {metric(task, what)}", flush=True)
    if generated and isinstance(task, NodeTask):
        embedding_picture(replace(recipe, seed=recipe.seeds[0]), task)
    return path


def embedding_picture(recipe: Recipe, task: NodeTask) -> None:
    """t-SNE of 500 test nodes by raw features and by GraphMAE's embedding, coloured by class: report/demo/graphmae/embedding.png."""
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE

    part = task.test[0]
    nodes, labels = part.nodes[:500], part.labels[:500]
    model = trained(recipe, task)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for axis, title, embed in zip(axes, ("word counts", "GraphMAE"), (raw, frozen(model)), strict=True):
        place = TSNE(perplexity=30, init="pca", random_state=0, max_iter=500).fit_transform(embed(part.batch)[nodes].cpu().numpy())
        axis.scatter(*place.T, c=labels, cmap="tab10", s=8)
        axis.set(title=title, xticks=[], yticks=[])
    figure.suptitle(f"{task.name}, seed {recipe.seed}: t-SNE of {len(nodes)} test nodes, coloured by topic")
    figure.savefig(picture_path("graphmae", "embedding"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(parse(Recipe))
