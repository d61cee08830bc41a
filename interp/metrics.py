"""How good an answer is: string metrics, log-probabilities, ranks, and intervals over items and seeds."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.prompts import Prompt, shorten

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def prefix_match(prediction: str, answers: str | Sequence[str], *, case_sensitive: bool = True) -> bool:
    """Official metric: both stripped and not empty, and one is a prefix of the other.

    It is loose: a prediction of one character matches every answer that begins with it. An empty prediction
    or bare white space is wrong.

    Args:
        prediction: generated text, usually one token.
        answers: the right answer, or several of which any will do.
        case_sensitive: the sample-efficiency experiment of the paper compares lower-cased.

    Returns:
        Whether it counts as correct.

    Source: Luo, Darrell & Bar 2025, official code.
    """
    given = _stripped(prediction, case_sensitive)
    return bool(given) and any(
        answer and (answer.startswith(given) or given.startswith(answer))
        for answer in (_stripped(answer, case_sensitive) for answer in _answers(answers))
    )


def exact_match(prediction: str, answers: str | Sequence[str], *, case_sensitive: bool = True) -> bool:
    """Whether the prediction equals an answer once both are stripped; empty is never right.

    Args:
        prediction: generated text.
        answers: the right answer, or several of which any will do.
        case_sensitive: False lower-cases both.

    Source: Hendel et al. 2023 (strip, exact).
    """
    given = _stripped(prediction, case_sensitive)
    return bool(given) and given in {_stripped(answer, case_sensitive) for answer in _answers(answers)}


def squad_normalise(text: str) -> str:
    """Lower-case, drop punctuation and the articles a, an, the, and join on single spaces.

    Source: the SQuAD evaluation script, as in Todd et al. 2024.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(prediction: str, answers: str | Sequence[str]) -> bool:
    """Whether the SQuAD-normalised prediction equals a normalised answer."""
    return any(squad_normalise(prediction) == squad_normalise(answer) for answer in _answers(answers))


def squad_f1(prediction: str, answers: str | Sequence[str]) -> float:
    """F1 of the SQuAD-normalised words, of the answer that fits best.

    Args:
        prediction: generated text.
        answers: the right answer, or several.

    Returns:
        Between 0 and 1; 1 if both are empty once normalised.
    """
    return max(_f1(squad_normalise(prediction).split(), squad_normalise(a).split()) for a in _answers(answers))


def first_word_match(prediction: str, answers: str | Sequence[str]) -> bool:
    """Whether the first SQuAD-normalised word is that of an answer; without a word it is wrong.

    Source: Todd et al. 2024 (first-word score).
    """
    words = squad_normalise(prediction).split()
    return bool(words) and any(squad_normalise(a).split()[:1] == words[:1] for a in _answers(answers))


def score_rows(predictions: Sequence[str], items: Sequence[Any], **columns: Any) -> list[dict[str, str | bool | float]]:
    """Score every prediction by every string metric: one row per item, for a table.

    Args:
        predictions: generated texts.
        items: ``tasks.Item``s in the same order; any of an item's answers counts.
        columns: what all rows share (task, seed, condition, layer, ...).

    Returns:
        Rows with ``columns``, then item, prediction, answer, prefix, prefix_uncased, exact, squad_em,
        squad_f1 and first_word.

    Raises:
        ShapeError: not as many predictions as items.
    """
    if len(predictions) != len(items):
        raise ShapeError(f"There are {len(predictions)} predictions for {len(items)} items.")
    return [
        {
            **columns,
            "item": item.id or item.input,
            "prediction": prediction,
            "answer": item.output,
            "prefix": prefix_match(prediction, item.answers),
            "prefix_uncased": prefix_match(prediction, item.answers, case_sensitive=False),
            "exact": exact_match(prediction, item.answers),
            "squad_em": squad_exact_match(prediction, item.answers),
            "squad_f1": squad_f1(prediction, item.answers),
            "first_word": first_word_match(prediction, item.answers),
        }
        for prediction, item in zip(predictions, items, strict=True)
    ]


