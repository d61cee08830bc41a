"""Which timestep a readout head is told: the model's own, or the generation index of the authors' training code."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError, nearest
from interp.models.diffusion import Diffusion

TimeConvention = str
"""``"true_t"`` or ``"generation_index"``."""
CONVENTIONS = ("true_t", "generation_index")


def check_convention(name: str) -> None:
    """Refuse an unknown time convention.

    Raises:
        InputError: the message names those that there are.
    """
    if name not in CONVENTIONS:
        known = ", ".join(CONVENTIONS)
        raise InputError(f"no time convention {name!r}: there are {known}. {nearest(name, CONVENTIONS)}".rstrip())


def trained_timesteps(sd: Diffusion) -> int:
    """How many timesteps a model was trained with."""
    return int(sd.pipeline.scheduler.config.get("num_train_timesteps", 1000))


def embedded_timestep(
    timestep: float | int | Tensor, convention: TimeConvention, trained: int = 1000
) -> Float[Tensor, "..."]:
    """The timestep whose embedding the head is given, where the model is called at ``timestep``.

    Args:
        timestep: what the model sees; -1 for a clean latent.
        convention: ``"true_t"``: the same; ``"generation_index"``: ``trained - timestep``, which counts generation up
            from noise (0) to the clean image (999).
        trained: how many timesteps the model was trained with.

    Source: Readout Guidance, official code: guidance embeds the true timestep, training the mirrored one.
    """
    check_convention(convention)
    time = torch.as_tensor(timestep, dtype=torch.float32)
    return time if convention == "true_t" else trained - time


def noise_timestep(timestep: float | int, convention: TimeConvention) -> float | None:
    """How far latents are noised in training before the model is called at ``timestep``.

    Args:
        timestep: what the model sees.
        convention: ``"true_t"``: noised at the same timestep. ``"generation_index"``: at the one below.

    Returns:
        The timestep of the noise; None: the latent stays clean.

    Source: Readout Guidance, official code: index s means noise at 999 - s, the model called at 1000 - s.
    """
    check_convention(convention)
    level = timestep if convention == "true_t" else timestep - 1
    return None if level < 0 else float(level)


def allowed_timesteps(
    sd: Diffusion, convention: TimeConvention, timesteps: Literal["uniform"] | Sequence[int]
) -> Sequence[int]:
    """The timesteps that the model may see in training.

    Args:
        sd: the model.
        convention: of the head: ``"generation_index"`` knows no timestep 0.
        timesteps: ``"uniform"``: all of them; or some, which are checked.

    Raises:
        InputError: none, or one out of range.

    Source: Readout Guidance, official code: generation indexes 1 to 999, timesteps 999 to 1.
    """
    every = range(0 if convention == "true_t" else 1, trained_timesteps(sd))
    if isinstance(timesteps, str):
        if timesteps != "uniform":
            raise InputError(f"timesteps={timesteps!r}: give 'uniform', or a sequence of timesteps")
        return every
    outside = [time for time in timesteps if time not in every]
    if outside or not len(timesteps):
        what = f"timestep {outside[0]} is out of range" if outside else "there are no timesteps"
        raise InputError(f"{what}: a {convention} head is trained at {every[0]} to {every[-1]}")
    return list(timesteps)


def time_dim(sd: Diffusion) -> int:
    """Width of a model's time embedding.

    Raises:
        InputError: the model has none of its own.
    """
    return int(_time_layers(sd)[1].linear_2.out_features)


@torch.no_grad()
def time_embedding(sd: Diffusion, timesteps: Float[Tensor, "..."]) -> Float[Tensor, "batch time_dim"]:
    """The frozen model's own embedding of timesteps, before any text or size embedding is added to it.

    Args:
        sd: a model with a UNet.
        timesteps: one, or one for each row.

    Returns:
        A row for each timestep, in the dtype of the model, without a graph.

    Raises:
        InputError: the model has no time embedding of its own.
        ShapeError: timesteps of more than one axis.

    Source: Readout Guidance, official code (``time_proj``, then ``time_embedding``).
    """
    if timesteps.ndim > 1:
        raise ShapeError(f"timesteps of shape {list(timesteps.shape)}: give one, or one for each row")
    project, embed = _time_layers(sd)
    # The layers' own forwards: hooks of a session around this call are for the model's calls, not for the head's.
    projected = project.forward(timesteps.reshape(-1).to(sd.device, torch.float32))
    return embed.forward(projected.to(sd.dtype))


def _time_layers(sd: Diffusion) -> tuple[Any, Any]:
    project, embed = getattr(sd.denoiser, "time_proj", None), getattr(sd.denoiser, "time_embedding", None)
    if project is None or embed is None:
        raise InputError(
            f"{type(sd.denoiser).__name__} has no time embedding before its other conditions, as UNets have: make the "
            "head with time_dim=None"
        )
    return project, embed
