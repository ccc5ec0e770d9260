"""The method's parts by hand, the published sizes, checkpoints, two processes, and wrong input to the models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.masking import from_hidden, gather
from projects.hicmae import SIZES, EmotionModel, HiCMAE
from projects.hicmae.layers import CrossSelfBlock, FusionEncoder, last_rows, self_block
from projects.hicmae.model import clip_feature, level_features, similarity
from projects.hicmae.optim import groups, lr_at
from projects.hicmae.weights import load_reference, our_name, read_checkpoint, reference_name, reference_state

TINY: dict[str, Any] = {
    "image_size": 16,
    "frames": 4,
    "patch_size": 8,
    "audio_size": (32, 16),
    "audio_patch_size": 8,
    "embed_dim": 16,
    "num_heads": 2,
    "depth": 3,
}
BEFORE: dict[str, Any] = TINY | {
    "decoder_dim": 12,
    "decoder_heads": 2,
    "decoder_depth": 3,
    "levels": (1, 3),
    "mask_ratio": 0.5,
    "audio_mask_ratio": 0.5,
}


def clips(batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 4, 16, 16, generator=generator), torch.randn(batch, 1, 32, 16, generator=generator)


def model(**changes: Any) -> HiCMAE:
    torch.manual_seed(0)
    return HiCMAE(**(BEFORE | changes))


# -- parts


def test_masks_are_tubes_and_differ_between_clips() -> None:
    net = HiCMAE(**SIZES["tiny"])
    mask = net.draw_video_mask(4, torch.Generator().manual_seed(0))
    slices = mask.hidden.view(4, 8, 100)
    assert (mask.kept, int(mask.hidden[0].sum())) == (80, 720)
    assert (slices == slices[:, :1]).all()
    assert not (mask.hidden[0] == mask.hidden[1]).all()
    sound = net.draw_audio_mask(4, torch.Generator().manual_seed(0))
    assert (sound.kept, int(sound.hidden[0].sum())) == (26, 102)
    for each in (mask, sound):
        assert (each.keep.diff(dim=1) > 0).all()
        assert (each.masked.diff(dim=1) > 0).all()


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    net, (video, audio) = model(), clips()
    masks = net.draw_video_mask(3), net.draw_audio_mask(3)
    first = net(video, audio, *masks)
    cubes = masks[0].hidden.view(3, 1, 2, 2, 2).repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    second = net(torch.where(cubes, torch.randn_like(video), video), audio, *masks)
    assert torch.equal(first.video_prediction, second.video_prediction)
    assert first.video_loss != second.video_loss


def test_difference_target_by_hand() -> None:
    net, (video, _) = model(), clips()
    hidden = torch.ones(3, 8, dtype=torch.bool)
    hidden[:, 0] = False
    target = net.video_target(video, from_hidden(hidden))[1, 2].view(2, 8, 8, 3)  # token 3: first slice, second row, second column
    cube = video[1, :, :2, 8:, 8:] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
        3, 1, 1, 1
    )
    cube = (cube - cube.mean((1, 2, 3), keepdim=True)) / (cube.flatten(1).std(1).view(3, 1, 1, 1) + 1e-6)
    torch.testing.assert_close(target[0], cube[:, 0].permute(1, 2, 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target[1], (cube[:, 1] - cube[:, 0]).permute(1, 2, 0), rtol=1e-4, atol=1e-5)


def test_weighted_difference_splits_frames() -> None:
    (video, audio), out = clips(), {}
    for weight in (None, 0.0, 1.0, 0.5):
        net = model(difference_weight=weight)
        out[weight] = net(video, audio, net.draw_video_mask(3, torch.Generator().manual_seed(1))).video_loss.item()
    assert out[None] == pytest.approx((out[0.0] + out[1.0]) / 2, rel=1e-5)
    assert out[0.5] == pytest.approx(out[None], rel=1e-5)


def test_contrast_sums_the_levels_and_follows_the_formula() -> None:
    net, (video, audio) = model(), clips()
    out = net(video, audio)
    for term, level in zip(out.contrastive_per_level, (1, 3), strict=True):
        v, a = (tokens[level].detach().mean(1) for tokens in (out.video_levels, out.audio_levels))
        logits = [[float(v[i] @ a[j] / v[i].norm() / a[j].norm() / 0.07) for j in range(3)] for i in range(3)]
        rows = torch.tensor(logits)
        by_hand = -(rows.log_softmax(1).diag().mean() + rows.log_softmax(0).diag().mean()) / 2
        assert float(term) == pytest.approx(float(by_hand), rel=1e-4)
    assert float(out.loss) == pytest.approx(float(out.video_loss + out.audio_loss + 0.0025 * out.contrastive_per_level.sum()), rel=1e-6)


def test_decoder_reads_levels_in_reverse_and_before_fusion() -> None:
    net, (video, audio) = model(), clips()
    out = net(video, audio)
    decoder, mask = net.decoder, out.video_mask
    seen = gather(decoder.positions[None], mask.keep)
    x = torch.cat(
        [
            decoder.embed(net.fuse(out.video_levels, out.audio_levels)[0]) + seen,
            decoder.mask_token + gather(decoder.positions[None], mask.masked),
        ],
        1,
    )
    x = decoder.blocks[0](x)
    for block, level in ((decoder.blocks[1], 3), (decoder.blocks[2], 1)):
        x = block(x, decoder.embed(out.video_levels[level]) + seen)
    expected = decoder.head(decoder.norm(x[:, mask.kept :]))
    torch.testing.assert_close(out.video_prediction, expected, rtol=1e-5, atol=1e-6)


def test_last_rows_equal_the_whole_block() -> None:
    torch.manual_seed(0)
    block, x = self_block(16, 2), torch.randn(2, 9, 16)
    torch.testing.assert_close(last_rows(block, x, 4), block(x)[:, 4:])


@pytest.mark.parametrize("order", ["both", "audio_first", "video_first"])
def test_fusion_order(order: Any) -> None:
    torch.manual_seed(0)
    fusion = FusionEncoder(8, 8, 1, 2, 2, order=order)
    v, a = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    new_v, new_a = fusion(v, a)
    video, audio = fusion.blocks[0], fusion.blocks_audio[0]
    expected = {
        "both": (video(v, a), audio(a, v)),
        "audio_first": (video(v, audio(a, v)), audio(a, v)),
        "video_first": (video(v, a), audio(a, video(v, a))),
    }[order]
    torch.testing.assert_close(new_v, fusion.norm(expected[0]))
    torch.testing.assert_close(new_a, fusion.norm_audio(expected[1]))


def test_ablations_change_what_they_name() -> None:
    plain = model(skip=False)
    assert not any(isinstance(block, CrossSelfBlock) for block in plain.decoder.blocks)
    assert plain(*clips()).loss.isfinite()
    assert model(contrastive_weight=0.0)(*clips()).contrastive_loss is None
    assert model(contrastive_levels=(3,))(*clips()).contrastive_per_level.shape == (1,)
    assert model(target="raw_pixels").video_target(clips()[0], model().draw_video_mask(3)).abs().max() < 2
    one = model(modality="a")
    out = one(None, clips()[1])
    assert not hasattr(one, "encoder")
    assert out.video_loss is None
    assert torch.equal(out.loss, out.audio_loss)
    assert model(modality="v")(clips()[0], None).audio_loss is None


def test_feature_fusion_weighs_normed_levels() -> None:
    torch.manual_seed(0)
    net, (video, audio) = EmotionModel(5, **TINY).eval(), clips()
    with torch.no_grad():
        net.audio_layer_weights.copy_(torch.tensor([0.0, 2.0, -1.0]))
    out = net(video, audio)
    levels = level_features(net.encoder_audio, audio, None, (1, 2, 3))
    share = torch.tensor([0.0, 2.0, -1.0]).softmax(0)
    by_hand = sum(share[n - 1] * levels[n].mean(1) for n in (1, 2, 3))
    torch.testing.assert_close(out.audio_feature, by_hand)
    assert out.feature.shape == (3, 64)
    assert out.output.shape == (3, 5)
    torch.testing.assert_close(out.video_layers[:, 1], level_features(net.encoder, video, None, (2,))[2].mean(1))
    last = EmotionModel(5, **TINY, feature_fusion="last").eval()(video, audio)
    assert torch.equal(last.video_feature, last.video_layers[:, -1])
    assert EmotionModel(5, **TINY, modality="a")(None, audio).feature.shape == (3, 16)
    assert EmotionModel(3, **TINY, modality="v", activation="tanh")(video, None).output.abs().max() <= 1


def test_initial_values() -> None:
    net = model()
    for block in net.encoder.stack.blocks:
        assert not block.attn.qkv.q_bias.any()
        bound = (6 / (16 + 48)) ** 0.5  # Xavier over the joint matrix
        assert 0.8 * bound < block.attn.qkv.weight.abs().max() <= bound
    assert net.decoder.mask_token.abs().max() <= 0.02
    tuned = EmotionModel(5, **TINY)
    assert tuned.encoder.stack.blocks[0].mlp.fc1.weight.detach().std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(tuned.video_layer_weights, torch.full((3,), 1 / 3))
    rates = [block.drop_path1.drop_prob for block in EmotionModel(5, **TINY | {"depth": 4}).encoder.stack.blocks[1:]]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])


def test_learning_rate_begins_at_zero_and_peaks_before_the_cosine() -> None:
    rates = [lr_at(step, total=10, warmup=3, peak=1.0, final=0.1) for step in range(10)]
    assert rates[:4] == pytest.approx([0, 0.5, 1, 1])
    assert rates[-1] > 0.1
    assert lr_at(0, total=5, warmup=1, peak=1.0, final=0.0) == 0


# -- published sizes


@pytest.mark.parametrize(
    ("size", "before", "after"), [("tiny", 22_746_368, 20_474_395), ("small", 50_584_576, 45_653_787), ("base", 99_609_344, 80_794_651)]
)
def test_published_sizes_have_the_published_parameters(size: str, before: int, after: int) -> None:
    with torch.device("meta"):
        net = HiCMAE(**SIZES[size])
        tuned = EmotionModel(7, **{k: v for k, v in SIZES[size].items() if "decoder" not in k})
    assert sum(p.numel() for p in net.parameters()) == before
    assert sum(p.numel() for p in tuned.parameters()) == after
    assert (len(net.state_dict()), len(tuned.state_dict())) == (540, 370)


@pytest.mark.parametrize("size", list(SIZES))
def test_published_sizes_take_a_step(size: str) -> None:
    torch.manual_seed(0)
    net = HiCMAE(**SIZES[size])
    update = torch.optim.SGD(net.parameters(), lr=1e-3)
    video, audio = torch.randn(2, 3, 16, 160, 160), torch.randn(2, 1, 256, 128)
    first = net(video, audio, generator=torch.Generator().manual_seed(0))
    first.loss.backward()
    update.step()
    with torch.no_grad():
        second = net(video, audio, generator=torch.Generator().manual_seed(0))
    assert second.loss < first.loss
    assert first.video_prediction.shape == (2, 720, 1536)
    assert first.audio_prediction.shape == (2, 102, 256)


# -- checkpoints


def test_released_file_loads_for_both_stages(tmp_path: Path) -> None:
    net = model()
    content = {"model": reference_state(net), "epoch": "best", "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}, "scaler": {}}
    torch.save(content, tmp_path / "checkpoint-99.pth")
    assert "encoder.blocks.0.attn.q_bias" in content["model"]
    assert "mask_token_audio" in content["model"]
    again = model(temperature=0.1)
    torch.nn.init.zeros_(again.decoder.head.weight)
    load_reference(again, tmp_path / "checkpoint-99.pth")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    for modality in ("av", "a", "v"):
        tuned = EmotionModel(5, **TINY, modality=modality)
        load_reference(tuned, tmp_path / "checkpoint-99.pth")
        part = "encoder" if modality == "v" else "encoder_audio"
        assert torch.equal(getattr(tuned, part).stack.norm.weight, getattr(net, part).stack.norm.weight)
    torch.save({"module": content["model"]}, tmp_path / "m.pth")
    torch.save(content["model"], tmp_path / "bare.pth")
    assert read_checkpoint(tmp_path / "m.pth").keys() == read_checkpoint(tmp_path / "bare.pth").keys()
    assert all(our_name(reference_name(name)) == name for name in net.state_dict())


def test_checkpoints_that_do_not_fit_are_named() -> None:
    net, tuned = model(), EmotionModel(5, **TINY)
    with pytest.raises(ValueError, match=r"other shape .*\(16, 3, 2, 8, 8\) in the file, \(32, 3, 2, 8, 8\) in the model"):
        load_reference(model(embed_dim=32), reference_state(net))
    with pytest.raises(ValueError, match=r"missing .*unexpected .*video_layer_weights"):
        load_reference(net, reference_state(tuned))
    with pytest.raises(ValueError, match=r"begin with encoder\.*"):
        load_reference(net, {"backbone.weight": torch.zeros(1)})
    with pytest.warns(UserWarning, match="its head has 5 outputs, the model 7"):
        load_reference(EmotionModel(7, **TINY), reference_state(tuned))
    with pytest.raises(ValueError, match=r"other shape .*head\.weight: \(5, 64\) in the file, \(7, 64\)"):
        load_reference(EmotionModel(7, **TINY), reference_state(tuned), whole=True)
    with pytest.raises(ValueError, match=r"missing 6 \(video_layer_weights"):
        load_reference(tuned, reference_state(net), whole=True)
    less = {name: value for name, value in reference_state(net).items() if name != "encoder.norm.weight"}
    with pytest.raises(ValueError, match=r"missing 1 \(encoder.stack.norm.weight\)"):
        load_reference(EmotionModel(7, **TINY), less)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": {"encoder.x": torch.zeros(1)}, "args": Path("x")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="found a pickle that would run code"):
        read_checkpoint(tmp_path / "bad.pth")


# -- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 20}, r"video size \(4, 20, 20\): expected multiples of its patch \(2, 8, 8\)"),
        ({"frames": 3}, r"video size \(3, 16, 16\)"),
        ({"audio_size": (30, 16)}, r"audio size \(30, 16\)"),
        ({"levels": (1, 2, 3)}, r"levels \(1, 2, 3\) and decoder_depth=3: expected decoder_depth - 1 = 2 levels"),
        ({"levels": (1, 4)}, r"levels \(1, 4\): expected rising block numbers between 1 and the encoder's depth 3"),
        ({"audio_embed_dim": 32}, r"embed_dim=16 and audio_embed_dim=32: the contrastive loss multiplies"),
        ({"mask_ratio": 0.1}, "keeps 4 of 4 tokens"),
        ({"decoder_heads": 5}, "decoder: expected an even width that the heads divide"),
        ({"target": "pixels", "difference_weight": 0.5}, "expected target difference"),
        ({"modality": "x"}, "modality: expected av, a or v"),
        ({"fusion_order": "late"}, "fusion_order: expected both"),
    ],
)
def test_models_that_cannot_be_built_say_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_unequal_widths_are_fine_without_contrast() -> None:
    assert model(audio_embed_dim=8, contrastive_weight=0.0)(*clips()).loss.isfinite()


def test_wrong_inputs_and_masks_are_named() -> None:
    net, (video, audio) = model(), clips()
    with pytest.raises(ValueError, match=r"video: expected \(B, 3, 4, 16, 16\), found \(3, 3, 4, 8, 8\)"):
        net(video[..., :8, :8], audio)
    with pytest.raises(ValueError, match=r"audio: expected .* found nothing"):
        net(video, None)
    uneven = torch.zeros(3, 8, dtype=torch.bool)
    uneven[0, :2], uneven[1:, :3] = True, True
    with pytest.raises(ValueError, match="equally many in each sample, found 5 to 6"):
        net(video, audio, uneven)
    with pytest.raises(ValueError, match="expected 1 to 7 visible tokens"):
        net(video, audio, torch.zeros(3, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: expected \(3, 8\)"):
        net(video, audio, torch.arange(6).repeat(3, 1) < 3)
    with pytest.raises(ValueError, match="batch of 1 with contrastive_weight > 0"):
        net(video[:1], audio[:1])


# -- two processes


def _step(rank: int, gather_from: str | None, halves: bool) -> dict[str, Tensor]:
    net = model(gather=gather_from)
    (video, audio), own = clips(4), slice(2 * rank, 2 * rank + 2) if halves else slice(None)
    masks = net.draw_video_mask(4, torch.Generator().manual_seed(3)).hidden, net.draw_audio_mask(4, torch.Generator().manual_seed(4)).hidden
    net(video[own], audio[own], masks[0][own], masks[1][own]).loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    if halves:
        for grad in grads.values():  # what DDP does
            torch.distributed.all_reduce(grad)
            grad /= 2
    return grads


def test_two_processes_that_gather_give_the_gradient_of_one(two_processes: Any) -> None:
    whole = _step(0, None, False)
    for part in two_processes(_step, "full", True):
        for name, grad in part.items():
            torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-6)


def test_groups_hold_every_parameter_once() -> None:
    for net in (model(), EmotionModel(5, **TINY), EmotionModel(5, **TINY, modality="a")):
        names = [name for group in groups(net, 0.05, 0.75) for name in group["names"]]
        assert sorted(names) == sorted(name for name, _ in net.named_parameters())


def test_similarity_is_the_cosine_over_the_temperature() -> None:
    tokens = torch.randn(3, 5, 8)
    assert similarity(tokens, tokens, 0.5).diag() == pytest.approx([2.0] * 3, rel=1e-5)
    assert clip_feature(tokens).norm(dim=1) == pytest.approx([1.0] * 3, rel=1e-5)
