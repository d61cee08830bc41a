"""Indirect effects of heads and function vectors: planted heads, closed forms of projections, prompts by the paper."""

import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.metrics import first_token_ids
from interp.patching.function_vectors import FunctionVector, add_by_layer, function_vector, head_contributions
from interp.patching.head_vectors import head_outputs, random_heads, strongest_heads
from interp.patching.mediation import indirect_effects, mediation, mediation_prompts, probability, random_outputs
from interp.patching.metric import TokenMetric
from tests import tiny, worded
from tests.patching import planted_edges as planted


def of_row(inputs, row):
    """One row of a batch, as often as there are rows."""
    return {name: tensor[[row, row]] for name, tensor in inputs.items()}


def test_the_planted_head_mediates_and_no_other_does() -> None:
    vlm, inputs = planted.vlm(), planted.batch()
    outputs = head_outputs(vlm, of_row(inputs, 1))
    metric = probability(vlm, [planted.ANSWER_B] * 2)
    corrupt = of_row(inputs, 0)
    found = mediation(vlm, corrupt, outputs, metric, clean=of_row(inputs, 1), seed=1, progress=False)
    assert found.metric == "probability" and found.axes["layer"] == ("0", "1", "2", "3")
    assert float(found.corrupt.max()) < 1e-3 and float(found.clean.min()) > 0.9
    effects = indirect_effects(found)
    planted_head = planted.HOPS["question -> last"]
    assert strongest_heads(effects, 1) == (planted_head,)
    assert effects[planted_head] > 0.9
    others = effects.clone()
    others[planted_head] = 0
    assert others.abs().max() < 1e-6
    assert found.controls["random vector"].shape == (4, 2, 2)
    assert found.mean()[planted_head] > 0.99  # on the scale from shuffled to unshuffled prompts


def patched_probability(vlm, inputs, layer, head, value, token):
    """A head's slice of the projection's input replaced by a plain hook."""

    def put(module, args):
        x = args[0].clone()
        x[:, -1, head * len(value) : (head + 1) * len(value)] = value
        return (x, *args[1:])

    module = vlm.model.get_submodule(vlm.place(f"blocks.{layer}.attn.hook_z").path)
    handle = module.register_forward_pre_hook(put)
    try:
        with torch.no_grad():
            return vlm(inputs).logits[:, -1].softmax(-1)[:, token]
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_effects_equal_plain_hooks(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    n_layers, n_heads, d_head = vlm.n_layers, vlm.n_heads, vlm.d_head
    outputs = 2 * torch.randn(n_layers, n_heads, d_head, generator=torch.Generator().manual_seed(3))
    found = mediation(vlm, inputs, outputs, probability(vlm, [7, 7]), progress=False)
    noise = random_outputs(outputs, seed=0)
    torch.testing.assert_close(noise.norm(dim=-1), outputs.norm(dim=-1))
    for layer, head in ((0, 1), (2, 3)):
        for values, source in ((found.values, outputs), (found.controls["random vector"], noise)):
            want = patched_probability(vlm, inputs, layer, head, source[layer, head], 7)
            torch.testing.assert_close(values[layer, head], want, atol=1e-5, rtol=1e-3)


def test_bad_mediation() -> None:
    vlm, inputs = planted.vlm(), planted.batch()
    outputs, metric = torch.zeros(4, 2, 8), probability(vlm, [3, 4])
    with pytest.raises(ShapeError, match="outputs of shape"):
        mediation(vlm, inputs, outputs[:, :, :7], metric)
    with pytest.raises(InputError, match="1 clean prompts for 2"):
        mediation(vlm, inputs, outputs, metric, clean={k: v[:1] for k, v in inputs.items()}, control=False,
                  progress=False)  # fmt: skip
    with pytest.raises(InputError, match="changes the one"):
        mediation(vlm, inputs, outputs, one, control=False, progress=False)
    flat = mediation(vlm, inputs, outputs, one, control=False, allow_no_effect=True, progress=False)
    assert not indirect_effects(flat).any()


def one(logits):
    return torch.ones(len(logits))


# ------------------------------------------------------------ function vectors


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "llava"])
def test_contributions_and_one_bias_are_the_attention_output(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    row = {key: tensor[:1] for key, tensor in inputs.items() if key != "pixel_values"}
    if "pixel_values" in inputs:
        row["pixel_values"] = inputs["pixel_values"][:2]
    written = head_contributions(vlm, head_outputs(vlm, row))
    attn_out = vlm.capture(row, "blocks.*.hook_attn_out", at="last").stack("hook_attn_out")[:, 0]
    projections = [vlm.model.get_submodule(vlm.place(f"blocks.{i}.attn.hook_z").path) for i in range(vlm.n_layers)]
    bias = torch.stack([torch.zeros(vlm.d_model) if p.bias is None else p.bias.detach() for p in projections])
    torch.testing.assert_close(written.sum(1) + bias, attn_out, atol=1e-4, rtol=0)
    assert name == "qwen2" or bias.abs().max() > 0.1


def test_a_function_vector_is_the_sum_of_slices_of_the_projection(tmp_path) -> None:
    vlm = tiny.vlm("llama")
    outputs = torch.randn(4, 4, 12, generator=torch.Generator().manual_seed(0))
    vector = function_vector(vlm, outputs, [(1, 2), (3, 0)], task="capital")
    weights = [vlm.model.model.layers[layer].self_attn.o_proj.weight.detach() for layer in (1, 3)]
    want = weights[0][:, 24:36] @ outputs[1, 2] + weights[1][:, :12] @ outputs[3, 0]
    torch.testing.assert_close(vector.vector, want, atol=1e-5, rtol=0)
    vector.save(tmp_path / "fv")
    again = FunctionVector.load(tmp_path / "fv")
    assert torch.equal(again.vector, vector.vector) and again.heads == ((1, 2), (3, 0))
    assert again.about["task"] == "capital"
    (tmp_path / "fv.json").write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        FunctionVector.load(tmp_path / "fv")
    with pytest.raises(InputError, match="no function vector at"):
        FunctionVector.load(tmp_path / "other")


def test_a_function_vector_is_added_at_the_last_token_of_every_step() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    vector = FunctionVector(3 * torch.randn(32, generator=torch.Generator().manual_seed(0)))
    ids = vlm.generate(inputs, edits=vector.edit(1, scale=2.0), max_new_tokens=3)

    def add(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, -1] += 2.0 * vector.vector

    handle = vlm.model.model.layers[1].register_forward_hook(add)
    try:
        want = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:]
    finally:
        handle.remove()
    assert torch.equal(ids, want) and not torch.equal(ids, vlm.generate(inputs, max_new_tokens=3))
    once = vector.edit(1, when="prefill")
    assert (once.when, once.scale, once.at) == ("prefill", 1.0, "last")


