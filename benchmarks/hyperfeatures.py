"""Diffusion hyperfeatures: memory and time of streaming, what stopping early saves, and the cost of capturing.

A random UNet in the layout of Stable Diffusion 1.5, scaled to fit the machine (``--scale 1`` is full size), inside a
real pipeline. Streamed extraction is compared with the way that stacks every map first; a capture that stops is
compared with one that runs on; captures of all twelve branch sites are compared with the bare denoiser, plain hooks and
nnsight's ``DiffusionModel`` on the same pipeline. Rounds are interleaved; figures are medians of ratios within a round.

    make bench
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import interp
from interp import tables
from interp.hyperfeatures import AggregationNetwork, extract, layer_maps, presets, stack
from interp.progress import track
from interp.zoo.diffusion.architecture import new_tokenizer

STEPS = 11
CONTEXT = 768


def pipeline(scale: int, latent: int) -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1.5's UNet with channels divided by ``scale``, and small random parts around it."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=latent,
        block_out_channels=tuple(c // scale for c in (320, 640, 1280, 1280)),
        cross_attention_dim=CONTEXT // scale,
        attention_head_dim=8,
        norm_num_groups=32 if scale == 1 else 16,
    )
    tokenizer = new_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT // scale,
        intermediate_size=CONTEXT // scale,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(0, 0, 0, 1),
            num_decoder_blocks=(1, 0, 0, 1),
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def peak(run: Callable[[], Any], device: torch.device) -> float:
    """MiB that a call needs at most, over what is held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # Linux: 5 resets the high-water mark of the resident set to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) / 2**10


