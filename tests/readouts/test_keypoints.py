import math

import pytest
import torch

from interp.errors import InputError
from interp.readouts import decode_heatmaps, heatmaps, keypoint_pck, oks, openpose_points
from interp.readouts.keypoints import COCO, COCO_SIGMAS, OPENPOSE


def test_heat_maps_are_gaussians_of_height_one_around_truncated_cells():
    maps = heatmaps(torch.tensor([[2.9, 5.2], [0.0, 0.0]]), torch.tensor([True, True]), (8, 16))
    assert maps.shape == (2, 8, 16)
    sigma = 8 / 16
    for y, x in ((2, 5), (3, 5), (2, 7), (4, 4)):
        expected = math.exp(-((y - 2) ** 2 + (x - 5) ** 2) / (2 * sigma**2))
        assert maps[0, y, x].item() == pytest.approx(expected, rel=1e-5)
    assert maps[0, 2, 5] == 1 and maps[1, 0, 0] == 1
    wide = heatmaps(torch.tensor([[2.0, 5.0]]), torch.tensor([True]), (64, 64))
    assert wide[0, 6, 5].item() == pytest.approx(math.exp(-0.5), rel=1e-5)  # 4 cells are one deviation at 64
    assert heatmaps(torch.tensor([[2.0, 5.0]]), torch.tensor([True]), (64, 64), 1.0)[0, 3, 5].item() == pytest.approx(
        math.exp(-0.5), rel=1e-5
    )


def test_hidden_points_and_points_outside_give_zeros():
    points = torch.tensor([[3.0, 3.0], [-0.5, 2.0], [2.0, 8.0], [math.nan, 1.0]])
    maps = heatmaps(points, torch.tensor([False, True, True, False]), (8, 8))
    assert maps.abs().max() == 0


def test_decoding_finds_the_maximum_rescales_and_knows_what_is_not_there():
    visible = torch.tensor([[True, True, False]])
    maps = heatmaps(torch.tensor([[[3.0, 6.0], [1.0, 0.0], [2.0, 2.0]]]), visible, (8, 8))
    points, there = decode_heatmaps(maps)
    assert points.tolist() == [[[3, 6], [1, 0], [0, 0]]]
    assert there.tolist() == [[True, True, False]]
    assert decode_heatmaps(maps, size=(64, 32))[0][0].tolist() == [[24, 24], [8, 0], [0, 0]]
    faint = 0.1 * maps
    assert not decode_heatmaps(faint)[1].any()  # strictly above
    assert decode_heatmaps(1.01 * faint)[1].tolist() == there.tolist()


def test_openpose_has_a_neck_between_both_shoulders_and_its_own_order():
    points = torch.arange(34.0).reshape(1, 17, 2)
    visible = torch.ones(1, 17, dtype=torch.bool)
    found, there = openpose_points(points, visible)
    assert found.shape == (1, 18, 2) and there.all()
    left, right = (points[0, COCO.index(f"{side}_shoulder")] for side in ("left", "right"))
    assert torch.equal(found[0, 1], (left + right) / 2)
    assert (OPENPOSE[2], OPENPOSE[13], OPENPOSE[16]) == ("right_shoulder", "left_ankle", "right_ear")
    for index, name in enumerate(OPENPOSE):
        if name != "neck":
            assert torch.equal(found[0, index], points[0, COCO.index(name)])
    visible[0, COCO.index("right_shoulder")] = False
    found, there = openpose_points(points, visible)
    assert [OPENPOSE[index] for index in range(18) if not there[0, index]] == ["neck", "right_shoulder"]
    assert found[0, 1].tolist() == [0, 0]


def test_pck_is_strict_by_axis_and_leaves_out_what_is_hidden():
    true = torch.tensor([[[10.0, 10.0], [30.0, 20.0], [20.0, 15.0], [99.0, 99.0]]])
    visible = torch.tensor([[True, True, True, False]])
    # Extents 20 and 10: 2 pixels down are a tenth, 2 pixels across a fifth.
    predicted = true + torch.tensor([[[1.9, 0.0], [0.0, 1.9], [0.0, 0.9], [0.0, 0.0]]])
    assert keypoint_pck(predicted, true, visible).tolist() == pytest.approx([2 / 3])
    assert keypoint_pck(predicted, true, visible, 0.2).tolist() == [1.0]
    exact = true + torch.tensor([[[0.0, 2.5]]])
    assert keypoint_pck(exact, true, visible, 0.25).tolist() == [0.0]
    assert keypoint_pck(exact, true, visible, 0.2500001).tolist() == [1.0]


def test_the_zero_filled_extent_is_that_of_the_authors_helper():
    true = torch.tensor([[[10.0, 10.0], [30.0, 20.0], [5.0, 5.0]]])
    visible = torch.tensor([[True, True, False]])
    predicted = true + torch.tensor([[[0.0, 1.5]]])
    assert keypoint_pck(predicted, true, visible).tolist() == [0.0]  # 1.5 of 10
    assert keypoint_pck(predicted, true, visible, extent="zero_filled").tolist() == [1.0]  # 1.5 of 20


def test_oks_by_hand():
    true = torch.zeros(1, 17, 2)
    visible = torch.zeros(1, 17, dtype=torch.bool)
    visible[0, [0, 11]] = True
    predicted = true.clone()
    predicted[0, 11] = torch.tensor([3.0, 4.0])
    area = torch.tensor([400.0])
    hip = math.exp(-25 / (2 * 400 * (2 * COCO_SIGMAS[11]) ** 2))
    assert COCO_SIGMAS[11] == 0.107
    assert oks(predicted, true, visible, area).tolist() == pytest.approx([(1 + hip) / 2], rel=1e-5)
    assert oks(true, true, visible, area).tolist() == [1.0]


def test_bad_keypoints_are_refused():
    two = torch.ones(1, 2, 2)
    with pytest.raises(InputError, match="not finite"):
        heatmaps(torch.tensor([[math.nan, 0.0]]), torch.tensor([True]), (4, 4))
    with pytest.raises(InputError, match="must be positive"):
        heatmaps(torch.zeros(1, 2), torch.tensor([True]), (4, 4), 0.0)
    with pytest.raises(InputError, match="instance 0 has no visible"):
        keypoint_pck(two, two, torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="no extent"):
        keypoint_pck(two, two, torch.ones(1, 2, dtype=torch.bool))
    for maps in (torch.full((1, 4, 4), math.nan), torch.zeros(1, 0, 4)):
        with pytest.raises(InputError, match="have no maximum"):
            decode_heatmaps(maps)
    with pytest.raises(InputError, match="17 sigmas are given for 2"):
        oks(two, two, torch.ones(1, 2, dtype=torch.bool), torch.ones(1))
