"""Spatial guidance: samples steered to a pose, a depth map or edges, judged by an estimator that never saw the heads.

Source: Luo, Darrell, Wang, Goldman & Holynski 2024 (arXiv 2312.02150), section 3.2 (spatially aligned control).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import pandas as pd
import typer
from torch import Tensor

import interp
from interp import figures, tables
from interp.guidance import Guide, Spatial
from interp.guidance.controls import reversed_guide, shuffled
from interp.guidance.creature_trials import ERRORS, draw_goals, errors_by
from interp.guidance.trial_figures import arm_films, sample_grid
from interp.guidance.trials import UNGUIDED, Arm, check_sampling, compared, run_trials
from interp.readouts import Readout
from interp.readouts.creatures import creature_targets
from interp.readouts.head_study import n_parameters
from interp.runs import Run
from interp.zoo.readouts import estimator, head, head_about

GUIDED, SHUFFLED, REVERSED = "guided", "shuffled head", "reversed gradient"
# Signed steps are as long for any head; by the other rules a smaller gradient is a weaker push.
LONGER = "shuffled head, steps as long"


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME or a local folder; a model of the creatures.")] = (
        "zoo:tiny-diffusion"
    ),
    heads: Annotated[
        str, typer.Option(help="Folder of heads, such as a readout-heads run's; empty: those that ship.")
    ] = "",
    properties: Annotated[str, typer.Option(help="Of pose, depth and edge; keypoints with --heads.")] = (
        "pose,depth,edge"
    ),
    trials: Annotated[int, typer.Option(min=2, help="Prompts, each with a seed of its own.")] = 64,
    steps: Annotated[int, typer.Option(min=2, help="Of a run.")] = 50,
    step_size: Annotated[float, typer.Option(help="0.02 in the paper; latent_gradient needs some 4.")] = 0.05,
    end: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the run that is guided.")] = 0.5,
    rule: Annotated[str, typer.Option(help="signed_step, latent_gradient or epsilon.")] = "signed_step",
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, goals and noise.")] = 700,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one run; every batch has a shuffle of its own.")] = 8,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Guide to goals of the same species; print errors beside unguided samples and two controls, draw film strips."""
    config = {name: value for name, value in locals().items() if name != "out"}
    chosen = {"rule": rule, "step_size": step_size, "end": end}
    check_sampling(chosen, steps=steps, guidance_scale=guidance_scale, out=out)
    sd = interp.Diffusion.from_pretrained(model)
    names = [name.strip() for name in properties.split(",")]
    readouts = {name: head(name, sd, heads or None) for name in names}
    goals, judge, seeds = draw_goals(trials, seed), estimator(), range(seed, seed + trials)
    sampling = {"steps": steps, "guidance_scale": guidance_scale}
    settings = {**chosen, "checkpointing": False}
    tables_by_name = []
    with Run.create("guidance-spatial", config, root=out, seed=[seed]) as folder:
        for name, readout in readouts.items():
            targets = creature_targets(goals.rendered, name)
            guide = partial(guide_to, readout, targets, settings)
            arms = [
                Arm(UNGUIDED),
                Arm(GUIDED, guide),
                Arm(SHUFFLED, partial(guide_shuffled, readout, seed, targets, settings)),
                Arm(REVERSED, lambda part, guide=guide: reversed_guide(guide(part))),
            ]
            found = run_trials(sd, goals.prompts, arms, seeds=seeds, batch=batch, **sampling)
            if rule != "signed_step":
                times = found.gradients[GUIDED] / found.gradients[SHUFFLED]
                longer = partial(guide_shuffled, readout, seed, targets, settings | {"step_size": times * step_size})
                found |= run_trials(sd, goals.prompts, [Arm(LONGER, longer)], seeds=seeds, batch=batch, **sampling)
            errors = errors_by(judge, found.images, goals, name)
            gradients = [found.gradients.get(arm, math.nan) for arm in errors]
            table = compared(errors).assign(property=name, time=found.relative_times(), gradient=gradients)
            tables_by_name.append(table)
            folder.save_table(f"{name}-errors", pd.DataFrame(errors))
            folder.save_figure(f"{name}-trials", figures.trial_dots(errors, label=ERRORS[name]).figure)
            folder.save_figure(f"{name}-samples", sample_grid({"goal": goals.rendered.images, **found.images}))
            films = arm_films(sd, arms[:2], goals.prompts, seeds, readout, targets=list(targets), **sampling)
            folder.save_figure(f"{name}-film", films)
            show(name, table, readout, head_about(name, heads or None).data)
        folder.save_table("comparison", pd.concat(tables_by_name, ignore_index=True))
        typer.echo(f"\nTables and figures: {folder.folder}")


def guide_to(readout: Readout, targets: Tensor, settings: dict[str, object], part: Sequence[int]) -> Guide:
    """The guide of some trials, each to its own target."""
    return Guide([Spatial(readout, targets[list(part)])], **settings)


def guide_shuffled(
    readout: Readout, seed: int, targets: Tensor, settings: dict[str, object], part: Sequence[int]
) -> Guide:
    """The same with shuffled weights, in another order in each batch: one order may help or harm by chance."""
    return guide_to(shuffled(readout, seed + part[0]), targets, settings, part)


def show(name: str, table: pd.DataFrame, readout: Readout, data: str) -> None:
    """Print the errors of all arms and what guiding changes, pair by pair."""
    columns = ["arm", "median", "mean", "95 % interval", "paired difference", "p", "gradient", "time"]
    rows = []
    for row in table.to_dict("records"):
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        apart = "" if row["arm"] == UNGUIDED else (
            f"{row['difference']:+.3f} ({row['difference_low']:+.3f} to {row['difference_high']:+.3f})"
        )  # fmt: skip
        chance = "" if row["arm"] == UNGUIDED else f"{row['p']:.1g}"
        cells = [row["arm"], f"{row['median']:.3f}", f"{row['mean']:.3f}", interval, apart, chance]
        push = "" if row["arm"] == UNGUIDED else f"{row['gradient']:.2g}"
        rows.append([*cells, push, f"{row['time']:.1f} ×"])
    tables.show(columns, rows, title=f"{name}: {ERRORS[name]}, {int(table['n'][0])} trials")
    typer.echo(f"head: {n_parameters(readout.head):,} parameters, trained on {data}\n")
