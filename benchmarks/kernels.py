"""Every path of every kernel against eager torch, `torch.compile` of the same code and the peers that are installed, in one run.

`python -m benchmarks.kernels [--only pair_lse patch_loss points topk_attention] [--rounds 7] [--budget 300]` writes `benchmarks/results/<device>/kernels.{json,md}`.
Variants of a case are timed in turn, shuffled anew each round: processor seconds of one thread on a CPU, CUDA events with a cold cache on a GPU.
A ratio is eager's time over the variant's in the same round, so that a busy machine disturbs both alike. Memory is the most that a step
(forward and backward) holds beyond its inputs and their gradients.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import platform
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Step, held
from common import contrastive
from common.checkpoint import write_text
from common.kernels import pair_lse, patch_loss, points, topk_attention

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLD = 2**28
"""Bytes written before each timing on a GPU, to empty its cache."""
MOST_BYTES = {"cpu": 6 * 2**30, "cuda": 40 * 2**30}
"""Plain variants that would hold more are left out."""


@dataclass
class Case:
    """One operation at one size. `variants` compute the same 0-d loss from `leaves`; the first is what ratios refer to."""

    name: str
    what: str
    variants: dict[str, Step]
    leaves: list[Tensor] = field(default_factory=list)
    tolerance: float = 1e-4


# ---------------------------------------------------------------------------------------------------------------- measuring
def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def folder() -> Path:
    """Of this device's records."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def timed(step: Step, leaves: list[Tensor], cold: Tensor | None) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    for leaf in leaves:
        leaf.grad = None
    if cold is None:
        start = time.process_time()
        loss = step()
        middle = time.process_time()
        if leaves:
            loss.backward()
        return middle - start, time.process_time() - middle
    cold.zero_()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    marks[0].record()
    loss = step()
    marks[1].record()
    if leaves:
        loss.backward()
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3


def peak(step: Step, leaves: list[Tensor]) -> int:
    """Most bytes held during a step beyond what was there before, gradients of the leaves counted as there."""
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)

    def whole() -> None:
        loss = step()
        if leaves:
            loss.backward()

    return held(whole)


def measure(case: Case, rounds: int, shuffle: random.Random) -> list[dict[str, Any]]:
    """One record a variant; a variant that fails, or computes something else, is recorded with its reason."""
    cold = torch.empty(COLD, dtype=torch.uint8, device=DEVICE) if DEVICE == "cuda" else None
    working: dict[str, Step] = {}
    records: dict[str, dict[str, Any]] = {}
    wanted: float | None = None
    for name, step in case.variants.items():
        records[name] = {"case": case.name, "what": case.what, "variant": name}
        try:
            for _ in range(20 if cold is not None else 2):
                timed(step, case.leaves, cold)
            value = float(step().detach())
        except Exception as err:
            records[name]["failed"] = f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"[:200]
            continue
        wanted = value if wanted is None else wanted
        records[name]["relative_difference"] = abs(value - wanted) / max(abs(wanted), 1e-30)
        if records[name]["relative_difference"] > case.tolerance:
            records[name]["failed"] = f"computes {value}, the first variant {wanted}"
            continue
        working[name] = step
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in working}
    for _ in range(rounds):
        order = list(working)
        shuffle.shuffle(order)
        for name in order:
            times[name].append(timed(working[name], case.leaves, cold))
    first = next(iter(working), None)
    for name in working:
        forward, backward = zip(*times[name], strict=True)
        whole = [sum(pair) for pair in times[name]]
        record = records[name]
        record |= {
            "forward_s": spread(forward),
            "backward_s": spread(backward),
            "seconds": spread(whole),
            "peak_bytes": peak(working[name], case.leaves),
        }
        record["ratio"] = spread([sum(base) / own for base, own in zip(times[first], whole, strict=True)])
        record["times_of_first"] = first
    return list(records.values())


def spread(values: Any) -> dict[str, float]:
    """10th, 50th and 90th percentile."""
    values = list(values)
    if len(values) == 1:
        return dict.fromkeys(("p10", "p50", "p90"), values[0])
    cuts = quantiles(values, n=10, method="inclusive")
    return {"p10": cuts[0], "p50": cuts[4], "p90": cuts[8]}


# ---------------------------------------------------------------------------------------------------------------- contrast
def rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=1).to(DEVICE, dtype).requires_grad_()


