"""Transfer: put task vectors into queries, at every layer in one sweep, and score the answers' first token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.edits import Edit
from interp.errors import InputError
from interp.inputs import PromptLike
from interp.metrics import answer_rank, exact_match, first_token_ids, prefix_match, token_log_prob
from interp.models.vlm import VLM
from interp.prompts import Prompt
from interp.task_vectors import TaskVectors
from interp.tasks import Item


@dataclass(frozen=True, eq=False)
class Scores:
    """Greedy first tokens and how good they are; the leading axes are those of the variants that ran.

    Args:
        prefix: the official metric: the token's text is a prefix of an answer, or the other way round.
        log_prob: natural log-probability of the answer's first token.
        rank: how many tokens are likelier than it.
        token: the greedy token's id.
    """

    prefix: Bool[Tensor, "*variant query"]
    log_prob: Float[Tensor, "*variant query"]
    rank: Int[Tensor, "*variant query"]
    token: Int[Tensor, "*variant query"]

    @property
    def accuracy(self) -> Float[Tensor, "*variant"]:
        """Share of queries that the official metric counts as correct."""
        return self.prefix.float().mean(dim=-1)

    def __getitem__(self, index: int | tuple[int, ...]) -> "Scores":
        """Scores of some variants."""
        return Scores(self.prefix[index], self.log_prob[index], self.rank[index], self.token[index])

    def answers(self, vlm: VLM) -> np.ndarray:
        """The greedy tokens as text, in the scores' shape."""
        texts = [vlm.tokenizer.decode([token]) for token in self.token.flatten().tolist()]
        return np.array(texts, dtype=object).reshape(self.token.shape)


def score_first_token(
    vlm: VLM,
    logits: Float[Tensor, "*variant query vocab"],
    prompts: Sequence[PromptLike],
    items: Sequence[Item],
    *,
    case_sensitive: bool = True,
) -> Scores:
    """Score logits at the last position of queries against the items' answers.

    Args:
        vlm: for its tokenizer.
        logits: at each query's last token.
        prompts: the queries, which say how an answer is tokenised after them.
        items: what each query asks for; any of an item's answers counts for ``prefix``.
        case_sensitive: whether ``prefix`` is.

    Raises:
        InputError: another number of items or prompts than of queries, or an answer without a first token of its own.

    Source: Luo et al. 2025, official metric; rank as in Todd et al. 2024.
    """
    if len(items) != logits.shape[-2] or len(prompts) != len(items):
        raise InputError(f"{len(items)} items and {len(prompts)} prompts for logits of {logits.shape[-2]} queries")
    logits = logits.float().cpu()
    tokens = logits.argmax(dim=-1)
    right = torch.zeros(logits.shape[-2:], dtype=torch.bool)
    for token in tokens.unique().tolist():
        text = vlm.tokenizer.decode([token])
        right[:, token] = torch.tensor(
            [prefix_match(text, item.answers, case_sensitive=case_sensitive) for item in items]
        )
    prefix = right.expand(logits.shape).gather(-1, tokens[..., None])[..., 0]
    wanted = [
        first_token_ids(vlm.tokenizer, _as_text(p), item.output)[0] for p, item in zip(prompts, items, strict=True)
    ]
    flat = logits.reshape(-1, *logits.shape[-2:])
    log_prob = torch.stack([token_log_prob(one, wanted) for one in flat]).reshape(tokens.shape)
    rank = torch.stack([answer_rank(one, wanted) for one in flat]).reshape(tokens.shape)
    return Scores(prefix, log_prob, rank, tokens)


def _as_text(prompt: PromptLike) -> str | Prompt:
    return prompt[0] if isinstance(prompt, tuple) else prompt


def score_prompts(vlm: VLM, prompts: Sequence[PromptLike], items: Sequence[Item], *, batch_size: int = 32) -> Scores:
    """Score prompts as they are (no context, few-shot prompts, instructions), without any edit.

    Args:
        vlm: the model.
        prompts: one per item; they end where the answer begins.
        items: what each asks for.
        batch_size: prompts per forward.

    Raises:
        InputError: no prompts, another number of items, a prompt that cannot be read, or an answer without a first
            token of its own.
    """
    parts = []
    for chunk in _chunks(prompts, items, batch_size):
        with torch.no_grad():
            logits = vlm(vlm.prepare(chunk[0]), logits_to_keep=1).logits[:, -1]
        parts.append(score_first_token(vlm, logits, *chunk))
    return _join(parts)


