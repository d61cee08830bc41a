"""Bilinear resizing piece by piece, so that an enlarged descriptor map need never exist as a whole."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from interp.correspondence.points import Size


def resized_rows(
    maps: Float[Tensor, "channel height width"], size: Size, first: int, last: int
) -> Float[Tensor, "channel row new_width"]:
    """Compute rows ``first`` to ``last - 1`` of a map resized bilinearly (``align_corners=False``, no smoothing).

    Args:
        maps: the map.
        size: (height, width) to resize to.
        first: the first row wanted.
        last: the row after the last one wanted.

    Returns:
        The rows, as ``torch.nn.functional.interpolate`` computes them up to rounding.
    """
    top, bottom, down = _neighbours(torch.arange(first, last, device=maps.device), maps.shape[1], size[0], maps.dtype)
    left, right, across = _neighbours(torch.arange(size[1], device=maps.device), maps.shape[2], size[1], maps.dtype)
    rows = torch.lerp(maps[:, top], maps[:, bottom], rearrange(down, "row -> row 1"))
    return torch.lerp(rows[:, :, left], rows[:, :, right], across)


def resized_at(
    maps: Float[Tensor, "channel height width"], size: Size, pixels: Int[Tensor, "*batch 2"]
) -> Float[Tensor, "*batch channel"]:
    """Read a map at whole pixels of the size it would be resized to, as `resized_rows` does.

    Args:
        maps: the map.
        size: (height, width) it would be resized to.
        pixels: (y, x) within ``size``.

    Returns:
        The value at each pixel.
    """
    top, bottom, down = _neighbours(pixels[..., 0], maps.shape[1], size[0], maps.dtype)
    left, right, across = _neighbours(pixels[..., 1], maps.shape[2], size[1], maps.dtype)
    upper = torch.lerp(maps[:, top, left], maps[:, bottom, left], down)
    values = torch.lerp(upper, torch.lerp(maps[:, top, right], maps[:, bottom, right], down), across)
    return rearrange(values, "channel ... -> ... channel")


def _neighbours(
    pixels: Int[Tensor, "*batch"], side: int, new_side: int, dtype: torch.dtype
) -> tuple[Int[Tensor, "*batch"], Int[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The two cells between which each new pixel lies, and how far it is from the first to the second."""
    places = ((pixels.float() + 0.5) * (side / new_side) - 0.5).clamp(min=0)
    before = places.long().clamp(max=side - 1)
    return before, (before + 1).clamp(max=side - 1), (places - before).to(dtype)
