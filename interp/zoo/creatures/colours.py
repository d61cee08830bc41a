"""The colours of creatures and of what is behind them."""

import math

COLOURS = {
    "red": (0.85, 0.16, 0.17),
    "orange": (0.97, 0.53, 0.08),
    "yellow": (0.99, 0.84, 0.15),
    "green": (0.16, 0.60, 0.25),
    "blue": (0.15, 0.37, 0.86),
    "purple": (0.53, 0.22, 0.73),
    "brown": (0.47, 0.28, 0.15),
    "white": (0.97, 0.97, 0.95),
}

BACKGROUNDS = {
    "grey": (0.66, 0.68, 0.71),
    "pink": (0.99, 0.72, 0.80),
    "beige": (0.90, 0.81, 0.65),
    "cyan": (0.55, 0.87, 0.92),
    "lime": (0.73, 0.91, 0.50),
    "lavender": (0.77, 0.71, 0.95),
}

# Below this distance in rgb a part is hard to tell from what is behind it.
MIN_CONTRAST = 0.38


def contrasting(background: str) -> tuple[str, ...]:
    """The colours that show well on a background.

    Args:
        background: a name in ``BACKGROUNDS``.

    Returns:
        Names in ``COLOURS``, in their order there.
    """
    behind = BACKGROUNDS[background]
    return tuple(name for name, rgb in COLOURS.items() if math.dist(rgb, behind) >= MIN_CONTRAST)
