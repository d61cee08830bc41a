"""Prepared inputs: ids, pixels and positions against the tokenizer's and the processor's own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from interp.errors import InputError, UnknownNameError
from interp.inputs import prepare, resolve
from interp.prompts import FV, ICL_TV, XTV, Prompt, Segment, few_shot, instruction, query
from tests.prepared import BLUE, GREEN, RED, ids_at, one, text_at
from tests.processors import byte_level_tokenizer, llava_processor, metaspace_tokenizer

TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "byte-level, spaces in offsets": lambda: byte_level_tokenizer(trim_offsets=False),
    "metaspace": metaspace_tokenizer,
}
# Rows with 3, 0, 1 and 2 images: first, last, adjacent, after and before text; colons in inputs and answers.
PROMPTS = [
    few_shot([(RED, "Paris"), (GREEN, "12:30")], BLUE),
    few_shot([("12:30", "noon"), ("Q: the fox", "A: no")], "Japan"),
    Prompt((Segment("image", image=GREEN), Segment("caption", text="the fox"))),
    Prompt((Segment("caption", text="Q:"), Segment("image", image=RED), Segment("image", image=BLUE))),
]


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]()


# --- ids, mask and pixels


def test_inputs_equal_the_processors_own(tokenizer) -> None:
    processor = llava_processor(tokenizer)
    inputs = prepare(PROMPTS, tokenizer=tokenizer, processor=processor)
    images = [image for prompt in PROMPTS for image in prompt.images]
    expected = processor(text=[prompt.text for prompt in PROMPTS], images=images, return_tensors="pt", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    for name, value in inputs.items():
        assert torch.equal(value, expected[name]), name
    assert [layout.n_images for layout in inputs.layout] == [3, 0, 1, 2]
    assert inputs.prompts == tuple(PROMPTS)


def test_each_row_of_a_batch_is_its_own_single(tokenizer) -> None:
    processor = llava_processor(tokenizer)
    batch = prepare(PROMPTS, tokenizer=tokenizer, processor=processor)
    first_image = 0
    for row, prompt in enumerate(PROMPTS):
        single = one(prompt, tokenizer, processor=processor)
        real = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][real], single["input_ids"][0])
        assert real[batch.layout[row].start :].all()
        assert not real[: batch.layout[row].start].any()
        n = len(prompt.images)
        assert ("pixel_values" in single) == (n > 0)
        if n:
            pixels = batch["pixel_values"][first_image : first_image + n]
            assert torch.equal(pixels, single["pixel_values"])
        first_image += n
        for name in prompt.names():
            assert ids_at(batch, name, row) == ids_at(single, name)


def test_text_alone_needs_no_processor_and_has_no_pixels(tokenizer) -> None:
    inputs = prepare(["Q:France\nA:", "Q:Spain and Japan\nA:"], tokenizer=tokenizer)
    expected = tokenizer(["Q:France\nA:", "Q:Spain and Japan\nA:"], return_tensors="pt", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])


def test_padding_is_on_the_left_whatever_the_tokenizer_prefers(tokenizer) -> None:
    tokenizer.padding_side = "right"
    try:
        inputs = prepare(["Q:", "Q:France\nA:Paris"], tokenizer=tokenizer)
    finally:
        tokenizer.padding_side = "left"
    assert inputs["attention_mask"][0, -1] == 1
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["input_ids"][0, 0] == tokenizer.pad_token_id


def test_a_tokenizer_without_padding_token_still_batches() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = None
    inputs = prepare(["Q:", "Q:France\nA:Paris"], tokenizer=tokenizer)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [layout.length for layout in inputs.layout]
    assert inputs.layout[0].length < inputs.layout[1].length


def test_only_the_tokenizers_own_bos_is_added(tokenizer) -> None:
    ids = one("Q:France\nA:", tokenizer)["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


def test_text_with_placeholders_and_images(tokenizer) -> None:
    processor = llava_processor(tokenizer)
    pair = one(("Q:<image>\nA:", [RED]), tokenizer, processor=processor)
    built = one(query(RED), tokenizer, processor=processor)
    assert torch.equal(pair["input_ids"], built["input_ids"])
    assert torch.equal(pair["pixel_values"], built["pixel_values"])
    other = one(("Q:[IMG]\nA:", [RED]), tokenizer, processor=processor, image_token="[IMG]")
    assert torch.equal(other["input_ids"], built["input_ids"])


def test_to_another_device_keeps_the_layout(tokenizer) -> None:
    inputs = one("Q:France\nA:", tokenizer)
    moved = inputs.to("meta")
    assert moved["input_ids"].device.type == "meta"
    assert inputs["input_ids"].device.type == "cpu"
    assert moved.layout == inputs.layout
    assert prepare(["a"], tokenizer=tokenizer, device="meta")["input_ids"].device.type == "meta"


# --- positions


@pytest.mark.parametrize("template", [XTV, ICL_TV, FV])
def test_every_piece_is_found_by_its_name(tokenizer, template) -> None:
    pairs = [("France", "Paris"), ("Spain", "Madrid"), ("the fox", "Vulpes vulpes")]
    inputs = one(few_shot(pairs, "Japan", template=template), tokenizer)
    for k, (x, y) in enumerate(pairs):
        assert text_at(inputs, f"input[{k}]", tokenizer) == x
        assert text_at(inputs, f"output[{k}]", tokenizer) == y
    assert text_at(inputs, "input[3]", tokenizer) == "Japan"
    for k in range(4):
        assert len(ids_at(inputs, f"delimiter[{k}]")) == 1
    assert resolve("delimiter[-1]", inputs.layout, inputs.seq_len) == [[inputs.seq_len - 1]]
    assert resolve("delimiter[3]", inputs.layout, inputs.seq_len) == [[inputs.seq_len - 1]]


def test_colons_elsewhere_do_not_move_the_delimiter(tokenizer) -> None:
    pairs = [("12:30", "A: 1:2"), ("Q:A:", ":"), ("Spain", "::")]
    prompt = few_shot(pairs, "6:00")
    inputs = one(prompt, tokenizer)
    text = ""
    k = 0
    for segment in prompt.segments:
        text += segment.text
        if segment.name == "delimiter":
            # No merge crosses a delimiter here, so the text up to it has its position's number of tokens.
            n_tokens = len(tokenizer(text)["input_ids"])
            assert resolve(f"delimiter[{k}]", inputs.layout, inputs.seq_len) == [[n_tokens - 1]]
            k += 1
    assert k == 4


def test_images_have_their_tokens_and_no_others(tokenizer) -> None:
    processor = llava_processor(tokenizer)
    inputs = prepare(PROMPTS, tokenizer=tokenizer, processor=processor)
    image_id = processor.image_token_id
    for row, prompt in enumerate(PROMPTS):
        where = (inputs["input_ids"][row] == image_id).nonzero()[:, 0].tolist()
        if not prompt.images:
            assert where == []
            with pytest.raises(UnknownNameError, match="image"):
                resolve("image", inputs.layout[row : row + 1], inputs.seq_len)
            continue
        assert resolve("image", inputs.layout[row : row + 1], inputs.seq_len) == [where]
        for k in range(len(prompt.images)):
            own = resolve(f"image[{k}]", inputs.layout[row : row + 1], inputs.seq_len)[0]
            assert own == where[4 * k : 4 * k + 4]
    assert ids_at(inputs, "input[0]", 0) == [image_id] * 4
    assert text_at(inputs, "caption", tokenizer, 2) == "the fox"
    assert text_at(inputs, "caption", tokenizer, 3) == "Q:"


MERGES = {
    "A and its colon": [("A", ":")],
    "colon and line break": [(":", "Ċ")],
    "line break, A and colon": [("Ċ", "A"), ("ĊA", ":")],
    "colon and answer": [(":", "P")],
}


@pytest.mark.parametrize("merges", MERGES.values(), ids=MERGES.keys())
def test_delimiters_that_merge_with_a_neighbour(merges) -> None:
    tokenizer = byte_level_tokenizer(merges)
    merged = {tokenizer.convert_tokens_to_ids("".join(pair)) for pair in merges}
    prompt = Prompt.from_text("note:\n") + few_shot([("x:\ny", "Paris"), ("Spain", "Pisa")], "Q")
    inputs = one(prompt, tokenizer)
    ids = inputs["input_ids"][0].tolist()
    assert merged & set(ids), "the merge must occur, or nothing is tested"
    for k in range(3):
        (at,) = resolve(f"delimiter[{k}]", inputs.layout, inputs.seq_len)[0]
        assert ":" in tokenizer.decode([ids[at]])
        after = tokenizer.decode(ids[at + 1 :])
        # What follows k delimiters is the rest of the text, but for an answer's letter that merged with it.
        rest = prompt.text.split("\nA:")[k + 1 :]
        assert "\nA:".join(rest).removeprefix("P" if merges == MERGES["colon and answer"] else "") == after
    assert resolve("delimiter[2]", inputs.layout, inputs.seq_len) == [[len(ids) - 1]]


def test_a_leading_space_belongs_to_the_word_behind_it() -> None:
    for tokenizer in (byte_level_tokenizer(trim_offsets=False), metaspace_tokenizer()):
        prompt = Prompt((Segment("left", text="the "), Segment("right", text="fox")))
        inputs = one(prompt, tokenizer)
        assert text_at(inputs, "left", tokenizer) == "the"
        assert text_at(inputs, "right", tokenizer) == "fox"
        assert not set(ids_at(inputs, "left")) & set(ids_at(inputs, "right"))


def test_the_mark_that_is_added_after_an_image_belongs_to_no_segment() -> None:
    tokenizer = metaspace_tokenizer()
    processor = llava_processor(tokenizer)
    prompt = Prompt((Segment("image", image=RED), Segment("delimiter", text=":")))
    inputs = one(prompt, tokenizer, processor=processor)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens[-2:] == ["▁", ":"], "the case needs a mark of its own"
    assert resolve("delimiter", inputs.layout, inputs.seq_len) == [[len(tokens) - 1]]


def test_characters_of_several_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    inputs = one(Prompt((Segment("a", text="x"), Segment("b", text="日"), Segment("c", text="y"))), tokenizer)
    assert len(ids_at(inputs, "b")) == 3
    assert text_at(inputs, "b", tokenizer) == "日"
    assert text_at(inputs, "c", tokenizer) == "y"


def test_white_space_without_a_token_of_its_own() -> None:
    # With trimmed offsets no token admits to covering the space; without, the word's token does.
    prompt = Prompt((Segment("left", text="A:"), Segment("gap", text=" "), Segment("right", text="Pa")))
    merges = [("Ġ", "P"), ("ĠP", "a")]
    with pytest.raises(InputError, match="no token covers 'gap"):
        ids_at(one(prompt, byte_level_tokenizer(merges)), "gap[0]")
    tokenizer = byte_level_tokenizer(merges, trim_offsets=False)
    inputs = one(prompt, tokenizer)
    assert ids_at(inputs, "gap[0]") == ids_at(inputs, "right") == [len(tokenizer) - 1]


def test_names_that_a_prompt_lacks(tokenizer) -> None:
    inputs = prepare([few_shot([("France", "Paris")], "Spain"), query("Japan")], tokenizer=tokenizer)
    with pytest.raises(UnknownNameError, match=r"row 1 has no position 'delimiter\[1\]'.*delimiter\[0\]"):
        resolve("delimiter[1]", inputs.layout, inputs.seq_len)


# --- chat templates

CHAT = "{{ bos_token }}{% for m in messages %}USER: {{ CONTENT }} {% endfor %}ASSISTANT:"
OF_TEXT = CHAT.replace("CONTENT", "m['content'] | trim")
OF_PARTS = CHAT.replace("CONTENT", "m['content'] | map(attribute='text') | join").replace("{{ bos_token }}", "")


def test_chat_of_a_tokenizer(tokenizer) -> None:
    tokenizer.chat_template = OF_TEXT
    try:
        prompt = few_shot([("France", "Paris")], "Spain")
        inputs = one(prompt, tokenizer, chat=True)
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True, tokenize=True
        )["input_ids"]
    finally:
        tokenizer.chat_template = None
    ids = inputs["input_ids"][0].tolist()
    assert ids == expected
    assert ids.count(tokenizer.bos_token_id) == 1
    assert text_at(inputs, "chat_prefix", tokenizer).endswith("USER:")
    assert text_at(inputs, "chat_suffix", tokenizer) == "ASSISTANT:"
    assert text_at(inputs, "last", tokenizer) == ":"
    assert text_at(inputs, "output[0]", tokenizer) == "Paris"
    last = resolve("last", inputs.layout, inputs.seq_len)[0][0]
    assert resolve("delimiter[-1]", inputs.layout, inputs.seq_len)[0][0] < last
    assert inputs.prompts == (prompt,)


def test_chat_of_a_processor_keeps_images_and_leaves_bos_to_the_tokenizer(tokenizer) -> None:
    processor = llava_processor(tokenizer, OF_PARTS)
    prompt = few_shot([(RED, "Paris")], GREEN)
    inputs = prepare([prompt, query("Spain")], tokenizer=tokenizer, processor=processor, chat=True)
    expected = processor(
        text=[f"USER: {prompt.text} ASSISTANT:", "USER: Q:Spain\nA: ASSISTANT:"],
        images=[RED, GREEN],
        return_tensors="pt",
        padding=True,
    )
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert inputs["input_ids"].eq(tokenizer.bos_token_id).sum(dim=1).tolist() == [1, 1]
    assert ids_at(inputs, "image[1]", 0) == [processor.image_token_id] * 4
    assert inputs.layout[0].n_images == 2


def test_chat_of_a_processor_whose_template_writes_bos(tokenizer) -> None:
    processor = llava_processor(tokenizer, "{{ bos_token }}" + OF_PARTS)
    inputs = one(query("Spain"), tokenizer, processor=processor, chat=True)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_chat_needs_a_template_that_writes_the_prompt_once(tokenizer) -> None:
    with pytest.raises(InputError, match="no chat template"):
        one("a", tokenizer, chat=True)
    for template, times in (("{{ 'USER' }}", 0), (OF_PARTS * 2, 2)):
        with pytest.raises(InputError, match=f"writes the prompt {times} times"):
            one("a", tokenizer, processor=llava_processor(tokenizer, template), chat=True)


# --- mistakes


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Q:<image>\nA:", "Prompt 1: .*1 image placeholder.*images are missing"),
        (("Q:<image>\nA:", [RED, RED]), "Prompt 1: .*more images than placeholders"),
        (("Q:", [RED]), "Prompt 1: .*more images than placeholders"),
        (("<image><image>", [RED]), "Prompt 1: .*2 image placeholder.*1 image"),
        (few_shot([(RED, "the <image>")]), "Prompt 1 has the image placeholder.*segment 'output'"),
        ("", "Prompt 1 is empty"),
        (Prompt(()), "Prompt 1 is empty"),
        (query(Path("no/such.png")), "Image 'no/such.png' does not exist"),
        (("Q:<image>", ["no/such.png"]), "Image 'no/such.png' does not exist"),
    ],
)
def test_bad_prompts(tokenizer, prompt, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(["Q:", prompt], tokenizer=tokenizer, processor=llava_processor(tokenizer))


def test_images_for_a_text_model(tokenizer) -> None:
    with pytest.raises(InputError, match="reads text only"):
        one(query(RED), tokenizer)
    with pytest.raises(InputError, match="images are missing"):
        one("Q:<image>\nA:", tokenizer)


def test_an_unreadable_image_is_named(tokenizer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.png' cannot be read"):
        one(query(broken), tokenizer, processor=llava_processor(tokenizer))


def test_too_long_prompts_are_refused_with_their_length(tokenizer) -> None:
    processor = llava_processor(tokenizer)
    prompts = ["Q:", query(RED)]
    length = prepare(prompts, tokenizer=tokenizer, processor=processor).seq_len
    assert prepare(prompts, tokenizer=tokenizer, processor=processor, max_length=length).seq_len == length
    with pytest.raises(InputError, match=rf"Prompt 1 has {length} tokens \(1 image.*at most {length - 1} fit"):
        prepare(prompts, tokenizer=tokenizer, processor=processor, max_length=length - 1)


@pytest.mark.parametrize("prompts", ["Q:", [], query("France")])
def test_a_list_of_prompts_is_needed(prompts) -> None:
    with pytest.raises((InputError, TypeError), match=r"list|Sequence"):
        prepare(prompts, tokenizer=byte_level_tokenizer())


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="not a fast tokenizer"):
        prepare(["a"], tokenizer=Slow())


def test_nothing_given_is_changed(tokenizer) -> None:
    processor = llava_processor(tokenizer)
    before = np.asarray(RED).copy()
    prompts = [query(RED), instruction("The capital:")]
    prepare(prompts, tokenizer=tokenizer, processor=processor)
    assert prompts == [query(RED), instruction("The capital:")]
    assert np.array_equal(np.asarray(RED), before)
    assert processor.tokenizer is tokenizer