def answer_token_ids(tokenizer: Any, prompt: str | Prompt, answer: str) -> list[int]:
    """The tokens that an answer adds to a prompt: tokens(prompt + answer) minus tokens(prompt).

    Args:
        tokenizer: a tokenizer of transformers.
        prompt: what the answer follows, image placeholders included.
        answer: the answer.

    Returns:
        Its token ids. Some tokenizers put a bare space token first.

    Raises:
        InputError: the answer is empty or changes the prompt's own tokens (a merge across the border).
    """
    text = prompt.text if isinstance(prompt, Prompt) else prompt
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text + answer, add_special_tokens=False)["input_ids"]
    if not answer or len(whole) <= len(before):
        raise InputError(f"The answer {answer!r} adds no token to the prompt {shorten(text[-60:])!r}.")
    if whole[: len(before)] != before:
        raise InputError(
            f"The answer {answer!r} changes the tokens of the prompt it follows (...{text[-20:]!r}): the "
            "tokenizer merges across the border, so the answer has no first token of its own. Move a space "
            "at the end of the prompt to the answer, or use another template."
        )
    return list(whole[len(before) :])


def first_token_ids(tokenizer: Any, prompt: str | Prompt, answers: str | Sequence[str]) -> list[int]:
    """The first token of each answer where it follows the prompt.

    Args:
        tokenizer: a tokenizer of transformers.
        prompt: what the answers follow.
        answers: one answer or several.

    Returns:
        One id per answer.

    Raises:
        InputError: as ``answer_token_ids``.
    """
    return [answer_token_ids(tokenizer, prompt, answer)[0] for answer in _answers(answers)]


class AnswerLogProb(NamedTuple):
    """Natural log-probabilities of an answer: of all its tokens together, and of its first."""

    total: Float[Tensor, " batch"]
    first: Float[Tensor, " batch"]


def answer_log_prob(
    logits: Float[Tensor, "batch pos vocab"],
    input_ids: Int[Tensor, "batch pos"],
    positions: Sequence[Sequence[int]],
) -> AnswerLogProb:
    """Log-probability of answers that stand in the inputs (teacher forcing).

    Args:
        logits: of a forward over prompt and answer.
        input_ids: what the forward read.
        positions: for each row the indexes of its answer's tokens, in order, as from
            ``resolve("output[-1]", inputs.layout, inputs.seq_len)``; the position before predicts each.

    Returns:
        For each row the sum over the answer's tokens and the term of the first one, in float32 nats.

    Raises:
        ShapeError: not one list of positions per row.
        InputError: a row without answer tokens, or an answer at the very start, which nothing predicts.
    """
    if len(positions) != len(input_ids):
        raise ShapeError(f"There are positions for {len(positions)} rows, but {len(input_ids)} rows of inputs.")
    totals, firsts = [], []
    for row, tokens in enumerate(positions):
        if not tokens or min(tokens) < 1:
            raise InputError(
                f"Row {row}: answer positions must not be empty and start after the first token: {tokens}."
            )
        at = torch.tensor(list(tokens), device=logits.device)
        terms = token_log_prob(logits[row, at - 1], input_ids[row, at])
        totals.append(terms.sum())
        firsts.append(terms[0])
    return AnswerLogProb(torch.stack(totals), torch.stack(firsts))


def token_log_prob(
    logits: Float[Tensor, "batch vocab"], token_ids: Int[Tensor, " batch"] | Sequence[int]
) -> Float[Tensor, " batch"]:
    """Natural log-probability of one token per row, in float32.

    Args:
        logits: e.g. at each row's last position.
        token_ids: one token per row.
    """
    ids = _token_ids(token_ids, logits)
    return logits.float().log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]


def answer_rank(
    logits: Float[Tensor, "batch vocab"], token_ids: Int[Tensor, " batch"] | Sequence[int]
) -> Int[Tensor, " batch"]:
    """How many tokens are likelier than the given one: 0 is the best rank.

    Args:
        logits: e.g. at each row's last position.
        token_ids: one token per row, e.g. the answer's first.

    Source: Todd et al. 2024 (rank of the answer's first token).
    """
    ids = _token_ids(token_ids, logits)
    return (logits > logits.gather(-1, ids[:, None])).sum(dim=-1)


