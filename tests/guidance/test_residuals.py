"""ControlNets and T2I-adapters beside guided runs, against the pipelines of diffusers and plain autograd."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from interp.errors import InputError, ShapeError
from interp.guidance import Guide, Term, controlled
from interp.models.diffusion import Diffusion
from tests import tiny_diffusion

SITE = "up.1.resnets.2.hook_branch"
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"steps": 3, "guidance_scale": 3.0, "progress": False}
UNCHECKED: dict[str, Any] = {"requires_safety_checker": False}
# Single precision over three steps of latents up to 10.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@cache
def controlnet(family: str = "unet") -> ControlNetModel:
    unet = tiny_diffusion.pipeline(family).unet
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    return tiny_diffusion.redraw(made, 60)  # type: ignore[return-value]


@cache
def adapter() -> T2IAdapter:
    made = T2IAdapter(channels=[16, 24, 32, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    return tiny_diffusion.redraw(made, 61)  # type: ignore[return-value]


@cache
def pipeline(kind: str) -> Any:
    """The small pipelines; for adapters one whose UNet has the down blocks of Stable Diffusion, which they are for."""
    if kind != "adapter":
        return tiny_diffusion.pipeline("sdxl" if kind == "xl controlnet" else "unet")
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 24, 32, 32),
        layers_per_block=2,
        cross_attention_dim=tiny_diffusion.WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    made = StableDiffusionPipeline(**parts("unet") | {"unet": tiny_diffusion.redraw(unet, 62)}, **UNCHECKED)
    made.set_progress_bar_config(disable=True)
    return made


def parts(kind: str) -> dict[str, Any]:
    """What a pipeline is made of."""
    return {key: part for key, part in pipeline(kind).components.items() if key != "image_encoder"}


def latents(n: int = 1) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def theirs(kind: str) -> Tensor:
    """The pipelines' own latents."""
    given: dict[str, Any] = {"controlnet_conditioning_scale": 0.7}
    if kind == "adapter":
        pipe = StableDiffusionAdapterPipeline(**parts(kind), adapter=adapter(), **UNCHECKED)
        given = {"adapter_conditioning_scale": 0.7}
    elif kind == "controlnet":
        pipe = StableDiffusionControlNetPipeline(**parts(kind), controlnet=controlnet(), **UNCHECKED)
    else:
        pipe = StableDiffusionXLControlNetPipeline(**parts(kind), controlnet=controlnet("sdxl"), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        "a cat", image=IMAGE, negative_prompt="bad", num_inference_steps=3, guidance_scale=3.0, latents=latents(),
        output_type="latent", height=16, width=16, **given,
    ).images  # fmt: skip
    return found


@pytest.mark.parametrize("kind", ["controlnet", "xl controlnet", "adapter"])
def test_runs_are_those_of_the_pipelines(kind: str) -> None:
    sd = Diffusion(pipeline(kind))
    network: nn.Module = adapter() if kind == "adapter" else controlnet("sdxl" if kind == "xl controlnet" else "unet")
    settings = SETTINGS | {"latents": latents(), "negative_prompt": "bad"}
    plain = sd.generate("a cat", **settings).final
    with controlled(sd, network, IMAGE, 0.7):
        ours = sd.generate("a cat", **settings).final
        two = sd.generate("a cat", guidance_calls="two", **settings).final
    torch.testing.assert_close(ours, theirs(kind), **CLOSE)
    torch.testing.assert_close(two, ours, **CLOSE)
    assert (ours - plain).abs().max() > 0.1
    assert torch.equal(sd.generate("a cat", **settings).final, plain)  # nothing stays behind


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_gradients_of_guidance_go_through_what_is_added(kind: str, checkpointing: bool) -> None:
    pipe = pipeline(kind)
    sd, network = Diffusion(pipe), controlnet() if kind == "controlnet" else adapter()

    def bright(maps: Any, timestep: float) -> Tensor:
        return maps[SITE].square().flatten(1).mean(dim=1)

    guide = Guide(
        [Term.from_function(SITE, bright)], rule="latent_gradient", step_size=0.5, end=0.34, half="cond",
        checkpointing=checkpointing, convention="null_text",
    )  # fmt: skip
    images = torch.cat([IMAGE, 1 - IMAGE])
    with controlled(sd, network, images):
        trajectory = sd.generate("a cat", guidance=guide, latents=latents(2), **SETTINGS)
    assert all(weight.grad is None and weight.requires_grad for weight in network.parameters())
    time, states = int(trajectory.timesteps[0]), sd.prompt("a cat").cond.states.expand(2, -1, -1)
    x, hooked = latents(2).requires_grad_(), []
    handle = pipe.unet.up_blocks[1].resnets[2].conv2.register_forward_hook(lambda m, a, out: hooked.append(out))
    if kind == "adapter":
        pipe.unet(x, time, states, down_intrablock_additional_residuals=list(network(images)))
    else:
        down, middle = network(x, time, states, images, return_dict=False)
        pipe.unet(x, time, states, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    handle.remove()
    loss = hooked[0].square().flatten(1).mean(dim=1)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    log = trajectory.guidance[trajectory.guidance.term == "total"]
    torch.testing.assert_close(torch.tensor(log.weighted.tolist()), loss.detach(), rtol=1e-4, atol=1e-4)
    norms = torch.tensor(log.gradient_norm.tolist())
    torch.testing.assert_close(norms, gradient.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-6)
    with controlled(sd, network, images):
        moved = sd.generate("a cat", convention="null_text", latents=x.detach() - 0.5 * gradient, **SETTINGS)
    torch.testing.assert_close(trajectory.latents[1], moved.latents[1], **CLOSE)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (IMAGE + 1, InputError, "values from 1"),
        (IMAGE - 1, InputError, "give 0 to 1"),
        (IMAGE * torch.nan, InputError, "768 of 768 values that are NaN"),
        (IMAGE[..., :8], ShapeError, r"has \(16, 8\) pixels, and the run makes \(16, 16\)"),
        (IMAGE.repeat(3, 1, 1, 1), ShapeError, "3 control images for 2 rows"),
        (IMAGE[:0], ShapeError, "control image is"),
    ],
)
def test_bad_control_images(image: Tensor, error: type[Exception], message: str) -> None:
    sd = Diffusion(tiny_diffusion.pipeline("unet"))
    with pytest.raises(error, match=message), controlled(sd, controlnet(), image):
        sd.generate("a cat", latents=latents(), **SETTINGS)
    assert not sd.denoiser._forward_pre_hooks


def test_what_cannot_be_controlled() -> None:
    sd = Diffusion(tiny_diffusion.pipeline("unet"))
    with pytest.raises(InputError, match="not into the family 'sd3'"):
        controlled(Diffusion(tiny_diffusion.pipeline("sd3")), controlnet(), IMAGE).__enter__()
    with pytest.raises(InputError, match="not Linear"):
        controlled(sd, nn.Linear(2, 2), IMAGE).__enter__()
    pipe = StableDiffusionControlNetPipeline(**parts("unet"), controlnet=controlnet(), **UNCHECKED)
    with pytest.raises(InputError, match="not StableDiffusionControlNetPipeline"):
        Diffusion(pipe)
