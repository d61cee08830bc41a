"""Tables, intervals and comparisons from hand-made results."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from interp.correspondence import Evaluation, Pair, PairResult, compare, pck_interval
from interp.errors import InputError


def result(category: str, offsets: list[tuple[float, float]], name: str = "a", *, size: tuple[int, int] = (100, 200),
           match_size: tuple[int, int] | None = None) -> PairResult:  # fmt: skip
    """A pair whose predictions are off by (y, x) in pixels of the original target; its box is 40 wide."""
    true = torch.tensor([[50.0, 60.0 + index] for index in range(len(offsets))])
    pair = Pair(name, f"{name}!", category, true, true, (10, 10, 30, 50), (10, 10, 30, 50))
    at = size if match_size is None else match_size
    pred = (true + torch.tensor(offsets)) * torch.tensor(at) / torch.tensor(size)
    return PairResult(pair, pred, at, size)


NEAR, FAR = (0.0, 1.0), (0.0, 90.0)
MIXED = Evaluation(
    (result("dog", [NEAR], "a"), result("dog", [FAR, FAR, NEAR], "b"), result("cat", [NEAR, (0.0, 10.0)], "c"))
)


def test_the_table_reports_both_bases_and_all_reductions():
    table = MIXED.table()
    assert set(zip(table.threshold, table.base, strict=True)) == set(product((0.05, 0.1, 0.15), ("img", "bbox")))
    overall = table[(table.threshold == 0.1) & (table.category == "all")].set_index(["base", "reduce"]).pck
    # 0.1 of 200 is 20 pixels; 0.1 of the box's 40 is 4.
    assert overall["img"].to_dict() == pytest.approx({"point": 4 / 6, "pair": (1 + 1 / 3 + 1) / 3, "category": 0.75})
    assert overall["bbox"].to_dict() == pytest.approx(
        {"point": 3 / 6, "pair": (1 + 1 / 3 + 1 / 2) / 3, "category": 0.5}
    )
    dog = table[(table.threshold == 0.1) & (table.base == "img") & (table.category == "dog")].set_index("reduce")
    assert dog.pck.to_dict() == pytest.approx({"point": 0.5, "pair": 2 / 3})
    assert dog.n_points.tolist() == [4, 4]
    assert dog.n_pairs.tolist() == [2, 2]
    cat = table[table.category == "cat"]
    assert cat.low.isna().all()  # one pair leaves nothing to draw
    assert table.inclusive.all()
    assert (table.space == "original").all()


def test_inclusive_and_strict():
    exact = Evaluation((result("dog", [(0.0, 20.0)]), result("dog", [(12.0, 16.0)])))
    assert pck_interval(exact, threshold=0.1, base="img").mean == 1.0
    assert pck_interval(exact, threshold=0.1, base="img", inclusive=False).mean == 0.0


def test_spaces_differ_when_the_resize_is_not_uniform():
    # 15 rows of 100 are 33.6 of 224; 15 columns of 200 are 16.8. The limit is 20 of 200, or 22.4 of 224.
    both = Evaluation((result("dog", [(15.0, 0.0)], match_size=(224, 224)),
                       result("dog", [(0.0, 15.0)], "b", match_size=(224, 224))))  # fmt: skip
    assert pck_interval(both, base="img", space="original").mean == 1.0
    assert pck_interval(both, base="img", space="resized").mean == 0.5
    # The box of 20 x 40 becomes 44.8 x 44.8.
    assert both.results[0].limit(0.1, "bbox", "resized") == pytest.approx(4.48)
    pred, true = both.results[1].points("original")
    np.testing.assert_allclose((pred - true).tolist(), [[0.0, 15.0]], atol=1e-4)  # predictions are float32


def test_points_are_a_table():
    points = MIXED.points()
    assert points.distance.tolist() == pytest.approx([1, 90, 90, 1, 1, 10])
    assert points.pair.tolist() == [0, 1, 1, 1, 2, 2]
    assert points.img.unique().tolist() == [200.0]
    assert points.bbox.unique().tolist() == [40.0]
    assert (points.predicted_x - points.target_x).tolist() == pytest.approx(points.distance.tolist())


def many(n: int, share: float, seed: int) -> Evaluation:
    random = np.random.default_rng(seed)
    rows = [[NEAR if hit else FAR for hit in random.random(1 + index % 7) < share] for index in range(n)]
    return Evaluation(tuple(result("dog" if index % 2 else "cat", row, f"{index}") for index, row in enumerate(rows)))


@pytest.mark.parametrize("reduce", ["point", "pair", "category"])
def test_intervals_agree_with_a_plain_bootstrap(reduce: str):
    run = many(60, 0.6, 1)
    found = pck_interval(run, reduce=reduce, seed=3)
    random = np.random.default_rng(9)
    rights = np.array([sum(one.correct(0.1, "img")) for one in run.results])
    counts = np.array([len(one.predicted) for one in run.results])
    names = np.array([one.pair.category for one in run.results])

    def score(picked: np.ndarray) -> float:
        if reduce == "pair":
            return (rights[picked] / counts[picked]).mean()
        groups = [picked] if reduce == "point" else [picked[names[picked] == name] for name in ("dog", "cat")]
        return np.mean([rights[group].sum() / counts[group].sum() for group in groups])

    drawn = []
    for _ in range(2000):
        both = [random.choice(np.flatnonzero(names == name), 30) for name in ("dog", "cat")]
        drawn.append(score(np.concatenate(both) if reduce == "category" else random.integers(60, size=60)))
    low, high = np.quantile(drawn, [0.025, 0.975])
    # Quantiles of 2,000 draws of a spread of about 0.04: the error of a difference of two is about 0.004.
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)
    assert found.mean == pytest.approx(score(np.arange(60)))


def test_seeds_are_drawn_too():
    runs = [many(40, 0.6, seed) for seed in (1, 2, 3)]
    together = pck_interval(runs, seed=0)
    assert together.mean == pytest.approx(np.mean([pck_interval(run).mean for run in runs]))
    twice = pck_interval(runs, seed=0)
    assert together == twice
    assert together != pck_interval(runs, seed=1)


def test_comparing_the_same_pairs_is_tighter_than_two_intervals():
    a = many(80, 0.5, 4)
    better = Evaluation(
        tuple(
            PairResult(one.pair, one.pair.target_points if index % 10 == 0 else one.predicted, one.size, one.image_size)
            for index, one in enumerate(a.results)
        )
    )
    gain = compare(better, a, seed=0)
    one, other = pck_interval(better, seed=0), pck_interval(a, seed=0)
    assert gain.mean == pytest.approx(one.mean - other.mean)
    assert gain.low > 0
    assert gain.high - gain.low < 0.7 * (one.high - one.low)
    opposite = compare(a, better, seed=0)
    assert (opposite.low, opposite.high) == pytest.approx((-gain.high, -gain.low))
    assert compare([a, a], better, reduce="pair").mean < 0


def test_one_pair_has_no_interval():
    found = pck_interval(Evaluation((result("dog", [NEAR]),)))
    assert found.mean == 1.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_refusals():
    with pytest.raises(InputError, match=r"not of the same pairs.*3 and 2"):
        compare(MIXED, Evaluation(MIXED.results[:2]))
    with pytest.raises(InputError, match="of which 2 differ"):
        compare(MIXED, Evaluation((MIXED.results[1], MIXED.results[0], MIXED.results[2])))
    with pytest.raises(InputError, match="2 evaluations against 3"):
        compare([MIXED] * 2, [MIXED] * 3)
    with pytest.raises(InputError, match="space is 'resize'"):
        pck_interval(MIXED, space="resize")
    with pytest.raises(InputError, match="base is 'image'"):
        pck_interval(MIXED, base="image")
    with pytest.raises(InputError, match="no results"):
        pck_interval(Evaluation(()))
    with pytest.raises(InputError, match="confidence must be between 0 and 1"):
        pck_interval(MIXED, confidence=1.5)


def test_by_category_a_drawn_seed_is_the_same_one_in_every_category():
    good = Evaluation(tuple(result(name, [NEAR], f"{name}{k}") for name in ("dog", "cat") for k in range(2)))
    bad = Evaluation(tuple(result(name, [FAR], f"{name}{k}") for name in ("dog", "cat") for k in range(2)))
    # Pairs do not differ, so the two drawn seeds are all that varies: a quarter of the draws give 0 and a quarter 1.
    # Were seeds drawn for each category, a sixteenth would, and the interval would end at 0.25 and 0.75.
    one, both = (pck_interval([good, bad], reduce=reduce, confidence=0.6) for reduce in ("point", "category"))
    assert (one.low, one.high) == (0.0, 1.0)
    assert (both.low, both.high) == (0.0, 1.0)
