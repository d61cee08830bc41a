"""Pairs of images with the same keypoints, and the authors' lists of them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Num
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from interp.correspondence.points import Box, Size, check_inside
from interp.errors import InputError, ShapeError, nearest
from interp.progress import track

# Pairs and keypoints of the lists published with Diffusion Hyperfeatures: 20 pairs of each of 18 categories.
COUNTS_360 = {"test": (360, 2529), "validation": (360, 2615)}


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images of one category, and where the same points are in both.

    Attributes:
        source: what one image is called in its list, or the key of an image held in memory.
        target: the same for the other.
        category: such as ``"dog"``.
        source_points: (y, x) in pixels of the original source image.
        target_points: (y, x) in the target, in the same order.
        source_box: (top, left, bottom, right) of the object.
        target_box: the same in the target.
        names: of the points; may be empty.
        source_file: the image file, when the list was read with a folder of images.
        target_file: the same for the target.

    Raises:
        ShapeError: unequal numbers of points, or names that do not fit them.
        InputError: no points, a coordinate that is not finite, or an empty box.
    """

    source: str | int
    target: str | int
    category: str
    source_points: Num[Tensor, "source_point 2"]
    target_points: Num[Tensor, "target_point 2"]
    source_box: Box
    target_box: Box
    names: tuple[str, ...] = ()
    source_file: Path | None = None
    target_file: Path | None = None

    def __post_init__(self) -> None:
        n_source, n_target = len(self.source_points), len(self.target_points)
        if n_source != n_target:
            raise ShapeError(f"{self} has {n_source} source points, but {n_target} target points.")
        if n_source == 0:
            raise InputError(f"{self} has no points.")
        if self.names and len(self.names) != n_source:
            raise ShapeError(f"{self} has {n_source} points, but {len(self.names)} names of points.")
        for side in ("source", "target"):
            if not torch.isfinite(getattr(self, f"{side}_points")).all():
                raise InputError(f"{self} has {side} points that are not finite.")
            top, left, bottom, right = getattr(self, f"{side}_box")
            if not (top < bottom and left < right):
                raise InputError(
                    f"{self} has the {side} box top {top}, left {left}, bottom {bottom}, right {right}, which is empty."
                )

    def __str__(self) -> str:
        return f"Pair {self.source!r} -> {self.target!r} ({self.category})"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same pair in another list: images, category and all coordinates."""
        points = (tuple(map(tuple, one.tolist())) for one in (self.source_points, self.target_points))
        return (self.source, self.target, self.category, *points, self.source_box, self.target_box)

    def check(self, source_size: Size, target_size: Size) -> None:
        """Raise InputError when a point lies outside its image of (height, width)."""
        check_inside(self.source_points, source_size, f"the source of {self}")
        check_inside(self.target_points, target_size, f"the target of {self}")


def read_pairs(
    path: str | Path,
    *,
    images: str | Path | None = None,
    n_pairs: int | None = None,
    n_points: int | None = None,
) -> list[Pair]:
    """Read a pair list as published with Diffusion Hyperfeatures: (x, y) on disk become (y, x).

    Args:
        path: a JSON list of objects with ``source_path``, ``target_path``, ``source_points``, ``target_points``
            (lists of [x, y]), ``category``, ``source_bounding_box`` and ``target_bounding_box`` ([left, top,
            right, bottom]), in pixels of the original images. Other keys are ignored.
        images: a folder that holds the images, by the path in the list or by the bare file name, in the folder
            itself or in one for each category. With it, files must exist and points must lie inside them.
        n_pairs: how many pairs the list must hold.
        n_points: how many keypoints; see `COUNTS_360` for the published lists.

    Returns:
        The pairs in the order of the list.

    Raises:
        InputError: no such file, not such a list, an empty list, other counts, a missing image, a point outside
            its image, or a pair without points; the message names the pair.
        ShapeError: unequal numbers of points.

    Source: Diffusion Hyperfeatures, official annotations (360-pair protocol).
    """
    listed = read_json(Path(path))
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{str(path)!r} holds no pairs: expected a JSON list of at least one object.")
    entries = track(listed, "pairs") if images is not None else listed
    pairs = [_pair(entry, f"{path}[{index}]", images) for index, entry in enumerate(entries)]
    found = summary(pairs)
    for what, expected in (("pairs", n_pairs), ("points", n_points)):
        if expected is not None and found[what] != expected:
            raise InputError(f"{str(path)!r} holds {found[what]} {what}; expected {expected}.")
    return pairs


def read_prompts(path: str | Path) -> list[str]:
    """Read a list of prompts for synthetic images, two of which make a pair.

    Args:
        path: a JSON list of strings.

    Returns:
        The prompts.

    Raises:
        InputError: no such file, or not such a list.

    Source: Diffusion Hyperfeatures, official annotations.
    """
    prompts = read_json(Path(path))
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise InputError(f"{str(path)!r} is no list of prompts: expected a JSON list of strings.")
    return prompts


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Count pairs and points.

    Args:
        pairs: any pairs.

    Returns:
        ``pairs``, ``points``, and ``categories``: the number of pairs of each.
    """
    return {
        "pairs": len(pairs),
        "points": sum(len(pair.source_points) for pair in pairs),
        "categories": dict(Counter(pair.category for pair in pairs)),
    }


