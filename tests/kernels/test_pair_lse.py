"""The kernels and the tiled path against the definition: values and gradients, odd sizes, dead rows, extreme logits, types, compilation, memory."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from common.kernels import pair_lse as p
from common.kernels.pair_lse import pair_lse
from tests.common.test_parity import runners
from tests.parity import Case, cases, check


def run(tensors: tuple[Tensor | None, ...], groups: tuple[Tensor | None, ...], both: bool, path: p.Path) -> list[Tensor]:
    """Both outputs, then gradients of a loss that weighs every finite entry differently, for what requires one."""
    query, key, scale = (None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
    row, column = pair_lse(query, key, scale, *groups, both=both, path=path)
    total = row.new_zeros(())
    for out in (row, column):
        weight = torch.linspace(0.5, 2, max(1, len(out)), dtype=out.dtype, device=out.device)[: len(out)]
        total = total + (torch.where(out.isfinite(), out, 0.0) * weight).sum()
    total.backward()
    return [row.detach(), column.detach(), *(t.grad for t in (query, key, scale) if t is not None and t.requires_grad)]


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    """Worst relative error over the outputs, infinities being equal."""
    errors = [0.0]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        same = a == b
        a, b = a.double().masked_fill(same, 0), b.double()
        difference = torch.where(same, 0.0, a - b).norm()
        errors.append(float(difference / b[b.isfinite()].norm()) if difference > 0 else 0.0)
    return max(errors)


def rows(count: int, width: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    made = torch.randn(count, width, generator=torch.Generator().manual_seed(seed + count), dtype=torch.float64)
    return (made / math.sqrt(width) * 2).to(device, dtype).requires_grad_()


def labels(count: int, classes: int, device: str) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(count)).to(device)


@pytest.mark.parametrize("programs", [1, 6])  # one split of the columns, and several
@pytest.mark.parametrize("mode", ["row", "both", "self"])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 5), (7, 33, 16), (33, 65, 40), (65, 7, 33), (196, 65, 128)])
def test_kernels_equal_the_definition(
    n: int, m: int, d: int, mode: str, programs: int, monkeypatch: Any, device: str, exact: tuple
) -> None:
    monkeypatch.setattr(p, "PROGRAMS", programs)
    dtype, bound = exact
    query, key = rows(n, d, dtype, device), None if mode == "self" else rows(m, d, dtype, device, 1)
    scale = torch.tensor(1.7, dtype=dtype, device=device, requires_grad=True)
    groups = (labels(n, 5, device), None if key is None else labels(m, 5, device)) if (n + d) % 2 == 0 else (None, None)
    want = run((query, key, scale), groups, mode == "both", "plain")
    assert apart(run((query, key, scale), groups, mode == "both", "triton"), want) < bound
    assert apart(run((query, key, scale), groups, mode == "both", "tiled"), want) < bound


@pytest.mark.parametrize("limit", [0.0, 32.0])  # two exponentials a pair, and one
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("mode", ["row", "both", "self"])
def test_tiles_of_any_size_equal_the_definition(mode: str, grouped: bool, limit: float, monkeypatch: Any) -> None:
    for name, size in (("ROW_TILE", 8), ("COLUMN_TILE", 5), ("MIRRORED_TILE", 8)):
        monkeypatch.setattr(p, name, size)
    monkeypatch.setattr(p, "SAFE_LOGIT", limit)
    query, key = rows(21, 12, torch.float64, "cpu"), None if mode == "self" else rows(13, 12, torch.float64, "cpu", 1)
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    groups = (labels(21, 4, "cpu"), None if key is None else labels(13, 4, "cpu")) if grouped else (None, None)
    want = run((query, key, scale), groups, mode == "both", "plain")
    assert apart(run((query, key, scale), groups, mode == "both", "tiled"), want) < 1e-13


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
def test_rows_with_nothing_left_are_minus_infinity_without_gradient(path: p.Path, device: str) -> None:
    query, key = rows(5, 8, torch.float32, device), rows(6, 8, torch.float32, device, 1)
    scale = torch.tensor(3.0, device=device, requires_grad=True)
    query_group, key_group = torch.tensor([1, 0, 0, 2, 1], device=device), torch.tensor([0, 0, 0, 0, 0, 0], device=device)
    row, column, *grads = run((query, key, scale), (query_group, key_group), True, path)
    assert row.isinf().tolist() == [False, True, True, False, False]
    assert column.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][1:3].abs().max() == 0
    everything = run((query, key, scale), (torch.zeros_like(query_group), key_group), True, path)
    assert everything[0].isinf().all()
    assert everything[1].isinf().all()
    assert all(grad.abs().max() == 0 for grad in everything[2:])


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
def test_extreme_logits_duplicates_and_zero_rows(path: p.Path, device: str) -> None:
    query = F.normalize(rows(9, 16, torch.float64, device), dim=1).detach()
    query[3], query[4] = query[2], 0  # a duplicate and a zero row
    scale = torch.tensor(100.0, dtype=torch.float64, device=device, requires_grad=True)
    query = query.requires_grad_()
    want = run((query, query.detach().flip(0).requires_grad_(), scale), (None, None), True, "plain")
    low = query.detach().float().requires_grad_()
    got = run((low, low.detach().flip(0).requires_grad_(), scale.detach().float().requires_grad_()), (None, None), True, path)
    assert apart([g.double() for g in got], want) < 2e-5
    enormous = run(
        (torch.full((3, 4), 1e3, device=device).requires_grad_(), None, torch.tensor(1e3, device=device)), (None, None), False, path
    )
    torch.testing.assert_close(enormous[0].cpu(), torch.full((3,), 4e9 + math.log(3)))


@pytest.mark.parametrize("path", ["tiled", "triton"])
def test_bfloat16_errs_at_most_three_times_as_much_as_the_plain_path(path: p.Path, device: str) -> None:
    """Against float64 on the same rounded inputs; the plain path is torch in bfloat16 throughout its matrix products."""
    query, key = (F.normalize(rows(40, 32, torch.float32, device, seed), dim=1).bfloat16().detach().requires_grad_() for seed in (0, 1))
    scale = torch.tensor(20.0, device=device)
    exact = [t.detach().double().requires_grad_() for t in (query, key)]
    want = run((*exact, scale.double()), (None, None), True, "plain")
    mixed = [t.detach().clone().requires_grad_() for t in (query, key)]
    logits = (mixed[0] @ mixed[1].T).float() * scale
    row, column = logits.logsumexp(1), logits.logsumexp(0)
    weight = torch.linspace(0.5, 2, 40, device=device)
    ((row + column) * weight).sum().backward()
    plain = [row.detach(), column.detach(), mixed[0].grad, mixed[1].grad]
    got = run((query, key, scale), (None, None), True, path)
    assert [g.dtype for g in got] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, theirs, true in zip(got, plain, want, strict=True):
        assert (ours.double() - true).norm() <= 3 * (theirs.double() - true).norm()


@pytest.mark.parametrize("path", ["tiled", "triton"])
def test_float16_rows_keep_gradients_below_its_range(path: p.Path, device: str) -> None:
    query = F.normalize(rows(40, 16, torch.float32, device), dim=1).detach().half().requires_grad_()
    (pair_lse(query, None, 10.0, path=path)[0].sum() * 1e-9).backward()
    wide = query.detach().float().requires_grad_()
    (pair_lse(wide, None, 10.0, path="plain")[0].sum() * 1e-9).backward()
    torch.testing.assert_close(query.grad, wide.grad.half())
    low, high = (pair_lse(rows_, None, 10.0, path=path)[0] for rows_ in (query, wide))
    assert torch.equal(low, high)


def test_gradcheck_through_the_kernels(device: str, exact: tuple) -> None:
    if exact[0] != torch.float64:
        pytest.skip("the interpreter alone computes in float64")
    query, key = rows(3, 8, torch.float64, device), rows(2, 8, torch.float64, device, 1)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 1, 2]), torch.tensor([1, 5])
    assert torch.autograd.gradcheck(
        lambda q, k, s: pair_lse(q, k, s, *groups, both=True, path="triton"), (query, key, scale), fast_mode=True
    )


@pytest.mark.parametrize("fused", [False, True])
def test_operators_keep_their_contract(fused: bool, device: str) -> None:
    query, key = rows(6, 16, torch.float32, device), rows(5, 16, torch.float32, device, 1)
    scale, groups = torch.tensor(1.5, device=device, requires_grad=True), (torch.arange(6, device=device), torch.arange(5, device=device))
    torch.library.opcheck(torch.ops.contramask.pair_lse.default, (query, key, scale, *groups, True, False, fused))
    torch.library.opcheck(torch.ops.contramask.pair_lse.default, (query, None, scale, None, None, False, False, fused))
    with torch.no_grad():
        row, column, _ = torch.ops.contramask.pair_lse(query, key, scale, *groups, True, False, fused)
        arguments = (row, column, row, column, query.detach(), key.detach(), scale.detach(), *groups, True, fused, True)
        torch.library.opcheck(torch.ops.contramask.pair_lse_backward.default, arguments)


@pytest.mark.parametrize("path", ["tiled", "triton"])
def test_same_input_gives_the_same_bits(path: p.Path, device: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(p, "PROGRAMS", 4)
    query, key = rows(40, 24, torch.float32, device), rows(70, 24, torch.float32, device, 1)
    scale = torch.tensor(5.0, device=device, requires_grad=True)
    first, second = (run((query, key, scale), (None, None), True, path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("path", ["tiled", "triton"])
def test_rows_need_not_be_contiguous(path: p.Path, device: str, exact: tuple) -> None:
    dtype, bound = exact
    query, key = rows(8, 10, dtype, device).detach().T, rows(10, 24, dtype, device, 1).detach()[:, ::3]
    query, key = query.requires_grad_(), key.requires_grad_()
    query_group = torch.arange(20, device=device)[::2]
    groups = (query_group, torch.arange(10, device=device))
    scale = torch.tensor(1.0, dtype=dtype, device=device)
    assert apart(run((query, key, scale), groups, True, path), run((query, key, scale), groups, True, "plain")) < bound


@pytest.mark.parametrize(("path", "backend"), [("tiled", "aot_eager"), ("triton", "aot_eager"), ("triton", "inductor")])
def test_compiles_without_a_graph_break(path: p.Path, backend: str, device: str) -> None:
    def loss(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
        index = torch.arange(len(query), dtype=torch.int32, device=query.device)
        row, column = pair_lse(query, key, scale.exp(), index, index, both=True, path=path)
        positive = scale.exp() * (query * key).sum(1)
        return (F.softplus(row - positive) + F.softplus(column - positive)).mean()

    given = rows(9, 16, torch.float32, device), rows(9, 16, torch.float32, device, 1), torch.tensor(0.5, device=device, requires_grad=True)
    want = loss(*given)
    expected = torch.autograd.grad(want, given)
    torch._dynamo.reset()
    got = torch.compile(loss, fullgraph=True, backend=backend)(*given)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, given), expected)


def test_keys_without_gradient_cost_no_launch(device: str, monkeypatch: Any) -> None:
    launches: list[tuple[int, ...]] = []
    original = p._sum_of_others
    monkeypatch.setattr(p, "_sum_of_others", lambda *given: launches.append(given[0].shape) or original(*given))
    query, key = rows(6, 16, torch.float32, device), rows(9, 16, torch.float32, device, 1)
    for needed, expected in ((key, 2), (key.detach(), 1)):
        row, _ = pair_lse(query, needed, 1.0, path="triton")
        launches.clear()
        row.sum().backward()
        assert len(launches) == expected


@pytest.mark.parametrize("limit", [0.0, 32.0])
def test_tiles_with_fixed_keys_are_computed_once(limit: float, monkeypatch: Any) -> None:
    """The forward pass keeps each row's mean key; the backward pass scales it, whatever the upstream gradient."""
    monkeypatch.setattr(p, "SAFE_LOGIT", limit)
    monkeypatch.setattr(p, "ROW_TILE", 4)
    monkeypatch.setattr(p, "COLUMN_TILE", 3)
    query, key = rows(11, 12, torch.float64, "cpu"), rows(7, 12, torch.float64, "cpu", 1).detach()
    scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), torch.tensor([0, 0, 0, 0, 0, 0, 1])
    want = run((query, key, scale), groups, False, "plain")
    monkeypatch.setattr(p, "_tiled_backward", lambda *_: pytest.fail("tiles were computed again"))
    assert apart(run((query, key, scale), groups, False, "tiled"), want) < 1e-13
    alone = torch.zeros(11, dtype=torch.long), torch.zeros(7, dtype=torch.long)
    dead = run((query, key, scale), alone, False, "tiled")
    assert dead[0].isinf().all()
    assert dead[2].abs().max() == dead[3] == 0


