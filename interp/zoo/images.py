"""Pictures of entities: a sprite at a varied place and size on a varied background."""

import hashlib

import numpy as np
from PIL import Image

from interp.zoo.sprites import sprite

SIDE = 96  # pixels of a picture; the processor halves it
SCALE = (0.62, 0.95)  # side of the sprite relative to the picture's
NOISE = 6.0  # standard deviation of the pixel noise, in grey levels


def generator(name: str, seed: int, purpose: str) -> np.random.Generator:
    """A generator that depends on the entity, the seed and the purpose, and on nothing else."""
    digest = hashlib.sha256(f"{purpose}/{name}/{seed}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def draw(name: str, seed: int = 0, purpose: str = "evaluation") -> Image.Image:
    """Draw an entity.

    Place, size, the two colours of the background's gradient and the noise are drawn at random.

    Args:
        name: an entity's name.
        seed: which of the entity's pictures.
        purpose: pictures of different purposes (``"training"``, ``"evaluation"``) never share their draws.

    Returns:
        An RGB picture of 96 x 96 pixels, the same for the same arguments.

    Raises:
        UnknownNameError: no entity of that name.
    """
    rng = generator(name, seed, purpose)
    size = int(SIDE * rng.uniform(*SCALE))
    left, top = rng.integers(0, SIDE - size + 1, size=2)
    # Backgrounds away from mid-grey extremes leave both dark and light glyphs visible.
    corners = rng.uniform(70, 235, size=(2, 3))
    ramp = np.linspace(0, 1, SIDE)[:, None, None]
    background = corners[0] * (1 - ramp) + corners[1] * ramp
    if rng.random() < 0.5:
        background = background.transpose(1, 0, 2)
    background = np.broadcast_to(background, (SIDE, SIDE, 3)) + rng.normal(0, NOISE, size=(SIDE, SIDE, 3))
    picture = Image.fromarray(np.clip(background, 0, 255).astype(np.uint8))
    glyph = sprite(name).resize((size, size), Image.Resampling.BILINEAR)
    picture.paste(glyph, (int(left), int(top)), glyph)
    return picture
