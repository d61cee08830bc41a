"""The training loss: symmetric cross-entropy between the descriptors of corresponding keypoints."""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.hyperfeatures.network import LOGIT_SCALE


def scale_points(
    points: Float[Tensor, "*batch point 2"], from_size: tuple[int, int], to_size: tuple[int, int]
) -> Float[Tensor, "*batch point 2"]:
    """Carry points from one raster to another by the plain ratio of the sizes.

    Args:
        points: (y, x) in the first raster.
        from_size: (height, width) of the first raster, such as an image's pixels.
        to_size: (height, width) of the second, such as a descriptor map's cells.

    Returns:
        (y, x) in the second raster, not rounded.

    Raises:
        InputError: a size that is not positive.

    Source: Diffusion Hyperfeatures, official code (no half-pixel shift).
    """
    if min(*from_size, *to_size) < 1:
        raise InputError(f"sizes must be positive (height, width), not {from_size} and {to_size}")
    ratio = torch.tensor([to / of for to, of in zip(to_size, from_size, strict=True)], dtype=torch.float64)
    return (points.to(torch.float64) * ratio.to(points.device)).to(points.dtype)


def cell_index(points: Float[Tensor, "*batch point 2"], size: tuple[int, int]) -> Int[Tensor, "*batch point"]:
    """The flat index of the cell each point falls in.

    Coordinates are clipped to the map, then rounded half to even; the index is ``row · width + column``.

    Args:
        points: (y, x) in cells of the map.
        size: (height, width) of the map.

    Returns:
        Indexes into the map read row by row.

    Raises:
        InputError: a coordinate is not finite.

    Source: Diffusion Hyperfeatures, official code.
    """
    if not bool(torch.isfinite(points).all()):
        raise InputError("a keypoint's coordinate is not finite: say which points are absent with `present`")
    limit = torch.tensor([size[0] - 1, size[1] - 1], dtype=points.dtype, device=points.device)
    # torch.round rounds halves to even.
    cells = points.clamp(min=0).minimum(limit).round().long()
    return cells[..., 0] * size[1] + cells[..., 1]


def symmetric_cross_entropy(
    maps_a: Float[Tensor, "pair dim height_a width_a"],
    maps_b: Float[Tensor, "_ _ height_b width_b"],
    points_a: Float[Tensor, "_ point 2"],
    points_b: Float[Tensor, "_ _ 2"],
    *,
    present: Bool[Tensor, "_ _"] | None = None,
    scale: float = math.exp(LOGIT_SCALE),
) -> Float[Tensor, ""]:
    """Classify, for each keypoint, the cell of the other map that corresponds, in both directions.

    The logits are scaled cosines between a keypoint's descriptor and all cells of the other map; only the rows
    of keypoints are computed.

    Args:
        maps_a: descriptor maps of the first images.
        maps_b: descriptor maps of the second images; they may have another height and width.
        points_a: ``[pair, point, 2]``, (y, x) of the keypoints in cells of ``maps_a``, not rounded; points outside are
            clipped.
        points_b: the same keypoints in cells of ``maps_b``.
        present: ``[pair, point]``, which points count; all, when not given. The others may hold anything.
        scale: factor of the cosines, 14.286 by default.

    Returns:
        The mean over points, then over the two directions, then over pairs.

    Raises:
        InputError: a pair has no point that counts, or a coordinate is not finite.
        ShapeError: maps or points do not fit together.

    Source: Diffusion Hyperfeatures, section 3.3 and official code.
    """
    if maps_a.shape[:2] != maps_b.shape[:2] or maps_a.ndim != 4 or maps_b.ndim != 4:
        raise ShapeError(
            f"maps of shapes {list(maps_a.shape)} and {list(maps_b.shape)} are not comparable: expected [pair, dim, "
            "height, width] with as many pairs and channels in both"
        )
    if points_a.shape != points_b.shape or points_a.shape[0] != maps_a.shape[0]:
        raise ShapeError(
            f"points of shapes {list(points_a.shape)} and {list(points_b.shape)} do not fit {maps_a.shape[0]} pairs: "
            "expected [pair, point, 2] twice"
        )
    if present is None:
        present = torch.ones(points_a.shape[:2], dtype=torch.bool, device=points_a.device)
    if present.shape != points_a.shape[:2]:
        raise ShapeError(f"present has shape {list(present.shape)}, the points are {list(points_a.shape[:2])}")
    counts = present.sum(dim=1)
    if not bool((counts > 0).all()):
        raise InputError(f"pair {int((counts == 0).nonzero()[0])} has no keypoint that is present: leave it out")
    points_a, points_b = (p.masked_fill(~present[..., None], 0) for p in (points_a, points_b))
    flat_a, cells_a = _flat(maps_a), cell_index(points_a, _size(maps_a)).to(maps_a.device)
    flat_b, cells_b = _flat(maps_b), cell_index(points_b, _size(maps_b)).to(maps_a.device)
    losses = [
        F.cross_entropy(rearrange(scale * logits, "pair point cell -> pair cell point"), labels, reduction="none")
        for logits, labels in ((_rows(flat_a, cells_a, flat_b), cells_b), (_rows(flat_b, cells_b, flat_a), cells_a))
    ]
    per_point = (losses[0] + losses[1]) / 2
    return ((per_point * present.to(per_point.device)).sum(dim=1) / counts.to(per_point.device)).mean()


def _size(maps: Tensor) -> tuple[int, int]:
    return (maps.shape[-2], maps.shape[-1])


def _flat(maps: Float[Tensor, "pair dim height width"]) -> Float[Tensor, "pair dim cell"]:
    return F.normalize(rearrange(maps, "pair dim h w -> pair dim (h w)"), dim=1)


def _rows(
    source: Float[Tensor, "pair dim cell"], cells: Int[Tensor, "pair point"], target: Float[Tensor, "pair dim other"]
) -> Float[Tensor, "pair point other"]:
    index = cells[:, None, :].expand(-1, source.shape[1], -1)
    return einsum(source.gather(2, index), target, "pair dim point, pair dim other -> pair point other")
