"""Signed distances to shapes: negative inside, in the units of the coordinates."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "#scene height 1"]
Columns = Float[Tensor, "#scene _ width"]


def capsule_distance(
    y: Rows, x: Columns, corners: Float[Tensor, "scene 3 2"], radii: Float[Tensor, "scene 2"]
) -> Float[Tensor, "scene height width"]:
    """The signed distance to capsules whose two ends may differ in thickness.

    Args:
        y: where to measure; broadcast against ``x``.
        x: the same.
        corners: the two ends as (y, x), the second one twice.
        radii: at the two ends.

    Returns:
        The distances, exact where the radii are the same.
    """
    y0, x0, y1, x1 = rearrange(corners[:, :2], "scene end yx -> (end yx) scene 1 1")
    first, second = rearrange(radii, "scene end -> end scene 1 1")
    dy, dx = y1 - y0, x1 - x0
    square = (dy.square() + dx.square()).clamp_min(1e-9)
    from_y, from_x = y - y0, x - x0
    along = (from_y * (dy / square) + from_x * (dx / square)).clamp_(0, 1)
    off_y = torch.addcmul(from_y, along, dy, value=-1)
    off_x = torch.addcmul(from_x, along, dx, value=-1)
    distance = off_y.square_().addcmul_(off_x, off_x).sqrt_()
    return distance.addcmul_(along, first - second).sub_(first)


def triangle_distance(
    y: Rows, x: Columns, corners: Float[Tensor, "scene 3 2"], radii: Float[Tensor, "scene 2"]
) -> Float[Tensor, "scene height width"]:
    """The signed distance to triangles with rounded corners.

    Args:
        y: where to measure; broadcast against ``x``.
        x: the same.
        corners: as (y, x), in either sense of rotation.
        radii: the first says how far the triangle is grown on all sides.

    Returns:
        The distances.
    """
    places = rearrange(corners, "scene corner yx -> corner yx scene 1 1")
    edges = places.roll(-1, dims=0) - places
    turn = (edges[0, 0] * edges[1, 1] - edges[0, 1] * edges[1, 0]).sign()
    nearest: Tensor | None = None
    inside: Tensor | None = None
    for (y0, x0), (dy, dx) in zip(places, edges, strict=True):
        from_y, from_x = y - y0, x - x0
        square = (dy.square() + dx.square()).clamp_min(1e-9)
        along = (from_y * (dy / square) + from_x * (dx / square)).clamp_(0, 1)
        off_y = torch.addcmul(from_y, along, dy, value=-1)
        off_x = torch.addcmul(from_x, along, dx, value=-1)
        distance = off_y.square_().addcmul_(off_x, off_x)
        side = (from_y * dx - from_x * dy) * turn
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        inside = side if inside is None else torch.maximum(inside, side)
    assert nearest is not None and inside is not None
    return nearest.sqrt_() * inside.sign() - rearrange(radii[:, 0], "scene -> scene 1 1")
