"""A task vector against a prompt: logit differences against plain hooks, and who wins."""

import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.patching.override import override, wins
from interp.task_vectors import TaskVectors, random_like
from tests import tiny, worded
from tests.patching import planted_edges as planted


def with_block_output(vlm, inputs, layer, vector):
    """Logits with a block's output replaced at the last token, by a plain hook."""

    def put(module, args, output):
        (output[0] if isinstance(output, tuple) else output)[:, -1] = vector

    handle = vlm.model.get_submodule(vlm.place(f"blocks.{layer}.hook_resid_post").path).register_forward_hook(put)
    try:
        with torch.no_grad():
            return vlm(inputs).logits[:, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_differences_equal_plain_hooks(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    vectors = TaskVectors(4 * torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0)))
    found = override(vlm, inputs, vectors, [7, 8], [9, 10], layers=[0, 3], n_controls=2, seed=5, progress=False)
    assert found.axes == {"vector": ("task vector",), "layer": ("0", "3")}
    rows = torch.arange(2)
    for index, layer in enumerate((0, 3)):
        logits = with_block_output(vlm, inputs, layer, vectors.mean[layer])
        want = logits[rows, [7, 8]] - logits[rows, [9, 10]]
        torch.testing.assert_close(found.values[0, index], want, atol=1e-4, rtol=0)
        logits = with_block_output(vlm, inputs, layer, random_like(vectors, seed=6).mean[layer])
        want = logits[rows, [7, 8]] - logits[rows, [9, 10]]
        torch.testing.assert_close(found.controls["random vector"][1, 0, index], want, atol=1e-4, rtol=0)
    assert wins(found).tolist() == (found.values > 0).float().mean(-1).tolist()


def test_the_vector_wins_where_the_prompt_has_said_its_part() -> None:
    vlm, inputs = planted.vlm(), planted.batch()
    a, b = ({name: tensor[[row, row]] for name, tensor in inputs.items()} for row in (0, 1))
    of_b = TaskVectors(vlm.capture(b, "blocks.*.hook_resid_post", at="last").stack("hook_resid_post").transpose(0, 1))
    of_a = TaskVectors(vlm.capture(a, "blocks.*.hook_resid_post", at="last").stack("hook_resid_post").transpose(0, 1))
    tokens = ([planted.ANSWER_B] * 2, [planted.ANSWER_A] * 2)
    found = override(vlm, a, {"b": of_b, "a": of_a}, *tokens, reference=b, progress=False)
    # The last token learns the answer in block 2: before it a vector says nothing, from there on everything.
    assert wins(found).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    scaled = found.normalised()
    torch.testing.assert_close(scaled[0], torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]]), atol=1e-4, rtol=0)
    assert scaled[1].abs().max() < 1e-4 and found.controls["random vector"].shape == (3, 2, 4, 2)


def test_answers_as_text_and_bad_input() -> None:
    vlm = worded.llava()
    inputs = vlm.prepare([("Q:<image>what colour?\nA:", [worded.image("apple")])] * 2)
    vectors = TaskVectors(4 * torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)))
    found = override(vlm, inputs, vectors, ["sweet", "sour"], ["red", "yellow"], progress=False)
    ids = [vlm.tokenizer(x)["input_ids"][-1] for x in ("s", "s", "r", "y")]
    same = override(vlm, inputs, vectors, ids[:2], ids[2:], progress=False)
    torch.testing.assert_close(found.values, same.values)
    for given, wanted, asked, settings, error, match in (
        (vectors, ["red", "sour"], ["rot", "yellow"], {}, InputError, "share their first token"),
        (vectors, ["red"], ["sour", "x"], {}, ShapeError, "1 answers"),
        (vectors, [7, 8], [9, 10], {"layers": [4]}, InputError, "of 0 to 3"),
        ({}, [7, 8], [9, 10], {}, InputError, "0 task vectors"),
        (TaskVectors(torch.ones(1, 3, 32)), [7, 8], [9, 10], {}, ShapeError, "do not fit"),
    ):
        with pytest.raises(error, match=match):
            override(vlm, inputs, given, wanted, asked, progress=False, **settings)


def test_every_named_vector_has_random_ones_of_its_own() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.inputs_for("llama")
    one = TaskVectors(4 * torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0)))
    found = override(vlm, inputs, {"a": one, "b": one}, [7, 8], [9, 10], layers=[3], n_controls=2, progress=False)
    control = found.controls["random vector"][:, :, 0].flatten(0, 1)
    assert torch.equal(found.values[0], found.values[1]) or (found.values[0] - found.values[1]).abs().max() < 1e-4
    assert all((control[i] - control[j]).abs().max() > 1e-2 for i in range(4) for j in range(i))
