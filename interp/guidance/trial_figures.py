"""Figures of guided trials: samples of every arm beside each other, and film strips with the readout."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from interp.figures.film import film_strip
from interp.guidance.creature_trials import Pulls
from interp.guidance.film import film
from interp.guidance.trials import Arm, noise
from interp.models.diffusion import Diffusion
from interp.readouts.readout import Readout


def sample_grid(images: Mapping[str, Float[Tensor, "trial 3 height width"]], n: int = 8) -> Figure:
    """Draw the first trials of every arm, a row for each arm.

    Args:
        images: by the title of the row, such as `Trials.images`, 0 to 1.
        n: trials, at most as many as there are.
    """
    shown = torch.stack([some[:n] for some in images.values()])
    return film_strip(shown, [str(index) for index in range(shown.shape[1])], list(images))


def arm_films(
    sd: Diffusion,
    arms: Sequence[Arm],
    prompts: Sequence[str],
    seeds: Sequence[int],
    readout: Readout,
    *,
    steps: int,
    guidance_scale: float,
    convention: str = "rg",
    trials: Sequence[int] = (0, 1),
    targets: Sequence[Tensor] | None = None,
    n_frames: int = 9,
) -> Figure:
    """Draw some trials of some arms as film strips with the readout over each step.

    Args:
        sd: the model.
        arms: which ways to sample.
        prompts, seeds: of all trials.
        readout: what is drawn.
        steps, guidance_scale, convention: of the runs.
        trials: which.
        targets: of all trials, drawn beside the arms that have a guide.
        n_frames: steps of a strip.
    """
    rows, titles, aims, labels = [], [], [], []
    for trial in trials:
        for arm in arms:
            made = sd.generate(
                prompts[trial],
                latents=noise(sd, [seeds[trial]]),
                seed=seeds[trial],
                steps=steps,
                guidance_scale=guidance_scale,
                convention=convention,
                guidance=None if arm.guide is None else arm.guide([trial]),
                progress=False,
            )
            rows.append(film(sd, made, readout, n_frames=n_frames))
            titles.append(arm.name)
            aims.append(None if targets is None or arm.guide is None else targets[trial])
            labels = [f"t = {time:g}" for time in rows[-1].timesteps]
    return film_strip(
        torch.cat([one.images for one in rows]),
        labels,
        titles,
        readouts=None if readout.kind == "features" else torch.cat([one.readouts for one in rows]),
        value_range=readout.value_range or (0.0, 1.0),
        targets=None if targets is None else aims,
    )


def pulled_grid(images: Mapping[str, Float[Tensor, "trial 3 height width"]], pulls: Pulls, n: int = 8) -> Figure:
    """Draw the first trials of every arm with arrows from the points to where they are to go.

    Args:
        images: by the title of the row, 0 to 1.
        pulls: of all trials.
        n: trials, at most as many as there are.
    """
    figure = sample_grid(images, n)
    columns = min(n, len(next(iter(images.values()))))
    for index, ax in enumerate(figure.axes):
        trial = index % columns
        for source, target in zip(pulls.sources[trial].tolist(), pulls.targets[trial].tolist(), strict=True):
            arrow = {"arrowstyle": "-|>", "color": "#D55E00", "linewidth": 0.8, "mutation_scale": 4, "shrinkA": 0}
            ax.annotate("", (target[1], target[0]), (source[1], source[0]), arrowprops=arrow | {"shrinkB": 0})
    return figure
