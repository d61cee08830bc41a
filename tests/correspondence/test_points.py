"""Points between sizes, pixels and cells: hand-worked."""

import pytest
import torch

from interp.correspondence import cells, rescale, to_pixels
from interp.correspondence.points import check_inside, unflatten
from interp.errors import InputError, ShapeError


def test_rescale_is_the_plain_ratio_per_axis():
    points = torch.tensor([[10, 30], [0, 0], [100, 300]])
    # 100 x 300 -> 50 x 600: rows halve, columns double; a half-pixel shift would move (0, 0).
    assert rescale(points, (100, 300), (50, 600)).tolist() == [[5.0, 60.0], [0.0, 0.0], [50.0, 600.0]]


def test_rescale_keeps_halves_exact():
    # 7 * 224 / 448 = 3.5 exactly, which half-to-even needs to see as a half.
    scaled = rescale(torch.tensor([[7.0, 33.0]]), (448, 448), (224, 224))
    assert scaled.tolist() == [[3.5, 16.5]]
    # In float32, 175 * (128 / 500) would not be 44.8 to double precision.
    assert rescale(torch.tensor([[175, 0]]), (500, 1), (128, 1))[0, 0].item() == 44.8


def test_half_integers_round_to_even():
    points = torch.tensor([[0.5, 1.5], [2.5, 3.5], [4.4999, 4.5001]])
    assert to_pixels(points, (10, 10)).tolist() == [[0, 2], [2, 4], [4, 5]]


def test_clip_comes_before_rounding():
    # Rounded only, 63.5 would be row 64, which does not exist.
    points = torch.tensor([[-0.5, -3.0], [63.5, 64.0], [63.4, 1000.0]])
    assert to_pixels(points, (64, 64)).tolist() == [[0, 0], [63, 63], [63, 63]]


def test_cells_are_row_major_in_non_square_grids():
    points = torch.tensor([[0.0, 0.0], [0.0, 199.0], [99.0, 0.0], [99.0, 199.0], [50.0, 25.0]])
    # 100 x 200 -> 4 x 16: rows 0, 3.96 -> 3; columns 0, 15.92 -> 15; (50, 25) -> (2, 2).
    assert cells(points, (100, 200), (4, 16)).tolist() == [0, 15, 48, 63, 34]


def test_cells_at_half_way():
    # 12 / 512 * 64 = 1.5 -> 2, and 20 / 512 * 64 = 2.5 -> 2.
    assert cells(torch.tensor([[12, 20]]), (512, 512), (64, 64)).tolist() == [2 * 64 + 2]


def test_unflatten_undoes_cells():
    index = torch.arange(12)
    assert unflatten(index, (3, 4)).tolist() == [[row, column] for row in range(3) for column in range(4)]


def test_inputs_are_not_changed():
    points = torch.tensor([[-1.0, 2.0]])
    to_pixels(points, (5, 5))
    rescale(points, (5, 5), (10, 10))
    assert points.tolist() == [[-1.0, 2.0]]


def test_points_outside_are_named():
    check_inside(torch.tensor([[100.0, 200.0], [-0.5, 0.0]]), (100, 200), "it")
    with pytest.raises(InputError, match=r"Point 1 of it is \(y=150, x=50\), outside the image of 100 rows"):
        check_inside(torch.tensor([[50.0, 50.0], [150.0, 50.0]]), (100, 200), "it")
    with pytest.raises(InputError, match="Point 0 of it"):
        check_inside(torch.tensor([[0.0, -1.0]]), (100, 200), "it")


def test_bad_points_and_sizes():
    with pytest.raises(InputError, match="finite"):
        to_pixels(torch.tensor([[float("nan"), 0.0]]), (5, 5))
    with pytest.raises(ShapeError, match=r"\(0, 5\)"):
        rescale(torch.zeros(1, 2), (5, 5), (0, 5))
