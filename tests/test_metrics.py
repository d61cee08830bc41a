import numpy as np
import pytest
import scipy.stats
import torch

from interp import metrics
from interp.errors import InputError, ShapeError
from interp.inputs import prepare, resolve
from interp.metrics import (
    answer_log_prob,
    answer_rank,
    answer_token_ids,
    bootstrap_interval,
    exact_match,
    first_token_ids,
    first_word_match,
    logit_difference,
    mean_bootstrap_interval,
    prefix_match,
    score_rows,
    squad_exact_match,
    squad_f1,
    token_log_prob,
)
from interp.prompts import few_shot, query
from interp.tasks import Item
from tests.processors import byte_level_tokenizer, metaspace_tokenizer

# --- strings


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Par", "Paris", True),
        ("Paris is", "Paris", True),
        (" Paris\n", "Paris ", True),
        ("P", "Paris", True),
        ("P", ["Madrid", "Pisa"], True),
        ("paris", "Paris", False),
        ("Pariss", "Pa ris", False),
        ("aris", "Paris", False),
        ("", "Paris", False),
        ("\n", "Paris", False),
        (" \t", "Paris", False),
        ("Paris", "", False),
        ("", "", False),
        ("The Paris", "Paris", False),
    ],
)
def test_prefix_match(prediction: str, answers, expected: bool) -> None:
    assert prefix_match(prediction, answers) is expected


def test_case_can_be_ignored() -> None:
    assert prefix_match("pAr", "Paris", case_sensitive=False)
    assert exact_match("pARIS", ["x", "Paris"], case_sensitive=False)
    assert not prefix_match("", "Paris", case_sensitive=False)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (" Paris\n", "Paris", True),
        ("Par", "Paris", False),
        ("kit", ("cub", "kit "), True),
        ("Kit", "kit", False),
        ("", "", False),
        ("  ", "", False),
    ],
)
def test_exact_match(prediction: str, answers, expected: bool) -> None:
    assert exact_match(prediction, answers) is expected


def test_squad_metrics() -> None:
    assert metrics.squad_normalise("The  Cat's, a hat!") == "cats hat"
    assert metrics.squad_normalise("theatre an") == "theatre"
    assert squad_exact_match("the Dinar.", ["Algerian dinar", "Dinar"])
    assert not squad_exact_match("Dinars", "Dinar")
    # shared: "big", "red"; precision 2/3, recall 2/2
    assert squad_f1("a big red fox", "Big red") == pytest.approx(2 * (2 / 3) / (2 / 3 + 1), abs=1e-12)
    # a word counts as often as both have it: one shared of three and of one
    assert squad_f1("no no no", "no") == pytest.approx(2 * (1 / 3) / (1 / 3 + 1), abs=1e-12)
    assert squad_f1("fox", ["hen", "fox"]) == 1.0
    assert squad_f1("fox", "hen") == 0.0
    assert squad_f1("the", "a") == 1.0
    assert squad_f1("the", "fox") == 0.0


def test_first_word() -> None:
    assert first_word_match("The Euro, of course", "euro (EUR)")
    assert not first_word_match("European", "Euro")
    assert not first_word_match("the", "a")
    assert first_word_match("kit", ["cub", "kit fox"])


def test_answers_are_needed() -> None:
    with pytest.raises(InputError, match="no answers"):
        exact_match("a", [])


def test_score_rows() -> None:
    items = [Item("fox", "kit", aliases=("cub",), id="7"), Item("hen", "chick")]
    first, second = score_rows(["Cub", "ch"], items, task="young", seed=1)
    assert first == {
        "task": "young",
        "seed": 1,
        "item": "7",
        "prediction": "Cub",
        "answer": "kit",
        "prefix": False,
        "prefix_uncased": True,
        "exact": False,
        "squad_em": True,
        "squad_f1": 1.0,
        "first_word": True,
    }
    assert (second["item"], second["prefix"], second["exact"]) == ("hen", True, False)
    with pytest.raises(ShapeError, match="1 predictions for 2 items"):
        score_rows(["a"], items)


