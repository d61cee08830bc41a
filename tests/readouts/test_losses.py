import math

import pytest
import torch

from interp.errors import InputError
from interp.readouts import aligned_cosine_distance, cosine_hinge, match_size, mse, sparse_mse

# One operation in single precision.
CLOSE = {"rel": 1e-6, "abs": 1e-7}


def test_mse_by_hand_and_in_float32():
    prediction, target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert float(mse(prediction, target)) == pytest.approx((4 + 9) / 4, **CLOSE)
    # The square of 300 is beyond half precision.
    assert float(mse(torch.tensor([300.0]).half(), torch.tensor([0.0]).half())) == pytest.approx(90000, rel=1e-3)


def test_sparse_mse_weighs_background_and_foreground_alike_element_by_element():
    target = torch.tensor([-0.5, -0.5, -0.5, 0.5]).reshape(1, 2, 1, 2)
    prediction = torch.tensor([0.0, -0.5, -0.5, 0.0]).reshape(1, 2, 1, 2)
    # Background: errors 0.25, 0, 0; foreground: 0.25.
    expected = (0.25 / 3 + 0.25) / 2
    assert float(sparse_mse(prediction, target, -0.5)) == pytest.approx(expected, **CLOSE)
    assert float(mse(prediction, target)) == pytest.approx(0.125, **CLOSE)


def test_sparse_mse_without_background_and_with_nothing_else_is_the_plain_mean():
    prediction = torch.tensor([0.0, 1.0, 0.5])
    for target in (torch.full((3,), -0.5), torch.tensor([0.5, 0.25, 0.5])):
        expected = float(((prediction - target) ** 2).mean())
        assert float(sparse_mse(prediction, target, -0.5)) == pytest.approx(expected, **CLOSE)
    assert float(sparse_mse(prediction, torch.full((3,), -0.5), -0.5)) == pytest.approx((0.25 + 2.25 + 1.0) / 3)


def test_almost_the_minimum_is_no_background():
    target = torch.tensor([-0.5, -0.5 + 1e-6])
    prediction = torch.tensor([0.5, -0.5])
    assert float(sparse_mse(prediction, target, -0.5)) == pytest.approx(0.5, rel=1e-4)


def test_targets_are_resized_by_the_nearest_pixel_so_that_background_stays_exact():
    target = torch.full((1, 1, 6, 6), -0.5)
    target[..., 0::2, 0::2] = 0.3
    small = match_size(target, (3, 3))
    assert torch.equal(small, torch.full((1, 1, 3, 3), 0.3))
    assert set(match_size(target, (4, 5)).unique().tolist()) <= set(target.unique().tolist())
    assert match_size(target, (6, 6)) is target


def test_the_aligned_distance_compares_cell_by_cell():
    a = torch.zeros(2, 2, 1, 2)
    a[:, 0] = 1.0
    b = a.clone()
    b[0, :, 0, 1] = torch.tensor([0.0, 3.0])  # at a right angle in one of two cells
    b[1, :, 0, 0] = torch.tensor([-2.0, 0.0])  # opposite in one
    b[1, :, 0, 1] = torch.tensor([1.0, 1.0])
    expected = [0.5, (2 + 1 - math.sqrt(0.5)) / 2]
    assert aligned_cosine_distance(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    swapped = b.flip(-1)
    assert aligned_cosine_distance(b[:1], swapped[:1]).item() == pytest.approx(1.0, abs=1e-6)


def angled(*degrees):
    """Maps of one cell whose vectors have angles."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], dim=1)[..., None, None]


def test_the_hinge_by_hand():
    anchor, positive, negative = angled(0, 0, 0), angled(0, 60, 90), angled(90, 60, 60)
    # Distances: near 0, 0.5, 1; far 1, 0.5, 0.5. Terms: max(0, -0.5), 0.5, 1.
    assert cosine_hinge(anchor, positive, negative).item() == pytest.approx(1.5, abs=1e-5)
    assert cosine_hinge(anchor, positive, negative, margin=1.25).item() == pytest.approx(0.25 + 1.25 + 1.75, abs=1e-5)
    assert cosine_hinge(anchor[:1], positive[:1], negative[:1]).item() == 0


def test_bad_targets_are_refused():
    with pytest.raises(InputError, match="NaN or infinity"):
        mse(torch.zeros(2), torch.tensor([0.0, math.nan]))
    with pytest.raises(InputError, match="NaN or infinity"):
        sparse_mse(torch.zeros(2), torch.tensor([0.0, math.inf]), 0.0)
    with pytest.raises(InputError, match="no element"):
        mse(torch.zeros(0), torch.zeros(0))
    with pytest.raises(InputError, match="margin"):
        cosine_hinge(angled(0), angled(0), angled(0), margin=-1.0)
