"""What a sweep checks of its own results: one variant against a plain forward, and that every edit has an effect."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.edits import Edit, as_edits
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


def check_given(inputs: Any, variants: Any, metric: Any) -> None:
    """Refuse what is no sweep at all, before anything is made of it.

    Args:
        inputs: should be model inputs by name.
        variants: should be several lists of edits.
        metric: should be a function, or None.

    Raises:
        InputError: one of them is something else.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs are {type(inputs).__name__}, expected model inputs by name: vlm.prepare makes them")
    if isinstance(variants, str) or not isinstance(variants, Iterable):
        raise InputError(f"variants={variants!r}: give a list with one list of edits for each variant")
    check_metric(metric, optional=True)


def edits_of(index: int, edits: Any) -> list[Edit]:
    """The edits of one variant, as a list.

    Args:
        index: which variant.
        edits: an edit, or several.

    Raises:
        InputError: something that is no edit.
    """
    try:
        return as_edits(edits)
    except InputError as error:
        raise InputError(f"variant {index}: {error}") from error


def check_metric(metric: Any, *, optional: bool = False) -> None:
    """Refuse a metric that is no function.

    Args:
        metric: what was given as one.
        optional: None is fine.

    Raises:
        InputError: it cannot be called.
    """
    if not callable(metric) and not (optional and metric is None):
        raise InputError(f"metric={metric!r}: give a function of logits, or an object that can be called with them")


def as_values(
    metric: Callable[[Tensor], Tensor] | None, logits: Tensor, batch: int, like: Tensor | None, name: str
) -> Tensor:
    """What is kept of one variant: its logits, or what the metric makes of them.

    Args:
        metric: of the logits as users see them, of which it gets a copy that it may write into.
        logits: ``[batch, vocab]`` or ``[batch, n, vocab]``.
        batch: prompts.
        like: what is kept of the unedited run, whose shape all others have; None: this is it.
        name: of the variant, for errors.

    Raises:
        InputError: a metric that returns something else than one entry for each prompt, NaN, or another shape than for
            the unedited run.
    """
    if metric is None:
        return logits
    values = metric(logits.clone())
    if not isinstance(values, Tensor) or values.ndim == 0 or values.shape[0] != batch:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"the metric returned {got}, expected a tensor with one entry for each of the {batch} prompts")
    if values.is_floating_point() and bool(values.isnan().any()):
        raise InputError("the metric returned NaN")
    if like is not None and values.shape != like.shape:
        raise InputError(
            f"the metric returned {tuple(values.shape)} for {name}, but {tuple(like.shape)} for the unedited run: it "
            "has to give the same shape each time"
        )
    # A copy: a part of the logits would keep all of them, and a metric may use one tensor each time.
    return values.detach().clone()
