"""Graphs as sorted edge lists, and the message-passing layers of GraphMAE's reference in its exact order (paper Sec. 3.2, App.; reference `models/`).

A message flows source -> target; row 0 of `edge_index` is the source. Every layer has two paths that give the same numbers:

- `plain`: one message an edge, gathered and added up, as written in most graph libraries;
- `efficient`: sparse-dense products over edges sorted by target (CSR), with the transposed order kept for the backward pass; no tensor of
  edges × channels exists. `rows` then restricts a layer to the targets whose output is needed.

Parameter names are those of the reference, so its checkpoints load by name.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Path = Literal["plain", "efficient"]
warnings.filterwarnings("ignore", message="Sparse (CSR|CSC|invariant)")  # torch's notes that the layout is young and its checks are off


# -- graph -------------------------------------------------------------------------------------------------------------


@dataclass
class Graph:
    """Directed edges sorted by target, as a CSR matrix of `targets` × `sources`.

    `source`, `target`: (E,) int64. `start`: (targets + 1,) int32, where each target's edges begin. `rows`: (targets,) the node that each
    target is, or None when targets and sources are the same nodes 0..N-1. `order`: (E,) place of each edge in the list that was given.
    """

    source: Tensor
    target: Tensor
    start: Tensor
    sources: int
    rows: Tensor | None = None
    order: Tensor | None = None
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_edges(cls, edge_index: Tensor, nodes: int) -> Graph:
        """Sort the edges (2, E) of a graph of `nodes` nodes by target; the order of a target's edges stays.

        Raises:
            ValueError: wrong shape or dtype, an end outside 0..nodes-1 (the first such edge is named), or a node without incoming edge.
        """
        if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point() or edge_index.dtype == torch.bool:
            raise ValueError(f"edge_index: expected integers (2, E), found {tuple(edge_index.shape)} {edge_index.dtype}")
        edge_index = edge_index.long()
        bad = ((edge_index < 0) | (edge_index >= nodes)).any(0)
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(f"edge_index: expected nodes 0 to {nodes - 1}, found edge {at}: {edge_index[0, at]} -> {edge_index[1, at]}")
        target, order = edge_index[1].sort(stable=True)
        graph = cls(edge_index[0][order], target, _starts(target, nodes), nodes, order=order)
        lonely = int((graph.start.diff() == 0).sum())
        if lonely:
            raise ValueError(f"{lonely} of {nodes} nodes have no incoming edge; add self-loops (prepare(...)) before the encoder")
        return graph

    @property
    def targets(self) -> int:
        return len(self.start) - 1

    @property
    def column(self) -> Tensor:
        """(E,) int32 source of each edge, the form that the sparse products take."""
        if "column" not in self._kept:
            self._kept["column"] = self.source.int()
        return self._kept["column"]

    @property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Edge order by source (E,), where each source's edges begin (sources + 1,), and the targets in that order (E,) int32."""
        if "transposed" not in self._kept:
            source, order = self.source.sort(stable=True)
            self._kept["transposed"] = order, _starts(source, self.sources), self.target[order].int()
        return self._kept["transposed"]

    @property
    def in_degree(self) -> Tensor:
        return self.start.diff().long()

    @property
    def out_degree(self) -> Tensor:
        return torch.bincount(self.source, minlength=self.sources)

    def into(self, rows: Tensor) -> Graph:
        """The edges into `rows` only, int64 and rising; sources keep their numbers."""
        local = torch.full((self.targets,), -1, device=rows.device)
        local[rows] = torch.arange(len(rows), device=rows.device)
        target = local[self.target]
        keep = target >= 0
        target = target[keep]
        part = Graph(self.source[keep], target, _starts(target, len(rows)), self.sources, rows)
        order, _, _ = self.transposed
        number = keep.cumsum(0) - 1  # new number of each edge that stays: the kept order need not be sorted again
        order = number[order[keep[order]]]
        source = part.source[order]
        part._kept["transposed"] = order, _starts(source, self.sources), target[order].int()
        return part

    def with_edges(self, kept: Tensor) -> Graph:
        """Keep the edges of the mask or the numbers `kept` (in this graph's order), then add one self-loop to every node (drop-edge)."""
        loop = torch.arange(self.sources, device=self.source.device)
        edges = torch.stack([torch.cat([self.source[kept], loop]), torch.cat([self.target[kept], loop])])
        target, order = edges[1].sort(stable=True)
        return Graph(edges[0][order], target, _starts(target, self.targets), self.sources)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Graph:
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            return tuple(moved(v) for v in value) if isinstance(value, tuple) else value

        kept = {name: moved(value) for name, value in self._kept.items()}
        return Graph(moved(self.source), moved(self.target), moved(self.start), self.sources, moved(self.rows), moved(self.order), kept)


