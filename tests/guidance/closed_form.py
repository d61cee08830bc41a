"""Guided runs written out with plain torch: hooks on modules, autograd, and the steps of DDIM.

As in the authors' code, reference and sample are rows of one batch, of which only the sample's half has a gradient.
Pipelines are in double precision, where signs of gradients do not hang on roundings.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp.models.diffusion import Diffusion
from interp.readouts import Readout
from tests import tiny_diffusion

SITES = ("up.1.resnets.2.hook_branch", "up.3.resnets.0.hook_branch")
MODULES = ("up_blocks.1.resnets.2.conv2", "up_blocks.3.resnets.0.conv2")
SIZE = (8, 8)
STEPS = 4
PROMPT, NEGATIVE = "a red cat", "a bad, blurry one"
# Double precision over four steps; the eighth decimal of Adam's epsilon is the largest source of differences.
CLOSE = {"rtol": 1e-7, "atol": 1e-7}
# Of one term, that of several samples, several terms: (sample's maps, reference's maps, timestep, step, range) -> loss.
Loss = Callable[[list[Tensor], list[Tensor], int, int, Tensor], Tensor]


@cache
def model(seed: int = 0) -> Diffusion:
    pipe = copy.deepcopy(tiny_diffusion.stable_diffusion(seed=seed)).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return Diffusion(pipe)


class Head(nn.Module):
    """Maps of both sites through one random matrix each, a shift by the time embedding, and a bend."""

    uses_time = True

    def __init__(self, out: int, seed: int, sd: Diffusion) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.channels = tuple(sd.channels(list(SITES)))
        self.time_dim = sd.denoiser.time_embedding.linear_2.out_features
        widths = (*self.channels, self.time_dim)
        self.weights = nn.ParameterList(
            torch.randn(out, width, generator=generator, dtype=torch.float64) / width**0.5 for width in widths
        )

    def forward(self, maps: list[Tensor], embedding: Tensor) -> Tensor:
        *of_maps, of_time = self.weights
        mixed = sum(torch.einsum("oc,bchw->bohw", w, m) for w, m in zip(of_maps, maps, strict=True))
        return torch.sin(mixed + (embedding @ of_time.T)[..., None, None])


def readout(name: str, out: int = 3, seed: int = 0, *, kind: str = "spatial", sd: Diffusion | None = None) -> Readout:
    sd = sd or model()
    span = (-1.0, 1.0) if kind == "spatial" else None
    return Readout(Head(out, seed, sd), SITES, SIZE, kind=kind, name=name, value_range=span, model="tiny")


def read(head: Head, maps: list[Tensor], timestep: int) -> Tensor:
    """What a head reads, by hand."""
    unet = model().pipeline.unet
    projected = unet.time_proj(torch.tensor([float(timestep)])).double()
    embedding = unet.time_embedding(projected).expand(len(maps[0]), -1)
    resized = [F.interpolate(one, size=SIZE, mode="bilinear", align_corners=False) for one in maps]
    return head(resized, embedding.detach())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(sd: Diffusion, x: Tensor, timestep: int, states: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One plain call of the UNet, and the outputs of the two convolutions."""
    seen: list[Tensor] = []
    handles = [
        sd.denoiser.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out))
        for path in MODULES
    ]
    try:
        return sd.denoiser(x, timestep, encoder_hidden_states=states).sample, seen
    finally:
        for handle in handles:
            handle.remove()


def guided(
    start: Tensor,
    loss: Loss | None,
    *,
    rule: str = "signed_step",
    halves: Sequence[int] = (0, 1),
    size: float | Sequence[float] = 0.02,
    window: Sequence[int] = (1, 2),
    scale: Tensor | float = 7.5,
    reference_scale: Tensor | float | None = None,
    recurrence: int = 1,
    noise: Sequence[Tensor] | None = None,
    eta: float = 0.0,
    prompt: str | list[str] = PROMPT,
    reference_start: Tensor | None = None,
    paired: bool = True,
    negative: str = NEGATIVE,
    seen: str | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents [step + 1, ...] of the sample and of its reference, and every gradient that was taken.

    The range of the latents is that of a sample and its reference, unless nothing is `paired` with a reference. With
    `seen` the losses have that prompt's activations in place of the negative prompt's.
    """
    sd, rows = model(), len(start)
    text = sd.prompt(prompt, negative)
    uncond, cond = (one.states.expand(rows, -1, -1) for one in (text.uncond, text.cond))
    states = torch.cat([uncond, uncond, cond, cond])
    shown = uncond if seen is None else sd.prompt(seen).cond.states.expand(rows, -1, -1)
    shown_states = torch.cat([shown, shown, cond, cond])
    alphas = sd.pipeline.scheduler.alphas_cumprod.double()
    other = scale if reference_scale is None else reference_scale
    weights = torch.cat([torch.as_tensor(one, dtype=torch.float64).expand(rows) for one in (other, scale)])
    reference, x = (start if reference_start is None else reference_start).clone(), start.clone()
    kept, kept_reference, gradients = [x], [reference], []
    for step in range(STEPS):
        time = 1 + (STEPS - 1 - step) * 250
        moved = x
        change = torch.zeros_like(x)
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        for again in range(recurrence if loss is not None and step in window else 0):
            leaf = moved.detach().clone().requires_grad_()
            # The reference asks for a gradient too, to show that it gets none.
            still = reference.detach().clone().requires_grad_()
            both = torch.cat([still, leaf])
            _, maps = call(sd, torch.cat([both, both]), time, shown_states)
            total = torch.zeros((), dtype=torch.float64)
            ranged = both if paired else leaf
            span = ranged.detach().reshape(-1, rows, leaf[0].numel()).transpose(0, 1).flatten(1)
            spread = span.amax(dim=1) - span.amin(dim=1)
            for half in halves:
                mine = [one.chunk(4)[2 * half + 1] for one in maps]
                theirs = [one.chunk(4)[2 * half].detach() for one in maps]
                total = total + loss(mine, theirs, time, step, spread)
            gradient, of_reference = torch.autograd.grad(total, [leaf, still])
            assert not of_reference.any()
            gradients.append(gradient)
            one_size = size if isinstance(size, float) else size[step]
            if rule == "signed_step":
                first = 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient**2
                mean, square = first / (1 - 0.9 ** (again + 1)), second / (1 - 0.999 ** (again + 1))
                moved = moved - one_size * mean / (square.sqrt() + 1e-8)
            elif rule == "latent_gradient":
                moved = moved - one_size * gradient
            else:
                change = one_size * gradient
        with torch.no_grad():
            both = torch.cat([reference, moved])
            without, given = call(sd, torch.cat([both, both]), time, states)[0].chunk(2)
            eps = without + weights[:, None, None, None] * (given - without)
            eps = eps + torch.cat([torch.zeros_like(change), change])
            now, after = alphas[time], alphas[max(time - 250, 0)]
            clean = (both - (1 - now).sqrt() * eps) / now.sqrt()
            sigma = eta * ((1 - now / after) * (1 - after) / (1 - now)).sqrt()
            both = after.sqrt() * clean + (1 - after - sigma**2).sqrt() * eps
            if noise is not None:
                both = both + sigma * torch.cat([noise[step], noise[step]])
            reference, x = both.chunk(2)
        kept.append(x)
        kept_reference.append(reference)
    return torch.stack(kept), torch.stack(kept_reference), gradients
