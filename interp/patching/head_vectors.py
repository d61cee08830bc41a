"""Mean outputs of attention heads, and sets of heads whose outputs are put into prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit, Replace
from interp.errors import InputError, ShapeError
from interp.inputs import PromptLike
from interp.models.vlm import VLM
from interp.patching.heads import HEAD, Head, as_heads
from interp.patching.metric import MetricFunction, name_of
from interp.patching.options import check_draws
from interp.patching.result import PatchingResult
from interp.patching.variants import measure_variants
from interp.where import When

SITE = "blocks.{layer}." + HEAD

HeadOutputs = Float[Tensor, "layer head d_head"]


def head_outputs(
    vlm: VLM, prompts: Sequence[PromptLike] | Mapping[str, Any], at: Any = "last", *, batch_size: int = 16
) -> HeadOutputs:
    """The mean output of every attention head over prompts, at one token: its slice of the output projection's input.

    Args:
        vlm: the model.
        prompts: prompts, or model inputs of one batch.
        at: one token by meaning.
        batch_size: prompts per forward.

    Returns:
        Float32, averaged in double precision.

    Raises:
        InputError: no prompts, a position that is several tokens, or heads whose number or size differs by layer.
        UnknownNameError: a position that a prompt lacks.

    Source: Todd et al. 2024, section 2.3 (mean task-conditioned activations).
    """
    if not isinstance(prompts, Mapping) and not prompts:
        raise InputError("the mean output of heads needs at least one prompt")
    layout(vlm)
    total, count = torch.zeros(()), 0
    starts = range(1) if isinstance(prompts, Mapping) else range(0, len(prompts), batch_size)
    for start in starts:
        inputs = prompts if isinstance(prompts, Mapping) else vlm.prepare(prompts[start : start + batch_size])
        z = vlm.capture(inputs, SITE.format(layer="*"), at=at, logits_to_keep=1).stack("attn.hook_z").double().cpu()
        if z.ndim != 4:
            raise InputError(f"the output of heads is read at one token, but {at!r} selects {z.shape[2]}")
        total, count = total + z.sum(dim=1), count + z.shape[1]
    return (total / count).float()


def layout(vlm: VLM) -> tuple[int, int, int]:
    """Layers, heads and head size of a language model's attention.

    Raises:
        InputError: heads whose number or size differs by layer.
    """
    places = [vlm.place(SITE.format(layer=layer)) for layer in range(vlm.n_layers)]
    sizes = {(place.n_heads, place.width) for place in places}
    if len(sizes) > 1:
        raise InputError(f"{vlm.name} has heads of different numbers or sizes: {sorted(sizes, key=str)}")
    n_heads, d_head = sizes.pop()
    return vlm.n_layers, int(n_heads or 0), int(d_head or 0)


def check_heads(heads: Sequence[Sequence[int]], n_layers: int, n_heads: int) -> list[Head]:
    """Refuse a set with no head, with one twice, or with one that does not exist.

    Returns:
        The heads as (layer, head).

    Raises:
        InputError: such a set.
    """
    if not heads:
        raise InputError("a set of heads needs at least one")
    heads = as_heads(heads)
    wrong = [head for head in heads if not (0 <= head[0] < n_layers and 0 <= head[1] < n_heads)]
    if wrong or len(set(heads)) < len(heads):
        what = f"{wrong[0]} does not exist" if wrong else "a head occurs twice"
        raise InputError(f"heads {heads}: {what}; there are {n_layers} layers of {n_heads} heads")
    return heads


def replace_heads(
    outputs: HeadOutputs, heads: Sequence[Sequence[int]], *, at: Any = "last", when: When = "prefill"
) -> list[Edit]:
    """The edits that put outputs in place of what heads give at one token.

    Args:
        outputs: of every head, such as from `head_outputs`.
        heads: (layer, head) of those to replace.
        at: the token.
        when: ``"every"`` replaces them at every decoded token too.

    Returns:
        One edit for every layer that has such heads.

    Raises:
        InputError: no heads, or one that does not exist.

    Source: Huang et al. 2024 (multimodal task vectors: replace chosen heads at the last token of every step).
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(check_heads(heads, *outputs.shape[:2])):
        by_layer.setdefault(layer, []).append(head)
    return [
        Replace(SITE.format(layer=layer), outputs[layer, chosen], heads=chosen, at=at, when=when)
        for layer, chosen in by_layer.items()
    ]


