"""Guided sampling: time and peak memory of guided steps, beside plain autograd through the same pipeline.

A random UNet in the layout of Stable Diffusion 1.5, scaled to fit the machine (``--scale 1`` is full size), with two
heads over its twelve branch sites: appearance, and correspondence for a drag. The plain way is that of the authors'
code: reference and sample in one batch, both halves of guidance, plain hooks, autograd to the latents, the denoiser
again on the moved ones, and a step of DDIM; with and without diffusers' own checkpointing, and with weights that ask
for gradients (as a pipeline comes) or are frozen, which is what a careful user would write. All runs move the latents
by the raw gradient, so that their ends can be compared (the sign of a gradient near zero is a matter of rounding).
Rounds are interleaved; times are medians of ratios within a round.

    python benchmarks/guidance.py
"""

import argparse
import ctypes
import json
import platform
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from hyperfeatures import peak, pipeline, ratio, timed
from torch import Tensor

import interp
from interp import tables
from interp.guidance import Appearance, Drag, Guide, without_weight_gradients
from interp.hyperfeatures.presets import BRANCHES
from interp.readouts import Readout, ReadoutHead, time_dim, time_embedding

SIZE_OF_MOVES = 5.0
SCALE = 7.5
PROMPT = "a red dog"
PLAIN, FROZEN = "plain autograd", "plain autograd, frozen weights"


