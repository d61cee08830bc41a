"""Which entries of an activation a tap or an edit means: rows, positions and heads, resolved against one
call.

Positions are resolved to absolute indexes of the padded prompt and then moved into the call at hand by the
length of its KV cache. So a patch of the prompt applies once, at prefill, whatever the prompt's length and
even when the prefill comes in chunks; decoded tokens lie beyond the prompt and are reached only by `when`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.positions import Layout, PerRow, indexes, plain, resolve
from interp.sites import Place

When = Literal["prefill", "every"] | int


@dataclass(frozen=True)
class Call:
    """One forward of the decoder, as its hooks see it.

    Args:
        past: tokens already in the KV cache.
        length: tokens of this call; 0 before any call.
        layouts: where the real tokens and named segments of each prompt are.
        ids: the call's token ids, where it has them.
        memo: selections that were resolved in this call, so that every layer shares one resolution.
    """

    past: int = 0
    length: int = 0
    layouts: tuple[Layout, ...] = ()
    ids: Tensor | None = field(default=None, compare=False, repr=False)
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def prompt_length(self) -> int:
        """Padded length of the prompt; tokens from here on are decoded ones."""
        return self.layouts[0].start + self.layouts[0].length


@dataclass(frozen=True, eq=False)
class Group:
    """Entries with the same number of positions in every row: a rectangle.

    Args:
        rows: rows of the tensor; all rows of one prompt (beams, samples, variants) lie side by side.
        positions: positions in it, per row.
        ordinals: which of the prompt's selected positions each one is; -1 for decoded tokens.
        n_positions: how many positions of the prompt the selection has, in this call or others.
        examples: which of the selected prompts each row belongs to, for values that differ by example.
        n_examples: how many prompts are selected.
        real: False where an entry is padding.
        whole: whether the group is the whole tensor, in order.
        complete: whether the call holds all selected positions of all prompts, or decoded tokens alone.
    """

    rows: Int[Tensor, " row"]
    positions: Int[Tensor, "row n"]
    ordinals: Int[Tensor, "row n"]
    n_positions: int
    examples: Int[Tensor, " row"]
    n_examples: int
    real: Bool[Tensor, "row n"]
    whole: bool = False
    complete: bool = True

    @property
    def index(self) -> tuple[Int[Tensor, "row 1"], Int[Tensor, "row n"]]:
        """The entries as an index of the tensor's first two axes."""
        return rearrange(self.rows, "row -> row 1"), self.positions

    def gather(self, x: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "row n ..."]:
        """The group's entries: a copy, or the tensor itself if they are all of it."""
        return x if self.whole else x[self.index]


