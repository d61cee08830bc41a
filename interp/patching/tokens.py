"""Groups of tokens by meaning, and the same group in two prompts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from interp.errors import InputError
from interp.inputs import Inputs
from interp.positions import Layout, PerRow, layouts_from_mask, resolve


@dataclass(frozen=True)
class TokenGroup:
    """Some tokens of every prompt of a batch, patched together.

    Args:
        name: what figures and tables call them.
        at: which tokens: ``"last"``, a segment's name (``"image[0]"``, ``"delimiter[-1].last"``), or several.
        token: keep only tokens with this id, such as those of an image without what its processor wraps around them.
        of: keep only these of the tokens, counted from 0.
    """

    name: str
    at: Any
    token: int | None = None
    of: tuple[int, ...] | None = None

    def positions(self, inputs: Mapping[str, Any], layouts: tuple[Layout, ...] | None = None) -> list[list[int]]:
        """For every row, where the group's tokens are in the padded batch.

        Args:
            inputs: prepared or plain model inputs.
            layouts: of the inputs, where they are known already.

        Raises:
            UnknownNameError: a segment that a row does not have.
            InputError: a group without a token in some row.
        """
        ids = inputs["input_ids"]
        found = resolve(self.at, layouts_of(inputs) if layouts is None else layouts, ids.shape[1])
        if self.token is not None:
            found = [[p for p in row if int(ids[i, p]) == self.token] for i, row in enumerate(found)]
        for row, tokens in enumerate(found):
            if not tokens or (self.of is not None and max(self.of) >= len(tokens)):
                raise InputError(f"group {self.name!r}: row {row} has only {len(tokens)} such tokens in {self.at!r}")
        return found if self.of is None else [[row[k] for k in self.of] for row in found]

    @property
    def named(self) -> bool:
        """Whether the tokens are named by meaning, so that they can be found in a prompt of another length."""
        return _named(self.at)


@dataclass(frozen=True)
class PatchGrid:
    """The tokens of one image as a grid, so that what is found can be drawn on the image.

    Args:
        groups: row by row of the image, from the top left.
        rows, columns: of the grid.
        image: which image of the prompt.
    """

    groups: tuple[TokenGroup, ...]
    rows: int
    columns: int
    image: int = 0


@dataclass(frozen=True, eq=False)
class Aligned:
    """One group in the two runs of an experiment: the same number of tokens in each row.

    Args:
        group: the group.
        source: for every row, the tokens that values come from.
        base: for every row, the tokens that they are put at.
    """

    group: TokenGroup
    source: list[list[int]]
    base: list[list[int]]

    def rectangles(self) -> list[list[int]]:
        """Rows with equally many tokens, together."""
        by_size: dict[int, list[int]] = {}
        for row, tokens in enumerate(self.base):
            by_size.setdefault(len(tokens), []).append(row)
        return list(by_size.values())


def layouts_of(inputs: Mapping[str, Any]) -> tuple[Layout, ...]:
    """Where the tokens of each row are.

    Raises:
        InputError: what is no inputs, or has no token ids.
    """
    if isinstance(inputs, Inputs):
        return inputs.layout
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), torch.Tensor):
        what = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise InputError(f"inputs need input_ids, a tensor; they are {what}: vlm.prepare makes them of prompts")
    mask = inputs.get("attention_mask")
    return layouts_from_mask(torch.ones_like(inputs["input_ids"]) if mask is None else mask)


def followed(inputs: Mapping[str, Any], *answers: Iterable[Any]) -> Mapping[str, Any] | None:
    """The inputs that answers as text follow; None where all are token ids, which need no prompt."""
    return inputs if any(isinstance(answer, str) for several in answers for answer in several) else None


def every_token(inputs: Mapping[str, Any]) -> tuple[TokenGroup, ...]:
    """Each token by itself, named by its segment where the rows agree on the segments.

    Args:
        inputs: prepared or plain model inputs, all rows equally long.

    Raises:
        InputError: rows of different lengths.
    """
    layouts = layouts_of(inputs)
    lengths = sorted({layout.length for layout in layouts})
    if len(lengths) > 1:
        raise InputError(
            f"the rows have {lengths[0]} to {lengths[-1]} tokens, so that one position means different things in "
            "them: name segments, such as positions=['image[0]', 'delimiter[-1]', 'last']"
        )
    names = [str(index) for index in range(lengths[0])]
    relative = [_relative_spans(layout) for layout in layouts]
    if all(spans == relative[0] for spans in relative):
        for name, span in reversed(relative[0].items()):
            for k, index in enumerate(span):
                names[index] = name if len(span) == 1 else f"{name}.{k}"
    return tuple(TokenGroup(name, index) for index, name in enumerate(names))


def segments(inputs: Inputs) -> tuple[TokenGroup, ...]:
    """Each named segment of the prompts, in order; all rows must have the same ones.

    Args:
        inputs: prepared inputs.

    Raises:
        InputError: rows without names, or with different segments.
    """
    found = [[name for name, span in _relative_spans(layout).items() if len(span)] for layout in layouts_of(inputs)]
    if not found[0] or any(names != found[0] for names in found):
        raise InputError("the prompts have no named segments in common: name the groups, such as positions=['last']")
    return tuple(TokenGroup(name, name) for name in found[0])


def image_patches(
    vlm: Any, inputs: Mapping[str, Any], image: int = 0, *, block: int = 1, grid: tuple[int, int] | None = None
) -> PatchGrid:
    """The tokens of one image as squares of its patch grid.

    Args:
        vlm: the model.
        inputs: prepared inputs in which every row has that image.
        image: which image of each prompt.
        block: how many patches are patched together, along each side.
        grid: rows and columns of the image's tokens; without it they must form a square, as those of plain LLaVA do.

    Raises:
        InputError: a model without images, tokens that form no such grid, or blocks that do not divide it.
        UnknownNameError: a row without that image.
    """
    token = getattr(vlm.model.config, "image_token_id", None)
    if token is None:
        raise InputError(f"{vlm.name} has no image tokens")
    whole = TokenGroup(f"image[{image}]", f"image[{image}]", token)
    counts = {len(row) for row in whole.positions(inputs)}
    side = round(max(counts) ** 0.5)
    rows, columns = grid or (side, side)
    if counts != {rows * columns}:
        raise InputError(
            f"image[{image}] has {sorted(counts)} tokens, which are no grid of {rows} × {columns}; tiled images and "
            "resamplers have no single grid, and grid=(rows, columns) tells of another"
        )
    if block < 1 or rows % block or columns % block:
        raise InputError(f"block={block} does not divide a grid of {rows} × {columns} patches")
    groups = []
    for top, left in product(range(0, rows, block), range(0, columns, block)):
        cells = tuple((top + y) * columns + left + x for y, x in product(range(block), range(block)))
        name = f"image[{image}] {top // block},{left // block}"
        groups.append(TokenGroup(name, whole.at, token, cells))
    return PatchGrid(tuple(groups), rows // block, columns // block, image)


def as_groups(positions: Any, inputs: Mapping[str, Any]) -> tuple[TokenGroup, ...]:
    """Groups of tokens, however they are given.

    Args:
        positions: None (every token by itself), a `PatchGrid`, a group or position, a list of these, or a mapping
            from names to positions.
        inputs: the inputs that None means the tokens of.

    Raises:
        InputError: no positions, or two groups of one name.
    """
    if positions is None:
        return every_token(inputs)
    if isinstance(positions, PatchGrid):
        return positions.groups
    if isinstance(positions, Mapping):
        groups = [TokenGroup(str(name), at) for name, at in positions.items()]
    else:
        several = isinstance(positions, Sequence) and not isinstance(positions, str)
        groups = [one if isinstance(one, TokenGroup) else TokenGroup(str(one), one)
                  for one in (positions if several else [positions])]  # fmt: skip
    names = [group.name for group in groups]
    if not names or len(set(names)) < len(names):
        raise InputError(f"positions={names}: give at least one group of tokens, each once")
    return tuple(groups)


def align(groups: Sequence[TokenGroup], source: Mapping[str, Any], base: Mapping[str, Any]) -> list[Aligned]:
    """Find each group in the prompts that values come from and in those that they are put into.

    Args:
        groups: the groups.
        source, base: prepared or plain model inputs, the same number of rows.

    Raises:
        InputError: different numbers of rows; prompts of different lengths and groups that are not named by meaning;
            or a group with different numbers of tokens in the two.
        UnknownNameError: a segment that a row does not have.
    """
    layouts = [layouts_of(inputs) for inputs in (source, base)]
    lengths = [[layout.length for layout in rows] for rows in layouts]
    if len(lengths[0]) != len(lengths[1]):
        raise InputError(f"there are {len(lengths[0])} and {len(lengths[1])} prompts: clean and corrupt come in pairs")
    unnamed = [group.name for group in groups if not group.named]
    if unnamed and lengths[0] != lengths[1]:
        row = next(i for i, (a, b) in enumerate(zip(*lengths, strict=True)) if a != b)
        raise InputError(
            f"the prompts of row {row} have {lengths[0][row]} and {lengths[1][row]} tokens, so that position "
            f"{unnamed[0]!r} means different tokens in them: align them by named segments, such as "
            "positions=['image[0]', 'delimiter[-1]', 'last']"
        )
    found = []
    for group in groups:
        there, here = group.positions(source, layouts[0]), group.positions(base, layouts[1])
        for row, (a, b) in enumerate(zip(there, here, strict=True)):
            if len(a) != len(b):
                raise InputError(
                    f"group {group.name!r} has {len(a)} and {len(b)} tokens in the prompts of row {row}: give "
                    f"'{group.at}.first' or '{group.at}.last', or groups that are equally long"
                )
        found.append(Aligned(group, there, here))
    return found


def per_row(tokens: Sequence[Sequence[int]], layouts: Sequence[Layout]) -> PerRow:
    """Places in the padded batch as a selector of each row's own tokens."""
    pairs = zip(tokens, layouts, strict=True)
    return PerRow(tuple([index - layout.start for index in row] for row, layout in pairs))


def _relative_spans(layout: Layout) -> dict[str, range]:
    """Every segment once, under its first name, in order of its place in the prompt."""
    spans: dict[tuple[int, int], str] = {}
    for name, ranges in layout.spans.items():
        for k, span in enumerate(ranges):
            spans.setdefault((span.start - layout.start, span.stop - layout.start), f"{name}[{k}]")
    return {name: range(*span) for span, name in sorted(spans.items())}


def _named(at: Any) -> bool:
    if isinstance(at, str):
        return True
    if isinstance(at, PerRow):
        return _named(at.at)
    return isinstance(at, list | tuple) and all(_named(one) for one in at)
