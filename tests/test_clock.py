"""Which calls belong to one prompt: caches, decoding by hand, prompts in parts."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from interp import Function, MeanAblate, Replace
from interp.errors import InputError
from tests import tiny
from tests.plain import state_of

SITE = "blocks.1.hook_resid_post"

# --- several prompts in one block


def cached(vlm, inputs, n: int):
    """The rest of a prompt after its first ``n`` tokens, with their keys and values in a cache."""
    with torch.no_grad():
        cache = vlm.model(input_ids=inputs["input_ids"][:, :n], use_cache=True).past_key_values
    return {
        "input_ids": inputs["input_ids"][:, n:],
        "attention_mask": inputs["attention_mask"],
        "past_key_values": cache,
    }


@pytest.mark.parametrize("first", [6, 8, 12])
@pytest.mark.parametrize("masked", [True, False])
def test_a_second_prompt_with_a_cache_is_no_decoding_of_the_first(first, masked) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs((12,), seed=2)
    edit = Replace(SITE, 5 * torch.randn(32), at="last")
    rest = cached(vlm, inputs, 8)
    if not masked:
        del rest["attention_mask"]
    with torch.no_grad():
        clean = vlm(inputs).logits[:, -1]
        with vlm.edit(edit):
            want = vlm(inputs).logits[:, -1]
        with vlm.edit(edit):
            vlm(tiny.text_inputs((first,), seed=1))
            got = vlm(rest).logits[:, -1]
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)  # the prefix is a product of its own
    assert (want - clean).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "llava", "gpt2"])
@pytest.mark.parametrize("with_cache", [True, False], ids=["own cache", "made by the model"])
def test_decoding_by_hand_stays_decoding(name, with_cache) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    edit = Replace(SITE, 3 * torch.randn(32), at="last")
    want = vlm.generate(inputs, edits=edit, max_new_tokens=3, min_new_tokens=3, eos_token_id=None)
    mask, new = inputs["attention_mask"], []
    given = {**inputs, **({"past_key_values": DynamicCache()} if with_cache else {})}
    with torch.no_grad(), vlm.edit(edit):
        for _ in range(3):
            output = vlm(given, use_cache=True)
            new.append(output.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(new[-1])], dim=1)
            given = {
                "input_ids": new[-1],
                "attention_mask": mask,
                "past_key_values": output.past_key_values,
            }
    assert torch.equal(torch.cat(new, dim=1), want)


# --- edits that need all their positions at once


@pytest.mark.parametrize("edit", [MeanAblate(SITE), Function(SITE, lambda x: -x)])
def test_edits_that_mix_positions_need_the_whole_prompt(edit) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    before = state_of(vlm.model)
    with pytest.raises(InputError, match="only some of them"):
        vlm.generate(inputs, edits=edit, prefill_chunk_size=4)
    part = replace(edit, at=[0, -1])
    with pytest.raises(InputError, match="only some of them"):
        vlm.generate(inputs, edits=part, prefill_chunk_size=4)
    assert state_of(vlm.model) == before
    # One position comes in one call, and decoded tokens come one by one.
    for fine in (replace(edit, at="last"), replace(edit, at="last", when="every")):
        whole = vlm.generate(inputs, edits=fine, max_new_tokens=4)
        assert torch.equal(vlm.generate(inputs, edits=fine, max_new_tokens=4, prefill_chunk_size=4), whole)
    with vlm.record(edit.site) as acts:
        vlm.generate(inputs, edits=replace(edit, when="every"), max_new_tokens=3, min_new_tokens=3)
    assert [x.shape[1] for x in acts.calls(edit.site)] == [9, 1, 1]
    given = MeanAblate(edit.site, torch.ones(32))
    whole = vlm.generate(inputs, edits=given, max_new_tokens=4)
    assert torch.equal(vlm.generate(inputs, edits=given, max_new_tokens=4, prefill_chunk_size=4), whole)
