"""The prompts of a task: exemplars and queries in either modality, instructions, specifications."""

from collections.abc import Sequence
from pathlib import Path

from interp.errors import InputError, UnknownNameError, nearest
from interp.images import ImageLike
from interp.prompts import READ_AT, XTV, Prompt, ReadAt, Segment, Template, few_shot, instruction, query
from interp.tasks import Draw, Item, Modality, Task


def item_input(item: Item, modality: Modality) -> str | ImageLike:
    """An item's input as it goes into a prompt.

    Raises:
        InputError: the item has no image, or the modality is neither "text" nor "image".
    """
    if modality not in ("text", "image"):
        raise InputError(f"The modality must be 'text' or 'image', not {modality!r}.")
    if modality == "text":
        return item.input
    if item.image is None:
        raise InputError(f"Item {item.id or item.input!r} has no image.")
    return Path(item.image) if isinstance(item.image, str) else item.image


def examples(items: Sequence[Item], modality: Modality) -> list[tuple[str | ImageLike, str]]:
    """(input, output) pairs for ``few_shot``."""
    return [(item_input(item, modality), item.output) for item in items]


def few_shot_prompts(
    draws: Sequence[Draw],
    modality: Modality,
    query_modality: Modality | None = None,
    *,
    template: Template = XTV,
) -> list[Prompt]:
    """For every draw its exemplars and then its query, in one context (the "Prompt" condition).

    Args:
        draws: queries with exemplars.
        modality: of the exemplars.
        query_modality: of the query. None: the same.
        template: how an example is written.
    """
    of_query = query_modality or modality
    return [
        few_shot(examples(draw.exemplars, modality), item_input(draw.query, of_query), template=template)
        for draw in draws
    ]


def query_prompts(items: Sequence[Item], modality: Modality, *, template: Template = XTV) -> list[Prompt]:
    """For every item its query alone (the "No Context" condition, and what is patched)."""
    return [query(item_input(item, modality), template=template) for item in items]


def specification_prompts(
    draws: Sequence[Draw],
    modality: Modality,
    *,
    method: str | ReadAt = "xtv",
    with_query: bool | None = None,
    template: Template | None = None,
) -> tuple[list[Prompt], str]:
    """For every draw the prompt that a method reads its task vector from, and where.

    Args:
        draws: all with the same number of exemplars.
        modality: of the exemplars and of the query behind them.
        method: a name in ``prompts.READ_AT``, or a ``ReadAt``.
        with_query: append the query. None: only where the method reads at it.
        template: instead of the method's own.

    Returns:
        The prompts, and the position name to read in each.

    Raises:
        UnknownNameError: an unknown method.
        InputError: draws of different lengths, or none.
    """
    if isinstance(method, str) and method not in READ_AT:
        raise UnknownNameError(f"Unknown method {method!r}. {nearest(method, READ_AT)} Known: {', '.join(READ_AT)}.")
    preset = READ_AT[method] if isinstance(method, str) else method
    append = preset.after_query if with_query is None else with_query
    built = [
        preset.build(
            examples(draw.exemplars, modality),
            item_input(draw.query, modality) if append else None,
            template,
        )
        for draw in draws
    ]
    positions = {at for _, at in built}
    if len(positions) != 1:
        raise InputError(f"The draws must all have the same number of exemplars; they read at {sorted(positions)}.")
    return [prompt for prompt, _ in built], positions.pop()


def instruction_prompt(task: Task) -> Prompt:
    """The task's instruction as a specification of its own, read at its last token.

    Raises:
        InputError: the task has no instruction.
    """
    if not task.instruction.strip():
        raise InputError(f"Task {task.name!r} has no instruction.")
    return instruction(task.instruction)


def instructed_prompts(
    task: Task,
    items: Sequence[Item],
    modality: Modality,
    *,
    separator: str = "\n",
    template: Template = XTV,
) -> list[Prompt]:
    """For every item the instruction and then the query, in one context (an instruction prompt)."""
    before = instruction_prompt(task)
    if separator:
        before = before + Prompt((Segment("separator", text=separator),))
    return [before + one for one in query_prompts(items, modality, template=template)]
