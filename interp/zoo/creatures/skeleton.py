"""Where the shapes and keypoints of a creature are, from its species and its pose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from interp.zoo.creatures.layers import SHAPES
from interp.zoo.creatures.species import KEYPOINTS, TABLE, Species

POSE = (
    "neck",
    "head",
    "near_front_upper",
    "near_front_lower",
    "near_back_upper",
    "near_back_lower",
    "far_front_upper",
    "far_front_lower",
    "far_back_upper",
    "far_back_lower",
    "tail_first",
    "tail_second",
    "wing",
)


@dataclass(frozen=True)
class Skeleton:
    """Creatures that face right, around the middle of their body, in units of 1/64 of the frame at scale 1.

    Attributes:
        corners: of each shape, as (y, x), y downwards; a capsule has two and repeats the second.
        radii: of a capsule at its two ends; of a triangle how far its corners are rounded.
        drawn: whether the species has the shape.
        keypoints: as (y, x).
        present: whether the species has the keypoint.
    """

    corners: Float[Tensor, "scene shape 3 2"]
    radii: Float[Tensor, "scene shape 2"]
    drawn: Bool[Tensor, "scene shape"]
    keypoints: Float[Tensor, "scene keypoint 2"]
    present: Bool[Tensor, "scene keypoint"]


Point = Float[Tensor, "scene 2"]
Value = Float[Tensor, " scene"]


@dataclass
class _Drawing:
    """Shapes and keypoints as they are placed."""

    shapes: dict[str, tuple[Tensor, Tensor, Tensor]]
    keypoints: dict[str, tuple[Tensor, Tensor]]
    everywhere: Tensor

    def capsule(
        self, name: str, start: Point, end: Point, radii: tuple[Value, Value], drawn: Tensor | None = None
    ) -> None:
        corners = torch.stack([start, end, end], dim=1)
        self.shapes[name] = (corners, torch.stack(radii, dim=1), self.everywhere if drawn is None else drawn)

    def triangle(self, name: str, corners: Sequence[Point], rounding: float, drawn: Tensor) -> None:
        stacked = torch.stack(list(corners), dim=1)
        self.shapes[name] = (stacked, torch.full_like(stacked[:, 0], rounding), drawn)

    def keypoint(self, name: str, point: Point, present: Tensor | None = None) -> None:
        self.keypoints[name] = (point, self.everywhere if present is None else present)


def _toward(angle: Value, length: Value | float) -> Point:
    """The step of a length at an angle in degrees from straight ahead, upwards positive."""
    radians = torch.deg2rad(angle)
    return torch.stack([-torch.sin(radians) * length, torch.cos(radians) * length], dim=1)


def _between(start: Point, end: Point, share: Value | float) -> Point:
    weight = repeat(share, "scene -> scene 1") if isinstance(share, Tensor) else share
    return start + (end - start) * weight


def _columns(species: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    """Every number of the species' table, one tensor over scenes for each of a field's entries."""
    kinds: list[Species] = [TABLE[name] for name in species]
    columns = {}
    for name in Species.__dataclass_fields__:
        rows = [getattr(kind, name) for kind in kinds]
        entries = [row if isinstance(row, tuple) else (row,) for row in rows]
        columns[name] = tuple(torch.tensor(entry, dtype=torch.float64) for entry in zip(*entries, strict=True))
    return columns


def _torso(drawing: _Drawing, table: Mapping[str, tuple[Value, ...]]) -> tuple[Point, Point]:
    """Place the body; give the middles of chest and hip."""
    (length,), (tilt,) = table["body_length"], table["body_tilt"]
    chest, hip = _toward(tilt, length / 2), _toward(tilt + 180, length / 2)
    drawing.capsule("body", chest, hip, (table["body_radii"][0], table["body_radii"][1]))
    middle = (chest + hip) / 2
    radius = (table["body_radii"][0] + table["body_radii"][1]) / 2
    drawing.keypoint("back", middle + _toward(tilt + 90, 0.72 * radius))
    drawing.keypoint("belly", middle + _toward(tilt - 90, 0.72 * radius))
    return chest, hip


def _head(drawing: _Drawing, table: Mapping[str, tuple[Value, ...]], pose: Mapping[str, Value], chest: Point) -> None:
    """Place neck, head, ear, horn, eye and mane."""
    (tilt,), (radius,) = table["body_tilt"], table["head_radius"]
    angle = table["neck_angle"][0] + pose["neck"]
    base = chest + _toward(tilt + 55, 0.4 * table["body_radii"][0])
    middle = base + _toward(angle, table["neck_length"][0])
    drawing.capsule("neck", base, middle, (table["neck_radii"][0], table["neck_radii"][1]))
    drawing.keypoint("neck_base", base)
    gaze = pose["head"] - table["head_angle"][0] + 0.5 * pose["neck"]
    tip = middle + _toward(gaze, table["snout_length"][0])
    beak = table["beak"][0] > 0
    snout_radii = (table["snout_radii"][0], table["snout_radii"][1])
    drawing.capsule("snout", middle, tip, snout_radii, ~beak)
    drawing.capsule("beak", middle, tip, snout_radii, beak)
    drawing.capsule("head", middle, middle, (radius, radius))
    drawing.keypoint("nose", tip - _toward(gaze, torch.where(beak, 1.5, 0.0)))
    drawing.keypoint("head_top", middle + _toward(gaze + 90, 0.68 * radius))
    eye = middle + _toward(gaze + 42, 0.46 * radius)
    white = table["eye_radius"][0]
    drawing.capsule("eye", eye, eye, (white, white))
    look = eye + _toward(gaze, 0.25 * white)
    drawing.capsule("pupil", look, look, (0.62 * white, 0.62 * white))
    drawing.keypoint("eye", eye)

    root = middle + _toward(gaze + 128, 0.62 * radius)
    ear = root + _toward(gaze + table["ear_angle"][0], table["ear_length"][0])
    drawing.capsule("ear", root, ear, (table["ear_radii"][0], table["ear_radii"][1]), table["ear_length"][0] > 0)
    horn_root = middle + _toward(gaze + 95, 0.4 * radius)
    horn = horn_root + _toward(gaze + table["horn_angle"][0], table["horn_length"][0])
    thin = torch.where(table["spikes"][0] > 0, 0.3, 1.1)
    thick = torch.where(table["spikes"][0] > 0, 1.5, 0.8)
    drawing.capsule("horn", horn_root, horn, (thick.double(), thin.double()), table["horn_length"][0] > 0)

    mane = table["mane"][0] > 0
    thickness = torch.full_like(angle, 1.5)
    along = [
        _between(base, middle, share) + _toward(angle + 90, lift * table["neck_radii"][1])
        for share, lift in ((0.0, 1.65), (0.35, 1.55), (0.7, 1.4), (1.08, 1.15))
    ]
    for index in range(3):
        drawing.capsule(f"mane_{index}", along[index], along[index + 1], (thickness, thickness * 1.1), mane)
    spikes = table["spikes"][0] > 0
    for index, share in enumerate((0.3, 0.72)):
        foot = _between(base, middle, share)
        width = torch.lerp(table["neck_radii"][0], table["neck_radii"][1], share)
        corners = [
            foot + _toward(angle, 2.2),
            foot + _toward(angle + 180, 2.2),
            foot + _toward(angle + 98, width + 3.2),
        ]
        drawing.triangle(f"spike_{index}", corners, 0.3, spikes)


def _back_spikes(drawing: _Drawing, table: Mapping[str, tuple[Value, ...]], chest: Point, hip: Point) -> None:
    tilt = table["body_tilt"][0]
    for index, share in enumerate((0.3, 0.68, 1.06)):
        foot = _between(chest, hip, share) + _toward(tilt + 90, 2.0)
        tip = foot + _toward(tilt + 98, table["body_radii"][1] + 1.6)
        corners = [foot + _toward(tilt, 2.8), foot + _toward(tilt + 180, 2.8), tip]
        drawing.triangle(f"spike_{index + 2}", corners, 0.3, table["spikes"][0] > 0)


def _leg(
    drawing: _Drawing, table: Mapping[str, tuple[Value, ...]], pose: Mapping[str, Value], name: str, top: Point
) -> None:
    """Place one leg, for example ``"near_front"``."""
    _, end = name.split("_")
    rest = table[f"{end}_angles"]
    drawn = (table["legs"][0] > 2) | torch.full_like(drawing.everywhere, end == "back")
    upper = rest[0] + pose[f"{name}_upper"]
    lower = rest[1] + pose[f"{name}_lower"] + 0.6 * pose[f"{name}_upper"]
    knee = top + _toward(upper - 90, table["leg_length"][0])
    foot = knee + _toward(lower - 90, table["leg_length"][1])
    toes = foot + _toward(0.4 * lower, table["foot_length"][0])
    thick, middle, thin = table["leg_radii"]
    drawing.capsule(f"{name}_leg_upper", top, knee, (thick, middle), drawn)
    drawing.capsule(f"{name}_leg_lower", knee, foot, (middle, thin), drawn)
    drawing.capsule(f"{name}_leg_toes", foot, toes, (thin, thin), drawn)
    drawing.keypoint(f"{name}_foot", foot, drawn)
    if name.startswith("near"):
        drawing.keypoint(f"{name}_knee", knee, drawn)
    if name == "near_back":
        drawing.keypoint("hip", top)


def _tail(drawing: _Drawing, table: Mapping[str, tuple[Value, ...]], pose: Mapping[str, Value], hip: Point) -> None:
    first = table["tail_angles"][0] + pose["tail_first"]
    second = table["tail_angles"][1] + pose["tail_first"] + pose["tail_second"]
    thick, middle, thin = table["tail_radii"]
    base = hip + _toward(table["body_tilt"][0] + 160, table["body_radii"][1] - 0.7 * thick)
    bend = base + _toward(first, table["tail_lengths"][0])
    tip = bend + _toward(second, table["tail_lengths"][1])
    spade = table["tail_spade"][0]
    drawing.capsule("tail_first", base, bend, (thick, middle))
    drawing.capsule("tail_second", bend, tip, (middle, thin))
    wide = [tip + _toward(second + turn, 0.75 * spade) for turn in (115, -115)]
    drawing.triangle("tail_spade", [*wide, tip + _toward(second, spade)], 0.3, spade > 0)
    # A third of the way along, where no leg hides it.
    drawing.keypoint("tail_base", _between(base, bend, 0.33))
    drawing.keypoint("tail_mid", bend)
    drawing.keypoint("tail_tip", tip)


def _wing(drawing: _Drawing, table: Mapping[str, tuple[Value, ...]], pose: Mapping[str, Value], chest: Point) -> None:
    (length,), (skin,) = table["wing_length"], table["membrane"]
    has, skinned = length > 0, skin > 0
    for name, shift, turn in (("near_wing", 0.0, 0.0), ("far_wing", 3.0, -16.0)):
        angle = table["wing_angle"][0] + pose["wing"] + turn
        root = chest + _toward(torch.full_like(angle, 0.0), shift) + _toward(table["body_tilt"][0] + 120, 2.0)
        shown = has & (skinned | torch.full_like(has, name == "near_wing"))
        blade_tip = root + _toward(angle, length)
        radii = (torch.full_like(length, 4.2), torch.full_like(length, 0.9))
        drawing.capsule(f"{name}_blade", root, blade_tip, radii, shown & ~skinned)
        wrist = root + _toward(angle, 0.72 * length)
        tip = wrist + _toward(angle + 62, 0.85 * length)
        trailing = root + _toward(angle + 68, 0.72 * length)
        drawing.triangle(f"{name}_skin_0", [root, wrist, tip], 0.5, shown & skinned)
        drawing.triangle(f"{name}_skin_1", [root, _between(wrist, tip, 0.45), trailing], 0.5, shown & skinned)
        if name == "near_wing":
            inner = _between(tip, wrist, 0.12)
            drawing.keypoint("wing_tip", torch.where(repeat(skinned, "scene -> scene 1"), inner, blade_tip), has)


def skeleton(species: Sequence[str], poses: Float[Tensor, "scene angle"]) -> Skeleton:
    """Place every shape and keypoint of some creatures.

    Args:
        species: the name of each creature's species.
        poses: the angles in ``POSE``, in degrees, as changes from the species' pose at rest.

    Returns:
        The creatures, facing right, float64.
    """
    table = _columns(species)
    pose = dict(zip(POSE, rearrange(poses.double(), "scene angle -> angle scene"), strict=True))
    drawing = _Drawing({}, {}, torch.ones(len(species), dtype=torch.bool))
    chest, hip = _torso(drawing, table)
    _head(drawing, table, pose, chest)
    _back_spikes(drawing, table, chest, hip)
    _tail(drawing, table, pose, hip)
    _wing(drawing, table, pose, chest)
    back = _between(hip, chest, table["back_leg_place"][0])
    for side, shift in (("near", -0.8), ("far", 1.6)):
        step = torch.tensor([1.2, shift], dtype=torch.float64)
        _leg(drawing, table, pose, f"{side}_back", back + step)
        _leg(drawing, table, pose, f"{side}_front", chest + step)
    shapes = [drawing.shapes[shape.name] for shape in SHAPES]
    keypoints = [drawing.keypoints[name] for name in KEYPOINTS]
    size = rearrange(table["size"][0], "scene -> scene 1 1")
    return Skeleton(
        corners=torch.stack([corners for corners, _, _ in shapes], dim=1) * rearrange(size, "scene 1 1 -> scene 1 1 1"),
        radii=torch.stack([radii for _, radii, _ in shapes], dim=1) * size,
        drawn=torch.stack([drawn for _, _, drawn in shapes], dim=1),
        keypoints=torch.stack([point for point, _ in keypoints], dim=1) * size,
        present=torch.stack([present for _, present in keypoints], dim=1),
    )