def eager_symmetric(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """CLIP as everybody writes it."""
    logits = scale * (a @ b.T)
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits.float(), target) + F.cross_entropy(logits.T.float(), target)) / 2


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def ours(count: int, keys: int, width: int, size: int) -> list[pair_lse.Path]:
    """Our paths that make sense at a size."""
    paths: list[pair_lse.Path] = ["plain"] if count * keys * 4 * 6 <= MOST_BYTES[DEVICE] else []
    paths.append("tiled")
    return [*paths, "triton"] if DEVICE == "cuda" and width <= 512 else paths


def peers(a: Tensor, b: Tensor, scale: Tensor) -> dict[str, Step]:
    """Installed libraries that compute the symmetric loss, or both of its directions."""
    target = torch.arange(len(a), device=a.device)
    found: dict[str, Step] = {}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy twice"] = (
            lambda: (F.linear_cross_entropy(a * scale, b, target) + F.linear_cross_entropy(b * scale, a, target)) / 2
        )
    if DEVICE == "cpu":
        return found

    def half(rows: Tensor) -> Tensor:
        return rows.bfloat16()

    def add(name: str, module: str, make: Callable[[Any], Step]) -> None:
        with contextlib.suppress(ImportError):
            found[name] = make(importlib.import_module(module))

    chunk = min(256, a.shape[1])  # inf-cl works on pieces of the width; its losses come a row each
    add(
        "inf-cl",
        "inf_cl",
        lambda peer: lambda: (
            (peer.cal_flash_loss(a, b, scale=scale, head_dim=chunk) + peer.cal_flash_loss(b, a, scale=scale, head_dim=chunk)).mean() / 2
        ),
    )
    add(
        "cut-cross-entropy (bf16)",
        "cut_cross_entropy",
        lambda peer: lambda: (
            (
                peer.linear_cross_entropy(half(a * scale), half(b), target, impl="cce", filter_eps=None)
                + peer.linear_cross_entropy(half(b * scale), half(a), target, impl="cce", filter_eps=None)
            )
            / 2
        ),
    )
    add(
        "Liger fused linear",
        "liger_kernel.transformers",
        lambda peer: lambda: (
            (peer.LigerFusedLinearCrossEntropyLoss()(b, a * scale, target) + peer.LigerFusedLinearCrossEntropyLoss()(a, b * scale, target))
            / 2
        ),
    )
    if a.shape[1] <= 256:
        from torch.nn.attention.flex_attention import flex_attention

        attend = torch.compile(flex_attention)
        value = torch.zeros(1, 1, len(a), 16, device=a.device, dtype=a.dtype)

        def directed(query: Tensor, key: Tensor) -> Tensor:
            _, lse = attend(query[None, None] * scale, key[None, None], value, scale=1.0, return_lse=True)
            return (lse[0, 0] - scale * (query * key).sum(1)).mean()

        found["FlexAttention lse"] = lambda: (directed(a, b) + directed(b, a)) / 2
    return found


def symmetric_case(count: int, width: int, dtype: torch.dtype = torch.float32) -> Case:
    a, b = rows(count, width, 0, dtype), rows(count, width, 1, dtype)
    scale = torch.tensor(1 / 0.07, device=DEVICE, requires_grad=True)
    steps: dict[str, Step] = {}
    if count * count * 4 * 6 <= MOST_BYTES[DEVICE]:
        whole = compiled(eager_symmetric)
        steps |= {"eager": lambda: eager_symmetric(a, b, scale), "torch.compile": lambda: whole(a, b, scale)}
        if DEVICE == "cuda" and dtype == torch.float32:

            def autocast() -> Tensor:
                with torch.autocast("cuda", torch.bfloat16):
                    return eager_symmetric(a, b, scale)

            steps["eager, bf16 autocast"] = autocast
    for path in ours(count, count, width, a.element_size()):
        steps[f"ours, {path}"] = lambda path=path: contrastive.symmetric_info_nce(a, b, scale, path=path)
    if dtype == torch.float32:
        steps |= peers(a, b, scale)
    kind = "" if dtype == torch.float32 else " bf16"
    # half-precision peers round their operands; the bound only has to tell a wrong loss from a rounded one
    return Case(
        f"symmetric InfoNCE {count} x {width}{kind}", "CLIP, CROMA, HiCMAE", steps, [a, b, scale], 1e-4 if DEVICE == "cpu" else 2e-2
    )


