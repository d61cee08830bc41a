"""Pairs of pictures of one species, with the keypoints that both show: a test of semantic correspondence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.zoo.creatures.placing import place
from interp.zoo.creatures.render import Rendered, render
from interp.zoo.creatures.scenes import Scene, checked_species, draw_scenes
from interp.zoo.creatures.species import KEYPOINTS

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class KeypointPair:
    """Two pictures of one species, and where the same points are in both.

    Attributes:
        source: the index of one picture.
        target: the index of the other.
        category: the species.
        names: of the keypoints that can be seen in both.
        source_points: where they are in the source, as (y, x) in pixels; (0, 0) is the centre of the top left pixel.
        target_points: where they are in the target.
        source_box: the creature's (top, left, bottom, right) in pixels; bottom and right are the first beyond it.
        target_box: the same in the target.
    """

    source: int
    target: int
    category: str
    names: tuple[str, ...]
    source_points: Float[Tensor, "point 2"]
    target_points: Float[Tensor, "point 2"]
    source_box: Box
    target_box: Box


@dataclass(frozen=True)
class Pairs:
    """Pictures, and the pairs among them.

    Attributes:
        scenes: what each picture shows.
        rendered: the pictures and their maps.
        pairs: the pairs; the categories take turns.
    """

    scenes: list[Scene]
    rendered: Rendered
    pairs: list[KeypointPair]

    @property
    def images(self) -> Float[Tensor, "scene 3 height width"]:
        """The pictures, 0 to 1."""
        return self.rendered.images


def _box(parts: Int[Tensor, "height width"]) -> Box:
    rows, columns = torch.nonzero(parts, as_tuple=True)
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


def _common(visible: Bool[Tensor, "scene keypoint"]) -> Bool[Tensor, "pair keypoint"]:
    """Which keypoints both scenes of each pair show; the scenes of a pair follow each other."""
    return visible[0::2] & visible[1::2]


def _scenes_of_one_species(count: int, seed: tuple[int, int], name: str, size: int, min_points: int) -> list[Scene]:
    """Draw two scenes for each of some pairs, leaving out pairs with too few points."""
    kept: list[Scene] = []
    sequence = np.random.SeedSequence(seed)
    while len(kept) < 2 * count:
        (attempt,) = sequence.spawn(1)
        scenes = draw_scenes(2 * count, int(attempt.generate_state(1)[0]), [name])
        enough = _common(place(scenes, size).visible).sum(dim=1) >= min_points
        for pair in torch.nonzero(enough)[:, 0].tolist():
            kept += scenes[2 * pair : 2 * pair + 2]
    return kept[: 2 * count]


def draw_pairs(n: int, seed: int, species: Sequence[str] | None = None, size: int = 64, min_points: int = 3) -> Pairs:
    """Draw pairs of pictures of one species in different poses, colours, places, sizes and directions.

    Args:
        n: how many pairs, at least 1.
        seed: of everything that is drawn.
        species: which to draw, taking turns; all by default.
        size: the side of the pictures in pixels.
        min_points: how many keypoints must be visible in both pictures of a pair, 1 to 6.

    Returns:
        ``2 * n`` pictures, and the pairs.

    Raises:
        InputError: ``n``, ``seed``, ``size`` or ``min_points`` is out of range, or ``species`` is empty or a string.
        UnknownNameError: no such species.
    """
    chosen = checked_species(n, seed, species)
    if not 1 <= min_points <= 6:
        raise InputError(f"min_points is {min_points}; expected 1 to 6.")
    shares = {name: len(range(index, n, len(chosen))) for index, name in enumerate(chosen)}
    drawn = {
        name: _scenes_of_one_species(share, (seed, index), name, size, min_points)
        for index, (name, share) in enumerate(shares.items())
        if share
    }
    scenes: list[Scene] = []
    for turn in range(n):
        name, place_in_turn = chosen[turn % len(chosen)], turn // len(chosen)
        scenes += drawn[name][2 * place_in_turn : 2 * place_in_turn + 2]
    rendered = render(scenes, size)
    common = _common(rendered.visible)
    pairs = [
        KeypointPair(
            source=2 * index,
            target=2 * index + 1,
            category=scenes[2 * index].species,
            names=tuple(name for name, shown in zip(KEYPOINTS, common[index].tolist(), strict=True) if shown),
            source_points=rendered.keypoints[2 * index, common[index]],
            target_points=rendered.keypoints[2 * index + 1, common[index]],
            source_box=_box(rendered.parts[2 * index]),
            target_box=_box(rendered.parts[2 * index + 1]),
        )
        for index in range(n)
    ]
    return Pairs(scenes, rendered, pairs)
