"""Robustness: one knob of the data or the method turned while all else stays: added wrong edges, homophily, hops.

`python -m projects.scgc.robustness --config projects/scgc/recipes/robustness_wrong_edges.yaml`

Methods beside each other at each value: SCGC*, SCGC, and a graph convolution's own way to use the graph: K-means on features smoothed over
the same hops (P^R X). Features alone know nothing of the knob.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from common.probes import kmeans, summarise
from common.recipe import parse
from common.results import Record, picture_path, save_record
from projects.scgc import cluster, pictures
from projects.scgc.data import GENERATED, Data
from projects.scgc.evaluate import is_demo, score_seed
from projects.scgc.graph import facts, transition
from projects.scgc.metrics import scores
from projects.scgc.pretrain import is_main

LABELS = {
    "wrong_edges": "wrong edges added, share of the edges there are",
    "homophily": "probability that an edge looks inside the class",
    "order": "hops R",
}


@dataclass(frozen=True)
class Recipe:
    """One knob over several values."""

    name: str = "robustness_wrong_edges"
    """Name of the recipe: its file's."""
    knob: Literal["wrong_edges", "homophily", "order"] = "wrong_edges"
    """Share of wrong edges added; how often an edge of the embedded default stays inside a class; hops of the weights."""
    points: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 1.0, 2.0])
    """Where the knob is put."""
    methods: list[Literal["scgc_star", "scgc", "smoothed"]] = field(default_factory=lambda: ["scgc_star", "scgc", "smoothed"])
    """SCGC*, SCGC (half of SCGC*'s alpha, as the tables have it), K-means on smoothed features."""
    base: cluster.Recipe = field(default_factory=cluster.Recipe)
    """Recipe that the knob changes; its `seeds` are used, its alpha is SCGC*'s."""

    def __post_init__(self) -> None:
        if self.knob == "homophily" and self.base.data != GENERATED:
            raise ValueError(f"knob=homophily: expected base.data={GENERATED}, whose edges are drawn; found {self.base.data}")
        if self.knob == "order" and any(value < 1 or value != int(value) for value in self.points):
            raise ValueError(f"knob=order: expected whole numbers of hops, at least 1; found {self.points}")


def turned(recipe: Recipe, method: str, value: float, seed: int) -> cluster.Recipe:
    """The base recipe with the knob at `value`, for one method and seed."""
    base, graph = recipe.base, recipe.base.graph
    change: dict[str, object] = {"seed": seed, "seeds": [seed], "name": f"{recipe.name}_{method}_{value:g}"}
    if method == "scgc":
        change |= {"variant": "scgc", "alpha": base.alpha / 2}
    elif method == "scgc_star":
        change |= {"variant": "scgc_star"}
    match recipe.knob:
        case "wrong_edges":
            change["graph"] = replace(graph, wrong=value)
        case "homophily":
            change["graph"] = replace(graph, inside=value)
        case "order":
            change["order"] = int(value)
    return replace(base, **change)  # type: ignore[arg-type]


def smoothed(recipe: cluster.Recipe, data: Data) -> dict[str, float]:
    """K-means on P^R X, scores in per cent."""
    step, x = transition(data.edges, len(data.x)), data.x.astype("float64")
    for _ in range(recipe.order):
        x = step @ x
    found = kmeans(torch.from_numpy(x).float(), recipe.clusters or data.classes or 0, restarts=recipe.restarts, seed=recipe.seed)
    return {name: 100 * value for name, value in scores(data.y, found.labels.numpy()).items()}


def main(recipe: Recipe) -> dict[str, dict[float, list[float]]]:
    """ACC (%) at the last epoch by method, value and seed; records and a picture are saved."""
    found: dict[str, dict[float, list[float]]] = {}
    demo = is_demo(recipe.name)
    for method in recipe.methods:
        for value in recipe.points:
            seconds, homophily, found_here = 0.0, [], []
            for seed in recipe.base.seeds:
                own = turned(recipe, method, value, seed)
                data = cluster.read(own)
                homophily.append(round(facts(data.edges, len(data.x), data.y)["homophily"], 3))
                if method == "smoothed":
                    found_here.append(smoothed(own, data)["ACC"])
                else:
                    score = score_seed(own, data)
                    found_here.append(score["last"]["ACC"])
                    seconds += score["seconds"]
            found.setdefault(method, {})[value] = found_here
            if is_main():
                print(f"{recipe.knob} {value:g}, {method}: ACC {summarise(found_here)}, homophily {homophily}", flush=True)
                record = Record(
                    recipe=f"recipes/{recipe.name}.yaml",
                    metric="ACC (%), last epoch",
                    values=found_here,
                    seeds=list(recipe.base.seeds),
                    weights="trained here" if method != "smoothed" else "none",
                    data={"name": data.name, "split": f"{LABELS[recipe.knob]}: {value:g}", "sha256": data.sha256},
                    hours=seconds / 3600,
                    extra={"row": f"{method} {value:g}", "homophily": homophily},
                )
                save_record("scgc", record, demo=demo)
    if is_main():
        names = {"scgc_star": "SCGC*", "scgc": "SCGC", "smoothed": "K-means on P^R X"}
        path = picture_path("scgc", recipe.name, demo=demo)
        pictures.lines(
            path, {names[method]: by_value for method, by_value in found.items()}, title=recipe.base.data, xlabel=LABELS[recipe.knob]
        )
    return found


if __name__ == "__main__":
    main(parse(Recipe))
