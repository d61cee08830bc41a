"""Token positions by meaning: names of segments, resolved to indexes of a left-padded batch."""

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import InputError, UnknownNameError, nearest

_POSITION = re.compile(r"(?P<name>[A-Za-z_]\w*)(?:\[(?P<index>-?\d+)\])?(?:\.(?P<end>\w+))?")
_ENDS = ("first", "last")

Indexes = SupportsIndex | Sequence[SupportsIndex]


@dataclass(frozen=True)
class Layout:
    """Where the pieces of one prompt lie in its row of a batch.

    Args:
        start: index of the row's first real (not padding) token.
        length: number of real tokens, special tokens included.
        spans: for each name, the token indexes of its segments in order; absolute in the padded row, empty
            where no token covers a segment.
        n_images: how many images the row has.
        named: whether the row came from a prompt, so that it can have names at all.
    """

    start: int
    length: int
    spans: Mapping[str, tuple[range, ...]] = field(default_factory=dict)
    n_images: int = 0
    named: bool = True

    def names(self) -> tuple[str, ...]:
        """Every position name of this row, ``"last"`` included."""
        counted = (f"{name}[{k}]" for name, spans in self.spans.items() for k in range(len(spans)))
        return (*counted, "last")


@dataclass(frozen=True)
class PerRow:
    """One position selector for each row of a batch.

    Args:
        at: the selectors, as many as rows.
    """

    at: tuple[Any, ...]


def layouts_from_mask(
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"],
) -> tuple[Layout, ...]:
    """Say where the real tokens are when all there is are a model's plain inputs.

    Args:
        attention_mask: 1 for real tokens, 0 for padding on the left.

    Returns:
        One layout per row, without any segment names.

    Raises:
        InputError: a row without real tokens, or padding that is not on the left.
    """
    layouts = []
    for row, mask in enumerate(attention_mask.bool().tolist()):
        length = sum(mask)
        if not length:
            raise InputError(f"Row {row} of attention_mask has no real token.")
        if not all(mask[-length:]):
            raise InputError(
                f"Row {row} of attention_mask is not padded on the left only. Use left padding "
                "(tokenizer.padding_side = 'left'), so that every row ends at the same index."
            )
        layouts.append(Layout(len(mask) - length, length, named=False))
    return tuple(layouts)


def names_image(at: Any) -> bool:
    """Whether a selector asks for the tokens of images by name."""
    if isinstance(at, str):
        return re.split(r"[\[.]", at)[0] == "image"
    if isinstance(at, PerRow):
        return names_image(at.at)
    return isinstance(at, list | tuple) and any(names_image(one) for one in at)


def plain(at: Any) -> Any:
    """A selector with the arrays, tensors and integers of other libraries in it turned into lists and integers.

    Raises:
        InputError: an array of something other than integers, or with more than one axis.
    """
    if isinstance(at, PerRow):
        return PerRow(tuple(plain(one) for one in at.at))
    if isinstance(at, list | tuple):
        return type(at)(plain(one) for one in at) if type(at) in (list, tuple) else [plain(one) for one in at]
    if isinstance(at, np.ndarray | np.generic | Tensor):
        array = at.detach().cpu().numpy() if isinstance(at, Tensor) else np.asarray(at)
        if array.dtype.kind not in "iu" or array.ndim > 1:
            raise InputError(
                f"an array of {array.dtype} with shape {array.shape} selects nothing: give integers along one axis "
                "(PerRow gives each row its own)"
            )
        return array.tolist()
    return at


def indexes(name: str, given: Any) -> tuple[int, ...] | None:
    """Rows or heads as plain integers.

    Args:
        name: what they are called in errors.
        given: an integer, several, or None for all.

    Raises:
        InputError: something that is no integer.
    """
    if given is None:
        return None
    given = plain(given)
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if any(isinstance(one, bool) or not hasattr(one, "__index__") for one in listed):
        raise InputError(f"{name}={given!r}: give an integer, several integers, or None for all")
    return tuple(operator.index(one) for one in listed)


