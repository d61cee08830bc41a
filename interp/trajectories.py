"""What a run of a diffusion model leaves behind, and the loop that makes it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from interp.activations import Activations
from interp.errors import InputError
from interp.latents import to_pil
from interp.positions import Indexes
from interp.progress import track
from interp.selection import indexes
from interp.solvers import Solver

Latents = Float[Tensor, "batch channel height width"]


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory:
    """One generation or inversion.

    Args:
        latents: in call order; entry k is what step k started from, and the last one the end of the run.
        latent_steps: which steps these are, ``n_steps`` being the end.
        predicted_x0: the clean latents that each call's prediction stood for, call by call; None where the scheduler
            does not say.
        timesteps: what the model saw as its timestep, call by call, for the whole run as it was planned.
        activations: captures of the conditional half, with a leading step axis at sites of the denoiser. Empty where
            that half was not asked for, or captures were streamed.
        uncond: captures of the unconditional half, where that was asked for.
        saved_steps: the steps of that axis.
        convention: name of the convention.
        direction: from noise to image, or back.
        stopped: whether the run ended before its last step.
        decode: latents to images in 0..1.
        guidance: what a guide's terms and gradients were at each guided step, see `interp.guidance.log`; None without
            a guide.
        reference: the unguided run beside a guided one, where its guide had one.
    """

    latents: Float[Tensor, "kept batch channel height width"]
    latent_steps: tuple[int, ...]
    predicted_x0: Float[Tensor, "kept_x0 batch channel height width"] | None
    timesteps: tuple[float, ...]
    activations: Activations
    uncond: Activations | None
    saved_steps: tuple[int, ...]
    convention: str
    direction: Literal["generation", "inversion"]
    stopped: bool
    decode: Callable[[Latents], Float[Tensor, "batch 3 height width"]]
    guidance: pd.DataFrame | None = None
    reference: "Trajectory | None" = None

    def __repr__(self) -> str:
        sites = [*self.activations, *(self.uncond or ())]
        return (
            f"Trajectory({self.direction} by {self.convention!r}, {self.n_steps} steps from t = {self.timesteps[0]:g} "
            f"to {self.timesteps[-1]:g}, latents {tuple(self.latents.shape[1:])}, {len(set(sites))} sites at "
            f"{len(self.saved_steps)} steps{', stopped' if self.stopped else ''})"
        )

    @property
    def n_steps(self) -> int:
        """Denoiser calls of the whole run, the two halves of guidance counted once."""
        return len(self.timesteps)

    @property
    def saved_timesteps(self) -> tuple[float, ...]:
        """What the model saw as its timestep at every saved step."""
        return tuple(self.timesteps[step] for step in self.saved_steps)

    @property
    def clean(self) -> Latents:
        """The latents at the clean end: the last of a generation, the first of an inversion.

        Raises:
            InputError: a generation that was stopped before its end.
        """
        if self.direction == "inversion":
            return self.latents[0]
        return self.final

    @property
    def final(self) -> Latents:
        """The latents after the last step.

        Raises:
            InputError: the run was stopped before its end.
        """
        if self.stopped:
            raise InputError("the run was stopped after its last capture (stop=True), so it has no final latents")
        return self.latents[-1]

    @cached_property
    def pixels(self) -> Float[Tensor, "batch 3 height width"]:
        """The images of `clean`, in 0..1; decoded when first asked for.

        Raises:
            InputError: a generation that was stopped before its end.
        """
        return self.decode(self.clean)

    @cached_property
    def images(self) -> list[Image.Image]:
        """`pixels` as PIL images."""
        return to_pil(self.pixels)


@dataclass(frozen=True, eq=False)
class Path:
    """Where the loop has been.

    Args:
        latents: kept latents by step.
        clean: the clean latents that predictions stood for, by step.
        stopped: whether it ended early.
    """

    latents: dict[int, Latents]
    clean: dict[int, Latents]
    stopped: bool

    def stacked(self) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
        """Latents, their steps, and clean latents, as a `Trajectory` has them."""
        clean = torch.stack(list(self.clean.values())) if self.clean else None
        return torch.stack(list(self.latents.values())), tuple(self.latents), clean


def follow(
    solver: Solver,
    latents: Latents,
    predict: Callable[[Latents, int], Latents | None],
    *,
    keep: bool = True,
    description: str | None = None,
    move: Callable[[Latents, int], Latents] | None = None,
) -> Path:
    """Run a solver over a denoiser.

    Args:
        solver: the steps.
        latents: the first call's.
        predict: the (guided) prediction for latents at a step; None ends the run before that step is taken.
        keep: all latents and not only the first and the last.
        description: words of the progress bar; None: no bar.
        move: what steers a run: it moves the latents of a step before the prediction is made for them. Those kept are
            from before.
    """
    n_steps = len(solver.times)
    kept: dict[int, Latents] = {0: latents}
    clean: dict[int, Latents] = {}
    steps: Iterable[int] = range(n_steps)
    for step in steps if description is None else track(steps, description, n_steps):
        if move is not None:
            latents = move(latents, step)
        prediction = predict(solver.model_input(latents, step), step)
        if prediction is None:
            return Path(kept, clean, stopped=True)
        latents, stands_for = solver.advance(latents, prediction, step)
        if keep or step == n_steps - 1:
            kept[step + 1] = latents
            if stands_for is not None:
                clean[step] = stands_for
    return Path(kept, clean, stopped=False)


def chosen_steps(name: str, steps: Indexes | slice | None, n_steps: int) -> tuple[int, ...]:
    """Steps of a run, checked: counted from 0.

    Args:
        name: of the setting, for messages.
        steps: one or many, a slice, or None for all.
        n_steps: how many the run has.

    Returns:
        Them in ascending order.

    Raises:
        InputError: none selected, one twice, or one that the run does not have.
    """
    if steps is None or isinstance(steps, slice):
        chosen = list(range(n_steps)[steps or slice(None)])
    else:
        listed = indexes(name, steps) or ()
        wrong = [step for step in listed if not 0 <= step < n_steps]
        if wrong:
            raise InputError(f"{name}: step {wrong[0]} is out of range; the run has steps 0 to {n_steps - 1}")
        chosen = sorted(listed)
    if not chosen:
        raise InputError(f"{name}={steps!r} selects no step; the run has steps 0 to {n_steps - 1}")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"{name}={steps!r}: a step is selected twice")
    return tuple(chosen)
