"""Obtain a table row: train what is missing, score every epoch, save the records, print them.

`python -m projects.scgc.evaluate --config projects/scgc/recipes/acm_star.yaml --data-root D`

Two rules side by side. *Best epoch*, as published: each metric's maximum over the epochs, taken alone, so labels choose the epoch. *Last epoch*:
the assignment before the last step. A third one, ours, needs no labels either: the first epoch at which hardly a label changes.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.checkpoint import write_text
from common.contrastive import unit
from common.probes import kmeans, summarise
from common.recipe import parse
from common.results import Record, picture_path, save_record
from projects.scgc import cluster, pictures
from projects.scgc.cluster import Recipe, embed, is_main, read
from projects.scgc.data import GENERATED, Data
from projects.scgc.features import Features
from projects.scgc.graph import facts
from projects.scgc.metrics import NAMES, by_epoch, scores, settled

RULES = ("best", "last", "settled")
BESIDE = {
    "kmeans-x": "K-means on X",
    "kmeans-ae": "K-means on the auto-encoder",
    "kmeans-unit": "K-means on the trained code at unit length",
    "no-structure": "alpha = 0",
    "shuffled": "shuffled graph",
}


def is_demo(name: str) -> bool:
    """Whether figures of a recipe of this name stay out of results/: those of the demo are made again at every visit."""
    return name.partition("_")[0] == "demo"


def figures(recipe: Recipe, labels: np.ndarray, assignments: np.ndarray) -> dict[str, Any]:
    """Scores in per cent under each rule with their epochs; `start` is K-means on the auto-encoder, `curve` ACC and NMI of every epoch."""
    every = by_epoch(labels, assignments, recipe.empty_clusters)
    stop, last = settled(assignments, recipe.settled_below), len(assignments) - 1
    best = {name: int(values.argmax()) for name, values in every.items()}
    return {
        "best": {name: 100 * float(every[name][epoch]) for name, epoch in best.items()},
        "best_epoch": best,
        "last": {name: 100 * float(values[last]) for name, values in every.items()},
        "last_epoch": last,
        "settled": {name: 100 * float(values[stop]) for name, values in every.items()},
        "settled_epoch": stop,
        "start": {name: 100 * float(values[0]) for name, values in every.items()},
        "curve": {name: np.round(100 * every[name], 2).tolist() for name in ("ACC", "NMI")},
        "clusters_found": len(np.unique(assignments[last])),
    }


def score_seed(recipe: Recipe, data: Data) -> dict[str, Any]:
    """Train one seed, or take the finished run, and score its epochs; `score.json` in its folder says the same."""
    assert_labels(data)
    run = cluster.main(recipe, data)
    found = figures(recipe, data.y, run.assignments)
    found |= {"seconds": round(run.seconds, 1), "graph": facts(data.edges, len(data.x), data.y)}
    if is_main():
        write_text(recipe.folder / "score.json", json.dumps(found))
    return found


def baseline(recipe: Recipe, what: str, data: Data) -> dict[str, Any]:
    """One seed of what stands beside the row."""
    if what in ("no-structure", "shuffled"):
        change: dict[str, Any] = {"alpha": 0.0} if what == "no-structure" else {"graph": replace(recipe.graph, shuffled=True)}
        other = replace(recipe, name=f"{recipe.name}_{what.replace('-', '_')}", **change)
        return score_seed(other, read(other))
    began = time.monotonic()
    match what:
        case "kmeans-x":
            points = torch.from_numpy(data.x).float()
        case "kmeans-ae":
            points = embed(cluster.start(recipe, data).cpu().encode, Features(data.x))
        case "kmeans-unit":
            points = unit(embed(cluster.main(recipe, data).model.cpu().ae.encode, Features(data.x)))
    clusters = kmeans(points, recipe.clusters or data.classes or 0, restarts=recipe.restarts, seed=recipe.seed).labels
    values = {name: 100 * value for name, value in scores(data.y, clusters.numpy(), recipe.empty_clusters).items()}
    return {"only": values, "seconds": round(time.monotonic() - began, 1)}


def assert_labels(data: Data) -> None:
    if data.y is None:
        raise ValueError(f"{data.name} has no labels, so nothing can be scored; take the assignments of projects.scgc.cluster")


def save(recipe: Recipe, found: dict[int, dict[str, Any]], data: Data, row: str) -> None:
    """A record for each metric and rule."""
    first = next(iter(found.values()))
    demo = is_demo(recipe.name)
    for rule in [rule for rule in (*RULES, "only") if rule in first]:
        for name in NAMES.values():
            extra: dict[str, Any] = {"row": row}
            if rule != "only":
                epochs = [f[f"{rule}_epoch"] for f in found.values()]
                extra["epochs"] = [e[name] for e in epochs] if rule == "best" else epochs
                extra["rule"] = {
                    "best": "each metric's maximum over the epochs: labels choose the epoch (the paper's protocol)",
                    "last": "before the last step",
                    "settled": f"first epoch at which at most {recipe.settled_below:g} of the nodes change cluster (DEC's rule, ours here: needs no labels)",
                }[rule]
            label = {"best": ", best epoch", "last": ", last epoch", "settled": ", settled", "only": ""}[rule]
            record = Record(
                recipe=f"recipes/{recipe.name}.yaml",
                metric=f"{name} (%){label}",
                values=[f[rule][name] for f in found.values()],
                seeds=list(found),
                weights={"kmeans-x": "none"}.get(row, "trained here" if recipe.pretrain.weights is None else "auto-encoder of SDCN"),
                data={"name": data.name, "split": "all nodes, labels in the metrics alone", "sha256": data.sha256},
                hours=sum(f["seconds"] for f in found.values()) / 3600,
                extra=extra | {key: first[key] for key in ("graph",) if key in first},
            )
            save_record("scgc", record, demo=demo)


def tell(name: str, found: dict[int, dict[str, Any]]) -> None:
    first = next(iter(found.values()))
    for rule in [rule for rule in (*RULES, "only") if rule in first]:
        shown = "  ".join(f"{m} {summarise([f[rule][m] for f in found.values()])}" for m in NAMES.values())
        epochs = [f[f"{rule}_epoch"] for f in found.values()] if rule != "only" else []
        at = [e["ACC"] for e in epochs] if rule == "best" else epochs
        print(f"{name:<42} {'' if rule == 'only' else rule:<8} {shown}{f'  ACC at epochs {at}' if at else ''}", flush=True)


def main(recipe: Recipe) -> dict[str, dict[int, dict[str, Any]]]:
    """Every seed of the recipe and of what its `compare` lists, by row and seed."""
    generated = recipe.data == GENERATED
    first = read(replace(recipe, seed=recipe.seeds[0]))

    def data_of(seed: int) -> Data:
        """Each seed draws its own embedded default, and its own wrong edges."""
        varies = generated or recipe.graph.wrong or recipe.graph.shuffled
        return read(replace(recipe, seed=seed)) if varies else first

    if first.y is None:
        for seed in recipe.seeds:
            cluster.main(replace(recipe, seed=seed), first)
        print(
            f"{recipe.name}: {first.name} has no labels, so metrics are skipped; assignments.npy and the models are in {recipe.folder.parent}"
        )
        return {}
    found: dict[str, dict[int, dict[str, Any]]] = {recipe.name: {}}
    for seed in recipe.seeds:
        found[recipe.name][seed] = score = score_seed(replace(recipe, seed=seed), data_of(seed))
        if is_main():
            print(
                f"{recipe.name}: seed {seed}: ACC {score['best']['ACC']:.2f} at epoch {score['best_epoch']['ACC']}, "
                f"{score['last']['ACC']:.2f} at the last ({score['seconds']:.0f} s)",
                flush=True,
            )
    for what in recipe.compare:
        found[what] = {seed: baseline(replace(recipe, seed=seed), what, data_of(seed)) for seed in recipe.seeds}
    if is_main():
        for row, scored in found.items():
            save(recipe, scored, data_of(recipe.seeds[0]), row)
            tell(BESIDE.get(row, row), scored)
        picture(replace(recipe, seed=recipe.seeds[0]), data_of(recipe.seeds[0]), found[recipe.name])
    return found


def picture(recipe: Recipe, data: Data, found: dict[int, dict[str, Any]]) -> Path:
    """t-SNE of the auto-encoder's and of the clustered embedding, and the score of every epoch."""
    x = Features(data.x)
    run = cluster.main(recipe, data)
    panels = {
        "auto-encoder": embed(cluster.start(recipe, data).cpu().encode, x).numpy(),
        f"{'SCGC*' if recipe.variant == 'scgc_star' else 'SCGC'}, last epoch": embed(run.model.cpu().ae.encode, x).numpy(),
    }
    path = picture_path("scgc", f"{recipe.name}_embedding", demo=is_demo(recipe.name))
    pictures.embedding(path, panels, data.y, [f["curve"] for f in found.values()], title=f"{data.name}, seed {recipe.seed}")
    return path


if __name__ == "__main__":
    main(parse(Recipe))