def nt_xent_case(pairs: int, width: int) -> Case:
    a, b = rows(pairs, width, 0), rows(pairs, width, 1)

    def eager(a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([a, b])
        logits = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
        return F.cross_entropy(logits, torch.arange(2 * pairs, device=z.device).roll(pairs))

    whole = compiled(eager)
    steps: dict[str, Step] = {"eager": lambda: eager(a, b), "torch.compile": lambda: whole(a, b)}
    for path in ours(2 * pairs, 2 * pairs, width, 4):
        steps[f"ours, {path}"] = lambda path=path: contrastive.nt_xent(a, b, 2.0, path=path)
    return Case(f"NT-Xent {pairs} pairs x {width}", "SimCLR, G-SimCLR", steps, [a, b])


def queue_case(count: int, length: int, width: int) -> Case:
    query, key, queue = rows(count, width, 0), rows(count, width, 1).detach(), rows(length, width, 2).detach()

    def eager(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.07
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))

    whole = compiled(eager)
    steps: dict[str, Step] = {"eager": lambda: eager(query, key, queue), "torch.compile": lambda: whole(query, key, queue)}
    for path in ours(count, length, width, 4):
        steps[f"ours, {path}"] = lambda path=path: contrastive.queue_info_nce(query, key, queue, 1 / 0.07, path=path)
    return Case(f"MoCo {count} x {length} x {width}", "MoCo, Point-CMAE's MAE + CL", steps, [query])


def constant_keys_case(count: int, keys: int, width: int) -> Case:
    query, key = rows(count, width, 0), rows(keys, width, 1).detach()

    def eager(query: Tensor, key: Tensor) -> Tensor:
        return F.cross_entropy(query @ key.T / 0.07, torch.arange(len(query), device=query.device))

    whole = compiled(eager)
    steps: dict[str, Step] = {"eager": lambda: eager(query, key), "torch.compile": lambda: whole(query, key)}
    for path in ours(count, keys, width, 4):
        steps[f"ours, {path}"] = lambda path=path: contrastive.info_nce(query, key, 1 / 0.07, path=path)
    return Case(f"one way {count} x {keys} x {width}, keys constant", "one rank of CROMA", steps, [query])


def neighbours_case(nodes: int, width: int, entries: int) -> Case:
    """SCGC's contrast term; the dense form is the reference implementation's."""
    z = rows(nodes, width, 0)
    index = torch.randint(nodes, (2, entries), generator=torch.Generator().manual_seed(3)).unique(dim=1).to(DEVICE)
    value = torch.full((index.shape[1],), nodes / index.shape[1], device=DEVICE)
    dense = torch.sparse_coo_tensor(index, value, (nodes, nodes), check_invariants=False).to_dense()

    def eager(z: Tensor, dense: Tensor) -> Tensor:
        similarity = z @ z.T
        e = (0.25 * (similarity - torch.diag_embed(torch.diagonal(similarity)))).exp()
        return -((dense * e).sum(1) / e.sum(1) + 1e-8).log().mean()

    whole = compiled(eager)
    steps: dict[str, Step] = {"eager": lambda: eager(z, dense), "torch.compile": lambda: whole(z, dense)}
    for path in ours(nodes, nodes, width, 4):
        steps[f"ours, {path}"] = lambda path=path: contrastive.weighted_positives(z, index, value, 0.25, path=path).loss
    return Case(f"SCGC contrast {nodes} nodes x {width}, {index.shape[1]} entries", "SCGC", steps, [z])


def contrast_cases() -> Iterator[Case]:
    if DEVICE == "cpu":
        for count, width in ((512, 128), (1024, 128), (4096, 128), (8192, 256)):
            yield symmetric_case(count, width)
        yield nt_xent_case(2048, 128)
        yield queue_case(128, 65536, 128)
        yield constant_keys_case(900, 7200, 768)
        yield neighbours_case(3025, 10, 30_000)
        yield neighbours_case(9298, 10, 52_000)
        return
    for count, width in ((1024, 128), (4096, 128), (4096, 256), (16384, 256), (32768, 128), (8192, 768)):
        yield symmetric_case(count, width)
    yield symmetric_case(16384, 256, torch.bfloat16)
    yield nt_xent_case(4096, 128)
    yield queue_case(256, 65536, 128)
    yield constant_keys_case(900, 7200, 768)
    yield neighbours_case(9298, 10, 52_000)


