"""The families of models that are supported, one short table each: to add one, write and list it here."""

from interp.errors import InputError, nearest
from interp.models.families.base import Family, Stack
from interp.models.families.gpt2 import GPT2
from interp.models.families.idefics2 import IDEFICS2
from interp.models.families.llama import LLAMA
from interp.models.families.llava import LLAVA

FAMILIES: tuple[Family, ...] = (LLAMA, GPT2, LLAVA, IDEFICS2)

__all__ = ["FAMILIES", "Family", "Stack", "family_of"]


def family_of(model_type: str) -> Family:
    """The family that a ``config.model_type`` belongs to.

    Args:
        model_type: as transformers' configurations state it, such as ``"llava"``.

    Raises:
        InputError: no table covers it; the message lists those that exist.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = [name for family in FAMILIES for name in family.model_types]
    raise InputError(
        f"no family table for model_type {model_type!r}. {nearest(model_type, known)} Supported: {', '.join(known)}. A "
        "new family is one short table in interp/models/families/.".replace("  ", " ")
    )
