"""Which step of the denoising fixes the layout, which the colour: patching between two runs, site by step.

The runs of a pair differ in one thing: the colour of the body in the prompt; the species in the prompt, which changes
the layout; or the noise that both start from, which changes the pose. What one run computes is put into the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

import interp
from interp import figures, patching, tables, zoo
from interp.errors import InputError
from interp.guidance.creature_trials import COMMON
from interp.guidance.trials import noise
from interp.patching.diffusion import site_groups
from interp.patching.image_metrics import Compared, foreground
from interp.runs import Run
from interp.zoo.creatures import KEYPOINTS, SPECIES, Scene, caption, draw_scenes
from interp.zoo.creatures.colours import contrasting
from interp.zoo.diffusion.classifier import FIELDS, Classifier, load_classifier
from interp.zoo.readouts import Estimator, estimator

COLOUR, LAYOUT, POSE = "colour, by prompt", "layout, by prompt", "pose, by seed"
TRIES = 3  # pairs drawn for every one that is kept
APART = 4.0  # pixels between the keypoints of two seeds, without which their poses are alike
TEXT, DECODER = "text (keys, values)", "decoder"
SITES: dict[str, str | list[str]] = {
    TEXT: ["*.cross.hook_k", "*.cross.hook_v"],
    "self-attention": "*.self.hook_out",
    DECODER: "up.*.resnets.*.hook_branch",
    "prediction": "hook_out",
}
Sampling = Mapping[str, float]


@dataclass(frozen=True)
class Runs:
    """Pairs of runs, and how their pictures are measured.

    Attributes:
        scenes: of the runs that activations come from, and of those that they are put into.
        seeds: of the noise of either.
        metric: 1 for a picture like the first run's, on the scale on which the second run's is 0.
    """

    scenes: tuple[list[Scene], list[Scene]]
    seeds: tuple[list[int], list[int]]
    metric: Compared


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME or a local folder; a model of the creatures.")] = (
        "zoo:tiny-diffusion"
    ),
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of runs, for each of colour, layout and pose.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Of a run.")] = 10,
    window: Annotated[int, typer.Option(min=1, help="Steps that are patched together.")] = 2,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 3.0,
    sites: Annotated[str, typer.Option(help="Patterns of sites with commas; empty: four groups.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of scenes, noise and random vectors.")] = 0,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Patch site by step from one run into another; draw and print what fixes colour, what layout and what pose."""
    config = {name: value for name, value in locals().items() if name != "out"}
    if window > steps:
        raise InputError(f"--window {window}: a run has {steps} steps")
    judge, sd = load_classifier(judge_folder(model)), interp.Diffusion.from_pretrained(model)
    given: Mapping[str, str | Sequence[str]] = {word.strip(): word.strip() for word in sites.split(",") if word.strip()}
    labelled = given or SITES
    site_groups(sd, labelled)
    sampling = {"steps": steps, "guidance_scale": guidance_scale}
    with Run.create("diffusion-patching", config, root=out, seed=[seed]) as folder:
        by_step, onwards = {}, {}
        for what, made in draw_runs(sd, judge, estimator(), pairs, seed, sampling).items():
            by_step[what] = patch(sd, made, labelled, sampling, seed, window=window)
            one = DECODER if what == POSE else TEXT
            some = {one: labelled[one]} if one in labelled else dict([next(iter(labelled.items()))])
            onwards[what] = patch(sd, made, some, sampling, seed, window=steps, starts=range(0, steps, window))
            by_step[what].save(folder.folder / f"{what.split(',')[0]}-by-step")
            onwards[what].save(folder.folder / f"{what.split(',')[0]}-onwards")
        for name, found in (("effects", by_step), ("effects-from-step-on", onwards)):
            parts = [one.to_dataframe(seed=seed).assign(what=what) for what, one in found.items()]
            folder.save_table(name, pd.concat(parts, ignore_index=True))
        folder.save_figure("map", draw_map(by_step))
        folder.save_figure("steps", draw_steps(by_step, onwards, seed))
        title = f"{steps} steps, n = {pairs} pairs each; 0: as unpatched, 1: as the other run"
        show(by_step, "strongest steps", title, seed)
        show(onwards, "strongest from a step to the end", title, seed)
        typer.echo(f"\nTables and figures: {folder.folder}")