def _starts(rising: Tensor, count: int) -> Tensor:
    """(count + 1,) int32: number of entries of `rising` below each of 0..count."""
    start = torch.zeros(count + 1, dtype=torch.int32, device=rising.device)
    start[1:] = torch.bincount(rising, minlength=count).cumsum(0)
    return start


def prepare(edge_index: Tensor, nodes: int) -> Tensor:
    """Remove self-loops, then add exactly one to every node (Sec. 3.2 of the reference's data preparation)."""
    edge_index = edge_index[:, edge_index[0] != edge_index[1]]
    loop = torch.arange(nodes, device=edge_index.device, dtype=edge_index.dtype)
    return torch.cat([edge_index, loop.expand(2, -1)], dim=1)


# -- products over edges -----------------------------------------------------------------------------------------------


def _csr(start: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(start, column, value, shape, check_invariants=False)


def _sum_forward(graph: Graph, weight: Tensor, value: Tensor) -> Tensor:
    """Sources into targets: weight (H, E), value (sources, H, C) -> (targets, H, C)."""
    out = value.new_empty(graph.targets, *value.shape[1:])
    for h, alpha in enumerate(weight):
        torch.mm(_csr(graph.start, graph.column, alpha, (graph.targets, graph.sources)), value[:, h], out=out[:, h])
    return out


def _sum_backward(graph: Graph, weight: Tensor, value: Tensor) -> Tensor:
    """Targets back into sources: weight (H, E), value (targets, H, C) -> (sources, H, C)."""
    order, start, column = graph.transposed
    out = value.new_empty(graph.sources, *value.shape[1:])
    for h, alpha in enumerate(weight):
        torch.mm(_csr(start, column, alpha[order], (graph.sources, graph.targets)), value[:, h], out=out[:, h])
    return out


def _edge_dots(graph: Graph, left: Tensor, right: Tensor) -> Tensor:
    """left (targets, H, C), right (sources, H, C) -> (E, H)."""
    pattern = _csr(graph.start, graph.column, left.new_zeros(len(graph.source)), (graph.targets, graph.sources))
    return torch.stack(
        [torch.sparse.sampled_addmm(pattern, left[:, h], right[:, h].t(), beta=0.0).values() for h in range(left.shape[1])], dim=1
    )


class _WeightedSum(torch.autograd.Function):
    """out[v, h] = sum over edges u -> v of weight[e, h] · value[u, h]; weight (E, H), value (sources, H, C), out (targets, H, C)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, graph: Graph) -> Tensor:
        ctx.graph = graph
        by_head = weight.t().contiguous()
        ctx.save_for_backward(by_head, value)
        return _sum_forward(graph, by_head, value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        graph, (by_head, value) = ctx.graph, ctx.saved_tensors
        grad = grad.contiguous()
        d_weight = _edge_dots(graph, grad, value) if ctx.needs_input_grad[0] else None
        return d_weight, _sum_backward(graph, by_head, grad) if ctx.needs_input_grad[1] else None, None


def weighted_sum(graph: Graph, weight: Tensor, value: Tensor, path: Path) -> Tensor:
    """Sum of the sources' values into each target; weight (E, H), value (sources, H, C) -> (targets, H, C)."""
    if path == "efficient":
        if value.dtype in (torch.float16, torch.bfloat16) or weight.dtype != value.dtype:  # sparse products: full precision only
            weight, value = weight.float(), value.float()
        return _WeightedSum.apply(weight, value.contiguous(), graph)
    message = weight[..., None] * value[graph.source]
    return message.new_zeros(graph.targets, *value.shape[1:]).index_add(0, graph.target, message)


class _EdgeDots(torch.autograd.Function):
    """out[e, h] = <left[v, h], right[u, h]> for each edge u -> v; left (targets, H, C), right (sources, H, C), out (E, H)."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, graph: Graph) -> Tensor:
        ctx.graph = graph
        ctx.save_for_backward(left, right)
        return _edge_dots(graph, left, right)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        by_head = grad.t().contiguous()
        return _sum_forward(ctx.graph, by_head, right), _sum_backward(ctx.graph, by_head, left), None


def edge_dots(graph: Graph, left: Tensor, right: Tensor, path: Path) -> Tensor:
    """Dot products (E, H) of the targets' values (targets, H, C) with the sources' (sources, H, C)."""
    if path == "efficient":
        if left.dtype in (torch.float16, torch.bfloat16):
            left, right = left.float(), right.float()
        return _EdgeDots.apply(left.contiguous(), right.contiguous(), graph)
    return (left[graph.target] * right[graph.source]).sum(-1)


class _NeighbourSum(torch.autograd.Function):
    """out[v] = sum over edges u -> v of value[u]; value (sources, C)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, graph: Graph) -> Tensor:
        ctx.graph = graph
        return _csr(graph.start, graph.column, value.new_ones(len(graph.source)), (graph.targets, graph.sources)) @ value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _, start, column = ctx.graph.transposed
        return _csr(start, column, grad.new_ones(len(column)), (ctx.graph.sources, ctx.graph.targets)) @ grad.contiguous(), None


