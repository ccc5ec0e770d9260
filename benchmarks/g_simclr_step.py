"""A SimCLR step at the paper's CIFAR-10 sizes (ResNet-38, 64 images, two views of 32 x 32, forward twice, NT-Xent, backward, SGD): ours, and as it is usually written.

`python -m benchmarks.steps g_simclr` times both in turn and prints a JSON line each. The plain form keeps PyTorch's default memory layout, trains the biases that batch norms cancel, and writes the loss as a
2B x 2B matrix with a mask, as most SimCLR code does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.timing import Built, Feed, Forms, parameters
from projects.g_simclr.augment import Augmentation
from projects.g_simclr.batches import GuidedBatches
from projects.g_simclr.data import Images
from projects.g_simclr.encoders import pooled
from projects.g_simclr.model import GSimCLR
from projects.g_simclr.pretrain import TwoViews

BATCH, TEMPERATURE = 64, 0.1


def plain_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    """The loss over the whole matrix of similarities, the diagonal masked out."""
    rows = F.normalize(torch.cat([first, second]))
    logits = (rows @ rows.T / TEMPERATURE).masked_fill(torch.eye(len(rows), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(rows)).roll(len(first)))


class Plain(nn.Module):
    """The same layers and weights without our choices."""

    def __init__(self) -> None:
        super().__init__()
        built = GSimCLR(temperature=TEMPERATURE, channels_last=False)
        self.encoder, self.head = built.encoder.requires_grad_(), built.head
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return plain_nt_xent(self.head(pooled(self.encoder(first))), self.head(pooled(self.encoder(second))))


def _built(model: nn.Module) -> Built:
    views = [torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    update = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step() -> Tensor:
        update.zero_grad()
        out = model(*views)
        loss = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        update.step()
        return loss.detach()

    return Built(step, parameters(model))


def configurations() -> dict[str, Forms]:
    """The step, ours and plain, on the same views."""
    return {"ResNet-38, 64 images": {"ours": lambda: _built(GSimCLR(temperature=TEMPERATURE)), "plain": lambda: _built(Plain())}}


def loaders() -> dict[str, Feed]:
    """Guided batches of 64 images in 64 clusters, both views drawn in the loader."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4096, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = Images("drawn", pixels, None, [], torch.zeros(4096, 16, dtype=torch.uint8), "none")
    sampler = GuidedBatches(torch.randint(64, (4096,), generator=generator), BATCH)
    loader = DataLoader(images, batch_sampler=sampler, collate_fn=TwoViews(images, Augmentation()))
    return {"guided batches of 64 of 4,096 images of 32 x 32, two views each": Feed(loader, BATCH)}
