"""Reading vectors in words: phases against logits by plain torch, patchscopes against plain hooks."""

import inspect

import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.lens import phases
from interp.patching.lens import decodes, identity_prompt, lens, patchscope, peaks
from tests import tiny, worded
from tests.patching import planted_edges as planted


@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_the_last_layer_says_what_the_model_says(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    with torch.no_grad():
        logits = vlm(inputs).logits[:, -1]
    tokens = {"answer": logits.argmax(-1), "other": [5, 9]}
    found = lens(vlm, inputs, tokens)
    assert found.axes == {"phase": ("answer", "other"), "layer": ("0", "1", "2", "3")}
    for phase, ids in tokens.items():
        want = logits.softmax(-1)[torch.arange(2), torch.as_tensor(ids)]
        torch.testing.assert_close(found.select(phase=phase, layer=3).values, want, atol=1e-5, rtol=1e-3)
    control = found.controls["random vector"]
    assert control.shape == found.values.shape
    # 97 tokens: a random direction says none of them for sure, unlike the model.
    assert control[0, 3].mean() < found.values[0, 3].mean()
    assert torch.equal(lens(vlm, inputs, tokens, seed=0).controls["random vector"], control)


def test_the_planted_answer_appears_behind_its_block() -> None:
    vlm, inputs = planted.vlm(), planted.batch()
    found = lens(vlm, inputs, {"answer": [planted.ANSWER_A, planted.ANSWER_B], "wrong": [planted.ANSWER_B] * 2})
    layer, _ = planted.HOPS["question -> last"]
    answer = found.select(phase="answer").values
    assert (answer[layer:] > 0.9).all() and (answer[:layer] < 0.2).all()
    assert peaks(found)["answer"] >= layer
    with pytest.raises(InputError, match="at least one phase"):
        lens(vlm, inputs, {})
    with pytest.raises(InputError, match="one token per row"):
        lens(vlm, inputs, {"answer": [3, 4]}, at=[-1, -2])
    with pytest.raises(ShapeError, match="1 tokens for 2 rows"):
        lens(vlm, inputs, {"answer": [3]})


def test_decodes_of_any_vectors() -> None:
    vlm = worded.llama()
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    table = decodes(vlm, vectors, k=4)
    assert list(table.columns) == ["vector", "rank", "token", "id", "probability"] and len(table) == 12
    with torch.no_grad():
        want = vlm.model.lm_head(vlm.model.model.norm(vectors)).softmax(-1).topk(4)
    assert table["id"].tolist() == want.indices.flatten().tolist()
    torch.testing.assert_close(torch.tensor(table["probability"].to_list()), want.values.flatten().double().float())
    assert table["token"][0] == vlm.tokenizer.decode([table["id"][0]])
    named = decodes(vlm, {"capital": vectors[0], "colour": vectors[1]}, k=1)
    assert named["vector"].tolist() == ["capital", "colour"] and named["id"].tolist() == table["id"][[0, 4]].tolist()
    for given, error, match in (
        (torch.randn(2, 31), ShapeError, r"\[vector, 32\]"),
        (torch.randn(32), ShapeError, r"\[vector, 32\]"),
        ({}, InputError, "no vectors"),
    ):
        with pytest.raises(error, match=match):
            decodes(vlm, given)
    with pytest.raises(InputError, match="tokenizer"):
        decodes(tiny.vlm("llama"), vectors)


def written_with(vlm, prompt, vector, layer, n):
    """Greedy text with a block's output replaced at the prompt's last token, by a plain hook, without a cache."""
    inputs = vlm.prepare([prompt])
    ids = inputs["input_ids"]
    end = ids.shape[1] - 1

    def put(module, args, output):
        output[:, end] = vector

    handle = vlm.model.get_submodule(vlm.place(f"blocks.{layer}.hook_resid_post").path).register_forward_hook(put)
    try:
        for _ in range(n):
            with torch.no_grad():
                ids = torch.cat([ids, vlm.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    finally:
        handle.remove()
    return vlm.tokenizer.decode(ids[0, -n:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_patchscope_reads_what_plain_hooks_make_the_model_write() -> None:
    vlm = worded.llama()
    vectors = {name: 4 * torch.randn(32, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    prompt = identity_prompt()
    assert prompt.text == "cat->cat; 1135->1135; hello->hello; x"
    settings = {"layers": [0, 2], "at": "placeholder", "max_new_tokens": 3}
    table = patchscope(vlm, vectors, prompt, max_rows=3, **settings)
    assert table["vector"].tolist() == ["a", "a", "b", "b"] and table["layer"].tolist() == [0, 2, 0, 2]
    for row in table.itertuples():
        assert row.text == written_with(vlm, prompt, vectors[row.vector], row.layer, 3), row
    assert len(set(table["text"])) > 1 and table["unpatched"].nunique() == 1
    assert (table["text"] != table["unpatched"]).any() and (table["random"] != table["text"]).any()
    whole = patchscope(vlm, vectors, prompt, max_rows=64, control=False, **settings)
    assert whole["text"].tolist() == table["text"].tolist() and "random" not in whole
    for given, changes, match in (({}, {}, "no vectors"), (vectors, {"layers": [4]}, "of 0 to 3")):
        with pytest.raises(InputError, match=match):
            patchscope(vlm, given, prompt, **(settings | changes))
    with pytest.raises(InputError, match="placeholder"):
        identity_prompt(placeholder=" ")


def test_a_patchscope_in_a_prompt_with_an_image() -> None:
    vlm = worded.llava()
    vector = 4 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    target = ("Q:<image> x\nA:", [worded.image("apple")])
    table = patchscope(vlm, vector, target, layers=[1, 2], max_new_tokens=3)
    assert table["text"].nunique() + (table["text"] != table["unpatched"]).any() > 1


def test_tokens_that_the_model_lacks_are_refused() -> None:
    vlm, inputs = planted.vlm(), planted.batch()
    for ids, words in (([3, 999], "999.*0 to 9"), ([-1, 3], "-1.*0 to 9")):
        with pytest.raises(InputError, match=words):
            lens(vlm, inputs, {"answer": ids})
    with pytest.raises(InputError, match="integers"):
        # As called without the checks of types that tests run under.
        inspect.unwrap(phases)(torch.zeros(1, 2, 5), {"answer": [3.0, 4.0]})
