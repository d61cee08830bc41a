"""Prompts by name, padding against single rows, threads."""

import threading

import pytest
import torch
from PIL import Image

from interp import VLM, Add, Prompt, Replace, Segment, Zero, few_shot
from interp.errors import InputError, SiteUnavailableError, UnknownNameError
from interp.inputs import Inputs
from interp.positions import PerRow
from tests import tiny
from tests.plain import reading, state_of
from tests.processors import byte_level_tokenizer, llava_processor

COLOURS = ["red", "green", "blue", "orange"]


def image(k: int) -> Image.Image:
    return Image.radial_gradient("L").resize((20, 16 + k)).convert("RGB").point(lambda x: (x * (k + 2)) % 256)


PROMPTS = [
    few_shot([(image(0), "Paris"), (image(1), "Rome")], image(2)),
    few_shot([("France", "Paris"), ("Italy", "Rome")], "Japan"),
    Prompt((Segment("image", image=image(3)), Segment("caption", text="Q: what?"))),
]


@pytest.fixture(scope="module")
def seeing() -> VLM:
    """A LLaVA whose vocabulary is that of a real tokenizer."""
    tokenizer = byte_level_tokenizer()
    processor = llava_processor(tokenizer)
    model = tiny.llava(vocab_size=len(tokenizer), image_token=tokenizer.convert_tokens_to_ids("<image>"))
    return VLM(model, processor)


@pytest.fixture(scope="module")
def alone(seeing):
    return [seeing.prepare([prompt]) for prompt in PROMPTS]


