"""The percentage of correct keypoints, with everything that it depends on said."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from interp.correspondence.points import Box, Size
from interp.errors import InputError, ShapeError

REDUCTIONS = ("point", "pair", "category")
BASES = ("img", "bbox")
# Distances this close to the limit, as a share of it, count as exactly on it: rescaled points carry rounding.
TIE = 1e-9


def pck(
    pred: Num[Tensor, "_ 2"] | Sequence[Num[Tensor, "_ 2"]],
    target: Num[Tensor, "_ 2"] | Sequence[Num[Tensor, "_ 2"]],
    *,
    threshold: float | int,
    base: float | int | Sequence[float | int] = 1.0,
    reduce: str = "point",
    inclusive: bool = True,
    categories: Sequence[str] | None = None,
) -> float:
    """Compute the share of predicted points that lie within a threshold of the true ones.

    Args:
        pred: predicted (y, x): [point, 2] for one pair, or one tensor for each pair.
        target: true (y, x), in the same pixels and order.
        threshold: the largest distance of a correct point, in units of ``base``: such as 0.1, or pixels when
            ``base`` is 1.
        base: pixels that the threshold is a share of, one number or one for each pair: see `base_length`.
        reduce: ``"point"``: over all points of all pairs (micro). ``"pair"``: the mean over pairs of each pair's
            share. ``"category"``: the mean over categories of the share of all their points.
        inclusive: whether a point exactly at the threshold is correct.
        categories: the category of each pair, for ``reduce="category"``.

    Returns:
        Between 0 and 1.

    Raises:
        ShapeError: predictions, targets, bases or categories of different numbers.
        InputError: no pairs, a pair without points, values that are not finite, or an unknown reduction.

    Source: Diffusion Hyperfeatures, section 4; SPair-71k (per point and per image).
    """
    preds, targets = ([one] if isinstance(one, Tensor) else list(one) for one in (pred, target))
    bases = [float(base)] * len(targets) if isinstance(base, int | float) else [float(length) for length in base]
    if not len(preds) == len(targets) == len(bases):
        raise ShapeError(f"There are predictions for {len(preds)} pairs, targets for {len(targets)}, and "
                         f"{len(bases)} base lengths.")  # fmt: skip
    if not preds:
        raise InputError("There are no pairs to score.")
    rows = zip(preds, targets, bases, strict=True)
    correct = [within(one, true, threshold * length, inclusive=inclusive) for one, true, length in rows]
    if reduce == "category" and (categories is None or len(categories) != len(preds)):
        raise ShapeError(f"reduce='category' needs one category for each of {len(preds)} pairs; they are {categories}.")
    counts = np.array([len(one) for one in correct], dtype=float)
    return reduced(np.array([float(one.sum()) for one in correct]), counts, categories or [], reduce)


def within(
    pred: Num[Tensor, "_ 2"], target: Num[Tensor, "_ 2"], limit: float, *, inclusive: bool = True
) -> Bool[Tensor, " point"]:
    """Say which predicted points lie within a distance of the true ones.

    Args:
        pred: (y, x).
        target: (y, x), in the same pixels and order.
        limit: the largest distance, in pixels.
        inclusive: whether a distance of exactly the limit (up to a share of 1e-9) is within.

    Returns:
        One answer for each point.

    Raises:
        ShapeError: not as many predictions as targets.
        InputError: no points, a value that is not finite, or a negative limit.
    """
    away = distances(pred, target)
    if not limit >= 0:
        raise InputError(f"The limit is {limit} pixels; expected 0 or more.")
    return away <= limit * (1 + TIE) if inclusive else away < limit * (1 - TIE)


def distances(pred: Num[Tensor, "_ 2"], target: Num[Tensor, "_ 2"]) -> Float[Tensor, " point"]:
    """Euclidean distances between points, in float64; the errors are those of `within`."""
    if pred.shape != target.shape:
        raise ShapeError(f"Predictions {list(pred.shape)} do not fit targets {list(target.shape)}.")
    if len(pred) == 0:
        raise InputError("A pair without points cannot be scored.")
    apart = pred.double().cpu() - target.double().cpu()
    if not torch.isfinite(apart).all():
        raise InputError("Points to score must be finite numbers (y, x).")
    return torch.linalg.vector_norm(apart, dim=-1)


def base_length(base: str, size: Size, box: Box) -> float:
    """The length that the threshold of a PCK is a share of.

    Args:
        base: ``"img"``: the longer side of the target image. ``"bbox"``: the longer side of the target's box.
        size: (height, width) of the target image.
        box: (top, left, bottom, right) in the same pixels.

    Returns:
        Pixels.

    Raises:
        InputError: an unknown base.

    Source: Diffusion Hyperfeatures, official evaluation.
    """
    if base not in BASES:
        raise InputError(f"base is {base!r}; expected one of {', '.join(map(repr, BASES))}.")
    return float(max(size)) if base == "img" else float(max(box[2] - box[0], box[3] - box[1]))


def reduced(
    correct: Float[np.ndarray, "*batch pair"],
    counts: Float[np.ndarray, "*batch pair"],
    categories: Sequence[str],
    reduce: str,
) -> float:
    """Reduce numbers of correct points by pair to one share; see `pck`.

    Args:
        correct: how many points of each pair are correct.
        counts: how many points each pair has.
        categories: of each pair; read only for ``"category"``.
        reduce: how.

    Returns:
        The share.

    Raises:
        InputError: an unknown reduction.
    """
    if reduce not in REDUCTIONS:
        raise InputError(f"reduce is {reduce!r}; expected one of {', '.join(map(repr, REDUCTIONS))}.")
    if reduce == "point":
        return float(correct.sum() / counts.sum())
    if reduce == "pair":
        return float((correct / counts).mean())
    members = [[name == category for category in categories] for name in dict.fromkeys(categories)]
    return float(np.mean([correct[..., rows].sum() / counts[..., rows].sum() for rows in members]))
