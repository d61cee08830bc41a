"""One forward in which many variants of a sweep leave the unedited run, each at the block of its first edit.

The model's own forward runs, on a token that counts for nothing. Before each block, the residual stream of the variants
that leave there joins in, taken from the unedited run, and the block is given the masks, positions, keys and values
of the tokens that are on their way. A chunk is laid out in one of two ways. ``packed``: the tokens of all variants
lie side by side in one sequence, and a mask keeps them apart, so that the keys of the prompt are there once.
``rows``: each variant is a row, which sees the prompt's keys before it.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import DynamicCache

from interp.clock import known_layouts
from interp.hooks import Applied
from interp.positions import Layout
from interp.selection import Call
from interp.sites import Place
from interp.stations import attach, put_back, view
from interp.sweeps.asked import Asked
from interp.sweeps.masks import for_copies, packed_mask, rows_mask
from interp.sweeps.plan import Chunk
from interp.sweeps.shared import SharedRun, Unshareable, by_name
from interp.sweeps.variants import Depths, Variant


@dataclass(frozen=True, eq=False)
class _Lane:
    """One variant on its way: where its tokens are.

    Args:
        variant: the variant.
        number: its place among the variants of the chunk, in the order in which they join.
        start: its first token, in the prompt.
        length: its tokens.
        offset: in a packed sequence, the tokens before its own.
        kept: which of its tokens reach the unembedding, of each prompt.
        rows: its rows there.
    """

    variant: Variant
    number: int
    start: int
    length: int
    offset: int
    kept: Tensor
    rows: slice


class ChunkRun:
    """Runs one chunk; see the module's text.

    Args:
        vlm: the model.
        shared: the unedited run.
        chunk: the variants and their layout.
        layouts: where the tokens of each prompt are.
        asked: positions whose logits are wanted.
        depths: of the model's modules.
        outer: edits of outer blocks apply too, for which every row holds the tokens from the chunk's start on.
        store: put residual stream, keys and values of the (only) variant into the unedited run.
    """

    def __init__(
        self,
        vlm: Any,
        shared: SharedRun,
        chunk: Chunk,
        layouts: tuple[Layout, ...],
        asked: Asked,
        depths: Depths,
        *,
        outer: bool = False,
        store: bool = False,
    ) -> None:
        self.vlm, self.shared, self.layouts, self.asked, self.depths = vlm, shared, layouts, asked, depths
        self.packed, self.outer, self.store = chunk.layout == "packed", outer, store
        self.start, self.batch, self.seq_len = chunk.start, len(layouts), asked.seq_len
        self.variants = chunk.variants
        self.lanes = self._lanes()
        self.joined = 0
        self._masks: dict[int, Tensor | None] = {}
        self._calls: dict[tuple[int, int], Call] = {}
        self._owner = threading.get_ident()
        if self.packed:
            index = [torch.arange(lane.start, self.seq_len) for lane in self.lanes]
            self._positions = torch.cat(index)
            self._owners = torch.cat([torch.full_like(one, k) for k, one in enumerate(index)])
            self._starts = torch.cat([torch.full_like(one, int(one[0])) for one in index])

    def run(self) -> list[Tensor]:
        """The logits ``[batch, n, vocab]`` of every variant of the chunk, in its order of variants."""
        carrier = self._carrier()
        tail = self.seq_len - min(self.asked.first, self.seq_len - 1)
        options: dict[str, Any] = {"logits_to_keep": 1, "use_cache": False}
        if self.outer:
            # The clocks of outer blocks learn from these where the rows are in the prompt.
            options = {"logits_to_keep": min(tail, self.seq_len - self.start), "use_cache": True}
            options["past_key_values"] = SharedCache(self)
        with ExitStack() as undo:
            undo.enter_context(known_layouts(self.layouts))
            for remove in self._hooks():
                undo.callback(remove)
            logits = self.vlm.model(inputs_embeds=carrier, position_ids=self._carrier_positions(), **options).logits
        by_variant = {lane.variant.index: self._logits(lane, logits) for lane in self.lanes}
        return [by_variant[variant.index] for variant in self.variants]

    # ------------------------------------------------------------ layout

    def _lanes(self) -> list[_Lane]:
        lanes: list[_Lane] = []
        offset, row = 0, 0
        for number, variant in enumerate(sorted(self.variants, key=lambda variant: (variant.layer, variant.index))):
            start = min(variant.start, self.seq_len - 1) if self.packed else self.start
            kept = (self.asked.index - start).clamp(min=0)
            if variant.unembeds:
                kept = torch.arange(int(kept.min()), self.seq_len - start).expand(self.batch, -1)
            rows = slice(row, row + kept.numel())
            lanes.append(_Lane(variant, number, start, self.seq_len - start, offset, kept, rows))
            offset, row = offset + self.seq_len - start, rows.stop
        return lanes

    @property
    def _n_tokens(self) -> int:
        """Tokens of all joined lanes in a packed sequence."""
        last = self.lanes[self.joined - 1]
        return last.offset + last.length

    @property
    def _copies(self) -> int:
        """Rows of each prompt: the joined lanes, or the carrier before any has joined."""
        return max(1, self.joined)

    def _carrier(self) -> Tensor:
        """What the model is called with; below the first variant's block it is all that runs."""
        stream = self.shared.residual[0]
        if self.outer:
            return stream[:, self.start - self.shared.first :].to(self.vlm.device)
        return stream[:1, :1].to(self.vlm.device)

    def _carrier_positions(self) -> Tensor:
        n = self.seq_len - self.start if self.outer else 1
        first = self.start if self.outer else 0
        rows = self.batch if self.outer else 1
        return torch.arange(first, first + n, device=self.vlm.device).expand(rows, n)

    def _split(self, x: Tensor, lane: _Lane, place: Place) -> Tensor:
        """The part of one lane: a view, ``[batch, position, ...]``, where the tensor is contiguous."""
        if self.depths.of(place.path) != self.depths.n_layers or self.outer:
            if self.packed:
                self._expect(x, (self.batch, self._n_tokens), place)
                return x[:, lane.offset : lane.offset + lane.length]
            self._expect(x, (self.batch * self.joined,), place)
            return x[lane.number :: self.joined]
        if self.depths.unembeds(place):
            return x[lane.rows].unflatten(0, (self.batch, -1))[:, :, 0]
        if self.packed:
            return x.unflatten(0, (self.batch, -1))[:, lane.offset : lane.offset + lane.length, 0]
        return x.unflatten(0, (self.batch, self.joined, -1))[:, lane.number, :, 0]

    def _expect(self, x: Tensor, shape: tuple[int, ...], place: Place) -> None:
        if tuple(x.shape[: len(shape)]) != shape:
            raise Unshareable(f"{place.site} works on {tuple(x.shape)}, not on one entry for each token")

    def _call(self, start: int, length: int) -> Call:
        if (start, length) not in self._calls:
            self._calls[start, length] = Call(start, length, self.layouts)
        return self._calls[start, length]

    def _call_of(self, lane: _Lane, place: Place) -> Call:
        if self.depths.unembeds(place) and not self.outer:
            n_kept = int(lane.kept.shape[1])
            return self._call(self.seq_len - n_kept, n_kept)
        return self._call(lane.start, lane.length)

    # ------------------------------------------------------------ hooks

    def _hooks(self) -> list[Callable[[], None]]:
        model = self.vlm.model
        undo: list[Callable[[], None]] = []
        for layer, path in enumerate(self.depths.blocks):
            hook = partial(self._before_block, layer)
            undo.append(
                model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove
            )
        for path, before in ((self.depths.final_norm, self._before_norm), (self.depths.unembed, self._before_unembed)):
            undo.append(model.get_submodule(path).register_forward_pre_hook(before, prepend=True).remove)
        stations: dict[tuple, list[tuple[_Lane, Applied]]] = {}
        for lane in self.lanes:
            for applied in lane.variant.later:
                stations.setdefault(applied.place.station, []).append((lane, applied))
        for (path, side, element), found in stations.items():
            listener = partial(self._edit, found)
            undo.append(attach(model.get_submodule(path), side, listener, edits=True, element=element))
        return undo

    def _before_block(
        self, layer: int, module: nn.Module, args: tuple, kwargs: dict | None = None
    ) -> tuple[tuple, dict] | None:
        # Torch passes no kwargs while another thread is putting the hook in place or taking it away.
        if threading.get_ident() != self._owner or kwargs is None:
            return None
        named = by_name(module, args, kwargs)
        (key, x), *_ = named.items()
        x = self._join(layer, x)
        if self.joined or self.outer:
            named |= self._arguments(layer, x.device) | {"past_key_values": SharedCache(self)}
        del named[key]
        return (x,), named

    def _before_norm(self, module: nn.Module, args: tuple) -> tuple | None:
        if threading.get_ident() != self._owner:
            return None
        x = self._join(self.depths.n_layers, args[0])
        return (x if self.outer else rearrange(x, "batch pos d -> (batch pos) 1 d"), *args[1:])

    def _before_unembed(self, module: nn.Module, args: tuple) -> tuple | None:
        if threading.get_ident() != self._owner or self.outer:
            return None
        x = args[0]
        index = []
        for lane in self.lanes:
            rows = torch.arange(self.batch)[:, None]
            if self.packed:
                index.append(rows * self._n_tokens + lane.offset + lane.kept)
            else:
                index.append((rows * self.joined + lane.number) * lane.length + lane.kept)
        return (x[torch.cat([one.flatten() for one in index]).to(x.device)], *args[1:])

    def _join(self, layer: int, x: Tensor) -> Tensor:
        """The residual stream with that of the variants that leave the unedited run here."""
        coming = [lane for lane in self.lanes if lane.variant.layer == layer]
        if self.store and self.joined:
            self.shared.residual[layer][:, self.start - self.shared.first :] = x.to(self.shared.residual[layer].device)
        if not coming:
            return x
        parts = [self._entering(lane, layer).to(x.device) for lane in coming]
        before, self.joined = self.joined, self.joined + len(coming)
        if self.packed:
            return torch.cat([x, *parts] if before else parts, dim=1)
        new = torch.stack(parts, dim=1)
        if before:
            here = rearrange(x, "(batch variant) pos d -> batch variant pos d", variant=before)
            new = torch.cat([here, new], dim=1)
        return rearrange(new, "batch variant pos d -> (batch variant) pos d")

    def _entering(self, lane: _Lane, layer: int) -> Tensor:
        x = self.shared.residual[layer][:, lane.start - self.shared.first :]
        for applied in lane.variant.entering:
            part = applied.apply(view(x, applied.place), self._call(lane.start, lane.length), x.shape)
            x = x if part is None else put_back(x, part, applied.place)
        return x

    def _edit(self, found: list[tuple[_Lane, Applied]], x: Tensor) -> Tensor | None:
        if not self.joined:
            return None
        new = None
        for lane, applied in found:
            part = self._split(x if new is None else new, lane, applied.place)
            edited = applied.apply(view(part, applied.place), self._call_of(lane, applied.place), part.shape)
            if edited is not None:
                new = x.clone(memory_format=torch.contiguous_format) if new is None else new
                self._split(new, lane, applied.place).copy_(put_back(part, edited, applied.place))
        return new

    # ------------------------------------------------------------ what blocks are given

    def _arguments(self, layer: int, device: torch.device) -> dict[str, Any]:
        """The block's arguments of the unedited run, cut to the tokens on their way."""
        given = self.shared.arguments[layer]
        cut: dict[str, Any] = {}
        if "attention_mask" in given:
            mask = self._mask(given["attention_mask"])
            cut["attention_mask"] = None if mask is None else mask.to(device)
        for name in ("position_ids", "position_embeddings", "cache_position"):
            value = given.get(name)
            if isinstance(value, tuple):
                cut[name] = tuple(self._tokens(one).to(device) for one in value)
            elif isinstance(value, Tensor):
                cut[name] = self._tokens(value).to(device)
        return cut

    def _tokens(self, x: Tensor) -> Tensor:
        if self.packed:
            index = self._positions[: self._n_tokens].to(x.device)
            return x[index] if x.ndim == 1 else x[:, index]
        return x[self.start :] if x.ndim == 1 else for_copies(x[:, self.start :], self.batch, self._copies)

    def _mask(self, given: Tensor | None) -> Tensor | None:
        key = id(given)
        device = self.shared.residual[0].device if given is None else given.device
        if self.packed:
            if key not in self._masks:
                positions, owners, starts = (x.to(device) for x in (self._positions, self._owners, self._starts))
                self._masks[key] = packed_mask(given, positions, owners, starts, self._n_prefix)
            whole = self._masks[key]
            assert whole is not None
            return whole[:, :, : self._n_tokens, : self._n_prefix + self._n_tokens]
        if key not in self._masks:
            self._masks[key] = rows_mask(given, self.start, self.seq_len, device)
        mask = self._masks[key]
        return None if mask is None else for_copies(mask, self.batch, self._copies)

    @property
    def _n_prefix(self) -> int:
        return max(lane.start for lane in self.lanes)

    def keys_for(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values that the tokens on their way see, after those of the unedited run."""
        shared = (self.shared.keys[layer], self.shared.values[layer])
        if self.store:
            for kept, new in zip(shared, (keys, values), strict=True):
                kept[:, :, self.start :] = new
        n = self._n_prefix if self.packed else self.start
        before = [x[:, :, :n] if self.packed else for_copies(x[:, :, :n], self.batch, self._copies) for x in shared]
        if not self.packed and self.batch == 1:
            before = [x.expand(len(keys), -1, -1, -1) for x in before]
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)

    def _logits(self, lane: _Lane, logits: Tensor) -> Tensor:
        """One variant's logits at the asked positions; before its first edit those of the unedited run."""
        if self.outer:
            mine = logits[lane.number :: self.joined]
        else:
            mine = logits[lane.rows].unflatten(0, (self.batch, -1))[:, :, 0]
        if self.outer or lane.variant.unembeds:
            index = (self.asked.index - self.seq_len + mine.shape[1]).clamp(min=0).to(mine.device)
            mine = torch.take_along_dim(mine, index[..., None], dim=1)
        early = (self.asked.index < lane.start).to(mine.device)
        return torch.where(early[..., None], self.shared.logits.to(mine.device), mine) if bool(early.any()) else mine


class SharedCache(DynamicCache):
    """A cache that puts the unedited run's keys and values before those of the tokens on their way, and keeps none.

    Args:
        run: the chunk that runs.
    """

    def __init__(self, run: ChunkRun) -> None:
        super().__init__()
        self.run = run

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to."""
        return self.run.keys_for(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of this call."""
        return self.run.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that a mask covers, and the first of them."""
        return self.run.start + query_length, 0
