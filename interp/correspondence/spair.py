"""SPair-71k in its own layout: the full protocol, beside the 360-pair lists."""

from pathlib import Path
from typing import Any

from interp.correspondence.pairs import Pair, ltrb_box, read_json, require, xy_points
from interp.correspondence.points import Size
from interp.errors import InputError, ShapeError, UnknownNameError
from interp.progress import track

# Pairs of the large layout.
COUNTS = {"trn": 53_340, "val": 5_384, "test": 12_234}


def read_spair(
    folder: str | Path,
    split: str = "test",
    *,
    layout: str = "large",
    category: str | None = None,
    n_pairs: int | None = None,
    images: bool = True,
) -> list[Pair]:
    """Read pairs from a folder of SPair-71k as published: (x, y) on disk become (y, x).

    Args:
        folder: holds ``Layout/{layout}/{split}.txt`` (a pair in each line), ``PairAnnotation/{split}/{pair}.json``
            and ``JPEGImages/{category}/{file}``.
        split: ``"trn"``, ``"val"`` or ``"test"``.
        layout: ``"large"`` (all pairs) or ``"small"``.
        category: only pairs of this category.
        n_pairs: how many pairs the split must hold, all categories together; `COUNTS` has those of the large layout.
        images: whether the image files must be there. Points are checked against the sizes in the annotations.

    Returns:
        The pairs in the order of the layout; points are named by their identifiers.

    Raises:
        InputError: a missing file, an annotation of another form, an empty list, other counts, or a point outside
            its image.
        UnknownNameError: no such split, or no pair of the category.

    Source: SPair-71k (Min et al. 2019), dataset layout.
    """
    folder = Path(folder)
    if split not in COUNTS:
        raise UnknownNameError(f"SPair-71k has no split {split!r}; expected one of {', '.join(map(repr, COUNTS))}.")
    lines = [line.strip() for line in _text(folder / "Layout" / layout / f"{split}.txt").splitlines() if line.strip()]
    if not lines:
        raise InputError(f"Layout {layout!r} of {str(folder)!r} lists no pairs of {split!r}.")
    if n_pairs is not None and len(lines) != n_pairs:
        raise InputError(f"Layout {layout!r} of {str(folder)!r} lists {len(lines)} pairs; expected {n_pairs}.")
    if category is not None:
        known = sorted({line.rpartition(":")[2] for line in lines})
        if category not in known:
            raise UnknownNameError(f"No pair of {split!r} has the category {category!r}; there are {known}.")
        lines = [line for line in lines if line.rpartition(":")[2] == category]
    return [_pair(folder, split, line, images) for line in track(lines, f"SPair-71k {split}")]


def _pair(folder: Path, split: str, line: str, images: bool) -> Pair:
    path = folder / "PairAnnotation" / split / f"{line}.json"
    keys = ["imname", "kps", "bndbox", "imsize"]
    entry = read_json(path)
    source, source_points, source_box, source_size = require(entry, [f"src_{key}" for key in keys], str(path))
    target, target_points, target_box, target_size = require(entry, [f"trg_{key}" for key in keys], str(path))
    category, names = require(entry, ["category", "kps_ids"], str(path))
    files = [folder / "JPEGImages" / category / name for name in (source, target)]
    for file in files if images else ():
        if not file.is_file():
            raise InputError(f"Image {str(file)!r} of {str(path)!r} is not there.")
    try:
        pair = Pair(
            f"{category}/{source}",
            f"{category}/{target}",
            category,
            xy_points(source_points, "src_kps"),
            xy_points(target_points, "trg_kps"),
            ltrb_box(source_box, "src_bndbox"),
            ltrb_box(target_box, "trg_bndbox"),
            tuple(map(str, names)),
            *(files if images else (None, None)),
        )
        pair.check(_size(source_size, "src_imsize"), _size(target_size, "trg_imsize"))
    except (InputError, ShapeError) as error:
        raise type(error)(f"{str(path)!r}: {error}") from error
    return pair


def _size(size: Any, where: str) -> Size:
    if not isinstance(size, list) or len(size) not in (2, 3) or not all(type(side) is int for side in size):
        raise InputError(f"{where} must be [width, height, channels]; it is {size!r}.")
    return size[1], size[0]


def _text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}; is this a folder of SPair-71k?")
    return path.read_text(encoding="utf-8")
