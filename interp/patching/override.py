"""Task override: a task vector against a prompt that asks for something else. Which of the two answers wins?

Sources: Luo et al. 2025, section on task overriding (an instruction's vector patched under a conflicting question);
Hendel et al. 2023, section 5 (original task against patched task).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp.edits import Replace
from interp.errors import InputError
from interp.models.vlm import VLM
from interp.patching.metric import Answers, logit_difference, measure
from interp.patching.options import check_draws
from interp.patching.result import PatchingResult
from interp.patching.tokens import followed
from interp.patching.variants import measure_variants
from interp.task_vectors import SITE, TaskVectors, random_like


def override(
    vlm: VLM,
    inputs: Mapping[str, Any],
    vectors: TaskVectors | Mapping[str, TaskVectors],
    wanted: Answers,
    asked: Answers,
    *,
    layers: Sequence[int] | None = None,
    at: Any = "last",
    reference: Mapping[str, Any] | None = None,
    n_controls: int = 3,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Put task vectors into prompts that ask for another task, at every layer in one sweep.

    Args:
        vlm: the model.
        inputs: prompts with a conflicting instruction, question or context, prepared or plain.
        vectors: of the task that is to win; or several by name, such as another task's beside it.
        wanted: for every example the answer of the vectors' task, as text or as its first token's id.
        asked: the same of the answer that the prompt asks for.
        layers: blocks to patch; None: all.
        at: the token.
        reference: prompts that ask for the vector's task themselves; the scale's 1.
        n_controls: random vectors of the same norms, layer by layer.
        seed: of their draws; every named vector has random ones of its own.
        allow_no_effect: take variants of which none changes the metric.
        options: of `VLM.sweep`, such as ``max_rows``.

    Returns:
        The logit of the vector's answer less that of the prompt's: axes ``vector`` and ``layer``. Above 0 the vector
        wins. ``corrupt`` is the prompt's own, ``clean`` that of ``reference``. Control ``"random vector"``.

    Raises:
        InputError: no vectors, bad layers, another number of tokens than of examples, answers that share
            their first token.
        ShapeError: vectors of another model's shape.
    """
    check_draws(n_controls=n_controls)
    named = {"task vector": vectors} if isinstance(vectors, TaskVectors) else dict(vectors)
    chosen = list(range(vlm.n_layers)) if layers is None else list(layers)
    if not named or not chosen or not all(0 <= layer < vlm.n_layers for layer in chosen):
        raise InputError(f"{len(named)} task vectors at layers {chosen} of 0 to {vlm.n_layers - 1}")
    difference = logit_difference(vlm, wanted, asked, inputs=followed(inputs, wanted, asked))
    patched = [one.at(layer) for one in _checked(named, vlm) for layer in chosen]
    for draw in range(n_controls):
        noise = [random_like(one, seed=seed + draw * len(named) + k) for k, one in enumerate(named.values())]
        patched += [one.at(layer) for one in noise for layer in chosen]
    layer_of = [layer for _ in range((1 + n_controls) * len(named)) for layer in chosen]
    variants = [Replace(SITE.format(layer=layer), one, at=at) for layer, one in zip(layer_of, patched, strict=True)]
    measured = measure_variants(vlm, inputs, variants, difference, allow_no_effect=allow_no_effect, **options)
    values = measured.values.reshape(1 + n_controls, len(named), len(chosen), -1)
    clean = None if reference is None else measure(vlm, reference, [[]], difference, progress=False)[0][0]
    return PatchingResult(
        name="override",
        metric="logit difference",
        values=values[0],
        axes={"vector": tuple(named), "layer": tuple(map(str, chosen))},
        clean=clean,
        corrupt=measured.base,
        controls={"random vector": values[1:]} if n_controls else {},
        about={
            "model": vlm.name,
            "at": at if isinstance(at, str | int) else repr(at),
            "seed": seed,
            "plan": measured.plan,
        },
    )


def wins(result: PatchingResult) -> Float[Tensor, "vector layer"]:
    """The share of examples in which the vector's answer is likelier than the prompt's.

    Args:
        result: of `override`.
    """
    return (result.values > 0).float().mean(dim=-1)


def _checked(named: Mapping[str, TaskVectors], vlm: VLM) -> list[TaskVectors]:
    for one in named.values():
        one.check(vlm)
    return list(named.values())
