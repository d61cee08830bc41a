"""Where the image crosses to the text: attention knockout between image, task and text tokens, in windows of layers.

And what the last token reads from each patch of the image alone, drawn on the images.

Source: Geva et al. 2023, section 4 (windows of cut edges around each layer), with an image in place of the subject.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Annotated, Any

import pandas as pd
import typer
from matplotlib.figure import Figure

import interp
from interp import figures, patching, tables
from interp.errors import InputError, UnknownNameError, nearest
from interp.patching.contrasts import Contrast, contrasts, task_pairs, vision_model
from interp.patching.knockout import windows_of
from interp.patching.metric import MetricFunction
from interp.runs import Run

EDGES = ("image -> last", "image -> answer mark", "answer mark -> last", "task -> last", "task -> answer mark",
         "task -> image")  # fmt: skip
ALL = "all"
CONTROLS = 3  # draws of random tokens
SHOWN = 6  # images that are drawn
# What an instruction prompt holds: "The capital city of the country" ":" "\n" "Q:" image "\nA" ":".
GROUPS = {
    "task": ["instruction[0]", "delimiter[0]", "separator[0]"],
    "image": "image[0]",
    "answer mark": "joint[0]",
    "last": "last",
}


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME, a local folder, or a Hub id.")] = "zoo:tiny-llava",
    tasks: Annotated[str, typer.Option(help="Of the world that ships, with commas; empty: the paper's six.")] = "",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 8,
    window: Annotated[int, typer.Option(min=1, help="Layers that are cut together, around each layer.")] = 3,
    edges: Annotated[str, typer.Option(help="Such as 'image -> last, task -> last'; empty: six.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of queries and of random tokens.")] = 0,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Cut attention between groups of tokens in every window of layers; draw and print how far the answer falls."""
    config = {name: value for name, value in locals().items() if name != "out"}
    chosen, vlm = task_pairs(tasks), vision_model(model)
    if window > vlm.n_layers:
        raise InputError(f"--window {window}: {model} has {vlm.n_layers} layers")
    named = parsed(edges)
    with Run.create("image-crossing", config, root=out, seed=[seed]) as folder:
        pairs = contrasts(vlm, chosen, "image", n=prompts, n_shots=1, seed=seed, context="instruction")
        inputs = vlm.prepare(list(pairs.clean))
        metric = patching.log_probability(vlm, pairs.answers, inputs=inputs)
        windows = windows_of(vlm.n_layers, window) | {ALL: range(vlm.n_layers)}
        cut = patching.knockout(vlm, inputs, named, metric, windows=windows, groups=GROUPS, n_controls=CONTROLS,
                                seed=seed)  # fmt: skip
        cut.save(folder.folder / "log-probabilities")
        fallen = falls(cut)
        folder.save_table("falls", fallen.to_dataframe(seed=seed))
        folder.save_figure("falls-by-layer", draw(fallen, window, seed))
        alone = single_patches(vlm, inputs, metric, seed)
        folder.save_table("patches", alone.to_dataframe(examples=True).assign(**about(pairs, alone)))
        folder.save_figure("patches-on-images", draw_patches(pairs, alone))
        show(cut, fallen, window)
        show_patches(alone)
        typer.echo(f"\nTables and figures: {folder.folder}")


def parsed(edges: str) -> list[str]:
    """Edges between the known groups of tokens.

    Raises:
        InputError: a word that is no edge.
        UnknownNameError: an end that is no group.
    """
    named = [word.strip() for word in edges.split(",") if word.strip()] or list(EDGES)
    for edge in named:
        ends = [end.strip() for end in edge.split("->")]
        if len(ends) != 2:
            raise InputError(f"--edges: {edge!r} is no edge: write 'source -> target', such as 'image -> last'")
        for end in ends:
            if end not in GROUPS:
                hint = nearest(end, GROUPS)
                raise UnknownNameError(f"--edges: no group {end!r}. {hint} Groups: {', '.join(GROUPS)}")
    return named


def single_patches(
    vlm: interp.VLM, inputs: Mapping[str, Any], metric: MetricFunction, seed: int
) -> patching.PatchingResult:
    """Leave the last token one image token alone, in all layers: 0 is an answer without the image, 1 with all of it."""
    grid = patching.image_patches(vlm, inputs)
    every = {place for patch in grid.groups for place in patch.of or ()}
    sources = {patch.name: replace(patch, of=tuple(sorted(every - set(patch.of or ())))) for patch in grid.groups}
    whole = grid.groups[0].at
    edges = [(group, "last") for group in sources.values()] + [(whole, "last")]
    cut = patching.knockout(vlm, inputs, edges, metric, windows={ALL: range(vlm.n_layers)}, n_controls=CONTROLS,
                            seed=seed)  # fmt: skip
    n = len(sources)
    controls = {"random tokens cut": cut.controls["random tokens"][:, :n, 0]}
    described = {"grid": {"image": grid.image, "rows": grid.rows, "columns": grid.columns}}
    return patching.PatchingResult("single patches", cut.metric, cut.values[:n, 0], {"position": tuple(sources)},
                                   clean=cut.clean, corrupt=cut.values[n, 0], controls=controls,
                                   about=described)  # fmt: skip


