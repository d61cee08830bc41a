"""Task vectors against plain hooks, closed forms, and the ways in which files and models can be wrong."""

import json

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from interp import VLM
from interp.edits import Add
from interp.errors import InputError, ShapeError, UnknownNameError
from interp.prompts import few_shot, instruction
from interp.task_vectors import (
    TaskVectors,
    combine,
    from_examples,
    from_instruction,
    random_like,
    read,
    similarity,
)
from tests.worded import image, llama, llava, other_llama, tasks

PAIRS = [("France", "Paris"), ("Spain", "Madrid"), ("Japan", "Tokyo")]


def by_hand(vlm, prompt, position: int) -> Tensor:
    """Outputs of all blocks at one index, through plain torch hooks on the modules' own paths."""
    inputs = vlm.prepare([prompt])
    seen = []
    blocks = vlm.decoder.layers
    handles = [block.register_forward_hook(lambda m, a, out: seen.append(out[0, position])) for block in blocks]
    with torch.no_grad():
        vlm.model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("use_image", [False, True])
def test_the_vector_is_the_block_output_at_the_named_delimiter(use_image):
    vlm = llava()
    pairs = [(image(x), y) if use_image else (x, y) for x, y in PAIRS]
    prompt = few_shot(pairs, "Peru")
    ids = vlm.prepare([prompt])["input_ids"][0].tolist()
    colon = vlm.tokenizer.convert_tokens_to_ids(":")
    # No colon in any input or answer here, so that counting them is right: two before the last, as in the paper.
    position = [i for i, token in enumerate(ids) if token == colon][-3]
    vectors = read(vlm, [prompt], "delimiter[2]")
    torch.testing.assert_close(vectors.mean, by_hand(vlm, prompt, position), rtol=0, atol=0)


def test_the_prompt_cut_at_the_delimiter_gives_the_vector_of_the_full_one():
    vlm = llava()
    full = read(vlm, [few_shot(PAIRS, "Peru")], "delimiter[2]")
    cut = read(vlm, [few_shot(PAIRS[:2], "Japan")], "last")
    # Equal by causality; the kernels sum over other lengths, which costs rounding of float32.
    torch.testing.assert_close(full.mean, cut.mean, rtol=1e-4, atol=1e-4)
    answer_seen = read(vlm, [few_shot(PAIRS, "Peru")], "delimiter[3]")
    assert (answer_seen.mean - full.mean).abs().max() > 0.1


def test_batches_of_unequal_prompts_equal_singles():
    vlm = llava()
    prompts = [
        few_shot(PAIRS[:2], "Japan"),
        few_shot([(image("Peru"), "Lima")], image("Chad")),
        few_shot([], "Chad"),
    ]
    together = read(vlm, prompts, "last", batch_size=3)
    apart = read(vlm, prompts, "last", batch_size=1)
    torch.testing.assert_close(together.per_prompt, apart.per_prompt, rtol=1e-4, atol=1e-4)
    assert together.n_prompts == 3


def test_a_task_gives_one_vector_per_validation_item_with_its_metadata():
    task = tasks()["country-capital"]
    vectors = from_examples(llava(), task, "image", n_shots=2, seed=4)
    assert vectors.per_prompt.shape == (3, 4, 32)
    assert vectors.per_prompt.dtype == torch.float32
    about = dict(vectors.metadata)
    assert about["n_shots"] == 2 and about["seed"] == 4 and about["specification"] == "image"
    assert about["at"] == "delimiter[1]" and about["dtype"] == "float32" and about["method"] == "xtv"
    for query, drawn in zip(task.validation, about["items"], strict=True):
        assert len(set(drawn)) == 2 and query.id not in drawn


def test_seeds_modalities_and_shuffled_labels_give_other_vectors():
    vlm, task = llava(), tasks()["country-capital"]
    base = from_examples(vlm, task, "text", n_shots=2, seed=1)
    assert torch.equal(base.per_prompt, from_examples(vlm, task, "text", n_shots=2, seed=1).per_prompt)
    for other in (
        from_examples(vlm, task, "image", n_shots=2, seed=1),
        from_examples(vlm, task, "text", n_shots=2, seed=1, shuffle_labels=True),
        from_examples(vlm, task, "text", n_shots=2, seed=1, method="icl_tv"),
    ):
        assert (other.mean - base.mean).abs().max() > 1e-3


