"""Where the points of one image lie in another: nearest neighbours of their descriptors."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from interp.correspondence.nearest import BLOCK, check_metric, checked_maps, nearest
from interp.correspondence.points import Size, check_size, rescale, to_pixels, unflatten
from interp.correspondence.resize import resized_at
from interp.errors import InputError, ShapeError


def match(
    source: Float[Tensor, "*batch source_channel source_height source_width"],
    target: Float[Tensor, "*batch target_channel target_height target_width"],
    points: Num[Tensor, "*point_batch point 2"],
    size: Size | None = None,
    *,
    target_size: Size | None = None,
    metric: str = "cosine",
    chunk: int | None = None,
) -> Int[Tensor, "*point_batch point 2"]:
    """Find the pixel of the target whose descriptor is nearest to that of each source point.

    Both maps are enlarged bilinearly first and normalised after (the other order gives other descriptors). A source
    point is clipped into the image, then rounded half to even. All target pixels compete.

    Args:
        source: descriptors of the source, [channel, height, width] or with a leading batch.
        target: descriptors of the target; its height and width may differ.
        points: (y, x) in pixels of ``size``: [point, 2] for one pair of maps, [batch, point, 2] for a batch.
        size: (height, width) to enlarge to, such as (224, 224) in the paper or the original size in DIFT; the
            maps' own sizes by default.
        target_size: that of the target where it differs; ``size`` by default.
        metric: ``"cosine"`` or ``"l2"``.
        chunk: target positions compared at a time; bounded memory by default. It does not change the result.

    Returns:
        (y, x) in pixels of ``target_size``, one for each point, on the device of the points.

    Raises:
        ShapeError: the maps differ in channels, or the points do not fit the batch.
        InputError: descriptors or points that are not finite, or an unknown metric.

    Source: Diffusion Hyperfeatures, official evaluation; DIFT.
    """
    source, target = checked_maps(source, target)
    if source.ndim == 4:
        return _each(source, target, points, size, target_size, metric, chunk)
    _check_points(points)
    size, target_size = _sizes(source, target, size, target_size)
    pixels = to_pixels(points, size).to(source.device)
    index, _ = nearest(resized_at(source, size, pixels), target, target_size, metric=metric, chunk=chunk)
    return unflatten(index, target_size).to(points.device)


def match_patches(
    source: Float[Tensor, "source_channel source_height source_width"],
    target: Float[Tensor, "target_channel target_height target_width"],
    points: Num[Tensor, "point 2"],
    size: Size,
    *,
    target_size: Size | None = None,
    metric: str = "cosine",
) -> Float[Tensor, "point 2"]:
    """Find the nearest patch, without enlarging: the cell that holds each point is matched with a cell of the target.

    Args:
        source: descriptors of the source, one for each patch.
        target: descriptors of the target.
        points: (y, x) in pixels of ``size``; clipped into the image.
        size: (height, width) of the source image.
        target_size: that of the target image; ``size`` by default.
        metric: ``"cosine"`` or ``"l2"``.

    Returns:
        The centre (y, x) of the matched patch, in pixels of ``target_size``; (0, 0) is the centre of the first pixel.

    Raises:
        ShapeError, InputError: as `match`.

    Source: sd-dino (nearest patch).
    """
    source, target = checked_maps(source, target)
    _check_points(points)
    target_size = size if target_size is None else target_size
    grid = _side(target)
    queries = _at_cells(source, points, size)
    index, _ = nearest(queries, target, grid, metric=metric)
    return _centres(unflatten(index, grid).double(), grid, target_size).to(points.device)


def match_soft(
    source: Float[Tensor, "source_channel source_height source_width"],
    target: Float[Tensor, "target_channel target_height target_width"],
    points: Num[Tensor, "point 2"],
    size: Size,
    *,
    target_size: Size | None = None,
    window: int = 7,
    temperature: float = 0.02,
    upsample: bool = False,
    chunk: int | None = None,
) -> Float[Tensor, "point 2"]:
    """Find target places finer than a pixel: the softmax-weighted mean of positions in a window about the best match.

    Args:
        source: descriptors of the source.
        target: descriptors of the target.
        points: (y, x) in pixels of ``size``; clipped into the image.
        size: (height, width) of the source image.
        target_size: that of the target image; ``size`` by default.
        window: half-width in positions: 7 is a window of 15 × 15, cut off at the border.
        temperature: the cosines are divided by it; towards 0 the result is the best match itself.
        upsample: False: the window counts cells of the maps, and results are taken to pixels with centres on
            centres. True: it counts pixels of the maps enlarged to the image sizes, as in `match`.
        chunk: target positions compared at a time.

    Returns:
        (y, x) in pixels of ``target_size``; (0, 0) is the centre of the first pixel.

    Raises:
        ShapeError: as `match`.
        InputError: as `match`; or a negative window, or a temperature that is not positive.

    Source: GeoAware-SC (window soft-argmax, half-width 7 supervised, 5 zero-shot).
    """
    source, target = checked_maps(source, target)
    _check_points(points)
    if window < 0 or temperature <= 0:
        raise InputError(
            f"window is {window} and temperature {temperature}; expected 0 or more, and more than 0. "
            "A window of 0 gives the best match itself."
        )
    target_size = size if target_size is None else target_size
    if upsample:
        grid = target_size
        queries = resized_at(source, size, to_pixels(points, size).to(source.device))
    else:
        grid = _side(target)
        queries = _at_cells(source, points, size)
    index, _ = nearest(queries, target, grid, chunk=chunk)
    places = _refine(F.normalize(queries, dim=1), target, grid, unflatten(index, grid), window, temperature)
    return _centres(places, grid, target_size).to(points.device)


def nearest_neighbours(
    source: Float[Tensor, "source_channel source_height source_width"],
    target: Float[Tensor, "target_channel target_height target_width"],
    *,
    metric: str = "cosine",
    chunk: int | None = None,
) -> Int[Tensor, "source_height source_width"]:
    """Find for every cell of one map the nearest cell of another.

    Args:
        source: descriptors whose neighbours are wanted.
        target: descriptors to look among.
        metric: ``"cosine"`` or ``"l2"``.
        chunk: target positions compared at a time.

    Returns:
        For each source cell the flat index ``row * width + column`` in the target map.

    Raises:
        ShapeError, InputError: as `match`.
    """
    source, target = checked_maps(source, target)
    queries = rearrange(source, "channel height width -> (height width) channel")
    index, _ = nearest(queries, target, _side(target), metric=metric, chunk=chunk)
    return rearrange(index, "(height width) -> height width", height=source.shape[1])


def mutual_nearest(
    source: Float[Tensor, "source_channel source_height source_width"],
    target: Float[Tensor, "target_channel target_height target_width"],
    *,
    source_mask: Bool[Tensor, "source_height source_width"] | None = None,
    target_mask: Bool[Tensor, "target_height target_width"] | None = None,
    metric: str = "cosine",
) -> tuple[Int[Tensor, "match 2"], Int[Tensor, "match 2"]]:
    """Find the cells of two maps that are each other's nearest neighbours.

    Args:
        source: descriptors of the source.
        target: descriptors of the target.
        source_mask: the source cells to keep. Neighbours are sought among all cells; the masks choose afterwards.
        target_mask: the target cells to keep.
        metric: ``"cosine"`` or ``"l2"``.

    Returns:
        (y, x) of the cells in the source and in the target, in the order of the source's rows; possibly none.

    Raises:
        ShapeError, InputError: as `match`.

    Source: Diffusion Hyperfeatures, demo (best buddies).
    """
    there = rearrange(nearest_neighbours(source, target, metric=metric), "height width -> (height width)")
    back = rearrange(nearest_neighbours(target, source, metric=metric), "height width -> (height width)")
    mutual = back[there] == torch.arange(len(there), device=there.device)
    if source_mask is not None:
        mutual &= source_mask.to(there.device).flatten()
    if target_mask is not None:
        mutual &= target_mask.to(there.device).flatten()[there]
    (kept,) = mutual.nonzero(as_tuple=True)
    return unflatten(kept, _side(source)), unflatten(there[kept], _side(target))


def _each(
    source: Tensor,
    target: Tensor,
    points: Tensor,
    size: Size | None,
    target_size: Size | None,
    metric: str,
    chunk: int | None,
) -> Tensor:
    check_metric(metric)
    if points.ndim == 2 and len(source) == 1:
        return match(source[0], target[0], points, size, target_size=target_size, metric=metric, chunk=chunk)
    if points.ndim != 3 or len(points) != len(source):
        raise ShapeError(
            f"Points {list(points.shape)} do not fit maps of batch {len(source)}; expected [{len(source)}, point, 2]."
        )
    rows = zip(source, target, points, strict=True)
    return torch.stack([match(*row, size, target_size=target_size, metric=metric, chunk=chunk) for row in rows])


def _refine(
    queries: Float[Tensor, "point channel"],
    target: Float[Tensor, "channel height width"],
    size: Size,
    centres: Int[Tensor, "point 2"],
    window: int,
    temperature: float,
) -> Float[Tensor, "point 2"]:
    steps = torch.arange(-window, window + 1, device=centres.device)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).flatten(0, 1)
    last = torch.tensor(size, device=centres.device) - 1
    refined = []
    for part in torch.arange(len(queries), device=centres.device).split(
        max(1, BLOCK // (len(offsets) * target.shape[0]))
    ):
        places = centres[part][:, None] + offsets
        inside = ((places >= 0) & (places <= last)).all(dim=-1)
        values = F.normalize(resized_at(target, size, torch.minimum(places.clamp(min=0), last)), dim=-1)
        scores = torch.einsum("pc,poc->po", queries[part], values) / temperature
        weights = scores.masked_fill(~inside, -torch.inf).softmax(dim=1).double()
        refined.append(torch.einsum("po,pod->pd", weights, places.double()))
    return torch.cat(refined) if refined else centres.double()


def _at_cells(
    maps: Float[Tensor, "channel height width"], points: Num[Tensor, "point 2"], size: Size
) -> Float[Tensor, "point channel"]:
    """Descriptors of the cells that hold the points."""
    inside = to_pixels(points, size)
    rows, columns = rescale(inside, size, _side(maps)).long().to(maps.device).unbind(dim=-1)
    return rearrange(maps[:, rows, columns], "channel point -> point channel")


def _centres(places: Float[Tensor, "point 2"], grid: Size, size: Size) -> Float[Tensor, "point 2"]:
    check_size(size)
    return rescale(places + 0.5, grid, size) - 0.5


def _side(maps: Float[Tensor, "channel height width"]) -> Size:
    return maps.shape[1], maps.shape[2]


def _sizes(source: Tensor, target: Tensor, size: Size | None, target_size: Size | None) -> tuple[Size, Size]:
    if size is None:
        return _side(source), _side(target) if target_size is None else target_size
    return size, size if target_size is None else target_size


def _check_points(points: Tensor) -> None:
    if points.ndim != 2:
        raise ShapeError(f"Points for one pair of maps are [point, 2]; they are {list(points.shape)}.")