@dataclass(frozen=True)
class Where:
    """What a user selected: positions by meaning, rows of the batch, heads, and steps of a generation.

    Args:
        at: positions; None: all.
        rows: prompts of the batch (images, in a vision tower); None: all.
        heads: heads, at sites that have them; None: all.
        when: for edits, which steps of a generation.
        variant: which of the copies of each prompt, in a sweep; None: all.
    """

    at: Any = None
    rows: Any = None
    heads: Any = None
    when: When = "prefill"
    variant: int | None = None

    def __post_init__(self) -> None:
        """Turn arrays and integers of other libraries into plain ones, so that selections print and compare."""
        object.__setattr__(self, "at", plain(self.at))
        object.__setattr__(self, "rows", indexes("rows", self.rows))
        object.__setattr__(self, "heads", indexes("heads", self.heads))

    def check(self, place: Place) -> None:
        """Refuse a selection that the site cannot have, before anything runs.

        Raises:
            InputError: names of positions in a vision tower, heads at a site without heads, an unknown step
                rule.
        """
        if not place.positional and _has_name(self.at):
            raise InputError(
                f"{self.at!r} is a position of the prompt, but the positions of {place.site} are those of an image: "
                "give integers, and choose images with rows="
            )
        if self.heads is not None:
            if place.n_heads is None:
                raise InputError(f"heads={self.heads}: site {place.site} has no head axis; its axes are {place.axes}")
            wrong = [head for head in self.heads if not -place.n_heads <= head < place.n_heads]
            if wrong or not self.heads:
                raise InputError(f"heads={self.heads}: site {place.site} has heads 0 to {place.n_heads - 1}")
        if self.when not in ("prefill", "every") and not (
            isinstance(self.when, int) and not isinstance(self.when, bool) and self.when >= 1
        ):
            raise InputError(f"when={self.when!r}: give 'prefill', 'every', or a number of steps from 1 on")
        if self.rows is not None and not self.rows:
            raise InputError("rows=(): no row of the batch is selected")

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What selections of the same entries have in common; positions may not hash, but they print."""
        return (repr(self.at), self.rows, self.when, self.variant)

    @property
    def everything(self) -> bool:
        """Whether rows and positions are left open."""
        return self.at is None and self.rows is None and self.variant is None


def _has_name(at: Any) -> bool:
    if isinstance(at, str):
        return True
    if isinstance(at, PerRow):
        return _has_name(at.at)
    return isinstance(at, list | tuple) and any(_has_name(one) for one in at)


def groups(
    where: Where, place: Place, x: Shaped[Tensor, "batch pos ..."], call: Call, *, tap: bool = False
) -> list[Group]:
    """Resolve a selection against one tensor, once per call for all sites alike.

    Args:
        where: the selection; its heads play no part here.
        place: the site.
        x: the tensor.
        call: the forward that is running.
        tap: whether a capture asks; captures of ``"last"`` follow the last token into decoding.

    Returns:
        Rectangles of entries, on the tensor's device; none when the call holds nothing of the selection.

    Raises:
        ShapeError: the batch does not divide into the prompts.
        InputError: a row that does not exist, or a position outside a row.
        UnknownNameError: a position that a prompt lacks.
    """
    key = (where.key, place.positional, tuple(x.shape[:2]), x.device, tap)
    if key not in call.memo:
        call.memo[key] = _resolve(where, place, x, call, tap)
    return call.memo[key]


def _resolve(where: Where, place: Place, x: Tensor, call: Call, tap: bool) -> list[Group]:
    batch, length = int(x.shape[0]), int(x.shape[1])
    if place.positional and call.length:
        layouts, prompt_length = call.layouts, call.prompt_length
        # A head that keeps only the last positions (logits_to_keep) sees the end of the call.
        offset = call.past + call.length - length
    else:
        layouts, prompt_length, offset = (
            tuple(Layout(0, length, named=False) for _ in range(batch)),
            length,
            0,
        )
    n_prompts = len(layouts)
    if batch % n_prompts:
        raise ShapeError(f"{place.site} has {batch} rows, which is no multiple of the {n_prompts} prompts given")
    chosen = list(range(n_prompts)) if where.rows is None else [_row(row, n_prompts, place) for row in where.rows]
    window = range(offset, offset + length)
    if where.everything and window.stop <= prompt_length:
        return [_everything(x, layouts, offset, prompt_length)]
    ordinals = _ordinals(where.at, layouts, prompt_length, chosen) if offset < prompt_length else None
    later = [index for index in window[max(0, prompt_length - offset) :] if _wanted(where, index - prompt_length, tap)]
    if tap and isinstance(where.at, str) and where.at == "last" and window[-1] >= prompt_length:
        # Without a KV cache the call holds the prompt again, whose last token is not the last one any more.
        ordinals, later = None, [window[-1]]
    if not tap:
        _refuse_duplicates(where, place, chosen, ordinals)

    copies = batch // n_prompts
    variants = range(copies) if where.variant is None else [where.variant]
    n_selected = 0 if ordinals is None else sum(len(ordinals[prompt]) for prompt in chosen)
    n_held = 0
    by_size: dict[tuple[int, int], list[_Entry]] = defaultdict(list)
    for example, prompt in enumerate(chosen):
        selected = [] if ordinals is None else ordinals[prompt]
        here = [(p - offset, k) for k, p in enumerate(selected) if p in window]
        n_held += len(here)
        here += [(p - offset, -1) for p in later]
        if here:
            entries = by_size[len(here), len(selected)]
            entries += [_Entry(prompt * copies + copy, prompt, example, here) for copy in variants]
    starts = [layout.start - offset for layout in layouts]
    found = [_group(e, n_positions, len(chosen), starts, x.device) for (_, n_positions), e in by_size.items()]
    return [replace(group, complete=n_held in (0, n_selected)) for group in found]


def _refuse_duplicates(where: Where, place: Place, chosen: list[int], ordinals: Sequence[Sequence[int]] | None) -> None:
    """An edit that writes an entry twice would keep one of two values, by chance."""
    if len(set(chosen)) < len(chosen):
        raise InputError(f"rows={where.rows} at {place.site}: a row is selected twice")
    if ordinals is None or where.at is None:
        return
    for prompt in chosen:
        if len(set(ordinals[prompt])) < len(ordinals[prompt]):
            raise InputError(f"at={where.at!r} at {place.site}: a position is selected twice in row {prompt}")


class _Entry(NamedTuple):
    row: int
    prompt: int
    example: int
    here: list[tuple[int, int]]  # position in the tensor, ordinal


def _group(entries: list[_Entry], n_positions: int, n_examples: int, starts: list[int], device: torch.device) -> Group:
    here = torch.tensor([entry.here for entry in entries])
    start = torch.tensor([[starts[entry.prompt]] for entry in entries])
    return Group(
        rows=torch.tensor([entry.row for entry in entries]).to(device),
        positions=here[..., 0].to(device),
        ordinals=here[..., 1].to(device),
        n_positions=n_positions,
        examples=torch.tensor([entry.example for entry in entries]).to(device),
        n_examples=n_examples,
        real=(here[..., 0] >= start).to(device),
    )


def _everything(x: Tensor, layouts: Sequence[Layout], offset: int, prompt_length: int) -> Group:
    batch, length = x.shape[:2]
    copies = batch // len(layouts)
    positions = torch.arange(length, device=x.device).expand(batch, length)
    start = torch.tensor([[layout.start] for layout in layouts for _ in range(copies)], device=x.device)
    return Group(
        rows=torch.arange(batch, device=x.device),
        positions=positions,
        ordinals=positions + offset,
        n_positions=prompt_length,
        examples=torch.arange(batch, device=x.device) // copies,
        n_examples=len(layouts),
        real=positions + offset >= start,
        whole=True,
        complete=length == prompt_length,
    )


def _ordinals(at: Any, layouts: Sequence[Layout], prompt_length: int, chosen: list[int]) -> Sequence[Sequence[int]]:
    """The selected positions of every row, in order; rows that are not chosen need not have them."""
    if at is None:
        return [range(prompt_length)] * len(layouts)
    if len(set(chosen)) < len(layouts) and (not isinstance(at, PerRow) or len(at.at) == len(layouts)):
        given = at.at if isinstance(at, PerRow) else [at] * len(layouts)
        at = PerRow(tuple(one if row in chosen else slice(None) for row, one in enumerate(given)))
    return resolve(at, layouts, prompt_length)


def _wanted(where: Where, step: int, tap: bool) -> bool:
    """Whether a decoded token (``step`` 0 is the first one that is fed back) belongs to the selection."""
    if tap:
        return where.at is None
    if where.when == "prefill":
        return False
    return where.when == "every" or step + 1 < int(where.when)


def _row(row: int, n_prompts: int, place: Place) -> int:
    if not -n_prompts <= row < n_prompts:
        raise InputError(f"rows: row {row} does not exist, {place.site} has {n_prompts} rows here")
    return row % n_prompts


def position_ids(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Positions of tokens under left padding: 0 at the first real token; padding gets 0 too.

    Args:
        mask: 1 for real tokens, 0 for padding.
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
