"""People of MSCOCO with keypoints as heat maps."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from interp.errors import InputError
from interp.images import load_image
from interp.readouts.data import read_json, to_tensor
from interp.readouts.examples import Example
from interp.readouts.keypoints import COCO, heatmaps, openpose_points

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Person:
    """One annotated person.

    Attributes:
        file: the picture.
        box: (left, top, right, bottom) in its pixels, as much of it as lies in the picture.
        points: COCO's 17, (y, x) in its pixels.
        visible: which are labelled, in the picture.
    """

    file: Path
    box: tuple[float, float, float, float]
    points: Tensor
    visible: Tensor


@dataclass(frozen=True)
class CocoKeypoints:
    """Person boxes of COCO, resized to squares, with OpenPose's 18 keypoints as Gaussian heat maps.

    Args:
        annotations: the standard person-keypoints JSON.
        images: folder of the pictures.
        ids: annotations to take, or a JSON file that lists them; None: all. Left out either way are crowds, people
            without a keypoint that is labelled inside their picture, and, with one warning for all, boxes without an
            area inside it. Pictures without annotations have nobody.
        size: side in pixels that boxes are resized to.
        grid: side of the heat maps.

    Raises:
        InputError: an unreadable file, unknown ids, an annotation of a picture that the file does not list, nobody
            that is left, or settings out of range. A picture that cannot be read, or that is smaller than the file
            says, is an error when it is asked for.

    Source: Readout Guidance, official code (keypoint heads); section 5 of its formats.
    """

    annotations: str | Path
    images: str | Path
    ids: Sequence[int] | str | Path | None = None
    size: int = 512
    grid: int = 64
    people: tuple[Person, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.size, self.grid) < 1:
            raise InputError(f"size={self.size} and grid={self.grid} must be positive")
        content = read_json(self.annotations)
        try:
            pictures = {entry["id"]: entry for entry in content["images"]}
            entries = {int(entry["id"]): entry for entry in content["annotations"]}
            listed = list(entries) if self.ids is None else self._wanted(entries)
            people = {key: _person(entries[key], pictures, Path(self.images)) for key in dict.fromkeys(listed)}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{str(self.annotations)!r} is no person-keypoints file of COCO: {error!r}") from error
        flat = [key for key, person in people.items() if person is not None and not _has_area(person)]
        if flat:
            _log.warning(
                "%s: %d of %d people are left out, whose boxes have no area inside their pictures, such as "
                "annotation %d.", self.annotations, len(flat), len(people), flat[0],
            )  # fmt: skip
        usable = {key for key, person in people.items() if person is not None and bool(person.visible.any())}
        kept = [people[key] for key in listed if key in usable - set(flat)]
        if not kept:
            raise InputError(f"nobody in {str(self.annotations)!r} has a labelled keypoint and a box with an area")
        object.__setattr__(self, "people", tuple(kept))

    def __len__(self) -> int:
        """How many people."""
        return len(self.people)

    def __call__(self, index: int, generator: np.random.Generator) -> Example:
        """A person in -1 .. 1, and the heat maps ``[18, grid, grid]``; nothing is random.

        Raises:
            InputError: a picture that cannot be read, or that is smaller than its box.
        """
        points, visible = self.keypoints(index)
        person = self.people[index]
        picture = load_image(person.file)
        if person.box[2] > picture.width or person.box[3] > picture.height:
            raise InputError(
                f"{str(person.file)!r} is {picture.width}×{picture.height} pixels, and {str(self.annotations)!r} has a "
                f"box in it up to {person.box[2]:g}×{person.box[3]:g}"
            )
        picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=person.box)
        maps = heatmaps(points * (self.grid / self.size), visible, (self.grid, self.grid))
        return Example((2 * to_tensor(picture) - 1)[None], maps)

    def keypoints(self, index: int) -> tuple[Tensor, Tensor]:
        """OpenPose's 18 points of a person, (y, x) in pixels of the resized box, and which are labelled."""
        person = self.people[index]
        left, top, right, bottom = person.box
        corner = torch.tensor([top, left])
        scale = torch.tensor([self.size / (bottom - top), self.size / (right - left)])
        points, visible = openpose_points(((person.points - corner) * scale)[None], person.visible[None])
        return points[0], visible[0]

    def _wanted(self, entries: Mapping[int, Any]) -> list[int]:
        listed: Any = read_json(self.ids) if isinstance(self.ids, str | Path) else self.ids
        if not isinstance(listed, Sequence) or not all(isinstance(key, Integral) for key in listed):
            raise InputError(f"ids are a list of whole numbers, not {str(listed)[:60]}")
        unknown = [key for key in listed if key not in entries]
        if unknown:
            raise InputError(f"{str(self.annotations)!r} has no annotation {unknown[0]!r}")
        return list(listed)


def _person(entry: Mapping[str, Any], pictures: Mapping[Any, Mapping[str, Any]], images: Path) -> Person | None:
    """A person of the file; None for a crowd, whose keypoints are nobody's."""
    if entry.get("iscrowd", 0):
        return None
    if entry["image_id"] not in pictures:
        raise InputError(f"annotation {entry['id']} is of picture {entry['image_id']}, which the file does not list")
    picture = pictures[entry["image_id"]]
    rows = torch.tensor(entry["keypoints"], dtype=torch.float32).reshape(len(COCO), 3)
    left, top, width, height = (float(number) for number in entry["bbox"])
    # Boxes of COCO reach beyond the picture by fractions of a pixel.
    right, bottom = (
        min(end, float(picture.get(side, end))) for end, side in ((left + width, "width"), (top + height, "height"))
    )
    box = (max(left, 0.0), max(top, 0.0), right, bottom)
    points = rows[:, [1, 0]]
    sides = torch.tensor([float(picture.get(side, torch.inf)) for side in ("height", "width")])
    inside = ((points >= 0) & (points < sides)).all(dim=1)
    return Person(images / str(picture["file_name"]), box, points, (rows[:, 2] > 0) & inside)


def _has_area(person: Person) -> bool:
    left, top, right, bottom = person.box
    # Not so for NaN either.
    return right > left and bottom > top