def neighbour_sum(graph: Graph, value: Tensor, path: Path) -> Tensor:
    """Sum of the sources' values (sources, C) into each target: (targets, C)."""
    if path == "efficient":
        return _NeighbourSum.apply(value.float() if value.dtype in (torch.float16, torch.bfloat16) else value, graph)
    return value.new_zeros(graph.targets, value.shape[1]).index_add(0, graph.target, value[graph.source])


def edge_softmax(graph: Graph, score: Tensor) -> Tensor:
    """Softmax of score (E, H) over the incoming edges of each target."""
    index = graph.target[:, None].expand_as(score)
    top = score.new_full((graph.targets, score.shape[1]), -torch.inf).scatter_reduce(0, index, score.detach(), "amax")
    exp = (score - top[graph.target]).exp()
    return exp / exp.new_zeros(top.shape).index_add(0, graph.target, exp)[graph.target]


# -- activation, dropout, norm -----------------------------------------------------------------------------------------


class _PReLU(torch.autograd.Function):
    """torch's PReLU with one slope; on a CPU torch 2.15 needs 20 times the time (its slope gradient is not vectorised)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        grad = grad.contiguous()
        d_x = torch.ops.aten.leaky_relu_backward(grad, x, slope.item(), False)
        return d_x, torch.dot(grad.flatten(), x.clamp(max=0).flatten()).reshape(slope.shape)


class PReLU(nn.PReLU):
    """One learned slope, start 0.25."""

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.is_cuda or not x.is_contiguous() or torch.is_autocast_enabled(x.device.type)
        ):  # reading the slope would stop a GPU's queue, and its own kernel is good
            return F.prelu(x, self.weight)
        return _PReLU.apply(x, self.weight.to(x.dtype))


def keep_mask(shape: tuple[int, ...] | torch.Size, p: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Dropout's factor: 0 with probability p, else 1 / (1 - p), from torch's global generator of that device.

    On a CPU 16 random bits decide (p to within 2^-16, the factor is that of the p used): a fourth of the time of torch's dropout.
    """
    if device.type != "cpu":
        return torch.empty(shape, device=device, dtype=dtype).bernoulli_(1 - p).mul_(1 / (1 - p))
    count, threshold = int(torch.Size(shape).numel()), round(p * 65536)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count].view(shape)
    return (bits >= threshold - 32768).to(dtype).mul_(65536 / (65536 - threshold))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """x times `keep_mask`."""
    if not training or p == 0:
        return x
    return F.dropout(x, p) if x.is_cuda else x * keep_mask(x.shape, p, x.device, x.dtype)


def activation(name: str | None) -> nn.Module:
    """prelu (one learned slope, start 0.25), relu, gelu, elu, or None for the identity."""
    known = {"prelu": PReLU, "relu": nn.ReLU, "gelu": nn.GELU, "elu": nn.ELU, None: nn.Identity}
    if name not in known:
        raise ValueError(f"activation={name!r}: expected one of {[k for k in known if k]} or None")
    return known[name]()


