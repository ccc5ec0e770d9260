from __future__ import annotations

import pytest
import torch
from torch import nn

from common.blocks import Blocks, Decoder, MaskedEncoder, QVLinear, xavier_init
from common.masking import from_keep, gather, random_mask, restore_tokens
from common.patch import PatchEmbed, sincos_2d

DIM, HEADS = 8, 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stir(module):
    """Give every parameter a value that matters (biases and layer scales start at constants)."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def slow(stack, x, bias=None, positions=None):
    """One head and one query at a time; returns the outputs of the blocks."""
    outputs = []
    for block in stack.blocks:
        if positions is not None:
            x = x + positions
        y = block.norm1(x)
        weight, offset = block.attn.qkv.weight, torch.zeros(3 * DIM, dtype=x.dtype)
        if isinstance(block.attn.qkv, QVLinear):
            offset[:DIM], offset[2 * DIM :] = block.attn.qkv.q_bias, block.attn.qkv.v_bias
        elif block.attn.qkv.bias is not None:
            offset = block.attn.qkv.bias
        q, k, v = (y @ weight.T + offset).split(DIM, dim=2)
        heads = []
        for h in range(HEADS):
            part = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
            score = q[..., part] @ k[..., part].transpose(1, 2) / (DIM // HEADS) ** 0.5
            if bias is not None:
                score = score + bias[:, h]
            heads.append(score.softmax(2) @ v[..., part])
        gain1, gain2 = (getattr(scale, "gamma", 1.0) for scale in (block.ls1, block.ls2))
        x = x + gain1 * block.attn.proj(torch.cat(heads, 2))
        x = x + gain2 * block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("qkv_bias", [True, False, "no_key"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_stack_against_a_slow_one(qkv_bias, layer_scale):
    stack = stir(Blocks(DIM, 2, HEADS, qkv_bias=qkv_bias, layer_scale=layer_scale, eps=1e-5))
    x, bias = torch.randn(3, 5, DIM, dtype=torch.float64), torch.randn(3, HEADS, 5, 5, dtype=torch.float64)
    for extra in ({}, {"bias": bias}, {"positions": torch.randn(1, 5, DIM, dtype=torch.float64)}):
        expected = slow(stack, x, **extra)
        found = stack(x, taps=(0, 1, 2), **extra)
        torch.testing.assert_close(found.taps[1], expected[0])
        torch.testing.assert_close(found.taps[2], expected[1])
        assert found.taps[0] is x
        torch.testing.assert_close(found.tokens, nn.functional.layer_norm(expected[1], (DIM,), stack.norm.weight, stack.norm.bias, 1e-5))
    assert (stack.blocks[0].attn.qkv.bias is not None) == (qkv_bias is True)


def test_no_key_bias_has_the_parameters_of_videomae():
    names = {name for name, _ in Blocks(DIM, 1, HEADS, qkv_bias="no_key").named_parameters() if "qkv" in name}
    assert names == {f"blocks.0.attn.qkv.{n}" for n in ("weight", "q_bias", "v_bias")}


def test_without_final_norm_the_tokens_are_the_last_tap():
    stack = Blocks(DIM, 2, HEADS, final_norm=False)
    out = stack(torch.randn(1, 3, DIM), taps=[2])
    assert torch.equal(out.tokens, out.taps[2])


def test_drop_path_rises_linearly_and_acts_in_training_only():
    stack = stir(Blocks(DIM, 3, HEADS, drop_path=0.5))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in stack.blocks]
    assert rates == [0.0, 0.25, 0.5]
    x = torch.randn(4, 3, DIM, dtype=torch.float64)
    stack.eval()
    assert torch.equal(stack(x).tokens, stack(x).tokens)
    stack.train()
    assert not torch.equal(stack(x).tokens, stack(x).tokens)


@pytest.mark.parametrize("biased", [False, True])
def test_checkpointing_changes_no_number_drop_path_included(biased):
    stack = stir(Blocks(DIM, 2, HEADS, drop_path=0.4))
    x = torch.randn(4, 3, DIM, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, HEADS, 3, 3, dtype=torch.float64) if biased else None
    results = []
    for stack.checkpointing in (False, True):
        torch.manual_seed(3)
        out = stack(x, bias=bias).tokens
        results.append((out, torch.autograd.grad(out.square().sum(), [x, stack.blocks[0].mlp.fc1.weight])))
    assert torch.equal(results[0][0], results[1][0])
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(plain, recomputed)
    with torch.no_grad():
        stack.eval()(x)


def encoder(*, class_token, positions=True):
    table = sincos_2d((2, 3), DIM, prefix=int(class_token)) if positions else None
    return stir(MaskedEncoder(PatchEmbed(3, DIM, (4, 4)), Blocks(DIM, 2, HEADS), positions=table, class_token=class_token))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_masked_encoder_sees_the_visible_patches_alone(class_token, positions):
    model, images, mask = encoder(class_token=class_token, positions=positions), torch.randn(2, 3, 8, 12).double(), random_mask(2, 6, 0.5)
    tokens = model.embed(images)
    if positions:
        tokens = tokens + model.positions[int(class_token) :]
    front = [model.class_token.expand(2, -1, -1)] if class_token else []
    expected = slow(model.stack, torch.cat([*front, gather(tokens, mask.keep)], 1))
    found = model(images, mask, taps=[2])
    torch.testing.assert_close(found.taps[2], expected[1])
    everything = model(images)
    torch.testing.assert_close(everything.tokens, model.stack.norm(slow(model.stack, torch.cat([*front, tokens], 1))[1]))
    hidden = images.clone()
    for b, n in mask.hidden.nonzero().tolist():
        hidden[b, :, n // 3 * 4 : n // 3 * 4 + 4, n % 3 * 4 : n % 3 * 4 + 4] = 7.0
    assert torch.equal(model(hidden, mask).tokens, found.tokens)


def test_fixed_positions_stay_out_of_the_state_dict_learned_ones_are_in_it():
    assert "positions" not in encoder(class_token=True).state_dict()
    learned = MaskedEncoder(PatchEmbed(3, DIM, (4, 4)), Blocks(DIM, 1, HEADS), positions=nn.Parameter(torch.zeros(6, DIM)))
    assert "positions" in learned.state_dict()
    learned(torch.randn(1, 3, 8, 12)).tokens.sum().backward()
    assert learned.positions.grad is not None


def test_encoder_bias_reaches_the_blocks():
    model, images = encoder(class_token=False), torch.randn(2, 3, 8, 12).double()
    bias = torch.randn(1, HEADS, 6, 6, dtype=torch.float64)
    expected = slow(model.stack, model.embed(images) + model.positions, bias=bias)[1]
    torch.testing.assert_close(model(images, bias=bias).tokens, model.stack.norm(expected))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("positions", [True, False])
def test_decoder_against_the_unshuffled_sequence(prefix, positions):
    table = sincos_2d((2, 3), DIM, prefix=prefix) if positions else None
    decoder = stir(Decoder(5, 7, Blocks(DIM, 2, HEADS, final_norm=False), positions=table, prefix=prefix))
    mask = from_keep(torch.tensor([[4, 1], [0, 5]]), 6)
    visible = torch.randn(2, prefix + 2, 5, dtype=torch.float64)
    x = decoder.embed(visible)
    front, rest = x[:, :prefix], x[:, prefix:]
    tokens = restore_tokens(rest, mask, decoder.mask_token, decoder.positions[prefix:] if positions else None)
    front = front + decoder.positions[:prefix] if positions else front
    expected = decoder.head(decoder.norm(slow(decoder.stack, torch.cat([front, tokens], 1))[1][:, prefix:]))
    torch.testing.assert_close(decoder(visible, mask, rows="all"), expected)
    torch.testing.assert_close(decoder(visible, mask), gather(expected, mask.masked))


def test_decoder_without_bias_in_its_first_map():
    assert Decoder(5, 7, Blocks(DIM, 1, HEADS, final_norm=False), embed_bias=False).embed.bias is None


def test_xavier_init():
    model = MaskedEncoder(PatchEmbed(3, DIM, (4, 4)), stir(Blocks(DIM, 1, HEADS)).float())
    before = model.embed.proj.bias.clone()
    model.apply(xavier_init)
    limit = (6 / (DIM + 48)) ** 0.5
    assert 0.9 * limit < model.embed.proj.weight.abs().max() <= limit
    assert torch.equal(model.embed.proj.bias, before)
    qkv = model.stack.blocks[0].attn.qkv
    assert 0.9 * (6 / (4 * DIM)) ** 0.5 < qkv.weight.abs().max() <= (6 / (4 * DIM)) ** 0.5
    assert qkv.bias.abs().max() == 0
    assert model.stack.norm.weight.tolist() == [1.0] * DIM
    assert model.stack.norm.bias.tolist() == [0.0] * DIM


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Blocks(10, 1, 3), "dim=10 and num_heads=3"),
        (lambda: Blocks(DIM, 2, HEADS)(torch.rand(1, 3, DIM), taps=[3]), "0 to 2"),
        (lambda: encoder(class_token=False)(torch.rand(1, 3, 8, 16).double()), "6 patches"),
        (lambda: encoder(class_token=False)(torch.rand(1, 3, 8, 12).double(), random_mask(1, 8, 0.5)), r"expected \(1, 6\)"),
        (lambda: Decoder(5, 7, Blocks(DIM, 1, HEADS)), "final_norm=False"),
        (lambda: Decoder(5, 7, Blocks(DIM, 1, HEADS, final_norm=False))(torch.rand(1, 4, 5), random_mask(1, 6, 0.5)), r"0 \+ 3"),
        (
            lambda: Decoder(5, 7, Blocks(DIM, 1, HEADS, final_norm=False))(torch.rand(1, 3, 5), random_mask(1, 6, 0.5), rows="some"),
            "rows",
        ),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
