"""All figures of a card in one dictionary."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from interp.zoo.evaluate import (
    Subject,
    Vectors,
    foreigners,
    instruction_vector,
    paper_relations,
    partner,
    patched,
    prompted,
    task_vector,
)
from interp.zoo.facts import Relation

RANDOM_DRAWS = 10  # of the random control, for each task and seed


def table(make: Any, keys: Sequence[tuple[Relation, int]]) -> Vectors:
    """Compute vectors once and look them up afterwards."""
    made = {(relation.name, seed): make(relation, seed) for relation, seed in keys}
    return lambda relation, seed: made[relation.name, seed]


def all_vectors(subject: Subject, seeds: Sequence[int], base: Subject | None) -> dict[str, Vectors]:
    """The vectors of every specification: by modality, of instructions, and of the base language model.

    Args:
        subject: the model.
        seeds: of the exemplars and pictures.
        base: the language model that a VLM started from.

    Returns:
        Vectors by the name of what specifies the task.
    """
    keys = [(relation, seed) for relation in paper_relations() for seed in seeds]

    def of(model: Subject, modality: str) -> Vectors:
        return table(lambda relation, seed: task_vector(model, relation, modality, seed), keys)

    vectors = {modality: of(subject, modality) for modality in subject.modalities}
    vectors["instruction"] = table(lambda relation, seed: instruction_vector(subject, relation), keys)
    if base is not None:
        vectors["language model"] = of(base, "text")
    return vectors


def random_like(vectors: Vectors, number: int) -> Vectors:
    """Random vectors with the norms of given ones, drawn anew for each task, seed and number."""

    def draw(relation: Relation, seed: int) -> torch.Tensor:
        real = vectors(relation, seed)
        index = [known.name for known in paper_relations()].index(relation.name)
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1000 * seed + 10 * number + index))
        return noise * real.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)

    return draw


def prompt_figures(subject: Subject, seeds: Sequence[int]) -> dict[str, Any]:
    """Accuracies of prompts: five shots, an instruction, nothing.

    Args:
        subject: the model.
        seeds: of exemplars and pictures.

    Returns:
        Figures by the name of the condition.
    """
    return {
        f"{kind}, {modality}": prompted(subject, kind, modality, seeds)
        for kind in ("few-shot", "instruction", "none")
        for modality in subject.modalities
    }


def layer_figures(subject: Subject, vectors: dict[str, Vectors], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Validation accuracy of every kind of patch (``"text -> image"``): one number a layer."""
    return {
        f"{source} -> {modality}": [
            patched(subject, made, modality, layer, seeds, part="validation")["first_token"]
            for layer in range(subject.n_layers)
        ]
        for source, made in vectors.items()
        for modality in subject.modalities
    }


def best_layer(by_layer: dict[str, list[float]], subject: Subject) -> int:
    """The layer whose patches between the model's own modalities do best on validation; lowest on ties."""
    own = [by_layer[f"{source} -> {to}"] for source in subject.modalities for to in subject.modalities]
    means = [round(sum(column) / len(column), 6) for column in zip(*own, strict=True)]
    return means.index(max(means))


def patch_figures(subject: Subject, vectors: dict[str, Vectors], layer: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Test accuracy of patches and their controls at one layer.

    Args:
        subject: the model.
        vectors: as ``all_vectors``.
        layer: where to patch.
        seeds: of vectors and pictures.

    Returns:
        Figures by the name of the condition.
    """
    figures = {}
    for to in subject.modalities:
        for source, made in vectors.items():
            figures[f"{source} -> {to}"] = patched(subject, made, to, layer, seeds)
        made = vectors["text"]

        def wrong(relation: Relation, seed: int, made: Vectors = made) -> torch.Tensor:
            return made(partner(relation), seed)

        foreign = [
            patched(subject, foreign_vectors(made, number), to, layer, seeds)
            for number in range(len(foreigners(paper_relations()[0])))
        ]
        # One random vector is one random task: a handful of draws leaves a spread of several hundredths.
        figures[f"random -> {to}"] = mean_of(
            [patched(subject, random_like(made, number), to, layer, seeds) for number in range(RANDOM_DRAWS)]
        )
        figures[f"other category -> {to}"] = mean_of(foreign)
        figures[f"wrong task -> {to}"] = patched(subject, wrong, to, layer, seeds)
        figures[f"wrong task -> {to}, answer of the task patched in"] = patched(
            subject, wrong, to, layer, seeds, answer_of=partner
        )
    return figures


def foreign_vectors(vectors: Vectors, number: int) -> Vectors:
    """For every task, the vector of one of the paper's tasks of another category."""
    return lambda relation, seed: vectors(foreigners(relation)[number], seed)


def mean_of(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several results of ``patched``."""
    tasks = entries[0]["by_task"]
    return {
        "first_token": round(fmean(entry["first_token"] for entry in entries), 4),
        "exact": round(fmean(entry["exact"] for entry in entries), 4),
        "by_task": {task: round(fmean(entry["by_task"][task] for entry in entries), 4) for task in tasks},
    }