def test_the_planted_vector_works_from_its_layer_on_and_random_ones_do_not() -> None:
    vlm, inputs = planted.vlm(), planted.batch()
    outputs = head_outputs(vlm, of_row(inputs, 1))
    answers = torch.tensor([planted.ANSWER_B] * 2)
    metric = TokenMetric("logit difference", answers, torch.tensor([planted.ANSWER_A] * 2))
    heads = [planted.HOPS["question -> last"]]
    found = add_by_layer(vlm, of_row(inputs, 0), outputs, heads, metric, scale=3.0, n_controls=4, progress=False)
    assert float(found.corrupt.max()) < -5
    # Anywhere in the residual stream, since no block reads or writes what the vector holds.
    assert (found.values > 3).all()
    assert (found.values > found.controls["random vector"].mean(0) + 3).all()
    assert (found.values > found.controls["random heads"].mean(0) + 3).all()
    assert found.controls["random heads"].shape == (4, 4, 2)
    with pytest.raises(InputError, match="layers 0 to 3"):
        add_by_layer(vlm, inputs, outputs, heads, metric, layers=[4])


# ------------------------------------------------------------ prompts


def test_prompts_of_the_paper() -> None:
    vlm, task = worded.llava(), worded.tasks()["country-capital"]
    settings = {"n_shots": 2, "n_shuffled": 4, "seed": 3, "batch_size": 4}
    with pytest.raises(InputError, match=r"answers \d+ of \d+ 2-shot text prompts"):
        mediation_prompts(vlm, task, "text", n_task=4, **settings)
    for modality in ("text", "image"):
        made = always_right(vlm, task, modality, **settings)
        assert len(made.task) == 3 and len(made.shuffled) == len(made.unshuffled) == len(made.answers) == 4
        for prompt, own, item in zip(made.shuffled, made.unshuffled, made.items, strict=True):
            labels = [[s.text for s in p.segments if s.name == "output"] for p in (prompt, own)]
            assert sorted(labels[0]) == sorted(labels[1]) and labels[0][0] != labels[1][0]
            assert prompt.segments[-1].name == "delimiter" and item.output not in labels[0]
        assert made.answers[0] == " " + made.items[0].output
        assert bool(made.task[0].images) == (modality == "image")
    assert always_right(vlm, task, "text", **settings) == always_right(vlm, task, "text", **settings)
    alone = always_right(vlm, task, "text", corruption="remove", **settings)
    assert [one.text for one in alone.shuffled] == [f"Q: {item.input}\nA:" for item in alone.items]
    for changes, match in (({"corruption": "noise"}, "'shuffle' or 'remove'"), ({"n_shuffled": 0}, "n_shuffled=0")):
        with pytest.raises(InputError, match=match):
            mediation_prompts(vlm, task, "text", **(settings | changes))


def always_right(vlm, task, modality, **settings):
    """With an unembedding of nothing but the right answers' tokens, which all queries then give."""
    ids = {first_token_ids(vlm.tokenizer, "Q: x\nA:", " " + item.output)[0] for item in task.validation}
    assert len(ids) == 1  # the space is a token of its own
    before = vlm.unembed.weight.data.clone()
    handle = vlm.unembed.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor([*ids]), 1e4))
    try:
        return mediation_prompts(vlm, task, modality, n_task=3, **settings)
    finally:
        handle.remove()
        assert torch.equal(vlm.unembed.weight.data, before)


def test_random_heads_are_other_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    assert random_heads(4, 4, 4, generator) != random_heads(4, 4, 4, generator)
