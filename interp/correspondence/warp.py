"""Dense correspondences: where every pixel of the target lies in the source, and images carried over by them."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.correspondence.nearest import BLOCK, checked_maps, nearest
from interp.correspondence.points import Size, check_size, rescale, to_pixels, unflatten
from interp.correspondence.resize import resized_rows
from interp.errors import ShapeError

# Lightness tells rows and hue tells columns, blue to orange: with any colour vision no two places look alike.
# Corners: top left, top right, bottom left, bottom right.
CORNERS = ((0.00, 0.18, 0.62), (0.72, 0.12, 0.00), (0.40, 0.88, 1.00), (1.00, 0.90, 0.25))


@dataclass(frozen=True, eq=False)
class DenseMatches:
    """Where every pixel of a target lies in a source.

    Attributes:
        where: (y, x) in pixels of ``source_size``, for each target pixel.
        score: the cosine there, or minus the distance.
        source_size: (height, width) of the source that ``where`` counts in.
    """

    where: Int[Tensor, "height width 2"]
    score: Float[Tensor, "height width"]
    source_size: Size


def dense_matches(
    source: Float[Tensor, "source_channel source_height source_width"],
    target: Float[Tensor, "target_channel target_height target_width"],
    size: Size | None = None,
    *,
    target_size: Size | None = None,
    metric: str = "cosine",
    chunk: int | None = None,
) -> DenseMatches:
    """Find for every pixel of the target the source pixel of the nearest descriptor.

    Args:
        source: descriptors of the source.
        target: descriptors of the target.
        size: (height, width) to enlarge the source map to before normalising; the maps' own cells by default. Time
            grows with the product of both numbers of pixels.
        target_size: that of the target; ``size`` by default.
        metric: ``"cosine"`` or ``"l2"``.
        chunk: source positions compared at a time.

    Returns:
        The matches.

    Raises:
        ShapeError, InputError: as `interp.correspondence.match`.

    Source: Diffusion Hyperfeatures, figures of dense warps.
    """
    source, target = checked_maps(source, target)
    if target_size is None:
        target_size = (target.shape[1], target.shape[2]) if size is None else size
    size = (source.shape[1], source.shape[2]) if size is None else size
    check_size(target_size)
    n_rows = max(1, BLOCK // (target.shape[0] * target_size[1]))
    parts = []
    for first in range(0, target_size[0], n_rows):
        rows = resized_rows(target, target_size, first, min(target_size[0], first + n_rows))
        queries = rearrange(rows, "channel row column -> (row column) channel")
        parts.append(nearest(queries, source, size, metric=metric, chunk=chunk))
    where, score = (torch.cat(one).reshape(target_size) for one in zip(*parts, strict=True))
    return DenseMatches(unflatten(where, size), score, size)


def warp(
    image: Float[Tensor, "channel image_height image_width"],
    matches: DenseMatches,
    *,
    mask: Bool[Tensor, "mask_height mask_width"] | None = None,
    fill: float = 1.0,
) -> Float[Tensor, "channel height width"]:
    """Carry a source image over to the target: every target pixel takes the colour of its match.

    Args:
        image: the source image, of any size; places are carried to it by plain ratio and rounded half to even.
        matches: where each target pixel lies in the source.
        mask: the target pixels to carry over, such as those of the object.
        fill: the value of the others.

    Returns:
        The image in the shape of the target.

    Raises:
        ShapeError: the mask has another size than the matches.
    """
    size = (image.shape[1], image.shape[2])
    places = to_pixels(rescale(matches.where, matches.source_size, size), size).to(image.device)
    warped = image[:, places[..., 0], places[..., 1]]
    if mask is None:
        return warped
    if mask.shape != warped.shape[1:]:
        raise ShapeError(f"The mask is {list(mask.shape)}, but the matches are {list(warped.shape[1:])}.")
    return torch.where(mask.to(image.device), warped, torch.as_tensor(fill, dtype=image.dtype, device=image.device))


def colour_map(size: Size) -> Float[Tensor, "3 height width"]:
    """Give every place of an image a colour of its own, to see where it is carried.

    Args:
        size: (height, width).

    Returns:
        Red, green and blue, 0 to 1: dark rows on top and light ones below, blue on the left and orange on the right.

    Source: Diffusion Hyperfeatures, figures of dense correspondences.
    """
    check_size(size)
    corners = torch.tensor(CORNERS).reshape(2, 2, 3)
    down = torch.linspace(0, 1, size[0])[:, None, None]
    across = torch.linspace(0, 1, size[1])[None, :, None]
    left, right = (torch.lerp(corners[0, side], corners[1, side], down) for side in (0, 1))
    return rearrange(torch.lerp(left, right, across), "height width colour -> colour height width")


def carried_colours(
    matches: DenseMatches, *, mask: Bool[Tensor, "height width"] | None = None, fill: float = 1.0
) -> Float[Tensor, "3 height width"]:
    """Colour every target pixel by the place of its match in the source; see `colour_map` and `warp`."""
    return warp(colour_map(matches.source_size), matches, mask=mask, fill=fill)
