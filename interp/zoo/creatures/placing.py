"""Where the creatures of scenes are in the picture, and which of their keypoints can be seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from interp.zoo.creatures.distances import capsule_distance, triangle_distance
from interp.zoo.creatures.layers import KEYPOINT_LAYERS, LAYERS, SHAPES
from interp.zoo.creatures.scenes import FRAME, Scene, skeletons


@dataclass(frozen=True)
class Placed:
    """Creatures in pixels: the centre of the top left pixel is (0, 0).

    Attributes:
        corners: of each shape, as (y, x).
        radii: of a capsule at its two ends; of a triangle how far its corners are rounded.
        drawn: whether the species has the shape.
        keypoints: as (y, x).
        present: whether the species has the keypoint.
        visible: whether it has the keypoint and no other part hides it.
        scale: the pixels that one unit of the skeleton covers.
    """

    corners: Float[Tensor, "scene shape 3 2"]
    radii: Float[Tensor, "scene shape 2"]
    drawn: Bool[Tensor, "scene shape"]
    keypoints: Float[Tensor, "scene keypoint 2"]
    present: Bool[Tensor, "scene keypoint"]
    visible: Bool[Tensor, "scene keypoint"]
    scale: Float[Tensor, " scene"]


def shape_distance(
    index: int,
    y: Float[Tensor, "#scene height 1"],
    x: Float[Tensor, "#scene _ width"],
    corners: Float[Tensor, "scene shape 3 2"],
    radii: Float[Tensor, "scene shape 2"],
) -> Float[Tensor, "scene height width"]:
    """The signed distance to one of the ``SHAPES``.

    Args:
        index: of the shape.
        y: where to measure; broadcast against ``x``.
        x: the same.
        corners: of all shapes.
        radii: of all shapes.

    Returns:
        The distances, negative inside.
    """
    measure = triangle_distance if SHAPES[index].triangle else capsule_distance
    return measure(y, x, corners[:, index], radii[:, index])


def _visible(
    corners: Tensor, radii: Tensor, drawn: Tensor, keypoints: Tensor, present: Tensor
) -> Bool[Tensor, "scene keypoint"]:
    y, x = rearrange(keypoints, "scene keypoint yx -> yx scene keypoint 1")
    layers = torch.tensor(KEYPOINT_LAYERS)
    hidden = torch.zeros_like(present)
    index = 0
    for place, layer in enumerate(LAYERS):
        for _ in layer.shapes:
            inside = shape_distance(index, y, x, corners, radii)[..., 0] < 0
            hidden |= inside & drawn[:, index, None] & (layers < place)
            index += 1
    return present & ~hidden


def place(scenes: Sequence[Scene], size: int) -> Placed:
    """Scale, turn and move the creatures of scenes to where they are in the picture.

    Args:
        scenes: at least one.
        size: the side of the picture in pixels.

    Returns:
        The creatures, float32.
    """
    bones = skeletons(scenes)
    scale = torch.tensor([scene.scale for scene in scenes], dtype=torch.float64) * size / FRAME
    mirror = torch.tensor([[1.0, -1.0 if scene.facing == "left" else 1.0] for scene in scenes], dtype=torch.float64)
    origin = torch.tensor([scene.position for scene in scenes], dtype=torch.float64) * size - 0.5
    factor = rearrange(scale, "scene -> scene 1") * mirror

    corners = bones.corners * rearrange(factor, "scene yx -> scene 1 1 yx")
    corners = (corners + rearrange(origin, "scene yx -> scene 1 1 yx")).float()
    keypoints = bones.keypoints * rearrange(factor, "scene yx -> scene 1 yx")
    keypoints = (keypoints + rearrange(origin, "scene yx -> scene 1 yx")).float()
    radii = (bones.radii * rearrange(scale, "scene -> scene 1 1")).float()
    visible = _visible(corners, radii, bones.drawn, keypoints, bones.present)
    return Placed(corners, radii, bones.drawn, keypoints, bones.present, visible, scale.float())
