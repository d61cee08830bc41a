"""Variants beside the model as it is, in one sweep, with a guard against experiments that change nothing."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit, as_edits
from interp.errors import InputError
from interp.patching.guard import moves
from interp.patching.metric import MetricFunction, measure, name_of
from interp.patching.options import check_options


class Measured(NamedTuple):
    """The metric without an edit and under every variant, and the sweep's plan in words."""

    base: Float[Tensor, " example"]
    values: Float[Tensor, "variant example"]
    plan: str


def measure_variants(
    vlm: Any,
    inputs: Mapping[str, Any],
    variants: Sequence[Edit | Sequence[Edit]],
    metric: MetricFunction,
    *,
    allow_no_effect: bool = False,
    **options: Any,
) -> Measured:
    """Measure variants and the model as it is, as one sweep.

    Args:
        vlm: the model.
        inputs: prepared or plain model inputs.
        variants: for each variant its edits.
        metric: logits at the last token to one value for each example.
        allow_no_effect: take variants of which none changes the metric.
        options: of `VLM.sweep`.

    Raises:
        InputError: no variants, options that a sweep does not have, a metric that gives NaN, or variants of which none
            changes it for any example.
        ShapeError: a metric that gives other than one value for each example.
    """
    check_options(options)
    if not variants:
        raise InputError("there are no variants to measure")
    edits = [as_edits(one) for one in variants]
    values, plan = measure(vlm, inputs, [[], *edits], metric, **options)
    if not allow_no_effect and not moves(vlm, inputs, edits, values[1:], values[:1].expand_as(values[1:]), metric):
        raise InputError(
            f"none of {len(variants)} variants changes the {name_of(metric)} of any of {values.shape[1]} examples. "
            "Patch other sites or tokens, or allow it with allow_no_effect=True"
        )
    return Measured(values[0], values[1:], plan)