def status(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def timed(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call in each round; rounds take turns, so that a drifting machine treats all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(rounds), "rounds"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: list[float], base: list[float]) -> str:
    """Median and quartiles of the ratios within rounds."""
    low, middle, high = np.percentile(np.array(times) / np.array(base), [25, 50, 75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def streaming(sd: interp.Diffusion, images: Tensor, rounds: int) -> list[list[Any]]:
    """Streamed extraction beside stacking everything first: peak memory, time, largest difference."""
    spec = presets.hyperfeatures(sd, steps=STEPS, indices=tuple(range(STEPS)))
    net = AggregationNetwork(sd.channels(list(spec.sites)), STEPS).to(sd.device)

    def bare() -> None:
        sd.invert(images, steps=STEPS, convention="dhf", keep_latents=False, progress=False)

    @torch.no_grad()
    def stacked() -> Tensor:
        return net(stack(sd, images, spec, progress=False))

    @torch.no_grad()
    def kept() -> Tensor:
        maps, _ = layer_maps(sd, images, spec, progress=False)
        return net(maps, spec.output_size)

    runs: dict[str, Callable[[], Any]] = {
        "the process alone": bare,
        "all maps stacked, then aggregated": stacked,
        "all maps kept in their own sizes": kept,
        "streamed": partial(extract, sd, images, net, spec, progress=False),
    }
    difference = float((stacked() - extract(sd, images, net, spec, progress=False)).abs().max())
    needs = {name: min(peak(run, sd.device) for _ in range(2)) for name, run in runs.items()}
    times = timed(runs, rounds, sd.device)
    first, full, _, lean = runs
    rows = []
    for name in runs:
        features = max(0.0, needs[name] - needs[first])
        rows.append(
            [name, f"{needs[name]:.0f}", None if name == first else f"{features:.0f}", ratio(times[name], times[full])]
        )
    # The resident set is known to about a MiB: less than that cannot be told from nothing.
    held, kept = needs[full] - needs[first], max(needs[lean] - needs[first], 1.0)
    told = f"1/{held / kept:.1f}" if held > 16 else f"only {max(held, 0):.0f} MiB stacked: too little to compare"
    rows.append(["streamed / stacked, features alone", "", told, ""])
    rows.append(["largest difference of the descriptors", "", f"{difference:.1e}", ""])
    return rows


def early_stop(sd: interp.Diffusion, latents: Tensor, context: Any, rounds: int) -> list[list[Any]]:
    """One call that stops after a site, beside the same capture that runs to the end."""
    rows = []
    for site in sd.sites(presets.BRANCHES):
        runs = {
            "whole": partial(sd.capture, latents, 500, context, [site]),
            "stopped": partial(sd.capture, latents, 500, context, [site], stop=True),
        }
        for run in runs.values():
            run()
        times = timed(runs, rounds, sd.device)
        rows.append([site, ratio(times["stopped"], times["whole"])])
    return rows


def captures(sd: interp.Diffusion, latents: Tensor, context: Any, rounds: int) -> list[list[Any]]:
    """All branch sites in one call of the denoiser, by several tools."""
    sites = sd.sites(presets.BRANCHES)
    modules = [sd.denoiser.get_submodule(sd.place(site).path.split(".", 1)[1]) for site in sites]
    embedded = context.cond.states

    @torch.no_grad()
    def bare() -> list[Tensor]:
        sd.denoiser(latents, 500, encoder_hidden_states=embedded)
        return []

    def plain() -> list[Tensor]:
        seen: list[Tensor] = []
        handles = [m.register_forward_hook(lambda m, a, out: seen.append(out.detach().clone())) for m in modules]
        bare()
        for handle in handles:
            handle.remove()
        return seen

    runs: dict[str, Callable[[], list[Tensor]]] = {
        "bare": bare,
        "plain torch hooks": plain,
        "interp": lambda: list(sd.capture(latents, 500, context, sites).values()),
    }
    rows: list[list[Any]] = []
    with TemporaryDirectory() as folder:
        try:
            runs["nnsight DiffusionModel"] = with_nnsight(sd, folder, latents, embedded)
            runs["nnsight DiffusionModel"]()
        except Exception as error:  # a peer that cannot do the job is a result, stated in its row
            runs.pop("nnsight DiffusionModel", None)
            rows.append(["nnsight DiffusionModel", None, None, f"{type(error).__name__}: {str(error)[:70]}"])
        expected = plain()
        for run in runs.values():
            run()
        times = timed(runs, rounds, sd.device)
        for name, run in runs.items():
            found = run()
            if found:
                apart = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
                rows.append([name, ratio(times[name], times["bare"]), f"{apart:.1e}", ""])
    return rows


def with_nnsight(sd: interp.Diffusion, folder: str, latents: Tensor, embedded: Tensor) -> Callable[[], list[Tensor]]:
    """nnsight on the same pipeline, read back from disk: one trace of the UNet."""
    from nnsight.modeling.diffusion import DiffusionModel

    sd.pipeline.save_pretrained(folder)
    # A checkpoint in eval mode, as `from_pretrained` loads it.
    traced = DiffusionModel(folder, dispatch=True)
    traced.pipeline.to(sd.device)

    def run() -> list[Tensor]:
        with torch.no_grad(), traced.unet.trace(latents, 500, encoder_hidden_states=embedded):
            saved = [].save()
            for block in range(4):
                for resnet in range(3):
                    saved.append(traced.unet.up_blocks[block].resnets[resnet].conv2.output)
        return list(saved)

    return run


def main() -> None:
    """Run the three comparisons, print their tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=4, help="channels of Stable Diffusion 1.5 are divided by this")
    parser.add_argument("--latent", type=int, default=32, help="latent cells a side; 64 in Stable Diffusion 1.5")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/hyperfeatures-benchmark.json"))
    options = parser.parse_args()
    sd = interp.Diffusion(pipeline(options.scale, options.latent).to(options.device))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, options.latent, options.latent, generator=generator).to(sd.device)
    images = torch.rand(1, 3, 8 * options.latent, 8 * options.latent, generator=generator).to(sd.device) * 2 - 1
    context = sd.prompt("a red dog")
    shown = {
        "Streaming": (["", "peak MiB", "of which features", "time / stacked"], streaming(sd, images, options.rounds)),
        "Early stop": (["captured site", "time / whole call"], early_stop(sd, latents, context, options.rounds)),
        "Capture of all branch sites": (
            ["tool", "time / bare denoiser", "largest difference", ""],
            captures(sd, latents, context, 2 * options.rounds),
        ),
    }
    for title, (columns, rows) in shown.items():
        tables.show(columns, rows, title=f"{title}: SD 1.5's UNet / {options.scale}, {options.latent}² latents")
    about = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "device": str(sd.device),
        "machine": platform.processor(),
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "results": shown}, indent=1))


if __name__ == "__main__":
    main()
