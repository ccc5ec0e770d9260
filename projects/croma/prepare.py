"""Turn a published layout into arrays of normalised bytes, once: `python -m projects.croma.prepare --layout ssl4eo --source FOLDER --out FOLDER`.

SSL4EO-S12: `images.npy` (N, 14, 264, 264), 0.98 MB a pair. BigEarthNet: `images.npy` of all pairs, or with split lists a task folder
(`train/images.npy`, `train/labels.npy`, ..., `task.json`). Written aside and renamed: an interrupted run leaves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.checkpoint import written_aside
from common.recipe import parse
from projects.croma.data import PAIR_STATISTICS
from projects.croma.rasters import LABELS_19, PairFiles, bigearthnet_pairs, labels_19, read_pair, ssl4eo_pairs


@dataclass(frozen=True)
class Recipe:
    """Which layout, from where, to where."""

    layout: Literal["ssl4eo", "bigearthnet"] = "ssl4eo"
    """As published."""
    source: str = "."
    """Its folder."""
    out: str = "prepared"
    """Folder to write."""
    lists: dict[str, str] = field(default_factory=dict)
    """BigEarthNet: files with one optical patch name a line, by split (train, val, test)."""
    optical: Literal["s2a", "s2c"] = "s2a"
    """SSL4EO: product of the optical images; both are scaled by the constants of s2a, the only ones published for 12 bands."""
    baseline_offset: bool = False
    """Optical products have processing baseline 04.00 or later: 1000 is taken off their numbers."""


def write_images(pairs: Sequence[PairFiles], side: int, path: Path, *, baseline_offset: bool = False) -> None:
    """`path`: (len(pairs), 14, side, side) uint8."""
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(pairs), 14, side, side))
    for number, pair in enumerate(pairs):
        images[number] = read_pair(pair, side, PAIR_STATISTICS, baseline_offset=baseline_offset).numpy()
    images.flush()


def main(recipe: Recipe) -> Path:
    """The folder written.

    Raises:
        FileNotFoundError, ValueError: as the readers, and patches of a list that are not in the source.
    """
    target = Path(recipe.out)
    if recipe.layout == "ssl4eo":
        pairs, side = ssl4eo_pairs(recipe.source, recipe.optical), 264
    else:
        pairs, side = bigearthnet_pairs(recipe.source), 120
    by_name = {pair.name: pair for pair in pairs}
    listed = {part: Path(path).read_text().split() for part, path in recipe.lists.items()}
    for part, names in listed.items():
        if absent := [name for name in names if name not in by_name]:
            raise ValueError(f"list {recipe.lists[part]}: {len(absent)} of {len(names)} patches are not in {recipe.source}: {absent[:5]}")
    with written_aside(target) as aside:
        aside.mkdir()
        if not listed:
            write_images(pairs, side, aside / "images.npy", baseline_offset=recipe.baseline_offset)
            (aside / "names.txt").write_text("\n".join(by_name) + "\n")
        else:
            for part, names in listed.items():
                (aside / part).mkdir()
                chosen = [by_name[name] for name in names]
                write_images(chosen, side, aside / part / "images.npy", baseline_offset=recipe.baseline_offset)
                np.save(aside / part / "labels.npy", torch.stack([labels_19(pair.labels) for pair in chosen]).numpy())
            about = {
                "name": "BigEarthNet",
                "kind": "multi",
                "channels": ["optical", "radar"],
                "classes": len(LABELS_19),
                "statistics": PAIR_STATISTICS,
            }
            (aside / "task.json").write_text(json.dumps(about))
    return target


if __name__ == "__main__":
    print(main(parse(Recipe)))
