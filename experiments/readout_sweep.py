"""Where in the network and when in the process pose, depth, edges and identity can be read: one head for every cell.

Source: the readouts of Luo et al. 2024 (arXiv 2312.02150), one for each site and timestep of Luo et al. 2023.
"""

from typing import Annotated

import torch
import typer

import interp
from interp import figures, tables
from interp.errors import InputError
from interp.readouts import class_task, picture_task, readout_sweep
from interp.readouts.creatures import RANGES, creature_targets
from interp.runs import Run, check_root
from interp.zoo.creatures import SPECIES, draw_scenes, render

CLASSES = ("species", "facing")


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME or a local folder; a model of the creatures.")] = (
        "zoo:tiny-diffusion"
    ),
    sites: Annotated[str, typer.Option(help="A pattern of sites.")] = "up.*.resnets.*.hook_branch",
    timesteps: Annotated[str, typer.Option(help="With commas.")] = "1,250,500,750,900",
    properties: Annotated[str, typer.Option(help="Of pose, keypoints, depth, edge, species and facing.")] = (
        "pose,depth,edge,species"
    ),
    train: Annotated[int, typer.Option(min=1, help="Renders that every head is trained on.")] = 256,
    held_out: Annotated[int, typer.Option(min=1, help="Renders that it is scored on.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Of every training.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of renders, noise, weights and order.")] = 61,
    resume: Annotated[str, typer.Option(help="The folder of an interrupted run, to go on with it.")] = "",
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Train the same small head in every cell; print the best cell of each property, draw a heat map of each."""
    config = {name: value for name, value in locals().items() if name not in ("out", "resume")}
    if not all(word.strip().isdigit() for word in timesteps.split(",")):
        raise InputError(f"--timesteps {timesteps!r}: give whole numbers with commas, such as 1,500")
    times = [int(word) for word in timesteps.split(",")]
    names = [word.strip() for word in properties.split(",")]
    for what, listed in (("timesteps", times), ("properties", names)):
        if len(set(listed)) < len(listed):
            raise InputError(f"--{what} has an entry twice: {listed}")
    unknown = [name for name in names if name not in (*RANGES, *CLASSES)]
    if unknown:
        raise InputError(f"no property {unknown[0]!r}: there are {', '.join((*RANGES, *CLASSES))}")
    check_root(out)
    rendered, scenes = None, draw_scenes(train + held_out, seed)
    rendered = render(scenes)
    tasks = []
    for name in names:
        if name in RANGES:
            tasks.append(picture_task(name, creature_targets(rendered, name)))
        elif name == "species":
            tasks.append(class_task(name, torch.tensor([SPECIES.index(scene.species) for scene in scenes])))
        else:
            tasks.append(class_task(name, torch.tensor([scene.facing == "left" for scene in scenes]).long()))
    sd = interp.Diffusion.from_pretrained(model)
    before = Run.open(resume) if resume else None
    if before is not None and before.config != config:
        raise InputError(f"{str(before.folder)!r} was made with other options: give the same to go on with it")
    with before or Run.create("readout-sweep", config, root=out, seed=[seed]) as folder:
        images = 2 * rendered.images - 1
        found = readout_sweep(
            sd, sites, times, images, tasks, n_train=train, steps=steps, seed=seed, folder=folder.folder / "cells"
        )
        folder.save_table("scores", found)
        rows = []
        for task in tasks:
            cells = found[found["task"] == task.name]
            label = "share right" if task.name in CLASSES else "R²"
            folder.save_figure(f"{task.name}-map", figures.readout_map(cells, label=label).figure)
            best, last = cells.loc[cells["score"].idxmax()], cells[cells["timestep"] == max(times)]["score"].max()
            rows.append([task.name, label, f"{best['score']:.3f}", best["site"], int(best["timestep"]), f"{last:.3f}"])
        columns = ["property", "score", "best", "site", "timestep", f"best at t = {max(times)}"]
        tables.show(columns, rows, title=f"{len(found)} heads of {train} samples, scored on {held_out}")
        typer.echo(f"\nTable and maps: {folder.folder}")
