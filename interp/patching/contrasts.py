"""Pairs of prompts of the world that ships: the same things, asked for two tasks, both answered correctly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from interp.errors import InputError, UnknownNameError, nearest
from interp.metrics import first_token_ids
from interp.models.vlm import VLM
from interp.prompts import Prompt
from interp.task_prompts import few_shot_prompts, instructed_prompts
from interp.tasks import Draw, Item, Modality, Task, draw_exemplars
from interp.zoo.facts import PAPER_TASKS
from interp.zoo.world import tasks as world_tasks

Context = Literal["examples", "instruction"]


@dataclass(frozen=True)
class Contrast:
    """Prompts that differ in the task alone; every prompt is answered correctly by the model.

    Args:
        tasks: for each example its task.
        items: the queries' items, with the task's answers.
        clean: prompts of the task.
        corrupt: the same examples and query with another task's answers, or instruction.
        wrong: the other task's answer to each query.
        tried: how many pairs were written to find these.
    """

    tasks: tuple[str, ...]
    items: tuple[Item, ...]
    clean: tuple[Prompt, ...]
    corrupt: tuple[Prompt, ...]
    wrong: tuple[str, ...]
    tried: int

    @property
    def answers(self) -> list[str]:
        """The clean prompts' answers."""
        return [item.output for item in self.items]


def vision_model(name: str) -> VLM:
    """Load a model that reads images.

    Raises:
        InputError: it reads text only.
    """
    vlm = VLM.from_pretrained(name)
    if not vlm.has_vision:
        raise InputError(f"{name} reads text only; this experiment needs a vision-language model")
    return vlm


def task_pairs(names: str) -> dict[str, tuple[Task, Task]]:
    """Tasks of the world that ships, and for each another one about the same things.

    Args:
        names: with commas; empty: the paper's six.

    Returns:
        Name -> the task and the next one of its category among those that were named, or else in the world.

    Raises:
        UnknownNameError: no such task.
    """
    world = world_tasks()
    wanted = list(dict.fromkeys(word.strip() for word in names.split(",") if word.strip())) or list(PAPER_TASKS)
    for name in wanted:
        if name not in world:
            hint = nearest(name, world)
            raise UnknownNameError(f"no task {name!r}. {hint} Tasks: {', '.join(world)}".replace("  ", " "))
    found = {}
    for name in wanted:
        task = world[name]
        rings = ([world[other] for other in wanted], list(world.values()))
        same = ([other for other in ring if other.category == task.category] for ring in rings)
        ring = next(ring for ring in same if len(ring) > 1)
        found[name] = (task, ring[([other.name for other in ring].index(name) + 1) % len(ring)])
    return found


def contrasts(
    vlm: VLM,
    pairs: Mapping[str, tuple[Task, Task]],
    modality: Modality,
    *,
    n: int,
    n_shots: int,
    seed: int,
    context: Context = "examples",
) -> Contrast:
    """Write pairs of prompts about test items, and keep those of which the model answers both correctly.

    Args:
        vlm: the model.
        pairs: of tasks, by the name of the first (`task_pairs`).
        modality: of examples and queries.
        n: pairs of prompts of each task.
        n_shots: examples in each prompt.
        seed: of the draws.
        context: what says the task: ``"examples"``, or its ``"instruction"``.

    Raises:
        InputError: fewer than ``n`` such pairs of a task.
    """
    parts: list[tuple[str, Item, Prompt, Prompt, str]] = []
    tried = 0
    for name, (task, other) in pairs.items():
        draws = _shuffled(draw_exemplars(task, n_shots, seed=seed), seed)
        kept: list[tuple[str, Item, Prompt, Prompt, str]] = []
        for start in range(0, len(draws), n):
            some = draws[start : start + n]
            theirs = [Draw(_answered(d.query, other), tuple(_answered(e, other) for e in d.exemplars)) for d in some]
            clean, corrupt = (
                few_shot_prompts(side, modality)
                if context == "examples"
                else instructed_prompts(asked, [draw.query for draw in side], modality)
                for asked, side in ((task, some), (other, theirs))
            )
            right = [_right(vlm, prompts, [draw.query for draw in side])
                     for prompts, side in ((clean, some), (corrupt, theirs))]  # fmt: skip
            for index, (mine, its) in enumerate(zip(some, theirs, strict=True)):
                if right[0][index] and right[1][index] and _differ(vlm, clean[index], mine.query, its.query):
                    kept.append((name, mine.query, clean[index], corrupt[index], its.query.output))
            tried += len(some)
            if len(kept) >= n:
                break
        if len(kept) < n:
            raise InputError(
                f"{vlm.name} answers {len(kept)} of {len(draws)} {modality} queries of {name!r} correctly both for it "
                f"and for {other.name!r}, and {n} are needed: ask for fewer prompts, or take other tasks"
            )
        parts += kept[:n]
    names, items, clean_prompts, corrupt_prompts, wrong = zip(*parts, strict=True)
    return Contrast(names, items, clean_prompts, corrupt_prompts, wrong, tried)


def _shuffled(draws: Sequence[Draw], seed: int) -> list[Draw]:
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(seed)).tolist()
    return [draws[index] for index in order]


def _answered(item: Item, other: Task) -> Item:
    """The same thing with another task's answer."""
    found = {one.input: one for one in (*other.validation, *other.test)}
    if item.input not in found:
        raise InputError(f"task {other.name!r} has no item {item.input!r}, so it cannot be set against it")
    return found[item.input]


def _right(vlm: VLM, prompts: Sequence[Prompt], items: Sequence[Item]) -> list[bool]:
    wanted = [first_token_ids(vlm.tokenizer, p, item.output)[0] for p, item in zip(prompts, items, strict=True)]
    with torch.no_grad():
        given = vlm(vlm.prepare(list(prompts)), logits_to_keep=1).logits[:, -1].argmax(dim=-1).tolist()
    return [want == got for want, got in zip(wanted, given, strict=True)]


def _differ(vlm: VLM, prompt: Prompt, mine: Item, its: Item) -> bool:
    """Whether the two answers begin with different tokens, so that they can be told apart by logits."""
    first, second = (first_token_ids(vlm.tokenizer, prompt, one.output)[0] for one in (mine, its))
    return first != second
