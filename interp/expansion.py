"""Image placeholders in a text, replaced by what a processor writes for them."""

import copy
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from interp.errors import InputError

# What a processor returns about the text; everything else belongs to the images.
_OF_THE_TEXT = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "offset_mapping",
    "text_replacement_offsets",
    "special_tokens_mask",
}


@dataclass(frozen=True)
class Expanded:
    """Texts with their images written out.

    Args:
        texts: for each row the text of each segment; an image's holds its tokens and what wraps them.
        tensors: the model inputs that the images gave (``pixel_values``, ...), all images in row-major order.
        token_types: gives the modality of each token id of a row, for the models that ask for it.
    """

    texts: list[list[str]]
    tensors: dict[str, Any] = field(default_factory=dict)
    token_types: Callable[[list[int]], list[int]] | None = None


def expand_images(
    rows: Sequence[Sequence[str | None]],
    images: Sequence[Sequence[Image.Image]],
    processor: Any,
    image_token: str,
) -> Expanded:
    """Write out the image tokens of each row, and process its images.

    Args:
        rows: for each row the texts of its segments, None where an image is.
        images: for each row its images, in the order of the segments.
        processor: the processor; unused when there are no images.
        image_token: the processor's placeholder for one image.

    Returns:
        The texts and the image tensors.

    Raises:
        InputError: the processor changes the text around an image in a way that cannot be followed.
    """
    with_images = [row for row, found in enumerate(images) if found]
    if not with_images:
        return Expanded([[text or "" for text in row] for row in rows])
    # Rows without images stay out of the call: some processors refuse them beside rows with images.
    prompts = ["".join(image_token if text is None else text for text in rows[row]) for row in with_images]
    flat = [image for row in with_images for image in images[row]]
    write = _by_replacements if _reports_replacements(processor) else _by_alignment
    processed, written = write([rows[row] for row in with_images], prompts, flat, processor, image_token)
    texts = [[text or "" for text in row] for row in rows]
    for row, found in zip(with_images, written, strict=True):
        left = iter(found)
        texts[row] = [next(left) if text is None else text for text in rows[row]]
    return Expanded(
        texts,
        {name: value for name, value in processed.items() if name not in _OF_THE_TEXT},
        (lambda ids: processor.create_mm_token_type_ids([ids])[0]) if "mm_token_type_ids" in processed else None,
    )


def _reports_replacements(processor: Any) -> bool:
    base = getattr(ProcessorMixin, "replace_image_token", None)
    return base is not None and type(processor).replace_image_token is not base


def _by_replacements(
    rows: Sequence[Sequence[str | None]],
    prompts: list[str],
    images: list[Image.Image],
    processor: Any,
    _: str,
) -> tuple[Any, list[list[str]]]:
    processed = processor(
        text=prompts,
        images=images,
        images_kwargs={"return_tensors": "pt"},
        return_text_replacement_offsets=True,
    )
    offsets = processed["text_replacement_offsets"]
    return processed, [[one["replacement"] for one in row if one["type"] == "image"] for row in offsets]


def _by_alignment(
    rows: Sequence[Sequence[str | None]],
    prompts: list[str],
    images: list[Image.Image],
    processor: Any,
    image_token: str,
) -> tuple[Any, list[list[str]]]:
    """For processors that rewrite the text in their own call: watch what they hand to their tokenizer."""
    recorder = _Recorder(processor.tokenizer)
    twin = copy.copy(processor)
    twin.tokenizer = recorder
    processed = twin(text=prompts, images=images, images_kwargs={"return_tensors": "pt"})
    if len(recorder.texts) != len(prompts):
        raise InputError(
            f"{type(processor).__name__} does not pass each prompt's text to its tokenizer once, so the "
            "tokens of its images cannot be found."
        )
    markers = [token for token in processor.tokenizer.get_added_vocab() if token != image_token]
    written = [
        _align(row, whole, image_token, markers, type(processor).__name__)
        for row, whole in zip(rows, recorder.texts, strict=True)
    ]
    return processed, written


def _align(
    row: Sequence[str | None], whole: str, image_token: str, markers: list[str], processor_name: str
) -> list[str]:
    """Each image's share of a rewritten text: its tokens, the markers around them, a space put behind."""
    marker = "|".join(re.escape(text) for text in sorted(markers, key=len, reverse=True)) or "(?!)"
    image = re.escape(image_token)
    blocks = [list(group) for _, group in itertools.groupby(row, key=lambda text: text is None)]
    pattern = "".join(
        rf"((?:{marker})*(?:{image}(?:{marker})*)+ ?)" if block[0] is None else re.escape("".join(block))  # type: ignore[arg-type]
        for block in blocks
    )
    match = re.fullmatch(pattern, whole)
    if match is None:
        raise InputError(
            f"{processor_name} rewrites the text around images in a way that cannot be followed: {whole!r}"
        )
    shares = []
    for count, block in zip([len(b) for b in blocks if b[0] is None], match.groups(), strict=True):
        ends = [found.end() for found in re.finditer(image, block)]
        per_image, rest = divmod(len(ends), count)
        if rest:
            raise InputError(f"{processor_name} writes adjacent images of unequal length, which cannot be told apart.")
        cuts = [0, *(ends[per_image * k - 1] for k in range(1, count)), len(block)]
        shares += [block[first:last] for first, last in itertools.pairwise(cuts)]
    return shares


class _Recorder:
    """A tokenizer that remembers the texts it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self.texts += [text] if isinstance(text, str) else list(text)
        return self._tokenizer(text, *args, **kwargs)
