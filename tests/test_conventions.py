import dataclasses

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from interp.conventions import (
    CONVENTIONS,
    Convention,
    alpha_at,
    convention_named,
    ddim_step,
    generation_timesteps,
    inversion_timesteps,
    inversion_transitions,
)
from interp.errors import InputError, UnknownNameError
from tests.tiny_diffusion import ddim

CONFIG = {"num_train_timesteps": 1000, "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


def test_the_tables_of_dhf_are_the_published_ones() -> None:
    inversion = inversion_timesteps("dhf", CONFIG, 50)
    generation = generation_timesteps("dhf", CONFIG, 50)
    assert inversion == (-1, *range(0, 961, 20))
    assert generation == tuple(range(980, -1, -20))
    # Saved indexes count from the noise; inversion runs the other way.
    saved = (49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0)
    assert [inversion[49 - index] for index in saved] == [-1, 60, 160, 260, 360, 460, 560, 660, 760, 860, 960]
    assert [generation[index] for index in saved] == [0, 80, 180, 280, 380, 480, 580, 680, 780, 880, 980]


def test_one_step_of_dhf_sees_the_clean_latent() -> None:
    assert inversion_timesteps("dhf", CONFIG, 1) == (-1,)


def test_the_tables_of_the_other_presets() -> None:
    assert inversion_timesteps("rg", CONFIG, 100) == (-1, *range(1, 982, 10))
    assert generation_timesteps("rg", CONFIG, 100) == tuple(range(991, 0, -10))
    for name in ("null_text", "diffusers"):
        # The offset is the scheduler's own.
        assert inversion_timesteps(name, CONFIG, 50) == tuple(range(1, 982, 20))
        assert inversion_timesteps(name, CONFIG | {"steps_offset": 0}, 50) == tuple(range(0, 981, 20))


def test_alpha_of_a_clean_latent() -> None:
    alphas = ddim().alphas_cumprod
    first = float(alphas[0])
    at = {name: alpha_at(-1, CONVENTIONS[name], alphas, CONFIG) for name in CONVENTIONS}
    assert at == {"dhf": 1.0, "rg": first, "null_text": first, "diffusers": first}
    assert alpha_at(-1, CONVENTIONS["diffusers"], alphas, {}) == 1.0
    assert alpha_at(40, CONVENTIONS["dhf"], alphas, CONFIG) == float(alphas[40])
    assert first < 0.9995  # or one and first could not be told apart


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_timesteps_are_those_of_the_schedulers_of_diffusers(spacing: str, steps: int) -> None:
    forward = ddim(timestep_spacing=spacing)
    backward = DDIMInverseScheduler.from_config(forward.config)
    forward.set_timesteps(steps)
    backward.set_timesteps(steps)
    assert generation_timesteps("diffusers", forward.config, steps) == tuple(forward.timesteps.tolist())
    assert inversion_timesteps("diffusers", forward.config, steps) == tuple(backward.timesteps.tolist())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_steps_are_those_of_the_schedulers_of_diffusers(kind: str) -> None:
    forward = ddim(kind, set_alpha_to_one=False)
    backward = DDIMInverseScheduler.from_config(forward.config)
    generator = torch.Generator().manual_seed(1)
    latents, prediction = torch.randn(2, 2, 4, 3, 5, generator=generator).unbind(0)
    forward.set_timesteps(10)
    backward.set_timesteps(10)
    alphas = forward.alphas_cumprod
    how = CONVENTIONS["diffusers"]
    for transition in inversion_transitions(how, forward.config, 10):
        pair = [alpha_at(time, how, alphas, forward.config) for time in (transition.source, transition.destination)]
        got, clean = ddim_step(latents, prediction, kind, *pair)
        wanted = backward.step(prediction, transition.destination, latents)
        # Alphas near 0 divide by as little as 0.07: single precision, times that.
        torch.testing.assert_close(got, wanted.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clean, wanted.pred_original_sample, rtol=1e-5, atol=1e-5)
        back, clean = ddim_step(latents, prediction, kind, *reversed(pair))
        wanted = forward.step(prediction, transition.destination, latents)
        torch.testing.assert_close(back, wanted.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clean, wanted.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_all_kinds_of_prediction_say_the_same_of_the_same_noise() -> None:
    generator = torch.Generator().manual_seed(2)
    clean, noise = torch.randn(2, 1, 4, 2, 2, generator=generator).unbind(0)
    before, after = 0.3, 0.8
    latents = before**0.5 * clean + (1 - before) ** 0.5 * noise
    wanted = after**0.5 * clean + (1 - after) ** 0.5 * noise
    velocity = before**0.5 * noise - (1 - before) ** 0.5 * clean
    for kind, prediction in (("epsilon", noise), ("v_prediction", velocity), ("sample", clean)):
        got, stands_for = ddim_step(latents, prediction, kind, before, after)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)  # single precision
        torch.testing.assert_close(stands_for, clean, rtol=0, atol=1e-6)


def test_half_precision_is_stepped_in_single() -> None:
    latents = torch.full((1, 4, 2, 2), 3.0, dtype=torch.float16)
    after, _ = ddim_step(latents, torch.ones_like(latents), "epsilon", 1e-9, 0.5)
    # (3 - sqrt(1 - 1e-9)) / sqrt(1e-9) = 63246 fits float32 only; its latent does fit.
    assert after.dtype == torch.float16
    assert after.isfinite().all()


def test_a_clean_latent_has_no_noise_for_a_prediction_of_itself() -> None:
    latents = torch.ones(1, 4, 2, 2)
    with pytest.raises(InputError, match="alpha_first='final'"):
        ddim_step(latents, latents, "sample", 1.0, 0.9)


def test_presets_refuse_predictions_that_they_would_misread() -> None:
    for name in ("dhf", "rg"):
        CONVENTIONS[name].check("epsilon")
        with pytest.raises(InputError, match=r"silently wrong.*null_text, diffusers"):
            CONVENTIONS[name].check("v_prediction")
    with pytest.raises(InputError, match="These serve it: diffusers"):
        CONVENTIONS["null_text"].check("flow")
    with pytest.raises(InputError, match="No preset"):
        CONVENTIONS["diffusers"].check("score")


def test_conventions_by_name() -> None:
    own = dataclasses.replace(CONVENTIONS["dhf"], steps_offset=5)
    assert convention_named(own) is own
    assert generation_timesteps(own, CONFIG, 10)[-1] == 5
    with pytest.raises(UnknownNameError, match="Did you mean 'null_text'"):
        convention_named("nulltext")


@pytest.mark.parametrize("steps", [0, -1, 1001, True])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(InputError, match="1 to 1000"):
        generation_timesteps("dhf", CONFIG, steps)


def test_spacings_and_offsets_that_ddim_cannot_run() -> None:
    with pytest.raises(InputError, match="'linspace'"):
        inversion_timesteps("diffusers", CONFIG | {"timestep_spacing": "linspace"}, 50)
    assert inversion_timesteps("dhf", CONFIG | {"timestep_spacing": "linspace"}, 50)[1] == 0
    with pytest.raises(InputError, match="reaches timestep 1000"):
        generation_timesteps("rg", CONFIG, 1000)


def test_conventions_differ_visibly() -> None:
    assert isinstance(CONVENTIONS["dhf"], Convention)
    scheduler = DDIMScheduler.from_config(ddim().config)
    tables = {inversion_timesteps(name, scheduler.config, 50) for name in ("dhf", "rg", "diffusers")}
    assert len(tables) == 3