def xy_points(points: Any, where: str) -> Num[Tensor, "point 2"]:
    """Turn a list of [x, y] from a file into points (y, x) in float32; InputError when it is none."""
    good = isinstance(points, list) and all(isinstance(one, list) and len(one) == 2 for one in points)
    if not good or not all(type(number) in (int, float) for one in points for number in one):
        raise InputError(f"{where} must be a list of [x, y]; it is {points!r}.")
    return torch.tensor(points, dtype=torch.float32).reshape(-1, 2).flip(-1)


def ltrb_box(box: Any, where: str) -> Box:
    """Turn [left, top, right, bottom] from a file into (top, left, bottom, right); InputError when it is none."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
        raise InputError(f"{where} must be [left, top, right, bottom]; it is {box!r}.")
    left, top, right, bottom = box
    return top, left, bottom, right


def require(entry: Any, keys: Sequence[str], where: str) -> list[Any]:
    """Take these keys from an object of a JSON file; InputError names a missing one and the nearest that is there."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be an object with {', '.join(keys)}; it is {entry!r}.")
    for key in keys:
        if key not in entry:
            raise InputError(f"{where} has no {key!r}. {nearest(key, entry)}".rstrip())
    return [entry[key] for key in keys]


def image_size(path: Path) -> Size:
    """Read (height, width) from the header of an image file; InputError when it cannot be read."""
    try:
        with Image.open(path) as opened:
            return opened.height, opened.width
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"Image {str(path)!r} cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file; InputError names a missing or broken one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"There is no file {str(path)!r}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} is no JSON file: {error}") from error


def _pair(entry: Any, where: str, images: str | Path | None) -> Pair:
    keys = ["path", "points", "bounding_box"]
    source, source_points, source_box = require(entry, [f"source_{key}" for key in keys], where)
    target, target_points, target_box = require(entry, [f"target_{key}" for key in keys], where)
    (category,) = require(entry, ["category"], where)
    files = [None if images is None else _find(Path(images), name, category) for name in (source, target)]
    try:
        pair = Pair(
            source,
            target,
            category,
            xy_points(source_points, f"source_points of {where}"),
            xy_points(target_points, f"target_points of {where}"),
            ltrb_box(source_box, f"source_bounding_box of {where}"),
            ltrb_box(target_box, f"target_bounding_box of {where}"),
            source_file=files[0],
            target_file=files[1],
        )
    except (InputError, ShapeError) as error:
        raise type(error)(f"{where}: {error}") from error
    if pair.source_file is not None and pair.target_file is not None:
        pair.check(image_size(pair.source_file), image_size(pair.target_file))
    return pair


def _find(folder: Path, name: str, category: str) -> Path:
    tried = [folder / name, folder / category / Path(name).name, folder / Path(name).name]
    for path in tried:
        if path.is_file():
            return path
    places = ", ".join(repr(str(path)) for path in dict.fromkeys(tried))
    raise InputError(f"Image {name!r} is not in {str(folder)!r}; looked for {places}.")
