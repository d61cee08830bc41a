"""Where the task lives: activation patching by layer and token between prompts of two tasks, in text and in images.

Source: Meng et al. 2022, section 2 (layers by tokens); Hendel et al. 2023 (a task is held at the delimiter).
"""

from collections.abc import Mapping
from typing import Annotated

import pandas as pd
import torch
import typer
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

import interp
from interp import figures, patching, tables
from interp.cross_modal import MODALITIES
from interp.errors import InputError
from interp.patching.contrasts import Contrast, contrasts, task_pairs, vision_model
from interp.runs import Run

SITES = {"hook_resid_pre": "entering a block", "hook_attn_out": "attention", "hook_mlp_out": "MLP"}
DIRECTIONS = ("denoise", "noise")
LITTLE = 0.02  # groups of tokens that restore less share a row of the table that is printed


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME, a local folder, or a Hub id.")] = "zoo:tiny-llava",
    tasks: Annotated[str, typer.Option(help="Of the world that ships, with commas; empty: the paper's six.")] = "",
    prompts: Annotated[int, typer.Option(min=1, help="Pairs of prompts of each task, in each modality.")] = 5,
    shots: Annotated[int, typer.Option(min=1, help="Examples per prompt.")] = 3,
    direction: Annotated[str, typer.Option(help="denoise shows what suffices, noise what is needed.")] = "denoise",
    seed: Annotated[int, typer.Option(min=0, help="Of examples, queries and random vectors.")] = 0,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Patch each layer and kind of token of a prompt into one of another task; draw and print what carries the task."""
    config = {name: value for name, value in locals().items() if name != "out"}
    if direction not in DIRECTIONS:
        raise InputError(f"--direction {direction!r}: give one of {', '.join(DIRECTIONS)}")
    chosen, vlm = task_pairs(tasks), vision_model(model)
    with Run.create("task-location", config, root=out, seed=[seed]) as folder:
        found = {}
        for modality in MODALITIES:
            pairs = contrasts(vlm, chosen, modality, n=prompts, n_shots=shots, seed=seed)
            found[modality] = locate(vlm, pairs, token_groups(shots), direction, seed)
        by_modality = [one.to_dataframe().assign(modality=modality) for modality, one in found.items()]
        folder.save_table("effects", pd.concat(by_modality, ignore_index=True))
        folder.save_figure("map", draw(found))
        for modality, one in found.items():
            show(one, modality)
        typer.echo(f"\nTable and figure: {folder.folder}")


def token_groups(shots: int) -> dict[str, list[str]]:
    """Tokens by meaning, those of all examples together: each example says the task, so one alone changes little.

    Answers of two tasks differ in length, so that only their ends are the same token of both prompts. Nothing before
    the first example's answer can tell the task, so input and delimiter count from the second one on.
    """
    later = range(1, shots)
    groups = {
        "answers' first tokens": [f"output[{k}].first" for k in range(shots)],
        "answers' last tokens": [f"output[{k}].last" for k in range(shots)],
        "after answers": [f"separator[{k}]" for k in range(shots)] + [f"prefix[{k + 1}]" for k in range(shots)],
        "examples' inputs": [f"input[{k}]" for k in later],
        "examples' delimiters": [f"{name}[{k}]" for k in later for name in ("joint", "delimiter")],
        "query's input": [f"input[{shots}]"],
        "query's answer mark": [f"joint[{shots}]"],
        "query's delimiter": ["last"],
    }
    return {name: tokens for name, tokens in groups.items() if tokens}


def locate(
    vlm: interp.VLM, pairs: Contrast, positions: Mapping[str, list[str]], direction: str, seed: int
) -> patching.PatchingResult:
    """Patch what enters each block, and what its attention and its MLP write, one group of tokens at a time."""
    clean, corrupt = vlm.prepare(list(pairs.clean)), vlm.prepare(list(pairs.corrupt))
    metric = patching.logit_difference(vlm, pairs.answers, list(pairs.wrong), inputs=clean)
    return patching.activation(
        vlm, clean, corrupt, metric, sites=list(SITES), positions=positions, direction=direction, seed=seed
    )


def draw(found: Mapping[str, patching.PatchingResult]) -> Figure:
    """A row of maps for each modality, tokens by layers, and beside them random vectors in the residual stream."""
    some = next(iter(found.values()))
    center = 1.0 if some.about["direction"] == "noise" else 0.0
    titles = [*SITES.values(), "random vector entering"]
    figure, axes = figures.panels(len(found), 1, width=7.2, height=0.9 + 1.6 * len(found))
    with figures.style():
        for ax, (modality, one) in zip(axes.flat, found.items(), strict=True):
            maps = torch.cat([one.mean(), one.control("random vector")[:1]]).transpose(-1, -2)
            figures.effect_map(maps, one.axes["position"], one.axes["layer"], panels=titles, center=center,
                               limits=(0.0, 1.0), label="task restored", ax=ax)  # fmt: skip
            ax.set_title(f"{modality} prompts, n = {one.n_examples} pairs", loc="left", pad=15, fontweight="bold")
            ax.set_xlabel("layer" if one is list(found.values())[-1] else "")
    if some.about["direction"] == "noise":
        figure.suptitle("corrupt into clean: 1 is untouched, 0 is lost", fontsize=8)
    return figure


def farthest(shares: Float[Tensor, "row column"], center: float, dim: int) -> Float[Tensor, "row column"]:
    """Of each row (``dim=1``) or column the value farthest from that of no effect."""
    return shares.gather(dim, (shares - center).abs().argmax(dim=dim, keepdim=True))


def show(found: patching.PatchingResult, modality: str) -> None:
    """Print a row of shares for each group of tokens that does something, by layer, and the farthest control beside."""
    center = 1.0 if found.about["direction"] == "noise" else 0.0
    for site, name in SITES.items():
        one = found.select(site=site)
        means, random = one.mean().T, one.control("random vector").T
        cells = torch.cat([means, farthest(random, center, 1)], dim=1)
        little = (cells - center).abs().amax(dim=1) < LITTLE
        names = [name for name, drop in zip(one.axes["position"], little.tolist(), strict=True) if not drop]
        if little.any():
            names.append(f"{int(little.sum())} others, at most")
            cells = torch.cat([cells[~little], farthest(cells[little], center, 0)])
        # What rounds to nothing has no sign.
        rows = [[name, *(round(share, 2) + 0.0 for share in row)]
                for name, row in zip(names, cells.tolist(), strict=True)]  # fmt: skip
        columns = [f"{modality} prompts: {name}", *one.axes["layer"], "random vector"]
        tables.show(columns, rows, title=f"task restored by layer, n = {found.n_examples} pairs")
