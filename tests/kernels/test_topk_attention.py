"""Top-k attention against the definition on every path: the choice with ties, values, gradients, odd sizes, types, compilation, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import topk_attention as t
from common.kernels.topk_attention import kept_pairs, topk_attention

SIZES = [  # sequences, heads, tokens, width, kept, prefix
    (1, 1, 2, 4, 1, 1),
    (1, 1, 1, 4, 1, 0),
    (2, 3, 17, 8, 4, 1),
    (1, 2, 7, 5, 7, 0),
    (2, 1, 33, 40, 8, 1),
    (1, 2, 65, 16, 63, 2),
    (1, 1, 197, 64, 49, 1),
    (1, 1, 300, 16, 20, 0),
]


def heads(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype).requires_grad_() for _ in range(3)]


def owners(sequences: int, patches: int, device: str) -> Tensor:
    return torch.randint(0, 4, (sequences, patches), generator=torch.Generator().manual_seed(patches)).to(device)


def run(given: list[Tensor], *rest: Any, path: t.Path, **options: Any) -> list[Tensor]:
    """Output and hits, then the gradients for an upstream gradient that differs everywhere."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out, hits = topk_attention(*leaves, *rest, path=path, **options)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out.detach(), hits, *torch.autograd.grad(out, leaves, upstream)]


