"""Tasks: items with text, image and answers; disjoint splits; draws of exemplars; shuffled controls."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from interp.errors import InputError, UnknownNameError, nearest
from interp.images import ImageLike
from interp.task_files import Row, read_rows

Modality = Literal["text", "image"]
Split = Literal["validation", "test"]

# The six tasks of Luo, Darrell & Bar 2025 and their instructions.
INSTRUCTIONS = {
    "country-capital": "The capital city of the country:",
    "country-currency": "The last word of the official currency of the country:",
    "animal-latin": "The scientific name of the animal's species in latin:",
    "animal-young": "The term for the baby of the animal:",
    "food-color": "The color of the food:",
    "food-flavor": "The flavor descriptor of the food:",
}


@dataclass(frozen=True)
class Item:
    """One concept of a task.

    Args:
        input: the concept as text.
        output: the answer that prompts show.
        image: the concept as an image (PIL image or path).
        aliases: other right answers.
        id: a name that is unique in its task.
    """

    input: str
    output: str
    image: ImageLike | None = None
    aliases: tuple[str, ...] = ()
    id: str = ""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer, the shown one first."""
        return (self.output, *self.aliases)


@dataclass(frozen=True)
class Task:
    """A task: what maps each item's input to its output, with items to choose on and items to report on.

    Args:
        name: e.g. "country-capital".
        instruction: one line that states the task, ending in a colon; empty if there is none.
        validation: items for extraction and for every choice.
        test: items for the results.
        category: what the inputs are ("country"); tasks of one category can be each other's controls.

    Raises:
        InputError: an id occurs twice in a split, or the splits share an id, an input or an image file.
    """

    name: str
    instruction: str
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    category: str | None = None

    def __post_init__(self) -> None:
        for split, items in (("validation", self.validation), ("test", self.test)):
            repeated = [i for i, n in Counter(item.id for item in items if item.id).items() if n > 1]
            if repeated:
                raise InputError(f"Task {self.name!r}: ids occur twice in {split}: {_some(repeated)}.")
        for what, keys in (
            ("ids", lambda item: item.id),
            ("inputs", lambda item: _same_input(item.input)),
            ("images", lambda item: str(item.image) if isinstance(item.image, str | Path) else ""),
        ):
            shared = {keys(item) for item in self.validation} & {keys(item) for item in self.test} - {""}
            if shared:
                raise InputError(
                    f"Task {self.name!r}: validation and test overlap in {len(shared)} {what}: "
                    f"{_some(shared)}. Keep each concept on one side."
                )

    def items(self, split: Split) -> tuple[Item, ...]:
        """The items of "validation" or "test"."""
        if split not in ("validation", "test"):
            raise InputError(f"A task has the splits 'validation' and 'test', not {split!r}.")
        return self.validation if split == "validation" else self.test


@dataclass(frozen=True)
class Draw:
    """A query and the exemplars drawn for it."""

    query: Item
    exemplars: tuple[Item, ...]


def load_task(
    path: str | Path,
    test_path: str | Path | None = None,
    *,
    name: str | None = None,
    instruction: str | None = None,
    category: str | None = None,
    image_root: str | Path | None = None,
    validation: float | int = 0.25,
    seed: int = 0,
    check_images: bool = True,
) -> Task:
    """Load a task from files (their columns: see ``task_files.read_rows``).

    Args:
        path: one file, split by ``seed``; or the validation file, if ``test_path`` is given; or a folder with
            the official files ``{name}_val.json`` and ``{name}_test.json``.
        test_path: the test file.
        name: the task. None: the file's stem; needed with a folder.
        instruction: one line that states the task. None: the paper's, for a task of the paper, else empty.
        category: what the inputs are. None: what precedes the first "-" of a paper task's name.
        image_root: folder that image paths start from. None: the file's folder.
        validation: of one file, the share (below 1) or the least number of items that become validation;
            items with the same input stay on one side.
        seed: of that split.
        check_images: open every image now.

    Returns:
        The task; each split in file order.

    Raises:
        InputError: as ``read_rows``, a folder without a name or without such a task, splits that overlap, or
            a split that would be empty.
    """
    path = Path(path)
    if path.is_dir():
        if test_path is not None:
            raise InputError("Give a folder with a task's name, or two files, not both.")
        if name is None:
            raise InputError(f"{str(path)!r} is a folder: give the name of a task. It has: {_in_folder(path)}.")
        if not (path / f"{name}_val.json").is_file():
            hint = nearest(name, _names_in_folder(path))
            raise UnknownNameError(f"There is no task {name!r} in {str(path)!r}. {hint} It has: {_in_folder(path)}.")
        path, test_path = path / f"{name}_val.json", path / f"{name}_test.json"
    root = None if image_root is None else Path(image_root)
    rows = read_rows(path, image_root=root, check_images=check_images)
    if test_path is None:
        held, rest = _divide(rows, validation, seed, path)
    else:
        held, rest = rows, read_rows(Path(test_path), image_root=root, check_images=check_images)
    name = path.stem if name is None else name
    known = name in INSTRUCTIONS
    ids = _ids([*held, *rest])
    return Task(
        name=name,
        instruction=INSTRUCTIONS.get(name, "") if instruction is None else instruction,
        validation=_items(held, ids[: len(held)]),
        test=_items(rest, ids[len(held) :]),
        category=name.split("-")[0] if category is None and known else category,
    )