def judge_folder(model: str) -> Path:
    """Where the classifier of the creatures' pictures is: beside the model, as it ships."""
    return (zoo.path(model) if model.startswith(zoo.PREFIX) else Path(model)) / "classifier"


def patch(
    sd: interp.Diffusion,
    made: Runs,
    sites: Mapping[str, str | Sequence[str]],
    sampling: Sampling,
    seed: int,
    *,
    window: int,
    starts: Sequence[int] | None = None,
) -> patching.PatchingResult:
    """Put the first run's activations into the second; runs of the same prompt share what is read of the text."""
    prompts = [[caption(scene) for scene in side] for side in made.scenes]
    return patching.diffusion(sd, *prompts, made.metric, sites=sites, seeds=made.seeds[0], corrupt_seeds=made.seeds[1],
                              window=window, starts=starts, max_rows=4 * len(prompts[0]), seed=seed,
                              allow_no_effect=prompts[0] == prompts[1], steps=int(sampling["steps"]),
                              guidance_scale=sampling["guidance_scale"])  # fmt: skip


def draw_runs(
    sd: interp.Diffusion, judge: Classifier, eyes: Estimator, n: int, seed: int, sampling: Sampling
) -> dict[str, Runs]:
    """Pairs of either kind whose pictures both show what their prompts say, and that differ.

    Raises:
        InputError: too few such pairs.
    """
    scenes, seeds = draw_scenes(TRIES * n, seed), [seed + row for row in range(TRIES * n)]
    others = [seed + TRIES * n + row for row in range(TRIES * n)]
    made = {}
    for what, field in ((COLOUR, "body"), (LAYOUT, "species"), (POSE, "species")):
        changed = scenes if what == POSE else [other(scene, field, index) for index, scene in enumerate(scenes)]
        sides = ((scenes, seeds), (changed, others if what == POSE else seeds))
        kept: list[int] = []
        for start in range(0, len(scenes), n):
            rows = list(range(start, start + n))
            pictures = [
                sd.generate([caption(side[row]) for row in rows], latents=noise(sd, [noises[row] for row in rows]),
                            progress=False, **sampling).pixels.float().cpu()
                for side, noises in sides
            ]  # fmt: skip
            good = torch.ones(n, dtype=torch.bool)
            for (side, _), shown in zip(sides, pictures, strict=True):
                good &= shows(judge, shown, field, [side[row] for row in rows])
            if what == POSE:
                good &= distances(eyes, *pictures) >= APART
            kept += [row for row, both in zip(rows, good.tolist(), strict=True) if both]
        if len(kept) < n:
            raise InputError(f"{sd.name} draws both runs of a pair as their prompts say, and unlike each other, in "
                             f"{len(kept)} of {len(scenes)} pairs for {what!r}, and {n} are needed: take more --steps, "
                             "or fewer --pairs")  # fmt: skip
        first, second = ([side[row] for row in kept[:n]] for side, _ in sides)
        from_, into = ([noises[row] for row in kept[:n]] for _, noises in sides)
        metric = {COLOUR: probability(judge, field, [getattr(scene, field) for scene in first]), LAYOUT: overlap(),
                  POSE: pose(eyes)}[what]  # fmt: skip
        made[what] = Runs((first, second), (from_, into), metric)
    return made


def shows(
    judge: Classifier, pictures: Float[Tensor, "batch 3 height width"], field: str, scenes: Sequence[Scene]
) -> Bool[Tensor, " batch"]:
    """Whether pictures show what their prompts say in one field."""
    said = torch.tensor([FIELDS[field].index(getattr(scene, field)) for scene in scenes])
    return judge.predict(pictures)[:, list(FIELDS).index(field)] == said


