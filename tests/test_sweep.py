"""A sweep against the loop of edited forwards that it stands for."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from interp import VLM, Add, Function, MeanAblate, Replace, Resample, Scale, Zero
from interp.errors import InputError, NeverFiredError, UnknownNameError
from tests import tiny
from tests.plain import state_of

# Logits are of order 10; prefix and suffix are two matrix products where the loop runs one. Measured: 7e-6.
TOLERANCE = {"atol": 5e-5, "rtol": 0}
RESID = "blocks.{}.hook_resid_post"


def naive(vlm, inputs, variants):
    logits = []
    for edits in variants:
        with torch.no_grad():
            if edits:
                with vlm.edit(*edits):
                    logits.append(vlm(inputs).logits[:, -1])
            else:
                logits.append(vlm(inputs).logits[:, -1])
    return torch.stack(logits)


def mixed(vlm, batch):
    """Variants of every kind: other positions, sites, rows, heads, patterns, several edits, none."""
    g = torch.Generator().manual_seed(0)
    d = vlm.d_model

    def draw(*shape):
        return 3 * torch.randn(*shape, generator=g)

    heads = vlm.place("blocks.1.attn.hook_v")
    return [
        [],
        [Replace(RESID.format(0), draw(batch, d), at="last")],
        [Replace(RESID.format(2), draw(d), at=-3, rows=0)],
        [
            Add(RESID.format(1), draw(batch, 2, d), at=[-2, -4]),
            Zero("blocks.2.hook_mlp_out", at="last", rows=-1),
        ],
        [Replace("blocks.1.attn.hook_v", draw(heads.width), heads=1, at=-2)],
        [Scale("blocks.1.attn.hook_pattern", 0.0, heads=[0, 2], at="last")],
        [Function("blocks.3.hook_attn_out", torch.tanh, at=-1)],
        [MeanAblate(RESID.format(1), at=[-1, -2])],
        [Resample(RESID.format(1), at="last")],
        [Add("ln_final.hook_out", draw(batch, d), at="last")],
    ]


@pytest.mark.parametrize("name", tiny.ALL)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_sweep_equals_the_loop(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    variants = mixed(vlm, 2)
    want, before = naive(vlm, inputs, variants), state_of(vlm.model)
    swept = vlm.sweep(inputs, variants)
    torch.testing.assert_close(swept.logits, want, **TOLERANCE)
    assert (want[1:] - want[0]).abs().amax((1, 2)).min() > 3e-4  # every edit moves the output
    assert swept.plan.shared_prefix == inputs["input_ids"].shape[1] - 4 and not swept.plan.reason
    assert state_of(vlm.model) == before
    for max_rows in (1, 5):
        torch.testing.assert_close(vlm.sweep(inputs, variants, max_rows=max_rows).logits, want, **TOLERANCE)


def test_rows_that_are_padding_up_to_the_edited_token() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs((9, 2))
    variants = [[Add(RESID.format(1), torch.ones(32), at=-2)], [Zero("blocks.1.hook_mlp_out")]]
    for case in (variants, variants[:1]):
        torch.testing.assert_close(vlm.sweep(inputs, case).logits, naive(vlm, inputs, case), **TOLERANCE)


def test_patterns_after_a_shared_prefix_see_the_whole_prompt() -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs()
    length = inputs["input_ids"].shape[1]
    uniform = torch.full((length,), 1 / length)
    variants = [[Replace(f"blocks.{layer}.attn.hook_pattern", uniform, at="last")] for layer in range(4)]
    swept = vlm.sweep(inputs, variants)
    assert swept.plan.shared_prefix == length - 1
    torch.testing.assert_close(swept.logits, naive(vlm, inputs, variants), **TOLERANCE)


def counted(vlm, run):
    """Token-layers and runs of the vision tower, counted on the modules."""
    counts = {"tokens": 0, "vision": 0}

    def block(module, args, out):
        counts["tokens"] += args[0].shape[0] * args[0].shape[1]

    def tower(module, args, out):
        counts["vision"] += 1

    handles = [vlm.model.get_submodule(vlm.place(RESID.format(i)).path).register_forward_hook(block) for i in range(4)]
    if vlm.has_vision:
        handles.append(vlm.model.get_submodule(vlm.place("vision.hook_embed").path).register_forward_hook(tower))
    try:
        return run(), counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("max_rows", [256, 4])
def test_the_plan_says_what_really_ran(max_rows) -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs()
    variants = [[Zero(RESID.format(i), at="last")] for i in range(4)] + [[]]
    swept, counts = counted(vlm, lambda: vlm.sweep(inputs, variants, max_rows=max_rows))
    assert counts == {"tokens": swept.plan.token_layers, "vision": 1}
    _, counts = counted(vlm, lambda: naive(vlm, inputs, variants))
    assert counts == {"tokens": swept.plan.naive_token_layers, "vision": 5}
    assert swept.plan.variants_per_forward == (4 if max_rows == 256 else 2)
    assert "shared prefix of 20 of 21 tokens" in str(swept.plan)


def test_edits_at_image_tokens_and_before_the_language_model() -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs()
    at_images = [[Zero(RESID.format(1), at=[3, 4, 5, 6])], [Zero(RESID.format(2), at=0, rows=0)]]
    swept = vlm.sweep(inputs, at_images)
    assert swept.plan.shared_prefix == 0
    torch.testing.assert_close(swept.logits, naive(vlm, inputs, at_images), **TOLERANCE)
    for site in (
        "vision.blocks.1.hook_resid_post",
        "projector.hook_out",
        "hook_embed",
        "model.language_model.embed_tokens:output",
    ):
        variants = [[Scale(site, 1.5)], [Zero(RESID.format(1), at="last")]]
        swept, counts = counted(vlm, lambda v=variants: vlm.sweep(inputs, v))
        assert site in swept.plan.reason and not swept.plan.images_shared
        # The third is the unedited run, which tells whether an edit has an effect.
        assert counts == {"tokens": swept.plan.token_layers, "vision": 3}
        torch.testing.assert_close(swept.logits, naive(vlm, inputs, variants), **TOLERANCE)


@pytest.mark.parametrize("window", [4, 64])
def test_a_sliding_window(window) -> None:
    config = MistralConfig(**tiny.DECODER, head_dim=8, sliding_window=window)
    vlm = VLM(tiny.redraw(MistralForCausalLM._from_config(config, attn_implementation="sdpa")))
    inputs, variants = tiny.text_inputs(), mixed(vlm, 2)
    swept, counts = counted(vlm, lambda: vlm.sweep(inputs, variants))
    torch.testing.assert_close(swept.logits, naive(vlm, inputs, variants), **TOLERANCE)
    assert counts["tokens"] == swept.plan.token_layers
    assert swept.plan.shared_prefix == 5 and not swept.plan.reason


def test_edits_of_an_outer_block_apply_to_their_own_prompts() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    variants = mixed(vlm, 2)
    outer = Add(RESID.format(0), 3 * torch.randn(2, 32), at=-2)
    with vlm.edit(outer):
        swept = vlm.sweep(inputs, variants)
    want = naive(vlm, inputs, [[outer, *edits] for edits in variants])
    torch.testing.assert_close(swept.logits, want, **TOLERANCE)


@pytest.mark.parametrize(
    "outer",
    [
        MeanAblate(RESID.format(0)),
        # Its mean over rows would take in those of other variants, which edit an earlier layer.
        MeanAblate(RESID.format(3), at="last"),
        Function(RESID.format(0), lambda x: x - x.mean(1, keepdim=True)),
    ],
)
def test_edits_of_an_outer_block_that_mix_entries(outer) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    variants = [[Add(RESID.format(1), torch.ones(32), at="last")], [Zero("blocks.2.hook_mlp_out", at=-2)]]
    want = naive(vlm, inputs, [[outer, *edits] for edits in variants])
    with vlm.edit(outer):
        swept = vlm.sweep(inputs, variants)
    torch.testing.assert_close(swept.logits, want, **TOLERANCE)
    assert "outer block" in swept.plan.reason and swept.plan.shared_prefix == 0
    assert vlm.sweep(inputs, variants).plan.shared_prefix > 0


@pytest.mark.parametrize("site", ["projector.hook_out", "hook_embed"])
def test_edits_of_an_outer_block_before_the_blocks_run_once(site) -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs()
    outer = Function(site, lambda x: x - x.mean(1, keepdim=True))
    variants = [[Add(RESID.format(1), torch.ones(32), at="last")], [Zero("blocks.2.hook_mlp_out", at=-2)]]
    want = naive(vlm, inputs, [[outer, *edits] for edits in variants])
    with vlm.edit(outer):
        swept = vlm.sweep(inputs, variants)
    torch.testing.assert_close(swept.logits, want, **TOLERANCE)
    assert swept.plan.images_shared and swept.plan.shared_prefix > 0


def test_bad_sweeps() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    before = state_of(vlm.model)
    edit = Zero(RESID.format(1), at="last")
    for arguments, error, match in (
        ((inputs, []), InputError, "at least one variant"),
        (({}, [edit]), InputError, "input_ids"),
        ((inputs, [Zero("blocks.9.hook_resid_post")]), UnknownNameError, "layers 0 to 3"),
        ((inputs, [Zero(RESID.format(1), at="image[0]")]), UnknownNameError, "carry no names"),
        ((inputs, [[edit], [Zero("model.layers.1.self_attn.rotary:output")]]), UnknownNameError, "no module"),
        (({name: x.flip(1) for name, x in inputs.items()}, [edit]), InputError, "left"),
    ):
        with pytest.raises(error, match=match):
            vlm.sweep(*arguments)
    with pytest.raises(InputError, match="max_rows=0"):
        vlm.sweep(inputs, [edit], max_rows=0)
    with pytest.raises(NeverFiredError):
        vlm.sweep(inputs, [[edit], [Zero("unembed.hook_out", at=0)]])
    assert state_of(vlm.model) == before
