"""Pictures of embeddings, of scores over the epochs, and of robustness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np


def embedding(
    path: Path,
    panels: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    curves: Sequence[Mapping[str, Sequence[float]]],
    *,
    title: str,
    most: int = 1500,
) -> None:
    """t-SNE of up to `most` nodes of each embedding (N, D), coloured by class, and beside them ACC and NMI of every epoch, one line a seed."""
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE

    count = len(next(iter(panels.values())))
    shown = np.sort(np.random.default_rng(0).permutation(count)[:most])
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(4.3 * (len(panels) + 1), 4.1), layout="constrained")
    for axis, (name, points) in zip(axes, panels.items(), strict=False):
        place = TSNE(perplexity=30, init="pca", random_state=0, max_iter=500).fit_transform(points[shown])
        axis.scatter(*place.T, c=None if labels is None else labels[shown], cmap="tab10", s=6)
        axis.set(title=name, xticks=[], yticks=[])
    for number, curve in enumerate(curves):
        for metric, colour in (("ACC", "tab:blue"), ("NMI", "tab:orange")):
            axes[-1].plot(curve[metric], color=colour, alpha=0.6, lw=1, label=metric if number == 0 else None)
    axes[-1].set(title=f"every epoch, {len(curves)} seed{'s' if len(curves) > 1 else ''}", xlabel="epoch", ylabel="%")
    axes[-1].legend()
    figure.suptitle(f"{title}: t-SNE of {len(shown)} nodes, coloured by class")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def lines(path: Path, curves: Mapping[str, Mapping[float, Sequence[float]]], *, title: str, xlabel: str) -> None:
    """ACC (%) over a knob, a line a method: mean over seeds, each seed a dot."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for number, (name, by_value) in enumerate(curves.items()):
        colour = f"C{number}"
        axis.plot(list(by_value), [fmean(values) for values in by_value.values()], "-", color=colour, label=name)
        for value, values in by_value.items():
            axis.plot([value] * len(values), values, ".", ms=4, color=colour, alpha=0.5)
    axis.set(title=title, xlabel=xlabel, ylabel="ACC (%), last epoch")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