def test_an_instruction_is_read_at_its_colon():
    vlm = llava()
    vectors = from_instruction(vlm, tasks()["food-color"])
    torch.testing.assert_close(vectors.mean, by_hand(vlm, instruction("The color:"), -1), rtol=0, atol=0)
    assert vectors.n_prompts == 1


def test_language_model_and_vlm_with_shared_weights_give_the_same_text_vectors():
    task = tasks()["country-capital"]
    a = from_examples(llava(), task, "text", n_shots=2)
    b = from_examples(llama(), task, "text", n_shots=2)
    torch.testing.assert_close(a.per_prompt, b.per_prompt, rtol=0, atol=0)


def test_combinations_are_weighted_sums_of_means():
    torch.manual_seed(0)
    a, b, c = (TaskVectors(torch.randn(n, 4, 8)) for n in (3, 1, 2))
    torch.testing.assert_close(combine([a, b]).mean, (a.per_prompt.mean(0) + b.per_prompt[0]) / 2)
    torch.testing.assert_close(combine([a, b, c], [1.0, 1.0, -1.0]).mean, a.mean + b.mean - c.mean)
    with pytest.raises(InputError, match="2 sets of task vectors but 1 weights"):
        combine([a, b], [1.0])
    with pytest.raises(ShapeError, match="different"):
        combine([a, TaskVectors(torch.randn(1, 4, 9))])
    with pytest.raises(InputError, match="at least one"):
        combine([])


def test_random_vectors_have_the_norms_and_another_direction():
    vectors = TaskVectors(torch.randn(2, 4, 64))
    control = random_like(vectors, seed=3)
    torch.testing.assert_close(control.mean.norm(dim=-1), vectors.mean.norm(dim=-1))
    cosine = torch.cosine_similarity(control.mean, vectors.mean, dim=-1)
    assert cosine.abs().max() < 0.5  # 4 standard deviations of a random cosine in 64 dimensions
    assert torch.equal(control.mean, random_like(vectors, seed=3).mean)
    assert not torch.equal(control.mean, random_like(vectors, seed=4).mean)


def test_similarity_is_the_cosine_and_centering_takes_out_the_shared_part():
    shared = 10 * torch.ones(8)
    own = torch.eye(8)[:3]
    sets = [TaskVectors((shared + one)[None, None]) for one in own]
    plain = similarity(sets, sets, 0)
    assert plain.min() > 0.99
    centered = similarity(sets, sets, 0, center=True)
    # Three orthogonal unit vectors without their mean are 120 degrees apart.
    torch.testing.assert_close(centered, 1.5 * torch.eye(3) - 0.5, atol=1e-4, rtol=0)


def test_saving_and_loading_gives_the_same_vectors_and_metadata(tmp_path):
    vectors = from_examples(llava(), tasks()["country-capital"], "text", n_shots=2)
    file = vectors.save(tmp_path / "sub" / "capital.v1")
    for name in (file, tmp_path / "sub" / "capital.v1"):
        loaded = TaskVectors.load(name)
        assert torch.equal(loaded.per_prompt, vectors.per_prompt)
        assert loaded.metadata == json.loads(json.dumps(dict(vectors.metadata)))


def test_taking_prompts_takes_their_metadata_along():
    vectors = TaskVectors(torch.randn(3, 4, 8), {"task": "t", "items": [["a"], ["b"], ["c"]], "n_prompts": 3})
    taken = vectors.take([2, 0])
    assert torch.equal(taken.per_prompt, vectors.per_prompt[[2, 0]])
    assert taken.metadata == {"task": "t", "items": [["c"], ["a"]], "n_prompts": 2}
    for wrong in ([], [3], [0, 0], [-1]):
        with pytest.raises(InputError, match="cannot take prompts"):
            vectors.take(wrong)


