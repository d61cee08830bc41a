"""Conventions of DDIM: which timestep the model sees, alpha before the first step, offsets, prediction types.

Published methods differ in these, and a feature at "step 10" means something else in each. A convention states
them; `CONVENTIONS` has the published ones. Ordinary diffusion models (epsilon, v and sample prediction) take all
of them; flow models have one way only, ``diffusers``.

Source: Diffusion Hyperfeatures, section 3.1 and its code (``dhf``); Readout Guidance, its code (``rg``); Null-text
Inversion, section 3.2 and its code (``null_text``); the DDIM schedulers of diffusers (``diffusers``).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, UnknownNameError, nearest

CLEAN = -1  # the timestep of a latent without noise


@dataclass(frozen=True)
class Convention:
    """One way to run DDIM, in both directions.

    Args:
        name: shown in trajectories and messages.
        steps: denoiser calls when the user gives none.
        eval_time: in inversion, whether the model sees the timestep that a step leaves (``"source"``, so -1 first) or
            the one that it reaches (``"destination"``). Generation always sees the source. Flows are inverted from
            the source whatever this says: Euler steps backwards.
        alpha_first: cumulative alpha of a clean latent: 1 (``"one"``), that of timestep 0 (``"final"``), or what the
            scheduler's ``set_alpha_to_one`` says (``"scheduler"``).
        steps_offset: added to all timesteps; None: as the scheduler is configured.
        spacing: of the timesteps; None: as the scheduler is configured.
        prediction: kinds of prediction that it serves.
        vae: which latent of an image's posterior is inverted: its mode, or a sample.
        guidance_scale: of inversion; 1 and less mean no guidance.
        own_scheduler: generate with the pipeline's own scheduler, whatever it is, instead of DDIM.
    """

    name: str
    steps: int = 50
    eval_time: Literal["source", "destination"] = "source"
    alpha_first: Literal["one", "final", "scheduler"] = "scheduler"
    steps_offset: int | None = None
    spacing: Literal["leading", "trailing"] | None = None
    prediction: tuple[str, ...] = ("epsilon",)
    vae: Literal["sample", "mode", "mean"] = "mode"
    guidance_scale: float = 1.0
    own_scheduler: bool = False

    def check(self, prediction: str) -> None:
        """Refuse a model whose prediction the convention would misread.

        Raises:
            InputError: such a model; the message names the conventions that serve it.
        """
        if prediction in self.prediction:
            return
        serving = [name for name, other in CONVENTIONS.items() if prediction in other.prediction]
        others = f"These serve it: {', '.join(serving)}" if serving else "No preset serves it"
        raise InputError(
            f"convention {self.name!r} serves models that predict {' or '.join(self.prediction)}, but this one "
            f"predicts {prediction!r}: its latents would be silently wrong. {others}"
        )


CONVENTIONS: dict[str, Convention] = {
    "dhf": Convention("dhf", alpha_first="one", steps_offset=0, spacing="leading", vae="sample", guidance_scale=-1.0),
    "rg": Convention("rg", steps=100, alpha_first="final", steps_offset=1, spacing="leading", vae="sample"),
    "null_text": Convention(
        "null_text", eval_time="destination", prediction=("epsilon", "v_prediction", "sample"), vae="mean"
    ),
    "diffusers": Convention(
        "diffusers",
        eval_time="destination",
        prediction=("epsilon", "v_prediction", "sample", "flow"),
        own_scheduler=True,
    ),
}


def convention_named(convention: "str | Convention") -> Convention:
    """A preset by its name; a `Convention` passes through.

    Raises:
        UnknownNameError: no such preset; the message lists them.
    """
    if isinstance(convention, Convention):
        return convention
    if convention not in CONVENTIONS:
        raise UnknownNameError(
            f"no convention {convention!r}; there are {', '.join(CONVENTIONS)}. "
            f"{nearest(str(convention), CONVENTIONS)}".rstrip()
        )
    return CONVENTIONS[convention]


@dataclass(frozen=True)
class Transition:
    """One step of DDIM.

    Args:
        seen: the timestep that the model sees.
        source: the timestep of the latent before the step; negative for a clean one.
        destination: that of the latent after it.
    """

    seen: int
    source: int
    destination: int


def generation_transitions(
    convention: str | Convention, scheduler_config: Mapping[str, Any], steps: int
) -> tuple[Transition, ...]:
    """The steps from noise to image, noisiest first.

    Args:
        convention: a preset's name, or a convention.
        scheduler_config: ``num_train_timesteps``, and what the convention leaves to the scheduler.
        steps: how many.

    Raises:
        InputError: ``steps`` out of range, or a spacing that DDIM inversion does not know.
        UnknownNameError: an unknown convention.
    """
    convention = convention_named(convention)
    times, stride = _times(convention, scheduler_config, steps), int(scheduler_config["num_train_timesteps"]) // steps
    return tuple(Transition(time, time, max(time - stride, CLEAN)) for time in reversed(times))


def inversion_transitions(
    convention: str | Convention, scheduler_config: Mapping[str, Any], steps: int
) -> tuple[Transition, ...]:
    """The steps from image to noise: those of generation walked backwards; arguments and errors are its own."""
    convention = convention_named(convention)
    forward = generation_transitions(convention, scheduler_config, steps)
    backward = [(transition.destination, transition.source) for transition in reversed(forward)]
    seen = 0 if convention.eval_time == "source" else 1
    return tuple(Transition(pair[seen], *pair) for pair in backward)


def generation_timesteps(
    convention: str | Convention, scheduler_config: Mapping[str, Any], steps: int
) -> tuple[int, ...]:
    """The timesteps that the model sees in generation, call by call (with DDIM, for ``diffusers``).

    Args:
        convention, scheduler_config, steps: as for `generation_transitions`.

    Source: Diffusion Hyperfeatures' code: 980, 960, ..., 0 for ``dhf`` at 50 steps.
    """
    return tuple(transition.seen for transition in generation_transitions(convention, scheduler_config, steps))


def inversion_timesteps(
    convention: str | Convention, scheduler_config: Mapping[str, Any], steps: int
) -> tuple[int, ...]:
    """The timesteps that the model sees in inversion, call by call.

    Args:
        convention, scheduler_config, steps: as for `generation_transitions`.

    Source: Diffusion Hyperfeatures' code: -1, 0, 20, ..., 960 for ``dhf`` at 50 steps.
    """
    return tuple(transition.seen for transition in inversion_transitions(convention, scheduler_config, steps))


def alpha_at(
    time: int,
    convention: Convention,
    alphas_cumprod: Float[Tensor, " time"],
    scheduler_config: Mapping[str, Any],
) -> float:
    """Cumulative alpha at a timestep, the clean one (negative) included."""
    if time >= 0:
        return float(alphas_cumprod[time])
    to_one = convention.alpha_first == "one" or (
        convention.alpha_first == "scheduler" and scheduler_config.get("set_alpha_to_one", True)
    )
    return 1.0 if to_one else float(alphas_cumprod[0])


def ddim_step(
    latents: Float[Tensor, "batch channel height width"],
    prediction: Float[Tensor, "batch channel height width"],
    kind: str,
    alpha_source: float,
    alpha_destination: float,
    sigma: float = 0.0,
    noise: Float[Tensor, "batch channel height width"] | None = None,
) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch channel height width"]]:
    """One step of DDIM, in either direction.

    Args:
        latents: before the step.
        prediction: the model's.
        kind: of prediction: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        alpha_source, alpha_destination: cumulative alpha before and after the step.
        sigma: how much fresh noise the step adds, see `ddim_sigma`; 0: none, the deterministic step.
        noise: that noise, of unit variance, where ``sigma`` is not 0.

    Returns:
        The latents after the step, and the clean latents that the prediction stands for.

    Raises:
        InputError: a clean latent (alpha 1) whose noise cannot be told from a prediction of the clean latent.

    Source: Denoising Diffusion Implicit Models, equation 12; Progressive Distillation, appendix D (v).
    """
    precise = torch.promote_types(latents.dtype, torch.float32)
    x, predicted = latents.to(precise), prediction.to(precise)
    signal, deviation = alpha_source**0.5, (1 - alpha_source) ** 0.5
    if kind == "epsilon":
        clean, epsilon = (x - deviation * predicted) / signal, predicted
    elif kind == "v_prediction":
        clean, epsilon = signal * x - deviation * predicted, signal * predicted + deviation * x
    else:
        if deviation == 0:
            raise InputError(
                "a model that predicts the clean latent says nothing of its noise at alpha 1: invert with "
                "alpha_first='final', or a scheduler with set_alpha_to_one=False"
            )
        clean, epsilon = predicted, (x - signal * predicted) / deviation
    after = alpha_destination**0.5 * clean + (1 - alpha_destination - sigma**2) ** 0.5 * epsilon
    if noise is not None:
        after = after + sigma * noise.to(precise)
    return after.to(latents.dtype), clean.to(latents.dtype)


def check_eta(eta: Any) -> None:
    """Refuse an eta that is no share.

    Raises:
        InputError: such an eta.
    """
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0 <= float(eta) <= 1:
        raise InputError(f"eta={eta!r}: give 0 (deterministic) to 1 (as much fresh noise as DDPM)")


def check_scale(scale: Any) -> None:
    """Refuse a scale of classifier-free guidance that means nothing.

    Args:
        scale: one, or one for each sample.

    Raises:
        InputError: none, or one that is no finite number from 0 on.
    """
    scales = list(scale) if isinstance(scale, Iterable) and not isinstance(scale, str) else [scale]
    real = all(isinstance(one, Real) and not isinstance(one, bool) for one in scales)
    if not scales or not real or not all(math.isfinite(one) and one >= 0 for one in scales):
        raise InputError(f"guidance_scale={scale!r}: give a finite number from 0 on (up to 1: no guidance), or several")


def ddim_sigma(eta: float, alpha_source: float, alpha_destination: float) -> float:
    """How much fresh noise a step towards the image adds.

    Args:
        eta: 0: none; 1: as much as the ancestral sampler of DDPM.
        alpha_source, alpha_destination: cumulative alpha before and after the step.

    Source: Denoising Diffusion Implicit Models, equation 16.
    """
    left = (1 - alpha_destination) / (1 - alpha_source) * (1 - alpha_source / alpha_destination)
    # Conventions may end at the noise level that they start from, where rounding may leave a negative zero.
    return eta * max(left, 0.0) ** 0.5


def _times(convention: Convention, config: Mapping[str, Any], steps: int) -> list[int]:
    """The timesteps of the noisy latents, ascending."""
    trained = int(config["num_train_timesteps"])
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= trained:
        raise InputError(f"steps={steps!r}: give 1 to {trained}, the steps that the model was trained on")
    spacing = convention.spacing or config.get("timestep_spacing", "leading")
    offset = config.get("steps_offset", 0) if convention.steps_offset is None else convention.steps_offset
    if spacing == "leading":
        times = [index * (trained // steps) + offset for index in range(steps)]
    elif spacing == "trailing":
        # In the order and rounding of diffusers, which decide between neighbours at halves.
        times = [int(time) - 1 for time in np.round(np.arange(trained, 0, -trained / steps))[::-1]]
    else:
        raise InputError(
            f"DDIM inversion has no timestep_spacing {spacing!r}: give the scheduler 'leading' or 'trailing', or "
            "choose a convention with its own spacing ('dhf', 'rg')"
        )
    if times[-1] >= trained:
        raise InputError(f"steps={steps} with steps_offset={offset} reaches timestep {times[-1]} of {trained}")
    return times
