"""The residual stream between two heads: what one writes into it, and what a block makes of it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import SiteUnavailableError
from interp.patching.heads import HEAD, Head
from interp.stations import view

INPUTS = {letter: f"attn.hook_{letter}" for letter in "qkv"}


class Hearing:
    """How a block makes queries, keys and values of its residual stream: its first norm, then the projections.

    Args:
        vlm: the model.
        layer: the block.
        inputs: with which the model runs once, to see which norm that is.

    Raises:
        SiteUnavailableError: no part of the block makes what its queries are projected from.
    """

    def __init__(self, vlm: Any, layer: int, inputs: Mapping[str, Any]) -> None:
        self.vlm, self.layer = vlm, layer
        self.norm = _norm_before(vlm, layer, inputs)

    def __call__(self, letter: str, change: Tensor, acts: Mapping[str, Tensor]) -> Float[Tensor, "batch pos head d"]:
        """Queries, keys or values where the residual stream before the block changes."""
        place = self.vlm.place(f"blocks.{self.layer}.{INPUTS[letter]}")
        with torch.no_grad():
            stream = acts[f"blocks.{self.layer}.hook_resid_pre"] + change
            projected = self.vlm.model.get_submodule(place.path)(self.norm(stream))
        return view(projected, place)

    def check(self, acts: Mapping[str, Tensor]) -> None:
        """Refuse a block that makes something else of its residual stream.

        Raises:
            SiteUnavailableError: recomputed queries, keys or values differ from the captured ones.
        """
        for letter, leaf in INPUTS.items():
            want = acts[f"blocks.{self.layer}.{leaf}"]
            difference = (self(letter, torch.zeros(()).to(want), acts) - want).abs().max()
            if float(difference) > 1e-3 * (1 + float(want.abs().max())):
                raise SiteUnavailableError(
                    f"block {self.layer} does not make {letter} of its normed residual stream (they differ by "
                    f"{float(difference):.3g}), so direct paths to it are unknown; mlps='recomputed' runs the model"
                )


def written(vlm: Any, sender: Head, said: Tensor, acts: Mapping[str, Tensor]) -> Float[Tensor, "batch pos d_model"]:
    """The change that a sender makes to the residual stream.

    Args:
        vlm: the model.
        sender: its layer and head.
        said: outputs of all heads of its layer, with its new one.
        acts: of the run into which it speaks.
    """
    site = f"blocks.{sender[0]}.{HEAD}"
    project = vlm.model.get_submodule(vlm.place(site).path)
    with torch.no_grad():
        new, old = (project(rearrange(z, "batch pos head d -> batch pos (head d)")) for z in (said, acts[site]))
    return new - old


def check_residual(acts: Mapping[str, Tensor], layers: Sequence[int]) -> None:
    """Refuse blocks that write something else than the sum of attention and MLP into the residual stream.

    Args:
        acts: captured residual streams, attention and MLP outputs.
        layers: the blocks.

    Raises:
        SiteUnavailableError: heads have no direct paths through such a block.
    """
    for layer in layers:
        leaves = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
        before, attention, mlp, after = (acts[f"blocks.{layer}.{leaf}"].float() for leaf in leaves)
        difference = float((before + attention + mlp - after).abs().max())
        if difference > 1e-2 * (1 + float(after.abs().max())):
            raise SiteUnavailableError(
                f"block {layer} does not add its attention and MLP to the residual stream as they are (they differ by "
                f"{difference:.3g}), so that heads have no direct paths through it"
            )


def _norm_before(vlm: Any, layer: int, inputs: Mapping[str, Any]) -> nn.Module:
    """The module of a block whose output its query projection reads."""
    block = vlm.model.get_submodule(vlm.place(f"blocks.{layer}.hook_resid_pre").path)
    project = vlm.model.get_submodule(vlm.place(f"blocks.{layer}.attn.hook_q").path)
    outputs: list[tuple[nn.Module, Any]] = []
    read: list[Tensor] = []
    with ExitStack() as hooks:
        for child in block.children():
            handle = child.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
            hooks.callback(handle.remove)
        hooks.callback(project.register_forward_pre_hook(lambda _, args: read.append(args[0])).remove)
        with torch.no_grad():
            vlm(inputs, logits_to_keep=1)
    for module, output in outputs:
        if isinstance(output, Tensor) and read and output.data_ptr() == read[0].data_ptr():
            return module
    raise SiteUnavailableError(
        f"no part of block {layer} makes what its queries are projected from; mlps='recomputed' runs the model instead"
    )
