"""Which heads mediate the task in text and in image prompts, how far the two sets agree, and whether they stand in.

Source: Todd et al. 2024, section 2.3 (indirect effects of heads). The corrupt prompts are queries without examples,
since the small model knows a task by the kind of its labels, which shuffling keeps.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import matplotlib
import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from torch import Tensor

import interp
from interp import figures, patching, tables
from interp.cross_modal import MODALITIES
from interp.errors import InputError
from interp.metrics import mean_bootstrap_interval
from interp.patching.contrasts import task_pairs, vision_model
from interp.patching.head_vectors import HeadOutputs
from interp.patching.heads import Head
from interp.patching.metric import measure
from interp.progress import track
from interp.prompts import XTV
from interp.runs import Run
from interp.task_prompts import few_shot_prompts, query_prompts
from interp.tasks import Task, draw_exemplars

QUERY, PROMPT, RANDOM = "query alone", "examples in the prompt", "random heads"
RESAMPLES = 500
LINEAR = 0.01  # effects below this are drawn to scale

Outputs = Mapping[str, Mapping[str, HeadOutputs]]


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME, a local folder, or a Hub id.")] = "zoo:tiny-llava",
    tasks: Annotated[str, typer.Option(help="Of the world that ships, with commas; empty: the paper's six.")] = "",
    prompts: Annotated[int, typer.Option(min=2, help="Queries of each task and modality, for each measurement.")] = 12,
    shots: Annotated[int, typer.Option(min=1, help="Examples per prompt.")] = 5,
    heads: Annotated[int, typer.Option(min=1, help="How many heads make a set.")] = 8,
    controls: Annotated[int, typer.Option(min=1, help="Random sets of heads.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of examples, random sets and intervals.")] = 0,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Measure every head's indirect effect in both modalities, compare, and put each set into the other's queries."""
    config = {name: value for name, value in locals().items() if name != "out"}
    chosen, vlm = [task for task, _ in task_pairs(tasks).values()], vision_model(model)
    n_heads = vlm.n_layers * vlm.n_heads
    if heads >= n_heads:
        raise InputError(f"--heads {heads}: {model} has {n_heads} heads, and a set has to leave some out")
    fewest = min(len(task.test) for task in chosen)
    if prompts > fewest:
        raise InputError(f"--prompts {prompts}: the smallest of the tasks has {fewest} queries")
    with Run.create("head-mediation", config, root=out, seed=[seed]) as folder:
        found, outputs = mediate(vlm, chosen, prompts, shots, seed)
        effects = {modality: one.mean(normalised=False) for modality, one in found.items()}
        sets = {modality: patching.strongest_heads(one, heads) for modality, one in effects.items()}
        transfer = put(vlm, chosen, sets, outputs, prompts, shots, controls, seed)
        agreed = agreement(found, sets, n_heads, seed)
        by_modality = [one.to_dataframe().assign(modality=modality) for modality, one in found.items()]
        folder.save_table("effects", pd.concat(by_modality, ignore_index=True))
        folder.save_table("agreement", agreed)
        folder.save_table("transfer", transfer)
        folder.save_json("heads", {modality: [list(head) for head in one] for modality, one in sets.items()})
        folder.save_figure("effects-by-head", effects_figure(found, agreed))
        folder.save_figure("transfer-of-sets", transfer_figure(transfer))
        show(agreed, transfer, f"sets of {heads} of {n_heads} heads, n = {prompts} queries of each task")
        typer.echo(f"\nTables and figures: {folder.folder}")


def mediate(
    vlm: interp.VLM, tasks: Sequence[Task], n: int, shots: int, seed: int
) -> tuple[dict[str, patching.PatchingResult], dict[str, dict[str, HeadOutputs]]]:
    """Indirect effects over the queries of all tasks, and the mean outputs of heads by modality and task."""
    found: dict[str, patching.PatchingResult] = {}
    outputs: dict[str, dict[str, HeadOutputs]] = {modality: {} for modality in MODALITIES}
    for modality in MODALITIES:
        effects, random = [], []
        for index, task in enumerate(track(tasks, f"{modality} heads")):
            made = patching.mediation_prompts(
                vlm, task, modality, n_shots=shots, n_task=n, n_shuffled=n, corruption="remove", template=XTV, seed=seed
            )
            mean = outputs[modality][task.name] = patching.head_outputs(vlm, made.task)
            queries = vlm.prepare(list(made.shuffled))
            metric = patching.probability(vlm, made.answers, inputs=queries)
            # Random vectors of their own for each task and modality, so that these share nothing by it.
            draw = seed + index + len(tasks) * MODALITIES.index(modality)
            one = patching.mediation(vlm, queries, mean, metric, seed=draw, progress=False)
            effects.append(one.values - one.corrupt)
            random.append(one.controls["random vector"] - one.corrupt)
        found[modality] = patching.PatchingResult(
            "mediation",
            "change of the probability",
            torch.cat(effects, dim=-1),
            one.axes,
            controls={"random vector": torch.cat(random, dim=-1)},
            about={"tasks": [task.name for task in tasks], "modality": modality, "seed": seed},
        )
    return found, outputs


