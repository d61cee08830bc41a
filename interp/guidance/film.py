"""What a guided run was heading for at each step, and what a readout saw there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.models.diffusion import Diffusion
from interp.readouts.readout import Readout
from interp.trajectories import Trajectory


class Film(NamedTuple):
    """Frames of a run.

    Attributes:
        images: the clean image that each step's prediction stood for, 0 to 1.
        readouts: what was read from the latents that the step started from.
        steps: which ones.
        timesteps: what the model saw.
    """

    images: Float[Tensor, "sample frame 3 height width"]
    readouts: Float[Tensor, "sample frame out grid_height grid_width"]
    steps: tuple[int, ...]
    timesteps: tuple[float, ...]


@torch.no_grad()
def film(
    sd: Diffusion,
    trajectory: Trajectory,
    readout: Readout,
    steps: Sequence[int] | None = None,
    *,
    n_frames: int = 8,
    prompt: str | Sequence[str] = "",
) -> Film:
    """Decode what a generation was heading for at some steps, and read a property there.

    Args:
        sd: the model.
        trajectory: a generation with all its latents.
        readout: of the property.
        steps: which; None: ``n_frames`` of them, evenly spread from the first to the last.
        n_frames: how many, where ``steps`` are not given.
        prompt: what the readout's calls see; the empty one, as in training, by default.

    Raises:
        InputError: latents or predictions that were not kept, or steps out of range.
    """
    n_steps = trajectory.n_steps
    if steps is None and n_frames < 1:
        raise InputError(f"n_frames={n_frames}: give how many frames, from 1 on")
    chosen = torch.linspace(0, n_steps - 1, n_frames).round().long().tolist() if steps is None else list(steps)
    if trajectory.predicted_x0 is None or len(trajectory.latents) <= n_steps:
        raise InputError("the trajectory lacks latents or predictions of some steps: run it with keep_latents=True")
    wrong = [step for step in chosen if step not in range(n_steps)]
    if wrong or not chosen:
        raise InputError(f"steps {chosen}: this run has steps 0 to {n_steps - 1}")
    images = [trajectory.decode(trajectory.predicted_x0[step]).cpu() for step in chosen]
    read = [
        readout.read(sd, trajectory.latents[step], trajectory.timesteps[step], prompt).float().cpu() for step in chosen
    ]
    times = tuple(trajectory.timesteps[step] for step in chosen)
    return Film(torch.stack(images, dim=1), torch.stack(read, dim=1), tuple(chosen), times)
