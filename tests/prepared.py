"""Pictures to prepare, and prepared inputs read back by the name of a position."""

from typing import Any

from PIL import Image

from interp.inputs import Inputs, prepare, resolve

RED = Image.new("RGB", (20, 16), "red")
GREEN = Image.new("RGB", (16, 24), "green")
BLUE = Image.new("RGB", (40, 40), "blue")


def ids_at(inputs: Inputs, at: Any, row: int = 0) -> list[int]:
    (indexes,) = resolve(at, inputs.layout[row : row + 1], inputs.seq_len)
    return inputs["input_ids"][row, indexes].tolist()


def text_at(inputs: Inputs, at: Any, tokenizer: Any, row: int = 0) -> str:
    return tokenizer.decode(ids_at(inputs, at, row)).strip()


def one(prompt: Any, tokenizer: Any, **kwargs: Any) -> Inputs:
    return prepare([prompt], tokenizer=tokenizer, **kwargs)
