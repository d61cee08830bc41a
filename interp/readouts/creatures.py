"""Exact targets from the renderer of the creatures: poses, depth, edges, keypoints, shared points, triplets."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, UnknownNameError, nearest
from interp.readouts.examples import InMemory, PointPair
from interp.readouts.keypoints import heatmaps
from interp.readouts.pose_drawing import CREATURE_BONES, draw_pose
from interp.zoo.creatures import BACKGROUNDS, SPECIES, Rendered, Scene, draw_scenes, render
from interp.zoo.creatures.colours import contrasting

# Most cells are background: depth from -1 on, as for photographs, leaves heads in the flat end of their tanh.
RANGES = {"pose": (-0.5, 0.5), "edge": (-0.5, 0.5), "depth": (-0.5, 0.5), "keypoints": (0.0, 1.0)}
"""Properties that are pictures or heat maps, and the range of their targets."""
SIZE, GRID = 64, 16


def creature_pictures(
    n: int,
    seed: int,
    target: str,
    *,
    size: int = SIZE,
    grid: int = GRID,
    species: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
) -> InMemory:
    """Pictures of creatures with a picture, or heat maps, of a property.

    Args:
        n: how many.
        seed: of the scenes.
        target: ``"pose"`` (RGB, 3 channels), ``"depth"``, ``"edge"`` (1 channel) or ``"keypoints"`` (17 heat maps, in
            the order of `interp.zoo.creatures.KEYPOINTS`).
        size: side of the pictures in pixels.
        grid: side of the targets in cells, usually the latents'.
        species: which; all by default.
        value_range: of the targets; None: that of ``RANGES``.

    Returns:
        One picture and one target to an example.

    Raises:
        UnknownNameError: no such property or species.
        InputError: numbers out of range.
    """
    rendered = render(draw_scenes(n, seed, species), size)
    targets = creature_targets(rendered, target, grid, value_range)
    return InMemory(rearrange(2 * rendered.images - 1, "scene ... -> scene 1 ..."), targets)


def creature_targets(
    rendered: Rendered, target: str, grid: int = GRID, value_range: tuple[float, float] | None = None
) -> Float[Tensor, "scene channel grid grid"]:
    """The exact target of some pictures.

    Args:
        rendered: pictures and what is known of them.
        target: as for `creature_pictures`. Hidden keypoints that the species has are drawn too.
        grid: side in cells.
        value_range: of the targets; None: that of ``RANGES``. What is background is exactly the least.

    Raises:
        UnknownNameError: no such property.
        InputError: a grid or range that cannot be.
    """
    if target not in RANGES:
        known = ", ".join(RANGES)
        raise UnknownNameError(f"no target {target!r}: there are {known}. {nearest(target, RANGES)}".rstrip())
    low, high = RANGES[target] if value_range is None else value_range
    if grid < 1 or not low < high:
        raise InputError(f"grid={grid} and value_range={value_range}: expected a side, and (least, greatest)")
    points = _cells(rendered.keypoints, rendered.images.shape[-1], grid)
    if target == "pose":
        return draw_pose(points, rendered.present, CREATURE_BONES, (grid, grid), value_range=(low, high))
    if target == "keypoints":
        # Heat maps truncate; half a cell makes that the cell that a point is in.
        return low + (high - low) * heatmaps(points + 0.5, rendered.present, (grid, grid))
    values = rendered.depth if target == "depth" else rendered.edges
    pooled = F.adaptive_avg_pool2d(rearrange(values, "scene h w -> scene 1 h w"), grid)
    return low + (high - low) * pooled


def creature_frames(n: int, seed: int, *, size: int = SIZE, grid: int = GRID) -> InMemory:
    """Pairs of pictures of one creature that moved, with the keypoints that both show.

    Args:
        n: how many.
        seed: of scenes and movements.
        size: side of the pictures in pixels.
        grid: side of the maps that the points are for, in cells.

    Returns:
        Two pictures and a `PointPair` to an example.

    Raises:
        InputError: numbers out of range.
    """
    scenes = draw_scenes(n, seed)
    pair = [render(part, size) for part in (scenes, moved(scenes, seed))]
    both = pair[0].visible & pair[1].visible
    # Shares times the grid are cells, so that rounding gives the cell that a point is in.
    shares = [_cells(part.keypoints, size, grid).clamp(min=0) / grid for part in pair]
    targets = [PointPair(a[shown], b[shown]) for a, b, shown in zip(*shares, both, strict=True)]
    kept = [index for index, target in enumerate(targets) if len(target.points_a)]
    images = torch.stack([2 * part.images - 1 for part in pair], dim=1)
    return InMemory(images[kept], [targets[index] for index in kept])


def creature_triplets(n: int, seed: int, kind: str = "appearance", *, size: int = SIZE) -> InMemory:
    """Triplets of an anchor, a picture that should count as alike, and one that should not.

    Args:
        n: how many.
        seed: of scenes, movements and colours.
        kind: as for `triplet_scenes`.
        size: side of the pictures in pixels.

    Returns:
        Three pictures to an example, and no targets.

    Raises:
        InputError: an unknown kind, or numbers out of range.
    """
    images = [2 * render(scenes, size).images - 1 for scenes in triplet_scenes(n, seed, kind)]
    return InMemory(torch.stack(images, dim=1))


def triplet_scenes(n: int, seed: int, kind: str = "appearance") -> tuple[list[Scene], list[Scene], list[Scene]]:
    """The scenes of triplets.

    Args:
        n: how many.
        seed: of scenes, movements and colours.
        kind: ``"appearance"``: the positive is the anchor moved, background and all; ``"identity"``: the same creature
            anywhere, in any pose and before any background. The negative is moved as well and recoloured (even
            examples), or another species in the anchor's colours (odd ones; for appearance every other of these is the
            anchor moved, before another background).

    Returns:
        Anchors, positives and negatives.

    Raises:
        InputError: an unknown kind, or numbers out of range.
    """
    if kind not in ("appearance", "identity"):
        raise InputError(f"no kind {kind!r} of triplets: there are appearance and identity")
    anchors = draw_scenes(n, seed)
    rng = np.random.default_rng((seed, 2))
    if kind == "appearance":
        positives = moved(anchors, seed)
        # As far from the anchor's place as the positive: then nothing but its looks tells the two apart.
        recoloured = [_recoloured(scene, rng) for scene in moved(anchors, int(rng.integers(2**31)))]
    else:
        places = [_redrawn([scene.species for scene in anchors], (seed, turn)) for turn in (3, 4)]
        positives = [
            _clothed(place, scene, _behind(scene, rng)) for place, scene in zip(places[0], anchors, strict=True)
        ]
        elsewhere = [_clothed(place, scene, scene.background) for place, scene in zip(places[1], anchors, strict=True)]
        recoloured = [_recoloured(scene, rng) for scene in elsewhere]
    names = [str(rng.choice([name for name in SPECIES if name != scene.species])) for scene in anchors]
    others = zip(_redrawn(names, (seed, 5)), anchors, strict=True)
    strangers = [_clothed(place, scene, scene.background) for place, scene in others]
    negatives = [recoloured[index] if index % 2 == 0 else strangers[index] for index in range(n)]
    if kind == "appearance":
        again = moved(anchors, int(rng.integers(2**31)))
        negatives[3::4] = [
            dataclasses.replace(scene, background=_behind(scene, rng, but=scene.background)) for scene in again[3::4]
        ]
    return anchors, positives, negatives


def moved(scenes: Sequence[Scene], seed: int, reach: tuple[float, float] = (0.25, 1.0)) -> list[Scene]:
    """The same creatures in another pose, place and size, facing as before.

    Args:
        scenes: at least one.
        seed: of the movement.
        reach: how far each goes toward a scene drawn at random, drawn between these shares.

    Raises:
        InputError: shares that are no rising pair in 0 .. 1.
    """
    if not 0 <= reach[0] <= reach[1] <= 1:
        raise InputError(f"reach={reach}: expected rising shares from 0 to 1")
    shares = np.random.default_rng((seed, 1)).uniform(*reach, len(scenes))
    goals = _redrawn([scene.species for scene in scenes], (seed, 0))
    return [_toward(*pair) for pair in zip(scenes, goals, shares.tolist(), strict=True)]


def _toward(scene: Scene, goal: Scene, share: float) -> Scene:
    # A mirrored scene fits its frame as the scene itself does.
    y, x = goal.position if goal.facing == scene.facing else (goal.position[0], 1 - goal.position[1])

    def between(start: float, end: float) -> float:
        return start + share * (end - start)

    return dataclasses.replace(
        scene,
        pose=tuple(between(*angles) for angles in zip(scene.pose, goal.pose, strict=True)),
        position=(between(scene.position[0], y), between(scene.position[1], x)),
        scale=between(scene.scale, goal.scale),
    )


def _redrawn(species: Sequence[str], seed: tuple[int, int]) -> list[Scene]:
    """A scene drawn at random for each species that is asked for."""
    drawn = {
        name: draw_scenes(species.count(name), int(np.random.SeedSequence((*seed, index)).generate_state(1)[0]), [name])
        for index, name in enumerate(SPECIES)
        if name in species
    }
    return [drawn[name].pop() for name in species]


def _clothed(place: Scene, like: Scene, background: str) -> Scene:
    """A scene with the colours of another."""
    return dataclasses.replace(
        place, body=like.body, head=like.head, legs=like.legs, jitter=like.jitter, background=background
    )


def _recoloured(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with body, head and legs in other colours."""

    def other(colour: str) -> str:
        return str(rng.choice([name for name in contrasting(scene.background) if name != colour]))

    return dataclasses.replace(scene, body=other(scene.body), head=other(scene.head), legs=other(scene.legs))


def _behind(scene: Scene, rng: np.random.Generator, *, but: str = "") -> str:
    """Any background, but one, before which the creature shows well."""
    parts = {scene.body, scene.head, scene.legs}
    return str(rng.choice([name for name in BACKGROUNDS if name != but and parts <= set(contrasting(name))]))


def _cells(points: Float[Tensor, "scene keypoint 2"], size: int, grid: int) -> Float[Tensor, "scene keypoint 2"]:
    """Pixels as cells of a grid; (0, 0) is the centre of the first in both."""
    return (points + 0.5) * (grid / size) - 0.5
