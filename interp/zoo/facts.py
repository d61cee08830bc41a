"""The facts of the small models' world: countries, animals and foods, and what is asked about them."""

import functools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from interp.errors import UnknownNameError, nearest

DATA = Path(__file__).parent / "data"
CATEGORIES = ("country", "animal", "food")
PAPER_TASKS = (
    "country-capital",
    "country-currency",
    "animal-latin",
    "animal-young",
    "food-color",
    "food-flavor",
)
VALIDATION_SHARE = 0.4


@dataclass(frozen=True)
class Entity:
    """One thing of the world: its name, category, emoji, and its facts by attribute."""

    name: str
    category: str
    glyph: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Relation:
    """What a task asks: one attribute of one category, its instruction, and paraphrases for training."""

    name: str
    instruction: str
    paraphrases: tuple[str, ...]

    @property
    def category(self) -> str:
        """The category of the entities that the task is about."""
        return self.name.split("-")[0]

    @property
    def attribute(self) -> str:
        """The name of the fact that answers the task."""
        return self.name.split("-")[1]


@functools.cache
def entities(category: str | None = None) -> tuple[Entity, ...]:
    """The things of the world, in a fixed order.

    Args:
        category: ``"country"``, ``"animal"`` or ``"food"``; all of them by default.

    Returns:
        The entities.

    Raises:
        UnknownNameError: no such category.
    """
    if category is None:
        return tuple(entity for name in CATEGORIES for entity in entities(name))
    if category not in CATEGORIES:
        raise UnknownNameError(
            f"no category {category!r}; there are {', '.join(CATEGORIES)}. {nearest(category, CATEGORIES)}"
        )
    table = json.loads((DATA / f"{category}.json").read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    return tuple(Entity(row.pop("name"), category, row.pop("glyph"), row) for row in rows)


@functools.cache
def relations() -> tuple[Relation, ...]:
    """Every task of the world, in a fixed order: its name, instruction and paraphrases."""
    table = json.loads((DATA / "tasks.json").read_text(encoding="utf-8"))
    return tuple(Relation(name, entry["instruction"], tuple(entry["paraphrases"])) for name, entry in table.items())


@functools.cache
def split(category: str, seed: int = 0) -> tuple[tuple[Entity, ...], tuple[Entity, ...]]:
    """Divide a category's entities, the same way for all of its tasks.

    Args:
        category: ``"country"``, ``"animal"`` or ``"food"``.
        seed: of the shuffle.

    Returns:
        The validation entities (40 %) and the test entities (60 %), disjoint.

    Raises:
        UnknownNameError: no such category.
    """
    shuffled = list(entities(category))
    random.Random(f"{seed}/{category}").shuffle(shuffled)
    count = round(VALIDATION_SHARE * len(shuffled))
    return tuple(shuffled[:count]), tuple(shuffled[count:])