def logit_difference(
    logits: Float[Tensor, "batch vocab"],
    token_ids: Int[Tensor, " batch"] | Sequence[int],
    other_ids: Int[Tensor, " batch"] | Sequence[int],
) -> Float[Tensor, " batch"]:
    """Logit of one token minus that of another, row by row, in float32.

    Args:
        logits: e.g. at each row's last position.
        token_ids: e.g. the first token of the patched task's answer.
        other_ids: e.g. that of the original task's answer.
    """
    wanted, other = _token_ids(token_ids, logits), _token_ids(other_ids, logits)
    return (logits.gather(-1, wanted[:, None]).float() - logits.gather(-1, other[:, None]).float())[:, 0]


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile interval."""

    mean: float
    low: float
    high: float


ItemScores = Shaped[np.ndarray, "..."] | Sequence[Any]


def bootstrap_interval(values: ItemScores, *, seed: int, confidence: float = 0.95, n_resamples: int = 2000) -> Interval:
    """Percentile bootstrap interval of a mean.

    Args:
        values: one score per item ``[item]``; or ``[seed, item]``: seeds and items are both drawn with replacement,
            the same items for every seed, since all seeds ask the same queries.
        seed: of the resampling.
        confidence: e.g. 0.95.
        n_resamples: how many.

    Returns:
        The mean of all values and its interval.

    Raises:
        ShapeError: other than one or two dimensions, or fewer than two items.
        InputError: a value that is not finite, or a confidence outside 0 to 1.
    """
    return mean_bootstrap_interval([values], seed=seed, confidence=confidence, n_resamples=n_resamples)


def mean_bootstrap_interval(
    tasks: Sequence[ItemScores], *, seed: int, confidence: float = 0.95, n_resamples: int = 2000
) -> Interval:
    """Percentile bootstrap interval of a mean over tasks: the mean over tasks of each task's mean.

    The tasks are fixed; within each, seeds and items are resampled as in ``bootstrap_interval``.

    Args:
        tasks: for each task its scores, ``[item]`` or ``[seed, item]``.
        seed, confidence, n_resamples: as in ``bootstrap_interval``.

    Returns:
        The mean and its interval.

    Raises:
        ShapeError, InputError: as ``bootstrap_interval``; also without any scores.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, not {confidence}.")
    if not tasks:
        raise InputError("There are no scores.")
    generator = np.random.default_rng(seed)
    scores = [_seed_by_item(values) for values in tasks]
    resampled = np.mean([_resampled_means(one, n_resamples, generator) for one in scores], axis=0)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.mean([one.mean() for one in scores])), float(low), float(high))


def _seed_by_item(values: ItemScores) -> Float[np.ndarray, "seed item"]:
    array = np.asarray(values, dtype=np.float64)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] < 2:
        raise ShapeError(f"ItemScores must be [item] or [seed, item] with at least two items, not {array.shape}.")
    if not np.isfinite(array).all():
        raise InputError(f"{int((~np.isfinite(array)).sum())} of {array.size} scores are not finite.")
    return array


def _resampled_means(
    scores: Float[np.ndarray, "seed item"], n_resamples: int, generator: np.random.Generator
) -> Float[np.ndarray, " resample"]:
    n_seeds, n_items = scores.shape
    means = np.empty(n_resamples)
    # In pieces, so that the drawn indexes stay within some tens of megabytes.
    step = max(1, 4_000_000 // scores.size)
    for start in range(0, n_resamples, step):
        count = min(step, n_resamples - start)
        seeds = generator.integers(n_seeds, size=(count, n_seeds, 1))
        items = generator.integers(n_items, size=(count, 1, n_items))
        means[start : start + count] = scores[seeds, items].mean(axis=(1, 2))
    return means


def _answers(answers: str | Sequence[str]) -> list[str]:
    found = [answers] if isinstance(answers, str) else list(answers)
    if not found:
        raise InputError("There are no answers to compare with.")
    return found


def _stripped(text: str, case_sensitive: bool) -> str:
    return text.strip() if case_sensitive else text.strip().lower()


def _f1(given: list[str], answer: list[str]) -> float:
    if not given or not answer:
        return float(given == answer)
    shared = sum((Counter(given) & Counter(answer)).values())
    return 2 * shared / (len(given) + len(answer))


def _token_ids(token_ids: Tensor | Sequence[int], logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    ids = torch.as_tensor(token_ids, device=logits.device)
    if ids.shape != logits.shape[:1]:
        raise ShapeError(f"{tuple(ids.shape)} token ids for logits of shape {tuple(logits.shape)}: one per row.")
    vocab = logits.shape[1]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise InputError(f"Token ids must lie between 0 and {vocab - 1}: {ids.tolist()}.")
    return ids
