"""Phases of the answer: what the last token of a few-shot prompt decodes to, layer by layer, in text and in images.

Source: Luo et al. 2025, figure on the phases of the answer token: input, then task, then answer.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure

import interp
from interp import figures, patching, tables
from interp.cross_modal import MODALITIES
from interp.errors import InputError
from interp.metrics import first_token_ids
from interp.patching.contrasts import task_pairs, vision_model
from interp.runs import Run
from interp.task_prompts import few_shot_prompts
from interp.tasks import Draw, Modality, Task, draw_exemplars

# The words that stand for the task (the paper's choice); of other tasks, what the name ends in.
WORDS = {"animal-latin": "species", "animal-young": "baby"}


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME, a local folder, or a Hub id.")] = "zoo:tiny-llava",
    tasks: Annotated[str, typer.Option(help="Of the world that ships, with commas; empty: the paper's six.")] = "",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each task, in each modality.")] = 24,
    shots: Annotated[int, typer.Option(min=1, help="Examples per prompt.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of examples, random vectors and intervals.")] = 0,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Decode the last token at every layer; draw the probability of input, task and answer, print where each peaks."""
    config = {name: value for name, value in locals().items() if name != "out"}
    chosen, vlm = [task for task, _ in task_pairs(tasks).values()], vision_model(model)
    for task in chosen:
        fit = len(queries(vlm, task, shots, seed))
        if prompts > fit:
            raise InputError(f"--prompts {prompts}: {task.name!r} has {fit} queries whose answer does not begin like "
                             "the input")  # fmt: skip
    with Run.create("answer-phases", config, root=out, seed=[seed]) as folder:
        found = {modality: decode(vlm, chosen, modality, prompts, shots, seed) for modality in MODALITIES}
        by_modality = [one.to_dataframe(seed=seed).assign(modality=modality) for modality, one in found.items()]
        table = pd.concat(by_modality, ignore_index=True)
        folder.save_table("phases", table)
        folder.save_figure("phases-by-layer", draw(found, seed))
        folder.save_figure("phases-on-a-log-scale", draw_small(found, seed))
        rows = []
        for modality, one in found.items():
            for phase, layer in patching.peaks(one).items():
                is_peak = (table["modality"] == modality) & (table["phase"] == phase) & (table["layer"] == str(layer))
                peak = table[is_peak].iloc[0]
                # One example has no interval.
                interval = f"{peak['low']:.4f} to {peak['high']:.4f}" if one.n_examples > 1 else None
                rows.append([modality, phase, layer, f"{peak['value']:.4f}", interval,
                             f"{peak['control random vector']:.4f}"])  # fmt: skip
        columns = ["examples", "phase", "peaks at layer", "probability", "95 % interval", "random vector"]
        tables.show(columns, rows, title=f"{vlm.n_layers} layers, {prompts} prompts of each of {len(chosen)} tasks")
        typer.echo(f"\nTable and figures: {folder.folder}")


def queries(vlm: interp.VLM, task: Task, shots: int, seed: int) -> list[Draw]:
    """Those whose answer begins with another token than the input, without which the phases cannot be told apart."""
    draws = draw_exemplars(task, shots, seed=seed)
    ids = [(first_token_ids(vlm.tokenizer, "Q:", draw.query.input)[0],
            first_token_ids(vlm.tokenizer, "A:", draw.query.output)[0]) for draw in draws]  # fmt: skip
    return [draw for draw, (first, second) in zip(draws, ids, strict=True) if first != second]


def decode(
    vlm: interp.VLM, tasks: Sequence[Task], modality: Modality, n: int, shots: int, seed: int
) -> patching.PatchingResult:
    """The logit lens at the last token, over the prompts of all tasks."""
    parts = []
    for task in tasks:
        draws = queries(vlm, task, shots, seed)[:n]
        word = WORDS.get(task.name, task.name.split("-")[-1])
        tokens = {
            # In the middle of a text: what precedes decides whether the first token carries a space.
            "input": [first_token_ids(vlm.tokenizer, "Q:", draw.query.input)[0] for draw in draws],
            "task": first_token_ids(vlm.tokenizer, "The", " " + word) * len(draws),
            "answer": [first_token_ids(vlm.tokenizer, "A:", draw.query.output)[0] for draw in draws],
        }
        parts.append(patching.lens(vlm, vlm.prepare(few_shot_prompts(draws, modality)), tokens, seed=seed))
    about = {"tasks": [task.name for task in tasks], "modality": modality, "seed": seed}
    random = torch.cat([part.controls["random vector"] for part in parts], dim=-1)
    values = torch.cat([part.values for part in parts], dim=-1)
    return patching.PatchingResult(parts[0].name, parts[0].metric, values, parts[0].axes,
                                   controls={"random vector": random}, about=about)  # fmt: skip


def draw(found: Mapping[str, patching.PatchingResult], seed: int) -> Figure:
    """Text examples beside image examples; the middle half of the prompts as bands."""
    figure, axes = figures.panels(1, len(found), width=6.8, height=2.3)
    with figures.style():
        for ax, (modality, one) in zip(axes.flat, found.items(), strict=True):
            by_phase = {phase: values.T.numpy() for phase, values in zip(one.axes["phase"], one.values, strict=True)}
            random = one.control("random vector", False).mean(dim=0)
            figures.lens_phases(by_phase | {"random": random.numpy()}, ax=ax)
            ax.set_title(f"{modality} examples, n = {one.n_examples} prompts")
    return figure


def draw_small(found: Mapping[str, patching.PatchingResult], seed: int) -> Figure:
    """The same means in their intervals on a scale that shows small ones; dashed, random vectors for every phase."""
    figure, axes = figures.panels(1, len(found), width=6.8, height=2.5)
    with figures.style():
        for ax, (modality, one) in zip(axes.flat, found.items(), strict=True):
            layers = range(one.sizes["layer"])
            ends = one.interval(seed=seed, normalised=False) if one.n_examples > 1 else None
            random = one.control("random vector", False)
            for row, (phase, colour) in enumerate(zip(one.axes["phase"], figures.COLOURS, strict=False)):
                ax.plot(layers, one.mean(False)[row], color=colour, label=phase)
                ax.plot(layers, random[row], color=colour, linestyle="--", linewidth=0.9,
                        label=f"{phase}, random vector")  # fmt: skip
                if ends:
                    ax.fill_between(layers, ends.low[row], ends.high[row], color=colour, alpha=0.18, linewidth=0)
            ax.set_yscale("log")
            ax.set(xlabel="layer", ylabel="mean probability", xticks=list(layers)[:: -(-len(layers) // 16)])
            ax.grid(axis="y")
            ax.set_title(f"{modality} examples, n = {one.n_examples} prompts")
        lows, highs = zip(*(ax.get_ylim() for ax in axes.flat), strict=True)
        for ax in axes.flat:
            ax.set_ylim(min(lows), max(highs))
        axes.flat[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