def resolve(at: Any, layouts: Sequence[Layout], seq_len: int) -> list[list[int]]:
    """Turn positions by meaning into indexes, row by row.

    Args:
        at: ``"last"``; a name of a segment (``"delimiter[4]"``, ``"image[0]"``, ``"delimiter[-1]"``; without
            an index all segments of that name; an image's tokens include what its processor wraps around
            them; with ``.first`` or ``.last`` only that token of each); an
            integer (from the row's first real token, or from its end when negative); a slice of the row's
            real tokens; a list of these; or ``PerRow`` with one of these for each row.
        layouts: one per row.
        seq_len: padded length of the batch.

    Returns:
        For every row its absolute indexes in the padded sequence, in the order asked for.

    Raises:
        UnknownNameError: a row has no segment of that name.
        InputError: a position outside a row, a segment without a token of its own, an empty selection, or
            something that is no position.
    """
    if isinstance(at, PerRow):
        if len(at.at) != len(layouts):
            raise InputError(f"PerRow has {len(at.at)} selectors for {len(layouts)} rows.")
        selectors: Sequence[Any] = at.at
    else:
        selectors = [at] * len(layouts)
    rows = []
    for row, (selector, layout) in enumerate(zip(selectors, layouts, strict=True)):
        if layout.start + layout.length != seq_len:
            raise InputError(
                f"Row {row} ends at token {layout.start + layout.length}, but the batch has {seq_len}: its "
                "layout belongs to other inputs."
            )
        indexes = _row(selector, layout, row)
        if not indexes:
            raise InputError(f"{selector!r} selects no token in row {row}, which has {layout.length} tokens.")
        rows.append(indexes)
    return rows


def _row(at: Any, layout: Layout, row: int) -> list[int]:
    if isinstance(at, str):
        return _named(at, layout, row)
    if isinstance(at, slice):
        return [layout.start + index for index in range(layout.length)[at]]
    if isinstance(at, list | tuple | range):
        return [index for one in at for index in _row(one, layout, row)]
    if isinstance(at, bool) or not hasattr(at, "__index__"):
        raise InputError(
            f"{at!r} is no position. Use 'last', the name of a segment, an integer, a slice, or a list of these."
        )
    index = operator.index(at)
    if not -layout.length <= index < layout.length:
        raise InputError(
            f"Position {index} is outside row {row}, whose {layout.length} tokens are 0 to "
            f"{layout.length - 1} or -{layout.length} to -1."
        )
    return [layout.start + index % layout.length]


def _named(at: str, layout: Layout, row: int) -> list[int]:
    if at == "last":
        return [layout.start + layout.length - 1]
    match = _POSITION.fullmatch(at)
    if match is None:
        raise InputError(f"{at!r} is no position. Examples: 'last', 'delimiter[4]', 'image[0].first'.")
    name, index, end = match["name"], match["index"], match["end"]
    if end is not None and end not in _ENDS:
        raise InputError(f"{at!r} is no position: only '.first' or '.last' may follow a name, not '.{end}'.")
    if not layout.named:
        raise UnknownNameError(
            f"There is no position {at!r}: these inputs carry no names, only token ids. Make them with "
            "vlm.prepare(prompts) to use names, or give integers or 'last'."
        )
    spans = layout.spans.get(name, ())
    chosen = spans
    if index is not None:
        k = int(index)
        chosen = spans[k : k + 1 or None] if -len(spans) <= k < len(spans) else ()
    if not chosen:
        hint = nearest(at, layout.names())
        raise UnknownNameError(
            f"The prompt in row {row} has no position {at!r}. {hint + ' ' if hint else ''}"
            f"Its positions: {', '.join(layout.names())}."
        )
    for k, span in enumerate(chosen):
        if not span:
            which = at if index is not None else f"{name}[{k}]"
            raise InputError(f"In row {row} no token covers {which!r}: the tokenizer gives it no token.")
    if end is not None:
        chosen = tuple(span[:1] if end == "first" else span[-1:] for span in chosen)
    # Two segments can share a token that the tokenizer merged across their border.
    return list(dict.fromkeys(token for span in chosen for token in span))
