"""Images written out as processors do: those that report what they write, and those that only rewrite the text."""

import pytest
import torch
from transformers import (
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from interp.errors import InputError
from interp.inputs import prepare, resolve
from interp.prompts import Prompt, Segment, few_shot, query
from tests.prepared import GREEN, RED, ids_at, one, text_at
from tests.processors import byte_level_tokenizer


def idefics2_processor(tokenizer, splitting: bool = False) -> Idefics2Processor:
    image_processor = Idefics2ImageProcessorPil(
        do_image_splitting=splitting, size={"shortest_edge": 16, "longest_edge": 16}
    )
    return Idefics2Processor(image_processor, tokenizer, image_seq_len=3)


def idefics3_processor(tokenizer) -> Idefics3Processor:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<global-img>", *tiles]})
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=2)


def llava_next_processor(tokenizer) -> LlavaNextProcessor:
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    return LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


OTHERS = {
    "idefics2: adjacent wrappers merge, a space is put behind": idefics2_processor,
    "idefics2, split": lambda tokenizer: idefics2_processor(tokenizer, splitting=True),
    "idefics3: tiles named in the text": idefics3_processor,
    "llava-next: images of different lengths": llava_next_processor,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_other_families(make) -> None:
    tokenizer = byte_level_tokenizer()
    processor = make(tokenizer)
    prompts = [
        few_shot([(RED, "Paris")], GREEN),
        Prompt((Segment("image", image=RED), Segment("image", image=GREEN), Segment("caption", text="fox"))),
    ]
    inputs = prepare([*prompts, query("Spain")], tokenizer=tokenizer, processor=processor)
    nested = [list(prompt.images) for prompt in prompts]
    flat = [image for images in nested for image in images]
    expected = processor(
        text=[prompt.text for prompt in prompts],
        images=flat if isinstance(processor, LlavaNextProcessor) else nested,
        return_tensors="pt",
        padding=True,
    )
    assert torch.equal(inputs["input_ids"][:2], expected["input_ids"])
    assert set(inputs) == set(expected)
    for name in set(inputs) - {"input_ids", "attention_mask"}:
        assert torch.equal(inputs[name], expected[name]), name
    image_id = processor.image_token_id
    for row in (0, 1):
        total = inputs["input_ids"][row].eq(image_id).sum()
        counts = [ids_at(inputs, f"image[{k}]", row).count(image_id) for k in (0, 1)]
        alone = [one(query(image), tokenizer, processor=processor)["input_ids"] for image in (RED, GREEN)]
        assert counts == [ids.eq(image_id).sum() for ids in alone]
        assert sum(counts) == total
        first, second = (resolve(f"image[{k}]", inputs.layout[row : row + 1], inputs.seq_len)[0] for k in (0, 1))
        assert first[-1] < second[0]
    assert text_at(inputs, "caption", tokenizer, 1) == "fox"
    assert text_at(inputs, "output[0]", tokenizer, 0) == "Paris"
    assert resolve("delimiter[-1]", inputs.layout[:1], inputs.seq_len) == [[inputs.seq_len - 1]]
    assert text_at(inputs, "input[0]", tokenizer, 2) == "Spain"


def test_a_processor_that_rewrites_the_text_is_refused() -> None:
    class Shouting(Idefics2Processor):
        def __call__(self, images=None, text=None, **kwargs):
            return super().__call__(images, [one.replace("Paris", "PARIS") for one in text], **kwargs)

    tokenizer = byte_level_tokenizer()
    plain = idefics2_processor(tokenizer)
    shouting = Shouting(plain.image_processor, tokenizer, image_seq_len=3)
    with pytest.raises(InputError, match=r"Shouting rewrites the text around images.*PARIS"):
        one(few_shot([(RED, "Paris")]), tokenizer, processor=shouting)
