"""The sprite sheet, and pictures drawn from it."""

import numpy as np
import pytest

from interp.errors import InputError, UnknownNameError
from interp.zoo import facts, images, sprites


def test_the_sheet_holds_a_distinct_visible_sprite_for_every_entity():
    seen = {}
    for entity in facts.entities():
        picture = sprites.sprite(entity.name)
        assert picture.mode == "RGBA" and picture.size == (sprites.SIZE, sprites.SIZE)
        pixels = np.asarray(picture)
        # The slimmest glyph (the flamingo) still covers more than a tenth of its square.
        assert (pixels[..., 3] > 128).mean() > 0.1, entity.name
        seen[pixels.tobytes()] = entity.name
    assert len(seen) == len(facts.entities())


def test_flags_can_be_told_apart_after_the_processor_has_halved_them():
    small = {
        entity.name: np.asarray(sprites.sprite(entity.name).convert("RGB").resize((32, 32)), dtype=float)
        for entity in facts.entities("country")
    }
    names = list(small)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            # Grey levels; Italy and Mexico, the closest kind, differ by the emblem in the middle.
            assert np.abs(small[first] - small[second]).mean() > 2.0, (first, second)


def test_pictures_depend_on_entity_seed_and_purpose_and_on_nothing_else():
    first = np.asarray(images.draw("France", seed=3))
    np.random.seed(1)
    assert np.array_equal(first, np.asarray(images.draw("France", seed=3)))
    assert first.shape == (96, 96, 3)
    for other in (
        images.draw("France", seed=4),
        images.draw("Italy", seed=3),
        images.draw("France", seed=3, purpose="training"),
    ):
        assert not np.array_equal(first, np.asarray(other))


def test_the_sheet_is_what_the_font_gives():
    if not sprites.FONT.is_file():
        pytest.skip("the font is not installed; the sheet that ships does not need it")
    drawn = np.asarray(sprites.render_glyph("🇫🇷"), dtype=int)
    shipped = np.asarray(sprites.sprite("France"), dtype=int)
    # Grey levels: FreeType and Pillow versions may round differently.
    assert np.abs(drawn - shipped).mean() < 2.0


def test_a_missing_font_and_an_unknown_entity_are_errors(tmp_path):
    with pytest.raises(InputError, match="fonts-noto-color-emoji"):
        sprites.render_glyph("🦁", font=tmp_path / "none.ttf")
    with pytest.raises(UnknownNameError, match="Did you mean 'France'"):
        images.draw("Frence")
