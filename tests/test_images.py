from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from interp.errors import InputError
from interp.images import load_image, resize_official


def pixels(image: Image.Image) -> list:
    return np.asarray(image).tolist()


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    half = Image.new("LA", (1, 1), (0, 128))
    assert pixels(load_image(clear)) == [[[255, 255, 255]]]
    assert pixels(load_image(half)) == [[[127, 127, 127]]]


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    assert pixels(load_image(tmp_path / "palette.png")) == [[[255, 255, 255], [0, 0, 255]]]


def test_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert pixels(load_image(str(tmp_path / "turned.png"))) == [[[0, 0, 0]], [[255, 255, 255]]]


def test_other_modes_become_rgb() -> None:
    assert pixels(load_image(Image.new("L", (1, 1), 7))) == [[[7, 7, 7]]]
    assert pixels(load_image(Image.fromarray(np.array([[0x1234]], dtype=np.uint16)))) == [[[0x12] * 3]]


def test_rgb_is_kept(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    image.save(tmp_path / "rgb.png")
    assert pixels(load_image(tmp_path / "rgb.png")) == pixels(image)
    assert pixels(load_image(image)) == pixels(image)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:1000])
    for name, message in (
        ("no.png", "no.png' does not exist"),
        ("text.png", "text.png' cannot be read"),
        ("half.png", "half.png' cannot be read"),
        ("", "is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            load_image(tmp_path / name)


@pytest.mark.parametrize(
    ("size", "expected"), [((448, 300), (224, 150)), ((300, 200), (224, 149)), ((10, 5), (224, 112))]
)
def test_official_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 50).convert("RGB")
    resized = resize_official(image)
    assert resized.size == expected
    assert pixels(resized) == pixels(image.resize(expected, Image.Resampling.BICUBIC))
    assert image.size == size


def test_an_image_too_flat_to_resize() -> None:
    with pytest.raises(InputError, match="no row left"):
        resize_official(Image.new("RGB", (1000, 2)))
