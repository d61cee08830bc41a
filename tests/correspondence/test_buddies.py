"""Best buddies and cycles on planted descriptors."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from interp.correspondence import best_buddies, cyclical_distance, cyclical_matches, read_saliency
from interp.errors import InputError, ShapeError

SOURCE_CELLS = [(1, 1), (2, 6), (5, 0), (6, 7)]
TARGET_CELLS = [(0, 8), (7, 3), (3, 3), (4, 9)]


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Four cells have a direction of their own in both maps; all others of a map look alike but not the other map."""
    source, target = torch.zeros(8, 7, 8), torch.zeros(8, 8, 10)
    source[6], target[7] = 1.0, 1.0
    for index, (here, there) in enumerate(zip(SOURCE_CELLS, TARGET_CELLS, strict=True)):
        source[:, *here] = 5 * F.one_hot(torch.tensor(index), 8)
        target[:, *there] = 3 * F.one_hot(torch.tensor(index), 8)
    return source, target


def test_planted_buddies_are_found_most_salient_first():
    source, target = planted()
    saliency = torch.full((7, 8), 0.2), torch.full((8, 10), 0.4)
    saliency[0][1, 1], saliency[0][6, 7] = 0.1, 1.0
    found = best_buddies(source, target, *saliency, n=5)
    pairs = list(zip(map(tuple, found.source.tolist()), map(tuple, found.target.tolist()), strict=True))
    # Where nothing resembles anything, the first cells of both maps are each other's first of equals.
    assert set(pairs) == {*zip(SOURCE_CELLS, TARGET_CELLS, strict=True), ((0, 0), (0, 0))}
    assert pairs[0] == ((6, 7), (4, 9))
    assert found.saliency.tolist() == pytest.approx(sorted(found.saliency.tolist(), reverse=True))
    assert found.saliency[0].item() == pytest.approx(0.7)


def test_the_background_is_left_out():
    source, target = planted()
    here, there = torch.zeros(7, 8), torch.zeros(8, 10)
    here[1, 1] = here[2, 6] = here[5, 0] = 0.5
    there[0, 8] = there[7, 3] = 0.5
    there[3, 3] = 0.05  # exactly at the threshold is background
    found = best_buddies(source, target, here, there)
    assert sorted(found.source.tolist()) == [[1, 1], [2, 6]]
    with pytest.raises(InputError, match="foreground is 0% of the source"):
        best_buddies(source, target, torch.zeros(7, 8), there)


def test_one_of_each_cluster_and_that_the_most_salient():
    # Two groups of three nearly equal directions, every cell its own buddy.
    generator = torch.Generator().manual_seed(0)
    base = torch.eye(16)[:2].repeat_interleave(3, dim=0)
    rows = F.normalize(base + 0.05 * torch.randn(6, 16, generator=generator), dim=1)
    maps = rows.T.reshape(16, 2, 3)
    saliency = torch.tensor([[0.3, 0.9, 0.1], [0.2, 0.1, 0.8]])
    found = best_buddies(maps, maps, saliency, saliency, n=2)
    assert found.source.tolist() == [[0, 1], [1, 2]]
    assert found.target.tolist() == [[0, 1], [1, 2]]
    again = best_buddies(maps, maps, saliency, saliency, n=2)
    assert again.source.tolist() == found.source.tolist()


def test_fewer_different_pairs_than_asked_for():
    source, target = planted()
    here = torch.zeros(7, 8)
    here[1, 1] = 1.0
    found = best_buddies(source, target, here, torch.ones(8, 10), n=10)
    assert (found.source.tolist(), found.target.tolist()) == ([[1, 1]], [[0, 8]])


def angles(*degrees: float) -> torch.Tensor:
    radians = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([radians.cos(), radians.sin()])[:, None]


def test_cyclical_distance_by_hand():
    # There: 0 -> 2, 20 -> 22, 40 -> 45, 75 -> 45. Back: 45 -> 40. So the last cell ends one column to the left.
    distance, there = cyclical_distance(angles(0, 20, 40, 75), angles(2, 22, 45))
    assert there.tolist() == [[0, 1, 2, 2]]
    assert distance.tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_smallest_cycles_are_preferred():
    source, target = angles(0, 20, 40, 75), angles(2, 22, 45)
    ones = torch.ones(1, 4), torch.ones(1, 3)
    salient_last = torch.tensor([[0.5, 0.5, 0.5, 1.0]])
    found = cyclical_matches(source, target, salient_last, ones[1], n=1)
    assert found.source.tolist() != [[0, 3]]  # most salient, but not among the two smallest cycles
    every = cyclical_matches(source, target, *ones, n=4)
    assert sorted(every.source.tolist()) == [[0, 0], [0, 1], [0, 2], [0, 3]]
    masked = cyclical_matches(source, target, ones[0], torch.tensor([[0.0, 0.0, 1.0]]), n=4)
    assert sorted(masked.source.tolist()) == [[0, 2], [0, 3]]
    with pytest.raises(InputError, match="No cell of the source's foreground"):
        cyclical_matches(source, target, ones[0], torch.zeros(1, 3))


def test_saliency_maps_are_read_at_the_cells_size(tmp_path: Path):
    picture = Image.new("L", (8, 4), 0)
    picture.paste(255, (4, 0, 8, 4))
    picture.save(tmp_path / "a.png")
    saliency = read_saliency(tmp_path / "a.png", (2, 2))
    assert saliency.shape == (2, 2)
    assert saliency[:, 0].max() < 0.3 < 0.7 < saliency[:, 1].min()


def test_refusals():
    source, target = planted()
    with pytest.raises(ShapeError, match=r"saliency of the target is \[7, 8\].* have \[8, 10\] cells"):
        best_buddies(source, target, torch.ones(7, 8), torch.ones(7, 8))
    with pytest.raises(InputError, match="n is 0"):
        cyclical_matches(source, target, torch.ones(7, 8), torch.ones(8, 10), n=0)