def test_a_padded_batch_equals_single_rows(seeing, alone) -> None:
    together = seeing.prepare(PROMPTS)
    assert isinstance(together, Inputs) and [layout.n_images for layout in together.layout] == [3, 0, 1]
    sites = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_z"]
    acts = seeing.capture(together, sites, at="last")
    for row, inputs in enumerate(alone):
        single = seeing.capture(inputs, sites, at="last")
        for site in acts:
            # Padding changes the kernels' order of summation.
            torch.testing.assert_close(acts[site][[row]], single[site], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(acts.output.logits[[row], -1], single.output.logits[:, -1], atol=2e-4, rtol=1e-4)


def test_positions_by_name_in_a_padded_batch(seeing, alone) -> None:
    together, site = seeing.prepare(PROMPTS), "blocks.2.hook_resid_post"
    whole = seeing.capture(together, site)[site]
    for at, rows in (
        ("delimiter[2]", [0, 1]),
        ("image[0]", [0, 2]),
        ("output[1].last", [0, 1]),
        ("caption.first", [2]),
    ):
        got = seeing.capture(together, site, at=at, rows=rows)[site]
        for k, row in enumerate(rows):
            single = seeing.capture(alone[row], site, at=at)[site][0]
            torch.testing.assert_close(got[k], single, atol=2e-4, rtol=1e-4)
    last = [layout.start + layout.length - 1 for layout in together.layout]
    assert torch.equal(seeing.capture(together, site, at="last")[site], whole[torch.arange(3), last])


def test_edits_by_name_in_a_padded_batch(seeing, alone) -> None:
    together, site = seeing.prepare(PROMPTS), "blocks.1.hook_resid_post"
    where = ("delimiter[1]", ["delimiter[0]", -2], "image[0].last")
    values = 3 * torch.randn(3, 32)
    with seeing.edit(Add(site, values, at=PerRow(where))), torch.no_grad():
        got = seeing(together).logits[:, -1]
    with torch.no_grad():
        clean = seeing(together).logits[:, -1]
    assert (got - clean).abs().amax(-1).min() > 0.02
    for row, inputs in enumerate(alone):
        with seeing.edit(Add(site, values[row], at=where[row])), torch.no_grad():
            torch.testing.assert_close(got[[row]], seeing(inputs).logits[:, -1], atol=5e-4, rtol=1e-4)
    for row, inputs in enumerate(alone):
        edit = Replace(site, values[row], at="last")
        want = seeing.generate(inputs, edits=edit, max_new_tokens=3)
        everyone = seeing.generate(together, edits=Replace(site, values, at="last"), max_new_tokens=3)
        assert torch.equal(everyone[row, : want.shape[1]], want[0])


def test_a_sweep_by_name(seeing) -> None:
    together = seeing.prepare(PROMPTS)
    variants = [
        [Replace("blocks.1.hook_resid_post", 3 * torch.randn(2, 32), at="delimiter[2]", rows=[0, 1])],
        [Zero("blocks.2.hook_resid_post", at="image[0]", rows=[0, 2])],
    ]
    swept = seeing.sweep(together, variants)
    for index, edits in enumerate(variants):
        with seeing.edit(*edits), torch.no_grad():
            want = seeing(together).logits[:, -1]
        torch.testing.assert_close(swept.logits[index], want, atol=5e-4, rtol=0)


def test_names_that_a_prompt_lacks(seeing) -> None:
    together, before = seeing.prepare(PROMPTS), state_of(seeing.model)
    site = "blocks.1.hook_resid_post"
    with pytest.raises(UnknownNameError, match="row 1 has no position 'image\\[0\\]'"):
        seeing.capture(together, site, at="image[0]")
    with pytest.raises(UnknownNameError, match="Did you mean 'delimiter"):
        seeing.capture(together, site, at="delimitr[0]", rows=0)
    with pytest.raises(InputError, match="choose images with rows"):
        seeing.capture(together, "vision.blocks.0.hook_resid_post", at="image[0]")
    with pytest.raises(InputError, match="processor or tokenizer"):
        VLM(seeing.model).prepare(PROMPTS)
    assert state_of(seeing.model) == before
    assert seeing.generate(together, max_new_tokens=2, decode=True) == seeing.tokenizer.batch_decode(
        seeing.generate(together, max_new_tokens=2), skip_special_tokens=True
    )


@pytest.mark.parametrize("name", tiny.ALL)
def test_what_enters_the_language_model(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    before = state_of(vlm.model)
    with torch.no_grad():
        embeds = vlm.embed(inputs)
    assert state_of(vlm.model) == before
    first = vlm.capture(inputs, "blocks.0.hook_resid_pre")["blocks.0.hook_resid_pre"]
    if name == "gpt2":
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        embeds = embeds + vlm.model.transformer.wpe(positions).detach()
    torch.testing.assert_close(embeds, first, atol=1e-6, rtol=1e-6)


def test_threads_do_not_hear_each_other() -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs()
    pattern = "blocks.1.attn.hook_pattern"
    edits = [
        Replace("blocks.1.hook_resid_post", torch.randn(32), at="last"),
        Zero(pattern, at="last", heads=0),
        Zero("vision.blocks.0.hook_attn_out"),
        Zero("blocks.1.hook_resid_post", at=-2),
    ]
    with torch.no_grad():
        clean = vlm(inputs).logits
    want = []
    for edit in edits:
        with vlm.edit(edit), torch.no_grad():
            want.append(vlm(inputs).logits)
    before, wrong, barrier = state_of(vlm.model), [], threading.Barrier(len(edits) + 1)

    def edited(index: int) -> None:
        barrier.wait()
        for _ in range(6):
            with vlm.edit(edits[index]), torch.no_grad():
                if not torch.equal(vlm(inputs).logits, want[index]):
                    wrong.append(index)

    def untouched() -> None:
        barrier.wait()
        for _ in range(12):
            with torch.no_grad():
                if not torch.equal(vlm(inputs).logits, clean):
                    wrong.append("clean")

    threads = [threading.Thread(target=edited, args=(i,)) for i in range(len(edits))]
    threads.append(threading.Thread(target=untouched))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert state_of(vlm.model) == before


def test_the_model_stays_in_the_users_hands() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    with (
        vlm.edit(Zero("blocks.1.hook_mlp_out")),
        torch.no_grad(),
        reading(vlm.model, "model.layers.1.mlp") as seen,
    ):
        vlm.model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0))
    assert not seen[0].any()
    with pytest.raises(InputError, match="at least one edit"), vlm.edit():
        pass
    assert "n_layers=4, d_model=32, n_heads=4, dtype=float32, device=cpu" in repr(vlm)
    kept = {name: x.clone() for name, x in inputs.items()}
    vlm.generate(inputs, edits=Zero("blocks.1.hook_mlp_out"), max_new_tokens=2)
    vlm.sweep(inputs, [Zero("blocks.1.hook_mlp_out", at="last")])
    assert all(torch.equal(inputs[name], x) for name, x in kept.items()) and set(inputs) == set(kept)


