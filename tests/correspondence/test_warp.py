"""Dense correspondences of a known shift, and what they carry over."""

import sys

import pytest
import torch
import torch.nn.functional as F

from interp.correspondence import carried_colours, colour_map, dense_matches, match, warp
from interp.errors import ShapeError


def test_a_known_shift_is_recovered():
    wide = F.normalize(torch.randn(32, 12, 20), dim=0)
    source, target = wide[:, :, :15], wide[:, 2:, 5:]  # target (y, x) is source (y + 2, x + 5)
    matches = dense_matches(source, target)
    assert matches.where.shape == (10, 15, 2)
    assert matches.source_size == (12, 15)
    rows, columns = torch.meshgrid(torch.arange(2, 12), torch.arange(5, 15), indexing="ij")
    assert torch.equal(matches.where[:, :10], torch.stack([rows, columns], dim=-1))
    # A dot product of 32 unit-length numbers in float32.
    torch.testing.assert_close(matches.score[:, :10], torch.ones(10, 10), atol=1e-5, rtol=0)
    image = torch.rand(3, 12, 15)
    assert torch.equal(warp(image, matches)[:, :, :10], image[:, 2:, 5:])


def test_masks_and_other_image_sizes():
    maps = torch.eye(6).reshape(6, 2, 3)
    matches = dense_matches(maps, maps)
    image = torch.rand(3, 20, 30)
    # Plain ratio of 10: cell (1, 2) is pixel (10, 20).
    assert torch.equal(warp(image, matches), image[:, ::10, ::10])
    mask = torch.tensor([[True, False, False], [False, False, True]])
    warped = warp(image, matches, mask=mask, fill=0.5)
    assert torch.equal(warped[:, 1, 2], image[:, 10, 20])
    assert (warped[:, ~mask] == 0.5).all()
    with pytest.raises(ShapeError, match=r"mask is \[3, 2\], but the matches are \[2, 3\]"):
        warp(image, matches, mask=mask.T.contiguous())


def test_dense_is_match_from_the_target_at_every_pixel():
    source, target = torch.randn(8, 4, 5), torch.randn(8, 3, 6)
    matches = dense_matches(source, target, (12, 10), target_size=(6, 12), chunk=25)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(12), indexing="ij")
    pixels = torch.stack([rows, columns], dim=-1).reshape(-1, 2)
    expected = match(target, source, pixels, (6, 12), target_size=(12, 10))
    assert matches.where.reshape(-1, 2).tolist() == expected.tolist()


def test_colours_are_carried_and_all_different():
    colours = colour_map((8, 9))
    assert colours.shape == (3, 8, 9)
    assert colours.min() >= 0
    assert colours.max() <= 1
    apart = torch.cdist(colours.flatten(1).T, colours.flatten(1).T) + 9 * torch.eye(72)
    assert apart.min() > 0.02
    luminance = torch.einsum("c,chw->hw", torch.tensor([0.299, 0.587, 0.114]), colours)
    assert (luminance.diff(dim=0) > 0).all()  # rows can be told apart without any colour
    maps = torch.eye(72).reshape(72, 8, 9)
    assert torch.equal(carried_colours(dense_matches(maps, maps.flip(2))), colours.flip(2))


def test_queries_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch):
    modules = [sys.modules[f"interp.correspondence.{name}"] for name in ("nearest", "warp")]
    source, target = torch.randn(8, 4, 5), torch.randn(8, 3, 6)
    whole = dense_matches(source, target, (12, 10), metric="l2")
    for module in modules:
        monkeypatch.setattr(module, "BLOCK", 200)
    parts = dense_matches(source, target, (12, 10), metric="l2")
    assert torch.equal(whole.where, parts.where)
    # Products of 8 numbers, summed in another order, then a square root.
    torch.testing.assert_close(whole.score, parts.score, atol=1e-5, rtol=0)
