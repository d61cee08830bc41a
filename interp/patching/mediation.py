"""Causal mediation by heads: which head's output makes a label-shuffled prompt give the right answer again?

A head's mean output over prompts that state a task is put into prompts whose labels are shuffled, which state none. The
change in the probability of the right answer is that head's indirect effect. Source: Todd et al. 2024, "Function
Vectors in Large Language Models", section 2.3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.metrics import first_token_ids
from interp.models.vlm import VLM
from interp.patching.head_vectors import HeadOutputs, layout, replace_heads
from interp.patching.metric import Answers, MetricFunction, TokenMetric, log_probability, measure, name_of
from interp.patching.result import PatchingResult
from interp.patching.variants import measure_variants
from interp.prompts import FV, Prompt, Template, few_shot
from interp.task_prompts import examples, item_input
from interp.tasks import Draw, Item, Modality, Task, draw_exemplars, shuffled_labels

# Prompts tried for every one that the model answers correctly, before giving up.
_TRIES = 10


@dataclass(frozen=True)
class MediationPrompts:
    """The prompts of one mediation analysis.

    Args:
        task: few-shot prompts that the model answers correctly: mean outputs of heads are read from these.
        shuffled: few-shot prompts whose examples have each other's labels; or the queries alone.
        unshuffled: the same queries behind examples with their own labels.
        answers: the right answers of the queries of ``shuffled``, as they follow the prompt.
        items: of those queries.
    """

    task: tuple[Prompt, ...]
    shuffled: tuple[Prompt, ...]
    unshuffled: tuple[Prompt, ...]
    answers: tuple[str, ...]
    items: tuple[Item, ...]


def mediation_prompts(
    vlm: VLM,
    task: Task,
    modality: Modality,
    *,
    n_shots: int = 10,
    n_task: int = 100,
    n_shuffled: int = 25,
    corruption: str = "shuffle",
    template: Template = FV,
    seed: int = 0,
    batch_size: int = 16,
) -> MediationPrompts:
    """Write the prompts of a mediation analysis of one task, from its validation items.

    Args:
        vlm: the model, which has to answer the task prompts correctly.
        task: the task.
        modality: of examples and queries.
        n_shots: examples per prompt.
        n_task: prompts that the model answers correctly.
        n_shuffled: label-shuffled prompts.
        corruption: ``"shuffle"`` the labels, as in the paper; or ``"remove"`` the examples, for a model that knows the
            task by the kind of its labels alone, so that shuffled prompts lose nothing.
        template: how an example is written.
        seed: of the draws.
        batch_size: prompts per forward.

    Raises:
        InputError: fewer items than shots, examples that all have one answer, or a model that answers too few.

    Source: Todd et al. 2024, section 2.3 and appendix (10 shots, 100 correct prompts, 25 label-shuffled ones).
    """
    if corruption not in ("shuffle", "remove"):
        raise InputError(f"corruption={corruption!r}: give 'shuffle' or 'remove'")
    if min(n_task, n_shuffled, n_shots) < 1:
        raise InputError(f"n_shots={n_shots}, n_task={n_task}, n_shuffled={n_shuffled}: each has to be 1 or more")
    rounds = _rounds(task, n_shots, seed)
    right: list[Prompt] = []
    tried = 0
    while len(right) < n_task and tried < _TRIES * n_task:
        chunk = [next(rounds) for _ in range(batch_size)]
        prompts = [_prompt(draw, draw.exemplars, modality, template) for draw in chunk]
        wanted = [
            first_token_ids(vlm.tokenizer, prompt, template.before_answer + draw.query.output)[0]
            for prompt, draw in zip(prompts, chunk, strict=True)
        ]
        with torch.no_grad():
            given = vlm(vlm.prepare(prompts), logits_to_keep=1).logits[:, -1].argmax(dim=-1).tolist()
        right += [prompt for prompt, want, got in zip(prompts, wanted, given, strict=True) if want == got]
        tried += len(chunk)
    if len(right) < n_task:
        raise InputError(
            f"{vlm.name} answers {len(right)} of {tried} {n_shots}-shot {modality} prompts of {task.name!r}, and "
            f"n_task={n_task} correct ones are needed: ask for fewer, or take a task that the model can do"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled, unshuffled, items = [], [], []
    for _ in range(n_shuffled):
        draw = next(rounds)
        draws_seed = int(torch.randint(2**31, (), generator=generator))
        mixed = () if corruption == "remove" else shuffled_labels(draw.exemplars, seed=draws_seed)
        shuffled.append(_prompt(draw, mixed, modality, template))
        unshuffled.append(_prompt(draw, draw.exemplars, modality, template))
        items.append(draw.query)
    answers = tuple(template.before_answer + item.output for item in items)
    return MediationPrompts(tuple(right[:n_task]), tuple(shuffled), tuple(unshuffled), answers, tuple(items))


@dataclass(frozen=True, eq=False)
class Probability:
    """The probability of each example's answer token: logits ``[example, vocab]`` to ``[example]``.

    Args:
        log: its logarithm.
        name: what it measures.
    """

    log: TokenMetric
    name: str = "probability"

    def __call__(self, logits: Float[Tensor, "example vocab"]) -> Float[Tensor, " example"]:
        """The probability of every example, in float32."""
        return self.log(logits).exp()


def probability(vlm: VLM, answers: Answers, *, inputs: Any = None) -> Probability:
    """The probability of the answer's first token, by which indirect effects are measured.

    Args:
        vlm, answers, inputs: as for `interp.patching.metric.log_probability`.

    Raises:
        InputError: an answer that has no token.

    Source: Todd et al. 2024, equation 3.
    """
    return Probability(log_probability(vlm, answers, inputs=inputs))


def mediation(
    vlm: VLM,
    inputs: Mapping[str, Any],
    outputs: HeadOutputs,
    metric: MetricFunction,
    *,
    clean: Mapping[str, Any] | None = None,
    at: Any = "last",
    control: bool = True,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Put each head's mean output into prompts without a task, one head at a time, as one sweep.

    Args:
        vlm: the model, with text or with images.
        inputs: label-shuffled prompts, prepared or plain.
        outputs: mean outputs of all heads over prompts that state the task (`head_outputs`).
        metric: logits [batch, vocab] at the last position -> [batch]; the probability of the right answer's first token
            in the paper (`probability`).
        clean: the same prompts with their own labels; the scale's 1.
        at: the token whose head outputs are replaced.
        control: also put a random vector of the same norm into each head.
        seed: of those vectors.
        allow_no_effect: take heads whose replacement changes nothing, such as ones without output weights.
        options: of `VLM.sweep`, such as ``max_rows``.

    Returns:
        Axes ``layer`` and ``head``; ``corrupt`` is the metric of the prompts as they are. Control ``"random vector"``.
        `indirect_effects` averages the change.

    Raises:
        ShapeError: outputs of another shape than the model's heads.
        InputError: a metric that gives NaN; clean prompts of another number.

    Source: Todd et al. 2024, section 2.3, equations 3 and 4.
    """
    n_layers, n_heads, d_head = layout(vlm)
    if tuple(outputs.shape) != (n_layers, n_heads, d_head):
        raise ShapeError(f"outputs of shape {tuple(outputs.shape)}: {vlm.name} has {(n_layers, n_heads, d_head)}")
    counts = [len(one["input_ids"]) for one in (inputs, *([] if clean is None else [clean]))]
    if len(set(counts)) > 1:
        raise InputError(f"{counts[1]} clean prompts for {counts[0]} label-shuffled ones: give the same, unshuffled")
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    variants = [replace_heads(outputs, [one], at=at) for one in heads]
    if control:
        noise = random_outputs(outputs, seed=seed)
        variants += [replace_heads(noise, [one], at=at) for one in heads]
    measured = measure_variants(vlm, inputs, variants, metric, allow_no_effect=allow_no_effect, **options)
    values = measured.values.reshape(1 + control, n_layers, n_heads, -1)
    best = None if clean is None else measure(vlm, clean, [[]], metric, progress=False)[0][0]
    return PatchingResult(
        name="mediation",
        metric=name_of(metric),
        values=values[0],
        axes={"layer": tuple(map(str, range(n_layers))), "head": tuple(map(str, range(n_heads)))},
        clean=best,
        corrupt=measured.base,
        controls={"random vector": values[1]} if control else {},
        about={"model": vlm.name, "at": at if isinstance(at, str | int) else repr(at), "seed": seed,
               "plan": measured.plan},
    )  # fmt: skip


def indirect_effects(result: PatchingResult) -> Float[Tensor, "layer head"]:
    """The average indirect effect of every head: the mean change of the metric.

    Args:
        result: of `mediation`.

    Raises:
        InputError: a result without the metric of the unpatched prompts.
    """
    if result.corrupt is None:
        raise InputError(f"{result.name}: the metric of the unpatched prompts is not known")
    return (result.values - result.corrupt).mean(dim=-1)


def random_outputs(outputs: HeadOutputs, *, seed: int) -> HeadOutputs:
    """Random directions with the norms of given head outputs: a control."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(outputs.shape, generator=generator)
    return noise / noise.norm(dim=-1, keepdim=True) * outputs.norm(dim=-1, keepdim=True)


def _rounds(task: Task, n_shots: int, seed: int) -> Any:
    """Draws without end: each round asks for every validation item once, with fresh examples."""
    while True:
        yield from draw_exemplars(task, n_shots, seed=seed, split="validation")
        seed += 1


def _prompt(draw: Draw, exemplars: Sequence[Item], modality: Modality, template: Template) -> Prompt:
    return few_shot(examples(exemplars, modality), item_input(draw.query, modality), template=template)
