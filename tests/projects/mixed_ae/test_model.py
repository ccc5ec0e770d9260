"""The method piece by piece: shares, mixing and back, attention and contrast by loops, what the loss looks at, variants, sizes, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.mixed_ae_step import plain_loss
from common.checkpoint import load_model, save_model
from common.patch import patchify
from projects.mixed_ae import Classifier, MixedAE
from projects.mixed_ae.information import gaussian_information, linear_prediction
from projects.mixed_ae.mixing import check, draw, full, group_size, mix, ownership
from projects.mixed_ae.model import SIZES, homologous_attention, homologous_contrast
from projects.mixed_ae.pretrain import VARIANTS
from projects.mixed_ae.weights import load_encoder, load_mae, read

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_dim": 8,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def make(seed: int = 0, **changes: Any) -> MixedAE:
    torch.manual_seed(seed)
    return MixedAE(**{**SMALL, **changes})


def pictures(count: int = 8, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def noise(rows: int = 2, tokens: int = 16) -> Tensor:
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(2))


# -- mixing


@pytest.mark.parametrize("group", [2, 4, 8])
def test_every_image_owns_exactly_its_share(group: int) -> None:
    owner = draw(torch.rand(50, 16), group)
    assert torch.equal(F.one_hot(owner, group).sum(1), torch.full((50, group), 16 // group))


def test_patches_stay_where_they_were_and_full_mixing_shows_each_once() -> None:
    images = pictures()
    patches, owner = patchify(images, (4, 4)), draw(noise(), 4)
    mixed = mix(patches, full(owner, 4))
    seen = torch.zeros(8, 16)
    for j in range(2):
        for s in range(4):
            for place in range(16):
                image = 4 * j + (int(owner[j, place]) + s) % 4
                assert torch.equal(mixed[j, s, place], patches[image, place])
                seen[image, place] += 1
    assert bool((seen == 1).all())


def test_mixing_pixels_is_mixing_tokens() -> None:
    model, images, assignment = make().double(), pictures().double(), draw(noise(), 4)[:, None]
    tokens = mix(model.patch_embed(images), assignment)[:, 0]
    pixels = mix(patchify(images, (4, 4), "first"), assignment)[:, 0]
    torch.testing.assert_close(F.linear(pixels, model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias), tokens)


def test_an_image_s_mask_hides_what_others_own() -> None:
    assignment = draw(noise(), 4)[:, None]
    mask = ownership(assignment, 4)
    for row in range(8):
        own = (assignment[row // 4, 0] == row % 4).nonzero()[:, 0]
        assert torch.equal(mask.keep[row], own)
        assert torch.equal(mask.masked[row].sort().values, mask.hidden[row].nonzero()[:, 0])


# -- the two homologous parts


def test_attention_with_every_key_is_timm_s_and_values_matter() -> None:
    model, x, owner = make(), torch.randn(2, 17, 16), draw(noise(), 4)
    attention = model.blocks[0].attn
    out, accuracy = homologous_attention(attention, x, 16, owner)
    torch.testing.assert_close(out, attention(x))
    assert float(accuracy) == pytest.approx(0.25)  # chance, the query itself among its homologous keys
    with torch.no_grad():
        attention.qkv.weight[32:] *= 2
    assert not torch.allclose(homologous_attention(attention, x, 4, owner)[0], out)


def test_the_choice_never_looks_at_the_owners() -> None:
    """Recognition comes from scores: other owners change the accuracy alone."""
    model, x = make(), torch.randn(2, 17, 16)
    others = draw(torch.rand(2, 16, generator=torch.Generator().manual_seed(1)), 4)
    (first, a), (second, b) = (homologous_attention(model.blocks[0].attn, x, 4, owner) for owner in (draw(noise(), 4), others))
    assert torch.equal(first, second)
    assert a != b


@pytest.mark.parametrize("temperature", [0.25, 0.1])
def test_contrast_by_loops_from_the_formula(temperature: float) -> None:
    z, owner = torch.randn(2, 16, 5, dtype=torch.float64), draw(noise(), 4)
    got, largest = homologous_contrast(z, owner, 4, temperature)
    u = z / z.norm(dim=-1, keepdim=True)
    seen = []
    for j in range(2):
        for anchor in range(16):
            others = [q for q in range(16) if q != anchor]
            logits = {q: float(u[j, anchor] @ u[j, q]) / temperature for q in others}
            seen += logits.values()
            base = math.log(sum(math.exp(value) for value in logits.values()))
            positives = [q for q in others if owner[j, q] == owner[j, anchor]]
            assert len(positives) == 3
            assert float(got[j, anchor]) == pytest.approx(sum(base - logits[q] for q in positives) / 3, rel=1e-12)
    assert float(largest) == pytest.approx(max(seen))


def test_contrast_says_log_of_the_others_when_features_say_nothing() -> None:
    got, _ = homologous_contrast(torch.ones(1, 64, 3, dtype=torch.float64), draw(torch.rand(1, 64), 4), 4, 0.25)
    assert float(got.mean()) == pytest.approx(math.log(63))
    apart = F.one_hot(torch.arange(16) // 4).double()[None] * 100
    perfect, _ = homologous_contrast(apart, torch.arange(16)[None] // 4, 4, 0.02)
    assert float(perfect.mean()) == pytest.approx(math.log(3), abs=1e-6)


# -- the whole step


def test_every_image_is_rebuilt_and_its_own_patches_weigh_nothing() -> None:
    model, images = make().double(), pictures().double()
    out = model(images, noise=noise().double())
    assert out.prediction.shape == (8, 12, 48)
    whole, patches = model.every_patch(out), patchify(images, (4, 4))
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (whole - target).square().mean(-1)
    torch.testing.assert_close(out.reconstruction, (error * out.mask.hidden).sum() / out.mask.hidden.sum())
    torch.testing.assert_close(out.loss, out.reconstruction + 0.1 * out.contrast)
    assert bool((out.mask.hidden.sum(1) == 12).all())


@pytest.mark.parametrize(
    ("sizes", "method"),
    [
        ({"image_size": 24}, {"ratio": 1 / 3, "temperature": 0.1, "weight": 0.5}),
        ({"image_size": 20, "patch_size": 2, "decoder_depth": 3}, {"ratio": 0.5, "count": 7}),
        ({"depth": 3, "num_heads": 1}, {"ratio": 0.125, "count": 16, "weight": 0.0}),
    ],
)
def test_the_step_is_its_plain_form(sizes: dict[str, Any], method: dict[str, Any]) -> None:
    """Loss and gradients of the method written equation by equation, which the benchmark times beside ours."""
    model = make(**sizes, **method).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # scores far from ties
    images = pictures(2 * model.group, model.image_shape[1]).double()
    torch.manual_seed(3)
    plain_loss(model, images).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(3)
    model(images).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-9, atol=1e-12)


def test_the_class_latent_reaches_every_image() -> None:
    model, images = make(), pictures()
    out = model(images, noise=noise())
    (grad,) = torch.autograd.grad(out.reconstruction, out.latent)
    assert bool((grad[:, 0].abs().sum(1) > 0).all())


def test_an_image_is_rebuilt_from_its_own_latents_alone() -> None:
    """The decoder of an image gets no token of another: with the encoder's attention cut, a change of one image reaches its own prediction alone."""
    model, images = make(depth=1, homologous=False, segments=False, weight=0.0), pictures()
    with torch.no_grad():  # without attention each latent is a function of its own patch
        for block in model.blocks:
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
    first = model(images, noise=noise()).prediction
    changed = images.clone()
    changed[1] += 1
    second = model(changed, noise=noise()).prediction
    same = [torch.equal(first[i], second[i]) for i in range(8)]
    assert same == [True, False, *[True] * 6]


