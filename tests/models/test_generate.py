"""Generation with edits: KV cache, steps, chunks, beams, drafted tokens."""

import pytest
import torch

from interp import Add, Replace, Zero
from interp.errors import InputError, ShapeError
from tests import tiny
from tests.plain import greedy_without_cache, writing
from tests.worded import other_llama

KERNELS = ["sdpa", "eager"]
STEPS = 4
SITE = "blocks.{}.hook_resid_post"


def generate(vlm, inputs, **options):
    return vlm.generate(inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, **options)


@pytest.fixture(scope="module", autouse=True)
def _no_end_of_text():
    """Every generation has all its steps: no token ends it early."""
    ends = {}
    for name in tiny.ALL:
        for kernel in KERNELS:
            config = tiny.vlm(name, kernel).model.generation_config
            ends[name, kernel], config.eos_token_id = config.eos_token_id, None
    yield
    for (name, kernel), end in ends.items():
        tiny.vlm(name, kernel).model.generation_config.eos_token_id = end


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", tiny.ALL)
def test_a_patched_prefill_equals_uncached_generation_patched_at_the_same_place(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    last = inputs["input_ids"].shape[1] - 1
    value = 3 * torch.randn(len(inputs["input_ids"]), vlm.d_model)
    with torch.no_grad():
        clean = greedy_without_cache(vlm.model, inputs, STEPS)
    assert torch.equal(vlm.generate(inputs, max_new_tokens=STEPS), clean)
    for layer in range(vlm.n_layers):
        site = SITE.format(layer)
        with torch.no_grad():
            want = greedy_without_cache(vlm.model, inputs, STEPS, vlm.place(site).path, last, value)
        got = vlm.generate(inputs, edits=Replace(site, value, at="last"), max_new_tokens=STEPS)
        assert torch.equal(got, want), layer
        assert not torch.equal(got, clean), layer


def test_a_patch_of_the_prefill_is_not_one_of_every_token_nor_of_the_next_layer() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    value = 3 * torch.randn(vlm.d_model)
    patch = {"at": "last", "value": value}
    tokens = [
        generate(vlm, inputs, edits=Replace(SITE.format(1), **patch)),
        generate(vlm, inputs, edits=Replace(SITE.format(1), when="every", **patch)),
        generate(vlm, inputs, edits=Replace(SITE.format(2), **patch)),
    ]
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[0][:, 0], tokens[1][:, 0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
@pytest.mark.parametrize(
    ("when", "steps"), [("prefill", [0]), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), ("every", [0, 1, 2, 3])]
)
def test_when_says_which_steps_are_touched(name, when, steps) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    value = 2 * torch.randn(vlm.d_model)
    for site in ("blocks.1.hook_resid_post", "hook_embed"):
        calls = []

        def change(x):
            if len(calls) in steps:  # noqa: B023
                x[:, -1] += value
            calls.append(None)  # noqa: B023
            return x

        with torch.no_grad(), writing(vlm.model, vlm.place(site).path, change):
            want = generate(vlm, inputs)
        assert len(calls) == STEPS
        assert torch.equal(generate(vlm, inputs, edits=Add(site, value, at="last", when=when)), want), site


def test_decode_steps_with_captures_of_the_last_token() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    site = SITE.format(1)
    with vlm.record([site, "unembed.hook_out"], at="last") as acts:
        new = generate(vlm, inputs)
    assert acts[site].shape == (STEPS, 2, vlm.d_model)
    assert acts.axes(site) == ("step", "batch", "d_model")
    assert torch.equal(acts["unembed.hook_out"].argmax(-1).T, new)
    with vlm.record(site, at="last") as acts:
        generate(vlm, inputs, edits=Zero(site, at="last", when=3))
    assert [bool(x.any()) for x in acts[site]] == [False, False, False, True]
    with vlm.record(site) as acts:
        generate(vlm, inputs)
    assert [x.shape[1] for x in acts.calls(site)] == [9, 1, 1, 1]
    with pytest.raises(ShapeError, match="4 times with different shapes"):
        acts[site]


def test_without_a_cache_captures_of_the_last_token_are_the_same() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    site, caught = SITE.format(1), []
    for use_cache in (True, False):
        with vlm.record(site, at="last") as acts:
            generate(vlm, inputs, use_cache=use_cache)
        caught.append(acts[site])
    assert caught[0].shape == (STEPS, 2, vlm.d_model)
    # Rows of a longer product are summed in another order; entries are of order 10.
    torch.testing.assert_close(caught[1], caught[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("options", [{"guidance_scale": 2.0}, {"negative_prompt_ids": torch.ones(2, 3).long()}])
def test_guidance_and_edits_do_not_go_together(options) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    edit = Zero(SITE.format(1), at="last")
    with pytest.raises(InputError, match=next(iter(options))):
        vlm.generate(inputs, edits=edit, **options)
    with pytest.raises(InputError, match=next(iter(options))), vlm.edit(edit):
        vlm.generate(inputs, **options)
    assert generate(vlm, inputs, guidance_scale=2.0).shape == (2, STEPS)
    assert torch.equal(generate(vlm, inputs, edits=edit, guidance_scale=1.0), generate(vlm, inputs, edits=edit))


def test_one_token_prompts() -> None:
    vlm = tiny.vlm("llama")
    inputs = {"input_ids": torch.tensor([[7], [9]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    value = torch.randn(2, vlm.d_model)
    with torch.no_grad():
        want = greedy_without_cache(vlm.model, inputs, STEPS, "model.layers.1", 0, value)
    for at in ("last", 0, -1, None):
        assert torch.equal(generate(vlm, inputs, edits=Replace(SITE.format(1), value, at=at)), want)
    without_mask = {"input_ids": inputs["input_ids"]}
    assert torch.equal(generate(vlm, without_mask, edits=Replace(SITE.format(1), value, at=0)), want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefill_in_chunks_is_patched_at_the_same_tokens(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.text_inputs()
    values = 3 * torch.randn(2, 3, vlm.d_model)
    for edit in (
        Replace(SITE.format(1), values[:, 0], at="last"),
        Replace(SITE.format(1), values, at=[0, -1, 3]),
        Add(SITE.format(2), 3 * torch.randn(2, 9, vlm.d_model)),
        Add("hook_embed", values[:, :2], at=["last", 1]),
    ):
        whole = generate(vlm, inputs, edits=edit)
        assert torch.equal(generate(vlm, inputs, edits=edit, prefill_chunk_size=4), whole), edit
        assert not torch.equal(whole, generate(vlm, inputs))


def test_beams_and_samples_share_their_prompts_value() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs((9, 6, 5))
    value = 3 * torch.randn(3, vlm.d_model)
    edit = Replace(SITE.format(1), value, at="last")
    together = generate(vlm, inputs, edits=edit, num_beams=3, num_return_sequences=2)
    for row, length in enumerate((9, 6, 5)):
        single = {name: x[[row], 9 - length :] for name, x in inputs.items()}
        alone = Replace(SITE.format(1), value[row], at="last")
        got = generate(vlm, single, edits=alone, num_beams=3, num_return_sequences=2)
        assert torch.equal(got, together[2 * row : 2 * row + 2])
    only = Replace(SITE.format(1), value[[2]], at="last", rows=2)
    got = generate(vlm, inputs, edits=only, num_beams=3, num_return_sequences=2)
    assert torch.equal(got[4:], together[4:])
    clean = generate(vlm, inputs, num_beams=3, num_return_sequences=2)
    assert torch.equal(got[:4], clean[:4])
    assert not torch.equal(together, clean)


def test_drafted_tokens_are_no_part_of_the_prompt() -> None:
    vlm = tiny.vlm("llama")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for when in ("prefill", "every"):
        edit = Add(SITE.format(1), 3 * torch.randn(vlm.d_model), at="last", when=when)
        want = generate(vlm, inputs, edits=edit)
        assert torch.equal(generate(vlm, inputs, edits=edit, prompt_lookup_num_tokens=3), want)


def test_values_for_positions_of_the_prompt_cannot_go_on_into_decoding() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    edit = Replace(SITE.format(1), torch.zeros(2, 2, vlm.d_model), at=[-2, -1], when="every")
    with pytest.raises(ShapeError, match="decoded tokens"):
        generate(vlm, inputs, edits=edit)


def test_bad_calls() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    with pytest.raises(InputError, match="input_ids"):
        vlm.generate({})
    with pytest.raises(InputError, match="tokenizer"):
        vlm.generate(inputs, decode=True)
    with pytest.raises(InputError, match="left"):
        vlm.generate({name: x.flip(1) for name, x in inputs.items()})


def test_return_dict_in_generate_still_gives_the_new_tokens() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    assert torch.equal(generate(vlm, inputs, return_dict_in_generate=True), generate(vlm, inputs))


@pytest.mark.parametrize(("options", "want"), [({}, (None, None, None)), ({"do_sample": True}, (0.7, 0.8, 3))])
def test_sampling_settings_of_a_checkpoint_hold_where_tokens_are_sampled_and_nowhere_else(options, want) -> None:
    vlm = tiny.VLM(tiny.llama())
    inputs, config, used = tiny.text_inputs(), vlm.model.generation_config, []
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 0.7, 0.8, 3

    def decode(model, input_ids, generation_config, **arguments):
        used.append((generation_config.temperature, generation_config.top_p, generation_config.top_k))
        return input_ids

    vlm.generate(inputs, custom_generate=decode, **options)
    assert used == [want]
    config.eos_token_id = None
    with torch.no_grad():
        clean = greedy_without_cache(vlm.model, inputs, STEPS)
    assert torch.equal(vlm.generate(inputs, max_new_tokens=STEPS), clean)


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "want"),
    [(7, "<pad>", 7), (None, "<pad>", 3), (None, None, 2)],
    ids=["the model's own", "the tokenizer's", "the tokenizer's end of text"],
)
def test_rows_that_end_early_are_filled_with_padding(of_model, of_tokenizer, want) -> None:
    vlm = other_llama()
    inputs = vlm.prepare(["Q:France\nA:", "the fox"])
    config = vlm.model.generation_config
    config.eos_token_id, config.pad_token_id = None, 3
    free = generate(vlm, inputs)
    # Ends the first row at once; transformers alone would fill with it.
    config.eos_token_id, config.pad_token_id = int(free[0, 0]), of_model
    assert config.eos_token_id not in (*free[1].tolist(), 2, 3, 7)
    vlm.tokenizer.pad_token = of_tokenizer
    got = vlm.generate(inputs, max_new_tokens=STEPS)
    assert got[0].tolist() == [config.eos_token_id, *[want] * (STEPS - 1)]
    assert torch.equal(got[1], free[1])
