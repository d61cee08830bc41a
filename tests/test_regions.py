import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.regions import Region


def test_boxes() -> None:
    upper = Region.box(0.0, 0.0, 0.5, 1.0)
    assert upper.cells(2, 3) == [0, 1, 2]
    assert upper.cells(4, 2) == [0, 1, 2, 3]
    # Of three rows the middle one is half covered, which is not more than half.
    assert upper.cells(3, 1) == [0]
    assert Region.box(0.0, 0.0, 0.51, 1.0).cells(3, 1) == [0, 1]
    assert Region.box(0.25, 0.5, 0.75, 1.0).cells(4, 4) == [6, 7, 10, 11]
    torch.testing.assert_close(
        Region.box(0.1, 0.2, 0.6, 0.9).covered(2, 2),
        torch.tensor([[0.8 * 0.6, 0.8 * 0.8], [0.2 * 0.6, 0.2 * 0.8]], dtype=torch.float64),
    )


def test_masks_are_resampled_by_area() -> None:
    shape = torch.zeros(6, 4, dtype=torch.bool)
    shape[1:5, 2:] = True
    region = Region.mask(shape)
    assert region.cells(6, 4) == shape.flatten().nonzero().flatten().tolist()
    assert region.cells(3, 2) == [3]  # above and below it half of a cell is covered
    assert (
        region.cells(12, 8)
        == shape.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten().nonzero().flatten().tolist()
    )
    # Sides that do not divide: one cell of five covers 1.2 rows of six.
    whole = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    fine = whole.repeat_interleave(35, 0).repeat_interleave(35, 1).double()  # 210 × 140 pixels
    want = fine.unflatten(0, (5, 42)).unflatten(2, (7, 20)).mean(dim=(1, 3))
    torch.testing.assert_close(Region.mask(whole).covered(5, 7), want)


def test_regions_compare_print_and_keep_their_mask() -> None:
    shape = torch.ones(2, 3, dtype=torch.bool)
    region = Region.mask(shape)
    shape[0, 0] = False
    assert region.cells(2, 3) == [0, 1, 2, 3, 4, 5]
    assert region == Region.mask(torch.ones(2, 3, dtype=torch.bool)) != Region.mask(shape)
    assert hash(region) == hash(Region.mask(shape))
    assert Region.box(0.0, 0.0, 1.0, 0.5) == Region.box(0.0, 0.0, 1.0, 0.5) != Region.box(0.0, 0.0, 1.0, 0.25)
    assert region != Region.box(0.0, 0.0, 1.0, 1.0) and region != "all"
    assert repr(region) == "Region.mask(<2×3, 6 True>)"
    assert repr(Region.box(0.0, 0.25, 1.0, 0.5)) == "Region.box(0.0, 0.25, 1.0, 0.5)"


def test_errors() -> None:
    with pytest.raises(InputError, match="top < bottom"):
        Region.box(0.5, 0.0, 0.5, 1.0)
    with pytest.raises(InputError, match="shares 0 to 1"):
        Region.box(0.0, 0.0, 0.5, 8.0)
    with pytest.raises(InputError, match=r"not torch\.float32"):
        Region.mask(torch.ones(2, 2))
    with pytest.raises(ShapeError, match=r"shape \(1, 2, 2\)"):
        Region.mask(torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="False everywhere"):
        Region.mask(torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="too small here"):
        Region.box(0.0, 0.0, 0.2, 0.2).cells(2, 2)