def growth() -> list[dict[str, Any]]:
    """Most bytes of a step of the symmetric loss against the batch, ours and eager's."""
    counts = (1024, 2048, 4096, 8192, 16384) if DEVICE == "cpu" else (4096, 16384, 65536, 262144)
    out = []
    for count in counts:
        a, b = rows(count, 128, 0), rows(count, 128, 1)
        path: pair_lse.Path = "triton" if DEVICE == "cuda" else "tiled"

        def step(a: Tensor = a, b: Tensor = b, path: pair_lse.Path = path) -> Tensor:
            return contrastive.symmetric_info_nce(a, b, 10.0, path=path)

        record = {"rows": count, "ours_bytes": peak(step, [a, b])}
        if count * count * 4 * 6 <= MOST_BYTES[DEVICE]:
            scale = torch.tensor(10.0, device=DEVICE)
            record["eager_bytes"] = peak(lambda a=a, b=b, scale=scale: eager_symmetric(a, b, scale), [a, b])
        out.append(record)
    return out


# ---------------------------------------------------------------------------------------------------------------- patches
def patch_case(name: str, shape: tuple[int, ...], patch: tuple[int, ...], hidden: float, **options: Any) -> Case:
    random_numbers = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=random_numbers).to(DEVICE)
    space = (1, *shape[2:]) if len(shape) == 4 else shape[2:]
    sides = (1, *patch) if len(patch) == 2 else patch
    count = int(torch.tensor([size // side for size, side in zip(space, sides, strict=True)]).prod())
    index = torch.stack([torch.randperm(count, generator=random_numbers)[: int(count * hidden)].sort().values for _ in range(shape[0])]).to(
        DEVICE
    )
    pred = (
        torch.randn(shape[0], index.shape[1], shape[1] * int(torch.tensor(sides).prod()), generator=random_numbers)
        .to(DEVICE)
        .requires_grad_()
    )
    channel = options.get("normalise") == "channel"
    undo = {key: torch.tensor(options[key], device=DEVICE) for key in ("mean", "std") if key in options}

    def eager(pred: Tensor, image: Tensor, index: Tensor) -> Tensor:
        """As the MAE repositories do: targets of all patches, then the hidden ones."""
        x = image if image.ndim == 5 else image[:, :, None]
        if undo:
            x = x * undo["std"][:, None, None, None] + undo["mean"][:, None, None, None]
        b, c, t, h, w = x.shape
        x = x.reshape(b, c, t // sides[0], sides[0], h // sides[1], sides[1], w // sides[2], sides[2])
        x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, count, -1, c)
        if channel:
            x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True).sqrt() + 1e-6)
        else:
            x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-6).sqrt()
        target = x.flatten(2).gather(1, index[..., None].expand(-1, -1, pred.shape[-1]))
        return (pred - target).square().mean(-1).mean()

    whole = compiled(eager)
    steps: dict[str, Step] = {"eager": lambda: eager(pred, image, index), "torch.compile": lambda: whole(pred, image, index)}
    paths: list[patch_loss.Path] = ["plain", "tiled", *(("triton",) if DEVICE == "cuda" else ())]
    for path in paths:
        steps[f"ours, {path}"] = lambda path=path: patch_loss.patch_loss(pred, image, index, patch, path=path, **options).mean()
    return Case(name, "pixel MAEs", steps, [pred])


