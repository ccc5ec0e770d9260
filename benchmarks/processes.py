"""Two processes against one at the same global batch: `python -m benchmarks.processes` prints one JSON line a case.

A case is a training step whose loss sees the global batch (gathered rows, DDP): CPU processes of one thread each over gloo, or two GPUs over nccl.
Ideal is a speed-up of 2; what is missing is the gather, the reduction of gradients, and work that every process repeats. Wall seconds: run it on an idle machine.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.blocks import Blocks
from common.contrastive import nt_xent, symmetric_info_nce, unit

ROUNDS, WARM_UP = 9, 2


class Towers(nn.Module):
    """Two small transformers over 16 tokens of width 128, contrasted over the global batch (CLIP, CROMA, HiCMAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(Blocks(128, 2, 4) for _ in range(2))

    def forward(self, pairs: Tensor) -> Tensor:
        a, b = (unit(tower(pairs[:, side]).tokens.mean(1)) for side, tower in enumerate(self.towers))
        return symmetric_info_nce(a, b, 10.0, gather="full")


class Head(nn.Module):
    """Little besides the contrast: a linear map, then NT-Xent over the global batch (SimCLR, G-SimCLR)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(128, 128)

    def forward(self, pairs: Tensor) -> Tensor:
        a, b = unit(self.head(pairs)).unbind(1)
        return nt_xent(a, b, 2.0, gather="full")


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two towers of 2 blocks, 512 pairs of 16 tokens": (Towers, (512, 2, 16, 128)),
    "NT-Xent alone, 4,096 pairs of width 128": (Head, (4096, 2, 128)),
}


def _worker(rank: int, world: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(minutes=5),
    )
    found: dict[str, Any] = {}
    for name, (make, shape) in CASES.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(make().to(device))
        everything = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        own = everything.chunk(world)[rank].to(device)
        times = []
        for number in range(WARM_UP + ROUNDS):
            dist.barrier()
            began = time.perf_counter()
            model.zero_grad()
            loss = model(own)
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            if number >= WARM_UP:
                times.append(time.perf_counter() - began)
        shared = loss.detach() / world
        dist.all_reduce(shared)
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        found[name] = {"seconds": median(times), "loss": float(shared), "gradient_norm": float(norm)}
        del model
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure() -> list[dict[str, Any]]:
    """One line a case: wall seconds of one process and of two, their ratio, and how far loss and gradient norm are apart."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        return []  # two processes on one GPU would say nothing
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            out = f"{folder}/{world}.json"
            mp.spawn(_worker, args=(world, f"{folder}/meet-{world}", out), nprocs=world)
            found[world] = json.loads(Path(out).read_text())
    return [
        {
            "case": name,
            "one_process_s": round(one["seconds"], 5),
            "two_processes_s": round(two["seconds"], 5),
            "speed_up": round(one["seconds"] / two["seconds"], 2),
            "relative_difference_of_loss": abs(two["loss"] / one["loss"] - 1),
            "relative_difference_of_gradient_norm": abs(two["gradient_norm"] / one["gradient_norm"] - 1),
        }
        for name, one, two in ((name, found[1][name], found[2][name]) for name in CASES)
    ]


if __name__ == "__main__":
    for line in measure():
        print(json.dumps(line))
