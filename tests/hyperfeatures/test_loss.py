import math

import pytest
import torch
import torch.nn.functional as F

from interp.errors import InputError, ShapeError
from interp.hyperfeatures import cell_index, scale_points, symmetric_cross_entropy

SCALE = 1 / 0.07


def maps(seed, height, width, pairs=1, dim=6):
    return torch.randn(pairs, dim, height, width, generator=torch.Generator().manual_seed(seed))


def points(*pairs):
    return torch.tensor(pairs, dtype=torch.float32)[None]


def full_matrix_loss(map_a, map_b, labels_a, labels_b):
    """One pair, from the whole matrix of cosines in float64, labels given by hand."""
    flat_a, flat_b = (m.double().flatten(1) for m in (map_a, map_b))
    cosines = (flat_a.T @ flat_b) / (flat_a.norm(dim=0)[:, None] * flat_b.norm(dim=0)[None])
    forward = torch.log_softmax(SCALE * cosines, dim=1)
    backward = torch.log_softmax(SCALE * cosines.T, dim=1)
    there = -sum(forward[a, b] for a, b in zip(labels_a, labels_b, strict=True)) / len(labels_a)
    back = -sum(backward[b, a] for a, b in zip(labels_a, labels_b, strict=True)) / len(labels_a)
    return ((there + back) / 2).item()


def test_cells_are_clipped_and_then_rounded_half_to_even():
    size = (5, 8)
    cases = {
        (0.0, 0.0): 0,
        (0.5, 0.5): 0,  # halves go to the even neighbour
        (1.5, 2.5): 2 * 8 + 2,
        (2.5, 3.5): 2 * 8 + 4,
        (3.49, 6.51): 3 * 8 + 7,
        (-7.0, 3.0): 3,
        (4.6, 7.7): 4 * 8 + 7,  # rounding first and clipping after would agree; without clipping row 5 does not exist
        (100.0, -0.2): 4 * 8,
        (5.0, 8.0): 4 * 8 + 7,
    }
    found = cell_index(torch.tensor(list(cases)), size)
    assert found.tolist() == list(cases.values())


def test_points_are_scaled_by_the_plain_ratio_of_sizes():
    scaled = scale_points(torch.tensor([[112.0, 56.0], [224.0, 0.0]]), (224, 448), (64, 64))
    assert scaled.tolist() == [[32.0, 8.0], [64.0, 0.0]]
    with pytest.raises(InputError, match="positive"):
        scale_points(torch.ones(1, 2), (0, 4), (2, 2))


def test_a_loss_by_hand_on_four_orthogonal_cells():
    # Every cell of both maps is its own axis, so that the right cell has cosine 1 and the three others 0.
    basis = torch.eye(4).reshape(1, 4, 2, 2) * 3
    expected = math.log(math.exp(SCALE) + 3) - SCALE
    right = symmetric_cross_entropy(basis, basis, points((0.0, 1.0)), points((0.0, 1.0)))
    assert right.item() == pytest.approx(expected, abs=1e-5)
    wrong = symmetric_cross_entropy(basis, basis, points((0.0, 1.0)), points((1.0, 1.0)))
    assert wrong.item() == pytest.approx(expected + SCALE, rel=1e-5)
    by_half = symmetric_cross_entropy(basis, basis, points((0.0, 1.0), (0.0, 0.0)), points((0.0, 1.0), (1.0, 1.0)))
    assert by_half.item() == pytest.approx(expected + SCALE / 2, rel=1e-5)


def test_the_loss_is_that_of_the_full_matrix_for_maps_of_two_shapes():
    a, b = maps(0, 5, 8), maps(1, 6, 4)
    of_a = points((0.5, 7.6), (3.5, 2.0), (-3.0, 9.0))
    of_b = points((5.5, 0.0), (2.5, 3.5), (0.4, 1.5))
    labels_a = [0 * 8 + 7, 4 * 8 + 2, 0 * 8 + 7]
    labels_b = [5 * 4 + 0, 2 * 4 + 3, 0 * 4 + 2]  # 5.5 is clipped to 5, 3.5 to 3
    loss = symmetric_cross_entropy(a, b, of_a, of_b)
    # float32 logits of size 14 are exact to 1e-6.
    assert loss.item() == pytest.approx(full_matrix_loss(a[0], b[0], labels_a, labels_b), rel=1e-5)
    swapped = symmetric_cross_entropy(b, a, of_b, of_a)
    assert swapped.item() == pytest.approx(loss.item(), rel=1e-6)
    assert symmetric_cross_entropy(a, b, of_a, of_b, scale=1.0).item() != pytest.approx(loss.item(), rel=1e-2)


def test_absent_points_do_not_count_whatever_they_hold():
    a, b = maps(0, 4, 4, pairs=2), maps(1, 4, 4, pairs=2)
    generator = torch.Generator().manual_seed(3)
    of_a, of_b = (4 * torch.rand(2, 3, 2, generator=generator) for _ in range(2))
    of_a[1, 2] = float("nan")
    present = torch.tensor([[True, True, True], [True, True, False]])
    loss = symmetric_cross_entropy(a, b, of_a, of_b, present=present)
    first = symmetric_cross_entropy(a[:1], b[:1], of_a[:1], of_b[:1])
    second = symmetric_cross_entropy(a[1:], b[1:], of_a[1:, :2], of_b[1:, :2])
    assert abs(first - second) > 0.1
    assert loss.item() == pytest.approx((first + second).item() / 2, rel=1e-5)


def test_gradients_reach_both_maps_at_all_cells():
    a, b = maps(0, 3, 3).requires_grad_(), maps(1, 3, 3).requires_grad_()
    symmetric_cross_entropy(a, b, points((1.0, 1.0)), points((2.0, 0.0))).backward()
    assert (a.grad.abs().sum(1) > 0).all()
    assert (b.grad.abs().sum(1) > 0).all()
    # Cosines do not see the length of a descriptor.
    assert F.cosine_similarity(a.grad, a, dim=1).abs().max() < 1e-5


def test_what_does_not_fit_is_refused():
    a, b, p = maps(0, 3, 3), maps(1, 3, 3), points((1.0, 1.0))
    with pytest.raises(ShapeError, match="not comparable"):
        symmetric_cross_entropy(a, maps(1, 3, 3, dim=5), p, p)
    with pytest.raises(ShapeError, match="do not fit 1 pairs"):
        symmetric_cross_entropy(a, b, p.expand(2, 1, 2), p.expand(2, 1, 2))
    with pytest.raises(InputError, match="pair 0 has no keypoint"):
        symmetric_cross_entropy(a, b, p, p, present=torch.tensor([[False]]))
    with pytest.raises(InputError, match="not finite"):
        symmetric_cross_entropy(a, b, points((float("nan"), 1.0)), p)
