"""Attention patterns, read and written: under any kernel, in any tower, with padding, in decoding."""

import pytest
import torch

from interp import Add, Function, Replace, Scale, Zero
from interp.attention import explicit_attention
from tests import tiny
from tests.plain import reading

KERNELS = ["sdpa", "eager"]
NAMES = list(tiny.ALL)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_patterns_equal_those_that_eager_models_return(name, kernel) -> None:
    inputs, eager = tiny.inputs_for(name), tiny.vlm(name, "eager")
    vlm = tiny.vlm(name, kernel)
    with torch.no_grad():
        want = eager(inputs, output_attentions=True)
        plain = vlm(inputs).logits
    acts = vlm.capture(inputs, "blocks.*.attn.hook_pattern")
    patterns = acts.stack("attn.hook_pattern")
    # The same products in another order; probabilities are at most 1.
    torch.testing.assert_close(patterns, torch.stack(want.attentions), atol=1e-5, rtol=0)
    real = inputs["attention_mask"].bool()
    # Where a query sees nothing, at padding, the kernels differ; no real token sees that.
    torch.testing.assert_close(acts.output.logits[real], plain[real], atol=1e-4, rtol=1e-4)
    assert acts.axes("blocks.0.attn.hook_pattern") == ("batch", "head", "query", "key")
    assert not patterns.isnan().any()
    for row in range(len(real)):
        start = int((~real[row]).sum())
        assert not patterns[:, row, :, start:, :start].any()  # real tokens do not look at padding
        torch.testing.assert_close(patterns[:, row, :, start:].sum(-1), torch.ones_like(patterns[:, row, :, start:, 0]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_patterns_of_the_vision_tower(kernel) -> None:
    vlm, eager = tiny.vlm("llava", kernel), tiny.vlm("llava", "eager")
    inputs = tiny.image_inputs()
    with torch.no_grad():
        want = eager.model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    got = vlm.capture(inputs, "vision.blocks.*.attn.hook_pattern").stack("attn.hook_pattern", tower="vision")
    torch.testing.assert_close(got, torch.stack(want), atol=2e-6, rtol=0)
    with torch.no_grad():
        clean = vlm(inputs).logits
        for edit in (
            Zero("vision.blocks.1.attn.hook_pattern"),
            Scale("vision.blocks.0.attn.hook_pattern", 0.5, heads=1),
        ):
            with vlm.edit(edit):
                assert (vlm(inputs).logits - clean).abs().max() > 0.01, edit


@pytest.mark.parametrize("name", NAMES)
def test_the_pattern_mixes_the_values(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    acts = vlm.capture(inputs, "blocks.1.attn.*")
    pattern, v, z = (acts[f"blocks.1.attn.hook_{leaf}"] for leaf in ("pattern", "v", "z"))
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_patterns_in_decoding_equal_those_of_one_whole_forward(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    site = "blocks.2.attn.hook_pattern"
    with vlm.record(site) as acts:
        new = vlm.generate(inputs, max_new_tokens=4, min_new_tokens=4)
    calls = acts.calls(site)
    length = inputs["input_ids"].shape[1]
    assert [tuple(x.shape[2:]) for x in calls] == [(length, length), *((1, length + k) for k in (1, 2, 3))]
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], new[:, :3]], 1)
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    whole = vlm.capture(longer, site)[site]
    for k in (1, 2, 3):
        torch.testing.assert_close(calls[k], whole[:, :, [length + k - 1], : length + k], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ("[key]", lambda q, k: (k,)),
        ("[query, key]", lambda q, k: (q, k)),
        ("[head, query, key]", lambda q, k: (2, q, k)),
        ("[batch, head, query, key]", lambda q, k: (2, 2, q, k)),
    ],
    ids=["k", "qk", "hqk", "bhqk"],
)
def test_edited_patterns_against_hand_written_attention(kernel, value, shape) -> None:
    vlm, inputs = tiny.vlm("llama", kernel), tiny.text_inputs()
    site, heads, at = "blocks.1.attn.hook_pattern", [3, 1], [-2, -1]
    before = vlm.capture(inputs, ["blocks.1.attn.*"])
    new = torch.rand(shape(2, 9))
    after = vlm.capture(
        inputs,
        ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z"],
        edits=Replace(site, new, at=at, heads=heads),
    )
    want = before[site].clone()
    for row in range(2):
        for h, head in enumerate(heads):
            for q, query in enumerate((7, 8)):
                full = new[(None,) * (4 - new.ndim)].expand(2, 2, 2, 9) if new.ndim > 1 else new.expand(2, 2, 2, 9)
                want[row, head, query] = full[row, h, q]
    assert torch.equal(after[site], want)
    v = before["blocks.1.attn.hook_v"].repeat_interleave(2, dim=2)
    torch.testing.assert_close(
        torch.einsum("bhqk,bkhd->bqhd", want, v), after["blocks.1.attn.hook_z"], atol=1e-5, rtol=1e-5
    )


