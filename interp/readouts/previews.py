"""What a training shows of itself in its folder: curves, and readouts beside their targets."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from interp.figures.drawing import panels
from interp.figures.readouts import readout_panels, training_curves
from interp.models.diffusion import Diffusion
from interp.readouts.examples import Example
from interp.readouts.noised import noised_readout
from interp.readouts.readout import Readout

SHARES = (0.05, 0.4, 0.8)
"""Of all timesteps: where readouts are drawn."""


@torch.no_grad()
def preview(
    sd: Diffusion,
    readout: Readout,
    history: pd.DataFrame,
    examples: Sequence[Example],
    folder: Path,
    *,
    latents: bool,
) -> None:
    """Write ``curves.png``, and ``previews.png`` with the first picture of some examples.

    Args:
        sd: the model.
        readout: what is being trained.
        history: of the training so far.
        examples: to draw; none: no previews.
        folder: where.
        latents: whether the examples hold latents.
    """
    figure, axes = panels()
    training_curves(history, ax=axes[0, 0])
    figure.savefig(folder / "curves.png", dpi=150, bbox_inches="tight")
    if not examples:
        return
    first = torch.stack([example.images[0] for example in examples])
    clean = first.to(sd.device, sd.dtype) if latents else sd.encode(first)
    shown = sd.decode(clean) if latents else first / 2 + 0.5
    times = [max(int(share * int(sd.pipeline.scheduler.config["num_train_timesteps"])), 1) for share in SHARES]
    context = sd.prompt("")
    readout.head.eval()
    read = {
        f"t = {time}": noised_readout(sd, readout, clean, time, context, torch.Generator("cpu").manual_seed(0))
        for time in times
    }
    targets = [example.target for example in examples]
    pictured = all(isinstance(target, Tensor) for target in targets)
    figure = readout_panels(shown, targets if pictured else None, read, readout.value_range)
    figure.savefig(folder / "previews.png", dpi=150, bbox_inches="tight")
