"""The sprite sheet: one emoji per entity, rendered once from Noto Color Emoji and shipped as a PNG.

The glyphs are licensed under the SIL Open Font License 1.1 (see ``data/SPRITES_LICENSE.md``).
``python -m interp.zoo.sprites`` draws the sheet again; nothing else needs the font.
"""

import functools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from interp.errors import InputError, UnknownNameError, nearest
from interp.zoo import facts

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SHEET = Path(__file__).parent / "data" / "sprites.png"
STRIKE = 109  # the only size at which the font holds bitmaps
SIZE = 64  # side of a sprite in the sheet, in pixels
COLUMNS = 16


def render_glyph(glyph: str, font: Path = FONT) -> Image.Image:
    """Draw one emoji, cropped to what is visible and centred in a square.

    Args:
        glyph: the emoji; flags are pairs of regional indicators.
        font: Noto Color Emoji with embedded bitmaps.

    Returns:
        An RGBA image of side ``SIZE``, transparent where the glyph is not.

    Raises:
        InputError: the font is missing, Pillow lacks raqm (flags are ligatures), or the glyph is blank.
    """
    if not font.is_file():
        raise InputError(f"{font} is missing; Debian's package fonts-noto-color-emoji holds it")
    if not features.check("raqm"):
        raise InputError("this Pillow has no raqm, so that flags cannot be drawn; use the wheel from PyPI")
    face = ImageFont.truetype(str(font), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    canvas = Image.new("RGBA", (4 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((STRIKE // 4, STRIKE // 4), glyph, font=face, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None or box[2] - box[0] > 1.5 * STRIKE:
        raise InputError(f"{font.name} has no single glyph for {glyph!r}")
    cropped = canvas.crop(box)
    side = max(cropped.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def render_sheet(path: Path = SHEET) -> Path:
    """Draw every entity's emoji into one sheet, in the order of ``facts.entities()``.

    Args:
        path: the PNG to write.

    Returns:
        The path written.

    Raises:
        InputError: as ``render_glyph``.
    """
    entities = facts.entities()
    rows = -(-len(entities) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIZE, rows * SIZE))
    for index, entity in enumerate(entities):
        sheet.paste(render_glyph(entity.glyph), (index % COLUMNS * SIZE, index // COLUMNS * SIZE))
    sheet.save(path, optimize=True)
    return path


@functools.cache
def _sheet() -> np.ndarray:
    with Image.open(SHEET) as image:
        return np.asarray(image.convert("RGBA"))


def sprite(name: str) -> Image.Image:
    """The emoji of one entity, cut from the sheet that ships.

    Args:
        name: an entity's name, for example ``"France"``.

    Returns:
        An RGBA image of side ``SIZE``.

    Raises:
        UnknownNameError: no entity of that name.
    """
    names = [entity.name for entity in facts.entities()]
    if name not in names:
        raise UnknownNameError(f"no entity {name!r} in the world. {nearest(name, names)}")
    row, column = divmod(names.index(name), COLUMNS)
    tile = _sheet()[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
    return Image.fromarray(np.ascontiguousarray(tile))


if __name__ == "__main__":
    print(render_sheet(), file=sys.stderr)
