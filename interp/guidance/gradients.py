"""The losses of all terms at one step, and their gradient with respect to the latents."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.guidance.checkpointing import checkpointed
from interp.guidance.reading import Reader, Readings
from interp.guidance.reference import Spread, spread_of
from interp.guidance.terms import TOTAL, at_step, precise
from interp.models.conditioning import Guided

Latents = Float[Tensor, "batch channel height width"]
PerSample = Float[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class Measured:
    """What one move of one step is made of.

    Args:
        losses: of each term, before weight and rescaling, summed over the halves of guidance.
        weighted: the same with both.
        norms: of each term's own gradient, where they were measured, and of all together (``total``).
    """

    losses: Mapping[str, PerSample]
    weighted: Mapping[str, PerSample]
    norms: Mapping[str, PerSample]


def measure(
    guide: Any,
    reader: Reader,
    predict: Guided,
    latents: Latents,
    step: int,
    references: Readings,
    spread: Spread | None,
) -> tuple[Latents, Measured]:
    """Losses and gradient at some latents.

    Rows do not act on each other, so that one gradient of the sum holds that of each sample.

    Args:
        guide: the guide.
        reader: of its terms; its session is open.
        predict: the run's denoiser.
        latents: of the guided samples.
        step: of the run.
        references: what the terms compare with.
        spread: of the reference's latents, which counts for the range beside the samples' own.

    Returns:
        The gradient of the weighted sum of all losses, in single precision or better, and what it is made of.

    Raises:
        InputError: a loss that does not depend on the latents, or a gradient that is not finite.
    """
    x = latents.detach().clone().requires_grad_()
    low, high = spread_of(latents)
    if spread is not None:
        low, high = torch.minimum(low, spread[0].to(low)), torch.maximum(high, spread[1].to(high))
    losses = {term.name: torch.zeros_like(low) for term in guide.terms}
    weighted = dict(losses)
    gradients: dict[str, Tensor] = {}
    # In one batch, or one half after the other, which needs half the memory.
    batches = [guide.halves] if predict.calls == "batch" else [(half,) for half in guide.halves]
    time = predict.solver.timesteps[step]
    apart = guide.term_gradients or len(guide.terms) == 1
    for halves in batches:
        with torch.enable_grad():
            with checkpointed(predict.family.denoiser) if guide.checkpointing else nullcontext():
                given = predict.solver.model_input(x, step)
                _, maps = reader.collect(partial(predict.call, given, step, halves, reader.session))
            readings = reader.read(maps, halves, time)
            del maps
            sums = {}
            for term in guide.terms:
                factor = at_step(term.weight, step)
                scale = factor * ((high - low) / term.span) ** 2 if term.rescale else torch.full_like(low, factor)
                parts = [
                    term.loss(readings[half][term.key], time, references[half][term.key] if term.compares else None)
                    for half in halves
                ]
                loss = precise(torch.stack(parts).sum(dim=0))
                _check_graph(loss, term.name)
                sums[term.name] = scale * loss
                losses[term.name] = losses[term.name] + loss.detach()
                weighted[term.name] = weighted[term.name] + sums[term.name].detach()
            del readings
            totals = sums if apart else {TOTAL: torch.stack(list(sums.values())).sum(dim=0)}
            for index, (name, total) in enumerate(totals.items()):
                (found,) = torch.autograd.grad(total.sum(), x, retain_graph=index < len(totals) - 1, allow_unused=True)
                if found is None:
                    raise InputError(f"term {name!r} reads sites that do not depend on the latents")
                found = precise(found.detach())
                gradients[name] = gradients[name] + found if name in gradients else found
    gradient = torch.stack(list(gradients.values())).sum(dim=0)
    if not bool(torch.isfinite(gradient).all()):
        raise InputError(
            f"the gradient of {', '.join(losses)} is not finite at step {step} (timestep {time:g}): a readout that "
            "overflows in half precision, or a loss that has no gradient where it is"
        )
    norms = {name: each.flatten(1).norm(dim=1) for name, each in gradients.items() if name != TOTAL}
    return gradient, Measured(losses, weighted, norms | {TOTAL: gradient.flatten(1).norm(dim=1)})


def _check_graph(loss: Tensor, name: str) -> None:
    if not loss.requires_grad:
        raise InputError(
            f"term {name!r} has a loss without a graph, so that it has no gradient: compute it with differentiable "
            "functions (no .detach(), .item() or numpy), from sites that depend on the latents"
        )
