"""What a sweep checks of its own results: one variant against a plain forward, and that every edit has an effect."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.errors import InputError, InterpError
from interp.hooks import Tap
from interp.sweeps.asked import Asked
from interp.sweeps.shared import plain_forward
from interp.sweeps.variants import Depths, Variant

# Variants whose logits come this near to the unedited ones are run again by themselves, the nearest ones first.
MOST_SUSPECTS = 8


class SweepMismatchError(InterpError, RuntimeError):
    """The shared work of a sweep gave another result than a plain edited forward: its results cannot be trusted."""


def tolerance(reference: Tensor) -> float:
    """How far logits of shared work may lie from those of a plain forward.

    Args:
        reference: logits of the plain forward.

    Returns:
        The square root of the dtype's precision times the largest logit: 3e-4 of it in float32, 0.09 in bfloat16.
        Measured differences are a hundredth of that; a mask or a position that is wrong moves logits by their own size.
    """
    return float(torch.finfo(reference.dtype).eps ** 0.5 * reference.abs().max())


def check_against_plain(variant: Variant, shared: Tensor, plain: Tensor, hooked: Sequence[str]) -> None:
    """Compare a variant's logits with those of a plain edited forward.

    Args:
        variant: which one.
        shared: its logits in the sweep.
        plain: those of the plain edited forward.
        hooked: modules with hooks that are not ours.

    Raises:
        SweepMismatchError: they differ by more than `tolerance`.
    """
    difference = float((shared.to(plain.device) - plain).abs().max())
    if not difference <= tolerance(plain):
        why = (
            f"Hooks of your own (at {', '.join(hooked[:3])}) see other batches and sequences than in a forward"
            if hooked
            else "This model cannot share work as a decoder does"
        )
        raise SweepMismatchError(
            f"variant {variant.index} ({', '.join(repr(a.edit) for a in variant.edits)}) differs from the plain edited "
            f"forward by {difference:.3g}, where rounding allows {tolerance(plain):.3g}. {why}: "
            "run the edits one by one with vlm.edit"
        )


class EffectGuard:
    """Looks for variants whose edits applied but changed nothing.

    Args:
        vlm: the model.
        inputs: its inputs.
        asked: positions whose logits are compared.
        depths: of the model's modules.
        clean: logits of the unedited run.
    """

    def __init__(self, vlm: Any, inputs: Mapping[str, Any], asked: Asked, depths: Depths, clean: Tensor) -> None:
        self.vlm, self.inputs, self.asked, self.depths, self.clean = vlm, inputs, asked, depths, clean
        self._near = tolerance(clean) / 16
        self._left = MOST_SUSPECTS

    def check(self, variants: Mapping[Variant, Tensor]) -> None:
        """Refuse variants without an effect.

        Args:
            variants: the logits of some of them. Those near the unedited ones are compared with them to the last bit,
                in plain forwards with the same kernels; eight per sweep.

        Raises:
            InputError: a variant whose logits are exactly those of the unedited run.
        """
        distance = {one: float((x.to(self.clean.device) - self.clean).abs().max()) for one, x in variants.items()}
        near = sorted((one for one in variants if one.edits and distance[one] <= self._near), key=lambda o: distance[o])
        for variant in near[: self._left]:
            self._left -= 1
            # Captures of patterns leave the fused kernel, as edits of them do.
            taps = [Tap(a.place) for a in variant.edits if a.place.side == "pattern"]
            unedited = plain_forward(self.vlm, self.inputs, (), self.asked, self.depths, taps)
            if torch.equal(plain_forward(self.vlm, self.inputs, variant.edits, self.asked, self.depths), unedited):
                raise no_effect(variant)


def no_effect(variant: Variant) -> InputError:
    """The error for a variant whose edits changed nothing."""
    edits = ", ".join(repr(applied.edit) for applied in variant.edits)
    return InputError(
        f"variant {variant.index} changes nothing: {edits} gives exactly the logits of the unedited run. Either the "
        "values are what was there already, or the edit cannot reach the asked positions (the last block's output at "
        "an earlier token); allow_no_effect=True lets such variants pass"
    )


def as_values(metric: Callable[[Tensor], Tensor] | None, logits: Tensor, batch: int) -> Tensor:
    """What is kept of one variant: its logits, or what the metric makes of them.

    Args:
        metric: of the logits as users see them.
        logits: ``[batch, vocab]`` or ``[batch, n, vocab]``.
        batch: prompts.

    Raises:
        InputError: a metric that returns something else than one entry for each prompt, or NaN.
    """
    if metric is None:
        return logits
    values = metric(logits)
    if not isinstance(values, Tensor) or values.ndim == 0 or values.shape[0] != batch:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"the metric returned {got}, expected a tensor with one entry for each of the {batch} prompts")
    if values.is_floating_point() and bool(values.isnan().any()):
        raise InputError("the metric returned NaN")
    return values.detach()
