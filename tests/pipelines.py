"""Runs of small pipelines, by diffusers and by the library, and plain torch hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.diffusion import Diffusion
from tests.tiny_diffusion import pipeline

STEPS = 3
PROMPT, NEGATIVE = ["a red cat"], ["a bad, blurry one"]
TWO = {"prompts": ["a red cat", "two dogs"], "negative_prompt": ["a bad, blurry one", "ugly"]}
# A resnet's branch or a block's output, by family: the site, and its plain module.
SITES = {
    "unet": ("up.1.resnets.2.hook_branch", "unet.up_blocks.1.resnets.2.conv2"),
    "sdxl": ("up.0.resnets.1.hook_branch", "unet.up_blocks.0.resnets.1.conv2"),
    "sd3": ("blocks.1.hook_mlp_out", "transformer.transformer_blocks.1.ff"),
    "flux": ("blocks.1.hook_mlp_out", "transformer.transformer_blocks.1.ff"),
    "pixart": ("blocks.1.hook_mlp_out", "transformer.transformer_blocks.1.ff"),
}
# Single precision over a few steps, numbers up to 30; the same kernels on the same shapes.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def run_pipeline(family: str, prompts: list[str] = PROMPT, **changes: Any) -> Tensor:
    """Latents (or images) of diffusers' own run: two images per prompt, not square, negative prompts."""
    pipe = pipeline(family)
    settings: dict[str, Any] = {
        "negative_prompt": NEGATIVE,
        "num_images_per_prompt": 2,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "height": 24,
        "width": 16,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
    }
    settings |= {"flux": {"true_cfg_scale": 2.0}, "pixart": {"use_resolution_binning": False}}.get(family, {}) | changes
    settings = {name: value for name, value in settings.items() if value is not ...}
    if family == "pixart":
        settings["clean_caption"] = False
    out = pipe(prompts, **settings).images
    unpack = family == "flux" and settings["output_type"] == "latent"
    return pipe._unpack_latents(out, settings["height"], settings["width"], 2) if unpack else out


def run_ours(family: str, prompts: list[str] = PROMPT, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "negative_prompt": NEGATIVE,
        "n": 2,
        "steps": STEPS,
        "guidance_scale": 3.0,
        "size": (24, 16),
        "seed": 5,
        "progress": False,
    }
    settings |= {"true_cfg_scale": 2.0} if family == "flux" else {}
    return Diffusion(pipeline(family)).generate(prompts, **settings | changes)


@cache
def untouched(family: str) -> Any:
    return run_ours(family)


@contextmanager
def hooked(module: nn.Module) -> Iterator[list[Tensor]]:
    """Outputs of a module, by a plain torch hook."""
    caught: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: caught.append(output.detach().clone()))
    try:
        yield caught
    finally:
        handle.remove()


@contextmanager
def hooked_calls(module: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def last_block(sd: Diffusion) -> nn.Module:
    return sd.denoiser.conv_out if hasattr(sd.denoiser, "conv_out") else sd.denoiser.proj_out


@contextmanager
def plain_edit(module: nn.Module, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """Change a module's output by a plain hook that counts its calls."""
    calls = [-1]

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return change(output, calls[0])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