def probability(judge: Classifier, field: str, options: Sequence[str]) -> Compared:
    """The probability that the classifier gives what the first run's prompt says."""
    said = torch.tensor([FIELDS[field].index(option) for option in options])

    @torch.no_grad()
    def measure(images: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
        chances = judge(images)[list(FIELDS).index(field)].softmax(dim=-1)
        return chances.gather(1, said[:, None])[:, 0]

    return Compared(f"probability of the other run's {field}", measure)


def overlap() -> Compared:
    """How far the creature overlaps the first run's: 1 is all of it, and what is like neither run is near 0."""

    def measure(images: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
        mine, theirs = foreground(images), foreground(clean)
        return (mine & theirs).sum(dim=(1, 2)) / (mine | theirs).sum(dim=(1, 2)).clamp(min=1)

    return Compared("overlap with the other run's creature", measure)


def pose(eyes: Estimator) -> Compared:
    """How near the keypoints are to the first run's, in pixels below 0; what is like neither run is below 0 or near."""

    def measure(images: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
        return -distances(eyes, images, clean)

    return Compared("− distance from the other run's keypoints (pixels)", measure)


def distances(
    eyes: Estimator, pictures: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Between the keypoints that every species has, their mean in pixels."""
    places = [KEYPOINTS.index(name) for name in COMMON]
    mine, theirs = (eyes.estimate(side).keypoints[:, places] for side in (pictures, others))
    return (mine - theirs).norm(dim=-1).mean(dim=-1)


def other(scene: Scene, field: str, index: int) -> Scene:
    """The same scene with another colour of the body, or as another species."""
    if field == "species":
        free = [name for name in SPECIES if name != scene.species]
        return replace(scene, species=free[index % len(free)])
    free = [name for name in contrasting(scene.background) if name not in (scene.body, scene.head, scene.legs)]
    return replace(scene, body=free[index % len(free)])


def draw_map(found: Mapping[str, patching.PatchingResult]) -> Figure:
    """Sites by steps: a row of maps of the effects, and below it one of the random vectors'."""
    some = found[COLOUR]
    figure, axes = figures.panels(2, 1, width=7.2, height=3.6)
    titles = [f"{what} (n = {one.n_examples})" for what, one in found.items()]
    effects = torch.stack([one.mean() for one in found.values()])
    random = torch.stack([one.control("random vector") for one in found.values()])
    for ax, values, panels in zip(axes.flat, (effects, random), (titles, ()), strict=True):
        shown = panels or [""] * len(found)
        figures.effect_map(values, some.axes["site"], some.axes["step"], panels=shown, limits=(-1.0, 1.0),
                           xlabel="", label="taken over", annotate=True, ax=ax)  # fmt: skip
    with figures.style():
        axes[0, 0].set_ylabel("patched")
        axes[1, 0].set(ylabel="random vectors", xlabel="denoising steps that are patched (0 is the noisiest)")
    return figure


def draw_steps(
    by_step: Mapping[str, patching.PatchingResult], onwards: Mapping[str, patching.PatchingResult], seed: int
) -> Figure:
    """For each of colour, layout and pose one site over the steps: patched there alone, and from there to the end."""
    figure, axes = figures.panels(2, len(by_step), width=7.2, height=3.8)
    with figures.style():
        for column, (what, whole) in enumerate(onwards.items()):
            site = whole.axes["site"][0]
            for ax, one in zip(
                axes[:, column], (by_step[what].select(site=site), whole.select(site=site)), strict=True
            ):
                ends = one.interval(seed=seed)
                names = [step.split("-")[0] for step in one.axes["step"]] if ax is axes[1, column] else one.axes["step"]
                figures.effect_line(one.mean(), names, interval=(ends.low, ends.high),
                                    controls={"random vector": one.control("random vector")}, label="", xlabel="",
                                    ax=ax)  # fmt: skip
                for level in (0.0, 1.0):
                    ax.axhline(level, color="#B4B4B4", linestyle=":", linewidth=1, zorder=1)
                if ax is not axes[0, -1]:
                    ax.get_legend().remove()
            axes[0, column].set(title=f"{what}: {site}", xlabel="patched steps")
            axes[1, column].set(title=f"n = {whole.n_examples} pairs", xlabel="patched from this step to the end")
        for ax in axes[:, 0]:
            ax.set_ylabel("taken over (1: the other run)")
    return figure


def show(found: Mapping[str, patching.PatchingResult], label: str, title: str, seed: int) -> None:
    """Print each site at the steps where it does most."""
    rows = []
    for what, one in found.items():
        for site, cells in one.to_dataframe(seed=seed).groupby("site", sort=False):
            best = cells.loc[cells["normalised"].idxmax()]
            interval = f"{best['low']:.2f} to {best['high']:.2f}"
            rows.append([what, site, best["step"], round(float(best["normalised"]), 2) + 0.0, interval,
                         round(float(best["control random vector"]), 2) + 0.0])  # fmt: skip
    tables.show(["what", "site", label, "taken over", "95 % interval", "random vector"], rows, title=title)