def agreement(
    found: Mapping[str, patching.PatchingResult], sets: Mapping[str, Sequence[Head]], n_heads: int, seed: int
) -> pd.DataFrame:
    """The rank correlation of the two modalities' effects, and how far the strongest heads overlap."""
    text, image = (found[modality].values for modality in MODALITIES)
    between = patching.rank_correlation(text.mean(-1), image.mean(-1), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(RESAMPLES):
        means = [one[..., torch.randint(one.shape[-1], (one.shape[-1],), generator=generator)].mean(-1)
                 for one in (text, image)]  # fmt: skip
        drawn.append(patching.rank_correlation(*means, n_permutations=1).rho)
    low, high = np.quantile(drawn, [0.025, 0.975])
    shared = patching.overlap(*(sets[modality] for modality in MODALITIES), n_heads)
    # How alike heads are to whatever is put into them: what the outputs that carry the task have to exceed.
    random = [found[modality].control("random vector", False) for modality in MODALITIES]
    alike = patching.rank_correlation(*random, seed=seed)
    k = len(sets["text"])
    both = patching.overlap(*(patching.strongest_heads(one, k) for one in random), n_heads)
    nothing = {"low": None, "high": None}
    return pd.DataFrame(
        [
            {"measure": "rank correlation", "value": between.rho, "low": low, "high": high, "by chance": 0.0,
             "p": between.p},
            {"measure": f"shared of {k} heads", "value": float(shared.shared), **nothing,
             "by chance": shared.expected, "p": shared.p},
            {"measure": "rank correlation, random vectors", "value": alike.rho, **nothing, "by chance": 0.0,
             "p": alike.p},
            {"measure": f"shared of {k} heads, random vectors", "value": float(both.shared), **nothing,
             "by chance": both.expected, "p": both.p},
        ]
    )  # fmt: skip


def put(
    vlm: interp.VLM,
    tasks: Sequence[Task],
    sets: Mapping[str, Sequence[Head]],
    outputs: Outputs,
    n: int,
    shots: int,
    n_controls: int,
    seed: int,
) -> pd.DataFrame:
    """Put either set, with either modality's outputs, into queries about held-out things of either modality."""
    rows = []
    for query in MODALITIES:
        by_task: dict[str, list[Tensor]] = {}
        for task in track(tasks, f"{query} queries"):
            draws = draw_exemplars(task, shots, seed=seed)[:n]
            inputs = vlm.prepare(query_prompts([draw.query for draw in draws], query, template=XTV))
            answers = [draw.query.output for draw in draws]
            metric = patching.probability(vlm, answers, inputs=inputs)
            given = {modality: outputs[modality][task.name] for modality in MODALITIES}
            one = patching.put_heads(vlm, inputs, sets, given, metric, n_controls=n_controls, seed=seed, progress=False)
            prompt = vlm.prepare(few_shot_prompts(draws, query, template=XTV))
            scores = {PROMPT: measure(vlm, prompt, [[]], metric, progress=False)[0][0]}
            for set_, its in enumerate(one.axes["heads"]):
                for source, theirs in enumerate(one.axes["outputs"]):
                    scores[f"{its} heads, {theirs} outputs"] = one.values[set_, source]
            # A random set is as large as either; which of the two it stands for makes no difference.
            scores |= {f"{RANDOM}, {theirs} outputs": one.controls["random heads"][:, :, source].mean(dim=(0, 1))
                       for source, theirs in enumerate(one.axes["outputs"])}  # fmt: skip
            assert one.corrupt is not None
            scores[QUERY] = one.corrupt
            for condition, values in scores.items():
                by_task.setdefault(condition, []).append(values)
        for condition, values in by_task.items():
            interval = mean_bootstrap_interval([one.numpy() for one in values], seed=seed)
            means = {task.name: float(one.mean()) for task, one in zip(tasks, values, strict=True)}
            rows.append({"queries": query, "condition": condition, "probability": interval.mean, "low": interval.low,
                         "high": interval.high, **means})  # fmt: skip
    return pd.DataFrame(rows)


def effects_figure(found: Mapping[str, patching.PatchingResult], agreed: pd.DataFrame) -> Figure:
    """Maps of both modalities beside each other, and one against the other, a dot for each head."""
    some = found["text"]
    effects = {modality: one.mean(False) for modality, one in found.items()}
    random = {modality: one.control("random vector", False) for modality, one in found.items()}
    figure, axes = figures.panels(1, 2, width=7.2, height=2.8)
    both = torch.stack([effects[modality] for modality in MODALITIES])
    names = some.axes["layer"], some.axes["head"]
    figures.effect_map(both, *names, panels=[f"{m} prompts" for m in MODALITIES], xlabel="head", ylabel="layer",
                       label="change of the answer's probability", lower=True, annotate=both.numel() <= 80,
                       ax=axes[0, 0])  # fmt: skip
    row = agreed.iloc[0]
    ax = axes[0, 1]
    with figures.style():
        ax.scatter(random["text"].flatten(), random["image"].flatten(), s=14, facecolors="none", edgecolors="#8C8C8C",
                   linewidths=0.7, label="random", zorder=2)  # fmt: skip
        for layer, colour in enumerate(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(names[0])))):
            ax.scatter(effects["text"][layer], effects["image"][layer], s=16, color=colour, linewidths=0,
                       label=names[0][layer], zorder=3)  # fmt: skip
        ax.axhline(0, color="#B4B4B4", linewidth=0.6, zorder=1)
        ax.axvline(0, color="#B4B4B4", linewidth=0.6, zorder=1)
        for scale in (ax.set_xscale, ax.set_yscale):
            # One head outdoes the others by far: small effects are drawn to scale, large ones by their logarithm.
            scale("symlog", linthresh=LINEAR, linscale=1.0)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(FixedLocator([-0.1, -LINEAR, 0, LINEAR, 0.1, 1]))
            axis.set_major_formatter("{x:g}")
        ends = torch.cat([both.flatten(), torch.stack(list(random.values())).flatten()])
        low, high = 1.4 * min(float(ends.min()), -LINEAR), 1.6 * max(float(ends.max()), LINEAR)
        ax.set(xlabel="effect in text prompts", ylabel="effect in image prompts", xlim=(low, high), ylim=(low, high))
        ax.legend(title="layer", loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.1, labelspacing=0.25)
        ax.set_title(f"rank correlation {row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f}), "
                     f"n = {some.n_examples}")  # fmt: skip
    return figure


