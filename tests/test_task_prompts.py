from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from interp.errors import InputError, UnknownNameError
from interp.prompts import ICL_TV
from interp.task_prompts import (
    few_shot_prompts,
    instructed_prompts,
    instruction_prompt,
    item_input,
    query_prompts,
    specification_prompts,
)
from interp.tasks import Draw, Item, Task

RED = Image.new("RGB", (4, 4), "red")
FOX, HEN, COW = Item("fox", "kit", RED), Item("hen", "chick", "hen.png"), Item("cow", "calf")
DRAWS = [Draw(COW, (FOX, HEN)), Draw(FOX, (HEN, FOX))]
TASK = Task("animal-young", "The baby of the animal:", (FOX, HEN), (COW,))


def texts(prompts) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_few_shot_prompts_of_either_modality() -> None:
    assert texts(few_shot_prompts(DRAWS, "text")) == [
        "Q:fox\nA:kit\n\nQ:hen\nA:chick\n\nQ:cow\nA:",
        "Q:hen\nA:chick\n\nQ:fox\nA:kit\n\nQ:fox\nA:",
    ]
    crossed = few_shot_prompts(DRAWS[1:], "image", "text")
    assert texts(crossed) == ["Q:<image>\nA:chick\n\nQ:<image>\nA:kit\n\nQ:fox\nA:"]
    assert crossed[0].images == (Path("hen.png"), RED)
    assert few_shot_prompts(DRAWS[1:], "text", "image")[0].images == (RED,)


def test_queries() -> None:
    assert texts(query_prompts([FOX, COW], "text")) == ["Q:fox\nA:", "Q:cow\nA:"]
    assert texts(query_prompts([FOX], "image", template=ICL_TV)) == ["example:<image>->"]


@pytest.mark.parametrize(
    ("method", "with_query", "text", "at"),
    [
        ("xtv", None, "Q:hen\nA:chick\n\nQ:fox\nA:", "delimiter[1]"),
        ("xtv", True, "Q:hen\nA:chick\n\nQ:fox\nA:kit\n\nQ:fox\nA:", "delimiter[1]"),
        ("icl_tv", None, "example:hen->chick\nexample:fox->kit\nexample:fox->", "delimiter[2]"),
        ("fv", None, "Q: hen\nA: chick\n\nQ: fox\nA: kit\n\nQ: fox\nA:", "delimiter[2]"),
    ],
)
def test_specifications(method: str, with_query: bool | None, text: str, at: str) -> None:
    prompts, position = specification_prompts(DRAWS, "text", method=method, with_query=with_query)
    assert len(prompts) == 2
    assert prompts[1].text == text
    assert position == at


def test_a_cut_specification_needs_no_image_of_its_query() -> None:
    prompts, _ = specification_prompts(DRAWS[:1], "image")
    assert prompts[0].images == (RED, Path("hen.png"))
    with pytest.raises(InputError, match="'cow' has no image"):
        specification_prompts(DRAWS[:1], "image", with_query=True)


def test_instructions() -> None:
    assert instruction_prompt(TASK).text == "The baby of the animal:"
    (prompt,) = instructed_prompts(TASK, [COW], "text")
    assert prompt.text == "The baby of the animal:\nQ:cow\nA:"
    assert {"instruction[0]", "input[0]", "delimiter[1]"} <= set(prompt.names())
    assert instructed_prompts(TASK, [FOX], "image", separator="")[0].text == "The baby of the animal:Q:<image>\nA:"


def test_mistakes_are_named() -> None:
    with pytest.raises(UnknownNameError, match=r"'xvt'.*Did you mean 'xtv'"):
        specification_prompts(DRAWS, "text", method="xvt")
    with pytest.raises(InputError, match="same number of exemplars"):
        specification_prompts([Draw(COW, (FOX,)), Draw(COW, (FOX, HEN))], "text")
    with pytest.raises(InputError, match="has no instruction"):
        instruction_prompt(replace(TASK, instruction=""))
    with pytest.raises(InputError, match="'cow' has no image"):
        item_input(COW, "image")
