from pathlib import Path

import pytest
from PIL import Image

from interp.errors import InputError
from interp.prompts import (
    FV,
    ICL_TV,
    READ_AT,
    XTV,
    Prompt,
    Segment,
    Template,
    few_shot,
    instruction,
    query,
)

RED = Image.new("RGB", (4, 4), "red")
BLUE = Image.new("RGB", (4, 4), "blue")
PAIRS = [("France", "Paris"), ("Spain", "Madrid")]


def text_of(prompt: Prompt, name: str) -> list[str | None]:
    return [s.text for s in prompt.segments if name in s.labels]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (XTV, "Q:France\nA:Paris\n\nQ:Spain\nA:Madrid\n\nQ:Japan\nA:"),
        (ICL_TV, "example:France->Paris\nexample:Spain->Madrid\nexample:Japan->"),
        (FV, "Q: France\nA: Paris\n\nQ: Spain\nA: Madrid\n\nQ: Japan\nA:"),
    ],
)
def test_templates_are_written_as_published(template: Template, expected: str) -> None:
    assert few_shot(PAIRS, "Japan", template=template).text == expected


def test_few_shot_without_a_query_ends_after_the_last_answer() -> None:
    assert few_shot(PAIRS).text == "Q:France\nA:Paris\n\nQ:Spain\nA:Madrid\n\n"


def test_few_shot_names_every_piece() -> None:
    prompt = few_shot(PAIRS, "Japan")
    assert text_of(prompt, "input") == ["France", "Spain", "Japan"]
    assert text_of(prompt, "output") == ["Paris", "Madrid"]
    assert text_of(prompt, "delimiter") == [":", ":", ":"]
    assert prompt.segments[-1].name == "delimiter"
    assert prompt.names()[-1] == "last"
    assert {"input[2]", "output[1]", "delimiter[2]"} <= set(prompt.names())
    assert "output[2]" not in prompt.names()


def test_the_delimiter_is_one_character_also_of_an_arrow() -> None:
    assert text_of(few_shot(PAIRS, template=ICL_TV), "delimiter") == [">", ">"]


def test_image_inputs_are_images_and_inputs() -> None:
    prompt = few_shot([(RED, "Paris"), ("Spain", "Madrid")], BLUE)
    assert prompt.text == "Q:<image>\nA:Paris\n\nQ:Spain\nA:Madrid\n\nQ:<image>\nA:"
    assert prompt.images == (RED, BLUE)
    names = prompt.names()
    assert [n for n in names if n.startswith("image")] == ["image[0]", "image[1]"]
    assert [n for n in names if n.startswith("input")] == ["input[0]", "input[1]", "input[2]"]


def test_a_path_is_an_image_and_a_string_is_text() -> None:
    assert query(Path("fox.png")).images == (Path("fox.png"),)
    assert query("fox.png").images == ()


def test_queries_and_conflict_queries() -> None:
    assert query("France").text == "Q:France\nA:"
    asked = query(RED, question="What is it?")
    assert asked.text == "Q:<image>What is it?\nA:"
    assert text_of(asked, "question") == ["What is it?"]


def test_instruction_is_bare_and_ends_in_its_delimiter() -> None:
    prompt = instruction("The capital city of the country:")
    assert prompt.text == "The capital city of the country:"
    assert text_of(prompt, "delimiter") == [":"]
    assert text_of(prompt, "instruction") == ["The capital city of the country"]
    assert "delimiter[0]" not in instruction("Name the capital").names()


def test_adding_prompts_counts_on() -> None:
    both = instruction("The capital:") + query("France")
    assert both.text == "The capital:Q:France\nA:"
    assert both.names().count("delimiter[1]") == 1


@pytest.mark.parametrize(
    ("method", "with_query", "text", "at"),
    [
        ("xtv", False, "Q:France\nA:Paris\n\nQ:Spain\nA:", "delimiter[1]"),
        ("xtv", True, "Q:France\nA:Paris\n\nQ:Spain\nA:Madrid\n\nQ:Japan\nA:", "delimiter[1]"),
        ("icl_tv", True, "example:France->Paris\nexample:Spain->Madrid\nexample:Japan->", "delimiter[2]"),
        ("fv", True, "Q: France\nA: Paris\n\nQ: Spain\nA: Madrid\n\nQ: Japan\nA:", "delimiter[2]"),
    ],
)
def test_read_at_presets(method: str, with_query: bool, text: str, at: str) -> None:
    prompt, position = READ_AT[method].build(PAIRS, "Japan" if with_query else None)
    assert prompt.text == text
    assert position == at
    assert position in prompt.names()


def test_read_at_with_another_template_and_with_images() -> None:
    prompt, at = READ_AT["xtv"].build([(RED, "Paris"), (BLUE, "Madrid")], template=ICL_TV)
    assert prompt.text == "example:<image>->Paris\nexample:<image>->"
    assert at == "delimiter[1]"


def test_the_cut_prompt_is_a_prefix_of_the_full_one() -> None:
    cut, _ = READ_AT["xtv"].build(PAIRS)
    full, _ = READ_AT["xtv"].build(PAIRS, "Japan")
    assert full.segments[: len(cut.segments)] == cut.segments


def test_from_text_fills_placeholders_in_order() -> None:
    prompt = Prompt.from_text("<image>a<image><image>", [RED, BLUE, RED])
    assert [s.name for s in prompt.segments] == ["image", "text", "image", "image"]
    assert prompt.images == (RED, BLUE, RED)
    assert Prompt.from_text("a [IMG] b", [RED], image_token="[IMG]").images == (RED,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prompt.from_text("<image>"), "1 image placeholder.*0 image.*images are missing"),
        (lambda: Prompt.from_text("a<image>", [RED, RED]), "more images than placeholders"),
        (lambda: Prompt.from_text("a", [RED]), "more images than placeholders"),
        (lambda: few_shot([]), "at least one example or a query"),
        (lambda: few_shot([("France", " ")]), "output"),
        (lambda: few_shot([("", "Paris")]), "input must not be empty"),
        (lambda: instruction(" "), "must not be empty"),
        (lambda: READ_AT["fv"].build(PAIRS), "give a query"),
        (lambda: READ_AT["icl_tv"].build(PAIRS), "give a query"),
        (lambda: READ_AT["xtv"].build([]), "at least 1 example"),
        (lambda: Segment("a"), "exactly one of text and image"),
        (lambda: Segment("a", text="x", image=RED), "exactly one of text and image"),
        (lambda: Segment("last", text="x"), "cannot name a segment"),
        (lambda: Segment("a[0]", text="x"), "cannot name a segment"),
        (lambda: Template("Q:", "\nA: ", "\n"), "not in white space"),
    ],
)
def test_mistakes_are_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
