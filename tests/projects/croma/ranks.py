"""What one of several processes computes; importable by the processes that tests start."""

from __future__ import annotations

import torch
from torch import Tensor

from common.contrastive import info_nce, unit
from common.masking import Mask, from_noise
from projects.croma.model import CROMA


def contrast_of_rank(rank: int, model: CROMA, radar: Tensor, optical: Tensor) -> dict[str, Tensor]:
    rows = slice(rank * len(radar) // 2, (rank + 1) * len(radar) // 2)
    radar, optical = radar[rows].clone().requires_grad_(), optical[rows].clone().requires_grad_()
    loss = model.contrast(radar, optical)
    loss.backward()
    return {
        f"loss.rank{rank}": loss.detach(),
        f"grad_radar.rank{rank}": radar.grad,
        f"grad_optical.rank{rank}": optical.grad,
        f"grad_logit_scale.rank{rank}": model.logit_scale.grad,
        f"grad_norm_radar_proj.rank{rank}": model.radar_proj.weight.grad.norm(),
    }


def contrast_by_rule(model: CROMA, radar: Tensor, optical: Tensor, world: int) -> dict[str, Tensor]:
    """The same for any number of ranks in one process: keys are all rows, detached."""
    out = {}
    batch = len(radar) // world
    for rank in range(world):
        model.zero_grad()
        own = slice(rank * batch, (rank + 1) * batch)
        mine = [rows[own].clone().requires_grad_() for rows in (radar, optical)]
        queries = [unit(proj(rows)) for proj, rows in zip((model.radar_proj, model.optical_proj), mine, strict=True)]
        keys = [unit(proj(rows)).detach() for proj, rows in ((model.radar_proj, radar), (model.optical_proj, optical))]
        scale = model.logit_scale.exp()
        loss = (info_nce(queries[1], keys[0], scale, offset=own.start) + info_nce(queries[0], keys[1], scale, offset=own.start)) / 2
        loss.backward()
        out |= {f"loss.rank{rank}": loss.detach(), f"grad_radar.rank{rank}": mine[0].grad, f"grad_optical.rank{rank}": mine[1].grad}
        out[f"grad_logit_scale.rank{rank}"] = model.logit_scale.grad
        out[f"grad_norm_radar_proj.rank{rank}"] = model.radar_proj.weight.grad.norm()
    return out


def small(**changes: object) -> CROMA:
    """A seeded model of 16 channels in float64."""
    torch.manual_seed(0)
    return CROMA({"embed_dim": 16, "depth": 2, "num_heads": 4}, decoder_dim=8, decoder_heads=2, **changes).double()


def pairs(batch: int = 8) -> tuple[Tensor, Mask, Mask]:
    """Images (batch, 14, 16, 24) and masks that keep 2 of 6 patches."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 14, 16, 24, generator=generator, dtype=torch.float64)
    return images, *(from_noise(torch.rand(batch, 6, generator=generator), 2) for _ in range(2))


def rows(mask: Mask, part: slice) -> Mask:
    return Mask(mask.hidden[part], mask.order[part], mask.kept)


def gradients(rank: int, gather: str, halves: bool) -> dict[str, Tensor]:
    """Gradients of a step on all pairs, or on this process's half, averaged over the processes as data-parallel training does."""
    images, radar, optical = pairs()
    model = small(gather_gradient=gather)
    part = slice(4 * rank, 4 * rank + 4) if halves else slice(None)
    found = model(images[part], rows(radar, part), rows(optical, part))
    found.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()} | {"loss": found.loss.detach()}
    if halves:
        for grad in grads.values():
            torch.distributed.all_reduce(grad)
            grad /= 2
    return grads


def pretrain(rank: int, out: str) -> dict[str, Tensor]:
    """Weights after two steps on generated scenes."""
    from projects.croma import pretrain as script
    from tests.projects.croma.test_runs import tiny

    return {name: value.clone() for name, value in script.main(tiny(out, batch_size=4)).state_dict().items()}