def test_inference_mode() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    edit = Add("blocks.1.hook_resid_post", torch.ones(32), at="last")
    want = vlm.capture(inputs, "blocks.3.hook_resid_post", edits=edit)["blocks.3.hook_resid_post"]
    with torch.inference_mode():
        got = vlm.capture(inputs, "blocks.3.hook_resid_post", edits=edit)["blocks.3.hook_resid_post"]
    assert torch.equal(got, want)


@pytest.mark.parametrize("at", ["image[0]", "image", ["last", "image[1].last"]])
def test_edits_that_image_features_would_overwrite_are_refused(at):
    vlm = VLM(tiny.llava())
    with pytest.raises(SiteUnavailableError, match=r"projector\.hook_out"), vlm.edit(Zero("hook_embed", at=at)):
        pass


@pytest.mark.parametrize("site", ["hook_embed", "model.language_model.embed_tokens:output"])
def test_edits_at_the_tokens_of_images_before_their_features(seeing, site) -> None:
    prompt = few_shot([(image(0), "Paris")], image(1))
    prepared = seeing.prepare([prompt, "Q: what?"])
    inside = prepared.layout[0].spans["image"][0].start - prepared.layout[0].start
    before = state_of(seeing.model)
    with torch.no_grad():
        clean = seeing(prepared).logits
        for at in ("input[0]", inside, [0, inside], slice(inside, None), PerRow(("image[0]", "last"))):
            rows = None if isinstance(at, PerRow) else 0
            with pytest.raises(SiteUnavailableError, match=r"blocks\.0\.hook_resid_pre"):
                seeing.capture(prepared, "hook_embed", edits=Zero(site, at=at, rows=rows))
            assert state_of(seeing.model) == before
            with pytest.raises(SiteUnavailableError, match=r"blocks\.0\.hook_resid_pre"):
                seeing.generate(prepared, edits=Zero(site, at=at, rows=rows), num_beams=2)
        for edit in (Zero(site), Zero(site, at="last"), Zero(site, at=inside, rows=1)):
            with seeing.edit(edit):
                assert not torch.equal(seeing(prepared).logits, clean)


def test_edits_at_the_tokens_of_images_in_plain_inputs() -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs()
    for at in (3, [0, 6]):
        with pytest.raises(SiteUnavailableError, match="tokens of an image"), vlm.edit(Zero("hook_embed", at=at)):
            vlm(inputs)
    with vlm.edit(Zero("hook_embed", at=[0, 2])), torch.no_grad():
        vlm(inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sequences_longer_than_the_models_positions(name) -> None:
    vlm = tiny.vlm(name)
    ids = torch.randint(3, 90, (1, 260))
    for run in (vlm, vlm.embed, lambda inputs: vlm.capture(inputs, "hook_embed"), vlm.generate):
        with pytest.raises(InputError, match=r"260 tokens.* takes 256 at most"):
            run({"input_ids": ids})
    fits = {"input_ids": ids[:, :254]}
    with pytest.raises(InputError, match="254 tokens and 8 new ones"):
        vlm.generate(fits, max_new_tokens=8)
    assert vlm.generate(fits, max_new_tokens=2, eos_token_id=None).shape == (1, 2)
    padded = {"input_ids": ids, "attention_mask": (torch.arange(260) >= 10).long()[None]}
    assert vlm(padded).logits.shape[1] == 260  # padding takes no position


def test_patterns_that_match_only_what_the_model_cannot_offer() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    for ask in (vlm.sites, lambda pattern: vlm.capture(inputs, pattern)):
        with pytest.raises(SiteUnavailableError, match="no hook reaches it"):
            ask("blocks.*.hook_resid_mid")
    assert all("resid_mid" not in site for site in vlm.sites("blocks.*.hook_resid_*"))
