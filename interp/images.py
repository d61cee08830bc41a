"""Images for prompts: what counts as one, how it is read, and the official preparation."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from interp.errors import InputError

ImageLike = Image.Image | str | Path
OFFICIAL_WIDTH = 224


def load_image(image: ImageLike) -> Image.Image:
    """Read an image as upright RGB; transparent pixels are laid over white.

    Args:
        image: a PIL image, or the path of an image file.

    Returns:
        A new RGB image (or the given one, when it already is upright RGB).

    Raises:
        InputError: the file is missing or is no readable image; the message names its path.
    """
    if isinstance(image, Image.Image):
        return _upright_rgb(image)
    if not isinstance(image, str | Path):
        raise InputError(f"An image is a PIL image or a path, not {type(image).__name__}.")
    path = Path(image)
    if not path.is_file():
        what = "is a folder, not an image file" if path.is_dir() else "does not exist"
        raise InputError(f"Image {str(path)!r} {what}.")
    try:
        with Image.open(path) as opened:
            return _upright_rgb(opened)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"Image {str(path)!r} cannot be read: {error}") from error


def resize_official(image: Image.Image, width: int = OFFICIAL_WIDTH) -> Image.Image:
    """Resize an image the way the cross-modal task vector release does, before any processor sees it.

    Args:
        image: an image of any size.
        width: target width in pixels; the height keeps the aspect ratio, rounded down.

    Returns:
        A new image of ``width`` x ``int(width / w * h)``, PIL's default resampling.

    Raises:
        InputError: the image is so flat that no pixel row would be left.

    Source: Luo, Darrell & Bar 2025, official code (image preparation).
    """
    height = int(width / image.width * image.height)
    if height < 1:
        raise InputError(f"An image of {image.width} x {image.height} pixels has no row left at width {width}.")
    return image.resize((width, height))


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        # A lazily opened file must be decoded before it is closed.
        image.load()
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    if image.mode.startswith("I;16"):
        # PIL would clip 16-bit greys at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
