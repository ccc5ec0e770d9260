"""Fifty steps of a small model on the fused and on the plain path: the same losses within rounding."""

import pytest
import torch
from torch import nn

from common.contrastive import symmetric_info_nce, unit
from common.kernels.pair_lse import Path
from common.kernels.patch_loss import patch_loss


def losses(path: Path, device: str) -> torch.Tensor:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(12, 8).to(device), nn.Linear(8, 12).to(device)
    log_scale = nn.Parameter(torch.tensor(2.0, device=device))
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters(), log_scale], lr=0.05, momentum=0.9)
    images = torch.randn(4, 3, 4, 4).to(device)
    index = torch.tensor([1, 2], device=device).expand(4, -1)
    patches = images.reshape(4, 3, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(4, 4, 12)
    found = []
    for _ in range(50):
        hidden = encoder(patches).relu()
        pairs = unit(hidden[:, :2].mean(1)), unit(hidden[:, 2:].mean(1))
        loss = (
            symmetric_info_nce(*pairs, log_scale.exp(), path=path) + patch_loss(decoder(hidden[:, 1:3]), images, index, 2, path=path).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("path", ["tiled", "triton"])
def test_training_takes_the_same_course(path: Path, device: str) -> None:
    want, got = losses("plain", device), losses(path, device)
    assert want[-1] < 0.7 * want[0]
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
