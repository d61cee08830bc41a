"""Train a readout head on noised latents at random timesteps, the diffusion model frozen."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from torch import Tensor

from interp.errors import InputError, nearest
from interp.hyperfeatures.fitting import Training, fit
from interp.latents import VaeMode
from interp.models.diffusion import Diffusion
from interp.readouts.examples import Example, Loss, Source, loss_named
from interp.readouts.frozen import frozen
from interp.readouts.noised import noised_readout, stacked
from interp.readouts.previews import preview
from interp.readouts.readout import Readout
from interp.readouts.times import allowed_timesteps

PRECISIONS = ("auto", "float32", "bfloat16")


def train_readout(
    sd: Diffusion,
    readout: Readout,
    source: Source,
    loss: str | Loss = "mse",
    *,
    steps: int = 5000,
    batch: int = 8,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    timesteps: Literal["uniform"] | Sequence[int] = "uniform",
    latents: bool = False,
    vae: VaeMode = "sample",
    precision: str = "auto",
    validate: Callable[[Readout], float] | None = None,
    validate_every: int = 500,
    patience: int | None = None,
    previews: Sequence[Example] = (),
    seed: int = 0,
    folder: str | Path | None = None,
    save_every: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Training:
    """Train a readout's head in place: each step one batch, one random timestep, one call of the frozen model.

    The call has the empty prompt and no guidance, and stops after the last site. What a step sees depends on the seed
    and the step's number alone, so that a training that is resumed goes on as if it had never stopped.

    Args:
        sd: the diffusion model; nothing of it changes.
        readout: its head is trained, at its sites, under its time convention.
        source: the examples.
        loss: ``"mse"`` (depth, keypoints), ``"sparse_mse"`` (pose, edge), ``"correspondence"``, ``"appearance"`` (cell
            by cell, as in the paper), ``"pooled_appearance"`` (means over cells), or a function, see
            `interp.readouts.examples`.
        steps: of the optimizer.
        batch: examples a step.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        timesteps: which the model may see: ``"uniform"``: all; or some.
        latents: whether the source gives latents in place of images.
        vae: which latent stands for an image.
        precision: ``"bfloat16"`` computes model and head under autocast; ``"auto"`` does so on a GPU that can. Weights,
            and the loss, are float32 either way.
        validate: measures the readout; more is better, and the best weights are what remains.
        validate_every: steps between two measurements.
        patience: stop after this many measurements without a new best.
        previews: examples to draw, with targets and readouts, into the folder whenever the state is saved.
        seed: of the order of the examples and all that is random in them, of timesteps and noise.
        folder: keeps the state of the training, curves and previews; a training found there goes on.
        save_every: steps between two savings; by default ``validate_every``.
        settings: what the data are, in what JSON can say; compared when a training goes on.

    Returns:
        The history, with the ``timestep`` that the model saw in each step.

    Raises:
        InputError: numbers out of range, examples that do not fit together, a head for another model, a loss that is
            not finite, a folder of another training, or a model that did not stay frozen.
        ShapeError: pictures or targets of another shape than the loss takes.
        UnknownNameError: the model lacks a site.

    Source: Readout Guidance, section 3.2 and official code.
    """
    readout.check(sd)
    objective = loss_named(loss, readout)
    allowed = allowed_timesteps(sd, readout.time_convention, timesteps)
    autocast = _autocast(sd, precision)
    context = sd.prompt("")
    readout.head.to(sd.device)

    def loss_of(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        rng = np.random.default_rng((seed, step, 1))
        images, targets = stacked([source(index, rng) for index in indices])
        time = allowed[int(rng.integers(len(allowed)))]
        generator = torch.Generator("cpu").manual_seed(int(rng.integers(2**62)))
        flat = rearrange(images, "example image ... -> (example image) ...")
        clean = flat.to(sd.device, sd.dtype) if latents else _encode(sd, flat, vae, rng)
        with autocast:
            maps = noised_readout(sd, readout, clean, time, context, generator)
        by_example = rearrange(maps.float(), "(example image) ... -> example image ...", image=images.shape[1])
        return objective(by_example, targets), {"timestep": time}

    asked: dict[str, Any] = {"timesteps": timesteps if isinstance(timesteps, str) else list(timesteps)}
    asked |= {"latents": latents, "vae": vae}
    asked |= {"model": sd.name, "precision": precision, "loss": loss if isinstance(loss, str) else "a function"}
    asked |= {"sites": list(readout.sites), "size": list(readout.size), "n_examples": len(source), **(settings or {})}
    asked |= {"head": _settings(readout)}

    def draw(history: pd.DataFrame) -> None:
        if folder is not None:
            preview(sd, readout, history, previews, Path(folder), latents=latents)

    with frozen(sd.denoiser, sd.name):
        return fit(
            readout.head,
            loss_of,
            len(source),
            steps=steps,
            batch=batch,
            lr=lr,
            weight_decay=weight_decay,
            validate=None if validate is None else lambda: validate(readout),
            validate_every=validate_every,
            patience=patience,
            seed=seed,
            folder=folder,
            save_every=save_every,
            settings=asked,
            title=f"training the {readout.title} head",
            after_saving=draw,
        )


def _settings(readout: Readout) -> Any:
    settings = getattr(readout.head, "settings", None)
    return settings() if callable(settings) else type(readout.head).__name__


def _encode(sd: Diffusion, images: Tensor, vae: VaeMode, rng: np.random.Generator) -> Tensor:
    return sd.encode(images, vae=vae, seed=int(rng.integers(2**62)))


def _autocast(sd: Diffusion, precision: str) -> AbstractContextManager:
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r}: give one of {', '.join(PRECISIONS)}. "
                         f"{nearest(precision, PRECISIONS)}".rstrip())  # fmt: skip
    kind = sd.device.type
    wanted = precision == "bfloat16" or (precision == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported())
    return torch.autocast(kind, torch.bfloat16) if wanted else nullcontext()
