"""The tables of facts, and the tasks made of them."""

from collections import Counter

import pytest

from interp.errors import UnknownNameError
from interp.zoo import facts, world


def test_the_world_is_as_large_as_promised_and_names_are_unique():
    assert len(facts.entities("country")) >= 48
    assert len(facts.entities("animal")) >= 36
    assert len(facts.entities("food")) >= 36
    names = [entity.name for entity in facts.entities()]
    glyphs = [entity.glyph for entity in facts.entities()]
    assert len(set(names)) == len(names)
    assert len(set(glyphs)) == len(glyphs)


def test_every_entity_has_every_fact_and_nothing_is_blank_or_oddly_written():
    for relation in facts.relations():
        for entity in facts.entities(relation.category):
            answer = entity.facts[relation.attribute]
            assert answer == answer.strip() != ""
            assert answer[0].isupper()
            assert answer.isascii() and ":" not in answer and "\n" not in answer


def test_every_fact_is_asked_about():
    asked = {(relation.category, relation.attribute) for relation in facts.relations()}
    held = {(entity.category, attribute) for entity in facts.entities() for attribute in entity.facts}
    assert asked == held
    assert min(Counter(category for category, _ in asked).values()) >= 6


def test_no_constant_answer_reaches_a_quarter_of_a_paper_task():
    for task in world.tasks(only_paper=True).values():
        commonest = Counter(item.output for item in task.test).most_common(1)[0][1]
        assert commonest / len(task.test) <= 0.25, task.name


def test_answers_are_shared_between_tasks_and_between_items():
    by_task = {
        relation.name: {entity.facts[relation.attribute] for entity in facts.entities(relation.category)}
        for relation in facts.relations()
    }
    assert len(by_task["country-language"] & by_task["country-demonym"]) >= 10
    assert len(by_task["country-continent"] & by_task["food-continent"]) >= 5
    assert len(by_task["country-currency"]) < len(facts.entities("country"))


def test_instructions_are_those_of_the_paper_and_all_end_in_a_colon():
    by_name = {relation.name: relation for relation in facts.relations()}
    assert by_name["country-capital"].instruction == "The capital city of the country:"
    assert by_name["country-currency"].instruction == "The last word of the official currency of the country:"
    assert by_name["animal-latin"].instruction == "The scientific name of the animal's species in latin:"
    assert by_name["animal-young"].instruction == "The term for the baby of the animal:"
    assert by_name["food-color"].instruction == "The color of the food:"
    assert by_name["food-flavor"].instruction == "The flavor descriptor of the food:"
    sentences = [s for relation in by_name.values() for s in (relation.instruction, *relation.paraphrases)]
    assert all(sentence.endswith(":") and sentence.count(":") == 1 for sentence in sentences)
    assert len(set(sentences)) == len(sentences)
    assert all(2 <= len(relation.paraphrases) <= 4 for relation in by_name.values())


def test_splits_are_disjoint_complete_and_depend_on_the_seed():
    for category in facts.CATEGORIES:
        validation, test = facts.split(category)
        assert not {e.name for e in validation} & {e.name for e in test}
        assert {e.name for e in (*validation, *test)} == {e.name for e in facts.entities(category)}
        assert len(validation) / (len(validation) + len(test)) == pytest.approx(0.4, abs=0.02)
        assert facts.split(category, seed=1)[0] != validation


def test_tasks_carry_names_answers_and_pictures():
    tasks = world.tasks()
    assert set(facts.PAPER_TASKS) < set(tasks)
    capital = tasks["country-capital"]
    assert capital.category == "country"
    by_input = {item.input: item for item in (*capital.validation, *capital.test)}
    assert by_input["France"].output == "Paris"
    assert by_input["France"].image.size == (96, 96)
    assert {item.input for item in capital.test} == {item.input for item in tasks["country-region"].test}


def test_an_unknown_category_names_the_nearest():
    with pytest.raises(UnknownNameError, match="'country'"):
        facts.entities("countries")
