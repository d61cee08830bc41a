"""How well a readout reads, timestep by timestep."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.hyperfeatures.features import add_noise
from interp.models.diffusion import Diffusion
from interp.progress import track
from interp.readouts.examples import Source
from interp.readouts.noised import stacked
from interp.readouts.readout import Readout
from interp.readouts.times import allowed_timesteps, noise_timestep


@torch.no_grad()
def evaluate(
    sd: Diffusion,
    readout: Readout,
    source: Source,
    measure: Callable[[Float[Tensor, "example image out height width"], Sequence[Any]], Float[Tensor, " example"]],
    timesteps: Sequence[int],
    *,
    batch: int = 16,
    latents: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure a readout on examples at some timesteps; an example has the same noise at all of them.

    Args:
        sd: the model.
        readout: what is measured.
        source: the examples; what is random in one comes from the seed and its index.
        measure: gives a number for each example.
        timesteps: what the model sees.
        batch: examples in one call.
        latents: whether the source gives latents in place of images, which are encoded to the posterior's mode.
        seed: of noise and examples.
        progress: show a bar.

    Returns:
        A row for each timestep and example: ``timestep``, ``example``, ``value``.

    Raises:
        InputError: a timestep out of range, no examples, or examples that do not fit together.
    """
    if batch < 1 or not len(source):
        raise InputError(f"batch={batch}, {len(source)} examples: give at least one of each")
    readout.check(sd)
    allowed = allowed_timesteps(sd, readout.time_convention, timesteps)
    context, rows = sd.prompt(""), []
    cells = [(time, at) for at in range(0, len(source), batch) for time in allowed]
    readout.head.to(sd.device).eval()
    held: tuple[int, Tensor, list[Any], Tensor] | None = None
    for time, at in track(cells, f"measuring the {readout.title} head") if progress else cells:
        if held is None or held[0] != at:
            indices = range(at, min(at + batch, len(source)))
            images, targets = stacked([source(index, np.random.default_rng((seed, index))) for index in indices])
            flat = rearrange(images, "example image ... -> (example image) ...")
            held = (at, images, targets, flat.to(sd.device, sd.dtype) if latents else sd.encode(flat))
        _, images, targets, clean = held
        shape = (images.shape[1], *clean.shape[1:])
        drawn = [torch.randn(shape, generator=_generator(seed, index)) for index in range(at, at + len(images))]
        level = noise_timestep(time, readout.time_convention)
        noisy = clean if level is None else add_noise(sd, clean, torch.cat(drawn).to(clean), level)
        maps = readout(sd.capture(noisy, time, context, list(readout.sites), stop=True), time, sd).float()
        values = measure(rearrange(maps, "(e i) ... -> e i ...", i=images.shape[1]), targets)
        rows += [{"timestep": time, "example": at + index, "value": v} for index, v in enumerate(values.tolist())]
    return pd.DataFrame(rows).sort_values(["timestep", "example"], ignore_index=True)


def _generator(seed: int, index: int) -> torch.Generator:
    """The generator of an example. Torch keeps the last 32 bits of a seed only, so both are mixed into as many."""
    mixed = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
    return torch.Generator("cpu").manual_seed(mixed)
