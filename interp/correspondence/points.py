"""Points (y, x) in images: between sizes by plain ratio, to pixels, to the cells of a grid."""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from interp.errors import InputError, ShapeError

Size = tuple[int, int]
# (top, left, bottom, right)
Box = tuple[float | int, float | int, float | int, float | int]


def rescale(points: Num[Tensor, "*batch 2"], size: Size, to: Size) -> Float[Tensor, "*batch 2"]:
    """Carry points from an image of one size to another by plain ratio, without a half-pixel shift or rounding.

    Args:
        points: (y, x) in pixels of ``size``.
        size: (height, width) that the points belong to.
        to: (height, width) to carry them to.

    Returns:
        The points times ``to / size``, in float64: what is a half stays exactly a half.

    Raises:
        InputError: a side is not positive.

    Source: Diffusion Hyperfeatures, official evaluation.
    """
    check_size(size)
    check_size(to)
    sides = torch.tensor([size, to], dtype=torch.float64, device=points.device)
    return points.double() * sides[1] / sides[0]


def to_pixels(points: Num[Tensor, "*batch 2"], size: Size) -> Int[Tensor, "*batch 2"]:
    """Take points to whole pixels: clipped into the image first, then rounded half to even.

    Args:
        points: (y, x) in pixels of ``size``; outside ones move to its border.
        size: (height, width) of the image.

    Returns:
        Rows 0 to height - 1 and columns 0 to width - 1.

    Raises:
        InputError: a coordinate is not finite, or a side is not positive.

    Source: Diffusion Hyperfeatures, official code (clip, then round).
    """
    check_size(size)
    places = points.double()
    if not torch.isfinite(places).all():
        raise InputError(f"Points must be finite numbers (y, x); they are {points.tolist()}.")
    last = torch.tensor(size, dtype=torch.float64, device=points.device) - 1
    return torch.minimum(places.clamp(min=0), last).round().long()


def cells(points: Num[Tensor, "*batch 2"], size: Size, grid: Size) -> Int[Tensor, " *batch"]:
    """Find the cells of a grid that points fall to: scaled by plain ratio, clipped, rounded half to even.

    Args:
        points: (y, x) in pixels of ``size``.
        size: (height, width) of the image.
        grid: (height, width) of the grid, such as (64, 64).

    Returns:
        Flat indexes ``row * width + column`` of the grid: the class labels of the symmetric cross-entropy.

    Raises:
        InputError: a coordinate is not finite, or a side is not positive.

    Source: Diffusion Hyperfeatures, official training code.
    """
    rows, columns = to_pixels(rescale(points, size, grid), grid).unbind(dim=-1)
    return rows * grid[1] + columns


def unflatten(index: Int[Tensor, "*batch"], size: Size) -> Int[Tensor, "*batch 2"]:
    """Turn flat indexes ``row * width + column`` into (y, x)."""
    return torch.stack([index // size[1], index % size[1]], dim=-1)


def check_inside(points: Num[Tensor, "point 2"], size: Size, name: str) -> None:
    """Raise InputError when a point lies outside an image.

    Whole numbers may name the centres of pixels or count them from one, so -0.5 to the side itself are inside.

    Args:
        points: (y, x) in pixels.
        size: (height, width) of the image.
        name: what to call the points in the error.
    """
    limit = torch.tensor(size, dtype=torch.float64, device=points.device)
    outside = ((points < -0.5) | (points > limit)).any(dim=-1)
    if outside.any():
        index = int(outside.nonzero()[0, 0])
        y, x = points[index].tolist()
        raise InputError(
            f"Point {index} of {name} is (y={y:g}, x={x:g}), outside the image of {size[0]} rows and "
            f"{size[1]} columns. Points on disk are (x, y); here they are (y, x)."
        )


def check_size(size: Size) -> None:
    """Raise ShapeError unless this is a (height, width) of whole positive pixels."""
    if len(size) != 2 or any(side < 1 for side in size):
        raise ShapeError(f"A size is (height, width), both at least 1; it is {tuple(size)}.")
