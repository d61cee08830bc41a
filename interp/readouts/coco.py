"""People of MSCOCO with keypoints as heat maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Person:
    """One annotated person.

    Attributes:
        file: the picture.
        box: (left, top, right, bottom) in its pixels.
        points: COCO's 17, (y, x) in its pixels.
        visible: which are labelled.
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
        ids: annotations to take, or a JSON file that lists them; None: all. People without a labelled keypoint are left
            out either way.
        size: side in pixels that boxes are resized to.
        grid: side of the heat maps.

    Raises:
        InputError: an unreadable file, unknown ids, nobody with keypoints, or settings out of range. A picture that
            cannot be read is an error when it is asked for.

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
            people = {
                key: _person(entry, pictures[entry["image_id"]], Path(self.images)) for key, entry in entries.items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{str(self.annotations)!r} is no person-keypoints file of COCO: {error!r}") from error
        wanted = list(people) if self.ids is None else self._wanted(people)
        kept = [people[key] for key in wanted if bool(people[key].visible.any())]
        if not kept:
            raise InputError(f"nobody in {str(self.annotations)!r} has a labelled keypoint")
        object.__setattr__(self, "people", tuple(kept))

    def __len__(self) -> int:
        """How many people."""
        return len(self.people)

    def __call__(self, index: int, generator: np.random.Generator) -> Example:
        """A person in -1 .. 1, and the heat maps ``[18, grid, grid]``; nothing is random.

        Raises:
            InputError: a picture that cannot be read.
        """
        points, visible = self.keypoints(index)
        person = self.people[index]
        picture = load_image(person.file).resize((self.size, self.size), Image.Resampling.BILINEAR, box=person.box)
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

    def _wanted(self, people: Mapping[int, Person]) -> list[int]:
        listed: Any = read_json(self.ids) if isinstance(self.ids, str | Path) else self.ids
        unknown = [key for key in listed if key not in people]
        if unknown:
            raise InputError(f"{str(self.annotations)!r} has no annotation {unknown[0]!r}")
        return list(listed)


def _person(entry: Mapping[str, Any], picture: Mapping[str, Any], images: Path) -> Person:
    rows = torch.tensor(entry["keypoints"], dtype=torch.float32).reshape(len(COCO), 3)
    left, top, width, height = (float(number) for number in entry["bbox"])
    if min(width, height) <= 0:
        raise ValueError(f"annotation {entry['id']} has a box of {width}×{height} pixels")
    # Boxes of COCO reach beyond the picture by fractions of a pixel.
    right, bottom = (
        min(end, float(picture.get(side, end))) for end, side in ((left + width, "width"), (top + height, "height"))
    )
    box = (max(left, 0.0), max(top, 0.0), right, bottom)
    return Person(images / str(picture["file_name"]), box, rows[:, [1, 0]], rows[:, 2] > 0)
