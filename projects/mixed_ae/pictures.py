"""Pictures of a trained model: a group, its mixture and every image rebuilt; the keys that patches keep; losses and accuracies over training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.kernels.topk_attention import kept_pairs
from common.patch import patchify, unpatchify
from projects.mixed_ae.data import MEAN, STD
from projects.mixed_ae.mixing import mix
from projects.mixed_ae.model import MixedAE, Output


def shown(images: Tensor) -> Tensor:
    """Normalised (B, 3, S, S) -> (B, S, S, 3) in 0..1."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (images.detach().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


@torch.no_grad()
def look(model: MixedAE, images: Tensor, seed: int) -> Output:
    """One group through the model, mixed by a seeded assignment."""
    model.eval()
    noise = torch.rand(1, model.side**2, generator=torch.Generator().manual_seed(seed))
    return model(images, noise=noise)


@torch.no_grad()
def reconstructions(path: Path, model: MixedAE, images: Tensor, seed: int) -> None:
    """Rows: the group (K, 3, S, S); what each image gives to the mixture; each rebuilt (own patches as they are); at the left the mixture."""
    import matplotlib.pyplot as plt

    output = look(model, images, seed)
    if output.assignment is None:
        raise ValueError("pictures of mixtures: expected a model that mixes, got MAE")
    group, grid, patch = model.group, (model.side, model.side), model.patch_size
    patches = patchify(images, patch)
    rebuilt = model.every_patch(output)[:group]
    if model.norm_pix:  # undone with each patch's own statistics: the picture shows structure, not colour, that the model found
        rebuilt = rebuilt * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    hidden = output.mask.hidden[:group, :, None]
    grey = torch.zeros_like(patches)
    mixture = unpatchify(mix(patches, output.assignment)[0, :1], grid, patch)
    rows = [
        images,
        unpatchify(torch.where(hidden, grey, patches), grid, patch),
        unpatchify(torch.where(hidden, rebuilt, patches), grid, patch),
    ]
    figure, axes = plt.subplots(3, group + 1, figsize=(1.8 * (group + 1), 5.6), layout="constrained", squeeze=False)
    for row, (title, pictured) in enumerate(zip(("images", "what each gives", "rebuilt"), rows, strict=True)):
        axes[row, 0].set_ylabel(title)
        for column, image in enumerate(shown(pictured), start=1):
            axes[row, column].imshow(image)
    axes[1, 0].imshow(shown(mixture)[0])
    axes[0, 0].imshow(output.assignment[0, 0].view(grid), cmap="tab10", vmin=0, vmax=9)
    axes[0, 0].set_title("owner of each patch", fontsize=8)
    axes[1, 0].set_title("the mixed image", fontsize=8)
    axes[2, 0].set_facecolor("none")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[2, 0].spines[:].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


@torch.no_grad()
def kept_keys(path: Path, model: MixedAE, images: Tensor, seed: int, queries: int = 4) -> None:
    """For a few query patches of the mixed image: in how many heads each key is kept, block by block; a cross marks the query, dots its own image."""
    import matplotlib.pyplot as plt

    kept: dict[int, Tensor] = {}

    def hook(number: int) -> Any:
        def keep(module: Any, _inputs: Any, qkv: Tensor) -> None:
            q, k, _ = qkv.unflatten(-1, (3, model.blocks[number].attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            kept[number] = kept_pairs(q, k, model.count)[0, :, 1:, 1:].float().mean(0)

        return keep

    hooks = [model.blocks[number].attn.qkv.register_forward_hook(hook(number)) for number in sorted(model.homologous)]
    output = look(model, images, seed)
    for handle in hooks:
        handle.remove()
    if output.assignment is None:
        raise ValueError("pictures of mixtures: expected a model that mixes, got MAE")
    owner, side = output.assignment[0, 0], model.side
    figure, axes = plt.subplots(queries, len(kept), figsize=(1.8 * len(kept), 1.9 * queries), layout="constrained", squeeze=False)
    for row, query in enumerate(torch.linspace(0, side**2 - 1, queries + 2)[1:-1].long().tolist()):
        own = (owner == owner[query]).nonzero()[:, 0]
        for column, (number, share) in enumerate(kept.items()):
            axis = axes[row, column]
            axis.imshow(share[query].view(side, side), vmin=0, vmax=1, cmap="magma")
            axis.plot(own % side, own // side, "o", color="white", markersize=1.5)
            axis.plot(query % side, query // side, "x", color="cyan")
            axis.set(xticks=[], yticks=[], title=f"block {number}" if row == 0 else "")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def course(path: Path, history: Sequence[dict[str, Any]], chance: float) -> None:
    """Losses, and the homologous accuracy of each block, over the steps of metrics.jsonl."""
    import matplotlib.pyplot as plt

    steps = [line["step"] for line in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name in ("reconstruction", "contrast"):
        if name in history[-1]:
            left.plot(steps, [line[name] for line in history], label=name)
    for name in sorted(name for name in history[-1] if name.startswith("accuracy_")):
        right.plot(steps, [line[name] for line in history], label=name.replace("accuracy_", "block "))
    right.axhline(chance, color="grey", linestyle=":", label="chance")
    left.set(xlabel="step", title="losses")
    right.set(xlabel="step", title="homologous accuracy")
    left.legend()
    right.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
