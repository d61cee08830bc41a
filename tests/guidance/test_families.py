"""Guidance of other families and predictions, the pipelines' own schedulers with eta, and a scale for each image."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from interp.errors import InputError
from interp.guidance import Appearance, Drag, Guide, Term, Twin
from interp.models.diffusion import Diffusion
from interp.readouts import Readout, ReadoutHead, time_dim
from tests import tiny_diffusion
from tests.guidance.closed_form import CLOSE
from tests.guidance.test_runs import bright, plain


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart"])
@pytest.mark.parametrize("rule", ["signed_step", "latent_gradient"])
def test_other_families_are_guided(family: str, rule: Any) -> None:
    sd = Diffusion(tiny_diffusion.pipeline(family))
    site = "up.1.resnets.0.hook_branch" if family == "sdxl" else "blocks.1.hook_mlp_out"
    settings: dict[str, Any] = {"steps": 3, "size": 16, "progress": False, "guidance_scale": 3.0}
    settings |= {"true_cfg_scale": 2.0, "negative_prompt": "bad"} if family == "flux" else {}
    term = Term.from_function(site, bright, name="bright")
    convention = "rg" if family in ("sdxl", "pixart") else "diffusers"
    guide = Guide([term], rule=rule, step_size=0.05 if rule == "signed_step" else 5.0, convention=convention, end=1.0)
    trajectory = sd.generate("a cat", guidance=guide, **settings)
    unguided = sd.generate("a cat", convention=convention, **settings)
    losses = trajectory.guidance[trajectory.guidance.term == "bright"].loss.tolist()
    free = sd.generate("a cat", guidance=replace(guide, step_size=1e-12), convention=convention, **settings)
    torch.testing.assert_close(free.final, unguided.final, rtol=1e-4, atol=1e-4)
    # What was asked to become less has become less, from the second step on, where the first has had its effect.
    assert sum(losses[1:]) < sum(free.guidance[free.guidance.term == "bright"].loss.tolist()[1:])


def test_a_guided_step_of_sdxl_is_the_closed_form() -> None:
    pipe = copy.deepcopy(tiny_diffusion.pipeline("sdxl")).to(torch.float64)
    sd = Diffusion(pipe)
    sites = ("up.0.resnets.1.hook_branch", "up.2.resnets.2.hook_branch")
    modules = (pipe.unet.up_blocks[0].resnets[1].conv2, pipe.unet.up_blocks[2].resnets[2].conv2)
    head = ReadoutHead(sd.channels(list(sites)), 16, 8, time_dim=time_dim(sd), n_groups=4, sites=sites, seed=3).double()
    readout = Readout(head, sites, (8, 8), kind="features", name="appearance")
    points = torch.tensor([[3.0, 3.9]]), torch.tensor([[9.9, 4.0]])
    terms = [Appearance(readout), Drag(readout, *points, (16, 16), weight=2.0)]
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    guide = Guide(terms[:1], rule="latent_gradient", step_size=0.5, end=0.25, reference=Twin(latents=other))
    text, time, alphas = sd.prompt("a cat", "bad"), 751, pipe.scheduler.alphas_cumprod.double()

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise of both halves, and what the head reads from them."""
        hooked: list[Tensor] = []
        handles = [one.register_forward_hook(lambda m, a, out: hooked.append(out)) for one in modules]
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2, dtype=torch.float64)
        added = {"text_embeds": torch.cat([text.uncond.pooled, text.cond.pooled]), "time_ids": sizes}
        states = torch.cat([text.uncond.states, text.cond.states])
        eps = pipe.unet(torch.cat([x, x]), time, encoder_hidden_states=states, added_cond_kwargs=added).sample
        for handle in handles:
            handle.remove()
        # The embedding of the timestep alone, without that of text and sizes.
        embedding = pipe.unet.time_embedding(pipe.unet.time_proj(torch.tensor([float(time)])).double()).detach()
        maps = [F.interpolate(one, size=(8, 8), mode="bilinear", align_corners=False) for one in hooked]
        return eps, head(maps, embedding)

    def stepped(x: Tensor) -> Tensor:
        without, given = call(x)[0].detach().chunk(2)
        eps = without + 3 * (given - without)
        clean = (x - (1 - alphas[time]).sqrt() * eps) / alphas[time].sqrt()
        return alphas[time - 250].sqrt() * clean + (1 - alphas[time - 250]).sqrt() * eps

    for chosen, reference in ((terms[:1], other), (terms, start)):
        leaf = start.clone().requires_grad_()
        seen, wanted = call(leaf)[1], call(reference)[1].detach()
        both = torch.cat([start, reference])
        apart = (1 - torch.cosine_similarity(seen, wanted, dim=1)).mean(dim=(1, 2))
        loss = apart.sum() * (both.max() - both.min()) ** 2
        if len(chosen) == 2:
            there = wanted[:, :, 1, 1]
            at = [(torch.cosine_similarity(there, seen[:, :, y, x], dim=1) + 1) / 2 for y, x in ((4, 2), (1, 1))]
            loss = loss + 2 * (-0.5 * at[0] + 0.5 * at[1]).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        used = replace(guide, terms=chosen, reference=Twin(latents=other) if reference is other else Twin())
        trajectory = sd.generate(
            "a cat", negative_prompt="bad", guidance=used, latents=start, steps=4, guidance_scale=3.0, progress=False
        )
        torch.testing.assert_close(trajectory.latents[1], stepped(start - 0.5 * gradient), **CLOSE)
        assert (trajectory.latents[1] - stepped(start)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_epsilon_of_other_predictions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_diffusion.pipeline("unet")
    monkeypatch.setattr(pipe, "scheduler", tiny_diffusion.ddim(kind))
    sd = Diffusion(pipe)
    term = Term.from_function("up.1.resnets.2.hook_branch", bright)
    guide = Guide([term], rule="epsilon", step_size=3.0, convention="null_text", start=0.0, end=0.25)
    settings: dict[str, Any] = {
        "steps": 4,
        "size": 16,
        "progress": False,
        "guidance_scale": 1.0,
        "convention": "null_text",
    }
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = start.clone().requires_grad_()
    alphas = pipe.scheduler.alphas_cumprod
    time = 751
    hooked: list[Tensor] = []
    handle = pipe.unet.up_blocks[1].resnets[2].conv2.register_forward_hook(lambda m, a, out: hooked.append(out))
    predicted = pipe.unet(x, time, encoder_hidden_states=sd.prompt("a cat").cond.states).sample
    handle.remove()
    (gradient,) = torch.autograd.grad(hooked[0].mean(), x)
    now, after = alphas[time], alphas[time - 250]
    if kind == "v_prediction":
        clean, eps = now.sqrt() * x - (1 - now).sqrt() * predicted, now.sqrt() * predicted + (1 - now).sqrt() * x
    else:
        clean, eps = predicted, (x - now.sqrt() * predicted) / (1 - now).sqrt()
    eps = eps + 3.0 * gradient
    # The noise is changed, and with it the clean latents that go with the same noisy ones.
    clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
    wanted = after.sqrt() * clean + (1 - after).sqrt() * eps
    settings.pop("size")
    trajectory = sd.generate("a cat", guidance=replace(guide, half="cond"), latents=start, **settings)
    torch.testing.assert_close(trajectory.latents[1], wanted.detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="signed_step"):
        sd.generate("a cat", guidance=guide, latents=start, **settings | {"convention": "diffusers"})


def test_eta_of_the_pipelines_own_scheduler() -> None:
    pipe = tiny_diffusion.pipeline("unet")
    sd = Diffusion(pipe)
    settings: dict[str, Any] = {"steps": 3, "size": 16, "progress": False, "seed": 5}
    ours = sd.generate("a cat", eta=0.7, **settings)
    theirs = pipe(
        "a cat", num_inference_steps=3, height=16, width=16, generator=torch.Generator().manual_seed(5), eta=0.7,
        output_type="latent", guidance_scale=7.5,
    ).images  # fmt: skip
    torch.testing.assert_close(ours.final, theirs, rtol=1e-4, atol=1e-4)
    closed = sd.generate("a cat", eta=0.7, convention="null_text", **settings)
    torch.testing.assert_close(closed.final, theirs, rtol=1e-4, atol=1e-4)
    assert (sd.generate("a cat", **settings).final - theirs).abs().max() > 0.1
    term = Term.from_function("up.1.resnets.2.hook_branch", bright)
    twins = sd.generate("a cat", guidance=Guide([term], convention="diffusers"), eta=0.7, **settings)
    assert twins.reference is None
    with pytest.raises(InputError, match="has no eta"):
        Diffusion(tiny_diffusion.pipeline("sd3")).generate("a cat", eta=0.7, **settings)
    with pytest.raises(InputError, match=r"eta=1\.5"):
        sd.generate("a cat", eta=1.5, **settings)


def test_a_scale_for_each_image_without_a_guide() -> None:
    pair = plain(guidance_scale=(1.0, 4.0))
    low, high = plain(guidance_scale=1.0, negative_prompt=None), plain(guidance_scale=4.0)
    torch.testing.assert_close(pair.final[:1], low.final[:1], **CLOSE)
    torch.testing.assert_close(pair.final[1:], high.final[1:], **CLOSE)
    for scales, message in (((2.0,), "1 guidance scales for 2"), ((0.5, 2.0), "from 1")):
        with pytest.raises(InputError, match=message):
            plain(guidance_scale=scales)
    with pytest.raises(InputError, match="Flux takes one"):
        Diffusion(tiny_diffusion.pipeline("flux")).generate("a", guidance_scale=(2.0, 3.0), steps=1, progress=False)
