"""Drag guidance: heads of creatures pulled up or down, with and without the term against ghosts.

Source: Luo, Darrell, Wang, Goldman & Holynski 2024 (arXiv 2312.02150), section 3.3 (drag-based manipulation).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import pandas as pd
import typer

import interp
from interp import figures, tables
from interp.errors import InputError
from interp.guidance import Appearance, Drag, Guide
from interp.guidance.controls import shuffled
from interp.guidance.creature_trials import Pulls, draw_goals, draw_pulls
from interp.guidance.trial_figures import pulled_grid
from interp.guidance.trials import UNGUIDED, Arm, Trials, check_sampling, compared, run_trials
from interp.readouts import Readout
from interp.runs import Run
from interp.zoo.readouts import estimator, head
from interp.zoo.readouts.estimator import PIXELS

GUIDED, SHUFFLED = "drag", "shuffled heads"
STEP_SIZES = {"latent_gradient": 40.0, "signed_step": 0.05}
# Without the term against ghosts points go less far by the same weights, and less far means less change.
GHOSTS, HEAVIER = "without anti-ghosting", "without, heavier drag"
DRAGGED = ("eye", "nose", "head_top")
NEAR = 10.0  # pixels around a point or its target that do not count as the rest of the image


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME or a local folder; a model of the creatures.")] = (
        "zoo:tiny-diffusion"
    ),
    heads: Annotated[str, typer.Option(help="Folder of heads; empty: those that ship.")] = "",
    trials: Annotated[int, typer.Option(min=2, help="Prompts, each with a seed of its own.")] = 64,
    way: Annotated[float, typer.Option(min=4.0, help="Pixels up or down, and half as many to a side.")] = 8.0,
    appearance: Annotated[float, typer.Option(min=0.0, help="Weight of the appearance term; 0 leaves it out.")] = 0.6,
    heavier: Annotated[
        float, typer.Option(help="Weight of the drag in an arm that should go as far without the term against ghosts.")
    ] = 3.0,
    steps: Annotated[int, typer.Option(min=2, help="Of a run.")] = 50,
    rule: Annotated[str, typer.Option(help="latent_gradient, signed_step (as in the paper) or epsilon.")] = (
        "latent_gradient"
    ),
    step_size: Annotated[
        float | None,
        typer.Option(help="As the rule takes it; by default 40, or 0.05 for signed_step (0.02 in the paper)."),
    ] = None,
    end: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the run that is guided.")] = 0.5,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, pulls and noise.")] = 900,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one run; every batch has shuffles of its own.")] = 8,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Pull the heads of unguided samples; print how far they went and how much of the rest changed."""
    config = {name: value for name, value in locals().items() if name != "out"}
    if not math.isfinite(way):
        raise InputError(f"way={way}: give a number of pixels")
    if not 0 < heavier < math.inf or not 0 <= appearance < math.inf:
        raise InputError(f"heavier={heavier}, appearance={appearance}: give finite weights, of the drag more than 0")
    if step_size is None and rule == "epsilon":
        raise InputError("rule='epsilon' has no step size of its own here: give --step-size")
    # A rule that does not exist is refused below, whatever its steps.
    chosen = {"rule": rule, "step_size": STEP_SIZES.get(rule, 1.0) if step_size is None else step_size, "end": end}
    check_sampling(chosen, steps=steps, guidance_scale=guidance_scale, out=out)
    sd = interp.Diffusion.from_pretrained(model)
    pair = (head("appearance", sd, heads or None), head("correspondence", sd, heads or None))
    goals, judge, seeds = draw_goals(trials, seed), estimator(), range(seed, seed + trials)
    sampling = {"seeds": seeds, "steps": steps, "guidance_scale": guidance_scale, "batch": batch}
    settings = {**chosen, "checkpointing": False}
    with Run.create("guidance-drag", config, root=out, seed=[seed]) as folder:
        before = run_trials(sd, goals.prompts, [Arm(UNGUIDED)], **sampling)
        pulls = draw_pulls(judge.estimate(before.images[UNGUIDED]), DRAGGED, (way, way / 2), seed)
        weights = (1.0, appearance)
        arms = [
            Arm(GUIDED, partial(pull, pair, pulls, weights, True, settings)),
            Arm(GHOSTS, partial(pull, pair, pulls, weights, False, settings)),
            Arm(HEAVIER, partial(pull, pair, pulls, (heavier, appearance), False, settings)),
            Arm(SHUFFLED, lambda part: pull(broken(pair, seed + part[0]), pulls, weights, True, settings, part)),
        ]
        after = run_trials(sd, goals.prompts, arms, **sampling)
        images = before.images | after.images
        seconds = before.seconds | after.seconds
        moved = {arm: pulls.moved(judge.estimate(some), DRAGGED) for arm, some in images.items()}
        rest = {arm: pulls.elsewhere(some, images[UNGUIDED], NEAR) for arm, some in after.images.items()}
        table = compared(moved).assign(measure="share of the way")
        rests = compared(rest, baseline=HEAVIER).assign(measure="change of the rest")
        folder.save_table("trials", pd.DataFrame(moved).join(pd.DataFrame(rest).add_suffix(", change of the rest")))
        folder.save_table("comparison", pd.concat([table, rests], ignore_index=True))
        folder.save_figure("moved", figures.trial_dots(moved, label="share of the asked way").figure)
        folder.save_figure("rest", figures.trial_dots(rest, label="change of the rest", highlight=GUIDED).figure)
        folder.save_figure("samples", pulled_grid(images, pulls))
        tables.show(
            ["arm", "share of the way: median", "mean", "95 % interval", "change of the rest", "gradient", "time"],
            [
                [row["arm"], f"{row['median']:.2f}", f"{row['mean']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}",
                 change_of(rests, row["arm"]), gradient_of(after, row["arm"]),
                 f"{seconds[row['arm']] / seconds[UNGUIDED]:.1f} ×"]
                for row in table.to_dict("records")
            ],
            title=f"{trials} trials, {way:g} pixels up or down; the rest is compared with {HEAVIER!r}",
        )  # fmt: skip
        if pulls.n_cut:
            least = min(pulls.shares)
            typer.echo(f"In {pulls.n_cut} trials the frame had no room for the whole way, but for {least:.2f} or more.")
        typer.echo(f"\nTables and figures: {folder.folder}")


