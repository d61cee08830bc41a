"""Readout heads on a frozen diffusion model: their error by timestep and by number of training samples.

Source: Luo, Darrell, Wang, Goldman & Holynski 2024 (arXiv 2312.02150), section 3.2 and its supplement.
"""

from typing import Annotated

import pandas as pd
import typer

import interp
from interp import figures, tables
from interp.errors import InputError
from interp.guidance.trials import noise
from interp.readouts.creature_heads import HEADS, creature_examples, recipe_of
from interp.readouts.head_study import HEAD, MEAN, PIXELS, HeadResult, HeadStudy, study_head
from interp.runs import Run, check_root


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME or a local folder; a model of the creatures.")] = (
        "zoo:tiny-diffusion"
    ),
    properties: Annotated[str, typer.Option(help="Heads to train, with commas; empty: all.")] = "",
    samples: Annotated[str, typer.Option(help="Numbers of training samples, with commas.")] = "100,400,1600",
    held_out: Annotated[int, typer.Option(min=4, help="Renders that heads are measured on.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Of every training; three times as many for triplets.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 8,
    dim: Annotated[int, typer.Option(min=8, help="Channels of the mixture, a multiple of 16.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order, timesteps and noise.")] = 0,
    resume: Annotated[str, typer.Option(help="The folder of an interrupted run, to go on with it.")] = "",
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Train all heads; print errors between two bounds, draw them by timestep and by number of samples."""
    config = {name: value for name, value in locals().items() if name not in ("out", "resume")}
    names = [name.strip() for name in properties.split(",")] if properties else list(HEADS)
    for name in names:
        recipe_of(name)
    if len(set(names)) < len(names):
        raise InputError(f"--properties {properties!r} names a head twice")
    if not all(word.strip().isdigit() for word in samples.split(",")):
        raise InputError(f"--samples {samples!r}: give whole numbers with commas, such as 100,400,1600")
    counts = tuple(sorted(int(word) for word in samples.split(",")))
    check_root(out)
    study = HeadStudy(counts, held_out, steps=steps, batch=batch, dim=dim, width=dim // 2, seed=seed)
    sd = interp.Diffusion.from_pretrained(model)
    before = Run.open(resume) if resume else None
    if before is not None and before.config != config:
        raise InputError(f"{str(before.folder)!r} was made with other options: give the same to go on with it")
    with before or Run.create("readout-heads", config, root=out, seed=[seed]) as folder:
        found = {name: study_head(sd, name, study, folder.folder / "heads") for name in names}
        errors = pd.concat([result.errors for result in found.values()], ignore_index=True)
        folder.save_table("errors", errors)
        folder.save_table("summary", summary(errors))
        for name, result in found.items():
            draw(folder, sd, name, result, study)
        show(errors, found, study)
        typer.echo(f"\nHeads, tables and figures: {folder.folder}")


def summary(errors: pd.DataFrame) -> pd.DataFrame:
    """The mean error of every property, head, number of samples and timestep."""
    keys = ["property", "head", "samples", "timestep"]
    grouped = errors.groupby(keys, dropna=False, sort=False)["error"]
    return grouped.agg(["mean", "sem", "count"]).reset_index()


def draw(folder: Run, sd: interp.Diffusion, name: str, result: HeadResult, study: HeadStudy) -> None:
    """Errors by timestep, the curve of the largest training, and readouts of held-out renders."""
    folder.save_figure(f"{name}-errors", figures.head_errors(result.errors, label=recipe_of(name).error).figure)
    largest = max(study.samples)
    folder.save_figure(f"{name}-loss", figures.training_curves(result.trainings[largest].history).figure)
    readout = result.readouts[largest]
    if readout.kind == "features":
        return
    held_out = creature_examples(name, 4, study.test_seed)
    latents = sd.encode(held_out.images[:, 0])
    read = {}
    for timestep in study.timesteps[::2]:
        noisy = interp.hyperfeatures.add_noise(sd, latents, noise(sd, range(4)), float(timestep))
        read[f"read at t = {timestep}"] = readout.read(sd, noisy, timestep)
    pictures = (held_out.images[:, 0] + 1) / 2
    targets = [] if held_out.targets is None else list(held_out.targets)
    panels = figures.readout_panels(pictures, targets, read, readout.value_range)
    folder.save_figure(f"{name}-readouts", panels)


def show(errors: pd.DataFrame, found: dict[str, HeadResult], study: HeadStudy) -> None:
    """Print the errors of the largest training by timestep between the bounds, and those of smaller ones."""
    largest = max(study.samples)
    columns = ["property", "parameters", MEAN, *(f"t = {time}" for time in study.timesteps), PIXELS, "measured"]
    rows: list[list[object]] = []
    for name, result in found.items():
        own = errors[errors["property"] == name]
        mean, pixels = (
            own[(own["head"] == bound) & (own["samples"] == largest)]["error"].mean() for bound in (MEAN, PIXELS)
        )
        read = own[(own["head"] == HEAD) & (own["samples"] == largest)].groupby("timestep")["error"].mean()
        cells = [f"{read[time]:.4f}" for time in study.timesteps]
        rows.append([name, f"{result.parameters:,}", f"{mean:.4f}", *cells, f"{pixels:.4f}", recipe_of(name).error])
    tables.show(columns, rows, title=f"Error on {study.held_out} held-out renders, {largest} training samples")
    columns = ["property", *(f"{n} samples" for n in study.samples)]
    by_count = errors[errors["head"] == HEAD].groupby(["property", "samples"], sort=False)["error"].mean()
    tables.show(
        columns,
        [
            [name, *(f"{by_count[name, n]:.4f} ({result.seconds[n]:.0f} s)" for n in study.samples)]
            for name, result in found.items()
        ],
        title="Mean error over timesteps by number of training samples, and seconds of training",
    )
