"""The paper's figures from our runs, in one small style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

INK, BLUE, ORANGE, GREEN, GREY, RED = "#222222", "#1f6fb4", "#d9622b", "#2b8a5a", "#8d979f", "#c8102e"
FADING = ("#c6dbef", "#6baed6", "#2171b5", "#08306b")
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "savefig.dpi": 130,
}


def _axes(rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)


def one_dimensional(
    path: Path, x: Tensor, log_p: Tensor, score: Tensor, optima: Mapping[float, Tensor], errors: Mapping[str, Mapping[float, float]]
) -> None:
    """r(x), the score and the energy read off it against the truth for several sigma, and the error over sigma with the predicted slope.

    Args:
        x, log_p, score: (n,) grid and truth. optima: sigma to r (n,). errors: criterion to {sigma: relative error}.
    """
    with rc_context(STYLE):
        figure, (first, second, third, fourth) = _axes(1, 4, (13.5, 3.1))
        density = log_p.exp()
        shown = density > 1e-4 * density.max()
        low, high = float(x[shown].min()), float(x[shown].max())
        first.fill_between(x, -1.7, -1.7 + 1.1 * density / density.max(), color=GREY, alpha=0.35, lw=0, label="density")
        first.plot(x, x, color=INK, lw=0.8, ls="--", label="identity")
        second.plot(x, score, color=INK, lw=1.2, ls="--", label="truth")
        true_energy = -log_p + log_p.max()
        third.plot(x, true_energy, color=INK, lw=1.2, ls="--", label="truth")
        for colour, (sigma, r) in zip(FADING, optima.items(), strict=False):
            first.plot(x, r, color=colour, label=rf"$\sigma$ = {sigma:g}")
            estimate = (r - x) / sigma**2
            second.plot(x, estimate, color=colour, label=rf"$\sigma$ = {sigma:g}")
            energy = -torch.cumulative_trapezoid(estimate, x, dim=0)
            third.plot(x[1:], energy - energy[shown[1:]].min(), color=colour, label=rf"$\sigma$ = {sigma:g}")
        first.set(title="optimal reconstruction r(x)", xlabel="x", ylim=(-1.7, 1.5))
        inside = score[shown]
        second.set(
            title=r"(r(x) − x) / σ²  against the score",
            xlabel="x",
            xlim=(low, high),
            ylim=(1.3 * float(inside.min()), 1.3 * float(inside.max())),
        )
        third.set(title="energy, integrated from r", xlabel="x", xlim=(low, high), ylim=(-0.5, float(true_energy[shown].max()) * 1.05))
        for colour, (name, by_sigma) in zip((BLUE, ORANGE), errors.items(), strict=False):
            fourth.loglog(list(by_sigma), list(by_sigma.values()), "o-", ms=3.5, color=colour, label=name)
        sigmas = torch.tensor(sorted(next(iter(errors.values()))))
        anchor = next(iter(errors.values()))[float(min(next(iter(errors.values()))))]
        fourth.loglog(sigmas, anchor * (sigmas / sigmas[0]) ** 2, color=INK, ls="--", lw=0.8, label="order 2 (predicted)")
        fourth.set(title="relative score error", xlabel="σ", ylim=(None, 1.5))
        for axis in (first, second, third, fourth):
            axis.legend()
        figure.savefig(path)


def field(
    path: Path, panels: Sequence[tuple[str, Tensor, Tensor, Tensor | None]], curve: Tensor, closeup: tuple[float, float, float]
) -> None:
    """r(x) - x around a curve, whole and close up between two arms; ends of iterating r beside the data in red.

    Args:
        panels: (title, points (n, 2), displacements (n, 2), ends of the iteration far from the data (k, 2) or None): one row each.
        closeup: centre x, centre y, half width.
    """
    cx, cy, half = closeup
    with rc_context(STYLE):
        figure, axes = _axes(len(panels), 2, (9.4, 4.6 * len(panels)))
        for (title, points, move, ends), whole, close in zip(panels, axes[::2], axes[1::2], strict=True):
            side = round(len(points) ** 0.5)
            for axis, stride, longest, width in ((whole, 5, 0.06, 0.0025), (close, 2, 0.025, 0.004)):
                x, v = (t.view(side, side, 2)[::stride, ::stride].reshape(-1, 2) for t in (points, move))
                length = v.norm(dim=1)
                arrow = v / length.clamp_min(1e-12)[:, None] * length.clamp_max(longest)[:, None]
                axis.plot(curve[:, 0], curve[:, 1], color=ORANGE, lw=1.6, alpha=0.9, zorder=1)
                drawn = axis.quiver(
                    x[:, 0],
                    x[:, 1],
                    arrow[:, 0],
                    arrow[:, 1],
                    length,
                    cmap="viridis_r",
                    clim=(0, 0.1),
                    angles="xy",
                    scale_units="xy",
                    scale=1,
                    width=width,
                    zorder=2,
                )
                if ends is not None and len(ends):
                    axis.plot(ends[:, 0], ends[:, 1], "o", ms=5, color=RED, mec="white", mew=0.6, zorder=3)
                axis.set_aspect("equal")
            edge = float(points.abs().max())
            whole.set(xlim=(-edge, edge), ylim=(-edge, edge), title=title)
            close.set(xlim=(cx - half, cx + half), ylim=(cy - half, cy + half), title="close-up between two arms")
            whole.add_patch(Rectangle((cx - half, cy - half), 2 * half, 2 * half, fill=False, color=INK, lw=0.9))
            figure.colorbar(drawn, ax=close, shrink=0.75, label="|r(x) − x|")
        figure.savefig(path)


def energy_maps(path: Path, axis_points: Tensor, maps: Mapping[str, Tensor], *, reconstruction_error: Tensor) -> None:
    """Energies on an even square grid, one scale for all, and the squared displacement, which is small at maxima and minima of the density alike.

    Args:
        axis_points: (n,) coordinates. maps: title to (n, n) energies, [row = x, column = y]. reconstruction_error: (n, n).
    """
    with rc_context(STYLE):
        figure, axes = _axes(1, len(maps) + 1, (3.6 * (len(maps) + 1), 3.3), sharey=True)
        levels = torch.linspace(0, 10, 21)
        for axis, (title, energy) in zip(axes, maps.items(), strict=False):
            drawn = axis.contourf(axis_points, axis_points, (energy - energy.min()).clamp_max(10).mT, levels=levels, cmap="viridis_r")
            axis.set(title=title, aspect="equal")
        figure.colorbar(drawn, ax=axes[len(maps) - 1], shrink=0.8, label="energy")
        drawn = axes[-1].contourf(axis_points, axis_points, reconstruction_error.clamp_min(1e-8).log10().mT, levels=20, cmap="magma")
        axes[-1].set(title="log₁₀ |r(x) − x|²: not an energy", aspect="equal")
        figure.colorbar(drawn, ax=axes[-1], shrink=0.8)
        figure.savefig(path)


def error_curves(path: Path, curves: Mapping[str, Mapping[float, float]], *, title: str) -> None:
    """Relative error over sigma, logarithmic, one line a model."""
    with rc_context(STYLE):
        figure, (axis,) = _axes(1, 1, (4.6, 3.4))
        for colour, (name, by_sigma) in zip((INK, BLUE, ORANGE, GREEN), curves.items(), strict=False):
            axis.loglog(list(by_sigma), list(by_sigma.values()), "o-", ms=3.5, color=colour, label=name)
        for scale, ticks in ((axis.xaxis, sorted(next(iter(curves.values())))), (axis.yaxis, [0.03, 0.1, 0.3, 1.0])):
            scale.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
            scale.set_ticks([], minor=True)
        axis.set(title=title, xlabel="σ")
        axis.legend()
        figure.savefig(path)


def pairs(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Each dimension against the next, for several samples (n, d) of the same density, d >= 2: the paper's 10-D figure."""
    sets = list(rows.items())
    dim = sets[0][1].shape[1]
    pairs_shown = [(i, (i + 1) % dim) for i in range(dim if dim > 2 else 1)][:10]
    columns = min(5, len(pairs_shown))
    blocks = [pairs_shown[i : i + columns] for i in range(0, len(pairs_shown), columns)]
    with rc_context(STYLE):
        figure, axes = _axes(len(blocks) * len(sets), columns, (2.1 * columns, 2.05 * len(blocks) * len(sets)))
        everything = torch.cat([sample for _, sample in sets])
        low, high = (everything.quantile(torch.tensor([0.001, 0.999], dtype=everything.dtype), dim=0)).unbind(0)
        low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
        for number, axis in enumerate(axes):
            line, column = divmod(number, columns)
            block, which = divmod(line, len(sets))
            if column >= len(blocks[block]):
                axis.set_visible(False)
                continue
            name, sample = sets[which]
            a, b = blocks[block][column]
            axis.plot(sample[:, a], sample[:, b], ".", ms=1.6, alpha=0.5, mew=0, color=(GREY, GREEN, BLUE)[which], rasterized=True)
            axis.set(xlim=(low[a], high[a]), ylim=(low[b], high[b]))
            axis.set_title(f"dimensions {a}, {b}" if which == 0 else "", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(name)
        figure.savefig(path)


def digits(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Rows of 8 x 8 images (k, 64) in [0, 1]."""
    count = len(next(iter(rows.values())))
    with rc_context(STYLE):
        figure, axes = _axes(len(rows), count, (0.62 * count + 1.6, 0.72 * len(rows)))
        for line, (name, images) in enumerate(rows.items()):
            for column, image in enumerate(images):
                axis = axes[line * count + column]
                axis.imshow(image.view(8, 8), cmap="gray_r", vmin=0, vmax=1)
                _bare(axis)
            axes[line * count].set_ylabel(name, rotation=0, ha="right", va="center")
        figure.savefig(path)
