"""Where in the model, and where in the prompt, each variant of a sweep first differs from the unedited run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interp.hooks import Applied
from interp.positions import Layout
from interp.selection import Call, groups
from interp.sites import Place

# Where a place is, counted in blocks: those of the language model, then its final norm, then its unembedding.


@dataclass(frozen=True)
class Depths:
    """How deep in the language model a module lies.

    Args:
        blocks: paths of the blocks, in order.
        final_norm: path of the norm after them.
        unembed: path of the unembedding.
    """

    blocks: tuple[str, ...]
    final_norm: str
    unembed: str

    @property
    def n_layers(self) -> int:
        """How many blocks there are; also the depth of all that comes after them."""
        return len(self.blocks)

    def of(self, path: str) -> int | None:
        """The block that a module lies in, `n_layers` after the blocks, None before or outside them."""
        for layer, block in enumerate(self.blocks):
            if path == block or path.startswith(f"{block}."):
                return layer
        after = (self.final_norm, self.unembed)
        return self.n_layers if any(path == one or path.startswith(f"{one}.") for one in after) else None

    def unembeds(self, place: Place) -> bool:
        """Whether a place is at the unembedding, whose tensors hold the asked positions only."""
        return place.path == self.unembed or place.path.startswith(f"{self.unembed}.")

    def leaves_block(self, place: Place) -> bool:
        """Whether a place is a block's output: the residual stream on its way into the next block."""
        return place.side == "output" and place.element is None and place.path in self.blocks


def depths_of(vlm: Any) -> Depths:
    """The depths of a model's modules.

    Args:
        vlm: the model.
    """
    blocks = tuple(vlm.place(f"blocks.{layer}.hook_resid_pre").path for layer in range(vlm.n_layers))
    return Depths(blocks, vlm.place("ln_final.hook_out").path, vlm.place("unembed.hook_out").path)


@dataclass(frozen=True, eq=False)
class Variant:
    """One variant, and the part of the model and of the prompt in which it differs from the unedited run.

    Args:
        index: which one it is.
        edits: its edits, placed.
        layer: block at whose input it leaves the unedited run; the number of blocks: after all of them.
        start: its first edited position, in the padded prompt.
        entering: those of its edits that apply to the residual stream right there.
        clean_layers: blocks whose input, keys and values are unedited everywhere.
        clean_before: position before which all tokens are, padding included, exactly those of the unedited run.
        packable: whether its tokens may lie beside those of others in one sequence.
        unembeds: whether it edits at the unembedding.
    """

    index: int
    edits: tuple[Applied, ...]
    layer: int
    start: int
    entering: tuple[Applied, ...] = ()
    clean_layers: int = 0
    clean_before: int = 0
    packable: bool = True
    unembeds: bool = False

    @property
    def later(self) -> tuple[Applied, ...]:
        """The edits that apply inside the model."""
        return tuple(applied for applied in self.edits if applied not in self.entering)


def located(
    variants: Sequence[Sequence[Applied]], layouts: tuple[Layout, ...], seq_len: int, depths: Depths
) -> list[Variant]:
    """Find where each variant starts to differ.

    Args:
        variants: for every variant its edits, placed inside the language model.
        layouts: where the tokens of each prompt are.
        seq_len: padded length of the prompts.
        depths: of the model's modules.

    Raises:
        UnknownNameError, InputError: a position that a prompt lacks, or a selection that an edit cannot have.
    """
    call = Call(0, seq_len, layouts)
    tokens = torch.empty(len(layouts), seq_len, 0)
    return [_located(index, tuple(edits), call, tokens, depths) for index, edits in enumerate(variants)]


def _located(index: int, edits: tuple[Applied, ...], call: Call, tokens: torch.Tensor, depths: Depths) -> Variant:
    n_layers, seq_len = depths.n_layers, call.length
    if not edits:
        return Variant(index, edits, n_layers, seq_len, clean_layers=n_layers, clean_before=seq_len)
    inside = [_depth(applied, depths) for applied in edits]
    enters = [layer + 1 if depths.leaves_block(a.place) else layer for a, layer in zip(edits, inside, strict=True)]
    layer = min(enters)
    selected = [group for a in edits for group in groups(a.where, a.place, tokens, call)]
    start = min(int(group.positions.min()) for group in selected)
    # Where a pattern is edited the fused kernel is left, which gives other values to padding, that sees nothing. Only
    # later patterns can look at padding.
    patterns = {at for a, at in zip(edits, inside, strict=True) if a.place.side == "pattern"}
    padded = any(layout.start for layout in call.layouts)
    return Variant(
        index=index,
        edits=edits,
        layer=layer,
        start=0 if padded and len(patterns) > 1 else start,
        entering=tuple(a for a, at in zip(edits, enters, strict=True) if at == layer and depths.leaves_block(a.place)),
        clean_layers=min(inside),
        clean_before=0 if padded and patterns else start,
        # A pattern's keys are those of its own prompt; raw modules may look at their input in any way.
        packable=all(a.place.side != "pattern" and ":" not in a.place.site for a in edits),
        unembeds=any(depths.unembeds(a.place) for a in edits),
    )


def _depth(applied: Applied, depths: Depths) -> int:
    layer = depths.of(applied.place.path)
    assert layer is not None  # edits before the blocks are run one by one
    return layer
