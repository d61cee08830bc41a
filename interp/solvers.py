"""How latents move from one denoiser call to the next: DDIM in closed form, a pipeline's own scheduler, and the
Euler steps of a flow walked backwards."""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from interp.conventions import (
    Convention,
    alpha_at,
    ddim_sigma,
    ddim_step,
    generation_transitions,
    inversion_transitions,
)
from interp.errors import InputError

Latents = Float[Tensor, "batch channel height width"]


class Solver(ABC):
    """The steps of one run, either direction."""

    times: Sequence[Tensor]
    """What each call is given as its timestep: scalars."""

    @abstractmethod
    def advance(self, latents: Latents, prediction: Latents, step: int) -> tuple[Latents, Latents | None]:
        """The next latents, and the clean ones that the prediction stands for, where the solver knows them."""

    def start(self, noise: Latents) -> Latents:
        """Noise of unit variance, scaled as the first call expects it."""
        return noise

    def model_input(self, latents: Latents, step: int) -> Latents:
        """What the denoiser is given of the latents."""
        return latents

    def shift(self, noise: Latents, step: int) -> Latents:
        """How the model's prediction changes where the noise that it stands for does.

        Args:
            noise: what is added to the predicted noise.
            step: of the run.

        Raises:
            InputError: the solver does not know the noise levels that this takes.
        """
        raise InputError(
            f"rule='epsilon' changes the noise that a prediction stands for, which {type(self).__name__} cannot tell "
            "here: choose rule='signed_step' or 'latent_gradient', or a convention of DDIM ('null_text')"
        )

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the model sees as its timestep, call by call."""
        return tuple(float(time) for time in self.times)


@dataclass(frozen=True, eq=False)
class DDIM(Solver):
    """DDIM in closed form.

    Args:
        times: timestep that the model sees, per call.
        alphas: cumulative alpha before and after each step.
        kind: of the model's prediction.
        eta: how much fresh noise the steps add; 0: none, they are deterministic.
        generator: of that noise.
    """

    times: tuple[Tensor, ...]
    alphas: tuple[tuple[float, float], ...]
    kind: str
    eta: float = 0.0
    generator: torch.Generator | None = None

    def advance(self, latents: Latents, prediction: Latents, step: int) -> tuple[Latents, Latents | None]:
        """See `Solver`."""
        if not self.eta:
            return ddim_step(latents, prediction, self.kind, *self.alphas[step])
        noise = randn_tensor(latents.shape, generator=self.generator, device=latents.device, dtype=latents.dtype)
        sigma = ddim_sigma(self.eta, *self.alphas[step])
        return ddim_step(latents, prediction, self.kind, *self.alphas[step], sigma, noise)

    def shift(self, noise: Latents, step: int) -> Latents:
        """See `Solver`."""
        alpha = self.alphas[step][0]
        if self.kind == "epsilon":
            return noise
        return noise / alpha**0.5 if self.kind == "v_prediction" else -noise * ((1 - alpha) / alpha) ** 0.5


def ddim(
    convention: Convention,
    scheduler: Any,
    kind: str,
    steps: int,
    *,
    invert: bool,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> DDIM:
    """DDIM by a convention over a scheduler's noise levels.

    Args:
        convention: how.
        scheduler: its ``alphas_cumprod`` and configuration count.
        kind: of the model's prediction.
        steps: how many.
        invert: from image to noise.
        eta, generator: of the noise that steps add.

    Raises:
        InputError: steps out of range, or a spacing that DDIM does not know.
    """
    make = inversion_transitions if invert else generation_transitions
    transitions = make(convention, scheduler.config, steps)

    def alpha(time: int) -> float:
        return alpha_at(time, convention, scheduler.alphas_cumprod, scheduler.config)

    alphas = tuple((alpha(one.source), alpha(one.destination)) for one in transitions)
    return DDIM(tuple(torch.tensor(one.seen) for one in transitions), alphas, kind, eta, generator)


class SchedulerSteps(Solver):
    """A copy of the pipeline's scheduler, stepped as the pipeline does.

    Args:
        scheduler: the pipeline's; it is not touched.
        steps: its ``num_inference_steps``; some schedulers make a few calls more.
        device: of its tensors.
        generator: for schedulers that add noise.
        settings: further arguments of its ``set_timesteps``.
        eta: how much noise DDIM adds.

    Raises:
        InputError: ``eta`` for a scheduler without it.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        device: torch.device,
        generator: torch.Generator | None = None,
        settings: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        settings = dict(settings or {})
        given = {} if "sigmas" in settings else {"num_inference_steps": steps}
        self.scheduler.set_timesteps(**given, device=device, **settings)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        taken = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in taken:
            raise InputError(f"eta={eta}: {type(scheduler).__name__} has no eta; DDIM has one (convention='null_text')")
        self._options: dict[str, Any] = {"generator": generator} if "generator" in taken else {}
        self._options |= {"eta": eta} if eta else {}
        self.times = tuple(self.scheduler.timesteps)

    def start(self, noise: Latents) -> Latents:
        """See `Solver`."""
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def model_input(self, latents: Latents, step: int) -> Latents:
        """See `Solver`."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return latents
        return self.scheduler.scale_model_input(latents, self.times[step])

    def advance(self, latents: Latents, prediction: Latents, step: int) -> tuple[Latents, Latents | None]:
        """See `Solver`."""
        result = self.scheduler.step(prediction, self.times[step], latents, **self._options)
        clean = getattr(result, "pred_original_sample", None)
        if clean is None and "FlowMatch" in type(self.scheduler).__name__:
            clean = (latents - self.scheduler.sigmas[step].to(latents) * prediction).to(latents.dtype)
        return result.prev_sample, clean

    def shift(self, noise: Latents, step: int) -> Latents:
        """See `Solver`."""
        if self.scheduler.config.get("prediction_type", None) == "epsilon":
            return noise
        return super().shift(noise, step)


class FlowInversion(Solver):
    """The Euler steps of a flow from the image to the noise, each evaluated at its source.

    Args:
        forward: the steps of generation.
    """

    def __init__(self, forward: SchedulerSteps) -> None:
        scheduler = forward.scheduler
        # The noise levels of generation, 0 for the clean latent included, walked the other way.
        self._sigmas = scheduler.sigmas.flip(0)
        clean = torch.zeros_like(scheduler.timesteps[:1])
        self.times = tuple(torch.cat([clean, scheduler.timesteps[1:].flip(0)]))

    def advance(self, latents: Latents, prediction: Latents, step: int) -> tuple[Latents, Latents | None]:
        """See `Solver`."""
        precise = torch.promote_types(latents.dtype, torch.float32)
        sigma, further = self._sigmas[step], self._sigmas[step + 1]
        x, velocity = latents.to(precise), prediction.to(precise)
        after = x + (further - sigma) * velocity
        return after.to(latents.dtype), (x - sigma * velocity).to(latents.dtype)