def readout(sd: interp.Diffusion, name: str, latent: int, dim: int, seed: int) -> Readout:
    """A random head over all branch sites."""
    sites = tuple(sd.sites(BRANCHES))
    head = ReadoutHead(sd.channels(list(sites)), dim=dim, n_groups=dim // 12, time_dim=time_dim(sd), seed=seed)
    return Readout(head.to(sd.device), sites, (latent, latent), kind="features", name=name)


@contextmanager
def hooked(sd: interp.Diffusion, sites: tuple[str, ...]) -> Any:
    """Outputs of the branches' convolutions, by plain hooks."""
    seen: list[Tensor] = []
    modules = [sd.denoiser.get_submodule(sd.place(site).path.split(".", 1)[1]) for site in sites]
    handles = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def plain(
    sd: interp.Diffusion, guide: Guide, start: Tensor, steps: int, *, checkpointing: bool, frozen: bool
) -> Tensor:
    """The authors' way, written out, with all weights frozen or as they come. Returns the sample's last latents."""
    if frozen:
        with without_weight_gradients([sd.denoiser, *(term.readout.head for term in guide.terms)]):
            return plain(sd, guide, start, steps, checkpointing=checkpointing, frozen=False)
    appearance, drag = guide.terms
    text = sd.prompt(PROMPT)
    states = torch.cat([text.uncond.states] * 2 + [text.cond.states] * 2)
    alphas, stride = sd.pipeline.scheduler.alphas_cumprod.tolist(), 1000 // steps
    (sources, targets), latent = drag.cells[0], start.shape[-1]

    def read(head: Any, maps: list[Tensor], time: int) -> Tensor:
        resized = [F.interpolate(one, (latent, latent), mode="bilinear", align_corners=False) for one in maps]
        return head(resized, time_embedding(sd, torch.tensor([float(time)])).expand(len(maps[0]), -1))

    def similar(one: Tensor, two: Tensor) -> Tensor:
        return (torch.cosine_similarity(one, two, dim=0) + 1) / 2

    if checkpointing:
        sd.denoiser.enable_gradient_checkpointing()
    reference, x = start, start
    for step in range(steps):
        time = 1 + (steps - 1 - step) * stride
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad(), hooked(sd, drag.readout.sites) as seen:
            both = torch.cat([reference, leaf])
            sd.denoiser(torch.cat([both, both]), time, encoder_hidden_states=states)
            # Blocks that run again in the backward pass pass the hooks again.
            maps = list(seen)
            spread = (both.max() - both.min()).detach()
            total = torch.zeros((), device=start.device)
            for half in (0, 1):
                theirs, mine = ([one.chunk(4)[2 * half + row] for one in maps] for row in (0, 1))
                looks, wanted = (
                    read(appearance.readout.head, mine, time),
                    read(appearance.readout.head, [one.detach() for one in theirs], time).detach(),
                )
                total = total + spread**2 * (1 - torch.cosine_similarity(looks, wanted, dim=1)).mean()
                here = read(drag.readout.head, mine, time)[0]
                there = read(drag.readout.head, [one.detach() for one in theirs], time)[0].detach()
                kept = there[:, sources[:, 0], sources[:, 1]]
                total = total - 0.5 * similar(kept, here[:, targets[:, 0], targets[:, 1]]).mean()
                total = total + 0.5 * similar(kept, here[:, sources[:, 0], sources[:, 1]]).mean()
            (gradient,) = torch.autograd.grad(total, leaf)
        both = torch.cat([reference, x - SIZE_OF_MOVES * gradient])
        with torch.no_grad():
            predicted = sd.denoiser(torch.cat([both, both]), time, encoder_hidden_states=states).sample
            without, given = predicted.chunk(2)
            eps = without + SCALE * (given - without)
            now, after = alphas[time], alphas[max(time - stride, 0)]
            clean = (both - (1 - now) ** 0.5 * eps) / now**0.5
            reference, x = (after**0.5 * clean + (1 - after) ** 0.5 * eps).chunk(2)
    if checkpointing:
        sd.denoiser.disable_gradient_checkpointing()
    return x


def trimmed_peak(run: Callable[[], Any], device: torch.device) -> float:
    """Peak MiB, the C library having given back first what it holds on to."""
    if device.type != "cuda":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return peak(run, device)


def compare(sd: interp.Diffusion, latent: int, dim: int, steps: int, rounds: int) -> list[list[Any]]:
    """Peak memory, time and ends of guided runs, every step of them guided."""
    looks, places = (readout(sd, name, latent, dim, seed) for seed, name in enumerate(("appearance", "correspondence")))
    sources = torch.tensor([[0.25, 0.25], [0.5, 0.75]]) * 8 * latent
    drag = Drag(places, sources, sources + latent, (8 * latent, 8 * latent))
    settings: dict[str, Any] = {"rule": "latent_gradient", "step_size": SIZE_OF_MOVES, "start": 0.0, "end": 1.0}
    guide = Guide([Appearance(looks), drag], **settings)
    start = torch.randn(1, 4, latent, latent, generator=torch.Generator().manual_seed(1)).to(sd.device)
    given: dict[str, Any] = {"latents": start, "steps": steps, "guidance_scale": SCALE, "progress": False}

    def ours(guide: Guide, **changes: Any) -> Tensor:
        return sd.generate(PROMPT, guidance=guide, keep_latents=False, **given | changes).final

    def unguided() -> Tensor:
        return sd.generate(PROMPT, convention="rg", keep_latents=False, **given).final

    kept = replace(guide, checkpointing=False)
    runs: dict[str, Callable[[], Tensor]] = {
        "unguided": unguided,
        PLAIN: partial(plain, sd, guide, start, steps, checkpointing=False, frozen=False),
        FROZEN: partial(plain, sd, guide, start, steps, checkpointing=False, frozen=True),
        f"{PLAIN}, diffusers' checkpointing": partial(plain, sd, guide, start, steps, checkpointing=True, frozen=False),
        f"{FROZEN}, diffusers' checkpointing": partial(plain, sd, guide, start, steps, checkpointing=True, frozen=True),
        "interp, checkpointing=False": partial(ours, kept),
        "interp": partial(ours, guide),
        "interp, guidance_calls='two'": partial(ours, guide, guidance_calls="two"),
    }
    ends = {name: run() for name, run in runs.items()}
    needs = {name: max(trimmed_peak(run, sd.device) for _ in range(2)) for name, run in runs.items()}
    times = timed(runs, rounds, sd.device)
    moved = float((ends[PLAIN] - ends["unguided"]).abs().max())
    rows = []
    for name in runs:
        beside = [
            cell
            for base in (PLAIN, FROZEN)
            for cell in (f"{needs[name] / needs[base]:.2f}", ratio(times[name], times[base]))
        ]
        rows.append([name, f"{needs[name]:.0f}", *beside, f"{float((ends[name] - ends[PLAIN]).abs().max()):.1e}"])
    rows.append(["guidance moved the latents by up to", "", "", "", "", "", f"{moved:.1e}"])
    return rows


def main() -> None:
    """Run the comparison, print its table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=4, help="channels of Stable Diffusion 1.5 are divided by this")
    parser.add_argument("--latent", type=int, default=32, help="latent cells a side; 64 in Stable Diffusion 1.5")
    parser.add_argument("--dim", type=int, default=96, help="channels of the heads' descriptors; 384 in the paper")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/guidance-benchmark.json"))
    options = parser.parse_args()
    made = pipeline(options.scale, options.latent).to(options.device)
    made.unet.eval()
    sd = interp.Diffusion(made)
    with torch.no_grad():
        rows = compare(sd, options.latent, options.dim, options.steps, options.rounds)
    columns = ["", "peak MiB", "peak / plain", "time / plain", "peak / frozen", "time / frozen", "largest difference"]
    title = f"{options.steps} guided steps: SD 1.5's UNet / {options.scale}, {options.latent}² latents"
    tables.show(columns, rows, title=title)
    about = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "device": str(sd.device),
        "machine": platform.processor(),
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "results": {title: (columns, rows)}}, indent=1))


if __name__ == "__main__":
    main()
