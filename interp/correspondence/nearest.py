"""Nearest neighbours among the positions of a descriptor map, in memory that does not grow with its size."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from interp.correspondence.points import Size, check_size
from interp.correspondence.resize import resized_rows
from interp.errors import InputError, ShapeError

METRICS = ("cosine", "l2")
# No block of descriptors and no block of similarities holds more numbers than this (64 MiB in float32).
BLOCK = 2**24


def nearest(
    queries: Float[Tensor, "query channel"],
    keys: Float[Tensor, "channel height width"],
    size: Size,
    *,
    metric: str = "cosine",
    chunk: int | None = None,
) -> tuple[Int[Tensor, " query"], Float[Tensor, " query"]]:
    """Find for each query the nearest position of a map that is resized bilinearly on the way, row by row.

    Args:
        queries: descriptors to look for, taken from a resized map and not normalised.
        keys: the map to look in.
        size: (height, width) to resize it to; each resized descriptor is normalised after the resize.
        metric: ``"cosine"``; or ``"l2"``, the Euclidean distance of descriptors as they are.
        chunk: how many positions are compared at a time (at least one row); by default as many as fit in 64 MiB.

    Returns:
        The flat index ``row * width + column`` of the nearest position, the first one of equals, and the
        cosine there, or minus the distance.

    Raises:
        InputError: an unknown metric, or a chunk below 1.
    """
    check_metric(metric)
    check_size(size)
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}; it counts positions, at least 1.")
    height, width = size
    n_rows = min(height, max(1, (chunk or BLOCK // keys.shape[0]) // width))
    n_queries = max(1, BLOCK // (n_rows * width))
    queries = F.normalize(queries, dim=1) if metric == "cosine" else queries
    best = torch.full(queries.shape[:1], -torch.inf, dtype=queries.dtype, device=queries.device)
    index = torch.zeros(queries.shape[:1], dtype=torch.long, device=queries.device)
    for first in range(0, height, n_rows):
        rows = resized_rows(keys, size, first, min(height, first + n_rows))
        block = rearrange(rows, "channel row column -> (row column) channel")
        block = F.normalize(block, dim=1) if metric == "cosine" else block
        for start in range(0, len(queries), n_queries):
            part = slice(start, start + n_queries)
            scores = similarity(queries[part], block, metric)
            places = scores.argmax(dim=1)
            values = scores.gather(1, places[:, None])[:, 0]
            better = values > best[part]
            best[part] = torch.where(better, values, best[part])
            index[part] = torch.where(better, places + first * width, index[part])
    return index, best if metric == "cosine" else -(-2 * best).clamp(min=0).sqrt()


def similarity(
    queries: Float[Tensor, "query channel"], keys: Float[Tensor, "key channel"], metric: str
) -> Float[Tensor, "query key"]:
    """The dot product of descriptors already of length 1 (cosine), or minus half the squared distance (l2)."""
    dots = queries @ keys.T
    if metric == "cosine":
        return dots
    return dots - queries.square().sum(dim=1)[:, None] / 2 - keys.square().sum(dim=1) / 2


def checked_maps(
    source: Float[Tensor, "*batch source_channel source_height source_width"],
    target: Float[Tensor, "*batch target_channel target_height target_width"],
) -> tuple[Tensor, Tensor]:
    """Turn two maps into float32 (float64 stays); refuse numbers of channels that differ, and values not finite.

    Raises:
        ShapeError: the maps have different numbers of channels.
        InputError: a value is not finite.
    """
    if source.shape[-3] != target.shape[-3]:
        raise ShapeError(
            f"The source map has {source.shape[-3]} channels and the target map {target.shape[-3]}; "
            "descriptors to compare need as many."
        )
    dtype = torch.float64 if torch.float64 in (source.dtype, target.dtype) else torch.float32
    for name, maps in (("source", source), ("target", target)):
        if not torch.isfinite(maps).all():
            raise InputError(f"The {name} descriptors hold values that are not finite.")
    return source.to(dtype), target.to(dtype)


def check_metric(metric: str) -> None:
    """Raise InputError for a metric other than cosine and l2."""
    if metric not in METRICS:
        raise InputError(f"metric is {metric!r}; expected one of {', '.join(map(repr, METRICS))}.")