def by_loops(q: Tensor, k: Tensor, v: Tensor, count: int, prefix: int) -> Tensor:
    """One head (N, D) from the paper's sentence, a query at a time."""
    rows = []
    for i in range(len(q)):
        scores = [float(q[i] @ k[j]) / q.shape[1] ** 0.5 for j in range(len(k))]
        chosen = list(range(len(k)))
        if i >= prefix:
            best = sorted(range(prefix, len(k)), key=lambda j: (-scores[j], j))[:count]
            chosen = [*range(prefix), *best]
        weights = torch.tensor([scores[j] for j in chosen], dtype=q.dtype).softmax(0)
        rows.append(weights @ v[chosen])
    return torch.stack(rows)


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_every_path_says_what_loops_say(path: t.Path, prefix: int, device: str, exact: tuple) -> None:
    dtype, bound = exact
    given = heads((1, 2, 14, 8), dtype, device)
    got = topk_attention(*given, 5, prefix=prefix, path=path).out
    for head in range(2):
        want = by_loops(*(x[0, head].detach().cpu() for x in given), 5, prefix)
        torch.testing.assert_close(got[0, head].cpu(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("path", ["tiled", "triton"])
@pytest.mark.parametrize(("b", "h", "n", "d", "count", "prefix"), SIZES)
def test_paths_equal_the_definition(
    b: int, h: int, n: int, d: int, count: int, prefix: int, path: t.Path, device: str, exact: tuple
) -> None:
    dtype, bound = exact
    given, owner = heads((b, h, n, d), dtype, device), owners(b, n - prefix, device)
    want = run(given, count, prefix=prefix, owner=owner, path="plain")
    got = run(given, count, prefix=prefix, owner=owner, path=path)
    assert torch.equal(got[1], want[1])
    for a, b_ in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True):
        assert a.shape == b_.shape
        assert a.dtype == b_.dtype
        torch.testing.assert_close(a, b_, rtol=10 * bound, atol=10 * bound)


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
def test_among_equal_scores_the_lower_index_wins(path: t.Path, device: str) -> None:
    """Integer queries and keys: sums are exact in any order, and most scores are shared, zeros of both signs among them."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-1, 2, (2, 2, 41, 16), generator=random).float().to(device) for _ in range(2))
    q[0, 0, 3], k[0, 1, 5:30] = -0.0, -0.0
    values = torch.eye(41, device=device).expand(2, 2, 41, 41).contiguous()  # the output row is the softmax itself
    pad = [F.pad(x, (0, 25)) for x in (q, k)]
    scores = (pad[0] @ pad[1].mT)[..., 1:, 1:]
    for count in (1, 7, 39):
        weights = topk_attention(*pad, values, count, path=path).out
        want = torch.zeros_like(scores, dtype=torch.bool)
        for place in torch.cartesian_prod(*(torch.arange(s) for s in (2, 2, 40))).tolist():
            row = scores[tuple(place)].tolist()
            want[*place, sorted(range(40), key=lambda j: (-row[j], j))[:count]] = True
        assert torch.equal(weights[..., 1:, 1:] > 0, want)
        assert bool((weights[..., 0, :] > 0).all())
        assert bool((weights[..., 0] > 0).all())
        assert torch.equal(kept_pairs(*pad, count)[..., 1:, 1:], want)


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
def test_with_every_key_it_is_ordinary_attention(path: t.Path, device: str, exact: tuple) -> None:
    dtype, bound = exact
    given = heads((2, 2, 20, 16), dtype, device)
    out, hits = topk_attention(*given, 19, owner=torch.zeros(2, 19, dtype=torch.int64, device=device), path=path)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*given), rtol=10 * bound, atol=10 * bound)
    assert hits[..., 0].abs().max() == 0
    assert bool((hits[..., 1:] == 19).all())


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
def test_keys_left_out_get_no_gradient_from_patches(path: t.Path, device: str) -> None:
    q, k, v = heads((1, 1, 9, 8), torch.float32, device)
    out = topk_attention(q, k, v, 2, path=path).out
    keep = kept_pairs(q, k, 2)[0, 0]
    (grad_k, grad_v) = torch.autograd.grad(out[0, 0, 4].square().sum(), (k, v))
    assert int(keep[4].sum()) == 3
    for grad in (grad_k[0, 0], grad_v[0, 0]):
        assert torch.equal(grad.abs().sum(1) > 0, keep[4])


@pytest.mark.parametrize("path", ["tiled", "triton"])
@pytest.mark.parametrize("size", [1e3, 1e-20])
def test_extreme_scores(path: t.Path, size: float, device: str) -> None:
    given = [
        (x * scale).detach().requires_grad_() for x, scale in zip(heads((1, 2, 18, 16), torch.float32, device), (size, 1, 1), strict=True)
    ]
    want, got = (run(given, 5, path=which) for which in ("plain", path))
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("path", ["tiled", "triton"])
def test_bfloat16_errs_at_most_three_times_as_much_as_plain_torch(path: t.Path, device: str) -> None:
    """Against float64 on the same rounded inputs; plain torch rounds scores and weights to bfloat16."""
    given = [x.detach().bfloat16() for x in heads((1, 2, 33, 32), torch.float32, device)]
    want = run([x.double() for x in given], 8, path="plain")
    leaves = [x.clone().requires_grad_() for x in given]
    scores = (leaves[0] @ leaves[1].mT) * 32**-0.5
    keep = kept_pairs(given[0], given[1], 8)
    out = scores.masked_fill(~keep, float("-inf")).softmax(-1) @ leaves[2]
    upstream = torch.linspace(-1, 2, out.numel(), device=device).view_as(out).bfloat16()
    plain = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
    got = run(given, 8, path=path)
    assert {x.dtype for x in (got[0], *got[2:])} == {torch.bfloat16}
    for ours, theirs, true in zip((got[0], *got[2:]), plain, (want[0], *want[2:]), strict=True):
        assert (ours.double() - true).norm() <= 3 * (theirs.double() - true).norm()


@pytest.mark.parametrize("path", ["tiled", "triton"])
def test_gradcheck(path: t.Path, device: str, exact: tuple) -> None:
    if exact[0] != torch.float64:
        pytest.skip("the interpreter alone computes in float64")
    given = heads((1, 1, 5, 4), torch.float64, device)
    assert torch.autograd.gradcheck(lambda q, k, v: topk_attention(q, k, v, 2, path=path).out, given, fast_mode=True)


@pytest.mark.parametrize("fused", [False, True])
def test_operators_keep_their_contract(fused: bool, device: str) -> None:
    given = [x[0] for x in heads((1, 2, 9, 16), torch.float32, device)]
    owner = owners(1, 8, device)
    torch.library.opcheck(torch.ops.contramask.topk_attention.default, (*given, owner, 2, 3, 1, fused))
    torch.library.opcheck(torch.ops.contramask.topk_attention.default, (*given, None, 2, 3, 1, fused))
    with torch.no_grad():
        detached = [x.detach() for x in given]
        out, lse, keep, _ = torch.ops.contramask.topk_attention(*detached, owner, 2, 3, 1, fused)
        torch.library.opcheck(
            torch.ops.contramask.topk_attention_backward.default, (torch.ones_like(out), *detached, out, lse, keep, fused)
        )


@pytest.mark.parametrize(("path", "backend"), [("tiled", "aot_eager"), ("triton", "aot_eager"), ("triton", "inductor")])
def test_compiles_without_a_graph_break(path: t.Path, backend: str, device: str) -> None:
    owner = owners(2, 8, device)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, hits = topk_attention(q.sin(), k, v * 2, 3, owner=owner, path=path)
        return out.square().sum() + hits.sum()

    given = heads((2, 2, 9, 16), torch.float32, device)
    want = loss(*given)
    expected = torch.autograd.grad(want, given)
    torch._dynamo.reset()
    got = torch.compile(loss, fullgraph=True, backend=backend)(*given)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, given), expected)


@pytest.mark.parametrize("path", ["tiled", "triton"])
def test_same_bits_again_and_heads_that_are_not_contiguous(path: t.Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.randn(2, 21, 3, 2, 16, generator=torch.Generator().manual_seed(1)).to(device)
    views = list(packed.permute(2, 0, 3, 1, 4).unbind(0))  # as a query-key-value map gives them
    first, second = run(views, 5, path=path), run([x.contiguous() for x in views], 5, path=path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    monkeypatch.setattr(t, "TILE_BYTES", {"cpu": 1, "cuda": 1})  # one head a tile
    for a, b in zip(run(views, 5, path=path), first, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_the_scores_alone() -> None:
    given = heads((1, 2, 12, 8), torch.float32, "cpu")
    for path in ("plain", "tiled"):
        want = topk_attention(*given, 4, path=path).out
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(topk_attention(*given, 4, path=path).out, want)


def test_the_second_derivative_is_refused() -> None:
    given = heads((1, 1, 6, 4), torch.float32, "cpu")
    (grad,) = torch.autograd.grad(topk_attention(*given, 2, path="tiled").out.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        grad.sum().backward()


def test_path_is_chosen_by_device_type_and_size() -> None:
    query = torch.empty(1, 1, 9, 8, device="meta")
    assert t.choose(query) == "tiled"
    assert t.choose(query.double()) == "plain"
    assert t.columns_of(197) == 256
    assert t.columns_of(2) == 64


def test_no_sequence_gives_nothing() -> None:
    empty = torch.zeros(0, 2, 5, 4, requires_grad=True)
    out, hits = topk_attention(empty, empty, empty, 2)
    out.sum().backward()
    assert (out.shape, hits.shape, empty.grad.shape) == ((0, 2, 5, 4), (0, 2, 5), (0, 2, 5, 4))


def test_errors_name_the_sizes() -> None:
    x = torch.zeros(2, 3, 17, 8)
    for count in (0, 17):
        with pytest.raises(ValueError, match=f"count={count}: expected 1 to 16, the number of patches"):
            topk_attention(x, x, x, count)
    with pytest.raises(ValueError, match=r"key \(2, 3, 16, 8\)"):
        topk_attention(x, x[:, :, 1:], x, 4)
    with pytest.raises(ValueError, match="prefix=17: expected 0 to 16"):
        topk_attention(x, x, x, 4, prefix=17)
    with pytest.raises(ValueError, match=r"owner: expected \(2, 16\) integers"):
        topk_attention(x, x, x, 4, owner=torch.zeros(2, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="cast them to one type"):
        topk_attention(x, x.double(), x, 4)
    with pytest.raises(ValueError, match=r'use path="tiled"'):
        topk_attention(*[torch.zeros(1, 1, 1100, 4)] * 3, 4, path="triton")
