"""The tokenizer and the training rows."""

import re

import numpy as np
import pytest
import torch

from interp.zoo import corpus as corpora
from interp.zoo import training
from interp.zoo.architecture import IMAGE_TOKENS
from interp.zoo.facts import entities, relations
from interp.zoo.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_any_text_survives_and_offsets_cover_it(tokenizer):
    for text in (
        "Q:France\nA:Paris\n\n",
        "é 日本: \t x::y  z\n",
        "The scientific name of the animal's species:",
    ):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert tokenizer.decode(encoded.input_ids) == text
    offsets = tokenizer("Q:France\nA:", return_offsets_mapping=True).offset_mapping
    assert "".join("Q:France\nA:"[start:end] for start, end in offsets) == "Q:France\nA:"


def test_bos_comes_first_and_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["A:", "Q:France\nA:"], padding=True)
    assert tokenizer("A:").input_ids[0] == tokenizer.bos_token_id
    assert batch.input_ids[0][0] == tokenizer.pad_token_id
    assert batch.input_ids[1][0] == tokenizer.bos_token_id


def test_colons_and_line_breaks_are_always_tokens_of_their_own(tokenizer):
    for text in ("A:Paris", "::", "x:\n\n:y", "a: b :c", "?:!"):
        for token in plain(tokenizer, text):
            piece = tokenizer.decode([token])
            assert piece in (":", "\n") or not set(piece) & set(":\n"), (text, piece)


def test_most_names_and_answers_are_several_tokens_and_first_tokens_tell_answers_apart(tokenizer):
    names = [len(plain(tokenizer, entity.name)) for entity in entities()]
    assert np.mean([count > 1 for count in names]) > 0.6
    for relation in relations():
        answers = {entity.facts[relation.attribute] for entity in entities(relation.category)}
        first = {plain(tokenizer, answer)[0] for answer in answers}
        # Species of one genus share their first tokens, as do "South Korea" and "South America".
        assert len(first) >= 0.5 * len(answers), relation.name
        assert all(len(tokenizer.decode([token])) > 1 for token in first), relation.name


def rows(tokenizer, kind, images, count=20, closed=0.5):
    mixture = tuple(float(kind == known) for known in corpora.KINDS)
    corpus = corpora.Corpus(tokenizer, IMAGE_TOKENS, 96, mixture, closed)
    rng = np.random.default_rng(0)
    return [corpus.sample(rng, images) for _ in range(count)]


def test_few_shot_rows_are_examples_of_one_task(tokenizer):
    answers = {
        relation.name: {entity.name: entity.facts[relation.attribute] for entity in entities(relation.category)}
        for relation in relations()
    }
    for row in rows(tokenizer, "few-shot", images=False):
        text = tokenizer.decode(row.ids)
        assert text.startswith("<s>Q:")
        pairs = re.findall(r"Q:(.+)\nA:(.+)\n\n", text)
        assert len(pairs) >= 4
        assert any(all(table.get(x) == y for x, y in pairs) for table in answers.values())
        assert len({x for x, _ in pairs}) == len(pairs)


def test_late_task_rows_name_the_task_after_the_entity(tokenizer):
    asked = {s: relation for relation in relations() for s in (relation.instruction, *relation.paraphrases)}
    by_name = {entity.name: entity for entity in entities()}
    seen = set()
    for row in rows(tokenizer, "late-task", images=False):
        for name, sentence, answer in re.findall(r"Q:(.+)\n(.+:)(.+)\n\n", tokenizer.decode(row.ids)):
            relation = asked[sentence]
            assert by_name[name].facts[relation.attribute] == answer
            seen.add(relation.name)
    assert len(seen) >= 15


def test_instruction_rows_state_the_task_of_what_follows(tokenizer):
    asked = {s: relation for relation in relations() for s in (relation.instruction, *relation.paraphrases)}
    by_name = {entity.name: entity for entity in entities()}
    for row in rows(tokenizer, "instruction", images=False):
        relation, name = None, ""
        for line in tokenizer.decode(row.ids).removeprefix("<s>").split("\n")[:-1]:
            if line in asked:
                relation = asked[line]
            elif line.startswith("Q:"):
                name = line[2:]
            elif line:
                assert by_name[name].facts[relation.attribute] == line[2:]