def about(pairs: Contrast, alone: patching.PatchingResult) -> dict[str, list[str]]:
    """What the rows of the table of patches ask about."""
    n_patches = alone.sizes["position"]
    return {"task": list(pairs.tasks) * n_patches, "input": [item.input for item in pairs.items] * n_patches,
            "answer": pairs.answers * n_patches}  # fmt: skip


def draw_patches(pairs: Contrast, alone: patching.PatchingResult) -> Figure:
    """The first images of every task with what each of their patches tells by itself."""
    by_task: dict[str, list[int]] = {}
    for row, task in enumerate(pairs.tasks):
        by_task.setdefault(task, []).append(row)
    in_turn = [row for rows in zip_longest(*by_task.values()) for row in rows if row is not None][:SHOWN]
    grid, shares = alone.about["grid"], alone.normalised()
    figure, axes = figures.panels(1, len(in_turn), width=1.15 * len(in_turn) + 0.6, height=1.75)
    with figures.style():
        for ax, row in zip(axes.flat, in_turn, strict=True):
            heat = shares[:, row].reshape(grid["rows"], grid["columns"])
            figures.image_heat(pairs.clean[row].images[0], heat, limits=(0.0, 1.0), annotate=heat.numel() <= 16,
                               label="answer from one\nimage token alone", frame=False, opacity=0.55,
                               bar=row == in_turn[-1], ax=ax)  # fmt: skip
            ax.set_title(f"{pairs.tasks[row]}\n{pairs.items[row].input} → {pairs.items[row].output}", fontsize=6)
    return figure


def show_patches(alone: patching.PatchingResult) -> None:
    """Print what each image token tells by itself, row by row of the image."""
    grid, means = alone.about["grid"], patching.image_map(alone)
    columns = [f"column {column}" for column in range(grid["columns"])]
    rows = [[f"row {row}", *map(float, values)] for row, values in enumerate(means)]
    title = f"the answer from one image token alone (0: from none, 1: from all), n = {alone.n_examples}"
    tables.show(["one image token alone", *columns], rows, title=title)


def falls(cut: patching.PatchingResult) -> patching.PatchingResult:
    """How much the log-probability of the answer fell by every knockout, and by that of as many random tokens."""
    controls = {name: cut.clean - values for name, values in cut.controls.items()}
    metric = "fall of the log-probability"
    return replace(cut, metric=metric, values=patching.drops(cut), clean=None, controls=controls)


def draw(fallen: patching.PatchingResult, window: int, seed: int) -> Figure:
    """A line for each edge over the layers, in its interval, and a dashed one for as many random tokens."""
    layers = [layer for layer in fallen.axes["layer"] if layer != ALL]
    n = len(layers)
    ends = fallen.interval(seed=seed, normalised=False) if fallen.n_examples > 1 else None
    lines: Mapping[str, int] = {edge.replace("->", "→"): row for row, edge in enumerate(fallen.axes["edge"])}
    curves = {edge: fallen.mean(False)[row, :n].numpy() for edge, row in lines.items()}
    bands = ends and {edge: [ends.low[row, :n].numpy(), ends.high[row, :n].numpy()] for edge, row in lines.items()}
    random = fallen.control("random tokens", False)[:, :n]
    figure, axes = figures.panels(1, 1, width=4.6, height=2.6)
    with figures.style():
        figures.accuracy_by_layer(curves, bands=bands, layers=[int(layer) for layer in layers], ylim=None,
                                  ylabel="fall of log-probability (nats)", ax=axes[0, 0])  # fmt: skip
        axes[0, 0].set_xlabel(f"middle of a window of {window} layers" if window > 1 else "layer")
        for line, control in zip(list(axes[0, 0].lines), random, strict=True):
            axes[0, 0].plot(range(n), control, color=line.get_color(), linestyle="--", linewidth=0.9, zorder=2)
        axes[0, 0].set_title(f"attention cut, n = {fallen.n_examples} image queries (dashed: random tokens cut)",
                             loc="left")  # fmt: skip
    return figure


def show(cut: patching.PatchingResult, fallen: patching.PatchingResult, window: int) -> None:
    """Print where each edge matters most, and what cutting it everywhere costs."""
    table: pd.DataFrame = fallen.to_dataframe()
    rows = []
    for edge, cells in table.groupby("edge", sort=False):
        near = cells[cells["layer"] != ALL]
        best, everywhere = near.loc[near["value"].idxmax()], cells[cells["layer"] == ALL].iloc[0]
        interval = f"{best['low']:.2f} to {best['high']:.2f}"
        falls_ = [round(float(value), 2) + 0.0 for value in (best["value"], best["control random tokens"],
                                                            everywhere["value"])]  # fmt: skip
        rows.append([edge, best["layer"], falls_[0], interval.replace("-0.00", "0.00"), *falls_[1:]])
    columns = ["edge", f"worst window of {window}", "fall (nats)", "95 % interval", "random tokens", "in all layers"]
    title = f"log-probability of the answer: {cut.clean.mean():.2f} uncut, {cut.n_examples} image queries"
    tables.show(columns, rows, title=title)
