"""Metrics of answers, and what is refused as one."""

import inspect

import numpy as np
import pytest
import torch

from interp import Zero
from interp.errors import InputError, ShapeError
from interp.patching.metric import evaluate, log_probability, logit_difference, measure, name_of
from interp.prompts import query
from tests import tiny, worded

# As called without the checks of types that tests run under.
unchecked = inspect.unwrap

LOGITS = torch.randn(2, 97, generator=torch.Generator().manual_seed(0))


def test_metrics_are_those_of_the_answers_tokens() -> None:
    vlm = tiny.vlm("llama")
    difference = logit_difference(vlm, [5, 6], [7, 8])
    torch.testing.assert_close(
        difference(LOGITS), torch.stack([LOGITS[0, 5] - LOGITS[0, 7], LOGITS[1, 6] - LOGITS[1, 8]])
    )
    probability = log_probability(vlm, torch.tensor([5, 6]))
    torch.testing.assert_close(probability(LOGITS), LOGITS.log_softmax(-1)[[0, 1], [5, 6]])
    assert (name_of(difference), name_of(probability), name_of(torch.sum)) == (
        "logit difference",
        "log-probability",
        "sum",
    )


def test_answers_are_split_where_they_follow_their_prompts() -> None:
    vlm = worded.llama()
    inputs = vlm.prepare([query("France"), query("Japan")])
    metric = logit_difference(vlm, ["Paris", "Tokyo"], ["Lima", "Oslo"], inputs=inputs)
    assert vlm.tokenizer.convert_ids_to_tokens(metric.answers.tolist())[0][0] == "P"
    assert torch.equal(metric.answers, logit_difference(vlm, ["Paris", "Tokyo"], ["Lima", "Oslo"]).answers)
    with pytest.raises(ShapeError, match="1 answers for 2 prompts"):
        logit_difference(vlm, ["Paris"], ["Oslo"], inputs=inputs)


def test_bad_answers_are_refused() -> None:
    words, ids = worded.llama(), tiny.vlm("llama")
    with pytest.raises(InputError, match=r"example\(s\) \[1\].*'Qx' and 'Qy' share their first token"):
        logit_difference(words, ["Paris", "Qx"], ["Oslo", "Qy"])
    with pytest.raises(InputError, match="share"):
        logit_difference(ids, [5, 6], [5, 7])
    with pytest.raises(ShapeError, match="2 answers, but 1"):
        logit_difference(ids, [5, 6], [7])
    with pytest.raises(InputError, match="need a tokenizer"):
        log_probability(ids, ["Paris"])
    with pytest.raises(InputError, match="one text or one token id"):
        log_probability(words, "Paris")
    with pytest.raises(InputError, match="one text or one token id"):
        log_probability(words, [])
    for answers in ([True, False], [5, "Paris"], [5.0, 6.0], torch.tensor([5.0, 6.0]), np.array([5.0, 6.0])):
        with pytest.raises(InputError, match="one text or one token id"):
            unchecked(log_probability)(words, answers)
    for answers in (torch.tensor([[5, 6]]), np.array([[5, 6]]), torch.tensor(5), np.zeros(0, int)):
        with pytest.raises(InputError, match="one text or one token id"):
            log_probability(ids, answers)
    for answers in ([5, 97], [-1, 5]):
        with pytest.raises(InputError, match="token ids are 0 to 96"):
            log_probability(ids, answers)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, tuple, lambda ids: list(np.array(ids))])
def test_token_ids_of_any_kind(kind) -> None:
    vlm = tiny.vlm("llama")
    metric = logit_difference(vlm, kind([5, 6]), kind([7, 8]))
    torch.testing.assert_close(metric(LOGITS), logit_difference(vlm, [5, 6], [7, 8])(LOGITS), atol=0, rtol=0)
    assert metric.answers.dtype == torch.int64


def test_inputs_that_do_not_know_their_prompts_are_refused() -> None:
    vlm = worded.llama()
    inputs = vlm.prepare([query("France"), query("Japan")])
    for given in (dict(inputs), "France"):
        with pytest.raises(InputError, match=rf"inputs.*{type(given).__name__}.*vlm.prepare"):
            log_probability(vlm, ["Paris", "Tokyo"], inputs=given)


def test_metrics_that_are_no_number_for_each_example_are_refused() -> None:
    with pytest.raises(InputError, match=r"NaN or infinity for example\(s\) \[0, 1\]"):
        evaluate(lambda logits: logits[:, 0] / 0 * 0, LOGITS)
    with pytest.raises(ShapeError, match="one value for each"):
        evaluate(lambda logits: logits.sum(), LOGITS)
    with pytest.raises(ShapeError, match="returned float"):
        evaluate(lambda logits: 1.0, LOGITS)
    with pytest.raises(InputError, match="metric='x'"):
        unchecked(evaluate)("x", LOGITS)


def test_metrics_may_write_into_the_logits() -> None:
    given = LOGITS.clone()
    assert torch.equal(evaluate(lambda logits: logits.mul_(2)[:, 5], given), 2 * LOGITS[:, 5])
    assert torch.equal(given, LOGITS)


def test_measure_sweeps_and_refuses_what_is_no_metric() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    variants = [[], [Zero("blocks.1.hook_mlp_out", at="last")]]
    metric = logit_difference(vlm, [5, 6], [7, 8])
    values, plan = measure(vlm, inputs, variants, metric, max_rows=2, progress=False)
    assert values.shape == (2, 2) and "token-layers" in plan
    with pytest.raises(InputError, match="metric=3"):
        unchecked(measure)(vlm, inputs, variants, 3)
    sizes = iter([2, 1])
    with pytest.raises(ShapeError, match="one value for each"):
        measure(vlm, inputs, variants, lambda logits: logits[: next(sizes), 5])