def patch_cases() -> Iterator[Case]:
    batch = 8 if DEVICE == "cpu" else 128
    hicmae = {"normalise": "channel", "eps_inside": False, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    yield patch_case(f"patch loss, {batch} images of 224", (batch, 3, 224, 224), (16, 16), 0.75)
    yield patch_case(f"patch loss, {batch // 2} clips of 16 x 160", (batch // 2, 3, 16, 160, 160), (2, 16, 16), 0.9, **hicmae)


# ---------------------------------------------------------------------------------------------------------------- points
def clouds(batch: int, count: int) -> Tensor:
    return (torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(DEVICE)


def farthest_case(batch: int, count: int, picks: int) -> Case:
    cloud = clouds(batch, count)
    order = points._tie_order(count, cloud.device)

    def eager() -> Tensor:
        return order[points._farthest_reference(cloud[:, order], picks)].sum().float()

    steps: dict[str, Step] = {"eager": eager}
    paths: list[points.Path] = ["tiled", *(("triton",) if DEVICE == "cuda" else ())]
    for path in paths:
        steps[f"ours, {path}"] = lambda path=path: points.farthest_points(cloud, picks, path=path).sum().float()
    if importlib.util.find_spec("pointnet2_ops") and DEVICE == "cuda":
        steps["pointnet2_ops"] = lambda: points.farthest_points(cloud, picks, path="pointnet2").sum().float()
    # other libraries follow other rules (start, origin), so only their time means anything: a bound that lets any index through
    if importlib.util.find_spec("pytorch3d"):
        sample = importlib.import_module("pytorch3d.ops").sample_farthest_points
        steps["pytorch3d (other rules)"] = lambda: sample(cloud, K=picks)[1].sum().float()
    return Case(f"farthest points {batch} x {count} -> {picks}", "Point-CMAE", steps, tolerance=0.5)


def neighbour_case(batch: int, count: int, groups: int, k: int) -> Case:
    cloud = clouds(batch, count)
    centres = cloud[:, :groups].contiguous()

    def eager(cloud: Tensor, centres: Tensor) -> Tensor:
        distance, index = torch.cdist(centres, cloud).topk(k, largest=False)
        group = cloud[torch.arange(len(cloud), device=cloud.device)[:, None, None], index] - centres[:, :, None]
        return distance.sum() + group.square().sum()

    def mine(path: points.Path) -> Tensor:
        found = points.knn_group(cloud, centres, k, path=path)
        return found.distance.sum() + found.neighbourhood.square().sum()

    whole = compiled(eager)
    steps: dict[str, Step] = {"eager (cdist, topk)": lambda: eager(cloud, centres), "torch.compile": lambda: whole(cloud, centres)}
    paths: list[points.Path] = ["plain", "tiled", *(("triton",) if DEVICE == "cuda" else ())]
    for path in paths:
        steps[f"ours, {path}"] = lambda path=path: mine(path)
    return Case(f"{k} neighbours of {groups} among {batch} x {count}", "Point-CMAE", steps, tolerance=1e-3)


def chamfer_case(pairs: int, count: int) -> Case:
    a, b = clouds(pairs, count).requires_grad_(), clouds(pairs, count).flip(0).contiguous().requires_grad_()

    def eager(a: Tensor, b: Tensor) -> Tensor:
        squared = (a[:, :, None] - b[:, None]).square().sum(-1)
        return squared.amin(2).mean() + squared.amin(1).mean()

    whole = compiled(eager)
    steps: dict[str, Step] = {"eager": lambda: eager(a, b), "torch.compile": lambda: whole(a, b)}
    paths: list[points.Path] = ["plain", "tiled", *(("triton",) if DEVICE == "cuda" else ())]
    for path in paths:
        steps[f"ours, {path}"] = lambda path=path: points.chamfer(a, b, path=path)
    return Case(f"chamfer of {pairs} pairs of {count}", "Point-CMAE", steps, [a, b])


def point_cases() -> Iterator[Case]:
    batch = 4 if DEVICE == "cpu" else 128
    yield farthest_case(batch, 1024, 64)
    yield farthest_case(batch if DEVICE == "cpu" else 32, 8192, 1200)
    yield neighbour_case(batch, 1024, 64, 32)
    yield chamfer_case(76 * batch, 32)


# ---------------------------------------------------------------------------------------------------------------- top-k attention
def topk_case(sequences: int, heads: int, patches: int, width: int, count: int) -> Case:
    random = torch.Generator().manual_seed(0)
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(sequences, heads, 1 + patches, width, generator=random).to(DEVICE, dtype).requires_grad_() for _ in range(3))
    upstream = torch.randn(q.shape, generator=random).to(DEVICE)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Top-k, scattered to a mask, softmax."""
        scores = (q @ k.mT) * width**-0.5
        best = scores[..., 1:, 1:].topk(count, -1).indices
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep[..., 1:, 1:] = torch.zeros_like(keep[..., 1:, 1:]).scatter_(-1, best, True)
        return ((scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v).float() * upstream).sum()

    whole = torch.compile(eager, dynamic=False)
    steps: dict[str, Step] = {"eager": lambda: eager(q, k, v), "torch.compile": lambda: whole(q, k, v)}
    paths: list[topk_attention.Path] = ["tiled", *(("triton",) if DEVICE == "cuda" else ())]
    for path in paths:
        steps[f"ours, {path}"] = lambda path=path: ((topk_attention.topk_attention(q, k, v, count, path=path).out.float() * upstream).sum())
    # another function, so only its time means anything: the bound lets any value through
    steps["ordinary attention (SDPA)"] = lambda: (F.scaled_dot_product_attention(q, k, v).float() * upstream).sum()
    return Case(f"{count} of {patches} keys, {sequences} x {heads} heads x {width}", "MixedAE", steps, [q, k, v], tolerance=1e9)


def topk_cases() -> Iterator[Case]:
    yield topk_case(8 if DEVICE == "cpu" else 256, 12, 196, 64, 49)
    yield topk_case(8 if DEVICE == "cpu" else 256, 4, 64, 24 if DEVICE == "cpu" else 32, 16)


# ---------------------------------------------------------------------------------------------------------------- record and table
GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "pair_lse": contrast_cases,
    "patch_loss": patch_cases,
    "points": point_cases,
    "topk_attention": topk_cases,
}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for module in ("triton", "inf_cl", "cut_cross_entropy", "liger_kernel", "pytorch3d", "pointnet2_ops"):
        if importlib.util.find_spec(module):
            found[module] = getattr(importlib.import_module(module), "__version__", "installed")
    return found


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    how = "processor seconds of one thread" if record["kind"] == "cpu" else "CUDA events, cold cache"
    lines = [
        f"# Kernels on {record['device']}",
        "",
        f"Rendered from `kernels.json` ({record['date']}, torch {record['versions']['torch']}); {how}, forward and backward, {record['rounds']} shuffled rounds.",
        "Times faster: the first variant's time over this one's in the same round, median (10th to 90th percentile). Memory: most held beyond inputs and their gradients.",
        "",
        "| case | variant | times faster | milliseconds | memory (MiB) | memory against the first |",
        "|---|---|---|---|---|---|",
    ]
    firsts = {row["case"]: row for row in reversed(record["cases"]) if "ratio" in row}
    for row in record["cases"]:
        if "failed" in row:
            lines.append(f"| {row['case']} | {row['variant']} | not measured: {row['failed']} | | | |")
            continue
        ratio, size, first = row["ratio"], row["peak_bytes"] / 2**20, firsts[row["case"]]["peak_bytes"]
        share = f"{100 * row['peak_bytes'] / first:.0f} %" if first else ""
        faster = f"{ratio['p50']:.2f} ({ratio['p10']:.2f}–{ratio['p90']:.2f})"
        lines.append(f"| {row['case']} | {row['variant']} | {faster} | {1e3 * row['seconds']['p50']:.2f} | {size:.1f} | {share} |")
    if record["growth"]:
        lines += [
            "",
            "Memory of the symmetric loss against its rows (width 128):",
            "",
            "| rows | ours (MiB) | eager (MiB) |",
            "|---|---|---|",
        ]
        for row in record["growth"]:
            eager = f"{row['eager_bytes'] / 2**20:.0f}" if "eager_bytes" in row else "not run"
            lines.append(f"| {row['rows']} | {row['ours_bytes'] / 2**20:.0f} | {eager} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> Path:
    """Measure, write both files, return the table's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=7 if DEVICE == "cpu" else 50)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further case is begun")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    shuffle = random.Random(0)
    found: list[dict[str, Any]] = []
    began, left_out = time.monotonic(), 0
    for group in options.only:
        for case in GROUPS[group]():
            if time.monotonic() - began > options.budget:
                left_out += 1
                continue
            torch.compiler.reset()
            measured = measure(case, options.rounds, shuffle)
            for row in measured:
                result = (
                    row.get("failed")
                    or f"{row['ratio']['p50']:.2f} times, {1e3 * row['seconds']['p50']:.2f} ms, {row['peak_bytes'] / 2**20:.1f} MiB"
                )
                print(f"{row['case']:<48} {row['variant']:<30} {result}", flush=True)
            found += measured
    name = device_name()
    record = {
        "device": name,
        "kind": DEVICE,
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.rounds,
        "cases_left_out_for_time": left_out,
        "versions": versions(),
        "tiles": {"forward": pair_lse.FORWARD_TILES, "backward": pair_lse.BACKWARD_TILES},
        "cases": found,
        "growth": growth() if "pair_lse" in options.only else [],
    }
    write_text(folder() / "kernels.json", json.dumps(record, indent=1) + "\n")
    write_text(folder() / "kernels.md", table(record))
    print(f"wrote {folder() / 'kernels.md'}")
    return folder() / "kernels.md"


if __name__ == "__main__":
    main()