def normalisation(name: str | None, width: int) -> nn.Module:
    """layernorm, batchnorm, or None for the identity."""
    known = {"layernorm": nn.LayerNorm, "batchnorm": nn.BatchNorm1d, None: lambda _: nn.Identity()}
    if name not in known:
        raise ValueError(f"norm={name!r}: expected one of {[k for k in known if k]} or None")
    return known[name](width)


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


class BatchNormOverProcesses(nn.BatchNorm1d):
    """Batch norm with the statistics of all processes' rows; on a CPU too, where torch's SyncBatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(x)
        count = torch.tensor([float(len(x))], device=x.device, dtype=x.dtype)
        totals = _SumOverProcesses.apply(torch.cat([count, x.sum(0)]))
        rows = totals[0]
        mean = totals[1:] / rows
        centred = x - mean
        variance = _SumOverProcesses.apply(centred.square().sum(0)) / rows
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * rows / (rows - 1)).to(self.running_var), self.momentum)
            self.num_batches_tracked += 1
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


def batch_norms_over_processes(model: Any) -> Any:
    """Turn every BatchNorm1d of the model, in place, into one over all processes; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = BatchNormOverProcesses
    return model


def _needs_all_rows(*modules: nn.Module) -> bool:
    """Batch statistics are those of all nodes, whichever rows are wanted."""
    return any(isinstance(m, nn.BatchNorm1d) for module in modules for m in module.modules())


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


# -- layers ------------------------------------------------------------------------------------------------------------
# Each takes x (N, in) of all nodes and gives (N, out), or (len(rows), out) for the rising node numbers `rows`.


