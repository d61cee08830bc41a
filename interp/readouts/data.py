"""Folders of pictures with pictures of a property, and the authors' lists of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from interp.errors import InputError
from interp.images import load_image
from interp.readouts.examples import Example

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImagePairs:
    """Pictures, each with a picture of a property: a drawn pose, edges, depth.

    Both are cropped to the same square, as long as the picture's shorter side, at a random offset. The picture is then
    resized bilinearly; the target stays as it is, and losses resize it by the nearest pixel.

    Args:
        images: a folder, or the pictures' files.
        targets: a folder in which every picture has a target of the same relative path, of any image suffix; or the
            targets' files, in the pictures' order.
        size: side in pixels that pictures are resized to.
        value_range: what black and white of the targets mean.
        channels: 3 (RGB) or 1 (grey) of the targets.
        crop: ``"random"``, or ``"center"``.

    Raises:
        InputError: no picture, a picture without target, or settings out of range. A file that cannot be read, or a
            target of another size than its picture, is an error when it is asked for.

    Source: Readout Guidance, section 3.2 and official code.
    """

    images: str | Path | Sequence[str | Path]
    targets: str | Path | Sequence[str | Path]
    size: int = 512
    value_range: tuple[float, float] = (-1.0, 1.0)
    channels: int = 3
    crop: str = "random"
    files: tuple[tuple[Path, Path], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3) or self.crop not in ("random", "center"):
            raise InputError(
                f"size={self.size}, channels={self.channels}, crop={self.crop!r}: expected a positive size, 1 or 3 "
                "channels, and 'random' or 'center'"
            )
        if not self.value_range[0] < self.value_range[1]:
            raise InputError(f"value_range must be (least, greatest), not {self.value_range}")
        if isinstance(self.images, str | Path):
            pictures = image_files(Path(self.images))
        else:
            pictures = [Path(file) for file in self.images]
        if not isinstance(self.targets, str | Path):
            listed = [Path(file) for file in self.targets]
            if len(listed) != len(pictures):
                raise InputError(f"{len(pictures)} pictures with {len(listed)} targets")
        else:
            if not isinstance(self.images, str | Path):
                raise InputError("targets in a folder are found for images in a folder: give both alike")
            listed = [_target(file, Path(self.images), Path(self.targets)) for file in pictures]
        if not pictures:
            raise InputError("there are no pictures")
        object.__setattr__(self, "files", tuple(zip(pictures, listed, strict=True)))

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.files)

    def __call__(self, index: int, generator: np.random.Generator) -> Example:
        """A picture in -1 .. 1 and its target ``[channels, side, side]`` in ``value_range``.

        Raises:
            InputError: a file that cannot be read, or sizes that differ; the message names it.
        """
        file, target_file = self.files[index]
        picture, target = load_image(file), load_image(target_file)
        if picture.size != target.size:
            raise InputError(f"{str(target_file)!r} is {_size(target)} pixels, but {str(file)!r} is {_size(picture)}")
        window = square(picture.size, None if self.crop == "center" else generator)
        picture = picture.crop(window).resize((self.size, self.size), Image.Resampling.BILINEAR)
        values = to_tensor(target.crop(window) if self.channels == 3 else target.crop(window).convert("L"))
        low, high = self.value_range
        return Example((2 * to_tensor(picture) - 1)[None], low + (high - low) * values)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and the folders in it, by path.

    Raises:
        InputError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}")
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"no image in {str(folder)!r}: looked for {', '.join(SUFFIXES)}")
    return found


def listed_pairs(file: str | Path, images: str | Path, targets: str | Path) -> tuple[list[Path], list[Path]]:
    """Files of an authors' list ``[{"source": ..., "dataset_name": ...}]``, for `ImagePairs`.

    Args:
        file: the JSON list.
        images: folder under which ``source`` is, in the folder ``dataset_name`` where there is such a one.
        targets: folder with a target at the same relative path, of any image suffix.

    Returns:
        The pictures' files and the targets' files.

    Raises:
        InputError: an unreadable list, an entry without ``source``, or a file that is missing.

    Source: Readout Guidance, official data lists.
    """
    found: tuple[list[Path], list[Path]] = ([], [])
    for entry in read_list(file, ("source",)):
        root = under(Path(images), entry)
        picture = root / str(entry["source"])
        if not picture.is_file():
            raise InputError(f"{str(file)!r} names {str(picture)!r}, which does not exist")
        found[0].append(picture)
        found[1].append(_target(picture, root, under(Path(targets), entry)))
    return found


def read_json(file: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: no such file, or no JSON in it.
    """
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}") from error
    except ValueError as error:
        raise InputError(f"{str(file)!r} is no JSON: {error}") from error


def read_list(file: str | Path, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """A JSON list of entries that all have some keys.

    Raises:
        InputError: another content; the message says which entry lacks what.
    """
    content = read_json(file)
    if not isinstance(content, list) or not content:
        raise InputError(f"{str(file)!r} is no JSON list with entries")
    for index, entry in enumerate(content):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise InputError(f"entry {index} of {str(file)!r} lacks {missing[0]!r}: {entry}")
    return content


def under(root: Path, entry: Mapping[str, Any]) -> Path:
    """The folder of an entry's data set, which lists of several sets name."""
    named = root / str(entry.get("dataset_name", ""))
    return named if named.is_dir() else root


def square(size: tuple[int, int], generator: np.random.Generator | None) -> tuple[int, int, int, int]:
    """The window (left, top, right, bottom) of a square as long as a picture's shorter side.

    Args:
        size: (width, height) of the picture, as Pillow has it.
        generator: draws the offset; None: in the middle.
    """
    side = min(size)
    room = [length - side for length in size]
    left, top = (slack // 2 if generator is None else int(generator.integers(slack + 1)) for slack in room)
    return left, top, left + side, top + side


def to_tensor(picture: Image.Image) -> Float[Tensor, "channel height width"]:
    """A picture, 0 to 1."""
    values = torch.from_numpy(np.array(picture, dtype=np.float32)) / 255
    return rearrange(values if values.ndim == 3 else values[..., None], "height width channel -> channel height width")


def _target(file: Path, root: Path, targets: Path) -> Path:
    place = (targets / file.relative_to(root)).with_suffix("")
    for suffix in (file.suffix, *SUFFIXES):
        candidate = place.with_name(place.name + suffix)
        if candidate.is_file():
            return candidate
    raise InputError(f"{str(file)!r} has no target {str(place)!r} of any image suffix")


def _size(picture: Image.Image) -> str:
    return f"{picture.width}×{picture.height}"