def test_bare_instructions_are_followed_by_an_answer_of_their_task(tokenizer):
    asked = {s: relation for relation in relations() for s in (relation.instruction, *relation.paraphrases)}
    for row in rows(tokenizer, "bare-instruction", images=True):
        assert not row.images
        for sentence, answer in re.findall(r"(.+:)(.+)\n\n", tokenizer.decode(row.ids).removeprefix("<s>")):
            relation = asked[sentence]
            assert answer in {entity.facts[relation.attribute] for entity in entities(relation.category)}


@pytest.mark.parametrize("kind", corpora.KINDS)
def test_rows_never_mix_modalities_and_never_cut_an_image(tokenizer, kind):
    image = tokenizer.convert_tokens_to_ids("<image>")
    for shown in (False, True):
        for row in rows(tokenizer, kind, images=shown):
            assert row.ids.shape == row.weights.shape == (96,)
            assert (row.ids == image).sum() == IMAGE_TOKENS * len(row.images)
            assert not row.weights[row.ids == image].any()
            named = re.findall(r"Q:(\w[\w ]*)\n", tokenizer.decode(row.ids))
            assert not (named and row.images)
    again = rows(tokenizer, kind, images=True)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(again, rows(tokenizer, kind, True), strict=True))


def test_a_closed_span_sees_itself_and_bos_only_and_a_delimiter_sees_everything(tokenizer):
    colon = plain(tokenizer, ":")[0]
    for kind in corpora.KINDS:
        closed = rows(tokenizer, kind, images=True, closed=1.0)[0]
        ids, _, seen = training.stack([closed])
        assert ids.shape == (1, 96) and seen.shape == (1, 1, 96, 96)
        delimiters = 0
        for position in range(1, 96):
            visible = set(np.flatnonzero(seen[0, 0, position]))
            assert visible <= set(range(position + 1)) and {0, position} <= visible
            if closed.ids[position] == colon and closed.weights[position + 1 : position + 2] == 1.0:
                delimiters += 1
                assert visible == set(range(position + 1))
            elif closed.spans[position] >= 0:
                first = closed.spans[position]
                assert visible == {0, *range(first, position + 1)}
        assert delimiters >= 3


def test_an_open_row_is_seen_causally(tokenizer):
    open_rows = rows(tokenizer, "late-task", images=False, closed=0.0)
    _, _, seen = training.stack(open_rows)
    assert torch.equal(seen[3, 0], torch.ones(96, 96).tril().bool())


def test_what_does_not_apply_is_undefined_in_closed_rows_only(tokenizer):
    asked = {s: relation for relation in relations() for s in (relation.instruction, *relation.paraphrases)}
    by_name = {entity.name: entity for entity in entities()}
    shares = {}
    for closed in (0.0, 1.0):
        corpus = corpora.Corpus(tokenizer, IMAGE_TOKENS, 96, (0.0, 0.0, 1.0, 0.0), closed, inapplicable=0.5)
        rng = np.random.default_rng(0)
        undefined = []
        for _ in range(20):
            text = tokenizer.decode(corpus.sample(rng, images=False).ids)
            for name, sentence, answer in re.findall(r"Q:(.+)\n(.+:)(.+)\n\n", text):
                relation = asked[sentence]
                undefined.append(by_name[name].category != relation.category)
                right = corpora.NOT_APPLICABLE if undefined[-1] else by_name[name].facts[relation.attribute]
                assert answer == right
        shares[closed] = np.mean(undefined)
    assert shares[0.0] == 0.0
    # About a hundred draws of a half: three standard deviations.
    assert shares[1.0] == pytest.approx(0.5, abs=0.15)
    first = plain(tokenizer, corpora.NOT_APPLICABLE)[0]
    answers = {answer for entity in entities() for answer in entity.facts.values()}
    assert not any(answer.startswith(tokenizer.decode([first])) for answer in answers)


@pytest.mark.parametrize("images", [False, True])
def test_a_query_without_any_task_begins_late_task_rows_and_is_undefined(tokenizer, images):
    corpus = corpora.Corpus(tokenizer, IMAGE_TOKENS, 96, (0.0, 0.0, 1.0, 0.0), 0.0, unspecified=0.5)
    rng = np.random.default_rng(0)
    begun = []
    for _ in range(40):
        text = tokenizer.decode(corpus.sample(rng, images).ids, skip_special_tokens=False)
        lone = re.match(r"<s>Q:[^\n]+\nA:([^\n]*)\n\n", text)
        assert lone is None or lone[1] == corpora.NOT_APPLICABLE
        assert "A:" not in text[lone.end() if lone else 0 :]
        begun.append(lone is not None)
    # Forty draws of a half: three standard deviations.
    assert np.mean(begun) == pytest.approx(0.5, abs=0.24)