def transfer_figure(transfer: pd.DataFrame) -> Figure:
    """One bar for each set, source of outputs and control, beside each other for text and for image queries."""
    figure, axes = figures.panels(1, len(MODALITIES), width=7.0, height=2.2)
    with figures.style():
        for ax, (query, rows) in zip(axes.flat, transfer.groupby("queries", sort=False), strict=True):
            by = rows.set_index("condition")
            by_task = [name for name in by.columns if name not in ("queries", "probability", "low", "high")]
            figures.condition_bars(
                {name: row[by_task].astype(float).to_numpy() for name, row in by.iterrows()},
                intervals={name: (row["low"], row["high"]) for name, row in by.iterrows()},
                kinds={name: kind_of(str(name)) for name in by.index},
                xlabel="probability of the answer",
                ax=ax,
            )
            ax.get_legend().remove()
            ax.set_title(f"{query} queries (dots: tasks)")
            if ax is not axes[0, 0]:
                ax.set_yticklabels([])
    return figure


def kind_of(condition: str) -> str:
    """What colours a bar."""
    if condition in (PROMPT, QUERY):
        return "no patch"
    return "control" if condition.startswith(RANDOM) else "heads patched"


def show(agreed: pd.DataFrame, transfer: pd.DataFrame, title: str) -> None:
    """Print how far the modalities agree, and what each set does for the queries of either."""
    rows = [
        [row["measure"], row["value"], "" if pd.isna(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}",
         row["by chance"], f"{row['p']:.1g}"]
        for row in agreed.to_dict("records")
    ]  # fmt: skip
    tables.show(["text against image", "value", "95 % interval", "by chance", "p"], rows, title=title)
    for query, part in transfer.groupby("queries", sort=False):
        intervals = [f"{low:.2f} to {high:.2f}" for low, high in zip(part["low"], part["high"], strict=True)]
        rows = [list(row) for row in zip(part["condition"], part["probability"], intervals, strict=True)]
        tables.show([f"{query} queries", "probability of the answer", "95 % interval"], rows)
