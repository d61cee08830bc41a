"""A guard against experiments in which nothing moves the metric, which rounding does not pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit
from interp.errors import InputError
from interp.patching.corruption import run_once
from interp.patching.metric import MetricFunction, name_of

# Variants that are run again by themselves, those that moved the metric most first.
MOST_SUSPECTS = 8


def moves(
    vlm: Any,
    inputs: Mapping[str, Any],
    variants: Sequence[Sequence[Edit]],
    values: Float[Tensor, "variant example"],
    base: Float[Tensor, "variant example"],
    metric: MetricFunction,
    own: Sequence[Sequence[Edit]] | None = None,
) -> bool:
    """Whether any variant changes the metric.

    Work that variants share rounds in another way than a plain forward. So values that lie nearer to the base run than
    logits may are settled by plain forwards with the same kernels: the eight variants that moved the metric most.

    Args:
        vlm: the model.
        inputs: of the base run.
        variants: for each variant its edits.
        values: the metric of each.
        base: the metric of the run that each is compared with.
        metric: of the logits at the last token.
        own: for each variant, the edits that its base run has too, such as noise; None: none.
    """
    distance = (values - base).abs().amax(dim=-1)
    rounding = torch.finfo(vlm.dtype).eps ** 0.5 * max(1.0, float(base.abs().max()))
    if bool((distance > rounding).any()):
        return True
    plain: dict[tuple[int, tuple[str, ...]], Tensor] = {}
    for index in distance.argsort(descending=True, stable=True)[:MOST_SUSPECTS].tolist():
        before = () if own is None else own[index]
        # Reading patterns leaves the fused kernel, as edits of them do.
        taps = tuple(sorted({edit.site for edit in variants[index] if vlm.place(edit.site).side == "pattern"}))
        key = (id(before) if before else 0, taps)
        if key not in plain:
            plain[key] = run_once(vlm, inputs, before, metric, taps).metric
        edited = run_once(vlm, inputs, variants[index], metric, taps).metric
        # The last bits of a sum whose terms were moved around are no effect.
        if not torch.allclose(edited, plain[key], rtol=8 * torch.finfo(torch.float32).eps, atol=0.0):
            return True
    return False


def no_patch_moves(n: int, metric: MetricFunction) -> InputError:
    """The error for patches of which none moves the metric."""
    return InputError(
        f"none of the {n} patches moves {name_of(metric)} by anything: what they patch does not reach the last token "
        "(allow_no_effect=True returns the values as they are)"
    )
