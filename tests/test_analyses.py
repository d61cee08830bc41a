"""Phases, context embeddings and ensembles against closed forms."""

from dataclasses import replace

import pytest
import torch

from interp import analyses, lens
from interp.errors import InputError
from interp.prompts import few_shot
from interp.task_prompts import few_shot_prompts, query_prompts
from interp.task_vectors import TaskVectors, combine, from_examples, from_instruction
from interp.tasks import draw_exemplars
from interp.transfer import score_patches
from tests.worded import image, llava, tasks

TASK = tasks()["country-capital"]


def test_phases_follow_the_first_tokens_of_input_task_word_and_answer():
    vlm = llava()
    draws = draw_exemplars(TASK, 2, seed=1)
    prompts, items = few_shot_prompts(draws, "text"), [draw.query for draw in draws]
    found = analyses.answer_phases(vlm, prompts, items, "capital", batch_size=2)
    logits = lens.logit_lens(vlm, vlm.prepare([prompts[2]]))[:, 0].softmax(-1)
    answer = vlm.tokenizer("A:" + items[2].output).input_ids[len(vlm.tokenizer("A:").input_ids)]
    torch.testing.assert_close(found["answer"][2], logits[:, answer], rtol=1e-3, atol=1e-6)
    word = vlm.tokenizer("The capital").input_ids[len(vlm.tokenizer("The").input_ids)]
    torch.testing.assert_close(found["task"][2], logits[:, word], rtol=1e-3, atol=1e-6)
    assert {values.shape for values in found.values()} == {(3, 4)}


def test_context_embeddings_are_means_over_real_tokens_with_image_features_in_place():
    vlm = llava()
    prompts = [few_shot([("a", "b")], "c"), few_shot([(image("x"), "y")], image("z"))]
    found = analyses.context_embeddings(vlm, prompts)
    for prompt, mean in zip(prompts, found, strict=True):
        inputs = vlm.prepare([prompt])
        entered = []
        handle = vlm.decoder.layers[0].register_forward_pre_hook(
            lambda m, args, entered=entered: entered.append(args[0])
        )
        with torch.no_grad():
            vlm(inputs)
        handle.remove()
        torch.testing.assert_close(mean, entered[0][0].mean(dim=0), rtol=1e-5, atol=1e-5)


def test_ensembles_are_means_of_the_first_of_a_seeded_order():
    vectors = TaskVectors(torch.randn(5, 4, 8))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(7))
    found = analyses.ensembles(vectors, None, [1, 3, 5], seed=7)
    torch.testing.assert_close(found[1].mean, vectors.per_prompt[order[:3]].mean(0))
    torch.testing.assert_close(found[2].mean, vectors.mean)
    instruction = TaskVectors(torch.randn(1, 4, 8))
    both = analyses.ensembles(vectors, instruction, [3], seed=7)[0]
    torch.testing.assert_close(both.mean, (found[1].mean + instruction.mean) / 2)
    for sizes in ([0], [6], []):
        with pytest.raises(InputError, match="between 1 and 5"):
            analyses.ensembles(vectors, None, sizes, seed=0)


def test_the_ensemble_curve_scores_each_size_and_seed():
    vlm = llava()
    vectors = [from_examples(vlm, TASK, "text", n_shots=2, seed=s) for s in (1, 2)]
    instruction = from_instruction(vlm, TASK)
    prompts = query_prompts(TASK.test, "image")
    curves = analyses.ensemble_curve(vlm, prompts, TASK.test, vectors, instruction, 1, [1, 3], (1, 2))
    assert curves["examples"].shape == (2, 2)
    whole = combine([combine([vectors[1]]), instruction])
    expected = score_patches(vlm, prompts, TASK.test, [whole], layers=[1], case_sensitive=False).accuracy[0, 0]
    assert curves["examples + instruction"][1, 1] == expected
    # Lower-cased: answers written in capitals count as well.
    loud = tuple(replace(item, output=item.output.upper()) for item in TASK.test)
    token = score_patches(vlm, prompts, TASK.test, [whole], layers=[1]).answers(vlm)[0, 0]
    heard = tuple(replace(item, output=text.strip().swapcase() + "zz") for item, text in zip(loud, token, strict=True))
    assert all(text.strip() for text in token)
    shouted = analyses.ensemble_curve(vlm, prompts, heard, vectors, instruction, 1, [3], (1, 2))
    assert shouted["examples + instruction"][1, 0] == 1.0