def test_columns_of_many_rows_take_several_launches(device: str, exact: tuple, monkeypatch: Any) -> None:
    dtype, bound = exact
    query, key = rows(150, 16, dtype, device), rows(9, 16, dtype, device, 1)
    want = run((query, key, torch.tensor(2.0, dtype=dtype, device=device)), (None, None), True, "plain")
    launches: list[int] = []
    original = p._forward_launch
    monkeypatch.setattr(p, "_forward_launch", lambda a, *rest: launches.append(len(a)) or original(a, *rest))
    monkeypatch.setattr(p, "COLUMN_BYTES", 1)
    assert apart(run((query, key, torch.tensor(2.0, dtype=dtype, device=device)), (None, None), True, "triton"), want) < bound
    assert len(launches) > 1
    assert sum(launches) == 150


class Peak(TorchDispatchMode):
    """Most bytes of new storages alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("scale", [10.0, 90.0])  # one exponential a pair, and two
def test_tiles_hold_two_rows_of_tiles_at_most(scale: float) -> None:
    n, d = 2048, 16
    query, key = (F.normalize(rows(n, d, torch.float32, "cpu", seed), dim=1).detach() for seed in (0, 1))
    factor, index = torch.tensor(scale), torch.arange(n, dtype=torch.int32)
    with Peak() as peak:
        row, column, _ = p._tiled_forward(query, key, factor, index, index, True)
        p._tiled_backward(query, key, factor, index, index, row, column, torch.ones(n), torch.ones(n), True)
    tile = p.ROW_TILE * min(n, p.COLUMN_TILE) * 4
    assert peak.most <= 2.3 * tile + 20 * n * d * 4 < n * n * 4  # 2.3: the comparison of groups is a quarter of a tile


def test_autocast_leaves_the_logits_alone() -> None:
    query, key = rows(5, 8, torch.float32, "cpu"), rows(5, 8, torch.float32, "cpu", 1)
    for path in ("plain", "tiled"):
        want = run((query, key, torch.tensor(9.0)), (None, None), True, path)
        with torch.autocast("cpu", torch.bfloat16):
            got = run((query, key, torch.tensor(9.0)), (None, None), True, path)
        checked = 2 if path == "plain" else 5  # torch's own backward pass follows autocast where it is run inside; ours does not
        assert all(torch.equal(a, b) for a, b in zip(got[:checked], want[:checked], strict=True))


def test_the_second_derivative_is_refused(device: str) -> None:
    query = rows(4, 8, torch.float32, device)
    (grad,) = torch.autograd.grad(pair_lse(query, None, 1.0, path="tiled")[0].sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        grad.sum().backward()


def test_paths_are_chosen_by_size_type_and_device() -> None:
    small, large, wide = (torch.empty(n, d, device="meta") for n, d in ((64, 8), (4096, 8), (4096, 1024)))
    assert p.choose(small, small) == "plain"
    assert p.choose(large, large) == "tiled"
    assert p.choose(wide, wide) == "tiled"
    assert p.choose(large.double(), large.double()) == "plain"
    got = pair_lse(rows(2500, 4, torch.float32, "cpu"), None, 2.0)[0]  # 6.25 M pairs: through the tiles
    assert got.grad_fn is not None
    assert "pair_lse" in type(got.grad_fn).__name__


def test_empty_sides() -> None:
    query = rows(3, 4, torch.float32, "cpu")
    row, column = pair_lse(query, torch.empty(0, 4), 1.0, both=True)
    assert row.isinf().all()
    assert column.shape == (0,)
    row.nan_to_num(neginf=0).sum().backward()
    assert query.grad.abs().max() == 0


def test_errors_name_the_shapes() -> None:
    query = torch.zeros(8, 128)
    with pytest.raises(ValueError, match=r"query \(8, 128\) and key \(8, 256\): widths differ"):
        pair_lse(query, torch.zeros(8, 256), 1.0)
    with pytest.raises(ValueError, match="give both or neither"):
        pair_lse(query, query, 1.0, torch.arange(8))
    with pytest.raises(ValueError, match=r"key_group: expected \(8,\) integers, got \(7,\)"):
        pair_lse(query, query, 1.0, torch.arange(8), torch.arange(7))
    with pytest.raises(ValueError, match="up to 512 wide"):
        pair_lse(torch.zeros(4, 600), None, 1.0, path="triton")
    with pytest.raises(ValueError, match="leave out `both`"):
        pair_lse(query, None, 1.0, both=True)


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
@pytest.mark.parametrize("case", [case for case in cases("common") if case.kind != "soft_targets"], ids=str)
def test_parity_cases_on_every_path(case: Case, path: p.Path, device: str) -> None:
    """Float32 within the case's tolerance; on the CPU float64 within its tighter one too."""
    if device == "cuda" and path == "triton":
        pytest.skip("cases live on the CPU")
    check(case, runners(torch.float32, path))
    case.tolerance = case.raw["tolerance_float64"]
    check(case, runners(torch.float64, path))
