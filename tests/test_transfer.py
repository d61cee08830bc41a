"""Transfer: sweeps against edited forwards one by one, scores against hand counts."""

import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.task_prompts import query_prompts
from interp.task_vectors import TaskVectors, from_examples, read
from interp.transfer import (
    choose_layer,
    exact_accuracy,
    generate_answers,
    score_first_token,
    score_patches,
    score_prompts,
)
from tests.worded import llama, llava, other_llama, tasks

TASKS = tasks()
CAPITAL = TASKS["country-capital"]


def vector_sets():
    vlm = llava()
    return [from_examples(vlm, CAPITAL, m, n_shots=2) for m in ("text", "image")]


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_sweep_of_patches_equals_edited_forwards_one_by_one(modality):
    vlm, items = llava(), CAPITAL.test
    prompts, vectors = query_prompts(items, modality), vector_sets()
    swept = score_patches(vlm, prompts, items, vectors, batch_size=2)
    assert swept.prefix.shape == (2, 4, 3)
    clean = score_prompts(vlm, prompts, items)
    for v, one in enumerate(vectors):
        for layer in range(vlm.n_layers):
            for q, (prompt, item) in enumerate(zip(prompts, items, strict=True)):
                with vlm.edit(one.patch(layer, vlm)), torch.no_grad():
                    logits = vlm(vlm.prepare([prompt])).logits[:, -1]
                alone = score_first_token(vlm, logits, [prompt], [item])
                assert swept.token[v, layer, q] == alone.token[0]
                # Shared prefix and batch change the order of float32 sums only.
                torch.testing.assert_close(swept.log_prob[v, layer, q], alone.log_prob[0], rtol=1e-3, atol=1e-3)
                assert (alone.log_prob[0] - clean.log_prob[q]).abs() > 1e-4


def test_chosen_layers_and_single_vectors_are_rows_of_the_full_sweep():
    vlm, items = llava(), CAPITAL.test
    prompts, vectors = query_prompts(items, "image"), vector_sets()
    full = score_patches(vlm, prompts, items, vectors)
    some = score_patches(vlm, prompts, items, vectors[1:], layers=[2, 0])
    assert torch.equal(some.token[0], full.token[1, [2, 0]])
    assert torch.equal(full[1, 2].token, full.token[1, 2])


def test_scores_count_prefixes_ranks_and_log_probabilities():
    vlm, items = llava(), CAPITAL.test
    prompts = query_prompts(items, "text")
    vocab = len(vlm.tokenizer)
    logits = torch.zeros(len(items), vocab)
    right = vlm.tokenizer("Q:Norway\nA:Oslo").input_ids[len(vlm.tokenizer("Q:Norway\nA:").input_ids)]
    logits[0, right] = 5.0
    logits[1, vlm.tokenizer.convert_tokens_to_ids(":")] = 5.0
    logits[2, vlm.tokenizer.eos_token_id] = 5.0
    scores = score_first_token(vlm, logits, prompts, items)
    assert scores.prefix.tolist()[:2] == [True, False]
    assert scores.rank[0] == 0 and scores.rank[1] >= 1
    expected = 5.0 - torch.log(torch.exp(torch.tensor(5.0)) + vocab - 1)
    torch.testing.assert_close(scores.log_prob[0], expected)
    assert scores.accuracy == pytest.approx(scores.prefix.float().mean().item())


def test_the_layer_with_the_best_mean_is_chosen_and_the_lowest_on_ties():
    assert choose_layer(torch.tensor([[[0.0, 0.9, 0.2]], [[0.8, 0.0, 0.8]]])) == 2
    assert choose_layer(torch.tensor([0.5, 0.5, 0.1])) == 0
    # 0.1 + 0.2 is not 0.3 in floating point, but the two layers are right equally often.
    assert choose_layer(torch.tensor([[0.3, 0.1], [0.0, 0.2 + 1e-8]], dtype=torch.float32)) == 0
    thirds = torch.tensor([[0.1, 0.3], [0.2, 0.0]], dtype=torch.float64)
    assert thirds[:, 0].mean() > thirds[:, 1].mean() and choose_layer(thirds.flip(1)) == 0


def test_patched_generation_gives_the_tokens_of_uncached_patched_decoding():
    vlm, prompts = llava(), query_prompts(CAPITAL.test, "text")
    edit = vector_sets()[0].patch(1, vlm)
    answers = generate_answers(vlm, prompts, edits=[edit], max_new_tokens=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = dict(vlm.prepare([prompt]))
        position = inputs["input_ids"].shape[1] - 1
        new: list[int] = []
        for _ in range(4):

            def put(module, args, out, position=position):
                out = out.clone()
                out[:, position] = edit.value
                return out

            handle = vlm.decoder.layers[1].register_forward_hook(put)
            try:
                with torch.no_grad():
                    token = int(vlm.model(**inputs, use_cache=False).logits[0, -1].argmax())
            finally:
                handle.remove()
            new.append(token)
            if token == vlm.tokenizer.eos_token_id:
                break
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        text = vlm.tokenizer.decode(new, skip_special_tokens=True)
        assert answer == text.split("\n")[0].strip()


def test_a_vector_from_the_language_model_patches_the_vlm_as_its_own_does():
    vlm, items = llava(), CAPITAL.test
    prompts = query_prompts(items, "image")
    own = from_examples(vlm, CAPITAL, "text", n_shots=2)
    theirs = from_examples(llama(), CAPITAL, "text", n_shots=2)
    a, b = (score_patches(vlm, prompts, items, [one]) for one in (own, theirs))
    torch.testing.assert_close(a.log_prob, b.log_prob, rtol=1e-5, atol=1e-5)


def test_vectors_of_another_shape_are_refused_before_anything_runs():
    vlm, items = llava(), CAPITAL.test
    prompts = query_prompts(items, "image")
    foreign = read(other_llama(d_model=40), ["Q:x\nA:"], "last")
    calls = []
    handle = vlm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ShapeError, match="width 40"):
        score_patches(vlm, prompts, items, [foreign])
    handle.remove()
    assert not calls
    with pytest.raises(InputError, match="layers 0 to 3"):
        score_patches(vlm, prompts, items, vector_sets(), layers=[4])
    with pytest.raises(InputError, match="no task vectors"):
        score_patches(vlm, prompts, items, [])
    with pytest.raises(InputError, match="one prompt per item"):
        score_patches(vlm, prompts[:1], items, vector_sets())


def test_exact_accuracy_needs_the_whole_answer():
    items = CAPITAL.test
    answers = [items[0].output, items[1].output[:2], ""]
    assert exact_accuracy(answers, items) == pytest.approx(1 / 3)


def test_a_self_patch_is_a_no_op_and_the_last_block_gives_the_sources_answer():
    vlm, items = llava(), CAPITAL.test
    prompts = query_prompts(items, "text")
    clean = score_prompts(vlm, prompts, items)
    own = [read(vlm, [prompt], "last") for prompt in prompts]
    for q in range(len(items)):
        with pytest.raises(InputError, match="changes nothing"):
            score_patches(vlm, [prompts[q]], [items[q]], [own[q]])
        patched = score_patches(vlm, [prompts[q]], [items[q]], [own[q]], allow_no_effect=True)
        torch.testing.assert_close(
            patched.log_prob[0, :, 0], clean.log_prob[q].expand(vlm.n_layers), rtol=1e-3, atol=1e-3
        )
    source = TaskVectors(own[1].per_prompt)
    moved = score_patches(vlm, [prompts[0]], [items[0]], [source])
    assert moved.token[0, -1, 0] == clean.token[1]
