"""Which entries of an activation a tap or an edit means: rows, positions and heads, steps and halves of a
denoising run, resolved against one call.

Positions are resolved to absolute indexes of the padded prompt and then moved into the call at hand by the
length of its KV cache. So a patch of the prompt applies once, at prefill, whatever the prompt's length and
even when the prefill comes in chunks; decoded tokens lie beyond the prompt and are reached only by `when`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.positions import Layout, PerRow, indexes, resolve
from interp.regions import Region
from interp.sites import Place
from interp.where import HALVES, Where


@dataclass(frozen=True)
class Call:
    """One forward of the decoder or the denoiser, as its hooks see it.

    Args:
        past: tokens already in the KV cache.
        length: tokens of this call; 0 before any call.
        layouts: where the real tokens and named segments of each prompt are.
        ids: the call's token ids, where it has them.
        memo: selections that were resolved in this call, so that every layer shares one resolution.
        step: which call of a denoising run this is, the first being 0; None outside the denoiser.
        time: the model timestep, as the denoiser was given it.
        halves: the halves of classifier-free guidance that the rows belong to, in order; empty where unknown.
        grid: height and width of the denoiser's cells (latent pixels, or patches of a transformer).
    """

    past: int = 0
    length: int = 0
    layouts: tuple[Layout, ...] = ()
    ids: Tensor | None = field(default=None, compare=False, repr=False)
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    step: int | None = None
    time: Any = field(default=None, compare=False, repr=False)
    halves: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None

    @cached_property
    def timestep(self) -> float | None:
        """The model timestep of a denoiser's call."""
        # Read only when asked for: on an accelerator it makes the processor wait.
        first = self.time.flatten()[0] if isinstance(self.time, Tensor) else self.time
        return None if first is None else float(first)

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
        grid: height and width, where the positions are all cells of a feature map.
        halves: which half of guidance each row belongs to; None where rows have none.
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
    grid: tuple[int, int] | None = None
    halves: Int[Tensor, " row"] | None = None

    @property
    def index(self) -> tuple[Int[Tensor, "row 1"], Int[Tensor, "row n"]]:
        """The entries as an index of the tensor's first two axes."""
        return rearrange(self.rows, "row -> row 1"), self.positions

    def gather(self, x: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "row n ..."]:
        """The group's entries: a copy, or the tensor itself if they are all of it."""
        return x if self.whole else x[self.index]


def groups(
    where: Where,
    place: Place,
    x: Shaped[Tensor, "batch pos ..."],
    call: Call,
    *,
    tap: bool = False,
    grid: tuple[int, int] | None = None,
) -> list[Group]:
    """Resolve a selection against one tensor, once per call for all sites alike.

    Args:
        where: the selection; its heads play no part here.
        place: the site.
        x: the tensor.
        call: the forward that is running.
        tap: whether a capture asks; captures of ``"last"`` follow the last token into decoding.
        grid: height and width, where the positions are the cells of a feature map.

    Returns:
        Rectangles of entries, on the tensor's device; none when the call holds nothing of the selection.

    Raises:
        ShapeError: the batch does not divide into the prompts or halves.
        InputError: a row that does not exist, a position outside a row, an empty region, or a half where the run
            does not say which it is.
        UnknownNameError: a position that a prompt lacks.
    """
    if where.steps is not None and not where.at_step(call.step):
        return []
    key = (where.key, place.positional, place.part, place.image_tokens, grid, tuple(x.shape[:2]), x.device, tap)
    if key not in call.memo:
        call.memo[key] = _resolve(where, place, x, call, tap, grid)
    return call.memo[key]


