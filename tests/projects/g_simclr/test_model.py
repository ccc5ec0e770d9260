"""Loss, networks, views and schedules against slow definitions; what they refuse."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.contrastive import nt_xent, unit
from projects.g_simclr.augment import Augmentation, adjust_hue, adjust_saturation, augment, drop_colour
from projects.g_simclr.autoencoder import DEEP, DenoisingAutoencoder
from projects.g_simclr.classifier import Classifier
from projects.g_simclr.encoders import KerasResNet50, SameConv, TimmResNet, build
from projects.g_simclr.evaluate import linear_probe
from projects.g_simclr.model import GSimCLR
from projects.g_simclr.schedules import warm_restarts


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def loops(a: Tensor, b: Tensor, temperature: float) -> float:
    """NT-Xent as the paper writes it, anchor by anchor."""
    rows = [row / row.norm() for row in torch.cat([a, b])]
    n, total = len(a), 0.0
    for i, anchor in enumerate(rows):
        logits = [math.exp(float(anchor @ row) / temperature) for row in rows]
        total -= math.log(logits[(i + n) % (2 * n)] / sum(value for j, value in enumerate(logits) if j != i))
    return total / (2 * n)


def test_the_loss_is_the_mean_over_anchors_without_themselves_and_with_the_partner_once() -> None:
    a, b = rand(5, 7).double() - 0.5, rand(5, 7, seed=1).double() - 0.5
    assert float(nt_xent(unit(a), unit(b), 1 / 0.1)) == pytest.approx(loops(a, b, 0.1), rel=1e-12)
    alike = torch.ones(4, 3)
    assert float(nt_xent(unit(alike), unit(alike), 10.0)) == pytest.approx(math.log(7), rel=1e-6)


def test_views_pass_one_after_the_other_and_move_the_statistics_twice() -> None:
    torch.manual_seed(0)
    model = GSimCLR("small", channels=1, head=(8, 8, 4)).train()
    first, second = rand(6, 1, 8, 8), 0.5 * rand(6, 1, 8, 8, seed=1)
    convolution, norm = model.encoder.net[0], model.encoder.net[1]
    expected = torch.zeros(32)
    for view in (first, second):
        expected = 0.9 * expected + 0.1 * convolution(view).mean(dim=(0, 2, 3)).detach()
    model(first, second)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-6)
    assert int(norm.num_batches_tracked) == 2


def test_both_memory_layouts_give_one_loss() -> None:
    losses = []
    for channels_last in (True, False):
        torch.manual_seed(0)
        losses.append(GSimCLR(blocks=2, channels_last=channels_last).train()(rand(8, 3, 32, 32), rand(8, 3, 32, 32, seed=1)).loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_biases_that_batch_statistics_cancel_do_not_learn_and_others_do() -> None:
    model = GSimCLR(blocks=1)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {f"encoder.{part}.bias" for part in ("stem.0", *(f"stack.{i}.body.{j}" for i in range(3) for j in (0, 3, 6)))}
    assert model.encoder.stack[0].shortcut.bias.requires_grad
    assert all(p.requires_grad for p in Classifier(model.encoder, 10).parameters())


@pytest.mark.parametrize(("side", "out"), [(32, 16), (15, 8), (8, 4)])
def test_same_padding_at_stride_two_is_tensorflows(side: int, out: int) -> None:
    conv = SameConv(1, 1, 2)
    nn.init.ones_(conv.weight)
    nn.init.zeros_(conv.bias)
    found = conv(torch.ones(1, 1, side, side))[0, 0].detach()
    assert found.shape == (out, out)
    # even sides are padded right and bottom only, odd ones on both sides
    assert (float(found[0, 0]), float(found[-1, -1])) == ((9.0, 4.0) if side % 2 == 0 else (4.0, 4.0))


def test_encoders_give_the_maps_that_the_paper_names() -> None:
    x = rand(1, 3, 32, 32)
    assert build("cifar-resnet", blocks=1)(x).shape == (1, 256, 8, 8)
    assert TimmResNet("resnet18", width=8).eval()(x).shape == (1, 64, 4, 4)
    assert TimmResNet("resnet50", width=8, cifar_stem=False).eval()(x).shape == (1, 256, 1, 1)
    assert build("small", channels=1)(rand(1, 1, 8, 8)).shape == (1, 64, 2, 2)
    with pytest.raises(ValueError, match="expected cifar-resnet"):
        build("vgg16")  # type: ignore[arg-type]


def test_the_imagenet_networks_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        sizes = [
            sum(value.numel() for name, value in model.state_dict().items() if "num_batches" not in name)
            for model in (nn.ModuleList([KerasResNet50(), nn.Sequential(nn.Linear(2048, 256), nn.Linear(256, 128), nn.Linear(128, 50))]),)
        ]
        deep = DenoisingAutoencoder(3, **DEEP).state_dict()
    assert sizes == [24_151_602]
    count = {part: sum(v.numel() for n, v in deep.items() if n.startswith(part) and "num_batches" not in n) for part in ("", "encoder")}
    assert count == {"": 61_059_843, "encoder": 17_422_720}


def test_the_autoencoder_adds_noise_in_training_only() -> None:
    model, x = DenoisingAutoencoder(1, (4, 8), noise=0.5), rand(3, 1, 8, 8)
    assert not torch.equal(model(x).images, model(x).images)
    model.eval()
    assert torch.equal(model(x).images, model(x).images)
    assert model.embed(x).shape == (3, 8)
    torch.testing.assert_close(model.embed(x), model(x).latent.mean(dim=(2, 3)))
    flat = DenoisingAutoencoder(1, (4, 8), flat=True).eval()
    assert flat.embed(x).shape == (3, 32)


def test_saturation_and_hue_are_those_of_hsv() -> None:
    x = rand(2, 3, 4, 4)
    for function, place, amount in ((adjust_saturation, 1, 0.6), (adjust_hue, 0, 0.3)):
        found = function(x, amount).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
        for pixel, got in zip(x.permute(0, 2, 3, 1).reshape(-1, 3).tolist(), found, strict=True):
            hsv = list(colorsys.rgb_to_hsv(*pixel))
            hsv[place] = hsv[place] * amount if place == 1 else (hsv[place] + amount) % 1
            np.testing.assert_allclose(got, colorsys.hsv_to_rgb(*hsv), atol=2e-6)


def test_colours_outside_the_range_keep_their_largest_channel_and_lose_their_hue_below_zero() -> None:
    dark = -rand(1, 3, 2, 2) - 0.1
    torch.testing.assert_close(adjust_saturation(dark, 1.3), dark.amax(1, keepdim=True).expand_as(dark))
    mixed = rand(1, 3, 4, 4) * 2 - 0.5
    turned = adjust_hue(mixed, 0.4)
    torch.testing.assert_close(turned.amax(1), mixed.amax(1))
    torch.testing.assert_close(turned.amin(1), mixed.amin(1))


@pytest.mark.parametrize("per_batch", [False, True])
def test_draws_are_one_an_image_or_one_a_batch(per_batch: bool) -> None:
    same = rand(1, 3, 8, 8).expand(16, -1, -1, -1).contiguous()
    how = Augmentation(jitter=1.0, per_batch=per_batch)
    views = augment(same, how, torch.Generator().manual_seed(1))
    kinds = len({tuple(view.flatten().tolist()) for view in views})
    assert kinds == (1 if per_batch else 16)
    assert torch.equal(views, augment(same, how, torch.Generator().manual_seed(1)))
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1


def test_each_step_of_a_view_does_what_it_says() -> None:
    x = rand(400, 3, 4, 4)
    nothing = Augmentation(flip=0.0, jitter=0.0, grey=0.0)
    assert torch.equal(augment(x, nothing), x)
    torch.manual_seed(0)
    flipped = (augment(x, Augmentation(jitter=0.0, grey=0.0)) == x.flip(3)).flatten(1).all(1)
    assert 160 < int(flipped.sum()) < 240
    grey = augment(x, Augmentation(flip=0.0, jitter=0.0, grey=1.0))
    torch.testing.assert_close(grey, drop_colour(x))
    assert not torch.equal(augment(x, Augmentation(flip=0.0, jitter=1.0, grey=0.0)), x)
    moved = augment(torch.ones(50, 1, 3, 3), Augmentation(0.0, 0.0, 0.0, 0.0, shift=1))
    assert set(moved.sum(dim=(1, 2, 3)).tolist()) == {4.0, 6.0, 9.0}  # a corner, an edge, or nothing left the picture
    bright = augment(torch.ones(50, 1, 2, 2), Augmentation(0.0, 0.0, 0.0, 0.0, gain=0.4))
    assert 0.6 <= float(bright.min()) < 0.8 < 1.2 < float(bright.max()) <= 1.4
    noisy = augment(torch.zeros(200, 1, 4, 4), Augmentation(0.0, 0.0, 0.0, 0.0, noise=0.1))
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.1)


def test_restarts_fall_on_the_papers_steps() -> None:
    rates = [warm_restarts(step, first=1000, peak=0.1) for step in (0, 500, 999, 1000, 2000, 3000, 7000)]
    assert rates == pytest.approx([0.1, 0.05, 2.467e-7, 0.1, 0.05, 0.1, 0.1], rel=1e-3)
    # TensorFlow's formula: peak ((1 - floor) decay^i (1 + cos) / 2 + floor)
    assert warm_restarts(10, first=10, peak=2.0, decay=0.5, floor=0.1) == pytest.approx(2 * (0.9 * 0.5 + 0.1))
    assert warm_restarts(20, first=10, peak=2.0, decay=0.5, floor=0.1) == pytest.approx(2 * (0.9 * 0.5 * 0.5 + 0.1))
    assert warm_restarts(9_999_999, first=10, peak=1.0, floor=0.1) >= 0.1


def test_the_probe_stops_where_the_held_out_loss_rises_and_gives_the_best_weights_back() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 30)
    y = (x[:, 0] > 0).long()
    train, held_out = (x[:20], torch.randint(2, (20,))), (x[20:], y[20:])  # nothing to learn: the loss rises soon
    found = linear_probe(train, held_out, held_out, classes=2, epochs=200, lr=0.1, patience=2)
    lowest = found.losses.index(min(found.losses))
    assert len(found.losses) == lowest + 3 < 200
    best = float(nn.functional.cross_entropy(found.head(held_out[0]), held_out[1]).detach())
    assert best == pytest.approx(min(found.losses))
    learnt = linear_probe(held_out, held_out, held_out, classes=2, epochs=200, lr=0.1)
    assert learnt.accuracy > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GSimCLR(temperature=0.0), "temperature=0.0"),
        (lambda: GSimCLR(head=(50,)), "expected two layers"),
        (lambda: DenoisingAutoencoder()(torch.zeros(1, 3, 30, 32)), "multiples of 8"),
        (lambda: DenoisingAutoencoder(3, (4,) * 5).embed(torch.zeros(1, 3, 48, 48)), "multiples of 32"),
        (lambda: augment(255 * torch.ones(2, 3, 4, 4), Augmentation()), r"expected \[0,1\] floats, found max 255"),
        (lambda: augment(torch.ones(2, 3, 4, 4, dtype=torch.uint8), Augmentation()), "found torch.uint8"),
        (lambda: augment(torch.ones(2, 1, 4, 4), Augmentation()), "need 3; convert them to RGB"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
