"""Strips of images, such as the examples of a prompt with the model's answers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from interp.errors import InputError, ShapeError
from interp.figures.drawing import COLOURS, axes_or_new


def image_strip(
    images: Sequence[Image.Image | np.ndarray | str | Path],
    titles: Sequence[str] | None = None,
    *,
    correct: Sequence[bool] | None = None,
    columns: int = 8,
    ax: Axes | None = None,
) -> Axes:
    """Draw images in a row, or several rows, each with words below, such as a model's answer.

    Args:
        images: pictures, arrays [height, width, 3] (bytes, or fractions of 1), or files.
        titles: the words below each image.
        correct: whether each answer is right: blue and a tick, or vermilion and a cross.
        columns: how many images a row holds.
        ax: where to draw; a new figure without it.

    Returns:
        The axes.

    Raises:
        ShapeError: there are no images, or not as many titles.
        InputError: a file cannot be read as an image.
    """
    if not images:
        raise ShapeError("There are no images to draw.")
    titles = [""] * len(images) if titles is None else titles
    for name, given in {"titles": titles, "marks of what is correct": correct}.items():
        if given is not None and len(given) != len(images):
            raise ShapeError(f"There are {len(images)} images, but {len(given)} {name}.")
    columns = min(columns, len(images))
    n_rows = -(-len(images) // columns)
    row_height = 1.3 if any(titles) else 1.08
    width = 0.82 * columns
    with axes_or_new(ax, (width, width / columns * row_height * n_rows)) as ax:
        for index, (image, title) in enumerate(zip(images, titles, strict=True)):
            row, column = divmod(index, columns)
            top = row * row_height
            ax.imshow(_pixels(image), extent=(column + 0.04, column + 0.96, top + 0.96, top + 0.04))
            colour, sign = "black", ""
            if correct is not None:
                colour, sign = (COLOURS[0], "✓ ") if correct[index] else (COLOURS[1], "✗ ")
            ax.text(column + 0.5, top + 1.0, f"{sign}{title}", ha="center", va="top", fontsize=7, color=colour)
        ax.set(xlim=(0, columns), ylim=(n_rows * row_height, 0), aspect="equal")
        ax.axis("off")
    return ax


def _pixels(image: Image.Image | np.ndarray | str | Path) -> np.ndarray:
    if isinstance(image, str | Path):
        try:
            with Image.open(image) as opened:
                return np.asarray(opened.convert("RGB"))
        except OSError as error:
            raise InputError(f"{str(image)!r} cannot be read as an image: {error}.") from error
    return np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
