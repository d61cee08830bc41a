"""Pictures of scenes, with everything that is known about each pixel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.zoo.creatures.colours import BACKGROUNDS, COLOURS
from interp.zoo.creatures.layers import FIXED, LAYERS, PARTS, SHAPES
from interp.zoo.creatures.placing import Placed, place, shape_distance
from interp.zoo.creatures.scenes import TINTS, Scene
from interp.zoo.creatures.species import SPECIES

# Pixels that are painted together: few enough to stay in the processor's cache.
CHUNK_PIXELS = 32 * 64 * 64
OUTLINE = 0.8  # width of the dark line, in units of the skeleton, so that it leaves room for colour in thin legs
OUTLINE_SHADE = 0.42
SHADING = 0.13  # how much lighter than the middle a creature is at its top, and darker at its bottom
SKY = 0.05  # the same of the background
SHADOW = 0.22
FARTHEST = 0.2


@dataclass(frozen=True)
class Rendered:
    """Pictures, and what is known about them; pixel coordinates have (0, 0) in the centre of the top left pixel.

    Attributes:
        images: red, green and blue, 0 to 1.
        keypoints: as (y, x) in pixels, in the order of ``KEYPOINTS``; meaningless where not present.
        present: whether the species has the keypoint.
        visible: whether it has the keypoint and no other part hides it.
        parts: the part that each pixel's centre shows, as its index in ``PARTS``; 0 is the background.
        depth: 0 for the background, else 0.2 to 1, nearer is larger; one value for each part.
        edges: 1 on the outlines that can be seen, falling to 0 within a pixel; tail, body and neck share one outline.
    """

    images: Float[Tensor, "scene 3 height width"]
    keypoints: Float[Tensor, "scene keypoint 2"]
    present: Bool[Tensor, "scene keypoint"]
    visible: Bool[Tensor, "scene keypoint"]
    parts: Int[Tensor, "scene height width"]
    depth: Float[Tensor, "scene height width"]
    edges: Float[Tensor, "scene height width"]


def part_depths() -> Float[Tensor, " part"]:
    """The depth of each part in the order of ``PARTS``: 0 for the background, 1 for the nearest part."""
    return torch.cat([torch.zeros(1), torch.linspace(FARTHEST, 1, len(PARTS) - 1)])


def _tints(scenes: Sequence[Scene]) -> dict[str, Float[Tensor, "scene 3"]]:
    """The exact colours of each scene's body, head, legs and background."""
    colours = {}
    for index, tint in enumerate(TINTS):
        table = BACKGROUNDS if tint == "background" else COLOURS
        named = torch.tensor([table[getattr(scene, tint)] for scene in scenes])
        colours[tint] = (named + torch.tensor([scene.jitter[index] for scene in scenes])).clamp(0, 1)
    for name, rgb in FIXED.items():
        colours[name] = repeat(torch.tensor(rgb), "rgb -> scene rgb", scene=len(scenes))
    return colours


def _backdrop(colour: Float[Tensor, "scene 3"], placed: Placed, y: Tensor, x: Tensor) -> Tensor:
    """The background with the shadow on the ground below the creature."""
    size = y.shape[1]
    height = (y + 0.5) / size
    image = rearrange(colour, "scene rgb -> rgb scene 1 1") * (1 + SKY * (1 - 2 * height))
    reach = placed.radii.amax(dim=2)
    low, high = (
        torch.where(placed.drawn[..., None], placed.corners.amin(dim=2) - reach[..., None], torch.inf).amin(dim=1),
        torch.where(placed.drawn[..., None], placed.corners.amax(dim=2) + reach[..., None], -torch.inf).amax(dim=1),
    )
    ground = rearrange(high[:, 0], "scene -> scene 1 1")
    left, right = rearrange(low[:, 1], "scene -> scene 1 1"), rearrange(high[:, 1], "scene -> scene 1 1")
    across = (x - (left + right) / 2) / (0.48 * (right - left))
    down = (y - ground + 0.008 * size) / (0.045 * size)
    dark = (1 - (across.square() + down.square())).clamp(0, 1) * SHADOW
    return image * (1 - dark)


