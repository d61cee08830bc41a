"""PCK by hand: exactly at the threshold, unequal pairs, categories, bases."""

import pytest
import torch

from interp.correspondence import base_length, pck, within
from interp.errors import InputError, ShapeError

TRUE = torch.tensor([[10.0, 10.0], [20.0, 20.0], [30.0, 30.0], [40.0, 40.0]])


def moved(*offsets: tuple[float, float]) -> torch.Tensor:
    return TRUE[: len(offsets)] + torch.tensor(offsets)


def test_exactly_at_the_threshold():
    # (3, 4) is 5 away, and (0, 5.001) a little more.
    pred = moved((3.0, 4.0), (0.0, 5.001), (0.0, 0.0), (-3.0, -4.0))
    assert within(pred, TRUE, 5.0).tolist() == [True, False, True, True]
    assert within(pred, TRUE, 5.0, inclusive=False).tolist() == [False, False, True, False]
    assert pck(pred, TRUE, threshold=5) == 0.75
    assert pck(pred, TRUE, threshold=5, inclusive=False) == 0.25


@pytest.mark.parametrize(("alpha", "base"), [(0.1, 70), (0.1, 30), (0.15, 20), (0.05, 60), (0.15, 340)])
def test_ties_survive_binary_fractions(alpha: float, base: int):
    # 0.1 * 70 is 7.000000000000001 in binary, yet a distance of 7 is exactly at the threshold.
    pred = TRUE[:1] + torch.tensor([0.0, round(alpha * base)])
    assert pck(pred, TRUE[:1], threshold=alpha, base=base) == 1.0
    assert pck(pred, TRUE[:1], threshold=alpha, base=base, inclusive=False) == 0.0


def test_micro_differs_from_macro_when_pairs_are_unequal():
    far = (0.0, 99.0)
    preds = [moved((0.0, 0.0)), moved(far, far, far), moved((0.0, 0.0), far)]
    targets = [TRUE[:1], TRUE[:3], TRUE[:2]]
    scores = {
        name: pck(preds, targets, threshold=0.1, base=[100, 100, 100], reduce=name, categories=["dog", "dog", "cat"])
        for name in ("point", "pair", "category")
    }
    # By hand: 2 of 6 points; (1 + 0 + 1/2) / 3; (1/4 of dog + 1/2 of cat) / 2.
    assert scores == pytest.approx({"point": 2 / 6, "pair": 0.5, "category": 0.375})


def test_every_pair_has_its_own_base():
    preds, targets = [moved((0.0, 6.0))] * 2, [TRUE[:1]] * 2
    assert pck(preds, targets, threshold=0.1, base=[50, 100]) == 0.5


def test_integer_predictions_and_a_single_pair():
    assert pck(TRUE.long(), TRUE, threshold=0.1, base=10) == 1.0


def test_bases():
    assert base_length("img", (300, 500), (10, 20, 110, 90)) == 500.0
    assert base_length("bbox", (300, 500), (10, 20, 110, 90)) == 100.0
    assert base_length("bbox", (300, 500), (10.5, 20, 50, 90)) == 70.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pck(TRUE, TRUE[:2], threshold=1.0), ShapeError, r"\[4, 2\] do not fit targets \[2, 2\]"),
        (lambda: pck([TRUE], [TRUE, TRUE], threshold=1.0), ShapeError, "1 pairs, targets for 2"),
        (lambda: pck([], [], threshold=1.0), InputError, "no pairs"),
        (lambda: pck(TRUE[:0], TRUE[:0], threshold=1.0), InputError, "without points"),
        (lambda: pck(TRUE * torch.nan, TRUE, threshold=1.0), InputError, "finite"),
        (lambda: pck(TRUE, TRUE, threshold=-1.0), InputError, "limit is -1.0"),
        (lambda: pck(TRUE, TRUE, threshold=1.0, reduce="pairs"), InputError, "reduce is 'pairs'"),
        (lambda: base_length("box", (1, 1), (0, 0, 1, 1)), InputError, "base is 'box'"),
        (lambda: pck(TRUE, TRUE, threshold=1.0, reduce="category"), ShapeError, "one category for each of 1 pairs"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
