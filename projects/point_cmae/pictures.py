"""Picture of a pre-trained model: each cloud, what branch 1 sees of it, and the cloud with the hidden groups rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.masking import gather
from common.results import picture_path
from projects.point_cmae.model import PointCMAE, group


@torch.no_grad()
def reconstruction(name: str, model: PointCMAE, points: Tensor, titles: Sequence[str], *, demo: bool = True, seed: int = 0) -> Path:
    """Draw clouds (B, N, 3), one a row: cloud, visible groups of branch 1, visible groups (grey) with the rebuilt ones."""
    import matplotlib.pyplot as plt

    out = model(points, generator=torch.Generator().manual_seed(seed))
    branch = out.branches[0]
    visible = groups_at(model, points, branch.mask.keep)
    rebuilt = branch.prediction + gather(out.centres, branch.mask.masked)[:, :, None]
    columns = ("cloud", f"visible groups ({branch.mask.kept} of {model.num_group})", "hidden groups rebuilt")
    figure, axes = plt.subplots(
        len(points), 3, figsize=(9, 2.8 * len(points)), subplot_kw={"projection": "3d"}, layout="constrained", squeeze=False
    )
    for row, title in enumerate(titles):
        for axis, column in zip(axes[row], columns, strict=True):
            axis.set(xlim=(-0.65, 0.65), ylim=(-0.65, 0.65), zlim=(-0.65, 0.65))
            axis.set_axis_off()
            axis.view_init(15, -60)
            axis.set_title(f"{title}: {column}" if axis is axes[row][0] else column, fontsize=9)
        for axis, cloud, style in (
            (axes[row][0], points[row], {"c": "tab:blue"}),
            (axes[row][1], visible[row].flatten(0, 1), {"c": "tab:grey"}),
            (axes[row][2], visible[row].flatten(0, 1), {"c": "lightgrey"}),
            (axes[row][2], rebuilt[row].flatten(0, 1), {"c": "tab:orange"}),
        ):
            x, y, z = cloud.cpu().T
            axis.scatter(x, z, y, s=2, **style)  # y is up
    path = picture_path("point_cmae", name, demo=demo)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def groups_at(model: PointCMAE, points: Tensor, index: Tensor) -> Tensor:
    """Groups index (B, V) of clouds in the cloud's own coordinates, (B, V, k, 3)."""
    centres, groups = group(points, model.num_group, model.group_size, ops=model.ops)
    return gather(groups, index) + gather(centres, index)[:, :, None]
