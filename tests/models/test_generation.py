"""Generation of every family, against the pipelines of diffusers."""

from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
)

from interp.errors import InputError, ShapeError, UnknownNameError
from interp.models.diffusion import Diffusion
from interp.models.run_captures import run_captures
from tests import tiny_diffusion
from tests.pipelines import (
    CLOSE,
    STEPS,
    TWO,
    run_ours,
    run_pipeline,
    untouched,
)
from tests.tiny_diffusion import FAMILIES, pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_pipelines_own(family: str) -> None:
    trajectory = run_ours(family, **TWO)
    latents, images = run_pipeline(family, **TWO), run_pipeline(family, output_type="pt", **TWO)
    torch.testing.assert_close(trajectory.final, latents, **CLOSE)
    torch.testing.assert_close(trajectory.pixels, images, **CLOSE)
    assert images.std() > 0.1
    assert trajectory.latents.shape == (STEPS + 1, 4, *latents.shape[1:])
    assert len(trajectory.images) == 4
    assert trajectory.images[0].size == (16, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_without_negative_prompts_or_guidance(family: str) -> None:
    flux = family == "flux"
    plain = {"n": 1, "negative_prompt": None, "true_cfg_scale": None}
    given = {"num_images_per_prompt": 1, "negative_prompt": ...} | ({"true_cfg_scale": ...} if flux else {})
    ends = []
    for scale in (1.0, 4.0):
        ours = run_ours(family, ["a cat"], guidance_scale=scale, **plain)
        torch.testing.assert_close(ours.final, run_pipeline(family, ["a cat"], guidance_scale=scale, **given), **CLOSE)
        ends.append(ours.final)
    assert (ends[0] - ends[1]).abs().max() > 0.01


def test_generation_at_the_size_of_training() -> None:
    sd = Diffusion(pipeline("unet"))
    trajectory = sd.generate("a cat", steps=2, progress=False)
    wanted = run_pipeline(
        "unet", ["a cat"], height=..., width=..., negative_prompt=..., num_images_per_prompt=1, guidance_scale=7.5,
        num_inference_steps=2, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    torch.testing.assert_close(trajectory.final, wanted, **CLOSE)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_generation_with_another_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("unet")
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe, "scheduler", euler)
    ours = run_ours("unet")
    assert euler.num_inference_steps is None
    torch.testing.assert_close(ours.final, run_pipeline("unet"), **CLOSE)
    assert ours.latents[0].std() > 5  # noise scaled as Euler's first sigma asks for


def test_noise_levels_that_shift_with_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    monkeypatch.setattr(pipeline("sd3"), "scheduler", shifting)
    ours = run_ours("sd3")
    torch.testing.assert_close(ours.final, run_pipeline("sd3"), **CLOSE)
    assert run_ours("sd3", size=48).timesteps[1] > ours.timesteps[1]


def test_a_pixart_that_is_told_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("pixart")
    config = dict(pipe.transformer.config) | {"sample_size": 128, "use_additional_conditions": True}
    config |= {"num_attention_heads": 3, "cross_attention_dim": 24}  # the conditions share the width by three
    transformer = tiny_diffusion.redraw(PixArtTransformer2DModel.from_config(config), 50)
    monkeypatch.setattr(pipe, "transformer", transformer)
    ours = run_ours("pixart")
    torch.testing.assert_close(ours.final, run_pipeline("pixart"), **CLOSE)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_predictions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("unet")
    monkeypatch.setattr(pipe, "scheduler", tiny_diffusion.ddim(kind))
    assert Diffusion(pipe).prediction == kind
    wanted = run_pipeline("unet")
    torch.testing.assert_close(run_ours("unet").final, wanted, **CLOSE)
    # With DDIM as the pipeline's scheduler, null_text's closed form is the same generation.
    torch.testing.assert_close(run_ours("unet", convention="null_text").final, wanted, **CLOSE)
    for name in ("dhf", "rg"):
        with pytest.raises(InputError, match="silently wrong"):
            run_ours("unet", convention=name)
        with pytest.raises(InputError, match="silently wrong"):
            Diffusion(pipe).invert(torch.zeros(1, 4, 4, 4), convention=name)


def test_generation_of_dhf_is_the_closed_form() -> None:
    sd = Diffusion(pipeline("unet"))
    trajectory = sd.generate(
        "a cat", negative_prompt="bad", steps=4, seed=1, size=16, convention="dhf", guidance_scale=2.0, progress=False
    )
    text = sd.prompt("a cat", "bad")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    alphas = sd.pipeline.scheduler.alphas_cumprod
    assert trajectory.timesteps == (750, 500, 250, 0)
    for step, time in enumerate((750, 500, 250, 0)):
        torch.testing.assert_close(trajectory.latents[step], x, **CLOSE)
        with torch.no_grad():
            uncond = sd.denoiser(x, time, text.uncond.states).sample
            cond = sd.denoiser(x, time, text.cond.states).sample
        eps = uncond + 2.0 * (cond - uncond)
        x0 = (x - (1 - alphas[time]).sqrt() * eps) / alphas[time].sqrt()
        torch.testing.assert_close(trajectory.predicted_x0[step], x0, **CLOSE)
        after = alphas[time - 250] if time else torch.tensor(1.0)
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    torch.testing.assert_close(trajectory.final, x, **CLOSE)


def test_runs_are_deterministic_and_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (run_ours("unet", seed=seed).final for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)
    assert (one - other).abs().max() > 0.1


def test_given_latents_are_the_noise() -> None:
    noise = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(5))
    kept = noise.clone()
    assert torch.equal(run_ours("unet", latents=noise, size=None, seed=99).final, untouched("unet").final)
    assert torch.equal(noise, kept)
    # One prompt serves all latents.
    assert len(run_ours("unet", ["a cat"], n=1, latents=noise, size=None).final) == 2


