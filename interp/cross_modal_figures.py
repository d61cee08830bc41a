"""Figures of cross-modal transfer, each drawn from what the experiment measured."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE

from interp import analyses, figures
from interp.cross_modal import MODALITIES, Bank, Result, Settings
from interp.cross_modal_tables import stacked, vectors_of
from interp.images import load_image
from interp.metrics import exact_match
from interp.models.vlm import VLM
from interp.task_prompts import few_shot_prompts, item_input, query_prompts
from interp.task_vectors import similarity
from interp.tasks import Task, draw_exemplars
from interp.transfer import generate_answers

WIDE = 6.8  # inches: two columns of most proceedings

# The words whose probability stands for "the task" in the figure of phases (the paper's choice).
TASK_WORDS = {
    "country-capital": "capital",
    "country-currency": "currency",
    "animal-latin": "species",
    "animal-young": "baby",
    "food-color": "color",
    "food-flavor": "flavor",
}


def draw_all(
    vlm: VLM,
    world: Mapping[str, Task],
    bank: Bank,
    results: Sequence[Result],
    table: pd.DataFrame,
    layer: int,
    settings: Settings,
) -> dict[str, Figure]:
    """Every figure of the experiment, by name.

    Args:
        vlm: the model.
        world: tasks by name.
        bank: task vectors from `cross_modal.specify`.
        results: from `cross_modal.run_prompts` and `run_patches`, for both modalities of queries.
        table: from `cross_modal_tables.summary`.
        layer: block that is patched.
        settings: shots and seeds.
    """
    with figures.style():
        return {
            "accuracy-by-layer": layers_figure(world, results, layer),
            "answers": answers_figure(vlm, world, bank, layer),
            "conditions-image": conditions_figure(table, list(world), "image"),
            "conditions-text": conditions_figure(table, list(world), "text"),
            "phases": phases_figure(vlm, world, settings),
            "t-sne": map_figure(vlm, world, bank, layer, settings),
            "similarity": similarity_figure(world, bank, layer),
            "sample-efficiency": ensemble_figure(vlm, world, bank, results, layer, settings),
        }


def layers_figure(world: Mapping[str, Task], results: Sequence[Result], layer: int) -> Figure:
    """Accuracy of every patch by layer, for image and for text queries."""
    figure, axes = figures.panels(1, 2, width=WIDE, height=2.4)
    names = {"text": "text", "image": "image", "instruction": "instruction", "language model": "language model",
             "random": "random"}  # fmt: skip
    present = {r.condition for r in results}
    for ax, query in zip(axes.flat, ("image", "text"), strict=True):
        curves = {v: stacked(results, k, query, list(world)) for k, v in names.items() if k in present}
        figures.accuracy_by_layer(curves, chosen=layer, ax=ax)
        ax.set_title(f"{query} queries")
    return figure


def answers_figure(vlm: VLM, world: Mapping[str, Task], bank: Bank, layer: int) -> Figure:
    """Two test images of every task: the answer to the image alone, and with a text task vector patched in."""
    cells: dict[int, list[tuple[Image.Image, str, bool]]] = {0: [], 1: []}
    for name, task in world.items():
        items = task.test[:2]
        prompts = query_prompts(items, "image")
        alone = generate_answers(vlm, prompts)
        patched = generate_answers(vlm, prompts, edits=[bank[name]["text"][0].patch(layer, vlm)])
        for row, (item, before, after) in enumerate(zip(items, alone, patched, strict=True)):
            shown = f"{name.split('-')[-1]}: {after}\nalone: {before}"
            cells[row].append((load_image(item_input(item, "image")), shown, exact_match(after, item.answers)))
    images, words, correct = zip(*cells[0], *cells[1], strict=True)
    figure, axes = figures.panels(1, 1, width=8.4, height=3.6)
    figures.image_strip(images, words, correct=correct, columns=len(world), ax=axes[0, 0])
    return figure


def conditions_figure(table: pd.DataFrame, tasks: list[str], query: str) -> Figure:
    """One bar per condition, for one modality of queries."""
    part = table[table["query"] == query]
    figure, axes = figures.panels(1, 1, width=5.0, height=3.2)
    figures.condition_bars(
        {row["condition"]: [row[task] for task in tasks] for _, row in part.iterrows()},
        intervals={row["condition"]: (row["low"], row["high"]) for _, row in part.iterrows()},
        kinds={row["condition"]: row["kind"] for _, row in part.iterrows()},
        xlabel=f"accuracy on {query} queries",
        ax=axes[0, 0],
    )
    return figure


def phases_figure(vlm: VLM, world: Mapping[str, Task], settings: Settings) -> Figure:
    """Logit lens at the last token of few-shot prompts, text beside images."""
    figure, axes = figures.panels(1, 2, width=WIDE, height=2.4)
    for ax, modality in zip(axes.flat, MODALITIES, strict=True):
        found = []
        for name, task in world.items():
            draws = draw_exemplars(task, settings.n_shots, seed=settings.seeds[0])
            prompts, items = few_shot_prompts(draws, modality), [draw.query for draw in draws]
            word = TASK_WORDS.get(name, name.split("-")[-1])
            found.append(analyses.answer_phases(vlm, prompts, items, word))
        figures.lens_phases({phase: torch.cat([f[phase] for f in found]).numpy() for phase in found[0]}, ax=ax)
        ax.set_title(f"{modality} examples")
    return figure


def map_figure(vlm: VLM, world: Mapping[str, Task], bank: Bank, layer: int, settings: Settings) -> Figure:
    """t-SNE of mean context embeddings beside task vectors, one point per prompt."""
    contexts, vectors, names, modalities = [], [], [], []
    for name, task in world.items():
        draws = draw_exemplars(task, settings.n_shots, seed=settings.seeds[0], split="validation")
        for modality in MODALITIES:
            contexts.append(analyses.context_embeddings(vlm, few_shot_prompts(draws, modality)))
            vectors.append(bank[name][modality][0].per_prompt[:, layer])
            names += [name] * len(draws)
            modalities += [modality] * len(draws)
    figure, axes = figures.panels(1, 2, width=WIDE, height=2.4)
    for ax, title, parts in zip(axes.flat, ("context embeddings", "task vectors"), (contexts, vectors), strict=True):
        points = TSNE(init="pca", random_state=0, perplexity=20).fit_transform(torch.cat(parts).numpy())
        figures.embedding_scatter(points, names, modalities, legend=title == "task vectors", ax=ax)
        ax.set_title(title)
    return figure


def similarity_figure(world: Mapping[str, Task], bank: Bank, layer: int) -> Figure:
    """Cosine of text vectors with image and instruction vectors, each side's mean taken out."""
    figure, axes = figures.panels(1, 2, width=WIDE, height=2.4)
    short = [name.split("-")[-1] for name in world]
    text = vectors_of(bank, "text")
    for ax, other in zip(axes.flat, ("image", "instruction"), strict=True):
        matrix = similarity(text, vectors_of(bank, other), layer, center=True)
        figures.similarity_matrix(matrix.numpy(), short, short, ax=ax)
        ax.set_title(f"text (rows) and {other} (columns)")
    return figure


def ensemble_figure(
    vlm: VLM,
    world: Mapping[str, Task],
    bank: Bank,
    results: Sequence[Result],
    layer: int,
    settings: Settings,
) -> Figure:
    """Accuracy on image queries by the number of text examples behind the vector."""
    smallest = min(by_spec["text"][0].n_prompts for by_spec in bank.values())
    sizes = list(range(1, min(6, smallest) + 1))
    curves: dict[str, list[np.ndarray]] = {}
    for name, task in world.items():
        found = analyses.ensemble_curve(
            vlm, query_prompts(task.test, "image"), task.test, bank[name]["text"], bank[name]["instruction"][0],
            layer, sizes, settings.seeds,
        )  # fmt: skip
        for label, accuracy in found.items():
            curves.setdefault(label, []).append(accuracy.numpy())
    alone = float(stacked(results, "instruction", "image", list(world))[:, layer].mean())
    figure, axes = figures.panels(1, 1)
    figures.sample_efficiency(
        [settings.n_shots * size for size in sizes],
        {label: np.mean(values, axis=0) for label, values in curves.items()},
        references={"instruction alone": alone},
        ax=axes[0, 0],
    )
    return figure