def score_patches(
    vlm: VLM,
    prompts: Sequence[PromptLike],
    items: Sequence[Item],
    vectors: Sequence[TaskVectors],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
    case_sensitive: bool = True,
    allow_no_effect: bool = False,
) -> Scores:
    """Put each set of task vectors into each query's last token, at each layer, as one sweep.

    Every image is encoded once and every token before the last runs once, however many vectors and layers there are.

    Args:
        vlm: the model.
        prompts: the queries.
        items: what each asks for.
        vectors: sets of task vectors, of this model or of one of the same shape.
        layers: blocks to patch. None: all.
        batch_size: queries per sweep.
        case_sensitive: whether the official metric is.
        allow_no_effect: let vectors pass that change nothing, such as the query's own.

    Returns:
        Scores ``[vectors, layer, query]``.

    Raises:
        ShapeError: vectors of another width or depth; nothing has run then.
        InputError: no vectors, a layer that does not exist, no prompts, another number of items, a prompt that cannot
            be read, an answer without a first token of its own, or vectors that change nothing.
    """
    if not vectors:
        raise InputError("no task vectors to transfer")
    for one in vectors:
        one.check(vlm)
    layers = list(range(vlm.n_layers)) if layers is None else list(layers)
    variants = [one.patch(layer, vlm) for one in vectors for layer in layers]
    parts = []
    for chunk in _chunks(prompts, items, batch_size):
        swept = vlm.sweep(vlm.prepare(chunk[0]), variants, allow_no_effect=allow_no_effect)
        logits = swept.logits.reshape(len(vectors), len(layers), len(chunk[0]), -1)
        parts.append(score_first_token(vlm, logits, *chunk, case_sensitive=case_sensitive))
    return _join(parts)


def generate_answers(
    vlm: VLM,
    prompts: Sequence[PromptLike],
    *,
    edits: Sequence[Edit] = (),
    max_new_tokens: int = 12,
    batch_size: int = 32,
) -> list[str]:
    """Greedy answers in full, up to the first line break.

    Args:
        vlm: the model.
        prompts: one per answer.
        edits: in force for each batch, applied at prefill.
        max_new_tokens: at most.
        batch_size: prompts per generation.

    Raises:
        InputError: a prompt that cannot be read or is too long, or a model without a tokenizer.
        UnknownNameError, SiteUnavailableError, ShapeError: bad sites, positions or values of edits.
        NeverFiredError: an edit that changed nothing.
    """
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = vlm.prepare(prompts[start : start + batch_size])
        texts = vlm.generate(
            inputs,
            edits=edits,
            max_new_tokens=max_new_tokens,
            decode=True,
            stop_strings=["\n"],
            tokenizer=vlm.tokenizer,
        )
        answers += [str(text).split("\n")[0].strip() for text in texts]
    return answers


def exact_accuracy(answers: Sequence[str], items: Sequence[Item]) -> float:
    """Share of full answers that equal one of their item's answers."""
    return float(np.mean([exact_match(answer, item.answers) for answer, item in zip(answers, items, strict=True)]))


def choose_layer(accuracy: Float[Tensor, "*run layer"]) -> int:
    """The layer of highest accuracy averaged over everything else; the lowest one on ties.

    Args:
        accuracy: on *validation* queries, for any number of tasks, seeds or conditions.

    Source: Luo et al. 2025: one layer per model, argmax of the task-averaged validation accuracy.
    """
    means = accuracy.reshape(-1, accuracy.shape[-1]).double().mean(dim=0)
    # Sums over many runs round differently at layers that are right equally often.
    return int((means > means.max() - 1e-6).int().argmax())


def _chunks(
    prompts: Sequence[PromptLike], items: Sequence[Item], size: int
) -> list[tuple[Sequence[PromptLike], Sequence[Item]]]:
    if len(prompts) != len(items) or not prompts:
        raise InputError(f"{len(prompts)} prompts for {len(items)} items: give one prompt per item, at least one")
    return [(prompts[i : i + size], items[i : i + size]) for i in range(0, len(prompts), size)]


def _join(parts: Sequence[Scores]) -> Scores:
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=-1)

    return Scores(cat("prefix"), cat("log_prob"), cat("rank"), cat("token"))