# --- tokens


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("answer", ["Paris", " Paris", "Vulpes vulpes", "12:30", ":"])
def test_answer_tokens_continue_the_prompt(make, answer: str) -> None:
    tokenizer = make()
    prompt = query("France")
    ids = answer_token_ids(tokenizer, prompt, answer)
    whole = tokenizer(prompt.text + answer)["input_ids"]
    assert ids == whole[len(whole) - len(ids) :]
    assert whole[: len(whole) - len(ids)] == tokenizer(prompt.text)["input_ids"]
    assert first_token_ids(tokenizer, prompt.text, answer) == ids[:1]


def test_an_answers_first_token_is_not_that_of_the_answer_alone() -> None:
    # SentencePiece puts a space before a text of its own, but not behind "A:".
    tokenizer = metaspace_tokenizer()
    alone = tokenizer("Paris", add_special_tokens=False)["input_ids"]
    assert first_token_ids(tokenizer, "Q:France\nA:", ["Paris"]) != alone[:1]
    both = first_token_ids(tokenizer, "Q:France\nA:", ["Paris", "Madrid"])
    assert tokenizer.convert_ids_to_tokens(both)[0][0] == "P"
    assert tokenizer.convert_ids_to_tokens(both)[1][0] == "M"


def test_answers_that_merge_with_the_prompt_are_refused() -> None:
    tokenizer = byte_level_tokenizer([(":", "P")])
    with pytest.raises(InputError, match="changes the tokens of the prompt"):
        first_token_ids(tokenizer, "A:", ["Paris"])
    assert len(first_token_ids(tokenizer, "A:", ["Madrid"])) == 1
    with pytest.raises(InputError, match="adds no token"):
        first_token_ids(tokenizer, "A:", [""])


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 5


def test_log_probability_of_an_answer_in_left_padded_inputs() -> None:
    tokenizer = byte_level_tokenizer()
    prompts = [few_shot([("France", "Paris")]), few_shot([("the fox", "Vulpes vulpes"), ("Q", "Tokyo")])]
    inputs = prepare(prompts, tokenizer=tokenizer)
    scores = logits(2, inputs.seq_len, len(tokenizer))
    positions = resolve("output[-1]", inputs.layout, inputs.seq_len)
    result = answer_log_prob(scores, inputs["input_ids"], positions)
    probabilities = scores.double().softmax(-1)
    for row, tokens in enumerate(positions):
        terms = [probabilities[row, p - 1, inputs["input_ids"][row, p]].log() for p in tokens]
        # float32 log-softmax of logits below 30: errors of some 1e-6 per token
        assert result.total[row].item() == pytest.approx(sum(terms).item(), abs=1e-4)
        assert result.first[row].item() == pytest.approx(terms[0].item(), abs=1e-5)
    assert len(positions[0]) > 1
    assert not torch.equal(result.total, result.first)


def test_log_probability_rank_and_difference_of_single_tokens() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, -1.0, 0.0, 0.0]])
    p = scores.exp() / scores.exp().sum(1, keepdim=True)
    expected = torch.stack([p[0, 1], p[1, 2]]).log()
    # float32 rounding of numbers around 1
    torch.testing.assert_close(token_log_prob(scores, [1, 2]), expected, atol=1e-6, rtol=0)
    assert answer_rank(scores, [1, 2]).tolist() == [0, 1]
    assert answer_rank(scores, torch.tensor([0, 1])).tolist() == [3, 3]
    assert logit_difference(scores, [1, 1], [2, 0]).tolist() == [1.0, -4.0]


def test_half_precision_logits_are_summed_in_float32() -> None:
    scores = logits(4, 1000).bfloat16()
    got = token_log_prob(scores, [1, 2, 3, 4])
    assert got.dtype == torch.float32
    # exact up to float32 rounding: the same bf16 numbers, normalised in float64
    expected = scores.double().log_softmax(-1)[range(4), [1, 2, 3, 4]].float()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_token_metrics_refuse_what_does_not_fit() -> None:
    scores = logits(2, 5)
    for ids, error in (([1], ShapeError), ([1, 5], InputError), ([-1, 0], InputError)):
        with pytest.raises(error):
            answer_rank(scores, ids)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ShapeError, match="1 rows"):
        answer_log_prob(logits(2, 3, 5), ids, [[1]])
    for positions in ([[1], []], [[1], [0]]):
        with pytest.raises(InputError, match="Row 1"):
            answer_log_prob(logits(2, 3, 5), ids, positions)


# --- intervals


