"""Scenes: what a picture shows, drawn at random."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange

from interp.errors import InputError, UnknownNameError, nearest
from interp.zoo.creatures.colours import BACKGROUNDS, contrasting
from interp.zoo.creatures.skeleton import POSE, Skeleton, skeleton
from interp.zoo.creatures.species import SPECIES

FRAME = 64
MARGIN = 2.0
SCALES = (0.7, 1.15)
# A creature that is too large is shrunk to this share of what would just fit, so that its place still varies.
ROOM = 0.96
JITTER = 0.03
TINTS = ("body", "head", "legs", "background")

# How far each angle may leave the pose at rest, in degrees.
POSE_RANGES = {
    "neck": (-24.0, 16.0),
    "head": (-20.0, 20.0),
    **{f"{leg}_upper": (-26.0, 26.0) for leg in ("near_front", "near_back", "far_front", "far_back")},
    **{f"{leg}_lower": (-22.0, 10.0) for leg in ("near_front", "near_back", "far_front", "far_back")},
    "tail_first": (-26.0, 26.0),
    "tail_second": (-32.0, 32.0),
    "wing": (-34.0, 14.0),
}


@dataclass(frozen=True)
class Scene:
    """One creature on a plain background; ``dataclasses.replace`` makes a scene that differs in one thing.

    Attributes:
        species: a name in ``SPECIES``.
        body: the colour of body, neck, tail and wing: a name in ``COLOURS``.
        head: the colour of the head.
        legs: the colour of the legs.
        background: a name in ``BACKGROUNDS``.
        facing: ``"left"`` or ``"right"``.
        scale: 1 is the species' own size.
        position: the middle of the body as (y, x), in shares of the frame from its top left corner.
        pose: the angles named in ``POSE``, in degrees, as changes from the species' pose at rest.
        jitter: what is added to the red, green and blue of body, head, legs and background.
    """

    species: str
    body: str
    head: str
    legs: str
    background: str
    facing: str
    scale: float
    position: tuple[float, float]
    pose: tuple[float, ...]
    jitter: tuple[tuple[float, float, float], ...]


def skeletons(scenes: Sequence[Scene]) -> Skeleton:
    """The creatures of scenes before they are scaled, turned and put in their place.

    Args:
        scenes: at least one.

    Returns:
        As for ``skeleton``.
    """
    poses = torch.tensor([scene.pose for scene in scenes], dtype=torch.float64)
    return skeleton([scene.species for scene in scenes], poses)


def _extents(bones: Skeleton) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest (y, x) that the shapes and keypoints of each creature reach."""
    reach = rearrange(bones.radii.amax(dim=2), "scene shape -> scene shape 1 1")
    drawn = rearrange(bones.drawn, "scene shape -> scene shape 1 1")
    lowest = torch.where(drawn, bones.corners - reach, torch.inf).amin(dim=(1, 2))
    highest = torch.where(drawn, bones.corners + reach, -torch.inf).amax(dim=(1, 2))
    return lowest.numpy(), highest.numpy()


def _pick(options: Sequence[str], share: float) -> str:
    return options[int(share * len(options))]


def checked_species(n: int, seed: int, species: Sequence[str] | None) -> tuple[str, ...]:
    """The species to draw from, once every setting of a draw is known to be sound.

    Args:
        n: how many to draw.
        seed: of the draw.
        species: names, all of them different, or None for all species.

    Returns:
        The names.

    Raises:
        InputError: ``n`` is below 1, ``seed`` below 0, or ``species`` is empty, a string, or repeats a name.
        UnknownNameError: no such species.
    """
    if n < 1:
        raise InputError(f"n is {n}; expected how many to draw, at least 1.")
    if seed < 0:
        raise InputError(f"seed is {seed}; expected a whole number from 0.")
    chosen = SPECIES if species is None else tuple(species)
    if isinstance(species, str):
        raise InputError(f"species is the string {species!r}; expected a list of names, such as [{species!r}].")
    if not chosen:
        raise InputError(f"species is empty; expected names from {', '.join(SPECIES)}, or None for all of them.")
    for name in chosen:
        if name not in SPECIES:
            raise UnknownNameError(f"no species {name!r}; there are {', '.join(SPECIES)}. {nearest(name, SPECIES)}")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"species repeats a name: {', '.join(chosen)}; expected each at most once.")
    return chosen


def draw_scenes(n: int, seed: int, species: Sequence[str] | None = None) -> list[Scene]:
    """Draw scenes at random; the whole creature is at least 2/64 of the frame away from its border.

    Args:
        n: how many, at least 1; a smaller ``n`` gives the first of the same scenes.
        seed: of everything that is drawn, at least 0.
        species: which to draw from, in equal shares; all by default.

    Returns:
        The scenes.

    Raises:
        InputError: ``n`` is below 1, ``seed`` below 0, or ``species`` is empty, a string, or repeats a name.
        UnknownNameError: no such species.
    """
    chosen = checked_species(n, seed, species)
    lows, highs = (np.array([POSE_RANGES[name][end] for name in POSE]) for end in (0, 1))
    # One row of numbers for each scene, so that scene i does not depend on how many are drawn.
    shares = np.random.default_rng(seed).random((n, 9 + len(POSE) + 3 * len(TINTS)))
    words, places, angles, tints = np.split(shares, [6, 9, 9 + len(POSE)], axis=1)
    kinds = [_pick(chosen, share) for share in words[:, 0]]
    poses = lows + angles * (highs - lows)
    lowest, highest = _extents(skeleton(kinds, torch.from_numpy(poses)))
    left = words[:, 5] < 0.5
    # A creature that faces left is the mirror image in x.
    starts, ends = lowest.copy(), highest.copy()
    starts[left, 1], ends[left, 1] = -highest[left, 1], -lowest[left, 1]
    largest = (FRAME - 2 * MARGIN) / (ends - starts).max(axis=1)
    scales = np.minimum(SCALES[0] + places[:, 0] * (SCALES[1] - SCALES[0]), ROOM * largest)
    first = MARGIN - scales[:, None] * starts
    last = FRAME - MARGIN - scales[:, None] * ends
    positions = (first + places[:, 1:] * (last - first)) / FRAME
    offsets = JITTER * (2 * rearrange(tints, "scene (tint rgb) -> scene tint rgb", rgb=3) - 1)
    scenes = []
    for index in range(n):
        background = _pick(tuple(BACKGROUNDS), words[index, 1])
        body, head, legs = (_pick(contrasting(background), share) for share in words[index, 2:5])
        red_green_blue = tuple((float(red), float(green), float(blue)) for red, green, blue in offsets[index])
        y, x = positions[index]
        scenes.append(
            Scene(
                species=kinds[index],
                body=body,
                head=head,
                legs=legs,
                background=background,
                facing="left" if left[index] else "right",
                scale=float(scales[index]),
                position=(float(y), float(x)),
                pose=tuple(float(angle) for angle in poses[index]),
                jitter=red_green_blue,
            )
        )
    return scenes