def test_functions_and_self_patches_of_patterns() -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs()
    site = "blocks.1.attn.hook_pattern"
    acts = vlm.capture(inputs, site)
    shapes = []

    def seen(x):
        shapes.append(tuple(x.shape))
        return x

    for edit in (Replace(site, acts[site]), Function(site, seen)):
        assert torch.equal(vlm.capture(inputs, site, edits=edit).output.logits, acts.output.logits)
    vlm.capture(inputs, site, edits=Function(site, seen, at=[0, 1], heads=2, rows=1))
    assert shapes == [tuple(acts[site].shape), (1, 1, 2, 21)]
    half = vlm.capture(inputs, site, edits=Scale(site, 0.5, at="last"))[site]
    assert torch.equal(half[:, :, -1], acts[site][:, :, -1] / 2)


def test_only_touched_layers_leave_their_kernel() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    layers = [vlm.model.model.layers[i].self_attn for i in range(4)]
    with vlm.edit(Zero("blocks.2.attn.hook_pattern", at="last", heads=0)), torch.no_grad():
        kernels = [attention.config._attn_implementation for attention in layers]
        assert kernels[:2] == ["sdpa", "sdpa"] and kernels[3] == "sdpa" and kernels[2] != "sdpa"
        assert vlm.model.config._attn_implementation == "sdpa"
        with reading(vlm.model, "model.layers.2.self_attn.o_proj", "input") as seen:
            vlm(inputs)
        assert not seen[0][:, -1, :12].any()
        assert seen[0][:, -1, 12:].all()
    assert [attention.config._attn_implementation for attention in layers] == ["sdpa"] * 4


def test_masks_of_every_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 4, generator=generator) for heads in (4, 2, 2))

    class Module(torch.nn.Module):
        is_causal = True

    visible = (
        torch.ones(5, 5, dtype=torch.bool).tril() & torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])[:, None].bool()
    )
    visible = visible[:, None]
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~visible, torch.finfo(torch.float32).min)
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    outs = [explicit_attention(Module(), q, k, v, mask) for mask in (visible, additive, padding)]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)
    for out, _ in outs:
        torch.testing.assert_close(out[0, 1:], want[0, 1:], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out[1], want[1], atol=1e-6, rtol=1e-5)
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(explicit_attention(Module(), q, k, v, None)[0], causal, atol=1e-6, rtol=1e-5)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(
        explicit_attention(Module(), q, k, v, None, is_causal=False)[0], full, atol=1e-6, rtol=1e-5
    )
    # The last query of a decode step sees all keys; a window cuts what lies too far back.
    _, pattern = explicit_attention(Module(), q[:, :, -1:], k, v, None)
    assert (pattern > 0).all()
    _, pattern = explicit_attention(Module(), q, k, v, None, sliding_window=2)
    assert torch.equal(pattern[0, 0] > 0, torch.ones(5, 5).tril().triu(-1).bool())


def test_attention_gradients() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    site = "blocks.1.attn.hook_pattern"
    acts = vlm.capture(inputs, site, grad=True)
    metric = acts.output.logits[:, -1, 5].sum()
    grad = acts.gradients(metric)[site]
    assert grad.shape == acts[site].shape and grad.any()
    step = torch.zeros_like(grad)
    step[0, 1, -1, 4] = 1e-2
    outs = [
        vlm.capture(inputs, site, edits=Add(site, sign * step)).output.logits[:, -1, 5].sum().item() for sign in (1, -1)
    ]
    assert (outs[0] - outs[1]) / 2e-2 == pytest.approx(grad[0, 1, -1, 4].item(), rel=0.05, abs=1e-2)
