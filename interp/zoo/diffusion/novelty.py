"""How far generated pictures are from the training pictures: whether the model merely repeats them."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import ShapeError

CHUNK = 2048


def nearest(
    queries: Float[Tensor, "query ..."], known: Tensor, factor: float = 1.0
) -> tuple[Float[Tensor, " query"], Int[Tensor, " query"]]:
    """Find the nearest of many known examples.

    Args:
        queries: what is looked up.
        known: what is searched, of the same shape after the first axis; any dtype.
        factor: what ``known`` is multiplied by, for example 1/255 for pictures in 8 bits.

    Returns:
        For each query the root mean squared difference from the nearest example, and its index.

    Raises:
        ShapeError: the shapes differ.
    """
    if queries.shape[1:] != known.shape[1:]:
        raise ShapeError(f"queries are {list(queries.shape[1:])} each, known examples {list(known.shape[1:])}.")
    flat = queries.flatten(start_dim=1)
    closest = torch.full((len(flat),), torch.inf)
    index = torch.zeros(len(flat), dtype=torch.int64)
    for start in range(0, len(known), CHUNK):
        chunk = factor * known[start : start + CHUNK].flatten(start_dim=1).float()
        found, place = torch.cdist(flat, chunk).min(dim=1)
        closer = found < closest
        closest[closer], index[closer] = found[closer], place[closer] + start
    # Measured again: what cdist gives is imprecise for what is almost the same.
    exact = (flat - factor * known[index].flatten(start_dim=1).float()).square().mean(dim=1).sqrt()
    return exact, index


def summaries(
    groups: Mapping[str, Float[Tensor, "query ..."]], known: Tensor, factor: float = 1.0
) -> dict[str, dict[str, float]]:
    """How far each group is from its nearest known examples.

    Args:
        groups: queries by the name of their group.
        known: as for ``nearest``.
        factor: the same.

    Returns:
        The smallest distance, the 5th percentile and the median of each group.
    """
    together, _ = nearest(torch.cat(list(groups.values())), known, factor)
    parts = together.split([len(group) for group in groups.values()])
    return {
        name: {
            "smallest": round(float(part.min()), 4),
            "5th percentile": round(float(part.quantile(0.05)), 4),
            "median": round(float(part.median()), 4),
        }
        for name, part in zip(groups, parts, strict=True)
    }