@pytest.mark.parametrize("name", [*VARIANTS, "all"])
def test_each_variant_trains_all_its_parameters(name: str) -> None:
    model = make(**VARIANTS.get(name, {}))
    out = model(pictures(), generator=torch.Generator().manual_seed(3))
    out.loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == set()
    rows = {"mae": 8, "full-mixing": 32}.get(name, 8)
    assert out.prediction.shape == (rows, 12, 48)
    assert len(out.latent) == {"mae": 8, "full-mixing": 8}.get(name, 2)
    assert bool(out.accuracy.isnan().all()) == (name in ("mae", "naive", "segments"))
    assert (float(out.contrast.detach()) > 0) == (name in ("all", "no-segments", "full-mixing", "projector"))


def test_mae_is_the_published_step() -> None:
    """Visible tokens in any order, the decoder un-shuffled: the plain form from MAE's paper."""
    model, images, u = make(**VARIANTS["mae"]).double(), pictures(2).double(), noise().double()
    out = model(images, noise=u)
    keep = u.argsort(1)[:, :4]
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    x = torch.stack([x[i, keep[i]] for i in range(2)])
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1), x], 1)
    for block in model.blocks:
        x = block(x)
    y = model.decoder_embed(model.norm(x))
    filled = model.mask_token.expand(2, 16, -1).clone()
    for i in range(2):
        filled[i, keep[i]] = y[i, 1:]
    y = torch.cat([y[:, :1], filled], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        y = block(y)
    torch.testing.assert_close(model.every_patch(out), model.decoder_pred(model.decoder_norm(y))[:, 1:])


def test_segment_vectors_follow_the_slots_and_the_generator_is_the_only_chance() -> None:
    model, images = make(), pictures()
    slots = torch.tensor([[3, 2, 1, 0], [0, 1, 2, 3]])
    plain, dealt = model(images, noise=noise()), model(images, noise=noise(), slots=slots)
    assert not torch.allclose(plain.latent[0], dealt.latent[0])
    torch.testing.assert_close(plain.latent[1], dealt.latent[1])
    permuting = make(permute=True)
    losses = [permuting(images, generator=torch.Generator().manual_seed(s)).loss.item() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_given_assignment_equals_its_noise_and_chosen_layers_alone_recognise() -> None:
    model, images = make(layers=[1]), pictures()
    a, b = model(images, noise=noise()), model(images, assignment=draw(noise(), 4))
    assert torch.equal(a.loss, b.loss)
    assert a.accuracy.isnan().tolist() == [True, False]
    raw = make(layers=[1], norm_pix=False)
    raw.load_state_dict(model.state_dict())
    out = raw(images, noise=noise())
    hidden = torch.stack([patchify(images, (4, 4))[i, out.mask.masked[i]] for i in range(8)])
    torch.testing.assert_close(out.reconstruction, (out.prediction - hidden).square().mean())


def test_bfloat16_keeps_the_losses_in_float32() -> None:
    model, images = make(), pictures()
    want = model(images, noise=noise())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, noise=noise())
    assert {out.loss.dtype, out.contrast.dtype, out.reconstruction.dtype, out.accuracy.dtype} == {torch.float32}
    torch.testing.assert_close(out.loss, want.loss, rtol=0.03, atol=0)


def test_compiled_as_one_graph() -> None:
    model, images = make(depth=1), pictures()
    want = model(images, noise=noise())
    torch._dynamo.reset()
    got = torch.compile(lambda x, u: model(x, noise=u).loss, fullgraph=True, backend="aot_eager")(images, noise())
    torch.testing.assert_close(got, want.loss)


# -- evaluation, fine-tuning, checkpoints


def test_features_mix_nothing_and_use_ordinary_attention() -> None:
    model, images = make().eval(), pictures()
    got = model.features(images)
    alone = torch.cat([model.features(image[None]) for image in images])
    torch.testing.assert_close(got, alone)
    classifier = Classifier(**{k: v for k, v in SMALL.items() if not k.startswith("decoder")}, classes=3)
    load_encoder(classifier, model.state_dict())
    classifier.eval()
    tokens = classifier.forward_features(images)  # before MAE's final norm, which fine-tuning replaces by fc_norm
    torch.testing.assert_close(model.norm(tokens), got)
    with torch.no_grad():
        model.segment_embed += 1
    assert torch.equal(model.features(images), got)
    shifted = Classifier(**{k: v for k, v in SMALL.items() if not k.startswith("decoder")}, classes=3).eval()
    load_encoder(shifted, model.state_dict(), segments=True)
    torch.testing.assert_close(model.norm(shifted.forward_features(images)), model.features(images, segments=True))


def test_a_saved_model_comes_back(tmp_path: Any) -> None:
    model = make(layers=[1], projector=True)
    save_model(model, tmp_path)
    again = load_model(MixedAE, tmp_path)
    assert torch.equal(again(pictures(), noise=noise()).loss, model(pictures(), noise=noise()).loss)
    assert set(read(tmp_path)) == set(model.state_dict())


def test_an_mae_checkpoint_starts_pre_training(tmp_path: Any) -> None:
    mae, model = make(1, **VARIANTS["mae"]), make(2)
    torch.save({"model": mae.state_dict(), "epoch": 3}, tmp_path / "mae.pth")
    fresh = model.segment_embed.detach().clone()
    load_mae(model, tmp_path / "mae.pth")
    assert torch.equal(model.blocks[0].attn.qkv.weight, mae.blocks[0].attn.qkv.weight)
    assert torch.equal(model.segment_embed, fresh)
    encoder = {name: value for name, value in mae.state_dict().items() if not name.startswith(("decoder", "mask_token"))}
    load_mae(make(3), encoder)
    torch.save(encoder, tmp_path / "bare.pth")
    load_mae(make(3), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"missing 1 \(norm.bias"):
        load_mae(make(3), {name: value for name, value in encoder.items() if name != "norm.bias"})


def test_checkpoints_of_other_sizes_are_refused_or_resized() -> None:
    model, other = make(), make(ratio=0.5)
    with pytest.raises(ValueError, match=r"segment_embed has 2 rows, expected 4"):
        load_mae(model, other.state_dict())
    large = make(image_size=32)
    with pytest.raises(ValueError, match=r"pos_embed \(1, 65, 16\) is of a 8 x 8 grid, expected \(1, 17, 16\).*interpolate=True"):
        load_mae(model, large.state_dict())
    load_mae(model, large.state_dict(), interpolate=True)
    assert model.pos_embed.shape == (1, 17, 16)
    with pytest.raises(ValueError, match=r"patches of \(2, 2\), expected \(4, 4\); give patch_size=2"):
        load_mae(model, make(patch_size=2, image_size=8).state_dict())
    with pytest.raises(ValueError, match="segments=True expects a segment_embed"):
        load_encoder(
            Classifier(**{k: v for k, v in SMALL.items() if not k.startswith("decoder")}),
            make(**VARIANTS["mae"]).state_dict(),
            segments=True,
        )


# -- sizes


def test_published_sizes() -> None:
    """Encoder and decoder of MAE-B (111.9 M with its two position tables) and K x D segment numbers."""
    with torch.device("meta"):
        base, large, tiny = (MixedAE(**SIZES[name]) for name in ("base", "large", "tiny"))
    own = sum(p.numel() for p in base.parameters())
    tables = base.pos_embed.numel() + base.decoder_pos_embed.numel()
    assert base.segment_embed.numel() == 3072
    assert own - 3072 + tables == 111_907_840
    assert sum(p.numel() for p in tiny.parameters()) < 1_000_000
    assert (large.cls_token.shape[-1], len(large.blocks), large.count, base.count, tiny.count) == (1024, 24, 49, 49, 16)


def test_vit_b_at_224_takes_a_step() -> None:
    torch.manual_seed(0)
    model = MixedAE()
    images = torch.randn(4, 3, 224, 224)
    out = model(images, noise=torch.rand(1, 196))
    assert out.prediction.shape == (4, 147, 768)
    assert float(out.contrast.detach()) < 6
    out.loss.backward()
    before = model.segment_embed.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert bool((model.segment_embed != before).any())


# -- information


def test_naive_mixing_never_tells_less() -> None:
    for rho in (0.0, 0.2, 0.5, 0.9):
        masked, mixed = gaussian_information(8, 2.0, rho, [0, 3, 5])
        assert mixed >= masked - 1e-12
        assert (mixed - masked > 1e-6) == (rho > 0)
    with pytest.raises(ValueError, match="expected -1 < rho < 1"):
        gaussian_information(8, 2.0, 1.0, [0])
    with pytest.raises(ValueError, match="some hidden"):
        gaussian_information(2, 2.0, 0.5, [0, 1])


def test_least_squares_finds_what_fillers_tell() -> None:
    random = torch.Generator().manual_seed(0)
    scenes, own = torch.rand(400, 1, 3, 1, 1, generator=random), torch.rand(400, 2, 3, 8, 8, generator=random)
    owner = torch.tensor([0, 1, 1, 0])
    alone = linear_prediction(own.flatten(0, 1), 4, 2, owner)
    shared = linear_prediction((own + scenes).flatten(0, 1), 4, 2, owner)
    assert alone.mixed / alone.masked == pytest.approx(1, abs=0.05)
    assert shared.mixed < shared.masked * 0.95


# -- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.3}, r"ratio=0.3: expected one over a whole number"),
        ({"ratio": 1.0}, r"0 < ratio <= 0.5"),
        (
            {"ratio": 0.125, "image_size": 12},
            r"image of 12 in patches of 4 gives 9 patches, which groups of 8 do not divide; groups that do: \[3, 9\]",
        ),
        ({"image_size": 18}, "expected a multiple of patch_size=4"),
        ({"count": 17}, "count=17: expected 1 to 16"),
        ({"count": 0}, "count=0: expected 1 to 16"),
        ({"temperature": 0.0}, "temperature=0.0: expected more than 0"),
        ({"weight": -1.0}, "weight=-1.0: expected at least 0"),
        ({"layers": [2]}, r"layers=\[2\]: expected block numbers 0 to 1"),
        ({"mixing": "none"}, "has no groups: expected segments=False"),
        ({"mixing": "mixup"}, "expected compose, full or none"),
        ({"ratio": 1 / 16}, "no positive to attract"),
    ],
)
def test_settings_outside_their_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_wrong_calls_are_named() -> None:
    model, images = make(), pictures()
    with pytest.raises(ValueError, match=r"batch of 6 images: expected whole groups of 4; the nearest valid size is 8"):
        model(images[:6])
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 16\), found \(8, 1, 16, 16\)"):
        model(images[:, :1])
    with pytest.raises(ValueError, match=r"found \(8, 3, 8, 8\)"):
        model.features(images[..., :8, :8])
    with pytest.raises(ValueError, match=r"noise: expected \(2, 16\), got \(8, 16\)"):
        model(images, noise=torch.rand(8, 16))
    with pytest.raises(ValueError, match="expected features"):
        model.eval()(images)
    unequal = draw(noise(), 4)
    unequal[1, :3] = 0
    with pytest.raises(ValueError, match=r"sequence 0 of group 1 gives its 4 images \[\d, \d, \d, \d\] of 16 positions; expected 4 each"):
        model(images, assignment=unequal)
    outside = draw(noise(), 4) + 1
    with pytest.raises(ValueError, match=r"sequence 0 of group 0 .*\[0, 4, 4, 4\]"):
        model(images, assignment=outside)
    with pytest.raises(ValueError, match=r"assignment: expected integers \(2, sequences, 16\)"):
        model(images, assignment=unequal[:1])
    with pytest.raises(ValueError, match="got both"):
        model(images, assignment=unequal, noise=noise())
    with pytest.raises(ValueError, match="expected noise, got an assignment"):
        make(**VARIANTS["mae"])(images, assignment=unequal)
    with pytest.raises(ValueError, match="no segment vectors"):
        make(segments=False).features(images, segments=True)
    with pytest.raises(ValueError, match="15 patches do not divide by a group of 4; groups of 3, 5, 15 would"):
        draw(torch.rand(2, 15), 4)
    check(draw(noise(), 4)[:, None], 4, 2, 16)
    assert [group_size(r) for r in (0.5, 1 / 3, 0.25, 0.125)] == [2, 3, 4, 8]
