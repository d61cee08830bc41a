"""Why the variants of a sweep have to run one by one, as far as that can be seen before anything runs."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from interp.hooks import Applied, live_edits
from interp.sweeps.variants import Depths

_TOKENS = ("input_ids", "attention_mask", "position_ids")
_KERNELS = ("sdpa", "eager")
# Whose hooks act alike on any layout: our own, transformers' recorders, accelerate's moves between devices.
_KNOWN = ("interp.", "transformers.", "accelerate.")


def obstacle(vlm: Any, inputs: Mapping[str, Any], variants: Sequence[Sequence[Applied]], depths: Depths) -> str:
    """Why the variants have to run one by one; empty when they need not.

    Args:
        vlm: the model.
        inputs: its inputs.
        variants: for every variant its edits, placed.
        depths: of the model's modules.
    """
    other = [name for name in inputs if name not in _TOKENS and not name.startswith(("pixel_", "image_"))]
    if other:
        return f"the inputs hold {', '.join(other)}, which the language model may read token by token"
    outside = [a.place.site for edits in variants for a in edits if depths.of(a.place.path) is None]
    if outside:
        return f"{outside[0]} lies before the language model's blocks, whose inputs are computed once"
    # What comes before the blocks runs once, on the whole prompt, and so does an edit in it.
    mixing = [a.edit for a in live_edits(vlm.model) if a.edit.mixes and depths.of(a.place.path) is not None]
    if mixing:
        return f"{mixing[0]!r} of an outer block works on all its entries together, which no other variant may join"
    kernel = vlm.decoder.config._attn_implementation
    if kernel not in _KERNELS:
        return f"the attention kernel {kernel!r} takes no mask that keeps variants apart (load with 'sdpa' or 'eager')"
    if vlm.model.training:
        return "the model is in training mode, where dropout makes every forward another one"
    return _outer_capture(vlm, depths)


def outer_edits(vlm: Any, depths: Depths) -> list[Applied]:
    """The edits of outer blocks that apply inside the language model, in every variant.

    Args:
        vlm: the model.
        depths: of the model's modules.
    """
    return [applied for applied in live_edits(vlm.model) if depths.of(applied.place.path) is not None]


def _outer_capture(vlm: Any, depths: Depths) -> str:
    """Captures of an outer block, which expect one forward for each variant."""
    here = threading.get_ident()
    for path, hook in _hooks(vlm, depths):
        listeners = getattr(getattr(hook, "__self__", None), "listeners", ())
        if any(entry.owner == here and not entry.edits for entry in listeners):
            return f"an outer block captures at {path}, once for each variant"
    return ""


def foreign_hooks(vlm: Any, depths: Depths) -> list[str]:
    """Modules of the language model with hooks that neither this library nor transformers nor accelerate has put there.

    Hooks that only read do no harm; those that write see the layout of a sweep where they expect that of a forward.

    Args:
        vlm: the model.
        depths: of the model's modules.
    """
    found = [path for path, hook in _hooks(vlm, depths) if not str(getattr(hook, "__module__", "")).startswith(_KNOWN)]
    return list(dict.fromkeys(found))


def _hooks(vlm: Any, depths: Depths) -> Iterator[tuple[str, Any]]:
    for path, module in vlm.model.named_modules():
        if path == "" or module is vlm.decoder or depths.of(path) is not None:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                yield path or type(module).__name__, hook
