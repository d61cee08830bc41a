"""Many variants of one batch, each with edits of its own, with the work they share done once.

Images are encoded once. Tokens before the first edited position see no edit in any variant, so their keys and
values are computed once and every variant runs the remaining tokens only, many variants as rows of one
forward.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from interp.clock import Clock, known_layouts
from interp.errors import InputError
from interp.hooks import Applied, Session, live_edits
from interp.inputs import Inputs
from interp.positions import Layout, layouts_from_mask
from interp.selection import Call, groups, position_ids

# Copies of the shared prefix never take more memory than this.
CACHE_BYTES = 2**31

_TOKENS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Plan:
    """What a sweep shared and what it cost.

    Args:
        n_variants, batch, seq_len: size of the sweep.
        shared_prefix: tokens per row whose keys and values were computed once.
        images_shared: whether images were encoded once rather than once per variant.
        variants_per_forward: variants that ran as rows of one forward.
        token_layers: token-layer evaluations that were run.
        naive_token_layers: those that a loop of edited forwards would have run.
        reason: why something could not be shared; empty when all could.
    """

    n_variants: int
    batch: int
    seq_len: int
    shared_prefix: int
    images_shared: bool
    variants_per_forward: int
    token_layers: int
    naive_token_layers: int
    reason: str = ""

    def __str__(self) -> str:
        ratio = self.naive_token_layers / max(1, self.token_layers)
        return (
            f"{self.n_variants} variants × {self.batch} rows: {self.token_layers:,} token-layers against "
            f"{self.naive_token_layers:,} of the naive loop ({ratio:.1f}×); shared prefix of {self.shared_prefix} of "
            f"{self.seq_len} tokens{f'; {self.reason}' if self.reason else ''}"
        )


@dataclass(frozen=True, eq=False)
class Sweep:
    """Result of a sweep.

    Args:
        logits: at the last position, per variant and row.
        plan: what was shared.
    """

    logits: Float[Tensor, "variant batch vocab"]
    plan: Plan


def run_sweep(
    vlm: Any, inputs: Mapping[str, Any], variants: Sequence[Sequence[Applied]], *, max_rows: int = 256
) -> Sweep:
    """Run the variants; see `VLM.sweep`.

    Args:
        vlm: the model.
        inputs: prepared or plain model inputs.
        variants: for every variant its edits, placed.
        max_rows: the most rows in one forward, though never less than one variant's.

    Raises:
        InputError: no variants, inputs that are not left-padded token ids, or a bad ``max_rows``.
        NeverFiredError: an edit that applied to nothing.
    """
    if not variants:
        raise InputError("a sweep needs at least one variant")
    if max_rows < 1:
        raise InputError(f"max_rows={max_rows}: at least one row has to fit")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or inputs.get("past_key_values") is not None:
        raise InputError("a sweep needs input_ids, and starts without past_key_values")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    layouts = inputs.layout if isinstance(inputs, Inputs) else layouts_from_mask(mask)
    with torch.no_grad(), known_layouts(layouts):
        obstacle = _obstacle(vlm, inputs, variants)
        if obstacle:
            return _naive(vlm, inputs, variants, obstacle)
        first = min([ids.shape[1] - 1, *(_first(a, layouts, ids.shape[1]) for edits in variants for a in edits)])
        return _shared(vlm, inputs, mask, variants, first, max_rows)


def _obstacle(vlm: Any, inputs: Mapping[str, Any], variants: Sequence[Sequence[Applied]]) -> str:
    """Why the variants have to run one by one; empty when they need not."""
    other = [name for name in inputs if name not in _TOKENS and not name.startswith(("pixel_", "image_"))]
    if other:
        return f"the inputs hold {', '.join(other)}, which the language model may read token by token"
    outside = [a.place.site for edits in variants for a in edits if not vlm.inside_decoder(a.place)]
    if outside:
        return f"{outside[0]} lies before the language model's blocks, whose inputs are computed once"
    # What comes before the blocks runs once, on the whole prompt, and so does an edit in it.
    mixing = [a.edit for a in live_edits(vlm.model) if a.edit.mixes and vlm.inside_decoder(a.place)]
    if mixing:
        return f"{mixing[0]!r} of an outer block works on all its entries together, which no other variant may join"
    return ""


def _first(applied: Applied, layouts: tuple[Layout, ...], seq_len: int) -> int:
    """The first position that an edit touches in any row."""
    tokens = torch.empty(len(layouts), seq_len, 0)
    found = groups(applied.where, applied.place, tokens, Call(0, seq_len, layouts))
    return min(int(group.positions.min()) for group in found)


def _naive(vlm: Any, inputs: Mapping[str, Any], variants: Sequence[Sequence[Applied]], reason: str) -> Sweep:
    logits = []
    for variant in variants:
        with Session(vlm.model, Clock(vlm.model, vlm.decoder), edits=variant):
            logits.append(vlm(inputs, logits_to_keep=1).logits[:, -1])
    batch, seq_len = inputs["input_ids"].shape
    cost = len(variants) * batch * seq_len * vlm.n_layers
    return Sweep(torch.stack(logits), Plan(len(variants), batch, seq_len, 0, False, 1, cost, cost, reason))


def _shared(
    vlm: Any,
    inputs: Mapping[str, Any],
    mask: Tensor,
    variants: Sequence[Sequence[Applied]],
    first: int,
    max_rows: int,
) -> Sweep:
    batch, seq_len = mask.shape
    embeds = vlm.embed(inputs)
    given = inputs.get("position_ids")
    positions = position_ids(mask) if given is None else given
    prefix, prefix_cost, reason = None, first, ""
    if first > 0:
        prefix = vlm.model(
            inputs_embeds=embeds[:, :first],
            attention_mask=mask[:, :first],
            position_ids=positions[:, :first],
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        if not _is_plain(prefix, seq_len):
            prefix, first = None, 0
            reason = "the KV cache forgets tokens (a sliding window), so that rows cannot start from a shared one"
    per_forward = min(len(variants), max(1, min(max_rows, _rows_that_fit(prefix, batch)) // batch))
    logits = []
    for start in range(0, len(variants), per_forward):
        chunk = variants[start : start + per_forward]
        edits = [replace(a, variant=index, times=0) for index, edits in enumerate(chunk) for a in edits]
        n = len(chunk)
        # The copies of a row lie side by side, as beams do, so that edits of an outer block find their prompts.
        with Session(vlm.model, Clock(vlm.model, vlm.decoder), edits=edits):
            output = vlm.model(
                inputs_embeds=repeat(embeds[:, first:], "batch pos d -> (batch variant) pos d", variant=n),
                attention_mask=repeat(mask, "batch pos -> (batch variant) pos", variant=n),
                position_ids=repeat(positions[:, first:], "batch pos -> (batch variant) pos", variant=n),
                past_key_values=None if prefix is None else _tiled(prefix, n),
                use_cache=prefix is not None,
                logits_to_keep=1,
            )
        logits.append(rearrange(output.logits[:, -1], "(batch variant) vocab -> variant batch vocab", variant=n))
    per_row = vlm.n_layers * batch
    plan = Plan(
        n_variants=len(variants),
        batch=batch,
        seq_len=seq_len,
        shared_prefix=first,
        images_shared="pixel_values" in inputs,
        variants_per_forward=per_forward,
        token_layers=per_row * (prefix_cost + len(variants) * (seq_len - first)),
        naive_token_layers=per_row * len(variants) * seq_len,
        reason=reason,
    )
    return Sweep(torch.cat(logits), plan)


def _is_plain(cache: Any, seq_len: int) -> bool:
    """Whether a cache holds every past key and value, and nothing else: no cut window, no recurrent state."""
    if not isinstance(cache, DynamicCache):
        return False
    windows = [
        None if type(layer).__name__ == "DynamicLayer" else getattr(layer, "sliding_window", 0)
        for layer in cache.layers
    ]
    return all(window is None or seq_len <= window for window in windows)


def _tiled(cache: DynamicCache, n: int) -> DynamicCache:
    """The same prefix for ``n`` variants, as rows."""
    tiled = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (
            repeat(x, "batch head pos d -> (batch variant) head pos d", variant=n) for x in (layer.keys, layer.values)
        )
        tiled.update(keys, values, index)
    return tiled


def _rows_that_fit(cache: DynamicCache | None, batch: int) -> int:
    """Rows whose copies of the prefix stay within the budget."""
    if cache is None:
        return 2**31
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return max(batch, math.floor(CACHE_BYTES / (size / batch)))
