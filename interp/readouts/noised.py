"""One call of the model on noised latents, as heads are trained and measured."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import ShapeError
from interp.hyperfeatures.features import add_noise
from interp.models.conditioning import Conditioning
from interp.models.diffusion import Diffusion
from interp.readouts.examples import Example
from interp.readouts.readout import Readout
from interp.readouts.times import noise_timestep


def noised_readout(
    sd: Diffusion,
    readout: Readout,
    clean: Float[Tensor, "batch channel h w"],
    timestep: int,
    context: Conditioning,
    generator: torch.Generator,
) -> Float[Tensor, "batch out height width"]:
    """Noise latents and read them with one call of the model, as in training; only the head has a graph.

    Args:
        sd: the model.
        readout: what reads.
        clean: latents without noise.
        timestep: what the model sees; how far they are noised follows from the readout's time convention.
        context: the encoded prompt.
        generator: on the CPU, draws the noise, another for each row.
    """
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32).to(clean)
    with torch.no_grad():
        noisy = clean
        if (level := noise_timestep(timestep, readout.time_convention)) is not None:
            noisy = add_noise(sd, clean, noise, level)
        acts = sd.capture(noisy, timestep, context, list(readout.sites), stop=True)
    return readout(acts, timestep, sd)


def stacked(examples: Sequence[Example]) -> tuple[Float[Tensor, "example image _ _ _"], list[Any]]:
    """Examples as one batch of pictures, and their targets.

    Raises:
        ShapeError: pictures of different shapes, or different numbers of them.
    """
    shapes = [example.images.shape for example in examples]
    if len(set(shapes)) > 1:
        other = next(shape for shape in shapes if shape != shapes[0])
        raise ShapeError(f"images of {list(shapes[0])} and of {list(other)} cannot be one batch")
    return torch.stack([example.images for example in examples]), [example.target for example in examples]
