"""Stacks of feature maps on disk, one file per image, so that a training computes them once."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import InputError
from interp.hyperfeatures.features import stack
from interp.hyperfeatures.spec import FeatureSpec
from interp.models.diffusion import Diffusion
from interp.progress import track

DESCRIPTION = "features.json"


@dataclass(frozen=True)
class CachedStacks:
    """The stacks of a folder, read one at a time.

    Args:
        folder: made by `cache`.
        n_images: how many stacks there are.
    """

    folder: Path
    n_images: int

    def __len__(self) -> int:
        """How many stacks there are."""
        return self.n_images

    def __getitem__(self, index: int) -> Float[Tensor, "step channels height width"]:
        """The stack of one image.

        Raises:
            IndexError: there is no such image.
            InputError: its file is missing or damaged.
        """
        if not 0 <= index < self.n_images:
            raise IndexError(f"image {index} is out of range: {self.n_images} are cached, from 0 on")
        file = _file(self.folder, index)
        try:
            return load_file(file)["features"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"the stack {str(file)!r} cannot be read: {error}") from error


def cache(
    sd: Diffusion,
    images: Any,
    spec: FeatureSpec,
    folder: str | Path,
    *,
    batch: int = 8,
    dtype: torch.dtype = torch.float16,
) -> CachedStacks:
    """Compute the stacks of images into a folder; what is there already is kept.

    Args:
        sd: the model.
        images: a sequence of PIL images or files, or a tensor in -1 .. 1; for generation, prompts or noise, as for
            `stream`.
        spec: which maps.
        folder: made when missing.
        batch: images in one run of the model. Samples and noises are drawn by batch, so it belongs to the result.
        dtype: of the files.

    Returns:
        The stacks, in the order of the images.

    Raises:
        InputError: the folder holds stacks of other images, or of another spec, model, batch or dtype; also as `stack`.

    Source: Diffusion Hyperfeatures, official code (features in half precision).
    """
    home = Path(folder)
    asked = {"model": sd.name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "features": spec.to_json()}
    _claim(home, asked | {"images": [_told(image) for image in images]})
    for start in track(range(0, len(images), batch), "caching features"):
        chunk = range(start, min(start + batch, len(images)))
        if all(_file(home, index).is_file() for index in chunk):
            continue
        stacks = stack(sd, images[start : start + batch], spec, dtype=dtype, progress=False)
        for index, features in zip(chunk, stacks, strict=True):
            partial = home / f".partial-{index}"
            save_file({"features": features.cpu().contiguous()}, partial)
            os.replace(partial, _file(home, index))
    return CachedStacks(home, len(images))


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"


def _told(image: Any) -> str:
    """What tells an image, prompt or noise from others: its pixels, its text, or the bytes of its file."""
    if isinstance(image, Image.Image):
        content = image.mode.encode() + repr(image.size).encode() + image.tobytes()
    elif isinstance(image, Tensor):
        content = repr(tuple(image.shape)).encode() + image.detach().float().cpu().contiguous().numpy().tobytes()
    elif Path(image).is_file():
        content = Path(image).read_bytes()
    else:
        content = str(image).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _claim(folder: Path, asked: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / DESCRIPTION
    if not description.is_file():
        description.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        return
    try:
        held = json.loads(description.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(description)!r} is damaged: {error}") from error
    flat_held, flat_asked = (one | one["features"] for one in (held, asked))
    for name, value in flat_asked.items():
        if name not in ("features", "images") and flat_held.get(name) != value:
            raise InputError(
                f"{str(folder)!r} holds stacks with {name} {flat_held.get(name)!r}, not {value!r}: take another folder"
            )
    known, given = held.get("images", []), asked["images"]
    for index, (before, now) in enumerate(zip(known, given, strict=False)):
        if before != now:
            raise InputError(
                f"{str(folder)!r} holds stacks of other images, from image {index} on: take another folder"
            )
    if len(given) > len(known):
        description.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
