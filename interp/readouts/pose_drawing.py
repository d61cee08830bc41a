"""Poses drawn as pictures: a coloured line for each bone, as pose heads read them."""

import colorsys
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError
from interp.readouts.keypoints import OPENPOSE
from interp.zoo.creatures import KEYPOINTS


def _bones(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[tuple[int, int], ...]:
    return tuple((names.index(one), names.index(other)) for one, other in pairs)


CREATURE_BONES = _bones(
    KEYPOINTS,
    (
        ("nose", "eye"),
        ("eye", "head_top"),
        ("head_top", "neck_base"),
        ("neck_base", "back"),
        ("back", "tail_base"),
        ("tail_base", "tail_mid"),
        ("tail_mid", "tail_tip"),
        ("back", "hip"),
        ("hip", "near_back_knee"),
        ("near_back_knee", "near_back_foot"),
        ("hip", "far_back_foot"),
        ("neck_base", "belly"),
        ("belly", "near_front_knee"),
        ("near_front_knee", "near_front_foot"),
        ("belly", "far_front_foot"),
        ("back", "wing_tip"),
    ),
)
"""Which keypoints of a creature are joined, as indexes in `interp.zoo.creatures.KEYPOINTS`."""

OPENPOSE_BONES = _bones(
    OPENPOSE,
    (
        ("neck", "right_shoulder"),
        ("neck", "left_shoulder"),
        ("right_shoulder", "right_elbow"),
        ("right_elbow", "right_wrist"),
        ("left_shoulder", "left_elbow"),
        ("left_elbow", "left_wrist"),
        ("neck", "right_hip"),
        ("right_hip", "right_knee"),
        ("right_knee", "right_ankle"),
        ("neck", "left_hip"),
        ("left_hip", "left_knee"),
        ("left_knee", "left_ankle"),
        ("neck", "nose"),
        ("nose", "right_eye"),
        ("right_eye", "right_ear"),
        ("nose", "left_eye"),
        ("left_eye", "left_ear"),
    ),
)
"""Which keypoints of a person are joined, as indexes in `interp.readouts.keypoints.OPENPOSE`."""


def draw_pose(
    points: Float[Tensor, "*batch point 2"],
    present: Bool[Tensor, "*batch point"],
    bones: Sequence[tuple[int, int]],
    size: tuple[int, int],
    *,
    width: float = 1.5,
    value_range: tuple[float, float] = (-0.5, 0.5),
) -> Float[Tensor, "*batch 3 height width"]:
    """Draw each bone whose two ends are there as a line of its own colour, later bones over earlier ones.

    Args:
        points: (y, x) in cells of the picture; (0, 0) is the centre of the first.
        present: which points are there.
        bones: pairs of indexes of points.
        size: (height, width) of the picture.
        width: of a line, in cells.
        value_range: least and greatest value; what no line touches is exactly the least, in each channel.

    Raises:
        InputError: a size, width or range that cannot be, a bone without points, or a present point that is not finite.

    Source: Readout Guidance, section 3.2: skeletons drawn as RGB, in the range -0.5 to 0.5.
    """
    low, high = value_range
    if min(size) < 1 or width <= 0 or not low < high:
        raise InputError(f"size={size}, width={width}, value_range={value_range}: expected positive sides, and a range")
    n_points = points.shape[-2]
    if any(not 0 <= end < n_points for bone in bones for end in bone):
        raise InputError(f"a bone joins points beyond the {n_points} that there are")
    if not bool(torch.isfinite(points[present]).all()):
        raise InputError("a keypoint that is present has a coordinate that is not finite")
    # Absent points may hold anything.
    placed = points.masked_fill(~present[..., None], 0)
    picture = torch.zeros(*points.shape[:-2], 3, *size, dtype=torch.float32, device=points.device)
    for index, (start, end) in enumerate(bones):
        drawn = (present[..., start] & present[..., end])[..., None, None]
        cover = _cover(placed[..., start, :], placed[..., end, :], size, width) * drawn
        colour = torch.tensor(colorsys.hsv_to_rgb(index / len(bones), 1.0, 1.0), device=points.device)
        cover = rearrange(cover, "... h w -> ... 1 h w")
        picture = picture * (1 - cover) + colour[:, None, None] * cover
    return low + (high - low) * picture


def _cover(start: Tensor, end: Tensor, size: tuple[int, int], width: float) -> Tensor:
    """How much of each cell a line covers, 0 to 1."""
    y = torch.arange(size[0], dtype=torch.float32, device=start.device)[:, None]
    x = torch.arange(size[1], dtype=torch.float32, device=start.device)[None, :]
    from_y, from_x = y - start[..., 0, None, None], x - start[..., 1, None, None]
    along_y, along_x = (end - start)[..., 0, None, None], (end - start)[..., 1, None, None]
    square = (along_y.square() + along_x.square()).clamp(min=1e-9)
    share = ((from_y * along_y + from_x * along_x) / square).clamp(0, 1)
    distance = ((from_y - share * along_y).square() + (from_x - share * along_x).square()).sqrt()
    return (width / 2 + 0.5 - distance).clamp(0, 1)
