"""What a patched run is measured by: one number for each example, from the logits at its last token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import metrics
from interp.edits import Edit
from interp.errors import InputError, ShapeError
from interp.inputs import Inputs
from interp.positions import indexes
from interp.sweeps.checks import check_metric

MetricFunction = Callable[[Tensor], Tensor]
Answers = Sequence[str] | Sequence[SupportsIndex] | Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class TokenMetric:
    """A metric of one answer token for each example, or of two: logits ``[example, vocab]`` to ``[example]``.

    Args:
        name: what it measures.
        answers: one token for each example.
        wrong: the token that it is set against; None: all tokens.
    """

    name: str
    answers: Int[Tensor, " example"]
    wrong: Int[Tensor, " example"] | None = None

    def __call__(self, logits: Float[Tensor, "example vocab"]) -> Float[Tensor, " example"]:
        """The metric of every example, in float32."""
        if self.wrong is None:
            return metrics.token_log_prob(logits, self.answers)
        return metrics.logit_difference(logits, self.answers, self.wrong)


def logit_difference(vlm: Any, answers: Answers, wrong: Answers, *, inputs: Any = None) -> TokenMetric:
    """Logit of the right answer's first token minus that of the wrong answer's.

    Args:
        vlm: the model, whose tokenizer splits the answers.
        answers: for each example the answer of its clean prompt, as text or as a token id.
        wrong: for each example another answer, such as that of its corrupt prompt.
        inputs: what `VLM.prepare` made of the prompts that the answers follow, which tells how the tokenizer writes
            them there; without it they are split by themselves.

    Raises:
        InputError: answers that share their first token with the wrong ones, that have no token, or that are neither
            texts nor token ids of the model; inputs that do not know their prompts.
        ShapeError: not as many wrong answers as answers.

    Source: Wang et al. 2022, section 2 (logit difference).
    """
    right, other = _tokens(vlm, answers, inputs), _tokens(vlm, wrong, inputs)
    if len(right) != len(other):
        raise ShapeError(f"there are {len(right)} answers, but {len(other)} wrong answers")
    shared = [index for index, (a, b) in enumerate(zip(right.tolist(), other.tolist(), strict=True)) if a == b]
    if shared:
        first = shared[0]
        raise InputError(
            f"example(s) {shared}: {answers[first]!r} and {wrong[first]!r} share their first token "
            f"({int(right[first])}), so that their logit difference is always 0; choose answers that differ there"
        )
    return TokenMetric("logit difference", right, other)


def log_probability(vlm: Any, answers: Answers, *, inputs: Any = None) -> TokenMetric:
    """Natural log-probability of the answer's first token.

    Args:
        vlm, answers, inputs: as for `logit_difference`.

    Raises:
        InputError: an answer that has no token, or that is neither text nor a token id of the model; inputs that do
            not know their prompts.
    """
    return TokenMetric("log-probability", _tokens(vlm, answers, inputs))


def name_of(metric: MetricFunction) -> str:
    """What a metric is called: its ``name``, or the function's own."""
    return str(getattr(metric, "name", None) or getattr(metric, "__name__", "metric"))


def evaluate(metric: MetricFunction, logits: Float[Tensor, "example vocab"]) -> Float[Tensor, " example"]:
    """Apply a metric and refuse what is no number for each example.

    Args:
        metric: what to apply; it gets a copy, which it may write into.
        logits: at the last token.

    Raises:
        ShapeError: other than one value for each example.
        InputError: NaN or infinite values, or a metric that cannot be called.
    """
    check_metric(metric)
    values = metric(logits.clone())
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(f"metric {name_of(metric)!r} returned {got} for {len(logits)} examples: one value for each")
    if not bool(torch.isfinite(values).all()):
        wrong = (~torch.isfinite(values)).nonzero().flatten().tolist()
        raise InputError(f"metric {name_of(metric)!r} returned NaN or infinity for example(s) {wrong}")
    return values


def measure(
    vlm: Any, inputs: Mapping[str, Any], variants: Sequence[Sequence[Edit]], metric: MetricFunction, **options: Any
) -> tuple[Float[Tensor, "variant example"], str]:
    """The metric of every variant of one batch, as one sweep.

    Args:
        vlm: the model.
        inputs: prepared or plain model inputs.
        variants: for each variant its edits.
        metric: logits at the last token to one value for each example.
        options: of `VLM.sweep`.

    Returns:
        The metric on the CPU, and the sweep's plan in words.

    Raises:
        InputError, ShapeError: a metric that returns NaN, or not one value for each example.
    """
    check_metric(metric)
    # Many cells of a grid truly have no effect on the last token; that the values differ is checked by the caller.
    allowed = {"allow_no_effect": True} | options
    # A partial, not a closure of this module: folders of sweeps look at the metric in it.
    swept = vlm.sweep(inputs, variants, metric=partial(evaluate, metric), **allowed)
    return swept.values.float().cpu(), str(swept.plan)


def _tokens(vlm: Any, answers: Any, inputs: Any) -> Int[Tensor, " example"]:
    """The first token of each answer."""
    if inputs is not None and not isinstance(inputs, Inputs):
        raise InputError(
            f"inputs are {type(inputs).__name__}, which does not know the prompts that the answers follow: give what "
            "vlm.prepare returned, or leave inputs out"
        )
    texts = [one for one in answers if isinstance(one, str) and one] if isinstance(answers, Sequence) else []
    if isinstance(answers, str) or not texts or len(texts) < len(answers):
        return _ids(vlm, answers)
    if vlm.tokenizer is None:
        raise InputError("answers as text need a tokenizer: VLM(model, processor), or give token ids")
    if inputs is not None:
        if len(inputs.prompts) != len(texts):
            raise ShapeError(f"there are {len(texts)} answers for {len(inputs.prompts)} prompts")
        pairs = zip(inputs.prompts, texts, strict=True)
        return torch.tensor([metrics.first_token_ids(vlm.tokenizer, prompt, answer)[0] for prompt, answer in pairs])
    ids = [vlm.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in texts]
    empty = [answer for answer, tokens in zip(texts, ids, strict=True) if not tokens]
    if empty:
        raise InputError(f"the tokenizer gives {empty[0]!r} no token")
    return torch.tensor([tokens[0] for tokens in ids])


def _ids(vlm: Any, answers: Any) -> Int[Tensor, " example"]:
    """Token ids as they were given."""
    wanted = InputError(f"answers={answers!r}: give one text or one token id for each example")
    if isinstance(answers, str) or getattr(answers, "ndim", 1) != 1:
        raise wanted
    try:
        found = indexes("answers", answers)
    except InputError as error:
        raise wanted from error
    if not found:
        raise wanted
    vocab = int(vlm.model.config.get_text_config().vocab_size)
    wrong = [one for one in found if not 0 <= one < vocab]
    if wrong:
        raise InputError(f"answers hold {wrong[0]}: the model's token ids are 0 to {vocab - 1}")
    return torch.tensor(found)
