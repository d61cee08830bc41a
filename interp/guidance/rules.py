"""How a gradient moves the latents of a step."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.guidance.terms import precise

Latents = Float[Tensor, "batch channel height width"]


class SignedSteps:
    """The steps that Adam makes from latents: the first is ``lr · g / (|g| + 1e-8)``.

    Args:
        latents: to move; they stay as they are.
        step_size: Adam's learning rate.

    Source: Readout Guidance, official code: AdamW without weight decay, new at each sampling step.
    """

    def __init__(self, latents: Latents, step_size: float) -> None:
        # Single precision or better, whatever the model's: squared gradients leave the range of half precision.
        self._moved = torch.nn.Parameter(precise(latents.detach()).clone())
        # A loop over one tensor gains nothing from fused kernels, which differ in their rounding.
        self._adam = torch.optim.AdamW(
            [self._moved], lr=abs(step_size), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False
        )
        self._sign = -1.0 if step_size < 0 else 1.0

    def __call__(self, latents: Latents, gradient: Latents) -> Latents:
        """The latents after one more step."""
        self._moved.grad = self._sign * gradient.to(self._moved)
        self._adam.step()
        return self._moved.detach().to(latents.dtype, copy=True)


class GradientSteps:
    """Steps against the gradient as it is: ``step_size · g``.

    Args:
        latents: to move; they stay as they are.
        step_size: factor of the gradient.
    """

    def __init__(self, latents: Latents, step_size: float) -> None:
        self._step_size = step_size

    def __call__(self, latents: Latents, gradient: Latents) -> Latents:
        """The latents after one more step."""
        return (precise(latents) - self._step_size * gradient).to(latents.dtype)


MOVES: dict[str, Any] = {"signed_step": SignedSteps, "latent_gradient": GradientSteps}
