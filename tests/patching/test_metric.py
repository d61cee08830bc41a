"""Metrics of answers, and what is refused as one."""

import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.patching.metric import evaluate, log_probability, logit_difference, name_of
from interp.prompts import query
from tests import tiny, worded

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


def test_metrics_that_are_no_number_for_each_example_are_refused() -> None:
    with pytest.raises(InputError, match=r"NaN or infinity for example\(s\) \[0, 1\]"):
        evaluate(lambda logits: logits[:, 0] / 0 * 0, LOGITS)
    with pytest.raises(ShapeError, match="one value for each"):
        evaluate(lambda logits: logits.sum(), LOGITS)
    with pytest.raises(ShapeError, match="returned float"):
        evaluate(lambda logits: 1.0, LOGITS)