def pull(
    heads: tuple[Readout, Readout],
    pulls: Pulls,
    weights: tuple[float, float],
    anti_ghosting: bool,
    settings: dict[str, object],
    part: Sequence[int],
) -> Guide:
    """The guide of some trials: drag, and appearance where it has a weight."""
    drag, appearance = weights
    sources, targets = ([points[index] for index in part] for points in (pulls.sources, pulls.targets))
    size = (PIXELS, PIXELS)
    terms = [Drag(heads[1], sources, targets, size, anti_ghosting=anti_ghosting, weight=drag)]
    if appearance:
        terms.append(Appearance(heads[0], weight=appearance, rescale=None))
    return Guide(terms, **settings)


def broken(heads: tuple[Readout, Readout], seed: int) -> tuple[Readout, Readout]:
    """Both heads with shuffled weights: one order may help or harm by chance, so every batch has its own."""
    return shuffled(heads[0], seed), shuffled(heads[1], seed)


def gradient_of(trials: Trials, arm: str) -> str:
    """The median norm of the gradient in one arm, which says how hard its samples were pushed."""
    return f"{trials.gradients[arm]:.2g}" if arm in trials.gradients else ""


def change_of(rests: pd.DataFrame, arm: str) -> str:
    """The change of the rest in one arm, and its paired difference."""
    found = rests[rests["arm"] == arm]
    if not len(found):
        return ""
    row = found.iloc[0]
    if pd.isna(row["p"]):
        return f"{row['mean']:.4f}"
    return f"{row['mean']:.4f} ({row['difference']:+.4f}, p = {row['p']:.1g})"
