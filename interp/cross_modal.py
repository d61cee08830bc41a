"""The conditions of cross-modal transfer: what is given as context or patched in, and the controls.

Source: Luo, Darrell & Bar 2025, tables of accuracy by task. Conditions are named after what specifies the task
(`text`, `image`, `instruction`, ...) and the modality of the query.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.models.vlm import VLM
from interp.progress import track
from interp.prompts import Prompt
from interp.task_prompts import few_shot_prompts, instructed_prompts, query_prompts
from interp.task_vectors import TaskVectors, combine, from_examples, from_instruction, random_like
from interp.tasks import Item, Modality, Split, Task, draw_exemplars
from interp.transfer import Scores, choose_layer, score_patches, score_prompts

Bank = Mapping[str, Mapping[str, Sequence[TaskVectors]]]
Kind = Literal["prompt", "patch", "control"]
MODALITIES: tuple[Modality, Modality] = ("text", "image")

PATCHES = ("text", "image", "instruction", "ensemble")
FROM_LANGUAGE_MODEL = "language model"
ITS_ANSWERS = "wrong task, its answers"
CONTROLS = ("random", "wrong task", "other category", "shuffled labels")


@dataclass(frozen=True)
class Settings:
    """How the experiment is run.

    Args:
        n_shots: examples per prompt.
        seeds: of the draws; each gives vectors and prompts of its own.
        n_random: random vectors per task and seed; single ones differ a lot, so their mean is what counts.
        batch_size: prompts per forward, and queries per sweep.
    """

    n_shots: int = 5
    seeds: tuple[int, ...] = (1, 2, 3)
    n_random: int = 5
    batch_size: int = 32


@dataclass(frozen=True, eq=False)
class Result:
    """Scores of one condition on one task's queries.

    Args:
        condition: what specified the task.
        kind: in the prompt, patched in, or a control.
        query: modality of the queries.
        task: whose answers count.
        items: the queries' items.
        scores: ``[draw, query]`` for prompts, ``[draw, layer, query]`` for patches and controls. There is one draw per
            seed, but one in all where nothing is drawn, and several per seed for random vectors.
        prompts: the queries or prompts of the first seed.
        vectors: what was patched, one per draw.
    """

    condition: str
    kind: Kind
    query: Modality
    task: str
    items: tuple[Item, ...]
    scores: Scores
    prompts: tuple[Prompt, ...]
    vectors: tuple[TaskVectors, ...] = ()

    @property
    def by_layer(self) -> bool:
        """Whether the scores have a layer axis."""
        return self.kind != "prompt"


def partner(task: Task, tasks: Mapping[str, Task]) -> Task:
    """The next task of the same category: the wrong task for these queries.

    Raises:
        InputError: no other task of the category.
    """
    return _next(task, [other for other in tasks.values() if other.category == task.category], "its category")


def stranger(task: Task, tasks: Mapping[str, Task]) -> Task:
    """The first task of the next category: one that does not apply to these queries at all.

    Raises:
        InputError: all tasks are of one category.
    """
    firsts = {other.category: other for other in reversed(list(tasks.values()))}
    ordered = [firsts[category] for category in dict.fromkeys(other.category for other in tasks.values())]
    return _next(firsts[task.category], ordered, "another category")


def _next(task: Task, ring: Sequence[Task], where: str) -> Task:
    names = [other.name for other in ring]
    if len(ring) < 2:
        raise InputError(f"task {task.name!r} needs a second task of {where} as a control")
    return ring[(names.index(task.name) + 1) % len(ring)]


def specify(
    vlm: VLM, tasks: Mapping[str, Task], settings: Settings, language_model: VLM | None = None
) -> dict[str, dict[str, list[TaskVectors]]]:
    """Task vectors of every task, by specification and seed.

    Args:
        vlm: the model that reads texts and images.
        tasks: by name.
        settings: shots and seeds.
        language_model: the model that the VLM started from, for transfer from it.

    Returns:
        Task name -> specification -> one set of vectors per seed. An instruction has one prompt and so the same vector
        for every seed; the ensemble is the mean of text examples and instruction.
    """
    found: dict[str, dict[str, list[TaskVectors]]] = {}
    for name, task in tasks.items():

        def drawn(model: VLM, modality: Modality, task: Task = task, shuffle: bool = False) -> list[TaskVectors]:
            return [
                from_examples(
                    model,
                    task,
                    modality,
                    n_shots=settings.n_shots,
                    seed=seed,
                    shuffle_labels=shuffle,
                    batch_size=settings.batch_size,
                )
                for seed in settings.seeds
            ]

        instructed = from_instruction(vlm, task)
        by_spec = {
            "text": drawn(vlm, "text"),
            "image": drawn(vlm, "image"),
            "instruction": [instructed] * len(settings.seeds),
            "shuffled labels": drawn(vlm, "text", shuffle=True),
        }
        by_spec["ensemble"] = [combine([text, instructed]) for text in by_spec["text"]]
        if language_model is not None:
            by_spec[FROM_LANGUAGE_MODEL] = drawn(language_model, "text")
        found[name] = by_spec
    return found


def run_prompts(vlm: VLM, task: Task, query: Modality, settings: Settings, split: Split = "test") -> Iterator[Result]:
    """No context, examples in both modalities, and the instruction, each in one context with the query.

    Args:
        vlm: the model.
        task: the task.
        query: modality of the queries.
        settings: shots and seeds.
        split: whose items are the queries; exemplars come from validation.

    Yields:
        One result per condition.
    """
    items = task.items(split)
    fixed = {"no context": query_prompts(items, query), "instruction": instructed_prompts(task, items, query)}
    for condition, prompts in fixed.items():
        scores = score_prompts(vlm, prompts, items, batch_size=settings.batch_size)
        yield Result(condition, "prompt", query, task.name, items, _stack([scores]), tuple(prompts))
    for modality in MODALITIES:
        by_seed = []
        first: list[Prompt] = []
        for seed in settings.seeds:
            draws = draw_exemplars(task, settings.n_shots, seed=seed, split=split)
            prompts = few_shot_prompts(draws, modality, query)
            first = first or prompts
            by_seed.append(score_prompts(vlm, prompts, items, batch_size=settings.batch_size))
        yield Result(modality, "prompt", query, task.name, items, _stack(by_seed), tuple(first))


def run_patches(
    vlm: VLM,
    task: Task,
    tasks: Mapping[str, Task],
    bank: Bank,
    query: Modality,
    settings: Settings,
    split: Split = "test",
    controls: bool = True,
) -> Iterator[Result]:
    """Every specification patched into queries without context, at every layer, in one sweep.

    Args:
        vlm: the model.
        task: the task that the queries are asked for.
        tasks: all tasks, for the controls.
        bank: from `specify`.
        query: modality of the queries.
        settings: shots and seeds.
        split: whose items are the queries.
        controls: whether to add the controls. ``wrong task`` is scored on the right answers; a further result,
            ``wrong task, its answers``, scores the same patch on the answers of the task that was patched in.

    Yields:
        One result per condition, with a layer axis.
    """
    items = task.items(split)
    prompts = query_prompts(items, query)
    vectors: dict[str, list[TaskVectors]] = {
        name: list(bank[task.name][name]) for name in (*PATCHES, FROM_LANGUAGE_MODEL) if name in bank[task.name]
    }
    other = None
    if controls:
        other = partner(task, tasks)
        # Directions of their own for every task and seed.
        first = list(tasks).index(task.name) * len(settings.seeds) * settings.n_random
        like = [text for text in vectors["text"] for _ in range(settings.n_random)]
        vectors["random"] = [random_like(text, seed=first + draw) for draw, text in enumerate(like)]
        vectors["wrong task"] = list(bank[other.name]["text"])
        vectors["other category"] = list(bank[stranger(task, tasks).name]["text"])
        vectors["shuffled labels"] = list(bank[task.name]["shuffled labels"])
    flat = [one for group in vectors.values() for one in group]
    scores = score_patches(vlm, prompts, items, flat, batch_size=settings.batch_size)
    start = 0
    for name, group in vectors.items():
        kind: Kind = "control" if name in CONTROLS else "patch"
        mine = _stack([scores[start + draw] for draw in range(len(group))])
        start += len(group)
        yield Result(name, kind, query, task.name, items, mine, tuple(prompts), tuple(group))
        if name == "wrong task" and other is not None:
            theirs = _answers_of(other, items)
            again = score_patches(vlm, prompts, theirs, group, batch_size=settings.batch_size)
            yield Result(ITS_ANSWERS, kind, query, task.name, theirs, again, tuple(prompts), tuple(group))


@dataclass(frozen=True)
class LayerChoice:
    """Which block to patch, chosen on validation items alone.

    Args:
        layer: one block for the model: best on average over tasks, seeds and the four pairs of modalities.
        by_task: the best block of each task by itself.
        accuracy: what the choice rests on, by block.
    """

    layer: int
    by_task: dict[str, int]
    accuracy: tuple[float, ...]


def choose_on_validation(vlm: VLM, tasks: Mapping[str, Task], bank: Bank, settings: Settings) -> LayerChoice:
    """Choose the block to patch from examples patched into queries of validation items.

    Args:
        vlm: the model.
        tasks: by name.
        bank: from `specify`.
        settings: shots and seeds.

    Source: Luo et al. 2025: one layer per model; the best layer per task is reported beside it.
    """
    found: dict[str, list[Float[Tensor, "seed layer"]]] = {name: [] for name in tasks}
    for task in track(list(tasks.values()), "choosing the layer"):
        for query in MODALITIES:
            for result in run_patches(vlm, task, tasks, bank, query, settings, "validation", controls=False):
                if result.condition in MODALITIES:
                    found[task.name].append(result.scores.accuracy)
    by_task = {name: torch.cat(runs) for name, runs in found.items()}
    everything = torch.stack(list(by_task.values()))
    return LayerChoice(
        choose_layer(everything),
        {name: choose_layer(runs) for name, runs in by_task.items()},
        tuple(everything.mean(dim=(0, 1)).tolist()),
    )


def check_tasks(tasks: Mapping[str, Task]) -> None:
    """Refuse tasks that the experiment cannot be run on, before anything runs.

    Args:
        tasks: by name.

    Raises:
        InputError: a task without instruction, category or images, or without other tasks to serve as its controls.
    """
    for task in tasks.values():
        if not task.instruction.strip():
            raise InputError(f"task {task.name!r} has no instruction")
        if not task.category:
            raise InputError(f"task {task.name!r} has no category: controls need tasks of the same and of another one")
        without = [item.input for item in (*task.validation, *task.test) if item.image is None]
        if without:
            raise InputError(f"task {task.name!r} has no image for {without[0]!r}")
        _answers_of(partner(task, tasks), task.test)
        stranger(task, tasks)


def _answers_of(task: Task, items: Sequence[Item]) -> tuple[Item, ...]:
    """The same concepts with another task's answers."""
    answers = {item.input: item for item in (*task.validation, *task.test)}
    missing = [item.input for item in items if item.input not in answers]
    if missing:
        raise InputError(f"task {task.name!r} has no item for {missing[0]!r}, so the wrong task cannot be scored on it")
    return tuple(
        replace(item, output=answers[item.input].output, aliases=answers[item.input].aliases) for item in items
    )


def _stack(scores: Sequence[Scores]) -> Scores:
    names = ("prefix", "log_prob", "rank", "token")
    return Scores(*(torch.stack([getattr(one, name) for one in scores]) for name in names))
