"""The world of the small models as tasks: items with answers and freshly drawn pictures."""

from interp.tasks import Item, Task
from interp.zoo import images
from interp.zoo.facts import CATEGORIES, PAPER_TASKS, Entity, Relation, entities, relations, split

__all__ = ["CATEGORIES", "PAPER_TASKS", "Entity", "Relation", "entities", "relations", "split", "tasks"]


def tasks(split_seed: int = 0, image_seed: int = 0, only_paper: bool = False) -> dict[str, Task]:
    """The tasks of the world, with one freshly drawn image per item.

    The models know every fact, of both splits: the splits keep exemplars and queries apart, as a language
    model's pre-training does not.

    Args:
        split_seed: divides the entities into validation and test.
        image_seed: of the images; evaluation images never coincide with training images.
        only_paper: leave out all but the six tasks of the paper.

    Returns:
        Tasks by name; an item's image is a 96 x 96 RGB picture and its id the entity's name.
    """
    pictures = {entity.name: images.draw(entity.name, seed=image_seed) for entity in entities()}

    def items(group: tuple[Entity, ...], attribute: str) -> tuple[Item, ...]:
        return tuple(
            Item(entity.name, entity.facts[attribute], image=pictures[entity.name], id=entity.name) for entity in group
        )

    result = {}
    for relation in relations():
        if only_paper and relation.name not in PAPER_TASKS:
            continue
        validation, test = split(relation.category, split_seed)
        result[relation.name] = Task(
            name=relation.name,
            instruction=relation.instruction,
            validation=items(validation, relation.attribute),
            test=items(test, relation.attribute),
            category=relation.category,
        )
    return result
