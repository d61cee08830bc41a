"""What the paper's figures need beside the table: phases of the answer, context embeddings, ensembles of examples."""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError
from interp.inputs import Inputs, PromptLike
from interp.lens import logit_lens, phases
from interp.metrics import first_token_ids
from interp.models.vlm import VLM
from interp.task_vectors import TaskVectors, combine
from interp.tasks import Item
from interp.transfer import score_patches


def answer_phases(
    vlm: VLM, prompts: Sequence[PromptLike], items: Sequence[Item], task_word: str, *, batch_size: int = 32
) -> dict[str, Float[Tensor, "prompt layer"]]:
    """What the last token of few-shot prompts decodes to at each layer: the input, the task, or the answer.

    Args:
        vlm: the model.
        prompts: few-shot prompts with a query.
        items: the queries' items; the first tokens of their text and of their answer are followed.
        task_word: a word that names the task, such as ``"capital"``; its first token after a space is followed.
        batch_size: prompts per forward.

    Returns:
        Probability by the logit lens, for ``input``, ``task`` and ``answer``.

    Source: Luo et al. 2025, figure on the phases of the answer token.
    """
    tokenizer = vlm.tokenizer
    # In the middle of a text: what precedes decides whether the first token carries a space.
    word = first_token_ids(tokenizer, "The", " " + task_word)[0]
    found: dict[str, list[Tensor]] = {"input": [], "task": [], "answer": []}
    for start in range(0, len(prompts), batch_size):
        chunk, some = prompts[start : start + batch_size], items[start : start + batch_size]
        tokens = {
            "input": [first_token_ids(tokenizer, "Q:", item.input)[0] for item in some],
            "task": [word] * len(some),
            "answer": [first_token_ids(tokenizer, "A:", item.output)[0] for item in some],
        }
        for phase, values in phases(logit_lens(vlm, vlm.prepare(chunk)), tokens).items():
            found[phase].append(rearrange(values, "layer prompt -> prompt layer"))
    return {phase: torch.cat(parts) for phase, parts in found.items()}


def context_embeddings(
    vlm: VLM, prompts: Sequence[PromptLike], *, batch_size: int = 32
) -> Float[Tensor, "prompt d_model"]:
    """Mean over a prompt's tokens of what enters the language model, image features in place.

    Source: Luo et al. 2025, t-SNE of contexts (which cluster by modality) against task vectors (by task).
    """
    means = []
    for start in range(0, len(prompts), batch_size):
        inputs = vlm.prepare(prompts[start : start + batch_size])
        with torch.no_grad():
            embeds = vlm.embed(inputs).float().cpu()
        means.append(_mean_over_tokens(embeds, inputs))
    return torch.cat(means)


def _mean_over_tokens(embeds: Float[Tensor, "batch pos d_model"], inputs: Inputs) -> Float[Tensor, "batch d_model"]:
    real: Bool[Tensor, "batch pos 1"] = rearrange(inputs["attention_mask"].bool().cpu(), "batch pos -> batch pos 1")
    return reduce(embeds * real, "batch pos d -> batch d", "sum") / reduce(
        real.float(), "batch pos 1 -> batch 1", "sum"
    )


def ensembles(
    vectors: TaskVectors, instruction: TaskVectors | None, sizes: Sequence[int], *, seed: int
) -> list[TaskVectors]:
    """Means over the first ``r`` vectors of a random order, for growing ``r``.

    Args:
        vectors: one per few-shot prompt.
        instruction: averaged in with equal weight, whatever ``r`` is. None: examples alone.
        sizes: values of ``r``.
        seed: of the order.

    Raises:
        InputError: a size that is not between 1 and the number of prompts.

    Source: Luo et al. 2025, sample efficiency (r = 1 to 6 vectors of 5 examples each).
    """
    if not sizes or min(sizes) < 1 or max(sizes) > vectors.n_prompts:
        raise InputError(
            f"ensemble sizes {list(sizes)} must lie between 1 and {vectors.n_prompts}, the number of prompts"
        )
    order = torch.randperm(vectors.n_prompts, generator=torch.Generator().manual_seed(seed)).tolist()
    means = [combine([vectors.take(order[:size])]) for size in sizes]
    return means if instruction is None else [combine([mean, instruction]) for mean in means]


def ensemble_curve(
    vlm: VLM,
    prompts: Sequence[PromptLike],
    items: Sequence[Item],
    vectors: Sequence[TaskVectors],
    instruction: TaskVectors,
    layer: int,
    sizes: Sequence[int],
    seeds: Sequence[int],
) -> Mapping[str, Float[Tensor, "seed size"]]:
    """Accuracy of ensembles of growing size, with and without the instruction; lower-cased, as in the paper.

    Args:
        vlm: the model.
        prompts: queries without context.
        items: their items.
        vectors: one set per seed.
        instruction: its vector.
        layer: where to patch.
        sizes: numbers of vectors averaged.
        seeds: of the orders, one per set.

    Returns:
        For ``examples`` and ``examples + instruction``, accuracy by seed and size.
    """
    curves = {}
    for label, added in (("examples", None), ("examples + instruction", instruction)):
        flat = [one for v, seed in zip(vectors, seeds, strict=True) for one in ensembles(v, added, sizes, seed=seed)]
        scores = score_patches(vlm, prompts, items, flat, layers=[layer], case_sensitive=False)
        curves[label] = rearrange(scores.accuracy, "(seed size) 1 -> seed size", seed=len(seeds))
    return curves
