"""Keypoints as heat maps and back, and how well they were found."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError, ShapeError

COCO = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
OPENPOSE = (
    "nose",
    "neck",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
    "right_eye",
    "left_eye",
    "right_ear",
    "left_ear",
)
COCO_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)
"""How far annotators of COCO disagree on each keypoint, in shares of the square root of a person's area."""

_SHARE = 16  # the deviation of a heat map is this part of its side


def openpose_points(
    points: Float[Tensor, "person 17 2"], visible: Bool[Tensor, "person 17"]
) -> tuple[Float[Tensor, "person 18 2"], Bool[Tensor, "person 18"]]:
    """COCO's 17 keypoints in OpenPose's order of 18.

    Args:
        points: in the order of ``COCO``.
        visible: which of them are labelled.

    Returns:
        The points in the order of ``OPENPOSE``, and which are there. The neck is the middle of the shoulders, where
        both are there; points that are not there are 0.

    Source: Readout Guidance, official code.
    """
    left, right = COCO.index("left_shoulder"), COCO.index("right_shoulder")
    neck = (points[:, left] + points[:, right]) / 2
    both = visible[:, left] & visible[:, right]
    columns = [(neck, both) if name == "neck" else _column(points, visible, name) for name in OPENPOSE]
    there = torch.stack([shown for _, shown in columns], dim=1)
    placed = torch.stack([point for point, _ in columns], dim=1)
    return placed.masked_fill(~there[..., None], 0), there


