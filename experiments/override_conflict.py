"""Override: a task vector against an instruction that asks for another task; which of the two answers wins, and where.

Source: Luo et al. 2025, section on overriding; Hendel et al. 2023, section 5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure

import interp
from interp import figures, patching, tables
from interp.cross_modal import MODALITIES
from interp.patching.contrasts import Contrast, contrasts, task_pairs, vision_model
from interp.progress import track
from interp.runs import Run
from interp.task_vectors import from_examples, from_instruction, random_like
from interp.tasks import Task
from interp.transfer import score_patches

Vectors = Mapping[str, interp.TaskVectors]
VECTORS = ("text examples", "image examples", "instruction")


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME, a local folder, or a Hub id.")] = "zoo:tiny-llava",
    tasks: Annotated[str, typer.Option(help="Of the world that ships, with commas; empty: the paper's six.")] = "",
    prompts: Annotated[int, typer.Option(min=1, help="Conflicting prompts of each task, in each modality.")] = 8,
    shots: Annotated[int, typer.Option(min=1, help="Examples per prompt that vectors are read from.")] = 5,
    controls: Annotated[int, typer.Option(min=1, help="Random vectors.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of examples, queries, random vectors and intervals.")] = 0,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Patch task vectors at every layer under a conflicting instruction; draw and print how often they win."""
    config = {name: value for name, value in locals().items() if name != "out"}
    chosen, vlm = task_pairs(tasks), vision_model(model)
    with Run.create("override-conflict", config, root=out, seed=[seed]) as folder:
        vectors = {name: read(vlm, task, shots, seed) for name, (task, _) in track(list(chosen.items()), "vectors")}
        found, answered = {}, {}
        for modality in MODALITIES:
            pairs = contrasts(vlm, chosen, modality, n=prompts, n_shots=1, seed=seed, context="instruction")
            found[modality] = joined([differences(vlm, pairs, *one, controls, seed) for one in vectors.items()])
            answered[modality] = joined([answers(vlm, pairs, *one, controls, seed) for one in vectors.items()])
            found[modality].save(folder.folder / f"{modality}-logit-differences")
        for name, results in (("logit-differences", found), ("answers", answered)):
            parts = [one.to_dataframe(seed=seed).assign(queries=modality) for modality, one in results.items()]
            folder.save_table(name, pd.concat(parts, ignore_index=True))
        folder.save_figure("answers-by-layer", draw(answered, seed))
        for modality, one in answered.items():
            show(one, found[modality], modality)
        typer.echo(f"\nTables and figure: {folder.folder}")


def read(vlm: interp.VLM, task: Task, shots: int, seed: int) -> dict[str, interp.TaskVectors]:
    """The task's vectors, by what they are read from."""
    by_examples = [from_examples(vlm, task, modality, n_shots=shots, seed=seed) for modality in MODALITIES]
    return dict(zip(VECTORS, [*by_examples, from_instruction(vlm, task)], strict=True))


def differences(
    vlm: interp.VLM, pairs: Contrast, task: str, vectors: Vectors, n_controls: int, seed: int
) -> patching.PatchingResult:
    """Logit of the vector's answer less that of the prompt's; normalised, 1 is a prompt of the vector's task."""
    rows = rows_of(pairs, task)
    asked, own = (vlm.prepare([side[row] for row in rows]) for side in (pairs.corrupt, pairs.clean))
    wanted, wrong = ([side[row] for row in rows] for side in (pairs.answers, pairs.wrong))
    return patching.override(vlm, asked, vectors, wanted, wrong, reference=own, n_controls=n_controls, seed=seed,
                             progress=False)  # fmt: skip


def answers(
    vlm: interp.VLM, pairs: Contrast, task: str, vectors: Vectors, n_controls: int, seed: int
) -> patching.PatchingResult:
    """Whether the model gives the vector's answer, by the first token."""
    rows = rows_of(pairs, task)
    # The same random vectors as of the logit differences.
    random = [random_like(one, seed=seed + draw * len(vectors) + k) for draw in range(n_controls)
              for k, one in enumerate(vectors.values())]  # fmt: skip
    scores = score_patches(vlm, [pairs.corrupt[row] for row in rows], [pairs.items[row] for row in rows],
                           [*vectors.values(), *random])  # fmt: skip
    right = scores.prefix.float()
    axes = {"vector": tuple(vectors), "layer": tuple(map(str, range(vlm.n_layers)))}
    controls = {"random vector": right[len(vectors) :].reshape(n_controls, len(vectors), *right.shape[1:])}
    return patching.PatchingResult("override", "the vector's answer", right[: len(vectors)], axes, controls=controls)


def rows_of(pairs: Contrast, task: str) -> list[int]:
    """The examples of one task."""
    return [row for row, name in enumerate(pairs.tasks) if name == task]


def joined(parts: Sequence[patching.PatchingResult]) -> patching.PatchingResult:
    """The examples of all tasks in one result."""

    def cat(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        return None if tensors[0] is None else torch.cat(list(tensors), dim=-1)

    controls = {name: cat([part.controls[name] for part in parts]) for name in parts[0].controls}
    ends = {name: cat([getattr(part, name) for part in parts]) for name in ("values", "clean", "corrupt")}
    return replace(parts[0], **ends, controls=controls)


def draw(answered: Mapping[str, patching.PatchingResult], seed: int) -> Figure:
    """A line for each kind of vector over the layers, beside each other for text and image queries."""
    figure, axes = figures.panels(1, len(answered), width=6.8, height=2.3)
    with figures.style():
        for ax, (modality, one) in zip(axes.flat, answered.items(), strict=True):
            ends = one.interval(seed=seed, normalised=False) if one.n_examples > 1 else None
            names = one.axes["vector"]
            curves = {name: one.mean(False)[row].numpy() for row, name in enumerate(names)}
            bands = ends and {name: [ends.low[row].numpy(), ends.high[row].numpy()] for row, name in enumerate(names)}
            curves["random vector"] = one.control("random vector", False).mean(dim=0).numpy()
            figures.accuracy_by_layer(curves, bands=bands, ylabel="gives the vector's answer", ax=ax)
            ax.set_title(f"{modality} queries, n = {one.n_examples}")
    return figure


def show(answered: patching.PatchingResult, found: patching.PatchingResult, modality: str) -> None:
    """Print each kind of vector at the layer where the model most often gives its answer."""
    table = answered.to_dataframe().assign(difference=found.to_dataframe()["normalised"])
    rows = []
    for vector, cells in table.groupby("vector", sort=False):
        best = cells.loc[cells["value"].idxmax()]
        wins = [str(layer) for layer in cells.loc[cells["value"] > 0.5, "layer"]]
        # One example has no interval.
        interval = f"{best['low']:.2f} to {best['high']:.2f}" if answered.n_examples > 1 else None
        rows.append([vector, best["layer"], float(best["value"]), interval,
                     float(best["control random vector"]), float(best["difference"]), " ".join(wins)])  # fmt: skip
    columns = [f"{modality} queries", "best layer", "its answer", "95 % interval", "random vector",
               "logit difference (1: its own prompt)", "wins at layers"]  # fmt: skip
    tables.show(columns, rows, title=f"task vector against a conflicting instruction, n = {answered.n_examples}")
