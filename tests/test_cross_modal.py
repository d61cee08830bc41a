"""Conditions, controls and tables of the transfer experiment, each against one computed apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp import cross_modal
from interp.cross_modal import (
    Settings,
    check_tasks,
    choose_on_validation,
    partner,
    run_patches,
    run_prompts,
    specify,
    stranger,
)
from interp.cross_modal_tables import (
    at_layer,
    by_layer,
    exact_answers,
    per_item,
    stacked,
    summary,
)
from interp.errors import InputError
from interp.task_prompts import few_shot_prompts, query_prompts
from interp.task_vectors import from_examples
from interp.tasks import draw_exemplars
from interp.transfer import generate_answers, score_patches, score_prompts
from tests.worded import llama, llava, tasks

SETTINGS = Settings(n_shots=2, seeds=(1, 2), n_random=2, batch_size=3)
WORLD = tasks()


@pytest.fixture(scope="module")
def bank():
    return specify(llava(), WORLD, SETTINGS, llama())


@pytest.fixture(scope="module")
def results(bank):
    found = []
    for task in WORLD.values():
        found += run_prompts(llava(), task, "image", SETTINGS)
        found += run_patches(llava(), task, WORLD, bank, "image", SETTINGS)
    return found


def one(results, condition, task="country-capital", kind=None):
    (found,) = [r for r in results if (r.condition, r.task) == (condition, task) and kind in (None, r.kind)]
    return found


def test_partners_share_the_category_and_strangers_do_not():
    for task in WORLD.values():
        assert partner(task, WORLD).category == task.category and partner(task, WORLD).name != task.name
        assert stranger(task, WORLD).category != task.category
    alone = {"country-capital": WORLD["country-capital"]}
    with pytest.raises(InputError, match="second task of its category"):
        partner(alone["country-capital"], alone)
    with pytest.raises(InputError, match="second task of another category"):
        stranger(alone["country-capital"], alone)


def test_every_specification_has_one_set_per_seed(bank):
    assert set(bank["food-color"]) == {*cross_modal.PATCHES, "language model", "shuffled labels"}
    for by_spec in bank.values():
        assert all(len(sets) == 2 for sets in by_spec.values())
    text = bank["food-color"]["text"]
    assert not torch.equal(text[0].mean, text[1].mean)
    expected = (text[0].mean + bank["food-color"]["instruction"][0].mean) / 2
    torch.testing.assert_close(bank["food-color"]["ensemble"][0].mean, expected)


def test_prompt_conditions_are_scored_on_test_queries_with_validation_examples(results):
    task = WORLD["country-capital"]
    draws = draw_exemplars(task, 2, seed=2)
    assert all(e in task.validation for draw in draws for e in draw.exemplars)
    prompts = few_shot_prompts(draws, "text", "image")
    expected = score_prompts(llava(), prompts, task.test)
    found = one(results, "text", kind="prompt")
    torch.testing.assert_close(found.scores.log_prob[1], expected.log_prob, rtol=1e-4, atol=1e-4)
    assert found.scores.log_prob.shape == (2, 3)
    assert one(results, "no context").scores.log_prob.shape == (1, 3)


@pytest.mark.parametrize(
    "condition", ["text", "instruction", "language model", "random", "wrong task", "other category"]
)
def test_every_patch_scores_as_its_vectors_do_alone(results, bank, condition):
    found = next(r for r in results if r.condition == condition and r.by_layer and r.task == "country-capital")
    task = WORLD["country-capital"]
    prompts = query_prompts(task.test, "image")
    expected = score_patches(llava(), prompts, task.test, found.vectors)
    torch.testing.assert_close(found.scores.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)
    assert found.scores.log_prob.shape == (4 if condition == "random" else 2, 4, 3)
    clean = one(results, "no context").scores.log_prob
    assert (found.scores.log_prob - clean[:, None]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_controls_hold_the_vectors_they_are_named_after(results, bank):
    def same(a, b):
        return torch.equal(a.mean, b.mean)

    assert same(one(results, "wrong task").vectors[0], bank["country-currency"]["text"][0])
    assert same(one(results, "other category").vectors[0], bank["food-color"]["text"][0])
    shuffled = from_examples(llava(), WORLD["country-capital"], "text", n_shots=2, seed=1, shuffle_labels=True)
    assert same(one(results, "shuffled labels").vectors[0], shuffled)
    random = one(results, "random").vectors
    for draw, vectors in enumerate(random):
        norms = bank["country-capital"]["text"][draw // 2].mean.norm(dim=-1)
        torch.testing.assert_close(vectors.mean.norm(dim=-1), norms)
    everywhere = [v.mean[0] / v.mean[0].norm() for name in WORLD for v in one(results, "random", name).vectors]
    cosines = torch.stack(everywhere) @ torch.stack(everywhere).T
    assert (cosines - torch.eye(len(everywhere))).abs().max() < 0.8  # 16 directions of their own in 32 dimensions


def test_a_wrong_task_is_also_scored_on_its_own_answers(results):
    found = one(results, "wrong task, its answers")
    assert [item.output for item in found.items] == ["krone", "sol", "franc"]
    assert [item.input for item in found.items] == [item.input for item in WORLD["country-capital"].test]


def test_the_summary_is_the_mean_over_seeds_and_items_at_the_layer(results):
    vlm = llava()
    exact = exact_answers(vlm, results, 2, max_new_tokens=2)
    table = summary(results, list(WORLD), 2, exact).set_index(["kind", "condition"])
    row = table.loc[("patch", "text examples, patched")]
    by_hand = [one(results, "text", name, "patch").scores.prefix[:, 2].float().mean().item() for name in WORLD]
    assert row[list(WORLD)].tolist() == pytest.approx(by_hand)
    assert row["average"] == pytest.approx(np.mean(by_hand))
    assert row["low"] <= row["average"] <= row["high"]
    assert 0 <= row["exact"] <= 1
    assert np.isnan(table.loc[("control", "random vector of the same norm")]["exact"])
    assert len(table) == 4 + 5 + 5


def test_tables_by_layer_and_item_hold_every_cell(results):
    layers = by_layer(results)
    assert len(layers) == 4 * (5 + 4) * 2 * 4 + 4 * 4 * 4
    cell = layers.query("condition == 'text' and task == 'food-color' and draw == 1 and layer == 3")["accuracy"].item()
    assert cell == pytest.approx(one(results, "text", "food-color", "patch").scores.accuracy[1, 3].item())
    items = per_item(llava(), results, 1)
    no_context = items.query("condition == 'no context' and task == 'food-color'")
    assert len(no_context) == 3 and set(no_context["draw"]) == {0}
    patched = items.query("kind == 'patch' and condition == 'text' and task == 'food-color'")
    assert len(patched) == 6 and set(patched["draw"]) == {0, 1}
    scores = at_layer(one(results, "text", "food-color", "patch"), 1)
    assert patched["log_prob"].tolist() == pytest.approx(scores.log_prob.flatten().tolist())
    assert stacked(results, "text", "image", list(WORLD)).shape == (2, 4)


def test_the_layer_is_chosen_on_validation_items_and_on_nothing_else(bank):
    vlm = llava()
    # The random model is never right: call right what it says to validation items when block 2 is patched.
    world = {}
    for name, task in WORLD.items():
        prompts = query_prompts(task.validation, "image")
        said = score_patches(vlm, prompts, task.validation, bank[name]["text"][:1], layers=[2]).answers(vlm)[0, 0]
        pairs = zip(task.validation, said, strict=True)
        told = tuple(replace(item, output=text.strip() or item.output) for item, text in pairs)
        world[name] = replace(task, validation=told)
    choice = choose_on_validation(vlm, world, bank, SETTINGS)
    by_hand = {split: [] for split in ("validation", "test")}
    for name, task in world.items():
        for split, found in by_hand.items():
            runs = [
                score_patches(vlm, query_prompts(task.items(split), query), task.items(split), bank[name][source])
                for query in ("text", "image")
                for source in ("text", "image")
            ]
            found.append(torch.cat([run.accuracy for run in runs]).mean(dim=0))
    expected = torch.stack(by_hand["validation"]).mean(dim=0)
    torch.testing.assert_close(torch.tensor(choice.accuracy), expected)
    assert choice.layer == int(expected.argmax())
    assert choice.by_task == {name: int(one.argmax()) for name, one in zip(world, by_hand["validation"], strict=True)}
    # The other split says something else, so that it would have been seen.
    assert not torch.allclose(torch.stack(by_hand["test"]).mean(dim=0), expected)


def test_exact_accuracy_is_that_of_patched_generation(results):
    vlm, task = llava(), WORLD["country-capital"]
    found = one(results, "image", kind="patch")
    answers = generate_answers(vlm, found.prompts, edits=[found.vectors[0].patch(0, vlm)], max_new_tokens=3)
    # The random model is never right: call its patched answers right, and its unpatched ones wrong.
    assert answers != generate_answers(vlm, found.prompts, max_new_tokens=3)
    items = tuple(replace(item, output=answer) for item, answer in zip(task.test, answers, strict=True))
    told = replace(found, items=items)
    assert exact_answers(vlm, [told], 0, max_new_tokens=3) == {("image", "patch", "image"): 1.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instruction": ""}, "no instruction"),
        ({"category": None}, "no category"),
        ({"category": "weather"}, "second task of its category"),
    ],
)
def test_tasks_without_what_the_conditions_need_are_refused_at_once(change, words):
    check_tasks(WORLD)
    broken = {**WORLD, "food-color": replace(WORLD["food-color"], **change)}
    with pytest.raises(InputError, match=words):
        check_tasks(broken)
    bare = replace(WORLD["food-color"], test=tuple(replace(i, image=None) for i in WORLD["food-color"].test))
    with pytest.raises(InputError, match="no image for"):
        check_tasks({**WORLD, "food-color": bare})