class GATLayer(nn.Module):
    """Graph attention (GAT) with additive scores, in the reference's order: dropout, map, softmax, attention dropout, sum, bias, residual, norm, activation."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        heads: int,
        *,
        feat_drop: float,
        attn_drop: float,
        negative_slope: float,
        residual: bool,
        norm: str | None,
        act: str | None,
    ) -> None:
        super().__init__()
        if out_dim % heads:
            raise ValueError(f"hidden={out_dim}: expected a multiple of heads={heads}")
        self.heads, self.width, self.out_dim = heads, out_dim // heads, out_dim
        self.feat_drop, self.attn_drop, self.negative_slope, self.residual = feat_drop, attn_drop, negative_slope, residual
        self.fc = nn.Linear(in_dim, out_dim, bias=False)
        self.attn_l = nn.Parameter(torch.empty(1, heads, self.width))
        self.attn_r = nn.Parameter(torch.empty(1, heads, self.width))
        self.bias = nn.Parameter(torch.zeros(out_dim))
        if residual and in_dim != out_dim:
            self.res_fc = nn.Linear(in_dim, out_dim, bias=False)
            nn.init.xavier_normal_(self.res_fc.weight, gain=nn.init.calculate_gain("relu"))
        self.norm, self.activation = normalisation(norm, out_dim), activation(act)
        for parameter in (self.fc.weight, self.attn_l, self.attn_r):
            nn.init.xavier_normal_(parameter, gain=nn.init.calculate_gain("relu"))

    @property
    def input_weight(self) -> Tensor:
        """Everything that the dropped-out input is multiplied with, (out or 2 · out, in)."""
        return torch.cat([self.fc.weight, self.res_fc.weight]) if hasattr(self, "res_fc") else self.fc.weight

    def forward(self, graph: Graph, x: Tensor, path: Path, rows: Tensor | None = None) -> Tensor:
        x = dropout(x, self.feat_drop, self.training)
        mapped = F.linear(x, self.input_weight)
        return self.attend(graph, mapped[:, : self.out_dim], mapped[:, self.out_dim :] if hasattr(self, "res_fc") else x, path, rows)

    def attend(self, graph: Graph, z: Tensor, skip: Tensor | None, path: Path, rows: Tensor | None = None) -> Tensor:
        """The rest of the layer from the mapped input z (N, out) and what the residual adds (N, out)."""
        out_rows = None if _needs_all_rows(self.norm) else rows
        if out_rows is not None:
            graph = graph.into(out_rows)
        z = z.reshape(-1, self.heads, self.width)
        alpha = dropout(edge_softmax(graph, self.score(graph, z, out_rows, path)), self.attn_drop, self.training)
        out = weighted_sum(graph, alpha, z, path).flatten(1)
        if self.bias is not None:
            out = out + self.bias
        if self.residual:
            out = out + _take(skip, out_rows)
        out = self.activation(self.norm(out))
        return out if out_rows is rows else out[rows]

    def score(self, graph: Graph, z: Tensor, rows: Tensor | None, path: Path) -> Tensor:
        """e_uv = LeakyReLU(a_l · z_u + a_r · z_v), (E, H)."""
        left, right = (z * self.attn_l).sum(-1), _take((z * self.attn_r).sum(-1), rows)
        return F.leaky_relu(left[graph.source] + right[graph.target], self.negative_slope)

    def decode(self, graph: Graph, code: Tensor, present: Tensor | None, rows: Tensor) -> Tensor:
        """One-head decoder at `rows` only, with the map after the sum: sum_u alpha_uv W c_u = W sum_u alpha_uv c_u, a · (W c_u) = (W^T a) · c_u.

        Args:
            code: (len(present), in), the rows `present` of the code; all others are zero. present None: all rows.
            rows: rising numbers of the nodes to reconstruct.
        """
        graph = graph.into(rows)
        code = dropout(code, self.feat_drop, self.training)
        left, right = (
            code @ torch.stack([self.attn_l[0, 0] @ self.fc.weight, self.attn_r[0, 0] @ self.fc.weight], dim=1).to(code.dtype),
            None,
        )
        left, right = spread(left, present, graph.sources).unbind(1)
        score = F.leaky_relu(left[graph.source] + right[rows][graph.target], self.negative_slope)
        alpha = dropout(edge_softmax(graph, score[:, None]), self.attn_drop, self.training)
        return F.linear(_sum_of_present(graph, alpha, code, present), self.fc.weight, self.bias)


class DotGATLayer(GATLayer):
    """Attention by scaled dot products of the mapped features; no attention vectors, no bias. (The reference crashes with a residual; here it adds R x'.)"""

    def __init__(self, in_dim: int, out_dim: int, heads: int, **settings: Any) -> None:
        super().__init__(in_dim, out_dim, heads, **settings)
        del self.attn_l, self.attn_r
        self.bias = None
        self.fc.reset_parameters()

    def score(self, graph: Graph, z: Tensor, rows: Tensor | None, path: Path) -> Tensor:
        return edge_dots(graph, _take(z, rows), z, path) / self.width**0.5

    def decode(self, graph: Graph, code: Tensor, present: Tensor | None, rows: Tensor) -> Tensor:
        code = dropout(code, self.feat_drop, self.training)
        if present is None:  # nothing is zero, so scores need every mapped row
            return self.attend(graph, F.linear(code, self.fc.weight), None, "efficient", rows)
        # a re-masked target has a zero code: all its scores are 0 and its weights uniform
        graph = graph.into(rows)
        alpha = dropout((1 / graph.in_degree.to(code.dtype))[graph.target, None], self.attn_drop, self.training)
        return F.linear(_sum_of_present(graph, alpha, code, present), self.fc.weight)


def spread(value: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """(count, ...) with `value` at `rows` and zeros elsewhere; rows None: value is whole already."""
    return value if rows is None else value.new_zeros(count, *value.shape[1:]).index_copy(0, rows, value)


def _sum_of_present(graph: Graph, alpha: Tensor, code: Tensor, present: Tensor | None) -> Tensor:
    """Weighted sum over the edges whose source is in `present` (the others carry zeros); code (len(present), C), alpha (E, 1) -> (targets, C)."""
    if present is None:
        return weighted_sum(graph, alpha, code[:, None], "efficient")[:, 0]
    place = torch.full((graph.sources,), -1, device=code.device)
    place[present] = torch.arange(len(present), device=code.device)
    source = place[graph.source]
    live = source >= 0
    target = graph.target[live]
    part = Graph(source[live], target, _starts(target, graph.targets), len(present), graph.rows)
    return weighted_sum(part, alpha[live], code[:, None], "efficient")[:, 0]


class MLP(nn.Module):
    """Linear -> norm -> activation -> Linear, with the reference's names."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, norm: str | None, act: str | None) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(in_dim, hidden), nn.Linear(hidden, out_dim)])
        self.norms = nn.ModuleList([normalisation(norm, hidden)])
        self.activations = nn.ModuleList([activation(act)])

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x (N, in) -> (N, out), or the `rows` of it."""
        early = rows is not None and not _needs_all_rows(self.norms)
        if early:
            x = x[rows]
        x = self.activations[0](self.norms[0](self.linears[0](x)))
        return self.linears[1](x if early else _take(x, rows))


class ApplyNodes(nn.Module):
    """MLP -> norm -> activation."""

    def __init__(self, mlp: MLP, width: int, norm: str | None, act: str | None) -> None:
        super().__init__()
        self.mlp, self.norm, self.act = mlp, normalisation(norm, width), activation(act)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        if _needs_all_rows(self.norm):
            return _take(self.act(self.norm(self.mlp(x))), rows)
        return self.act(self.norm(self.mlp(x, rows)))


class GINLayer(nn.Module):
    """Graph isomorphism layer: MLP((1 + eps) x_v + sum of incoming x_u), eps = 0 and not learned; self-loops are in the sum, so a node counts twice."""

    def __init__(
        self, in_dim: int, hidden: int, out_dim: int, *, feat_drop: float, residual: bool, norm: str | None, act: str | None, bare: bool
    ) -> None:
        """bare: the MLP alone, without outer norm and activation."""
        super().__init__()
        self.feat_drop, self.residual = feat_drop, residual
        mlp = MLP(in_dim, hidden, out_dim, norm, act)
        self.apply_func = mlp if bare else ApplyNodes(mlp, out_dim, norm, act)
        self.register_buffer("eps", torch.zeros(1))
        if residual and in_dim != out_dim:
            self.res_fc = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, graph: Graph, x: Tensor, path: Path, rows: Tensor | None = None) -> Tensor:
        x = dropout(x, self.feat_drop, self.training)
        if rows is not None and not _needs_all_rows(self.apply_func):
            graph = graph.into(rows)
            out = self.apply_func((1 + self.eps) * x[rows] + neighbour_sum(graph, x, path))
        else:
            out = self.apply_func((1 + self.eps) * x + neighbour_sum(graph, x, path), rows)
        if self.residual:
            skip = _take(x, rows)
            out = out + (self.res_fc(skip) if hasattr(self, "res_fc") else skip)
        return out

    def decode(self, graph: Graph, code: Tensor, present: Tensor | None, rows: Tensor) -> Tensor:
        return self(graph, spread(code, present, graph.sources), "efficient", rows)


class GCNLayer(nn.Module):
    """Graph convolution: D_in^-1/2 (W sum_u D_out^-1/2 x_u + b), the bias inside the scaling; then residual, norm, activation."""

    def __init__(self, in_dim: int, out_dim: int, *, feat_drop: float, residual: bool, norm: str | None, act: str | None) -> None:
        super().__init__()
        self.feat_drop, self.residual = feat_drop, residual
        self.fc = nn.Linear(in_dim, out_dim)
        if residual and in_dim != out_dim:
            self.res_fc = nn.Linear(in_dim, out_dim, bias=False)
        self.norm, self._activation = normalisation(norm, out_dim), activation(act)

    def forward(self, graph: Graph, x: Tensor, path: Path, rows: Tensor | None = None) -> Tensor:
        out_rows = None if _needs_all_rows(self.norm) else rows
        left = graph.out_degree.clamp(min=1).to(x.dtype).rsqrt()[:, None]
        if out_rows is not None:
            graph = graph.into(out_rows)
        right = graph.in_degree.clamp(min=1).to(x.dtype).rsqrt()[:, None]
        x = dropout(x, self.feat_drop, self.training)
        out = self.fc(neighbour_sum(graph, x * left, path)) * right
        if self.residual:
            skip = _take(x, out_rows)
            out = out + (self.res_fc(skip) if hasattr(self, "res_fc") else skip)
        out = self._activation(self.norm(out))
        return out if out_rows is rows else out[rows]

    def decode(self, graph: Graph, code: Tensor, present: Tensor | None, rows: Tensor) -> Tensor:
        return self(graph, spread(code, present, graph.sources), "efficient", rows)
