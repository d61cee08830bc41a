"""Points that two images can agree on without being told any: best buddies, and smallest cycles."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from interp.correspondence.matching import mutual_nearest, nearest_neighbours
from interp.correspondence.points import Size, check_size, unflatten
from interp.errors import InputError, ShapeError
from interp.images import load_image

FOREGROUND = 0.05


@dataclass(frozen=True, eq=False)
class Buddies:
    """Corresponding cells of two descriptor maps.

    Attributes:
        source: (y, x) of cells in the source map, the most salient pair first.
        target: (y, x) of the corresponding cells in the target map.
        saliency: the mean saliency of the two cells.
    """

    source: Int[Tensor, "match 2"]
    target: Int[Tensor, "match 2"]
    saliency: Float[Tensor, " match"]


def best_buddies(
    source: Float[Tensor, "source_channel source_height source_width"],
    target: Float[Tensor, "target_channel target_height target_width"],
    source_saliency: Float[Tensor, "_ _"],
    target_saliency: Float[Tensor, "_ _"],
    *,
    n: int = 10,
    threshold: float = FOREGROUND,
    seed: int = 0,
) -> Buddies:
    """Pick well-spread pairs of cells that are each other's nearest neighbours, in the foreground of both images.

    The descriptors of each mutual pair are joined and clustered with k-means; of every cluster the pair of highest
    mean saliency is taken.

    Args:
        source: descriptors of the source.
        target: descriptors of the target.
        source_saliency: 0 to 1 for each cell of the source map; see `read_saliency`.
        target_saliency: the same for the target.
        n: how many pairs, at most; fewer when fewer cells agree.
        threshold: cells of a higher saliency are foreground.
        seed: of k-means.

    Returns:
        The pairs.

    Raises:
        ShapeError: a saliency map of another size than its descriptors.
        InputError: no mutual pair lies in the foreground, or ``n`` below 1.

    Source: Diffusion Hyperfeatures, demo; DINO-ViT-features (best buddies, k-means, saliency).
    """
    _check(n, source, source_saliency, "source")
    _check(n, target, target_saliency, "target")
    here, there = source_saliency > threshold, target_saliency > threshold
    cells = mutual_nearest(source, target, source_mask=here, target_mask=there)
    if len(cells[0]) == 0:
        shares = f"{here.float().mean():.0%} of the source and {there.float().mean():.0%} of the target"
        raise InputError(f"No cells of the foreground are each other's nearest neighbours; the foreground is {shares}.")
    return _spread(source, target, *cells, source_saliency, target_saliency, n, seed)


def cyclical_matches(
    source: Float[Tensor, "source_channel source_height source_width"],
    target: Float[Tensor, "target_channel target_height target_width"],
    source_saliency: Float[Tensor, "_ _"],
    target_saliency: Float[Tensor, "_ _"],
    *,
    n: int = 10,
    threshold: float = FOREGROUND,
    seed: int = 0,
) -> Buddies:
    """Pick well-spread cells that a step to the nearest neighbour and back leads closest to where they were.

    Of the cells in the foreground of both images the ``2 * n`` of smallest `cyclical_distance` are clustered with
    k-means; of every cluster the most salient pair is taken. Unlike `best_buddies`, cells need not return exactly.

    Args:
        source, target, source_saliency, target_saliency, n, threshold, seed: as in `best_buddies`.

    Returns:
        The pairs.

    Raises:
        ShapeError: as `best_buddies`.
        InputError: no cell of the source's foreground is matched to the target's, or ``n`` below 1.

    Source: Diffusion Hyperfeatures, demo (cyclical distance).
    """
    _check(n, source, source_saliency, "source")
    _check(n, target, target_saliency, "target")
    distance, there = cyclical_distance(source, target)
    here = torch.arange(there.numel(), device=there.device)
    inside = (source_saliency.to(there.device) > threshold).flatten()
    inside &= (target_saliency.to(there.device) > threshold).flatten()[there.flatten()]
    if not inside.any():
        raise InputError("No cell of the source's foreground is matched to the target's foreground.")
    kept = here[inside][distance.flatten()[inside].argsort(stable=True)[: 2 * n]]
    source_cells = unflatten(kept, (source.shape[1], source.shape[2]))
    target_cells = unflatten(there.flatten()[kept], (target.shape[1], target.shape[2]))
    return _spread(source, target, source_cells, target_cells, source_saliency, target_saliency, n, seed)


def cyclical_distance(
    source: Float[Tensor, "source_channel source_height source_width"],
    target: Float[Tensor, "target_channel target_height target_width"],
) -> tuple[Float[Tensor, "source_height source_width"], Int[Tensor, "source_height source_width"]]:
    """Measure how far from itself each source cell ends after a step to the nearest target cell and back.

    Args:
        source: descriptors of the source.
        target: descriptors of the target.

    Returns:
        Euclidean distances in cells, and the flat index of each cell's nearest neighbour in the target.

    Raises:
        ShapeError, InputError: as `interp.correspondence.match`.

    Source: Diffusion Hyperfeatures, demo.
    """
    size = (source.shape[1], source.shape[2])
    there = nearest_neighbours(source, target)
    back = unflatten(nearest_neighbours(target, source).flatten()[there], size)
    here = unflatten(torch.arange(there.numel(), device=there.device), size).reshape(*size, 2)
    return torch.linalg.vector_norm((back - here).float(), dim=-1), there


def read_saliency(path: str | Path, size: Size) -> Float[Tensor, "height width"]:
    """Read a greyscale image as a saliency map for the cells of a descriptor map.

    Args:
        path: the image, named like the one whose saliency it is.
        size: (height, width) of the descriptor map.

    Returns:
        0 to 1 for each cell, resized bilinearly.

    Raises:
        InputError: the file cannot be read.
    """
    check_size(size)
    grey = load_image(path).convert("L").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)


def _spread(
    source: Tensor,
    target: Tensor,
    source_cells: Int[Tensor, "match 2"],
    target_cells: Int[Tensor, "match 2"],
    source_saliency: Tensor,
    target_saliency: Tensor,
    n: int,
    seed: int,
) -> Buddies:
    """Of every cluster of joined descriptors, keep the most salient pair."""
    from sklearn.cluster import KMeans

    def at(maps: Tensor, places: Tensor) -> Tensor:
        rows, columns = places.to(maps.device).unbind(dim=-1)
        return maps[..., rows, columns]

    joined = torch.cat([F.normalize(at(maps.float(), cells).T, dim=1).cpu()
                        for maps, cells in ((source, source_cells), (target, target_cells))], dim=1)  # fmt: skip
    salient = (at(source_saliency, source_cells).cpu() + at(target_saliency, target_cells).cpu()) / 2
    rows = joined.double().numpy()
    # k-means cannot make more clusters than there are different pairs.
    n_clusters = min(n, len(np.unique(rows, axis=0)))
    clusters = torch.from_numpy(KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(rows))
    best = [int(salient.masked_fill(clusters != cluster, -torch.inf).argmax()) for cluster in range(n_clusters)]
    order = torch.tensor(sorted(best, key=lambda match: (-float(salient[match]), match)))
    return Buddies(source_cells.cpu()[order], target_cells.cpu()[order], salient[order])


def _check(n: int, maps: Tensor, saliency: Tensor, name: str) -> None:
    if n < 1:
        raise InputError(f"n is {n}; expected at least 1 pair.")
    if saliency.shape != maps.shape[1:]:
        raise ShapeError(
            f"The saliency of the {name} is {list(saliency.shape)}, but its descriptors have {list(maps.shape[1:])} "
            "cells; resize it to these (`read_saliency`)."
        )