def test_a_half_precision_model_gives_float32_vectors_averaged_in_float32():
    wide = llava()
    model = LlavaForConditionalGeneration(wide.model.config).eval()
    model.load_state_dict(wide.model.state_dict())
    half = VLM(model.to(torch.bfloat16), wide.processor)
    prompts = [few_shot(PAIRS[:2], "Japan"), few_shot(PAIRS[1:], "Chad"), few_shot(PAIRS[::2], "Peru")]
    vectors = read(half, prompts, "last")
    assert vectors.per_prompt.dtype == vectors.mean.dtype == torch.float32
    assert vectors.metadata["dtype"] == "bfloat16"
    # The mean of bfloat16 numbers in float32 is not itself a bfloat16 number, as a mean in bfloat16 would be.
    assert not torch.equal(vectors.mean, vectors.mean.to(torch.bfloat16).float())
    with half.edit(vectors.patch(1, half)):
        patched = half(half.prepare([few_shot([], "Chad")])).logits
    assert patched.dtype == torch.bfloat16 and not torch.equal(
        patched, half(half.prepare([few_shot([], "Chad")])).logits
    )


def test_corrupt_foreign_and_missing_files_are_refused(tmp_path):
    vectors = TaskVectors(torch.randn(1, 4, 8), {"task": "t"})
    file = vectors.save(tmp_path / "v")
    with pytest.raises(InputError, match="no task vectors at"):
        TaskVectors.load(tmp_path / "w")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="corrupt"):
        TaskVectors.load(file)
    file.write_bytes(content)
    (tmp_path / "v.json").write_text("{not json")
    with pytest.raises(InputError, match="corrupt"):
        TaskVectors.load(file)
    (tmp_path / "v.json").write_text("[1]")
    with pytest.raises(InputError, match="not the metadata"):
        TaskVectors.load(file)
    (tmp_path / "v.json").unlink()
    with pytest.raises(InputError, match=r"v\.json"):
        TaskVectors.load(file)


def test_bad_vectors_layers_and_models_are_refused():
    with pytest.raises(ShapeError, match="prompt, layer, d_model"):
        TaskVectors(torch.zeros(0, 4, 8))
    # The shape check of the annotations speaks first where it is on.
    with pytest.raises((ShapeError, TypeCheckError)):
        TaskVectors(torch.randn(4, 8))
    with pytest.raises(InputError, match="NaN"):
        TaskVectors(torch.full((1, 4, 8), float("nan")))
    vectors = TaskVectors(torch.randn(1, 4, 32))
    for layer in (-1, 4):
        with pytest.raises(InputError, match="layers 0 to 3"):
            vectors.patch(layer, llava())
    for other in (other_llama(n_layers=3), other_llama(d_model=40)):
        with pytest.raises(ShapeError, match="do not fit"):
            vectors.patch(0, other)


def test_layer_zero_is_a_layer():
    vectors = TaskVectors(torch.arange(4 * 32).reshape(1, 4, 32).float())
    assert vectors.patch(0, llava()).site == "blocks.0.hook_resid_post"
    assert torch.equal(vectors.patch(0, llava()).value, torch.arange(32.0))


def test_reading_at_nothing_or_at_many_tokens_is_refused():
    vlm = llava()
    with pytest.raises(InputError, match="no prompts"):
        read(vlm, [])
    with pytest.raises(UnknownNameError, match=r"delimiter\[7\]"):
        read(vlm, [few_shot(PAIRS)], "delimiter[7]")
    with pytest.raises(InputError, match="one token"):
        read(vlm, [few_shot([(image("x"), "y")])], "image[0]")
    with pytest.raises(InputError, match="Cannot draw 5 shots"):
        from_examples(vlm, tasks()["food-color"], "text", n_shots=5)


def test_adding_the_difference_of_two_vectors_is_replacing_one_by_the_other():
    vlm = llava()
    inputs = vlm.prepare([few_shot([], "Peru")])
    source = read(vlm, [few_shot(PAIRS, "Chad")], "last")
    own = read(vlm, [few_shot([], "Peru")], "last")
    replaced, clean = source.patch(2, vlm), vlm(inputs).logits
    with vlm.edit(replaced):
        a = vlm(inputs).logits
    with vlm.edit(Add(replaced.site, source.at(2) - own.at(2), at="last")):
        b = vlm(inputs).logits
    # The same numbers summed in another order.
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (a[:, -1] - clean[:, -1]).abs().max() > 0.1
