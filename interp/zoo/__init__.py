"""The small models that ship, and the worlds they were trained on."""

import json
from pathlib import Path
from typing import Any

from interp.errors import UnknownNameError, nearest

MODELS = Path(__file__).parent / "models"
PREFIX = "zoo:"


def names() -> list[str]:
    """The names of the models that ship, for example ``["tiny-diffusion", "tiny-llama", "tiny-llava"]``."""
    kinds = ("config.json", "model_index.json")  # a model of transformers, a pipeline of diffusers
    return sorted(folder.name for folder in MODELS.iterdir() if any((folder / kind).is_file() for kind in kinds))


def path(name: str) -> Path:
    """The folder of a model that ships; ``from_pretrained`` of transformers or diffusers loads it.

    Args:
        name: ``"tiny-llava"`` or ``"zoo:tiny-llava"``.

    Returns:
        The folder.

    Raises:
        UnknownNameError: no such model.
    """
    short = name.removeprefix(PREFIX)
    known = names()
    if short not in known:
        raise UnknownNameError(f"no model {name!r} ships; there are {', '.join(known)}. {nearest(short, known)}")
    return MODELS / short


def card(name: str) -> dict[str, Any]:
    """What is known about a model that ships: data, recipe, seeds, sizes, measured figures.

    Args:
        name: as for ``path``.

    Returns:
        The content of the model's ``card.json``.

    Raises:
        UnknownNameError: no such model.
    """
    content: dict[str, Any] = json.loads((path(name) / "card.json").read_text(encoding="utf-8"))
    return content