def strongest_heads(effects: Float[Tensor, "layer head"], k: int = 10) -> tuple[Head, ...]:
    """The heads of largest effect, largest first; earlier heads first on ties.

    Args:
        effects: such as average indirect effects.
        k: how many.

    Raises:
        InputError: fewer than one, or more than there are.

    Source: Todd et al. 2024, section 2.3 (10 heads for GPT-J, more for larger models).
    """
    if not 1 <= k <= effects.numel():
        raise InputError(f"k={k}: there are {effects.numel()} heads")
    order = effects.flatten().argsort(descending=True, stable=True)[:k].tolist()
    return tuple((index // effects.shape[1], index % effects.shape[1]) for index in order)


def random_heads(n_layers: int, n_heads: int, k: int, generator: torch.Generator) -> tuple[Head, ...]:
    """A set of heads drawn without replacement.

    Raises:
        InputError: fewer than one, or more than there are.
    """
    if not 1 <= k <= n_layers * n_heads:
        raise InputError(f"k={k}: there are {n_layers * n_heads} heads")
    drawn = torch.randperm(n_layers * n_heads, generator=generator)[:k].sort().values.tolist()
    return tuple((index // n_heads, index % n_heads) for index in drawn)


def put_heads(
    vlm: VLM,
    inputs: Mapping[str, Any],
    heads: Mapping[str, Sequence[Sequence[int]]],
    outputs: Mapping[str, HeadOutputs],
    metric: MetricFunction,
    *,
    at: Any = "last",
    clean: Float[Tensor, " example"] | None = None,
    n_controls: int = 5,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Put sets of heads' outputs into queries: does a set found in one modality carry the task in another?

    Args:
        vlm: the model.
        inputs: queries that do not say the task, prepared or plain.
        heads: label -> set, such as those found with text prompts and those found with image prompts.
        outputs: label -> what to put there, such as mean outputs over text prompts and over image prompts.
        metric: logits [batch, vocab] at the last position -> [batch].
        at: the token.
        clean: the metric of prompts that say the task, for a scale from 0 to 1.
        n_controls: draws of random heads, as many as each set has.
        seed: of the draws.
        allow_no_effect: take variants of which none changes the metric.
        options: of `VLM.sweep`, such as ``max_rows``.

    Returns:
        Axes ``heads`` and ``outputs``; ``corrupt`` is the metric without an edit. Control ``"random heads"``.

    Raises:
        InputError: no sets or outputs, bad heads, or a metric that gives NaN.
        ShapeError: outputs of another shape than the model's heads.
    """
    check_draws(n_controls=n_controls)
    n_layers, n_heads, d_head = layout(vlm)
    if not heads or not outputs:
        raise InputError("give at least one set of heads and one set of outputs")
    for label, values in outputs.items():
        if tuple(values.shape) != (n_layers, n_heads, d_head):
            raise ShapeError(
                f"outputs {label!r} of shape {tuple(values.shape)}: expected {(n_layers, n_heads, d_head)}"
            )
    generator = torch.Generator().manual_seed(seed)
    sets: list[Sequence[Head]] = [check_heads(one, n_layers, n_heads) for one in heads.values()]
    for _ in range(n_controls):
        sets += [random_heads(n_layers, n_heads, len(one), generator) for one in heads.values()]
    edits = [replace_heads(values, one, at=at) for one in sets for values in outputs.values()]
    measured = measure_variants(vlm, inputs, edits, metric, allow_no_effect=allow_no_effect, **options)
    values = measured.values.reshape(1 + n_controls, len(heads), len(outputs), -1)
    return PatchingResult(
        name="head sets",
        metric=name_of(metric),
        values=values[0],
        axes={"heads": tuple(heads), "outputs": tuple(outputs)},
        clean=clean,
        corrupt=measured.base,
        controls={"random heads": values[1:]} if n_controls else {},
        about={
            "model": vlm.name,
            "heads": {label: [list(head) for head in one] for label, one in heads.items()},
            "seed": seed,
            "plan": measured.plan,
        },
    )
