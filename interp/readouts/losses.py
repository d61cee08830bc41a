"""Losses of readout heads."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError

MARGIN = 0.5


def match_size(
    target: Float[Tensor, "batch channel height width"], size: tuple[int, int]
) -> Float[Tensor, "batch channel new_height new_width"]:
    """Resize a target to a prediction's size by the nearest pixel, so that its values stay exactly what they are.

    Args:
        target: pictures.
        size: (height, width) of the prediction.

    Source: Readout Guidance, official code; only so can the background be told by equality.
    """
    return target if target.shape[-2:] == torch.Size(size) else F.interpolate(target, size=size, mode="nearest")


def mse(prediction: Float[Tensor, "..."], target: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Mean squared error over all elements, in float32.

    Args:
        prediction: what the head gave.
        target: of the same shape.

    Raises:
        ShapeError: the shapes differ.
        InputError: a target that is not finite.

    Source: Readout Guidance, section 3.2 (depth, keypoints).
    """
    prediction, target = _checked(prediction, target)
    return F.mse_loss(prediction, target)


def sparse_mse(prediction: Float[Tensor, "..."], target: Float[Tensor, "..."], background: float) -> Float[Tensor, ""]:
    """Squared error in which background and foreground weigh the same, however few elements either has.

    Args:
        prediction: what the head gave.
        target: of the same shape.
        background: elements of the target that are exactly this are background, each channel for itself.

    Returns:
        Half the mean over the background plus half the mean over the rest; the plain mean where all elements, or none,
        are background.

    Raises:
        ShapeError: the shapes differ.
        InputError: a target that is not finite.

    Source: Readout Guidance, official code (pose, edge).
    """
    prediction, target = _checked(prediction, target)
    errors = (prediction - target).square()
    # The target's own precision decides what is exactly the minimum of its range.
    behind = target == torch.tensor(background, dtype=target.dtype, device=target.device)
    count = int(behind.sum())
    if count in (0, behind.numel()):
        return errors.mean()
    return (errors[behind].mean() + errors[~behind].mean()) / 2


def aligned_cosine_distance(
    maps_a: Float[Tensor, "batch channel height width"], maps_b: Float[Tensor, "batch channel height width"]
) -> Float[Tensor, " batch"]:
    """How unlike two descriptor maps are, cell by cell: the mean over cells of 1 - cosine.

    Args:
        maps_a: descriptors.
        maps_b: descriptors of the same shape.

    Returns:
        0 (the same directions) to 2, for each pair of maps, in float32 or better.

    Raises:
        ShapeError: the shapes differ.

    Source: Readout Guidance, section 3.2 (appearance; spatially aligned).
    """
    if maps_a.shape != maps_b.shape:
        raise ShapeError(f"maps of shapes {list(maps_a.shape)} and {list(maps_b.shape)} have no common cells")
    a, b = (maps.to(torch.promote_types(maps.dtype, torch.float32)) for maps in (maps_a, maps_b))
    return (1 - F.cosine_similarity(a, b, dim=1)).mean(dim=(-2, -1))


def cosine_hinge(
    anchor: Float[Tensor, "batch channel height width"],
    positive: Float[Tensor, "batch channel height width"],
    negative: Float[Tensor, "batch channel height width"],
    margin: float = MARGIN,
) -> Float[Tensor, ""]:
    """Hinge that wants the negative farther from the anchor than the positive by a margin.

    Args:
        anchor: descriptor maps.
        positive: those of pictures that should look alike.
        negative: those of pictures that should not.
        margin: by how much.

    Returns:
        The sum over the batch of max(0, margin + distance to the positive - distance to the negative).

    Raises:
        ShapeError: the shapes differ.
        InputError: a negative margin.

    Source: Readout Guidance, section 3.2 and official code (appearance, identity).
    """
    if margin < 0:
        raise InputError(f"the margin must be at least 0, not {margin}")
    near, far = aligned_cosine_distance(anchor, positive), aligned_cosine_distance(anchor, negative)
    return (margin + near - far).clamp(min=0).sum()


def _checked(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape:
        raise ShapeError(f"the prediction is {list(prediction.shape)}, the target {list(target.shape)}")
    if not prediction.numel():
        raise InputError(f"a prediction of shape {list(prediction.shape)} has no element")
    target = target.to(prediction.device, torch.float32)
    if not bool(torch.isfinite(target).all()):
        raise InputError("the target holds NaN or infinity")
    return prediction.float(), target
