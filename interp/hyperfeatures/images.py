"""From image files to what the autoencoder takes, along the authors' path of sizes."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.images import ImageLike
from interp.latents import pixels


def prepare(
    images: ImageLike | Sequence[ImageLike] | Float[Tensor, "image 3 height width"],
    load_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Float[Tensor, "image 3 out_height out_width"]:
    """Resize images and scale them to -1 .. 1.

    Args:
        images: PIL images or files, or a tensor in -1 .. 1.
        load_size: (height, width) of the first resize, by Pillow's bilinear filter (for tensors by torch's bilinear one
            with anti-aliasing, which is the same filter); None: no first resize.
        image_size: (height, width) of the second resize, bilinear without anti-aliasing; None: no second one.

    Returns:
        Float32 pixels in -1 .. 1.

    Raises:
        InputError: no image, an unreadable one, or a tensor outside -1 .. 1.
        ShapeError: images of different sizes without a size to bring them to, or a tensor of another shape.

    Source: Diffusion Hyperfeatures, official code (``load_size``, then the extractor's own resize).
    """
    if isinstance(images, Tensor):
        found = pixels(images)
        if load_size is not None and found.shape[-2:] != load_size:
            found = F.interpolate(found, size=load_size, mode="bilinear", align_corners=False, antialias=True)
    else:
        listed = [images] if isinstance(images, Image.Image | str | Path) else list(images)
        if not listed:
            raise InputError("no images given")
        found = _stack([pixels(image, size=load_size) for image in listed], image_size)
    if image_size is not None and found.shape[-2:] != image_size:
        found = F.interpolate(found, size=image_size, mode="bilinear", align_corners=False)
    return found


def _stack(found: list[Tensor], size: tuple[int, int] | None) -> Float[Tensor, "image 3 height width"]:
    shapes = [tuple(image.shape[-2:]) for image in found]
    if len(set(shapes)) == 1:
        return torch.cat(found)
    if size is None:
        other = next(shape for shape in shapes if shape != shapes[0])
        raise ShapeError(
            f"images of different sizes, {shapes[0]} and {other}, cannot be one batch: give load_size or image_size, "
            "or take them one by one"
        )
    return torch.cat([F.interpolate(image, size=size, mode="bilinear", align_corners=False) for image in found])
