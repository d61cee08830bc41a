"""Inversion of every family, against the schedulers of diffusers and closed forms."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
)
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.models.diffusion import Diffusion
from tests import tiny_diffusion
from tests.pipelines import (
    CLOSE,
    SITES,
    hooked,
    run_ours,
    run_pipeline,
)
from tests.tiny_diffusion import pipeline


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(6)) * 2 - 1


def test_inversion_of_dhf_calls_the_unet_from_minus_one(images: Tensor) -> None:
    sd = Diffusion(pipeline("unet"))
    site, path = SITES["unet"]
    trajectory = sd.invert(images, steps=4, seed=3, capture=site, progress=False)
    latents = sd.encode(images, vae="sample", seed=3)
    states = sd.prompt(["", ""]).cond.states
    alphas = sd.pipeline.scheduler.alphas_cumprod
    assert trajectory.timesteps == (-1, 0, 250, 500)
    x, times = latents, [-1, 0, 250, 500, 750]
    for step in range(4):
        torch.testing.assert_close(trajectory.latents[step], x, **CLOSE)
        with torch.no_grad(), hooked(sd.pipeline.unet.get_submodule(path.removeprefix("unet."))) as caught:
            eps = sd.denoiser(x, times[step], states).sample
        torch.testing.assert_close(trajectory.activations[site][step], caught[0], **CLOSE)
        before = alphas[times[step]] if step else torch.tensor(1.0)
        x0 = (x - (1 - before).sqrt() * eps) / before.sqrt()
        after = alphas[times[step + 1]]
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    torch.testing.assert_close(trajectory.final, x, **CLOSE)
    assert torch.equal(trajectory.clean, latents)
    torch.testing.assert_close(trajectory.pixels, sd.decode(latents))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("unet", "epsilon"),
        ("unet", "v_prediction"),
        ("unet", "sample"),
        ("sdxl", "v_prediction"),
        ("pixart", "epsilon"),
    ],
)
def test_inversion_of_diffusers_is_its_inverse_scheduler(
    family: str, kind: str, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(family)
    monkeypatch.setattr(pipe, "scheduler", tiny_diffusion.ddim(kind, set_alpha_to_one=False))
    sd = Diffusion(pipe)
    trajectory = sd.invert(images, ["a cat", "a dog"], steps=4, convention="diffusers", progress=False)
    inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    inverse.set_timesteps(4)
    text = sd.prompt(["a cat", "a dog"]).cond
    x = sd.encode(images)
    for step, time in enumerate(inverse.timesteps):
        with torch.no_grad():
            x = inverse.step(sd.adapter.predict(x, time, text, 1.0), int(time), x).prev_sample
        torch.testing.assert_close(trajectory.latents[step + 1], x, **CLOSE)
    assert trajectory.timesteps == tuple(inverse.timesteps.tolist())
    null_text = sd.invert(images, ["a cat", "a dog"], steps=4, convention="null_text", progress=False)
    torch.testing.assert_close(null_text.final, x, **CLOSE)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_flows_are_inverted_by_euler_steps(family: str, images: Tensor) -> None:
    sd = Diffusion(pipeline(family))
    assert sd.prediction == "flow"
    trajectory = sd.invert(images, "a cat", steps=3, convention="diffusers", progress=False)
    forward = sd.generate("a cat", steps=3, size=(16, 24), progress=False)
    assert trajectory.timesteps == (0.0, *reversed(forward.timesteps[1:]))
    text = sd.prompt(["a cat", "a cat"]).cond
    x, times = sd.encode(images), [0.0, *reversed(forward.timesteps)]
    for step in range(3):
        with torch.no_grad():
            velocity = sd.adapter.predict(x, torch.tensor(times[step]), text, 1.0)
        x = x + (times[step + 1] - times[step]) / 1000 * velocity
        torch.testing.assert_close(trajectory.latents[step + 1], x, **CLOSE)
    for name in ("dhf", "rg", "null_text"):
        with pytest.raises(InputError, match="These serve it: diffusers"):
            sd.invert(images, convention=name)
        with pytest.raises(InputError, match="These serve it: diffusers"):
            sd.generate("a cat", convention=name)


def test_conventions_differ_and_say_which_they_are(images: Tensor) -> None:
    sd = Diffusion(pipeline("unet"))
    latents = sd.encode(images)
    ends = {}
    for name in ("dhf", "rg", "null_text"):
        trajectory = sd.invert(latents, steps=10, convention=name, progress=False)
        assert (trajectory.convention, trajectory.n_steps) == (name, 10)
        ends[name] = trajectory.final
    for one, two in (("dhf", "rg"), ("dhf", "null_text"), ("rg", "null_text")):
        # An offset of one timestep, and source or destination; rounding is a hundred times smaller.
        assert (ends[one] - ends[two]).abs().max() > 0.01
    assert sd.invert(latents, steps=1, progress=False).timesteps == (-1,)
    assert (
        sd.invert(latents, convention="rg", capture="hook_in", save_steps=0, stop=True, progress=False).n_steps == 100
    )


def test_guided_inversion_has_two_halves(images: Tensor) -> None:
    sd = Diffusion(pipeline("unet"))
    latents = sd.encode(images)
    settings = {"steps": 3, "guidance_scale": 3.0, "capture": SITES["unet"][0], "half": "both", "progress": False}
    batch, two = (sd.invert(latents, "a cat", guidance_calls=calls, **settings) for calls in ("batch", "two"))
    torch.testing.assert_close(batch.final, two.final, **CLOSE)
    for half in ("activations", "uncond"):
        torch.testing.assert_close(
            getattr(batch, half)[SITES["unet"][0]], getattr(two, half)[SITES["unet"][0]], **CLOSE
        )
    plain = sd.invert(latents, "a cat", steps=3, progress=False)
    assert plain.uncond is None
    assert (plain.final - batch.final).abs().max() > 0.01


def test_generation_goes_back_the_way_that_an_inversion_came(images: Tensor) -> None:
    sd = Diffusion(pipeline("unet"))
    latents = sd.encode(images[:1, :, :, :16]) * 0.2
    settings: dict[str, Any] = {"steps": 25, "convention": "null_text", "progress": False}
    there = sd.invert(latents, **settings).final
    back, astray = (sd.generate("", latents=x, guidance_scale=1.0, **settings).final for x in (there, there.flip(-1)))
    # DDIM undoes itself up to the turn of the prediction within a step, which is sharp in a random network.
    assert (back - latents).norm() < 0.3 * (astray - latents).norm()


def test_bad_input_of_an_inversion(images: Tensor) -> None:
    sd = Diffusion(pipeline("unet"))
    with pytest.raises(InputError, match="3 prompts for 2 images"):
        sd.invert(images, ["one", "two", "three"])
    with pytest.raises(InputError, match="give seed="):
        sd.invert(images, seed=None)
    with pytest.raises(InputError, match="half='uncond': a run without guidance"):
        sd.invert(images, capture="hook_in", half="uncond")
    with pytest.raises(InputError, match=r"-1\.\.1"):
        sd.invert(images * 200)
    with pytest.raises(ShapeError, match="height, width"):
        sd.invert(images[:, :2])
    with pytest.raises(InputError, match="these are latents"):
        sd.invert(sd.encode(images), size=16)
    with pytest.raises(InputError, match="unconditional half"):
        sd.invert(images, type(sd.prompt("a"))(sd.prompt("a").cond), guidance_scale=3.0)
    assert sd.invert(images, seed=None, vae="mode", steps=1, progress=False).n_steps == 1


def test_a_scheduler_that_clips_latents(images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    pipe = pipeline("unet")
    monkeypatch.setattr(pipe, "scheduler", tiny_diffusion.ddim(clip_sample=True))
    sd = Diffusion(pipe)
    with pytest.raises(InputError, match="clip_sample=True"):
        sd.invert(images, convention="diffusers")
    clipped = run_ours("unet")
    assert "clip_sample=True" in caplog.text
    torch.testing.assert_close(clipped.final, run_pipeline("unet"), **CLOSE)
    # The closed forms never clip.
    assert sd.invert(images, convention="dhf", steps=3, progress=False).predicted_x0.abs().max() > 1.5