def test_interval_over_items_equals_scipys() -> None:
    values = np.random.default_rng(0).random(80) ** 2
    got = bootstrap_interval(values, seed=1, n_resamples=20_000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    # two independent runs: quantiles of 20,000 resamples scatter by about 2 % of the standard error
    tolerance = 0.1 * values.std() / np.sqrt(80)
    assert got.mean == pytest.approx(values.mean(), abs=1e-12)
    assert got.low == pytest.approx(expected.low, abs=tolerance)
    assert got.high == pytest.approx(expected.high, abs=tolerance)


def test_interval_over_seeds_and_items_contains_both_sources() -> None:
    generator = np.random.default_rng(0)
    n_seeds, n_items = 6, 50
    values = generator.normal(0, 1, (n_seeds, 1)) + generator.normal(0, 1, (n_seeds, n_items))
    got = bootstrap_interval(values, seed=0, n_resamples=20_000)
    # Plug-in variance of the mean of a crossed table: seeds, items, and what neither explains.
    seeds, items = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    rest = (values - seeds - items + values.mean()).var() / (n_seeds * n_items)
    width = 2 * 1.96 * np.sqrt(seeds.var() / n_seeds + items.var() / n_items + rest)
    # 6 seeds give means that are not quite normal
    assert got.high - got.low == pytest.approx(width, rel=0.06)
    flat = bootstrap_interval(values.ravel(), seed=0)
    assert flat.high - flat.low < 0.5 * width


def test_identical_seeds_leave_only_the_items() -> None:
    items = np.random.default_rng(0).random(40)
    alone = bootstrap_interval(items, seed=0, n_resamples=20_000)
    thrice = bootstrap_interval(np.stack([items] * 3), seed=0, n_resamples=20_000)
    # Asking the same queries again says nothing new about the queries.
    assert thrice.high - thrice.low == pytest.approx(alone.high - alone.low, rel=0.04)


def test_intervals_cover_the_truth_when_items_differ_in_difficulty() -> None:
    generator = np.random.default_rng(0)
    covered = []
    for trial in range(200):
        difficulty = generator.uniform(0.2, 1.0, 36)
        scores = generator.random((3, 36)) < difficulty
        got = bootstrap_interval(scores, seed=trial, n_resamples=400)
        covered.append(got.low <= 0.6 <= got.high)
    # Nominally .95, and a little more because single answers are noisy; 200 trials know it to within .03.
    assert 0.92 <= np.mean(covered) <= 1.0


def test_interval_of_a_mean_over_tasks_weights_tasks_equally() -> None:
    few, many = [0.0, 1.0], [1.0] * 50
    got = mean_bootstrap_interval([few, many], seed=0)
    assert got.mean == 0.75
    # the first task's resampled mean is 0, .5 or 1 with probability 1/4, 1/2, 1/4
    assert (got.low, got.high) == (0.5, 1.0)


def test_intervals_depend_on_the_seed_and_the_confidence_alone() -> None:
    values = [True, False, True, True, False, False, True]
    first = bootstrap_interval(values, seed=0)
    np.random.seed(3)
    assert bootstrap_interval(np.array(values), seed=0) == first
    narrow = bootstrap_interval(values, seed=0, confidence=0.5)
    assert first.low < narrow.low <= narrow.mean <= narrow.high < first.high
    assert bootstrap_interval([1.0, 1.0, 1.0], seed=0) == metrics.Interval(1.0, 1.0, 1.0)


def test_large_tables_are_resampled_in_pieces() -> None:
    values = np.random.default_rng(0).random((4, 300_000))
    got = bootstrap_interval(values, seed=0, n_resamples=7)
    # the standard error is .29 / sqrt(1.2 million)
    assert abs(got.low - values.mean()) < 5 * 0.29 / np.sqrt(1.2e6)
    assert got.low < got.high


@pytest.mark.parametrize(
    ("values", "error"),
    [([1.0], ShapeError), ([], ShapeError), ([[[1.0, 2.0]]], ShapeError), ([1.0, float("nan")], InputError)],
)
def test_scores_that_cannot_be_resampled(values, error) -> None:
    with pytest.raises(error):
        bootstrap_interval(values, seed=0)
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(InputError, match="confidence"):
            bootstrap_interval([0.0, 1.0], seed=0, confidence=float(confidence))
    with pytest.raises(InputError, match="no scores"):
        mean_bootstrap_interval([], seed=0)