def _light(placed: Placed, y: Tensor, size: int) -> Float[Tensor, "scene height 1"]:
    body = next(index for index, shape in enumerate(SHAPES) if shape.name == "body")
    middle = rearrange(placed.corners[:, body, :2, 0].mean(dim=1), "scene -> scene 1 1")
    return 1 + SHADING * ((middle - y) / (0.2 * size)).clamp(-1, 1)


def _paint(placed: Placed, tints: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Paint the layers over each other, farthest first; give images, parts and edges."""
    y = rearrange(torch.arange(size, dtype=torch.float32), "height -> 1 height 1")
    x = rearrange(torch.arange(size, dtype=torch.float32), "width -> 1 1 width")
    images = _backdrop(tints["background"], placed, y, x)
    light = _light(placed, y, size)
    line = rearrange(OUTLINE * placed.scale, "scene -> scene 1 1")
    parts = torch.zeros(images.shape[1:], dtype=torch.int64)
    edges = torch.zeros(images.shape[1:])
    index = 0
    for layer in LAYERS:
        nearest: Tensor | None = None
        for shape in layer.shapes:
            drawn = placed.drawn[:, index]
            if drawn.any():
                distance = shape_distance(index, y, x, placed.corners, placed.radii)
                if not drawn.all():
                    distance[~drawn] = torch.inf
                label = PARTS.index(shape.part)
                if nearest is None:
                    nearest, labels = distance, torch.full_like(parts, label)
                else:
                    labels.masked_fill_(distance < nearest, label)
                    nearest = torch.minimum(nearest, distance)
            index += 1
        if nearest is None:
            continue
        parts = torch.where(nearest < 0, labels, parts)
        cover = (0.5 - nearest).clamp_(0, 1)
        colour = rearrange(tints[layer.colour] * layer.shade, "scene rgb -> rgb scene 1 1")
        if layer.outlined:
            images.lerp_(colour * OUTLINE_SHADE, cover)
            images.lerp_((colour * light).clamp_(0, 1), (0.5 - line - nearest).clamp_(0, 1))
        else:
            images.lerp_(colour, cover)
        edges = torch.maximum(edges * (1 - cover), (1 - nearest.abs()).clamp_(0, 1))
    return rearrange(images, "rgb scene height width -> scene rgb height width").clamp(0, 1), parts, edges


def render(scenes: Sequence[Scene], size: int = 64) -> Rendered:
    """Paint scenes; the same scene gives the same picture, whatever it is rendered with.

    Args:
        scenes: at least one.
        size: the side of the picture in pixels, at least 8.

    Returns:
        The pictures and their maps, in the order of the scenes.

    Raises:
        InputError: there are no scenes, or the size is too small.
    """
    if not scenes:
        raise InputError("scenes is empty; expected at least one.")
    if size < 8:
        raise InputError(f"size is {size}; expected the side of the picture in pixels, at least 8.")
    # Scenes of one species are painted together: shapes that it does not have cost nothing.
    order = sorted(range(len(scenes)), key=lambda index: SPECIES.index(scenes[index].species))
    step = max(1, CHUNK_PIXELS // size**2)
    images = torch.empty(len(scenes), 3, size, size)
    parts = torch.empty(len(scenes), size, size, dtype=torch.int64)
    edges = torch.empty(len(scenes), size, size)
    placed = place(scenes, size)
    tints = _tints(scenes)
    for start in range(0, len(scenes), step):
        rows = torch.tensor(order[start : start + step])
        chunk = Placed(*(getattr(placed, name)[rows] for name in Placed.__dataclass_fields__))
        painted = _paint(chunk, {name: rgb[rows] for name, rgb in tints.items()}, size)
        images[rows], parts[rows], edges[rows] = painted
    depth = part_depths()[parts]
    return Rendered(images, placed.keypoints, placed.present, placed.visible, parts, depth, edges)