def draw_exemplars(
    task: Task,
    n_shots: int,
    *,
    seed: int,
    split: Split = "test",
    mode: Literal["clean", "official"] = "clean",
) -> list[Draw]:
    """Draw exemplars for every item of a split, never the item itself.

    Args:
        task: the task.
        n_shots: exemplars for each query.
        seed: of the draws.
        split: where the queries come from.
        mode: "clean" draws exemplars from validation only; "official" from the query's own split, with the
            legacy NumPy stream of the paper's release: one ``RandomState(seed)``, and for the items in file
            order the first ``n_shots`` of a permutation of all other indices in ascending order.

    Returns:
        One draw per item of the split, in file order.

    Raises:
        InputError: fewer items to draw from than shots, or an unknown mode or split.
    """
    queries = task.items(split)
    if mode not in ("clean", "official"):
        raise InputError(f"mode must be 'clean' or 'official', not {mode!r}.")
    same = mode == "official" or split == "validation"
    pool = queries if same else task.validation
    available = len(pool) - same
    if not 1 <= n_shots <= available:
        raise InputError(
            f"Cannot draw {n_shots} shots for a query of task {task.name!r} ({split}, {mode}): there are "
            f"{available} items to draw from."
        )
    legacy = np.random.RandomState(seed) if mode == "official" else None
    generator = np.random.default_rng(seed)
    draws = []
    for i, item in enumerate(queries):
        others = [j for j in range(len(pool)) if not (same and j == i)]
        order = (generator if legacy is None else legacy).permutation(others)
        draws.append(Draw(item, tuple(pool[j] for j in order[:n_shots])))
    return draws


def shuffled_labels(items: Sequence[Item], *, seed: int | np.random.Generator) -> tuple[Item, ...]:
    """Give the items each other's answers: a control that keeps the format and breaks the mapping.

    Args:
        items: the items; for label-shuffled prompts, the exemplars of one draw.
        seed: of the permutation; a generator is advanced, so that every draw is shuffled differently.

    Returns:
        The items in the same order, the outputs permuted so that the fewest possible keep an answer equal to
        their own (none, if no answer belongs to more than half of the items).

    Raises:
        InputError: all answers are alike, so that nothing would change.

    Source: Todd et al. 2024 (label-shuffled prompts).
    """
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.output, []).append(index)
    if len(groups) < 2:
        raise InputError(f"Cannot shuffle the labels of {len(items)} item(s) that have {len(groups)} answer(s).")
    generator = np.random.default_rng(seed)
    members = list(groups.values())
    order = [int(i) for g in generator.permutation(len(members)) for i in generator.permutation(members[g])]
    # Equal answers lie side by side, so a turn by the longest run moves each run off itself.
    longest = max(len(group) for group in members)
    donor = dict(zip(order, np.roll(order, -longest).tolist(), strict=True))
    return tuple(
        replace(item, output=items[donor[i]].output, aliases=items[donor[i]].aliases) for i, item in enumerate(items)
    )


def _divide(rows: list[Row], validation: float | int, seed: int, path: Path) -> tuple[list[Row], list[Row]]:
    wanted = validation if isinstance(validation, int) else round(validation * len(rows))
    if not 1 <= wanted < len(rows):
        raise InputError(
            f"{str(path)!r} has {len(rows)} items: validation={validation!r} asks for {wanted} of them, "
            "which leaves a split empty."
        )
    concepts = sorted({_same_input(row.input) for row in rows})
    size = Counter(_same_input(row.input) for row in rows)
    chosen: set[str] = set()
    for index in np.random.default_rng(seed).permutation(len(concepts)):
        if sum(size[concept] for concept in chosen) >= wanted:
            break
        chosen.add(concepts[index])
    held = [row for row in rows if _same_input(row.input) in chosen]
    rest = [row for row in rows if _same_input(row.input) not in chosen]
    if not rest:
        raise InputError(f"{str(path)!r} has {len(concepts)} different input(s), too few for two splits.")
    return held, rest


def _same_input(text: str) -> str:
    return " ".join(text.split()).casefold()


def _ids(rows: Sequence[Row]) -> list[str]:
    """Ids as stated; else the input, numbered when it was seen before."""
    seen: Counter[str] = Counter()
    ids = []
    for row in rows:
        seen[row.input] += 1
        ids.append(row.id or (row.input if seen[row.input] == 1 else f"{row.input} #{seen[row.input]}"))
    return ids


def _items(rows: Sequence[Row], ids: Sequence[str]) -> tuple[Item, ...]:
    return tuple(
        Item(row.input, row.output, row.image, row.aliases, identity) for row, identity in zip(rows, ids, strict=True)
    )


def _some(names: Sequence[str] | set[str], limit: int = 5) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(map(repr, shown)) + (", ..." if len(names) > limit else "")


def _names_in_folder(path: Path) -> list[str]:
    return sorted(file.name.removesuffix("_val.json") for file in path.glob("*_val.json"))


def _in_folder(path: Path) -> str:
    return ", ".join(_names_in_folder(path)) or "no files named {task}_val.json"