def _column(points: Tensor, visible: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return points[:, COCO.index(name)], visible[:, COCO.index(name)]


def heatmaps(
    points: Float[Tensor, "*batch point 2"],
    visible: Bool[Tensor, "*batch point"],
    size: tuple[int, int],
    sigma: float | None = None,
) -> Float[Tensor, "*batch point height width"]:
    """One Gaussian of height 1 for each point.

    Args:
        points: (y, x) in cells of the map (see `interp.hyperfeatures.scale_points`); truncated to whole cells.
        visible: which points are there; the others, and those outside the map, give maps of zeros.
        size: (height, width) of the maps.
        sigma: deviation in cells; a sixteenth of the shorter side when not given.

    Raises:
        InputError: a visible point that is not finite, or a size or deviation that is not positive.
        ShapeError: points and visibility of different shapes.

    Source: Readout Guidance, official code (keypoint heads).
    """
    if points.shape[-1] != 2 or points.shape[:-1] != visible.shape:
        raise ShapeError(f"points are {list(points.shape)}, but visible is {list(visible.shape)}")
    sigma = min(size) / _SHARE if sigma is None else sigma
    if min(size) < 1 or sigma <= 0:
        raise InputError(f"size {size} and sigma {sigma} must be positive")
    if not bool(torch.isfinite(points[visible]).all()):
        raise InputError("a visible keypoint's coordinate is not finite")
    cells = points.masked_fill(~visible[..., None], 0).trunc()
    limit = torch.tensor(size, dtype=cells.dtype, device=cells.device)
    # Truncation takes -0.5 to 0, so that outside is decided before.
    inside = ((points >= 0) & (points < limit)).all(dim=-1) & visible
    y, x = (torch.arange(side, dtype=torch.float32, device=cells.device) for side in size)
    down = (y - cells[..., 0, None].float()).square()
    across = (x - cells[..., 1, None].float()).square()
    maps = torch.exp(-(down[..., :, None] + across[..., None, :]) / (2 * sigma**2))
    return maps * inside[..., None, None]


def decode_heatmaps(
    maps: Float[Tensor, "*batch point height width"], threshold: float = 0.1, size: tuple[int, int] | None = None
) -> tuple[Float[Tensor, "*batch point 2"], Bool[Tensor, "*batch point"]]:
    """Where the maximum of each map is, and whether it is high enough to be a keypoint.

    Args:
        maps: heat maps.
        threshold: a point is there where its maximum is above.
        size: (height, width) of the raster that the points are wanted in, by the plain ratio of the sizes; the map's
            own cells when not given.

    Returns:
        (y, x), which is (0, 0) where nothing is there; and what is there.

    Raises:
        InputError: maps without cells, or with values that are not finite.

    Source: Readout Guidance, official code.
    """
    height, width = maps.shape[-2:]
    if not height * width or not bool(torch.isfinite(maps).all()):
        raise InputError(f"heat maps of {height} × {width} cells that are empty, NaN or infinite have no maximum")
    best, place = rearrange(maps, "... h w -> ... (h w)").max(dim=-1)
    there = best > threshold
    rows = torch.div(place, width, rounding_mode="floor")
    points = torch.stack([rows, place % width], dim=-1).to(torch.float32)
    if size is not None:
        points = points * torch.tensor([size[0] / height, size[1] / width], device=points.device)
    return points.masked_fill(~there[..., None], 0), there


def keypoint_pck(
    predicted: Float[Tensor, "instance point 2"],
    true: Float[Tensor, "instance point 2"],
    visible: Bool[Tensor, "instance point"],
    threshold: float = 0.1,
    *,
    extent: Literal["visible", "zero_filled"] = "visible",
) -> Float[Tensor, " instance"]:
    """Share of visible keypoints found, instance by instance; the mean of them is the published figure.

    A keypoint is found where its distance, each axis divided by the extent of the instance's keypoints, is strictly
    below the threshold.

    Args:
        predicted: (y, x); keypoints that were not found sit at (0, 0).
        true: (y, x) in the same raster.
        visible: which keypoints count.
        threshold: in shares of the extent.
        extent: of the visible keypoints; or, as the authors' helper has it, of all rows with the invisible ones at
            (0, 0), which is larger for people that are partly visible.

    Raises:
        InputError: an instance without a visible keypoint, whose keypoints have no extent, or a threshold that is not
            positive.

    Source: Readout Guidance, project page and official code.
    """
    if threshold <= 0:
        raise InputError(f"the threshold must be positive, not {threshold}")
    _check_shapes(predicted, true, visible)
    counts = visible.sum(dim=1)
    if not bool((counts > 0).all()):
        raise InputError(f"instance {int((counts == 0).nonzero()[0])} has no visible keypoint: leave it out")
    shown = visible[..., None]
    if extent == "zero_filled":
        filled = true.masked_fill(~shown, 0)
        span = filled.amax(dim=1) - filled.amin(dim=1)
    else:
        span = true.masked_fill(~shown, -torch.inf).amax(dim=1) - true.masked_fill(~shown, torch.inf).amin(dim=1)
    if not bool((span > 0).all()):
        flat = int((span <= 0).any(dim=1).nonzero()[0])
        raise InputError(f"the keypoints of instance {flat} have no extent in one direction: nothing to measure by")
    distance = ((predicted - true) / span[:, None]).square().sum(dim=-1).sqrt()
    return ((distance < threshold) & visible).sum(dim=1) / counts


def _check_shapes(predicted: Tensor, true: Tensor, visible: Tensor) -> None:
    if predicted.shape != true.shape or true.shape != (*visible.shape, 2):
        raise ShapeError(
            f"predicted points are {list(predicted.shape)}, true ones {list(true.shape)}, visible {list(visible.shape)}"
        )


def oks(
    predicted: Float[Tensor, "instance point 2"],
    true: Float[Tensor, "instance point 2"],
    visible: Bool[Tensor, "instance point"],
    area: Float[Tensor, " instance"],
    sigmas: Sequence[float] = COCO_SIGMAS,
) -> Float[Tensor, " instance"]:
    """Object keypoint similarity: 1 for keypoints in their exact places, falling with the distance.

    Args:
        predicted: (y, x).
        true: (y, x) in the same raster.
        visible: which keypoints count.
        area: of each instance, in squares of the raster.
        sigmas: how far annotators disagree on each keypoint; by default COCO's 17.

    Raises:
        InputError: other numbers of deviations than keypoints, an instance without a visible keypoint or area.

    Source: COCO keypoint evaluation: the mean over visible keypoints of exp(-d² / (2 area (2 sigma)²)).
    """
    _check_shapes(predicted, true, visible)
    if len(sigmas) != true.shape[1]:
        raise InputError(f"{len(sigmas)} sigmas are given for {true.shape[1]} keypoints")
    counts = visible.sum(dim=1)
    if not bool(((counts > 0) & (area > 0)).all()):
        raise InputError("every instance needs a visible keypoint and an area")
    spread = (2 * torch.tensor(sigmas, dtype=true.dtype, device=true.device)).square()
    squares = (predicted - true).square().sum(dim=-1)
    alike = torch.exp(-squares / (2 * area[:, None] * spread))
    return (alike * visible).sum(dim=1) / counts
