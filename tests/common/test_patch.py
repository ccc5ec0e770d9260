from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from common import patch

SHAPES = [((12,), (4,)), ((6, 8), (3, 2)), ((4, 6, 4), (2, 3, 2))]
LAST = ["b c (g p) -> b g (p c)", "b c (g p) (h q) -> b (g h) (p q c)", "b c (g p) (h q) (w r) -> b (g h w) (p q r c)"]
FIRST = ["b c (g p) -> b g (c p)", "b c (g p) (h q) -> b (g h) (c p q)", "b c (g p) (h q) (w r) -> b (g h w) (c p q r)"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("channels", ["last", "first"])
def test_patchify_takes_the_order_asked_for_and_unpatchify_undoes_it(axes, channels):
    sides, size = SHAPES[axes - 1]
    inputs = torch.rand(2, 3, *sides)
    named = dict(zip("pqr", size, strict=False))
    patches = patch.patchify(inputs, size, channels)
    assert torch.equal(patches, rearrange(inputs, (LAST if channels == "last" else FIRST)[axes - 1], **named))
    grid = patch.grid_of(inputs, size)
    assert torch.equal(patch.unpatchify(patches, grid, size, channels), inputs)
    keep = torch.stack([torch.randperm(math.prod(grid))[:2] for _ in range(2)])
    taken = patch.take_patches(inputs, size, keep, channels)
    assert torch.equal(taken, torch.stack([patches[b, keep[b]] for b in range(2)]))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_embedding_of_all_patches_is_the_convolution_and_of_some_a_part_of_it(axes):
    sides, size = SHAPES[axes - 1]
    embed = patch.PatchEmbed(3, 5, size).double()
    inputs = torch.rand(2, 3, *sides, dtype=torch.float64)
    full = embed(inputs)
    torch.testing.assert_close(full, embed.proj(inputs).flatten(2).transpose(1, 2))
    keep = torch.stack([torch.randperm(full.shape[1])[:3] for _ in range(2)])
    part = embed(inputs, keep)
    torch.testing.assert_close(part, torch.stack([full[b, keep[b]] for b in range(2)]))
    weight = torch.rand_like(part)
    (visible,) = torch.autograd.grad((part * weight).sum(), embed.proj.weight)
    everything = embed(inputs)
    (expected,) = torch.autograd.grad((torch.stack([everything[b, keep[b]] for b in range(2)]) * weight).sum(), embed.proj.weight)
    torch.testing.assert_close(visible, expected)


def test_embedding_without_bias():
    assert patch.PatchEmbed(3, 4, (2, 2), bias=False)(torch.zeros(1, 3, 4, 4)).abs().max() == 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_sincos_1d_against_the_formula(interleaved):
    table = patch.sincos_1d(7, 6, interleaved=interleaved)
    for n in range(7):
        for k in range(3):
            angle = n / 10000 ** (2 * k / 6)
            sine, cosine = (2 * k, 2 * k + 1) if interleaved else (k, 3 + k)
            assert table[n, sine] == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[n, cosine] == pytest.approx(math.cos(angle), abs=1e-7)
    assert table.dtype == torch.float32
    assert torch.equal(patch.sincos_1d(torch.tensor([2.0, 5.0]), 6, interleaved=interleaved), table[[2, 5]])


@pytest.mark.parametrize("column_first", [True, False])
def test_sincos_2d_halves_encode_column_and_row_of_a_rectangle(column_first):
    table = patch.sincos_2d((2, 3), 8, column_first=column_first, prefix=1)
    assert table.shape == (7, 8)
    assert table[0].abs().max() == 0
    line = patch.sincos_1d(3, 4)
    for row in range(2):
        for column in range(3):
            halves = [line[column], line[row]]
            assert torch.equal(table[1 + row * 3 + column], torch.cat(halves if column_first else halves[::-1]))


def test_separable_adds_time_and_place():
    time, place = torch.rand(3, 4), torch.rand(5, 4)
    assert torch.equal(patch.separable(time, place)[2 * 5 + 3], time[2] + place[3])


def test_grid_positions_run_the_last_axis_fastest():
    assert patch.grid_positions((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_interpolate_positions():
    table = torch.rand(1, 1 + 12, 4)
    assert patch.interpolate_positions(table, (3, 4), (3, 4), prefix=1) is table
    larger = patch.interpolate_positions(table, (3, 4), (5, 6), prefix=1)
    field = F.interpolate(table[:, 1:].reshape(1, 3, 4, 4).permute(0, 3, 1, 2), size=(5, 6), mode="bicubic", align_corners=False)
    assert torch.equal(larger[:, :1], table[:, :1])
    assert torch.equal(larger[0, 1 + 2 * 6 + 5], field[0, :, 2, 5])
    ramp = torch.arange(4.0)[:, None]
    assert patch.interpolate_positions(ramp, (4,), (8,))[:, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    cube = patch.interpolate_positions(torch.ones(8, 3), (2, 2, 2), (4, 2, 3))
    torch.testing.assert_close(cube, torch.ones(24, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: patch.patchify(torch.rand(1, 3, 30, 33), (16, 16)), r"next valid size is \(32, 48\)"),
        (lambda: patch.patchify(torch.rand(1, 3, 8), (2, 2)), "2 sides"),
        (lambda: patch.patchify(torch.rand(1, 3, 4, 4), (2, 2), "middle"), "last or first"),
        (lambda: patch.unpatchify(torch.rand(1, 5, 12), (2, 2), (2, 2)), "expected"),
        (lambda: patch.take_patches(torch.rand(2, 1, 4, 4), (2, 2), torch.zeros(1, 2, dtype=torch.long)), "keep"),
        (lambda: patch.PatchEmbed(3, 4, (2, 2))(torch.rand(1, 4, 4, 4)), "3 channels"),
        (lambda: patch.PatchEmbed(3, 4, (2, 2, 2, 2)), "1 to 3 axes"),
        (lambda: patch.sincos_1d(4, 5), "even"),
        (lambda: patch.sincos_2d((2, 2), 6), "multiple of 4"),
        (lambda: patch.interpolate_positions(torch.rand(9, 4), (2, 2), (4, 4)), "9 rows"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
