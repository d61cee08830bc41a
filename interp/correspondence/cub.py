"""CUB-200-2011: bird images with part locations, paired within each class."""

from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from interp.correspondence.pairs import Pair
from interp.correspondence.points import Box
from interp.errors import InputError

# Where a part is: (y, x).
Parts = dict[str, tuple[float, float]]


def read_cub(
    folder: str | Path,
    *,
    split: str | None = "test",
    pairs_per_class: int | None = 20,
    min_points: int = 3,
    seed: int = 0,
) -> list[Pair]:
    """Pair the images of each class of CUB-200-2011 by the parts that both show; (x, y) on disk become (y, x).

    Args:
        folder: holds ``images.txt``, ``bounding_boxes.txt``, ``train_test_split.txt``, ``parts/parts.txt``,
            ``parts/part_locs.txt``, and the images in ``images/{class}/``.
        split: ``"train"``, ``"test"``, or None for all images.
        pairs_per_class: how many pairs to draw of each class without repeating one; None for all of them.
        min_points: the fewest parts that both images of a pair must show.
        seed: of the drawing, and of which image of a pair is the source.

    Returns:
        The pairs, class by class. A class with fewer pairs gives those it has.

    Raises:
        InputError: a missing file, a line of another form, a bad setting, or no pairs at all.

    Source: CUB-200-2011 (Wah et al. 2011), dataset layout. The pairs are this library's: the papers publish no list.
    """
    folder = Path(folder)
    if min_points < 1 or (pairs_per_class is not None and pairs_per_class < 1):
        raise InputError(f"min_points={min_points} and pairs_per_class={pairs_per_class}: expected at least 1.")
    names = dict(_lines(folder / "images.txt", 2))
    boxes = {index: _box(*sides) for index, *sides in _lines(folder / "bounding_boxes.txt", 5)}
    parts = _parts(folder)
    chosen = _chosen(folder, split, list(names))
    classes = defaultdict(list)
    for index in chosen:
        if index not in boxes:
            raise InputError(f"bounding_boxes.txt in {str(folder)!r} has no box for image {index}.")
        classes[names[index].split("/")[0]].append(index)
    pairs = []
    for position, (name, members) in enumerate(sorted(classes.items())):
        # One stream for each class: a class gives the same pairs whatever the others hold.
        generator = np.random.default_rng([seed, position])
        both = [(a, b) for a, b in combinations(members, 2) if len(parts[a].keys() & parts[b].keys()) >= min_points]
        for place in generator.permutation(len(both))[:pairs_per_class]:
            source, target = generator.permutation(both[place]).tolist()
            shared = [part for part in parts[source] if part in parts[target]]
            pair = Pair(
                names[source],
                names[target],
                name,
                torch.tensor([parts[source][part] for part in shared]),
                torch.tensor([parts[target][part] for part in shared]),
                boxes[source],
                boxes[target],
                tuple(shared),
                folder / "images" / names[source],
                folder / "images" / names[target],
            )
            pairs.append(pair)
    if not pairs:
        raise InputError(f"No two images of one class in {str(folder)!r} (split {split!r}) share {min_points} parts.")
    return pairs


def _parts(folder: Path) -> dict[str, Parts]:
    # The name of a part may hold a space.
    named = dict(_lines(folder / "parts" / "parts.txt", 2))
    found: dict[str, Parts] = defaultdict(dict)
    for image, part, x, y, visible in _lines(folder / "parts" / "part_locs.txt", 5):
        if part not in named:
            raise InputError(f"part_locs.txt in {str(folder)!r} names part {part}, which parts.txt does not.")
        if visible == "1":
            found[image][named[part]] = (_number(y, "part_locs.txt"), _number(x, "part_locs.txt"))
    return found


def _chosen(folder: Path, split: str | None, images: list[str]) -> list[str]:
    if split is None:
        return images
    if split not in ("train", "test"):
        raise InputError(f"split is {split!r}; expected 'train', 'test' or None.")
    wanted = "1" if split == "train" else "0"
    training = dict(_lines(folder / "train_test_split.txt", 2))
    return [index for index in images if training.get(index) == wanted]


def _box(*sides: str) -> Box:
    left, top, width, height = (_number(side, "bounding_boxes.txt") for side in sides)
    return top, left, top + height, left + width


def _number(word: str, file: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise InputError(f"{file} holds {word!r} where a number belongs.") from error


def _lines(path: Path, n_fields: int) -> list[list[str]]:
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}; is this a folder of CUB-200-2011?")
    rows = [line.split(maxsplit=n_fields - 1) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, start=1):
        if len(row) != n_fields:
            raise InputError(f"Line {number} of {str(path)!r} has {len(row)} fields; expected {n_fields}.")
    return rows