def test_encoded_prompts_are_as_good_as_texts() -> None:
    sd = Diffusion(pipeline("sdxl"))
    settings = {"steps": 2, "size": 16, "progress": False}
    text = sd.generate("a cat", negative_prompt="bad", **settings)
    encoded = sd.generate(sd.prompt("a cat", "bad"), **settings)
    assert torch.equal(text.final, encoded.final)
    zeros = sd.prompt("a cat").uncond
    assert not zeros.states.any()  # what this checkpoint takes for no negative prompt
    assert sd.prompt("a cat", "").uncond.states.any()


def test_settings_that_are_no_literals() -> None:
    places = [Diffusion(pipeline("unet")).place("hook_in")]
    with pytest.raises(InputError, match="Did you mean 'uncond', 'cond'"):
        run_captures.__wrapped__(places, timesteps=(2.0, 1.0, 0.0), guided=True, half="uncnd")
    with pytest.raises(InputError, match="'batch' or 'two'"):
        run_ours("unet", guidance_calls="three")
    with pytest.raises(InputError, match="floats"):
        Diffusion(pipeline("unet")).check_latents(torch.zeros(4, 4, 8, 8).long())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"save_steps": [3], "capture": "hook_in"}, InputError, "save_steps: step 3 is out of range"),
        ({"save_steps": [1, 1], "capture": "hook_in"}, InputError, "twice"),
        ({"save_steps": [1]}, InputError, "capture="),
        ({"stop": True}, InputError, "capture="),
        ({"half": "both", "capture": "hook_in", "consume": lambda *_: None}, InputError, "which half"),
        ({"capture": "up.9.resnets.0.hook_branch"}, UnknownNameError, "up."),
        ({"capture": []}, InputError, "no sites"),
        ({"convention": "nulltext"}, UnknownNameError, "null_text"),
        ({"steps": 0}, InputError, "1 to 1000"),
        ({"steps": 1001}, InputError, "1 to 1000"),
        ({"n": 0}, InputError, "number of images"),
        ({"size": (20, 15)}, InputError, "multiples of 2"),
        ({"negative_prompt": ["one"] * 3}, InputError, "1 prompts with 3 negative"),
        ({"guidance_scale": 1.0}, InputError, "without guidance"),
        ({"true_cfg_scale": 2.0}, InputError, "Flux"),
        ({"latents": torch.zeros(4, 3, 8, 8), "size": None}, ShapeError, "4, height, width"),
        ({"latents": torch.zeros(3, 4, 8, 8), "size": None}, ShapeError, "3 latents for 1 prompts"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, InputError, "not both"),
    ],
)
def test_bad_settings_of_a_run(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_ours("unet", **changes)


def test_flux_is_guided_by_a_condition() -> None:
    with pytest.raises(InputError, match="needs a negative prompt"):
        run_ours("flux", negative_prompt=None)
    with pytest.raises(InputError, match="true_cfg_scale above 1"):
        run_ours("flux", true_cfg_scale=None)


def test_a_run_that_captured_its_autoencoder_still_decodes_other_latents():
    run = run_ours("unet", capture="vae.decoder.hook_out", steps=2)
    assert run.predicted_x0 is not None
    earlier = run.predicted_x0[0]
    expected = Diffusion(pipeline("unet")).decode(earlier)
    torch.testing.assert_close(run.decode(earlier), expected)
    assert not torch.allclose(run.decode(earlier), run.pixels, atol=1e-3)
