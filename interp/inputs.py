"""From prompts to model inputs: image placeholders expanded, left-padded, every segment's tokens known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from interp.errors import InputError
from interp.expansion import expand_images
from interp.images import ImageLike, load_image
from interp.positions import Layout, PerRow, layouts_from_mask, resolve
from interp.prompts import IMAGE_PLACEHOLDER, Prompt, Segment, shorten

__all__ = ["Inputs", "Layout", "PerRow", "PromptLike", "layouts_from_mask", "prepare", "resolve"]

PromptLike = str | Prompt | tuple[str, Sequence[ImageLike]]

# Stands in for the prompt while a chat template is rendered; no template trims or rewrites it.
_CHAT_SLOT = "PROMPTGOESHERE"
_SPACE_MARKS = ("▁", "Ġ")


class Inputs(dict):
    """Model inputs (``input_ids``, ``attention_mask``, ``pixel_values`` when there are images), left-padded.

    Args:
        data: the tensors by name.
        layout: for each row, which tokens each segment has.
        prompts: the prompts that the rows were made from.
    """

    layout: tuple[Layout, ...]
    prompts: tuple[Prompt, ...]

    def __init__(self, data: dict[str, Any], layout: Sequence[Layout], prompts: Sequence[Prompt]) -> None:
        super().__init__(data)
        self.layout = tuple(layout)
        self.prompts = tuple(prompts)

    @property
    def seq_len(self) -> int:
        """Padded length."""
        return self["input_ids"].shape[1]

    def to(self, device: torch.device | str) -> "Inputs":
        """A copy with the tensors on another device."""
        return Inputs({name: _move(value, device) for name, value in self.items()}, self.layout, self.prompts)


def prepare(
    prompts: Sequence[PromptLike],
    *,
    tokenizer: Any,
    processor: Any = None,
    image_token: str = IMAGE_PLACEHOLDER,
    max_length: int | None = None,
    chat: bool = False,
    device: torch.device | str | None = None,
) -> Inputs:
    """Make left-padded model inputs of prompts with any number of images each.

    The token ids are those that the processor (or, without one, the tokenizer) gives for each prompt's text;
    no special tokens are added beyond theirs. Images stay where the prompt puts them.

    Args:
        prompts: a text, a ``Prompt``, or a pair (text with placeholders, list of images) for each row.
        tokenizer: a fast tokenizer of transformers.
        processor: the processor of a model that reads images.
        image_token: the placeholder for an image in texts.
        max_length: the most tokens a row may have. None: no limit.
        chat: wrap each prompt as one user turn of the chat template, with the header of the answer behind
            it. The wrapping is found as "chat_prefix" and "chat_suffix"; "last" is then the last token of
            the header, and the prompt's own names keep their meaning.
        device: where the tensors go.

    Returns:
        The inputs. ``pixel_values`` (and what else the image processor makes) hold all images in row-major
        order, and are missing when no prompt has an image.

    Raises:
        InputError: no prompts, an empty prompt, a prompt longer than ``max_length``, placeholders and
            images that do not match, a missing or unreadable image, images for a model without a processor,
            a slow tokenizer, or no chat template.
    """
    if isinstance(prompts, str | Prompt) or not prompts:
        raise InputError("Give a list with at least one prompt.")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: positions are found through its offsets. "
            "Load it with use_fast=True."
        )
    read = [_as_prompt(prompt, row, image_token) for row, prompt in enumerate(prompts)]
    own_token = getattr(processor, "image_token", None) or image_token
    for row, prompt in enumerate(read):
        _check(prompt, row, {image_token, own_token}, processor)
    wrapped = [_in_chat(prompt, tokenizer, processor, own_token) for prompt in read] if chat else read
    images = [[load_image(image) for image in prompt.images] for prompt in wrapped]
    expanded = expand_images(
        [[segment.text for segment in prompt.segments] for prompt in wrapped], images, processor, own_token
    )
    rows = [
        _tokenise(prompt, texts, tokenizer, _adds_special_tokens(chat, texts, tokenizer, processor))
        for prompt, texts in zip(wrapped, expanded.texts, strict=True)
    ]
    for index, (one, prompt) in enumerate(zip(rows, read, strict=True)):
        if max_length is not None and len(one.ids) > max_length:
            raise InputError(
                f"Prompt {index} has {len(one.ids)} tokens ({len(prompt.images)} image(s) included), but at "
                f"most {max_length} fit. It begins {shorten(prompt.text)!r}."
            )
    data, layouts = _pad(rows, wrapped, tokenizer)
    if expanded.token_types is not None:
        data["mm_token_type_ids"] = _pad_left(
            [expanded.token_types(one.ids) for one in rows], data["input_ids"].shape[1], 0
        )
    inputs = Inputs({**data, **expanded.tensors}, layouts, read)
    return inputs if device is None else inputs.to(device)


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    spans: dict[str, tuple[range, ...]]  # counted from the row's first real token


def _as_prompt(prompt: PromptLike, row: int, image_token: str) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    text, images = (prompt, ()) if isinstance(prompt, str) else _pair(prompt, row)
    try:
        return Prompt.from_text(text, images, image_token=image_token)
    except InputError as error:
        raise InputError(f"Prompt {row}: {error}") from error


def _pair(prompt: Any, row: int) -> tuple[str, Sequence[ImageLike]]:
    match prompt:
        case (str() as text, list() | tuple() as images):
            return text, images
    raise InputError(
        f"Prompt {row} must be a text, a Prompt, or a pair (text with placeholders, list of images), "
        f"not {type(prompt).__name__}."
    )


def _check(prompt: Prompt, row: int, placeholders: set[str], processor: Any) -> None:
    if not prompt.text:
        raise InputError(f"Prompt {row} is empty.")
    for segment in prompt.segments:
        for placeholder in sorted(placeholders):
            if segment.text is not None and placeholder in segment.text:
                raise InputError(
                    f"Prompt {row} has the image placeholder {placeholder!r} in the text of segment "
                    f"{segment.name!r}, which no image fills. Give images as segments, or the prompt as "
                    "(text, [images])."
                )
    if prompt.images and processor is None:
        raise InputError(
            f"Prompt {row} has {len(prompt.images)} image(s), but this model reads text only: it has no processor."
        )


def _in_chat(prompt: Prompt, tokenizer: Any, processor: Any, image_token: str) -> Prompt:
    by_processor = bool(getattr(processor, "chat_template", None))
    if not by_processor and not getattr(tokenizer, "chat_template", None):
        raise InputError("There is no chat template, neither in the processor nor in the tokenizer.")
    # Processors' templates walk over a list of typed parts, tokenizers' take the text itself.
    content: Any = [{"type": "text", "text": _CHAT_SLOT}] if by_processor else _CHAT_SLOT
    rendered = (processor if by_processor else tokenizer).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pieces = rendered.split(_CHAT_SLOT)
    if len(pieces) != 2:
        raise InputError(f"The chat template writes the prompt {len(pieces) - 1} times, not once: {rendered!r}")
    if image_token in rendered:
        raise InputError(f"The chat template adds an image of its own: {rendered!r}")
    before, after = (
        (Segment(name, text=piece),) if piece else ()
        for name, piece in zip(("chat_prefix", "chat_suffix"), pieces, strict=True)
    )
    return Prompt((*before, *prompt.segments, *after))


def _adds_special_tokens(chat: bool, texts: list[str], tokenizer: Any, processor: Any) -> bool:
    if not chat:
        return True
    # As apply_chat_template(tokenize=True) does: a tokenizer's template writes all special tokens itself, a
    # processor's may leave BOS to the tokenizer.
    if not getattr(processor, "chat_template", None):
        return False
    bos = getattr(tokenizer, "bos_token", None)
    return bos is None or not "".join(texts).startswith(bos)


def _tokenise(prompt: Prompt, texts: list[str], tokenizer: Any, add_special_tokens: bool) -> _Row:
    text = "".join(texts)
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_token_type_ids=False,
        verbose=False,
    )
    full = [
        _without_added_mark(token, text, *offset)
        for token, offset in zip(
            tokenizer.convert_ids_to_tokens(encoded["input_ids"]), encoded["offset_mapping"], strict=True
        )
    ]
    # Tokenizers write a space as a mark on the word behind it: such a token belongs to the word.
    words = np.array([(end - len(text[start:end].lstrip()), end) for start, end in full])
    everything = np.array(full)
    spans: dict[str, list[range]] = {}
    start = 0
    for segment, piece in zip(prompt.segments, texts, strict=True):
        end = start + len(piece)
        # A segment of white space alone has, if any, the token that the space is a mark on.
        span = _overlap(words, start, end) or _overlap(everything, start, end)
        for label in segment.labels:
            spans.setdefault(label, []).append(span)
        start = end
    return _Row(encoded["input_ids"], {label: tuple(found) for label, found in spans.items()})


def _without_added_mark(token: str, text: str, start: int, end: int) -> tuple[int, int]:
    # SentencePiece-style tokenizers put a space before the text and after each special token. Where that
    # space is a token of its own, its offsets claim the character behind it.
    covered = text[start:end]
    added = token in _SPACE_MARKS and covered not in _SPACE_MARKS and bool(covered.strip())
    return (start, start) if added else (start, end)


def _overlap(offsets: Int[np.ndarray, "token 2"], start: int, end: int) -> range:
    touching = np.flatnonzero(np.maximum(offsets[:, 0], start) < np.minimum(offsets[:, 1], end))
    return range(int(touching[0]), int(touching[-1]) + 1) if len(touching) else range(0)


def _pad(
    rows: Sequence[_Row], prompts: Sequence[Prompt], tokenizer: Any
) -> tuple[dict[str, torch.Tensor], list[Layout]]:
    seq_len = max(len(row.ids) for row in rows)
    # Base language models often have no padding token; which id it is does not matter under the mask.
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    layouts = []
    for row, prompt in zip(rows, prompts, strict=True):
        shift = seq_len - len(row.ids)
        spans = {
            label: tuple(range(s.start + shift, s.stop + shift) if s else s for s in found)
            for label, found in row.spans.items()
        }
        layouts.append(Layout(shift, len(row.ids), spans, len(prompt.images)))
    data = {
        "input_ids": _pad_left([row.ids for row in rows], seq_len, pad_id),
        "attention_mask": _pad_left([[1] * len(row.ids) for row in rows], seq_len, 0),
    }
    return data, layouts


def _pad_left(rows: Sequence[Sequence[int]], seq_len: int, value: int) -> torch.Tensor:
    return torch.tensor([[value] * (seq_len - len(row)) + list(row) for row in rows], dtype=torch.long)


def _move(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