def _resolve(where: Where, place: Place, x: Tensor, call: Call, tap: bool, grid: tuple[int, int] | None) -> list[Group]:
    batch, length = int(x.shape[0]), int(x.shape[1])
    if place.positional and call.length:
        layouts, prompt_length = call.layouts, call.prompt_length
        # A head that keeps only the last positions (logits_to_keep) sees the end of the call.
        offset = call.past + call.length - length
    else:
        layouts, prompt_length, offset = (
            tuple(Layout(0, length, named=False) for _ in range(batch // _n_halves(place, call, batch))),
            length,
            0,
        )
    n_prompts = len(layouts)
    if batch % n_prompts:
        raise ShapeError(f"{place.site} has {batch} rows, which is no multiple of the {n_prompts} prompts given")
    halves = _halves(where, place, call)
    if halves == []:
        return []
    at = where.at
    if isinstance(at, Region):
        at = _cells(at, place, length, call, grid)
    chosen = list(range(n_prompts)) if where.rows is None else [_row(row, n_prompts, place) for row in where.rows]
    window = range(offset, offset + length)
    open_rows = where.at is where.rows is where.variant is None
    if open_rows and window.stop <= prompt_length and (halves is None or len(halves) == len(call.halves)):
        everything = _everything(x, layouts, offset, prompt_length)
        if halves is not None:
            # The rows of one half lie together, so that those of one example do not.
            each = torch.arange(batch, device=x.device)
            everything = replace(everything, examples=each % n_prompts, halves=each // n_prompts)
        return [replace(everything, grid=grid)]
    ordinals = _ordinals(at, layouts, prompt_length, chosen) if offset < prompt_length else None
    later = [index for index in window[max(0, prompt_length - offset) :] if _wanted(where, index - prompt_length, tap)]
    if tap and isinstance(where.at, str) and where.at == "last" and window[-1] >= prompt_length:
        # Without a KV cache the call holds the prompt again, whose last token is not the last one any more.
        ordinals, later = None, [window[-1]]
    if not tap:
        _refuse_duplicates(where, place, chosen, ordinals)

    copies = batch // n_prompts
    variants = range(copies) if where.variant is None else [where.variant]

    def rows_of(prompt: int) -> list[int]:
        if halves is None:
            return [prompt * copies + copy for copy in variants]
        return [half * n_prompts + prompt for half in halves]

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
            entries += [_Entry(row, prompt, example, here) for row in rows_of(prompt)]
    starts = [layout.start - offset for layout in layouts]
    found = [_group(e, n_positions, len(chosen), starts, x.device) for (_, n_positions), e in by_size.items()]
    complete = n_held in (0, n_selected)
    return [
        replace(group, complete=complete, grid=grid, halves=None if halves is None else group.rows // n_prompts)
        for group in found
    ]


def _n_halves(place: Place, call: Call, batch: int) -> int:
    """How many guidance halves the rows of a tensor hold, one after the other."""
    n_halves = max(1, len(call.halves)) if place.part in ("denoiser", "text_encoder") else 1
    if batch % n_halves:
        raise ShapeError(f"{place.site} has {batch} rows, which do not divide into the halves {call.halves}")
    return n_halves


def _halves(where: Where, place: Place, call: Call) -> list[int] | None:
    """Which halves of the rows are selected; None where rows have no halves."""
    if place.part not in ("denoiser", "text_encoder"):
        return None
    if where.half is None:
        return list(range(len(call.halves))) if call.halves else None
    if not call.halves:
        raise InputError(
            f"half={where.half!r} at {place.site}: nothing says which half of guidance this call is for. A text "
            "encoder's calls say so in sd.prompt and sd.generate, the denoiser's when all of it runs"
        )
    return [index for index, half in enumerate(call.halves) if half == where.half]


def _cells(region: Region, place: Place, length: int, call: Call, grid: tuple[int, int] | None) -> list[int]:
    """The positions of a region, row by row of the image."""
    if grid is not None:
        return region.cells(*grid)
    if call.grid is None or place.image_tokens is None:
        raise InputError(
            f"{region!r} at {place.site}: it is not known how the {length} positions lie in the image. Regions need a "
            "feature map, or the tokens of a whole denoiser's call"
        )
    height, width = call.grid
    if place.image_tokens == "all":
        # Every level of a UNet has half the rows and columns of the one before, rounded up.
        while height * width > length:
            height, width = (height + 1) // 2, (width + 1) // 2
    n_cells = height * width
    if n_cells > length or (place.image_tokens == "all" and n_cells != length):
        raise InputError(f"{region!r} at {place.site}: {length} positions are no grid of an image of {call.grid} cells")
    offset = length - n_cells if place.image_tokens == "last" else 0
    return [offset + cell for cell in region.cells(height, width)]


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


__all__ = ["HALVES", "Call", "Group", "Where", "groups", "indexes", "position_ids"]
