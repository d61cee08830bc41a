"""Appearance and identity guidance: samples without a caption take on the looks of another, in their own pose.

Source: Luo, Darrell, Wang, Goldman & Holynski 2024 (arXiv 2312.02150), sections 3.4 and 3.5.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import pandas as pd
import typer

import interp
from interp import figures, tables
from interp.guidance import Appearance, Guide, Identity, Twin
from interp.guidance.controls import shuffled
from interp.guidance.creature_trials import creature_boxes, draw_goals
from interp.guidance.likeness import likeness
from interp.guidance.trial_figures import sample_grid
from interp.guidance.trials import UNGUIDED, Arm, check_sampling, compared, noise, run_trials
from interp.readouts import Readout
from interp.runs import Run
from interp.zoo.readouts import estimator, head

POOLED, ALIGNED, IDENTITY, SHUFFLED = "appearance", "cell by cell", "identity in boxes", "shuffled head"
# What there is to reach: another sample of the reference's caption has its looks, and a pose that shares its facing.
CAPTIONED = "its caption, unguided"


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME or a local folder; a model of the creatures.")] = (
        "zoo:tiny-diffusion"
    ),
    heads: Annotated[str, typer.Option(help="Folder of heads; empty: those that ship.")] = "",
    trials: Annotated[int, typer.Option(min=2, help="References, each with a seed of its own.")] = 64,
    steps: Annotated[int, typer.Option(min=2, help="Of a run.")] = 50,
    step_size: Annotated[float, typer.Option(help="Of the signed steps; 0.02 in the paper.")] = 0.05,
    end: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the run that is guided.")] = 0.5,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance, for the references.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Of references and noise.")] = 1100,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one run; every batch has a shuffle of its own.")] = 8,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Guide unconditional samples to the looks of captioned ones; print likeness of colours, creature and pose."""
    config = {name: value for name, value in locals().items() if name != "out"}
    chosen = {"step_size": step_size, "end": end}
    check_sampling(chosen, steps=steps, guidance_scale=guidance_scale, out=out)
    sd = interp.Diffusion.from_pretrained(model)
    looks, who = head("appearance", sd, heads or None), head("identity", sd, heads or None)
    goals, judge = draw_goals(trials, seed), estimator()
    sampling = {"steps": steps, "guidance_scale": guidance_scale, "batch": batch}
    own, theirs = range(seed, seed + trials), range(seed + trials, seed + 2 * trials)
    settings = {**chosen, "checkpointing": False}
    with Run.create("guidance-appearance", config, root=out, seed=[seed]) as folder:
        references = run_trials(sd, goals.prompts, [Arm("reference")], seeds=theirs, **sampling).images["reference"]
        before = run_trials(sd, [""] * trials, [Arm(UNGUIDED)], seeds=own, **sampling)
        boxes = list(zip(creature_boxes(judge.estimate(references)),
                         creature_boxes(judge.estimate(before.images[UNGUIDED])), strict=True))  # fmt: skip
        twins = partial(twin, sd, goals.prompts, theirs)
        captioned = run_trials(sd, goals.prompts, [Arm(CAPTIONED)], seeds=own, **sampling)
        arms = [
            Arm(POOLED, lambda part: Guide([Appearance(looks, pooled=True)], reference=twins(part), **settings)),
            Arm(ALIGNED, lambda part: Guide([Appearance(looks)], reference=twins(part), **settings)),
            Arm(IDENTITY, lambda part: with_identity(looks, who, boxes, twins, settings, part)),
            Arm(SHUFFLED, lambda part: with_shuffled(looks, seed, twins, settings, part)),
        ]
        after = run_trials(sd, [""] * trials, arms, seeds=own, **sampling)
        images = before.images | captioned.images | after.images
        seconds = before.seconds | captioned.seconds | after.seconds
        measured = {arm: likeness(some, references, goals.scenes, judge) for arm, some in images.items()}
        comparisons = []
        for measure in next(iter(measured.values())):
            values = {arm: by_measure[measure] for arm, by_measure in measured.items()}
            comparisons.append(compared(values).assign(measure=measure))
            name = measure.replace(" ", "-").replace("'", "")
            folder.save_figure(name, figures.trial_dots(values, label=measure).figure)
            folder.save_table(f"{name}-trials", pd.DataFrame(values))
        table = pd.concat(comparisons, ignore_index=True)
        folder.save_table("comparison", table)
        folder.save_figure("samples", sample_grid({"reference": references, **images}))
        show(table, {arm: one / seconds[UNGUIDED] for arm, one in seconds.items()})
        typer.echo(f"\nTables and figures: {folder.folder}")


def twin(sd: interp.Diffusion, prompts: Sequence[str], seeds: Sequence[int], part: Sequence[int]) -> Twin:
    """The references of some trials, generated in lockstep."""
    return Twin(latents=noise(sd, [seeds[index] for index in part]), prompt=[prompts[index] for index in part])


def with_shuffled(looks: Readout, seed: int, twins: Any, settings: dict[str, Any], part: Sequence[int]) -> Guide:
    """The guide of some trials by a head with shuffled weights, in another order in each batch."""
    return Guide([Appearance(shuffled(looks, seed + part[0]), pooled=True)], reference=twins(part), **settings)


def with_identity(
    looks: Readout, who: Readout, boxes: Sequence[Any], twins: Any, settings: dict[str, Any], part: Sequence[int]
) -> Guide:
    """The guide of some trials to the looks of the whole image and the creature within a pair of boxes."""
    pairs = [boxes[index] for index in part]
    terms = [Appearance(looks, pooled=True), Identity(who, boxes=pairs, pooled=True)]
    return Guide(terms, reference=twins(part), **settings)


def show(table: pd.DataFrame, times: dict[str, float]) -> None:
    """Print every measure of every arm, and what guiding changes, pair by pair."""
    for measure, rows in table.groupby("measure", sort=False):
        shown = []
        for row in rows.to_dict("records"):
            apart = ["", ""]
            if row["arm"] != UNGUIDED:
                between = f"({row['difference_low']:+.3f} to {row['difference_high']:+.3f})"
                apart = [f"{row['difference']:+.3f} {between}", f"{row['p']:.1g}"]
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            shown.append([row["arm"], f"{row['mean']:.3f}", interval, *apart, f"{times[row['arm']]:.1f} ×"])
        columns = ["arm", "mean", "95 % interval", "paired difference", "p", "time"]
        tables.show(columns, shown, title=f"{measure}, {int(rows['n'].iloc[0])} trials")
