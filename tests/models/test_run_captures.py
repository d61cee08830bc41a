"""Captures and edits along a run, against plain hooks on runs of the pipelines of diffusers."""

import pytest
import torch
from torch import Tensor

from interp.edits import Add, MeanAblate, Scale, Zero
from interp.errors import InputError, NeverFiredError
from interp.models.diffusion import Diffusion
from tests import tiny_diffusion
from tests.pipelines import (
    CLOSE,
    SITES,
    STEPS,
    hooked,
    hooked_calls,
    last_block,
    plain_edit,
    run_ours,
    run_pipeline,
    untouched,
)
from tests.tiny_diffusion import FAMILIES, pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_along_a_run_equal_plain_hooks_on_the_pipeline(family: str) -> None:
    site, path = SITES[family]
    component, inside = path.split(".", 1)
    with hooked(pipeline(family).components[component].get_submodule(inside)) as caught:
        run_pipeline(family)
    if family == "flux":  # called for each half, the conditional one first
        cond, uncond = torch.stack(caught[0::2]), torch.stack(caught[1::2])
    else:
        uncond, cond = torch.stack(caught).chunk(2, dim=1)
    assert (cond - uncond).abs().max() > 0.01
    for calls in ("batch", "two") if family in ("unet", "sd3") else ("two",):
        trajectory = run_ours(family, capture=site, half="both", guidance_calls=calls)
        torch.testing.assert_close(trajectory.activations[site], cond, **CLOSE)
        torch.testing.assert_close(trajectory.uncond[site], uncond, **CLOSE)
        assert trajectory.activations.axes(site)[:2] == ("step", "batch")
    alone = run_ours(family, capture=site, half="uncond")
    torch.testing.assert_close(alone.uncond[site], uncond, **CLOSE)
    assert len(alone.activations) == 0


def test_only_saved_steps_are_kept() -> None:
    site = SITES["unet"][0]
    everything = run_ours("unet", capture=site)
    assert everything.saved_steps == (0, 1, 2)
    some = run_ours("unet", capture=site, save_steps=[2, 0], dtype=torch.float64)
    assert (some.saved_steps, some.saved_timesteps) == ((0, 2), (some.timesteps[0], some.timesteps[2]))
    assert some.activations[site].dtype == torch.float64
    assert torch.equal(some.activations[site].float(), everything.activations[site][[0, 2]])
    one = run_ours("unet", capture=site, save_steps=1)
    assert torch.equal(one.activations[site], everything.activations[site][1:2])
    assert one.activations.axes(site) == ("step", "batch", "channel", "height", "width")


@pytest.mark.parametrize("calls", ["batch", "two"])
def test_consumed_captures_are_streamed_and_not_kept(calls: str) -> None:
    site = SITES["unet"][0]
    streamed: list[tuple[str, int, float, Tensor]] = []

    def consume(site: str, step: int, timestep: float, tensor: Tensor) -> None:
        streamed.append((site, step, timestep, tensor))

    kept = run_ours("unet", capture=site, guidance_calls=calls)
    trajectory = run_ours("unet", capture=site, save_steps=[0, 2], consume=consume, guidance_calls=calls)
    assert [one[:3] for one in streamed] == [(site, step, kept.timesteps[step]) for step in (0, 2)]
    for _, step, _, tensor in streamed:
        assert torch.equal(tensor, kept.activations[site][step])
    assert len(trajectory.activations) == 0
    assert trajectory.saved_steps == (0, 2)


def test_latents_can_be_dropped() -> None:
    everything, ends = untouched("unet"), run_ours("unet", keep_latents=False)
    assert ends.latent_steps == (0, STEPS)
    assert torch.equal(ends.latents, everything.latents[[0, STEPS]])
    assert torch.equal(ends.predicted_x0, everything.predicted_x0[-1:])


def test_text_encoders_and_the_autoencoder_are_captured_in_the_run() -> None:
    sites = ["text_encoder.blocks.1.hook_resid_post", "vae.decoder.hook_out", "hook_in"]
    pipe = pipeline("unet")
    with hooked(pipe.vae.decoder) as decoded, hooked(pipe.text_encoder.encoder.layers[1]) as encoded:
        run_pipeline("unet", output_type="pt")
    trajectory = run_ours("unet", capture=sites, half="both")
    torch.testing.assert_close(trajectory.activations["vae.decoder.hook_out"], decoded[0], **CLOSE)
    torch.testing.assert_close(trajectory.activations[sites[0]], encoded[0], **CLOSE)
    torch.testing.assert_close(trajectory.uncond[sites[0]], encoded[1], **CLOSE)
    assert trajectory.activations.axes(sites[0]) == ("batch", "pos", "d_model")
    assert torch.equal(trajectory.activations["hook_in"], trajectory.latents[:-1])
    with pytest.raises(NeverFiredError, match=r"vae\.decoder"):
        run_ours("unet", capture=sites, decode=False)


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize(("family", "calls"), [(family, "batch") for family in FAMILIES] + [("unet", "two")])
def test_a_run_stops_after_its_last_capture(family: str, calls: str) -> None:
    site = SITES[family][0]
    sd = Diffusion(pipeline(family))
    wanted = run_ours(family, capture=site, save_steps=[0, 1], half="both", guidance_calls=calls)
    with hooked_calls(sd.denoiser) as started, hooked(last_block(sd)) as finished:
        stopped = run_ours(family, capture=site, save_steps=[0, 1], half="both", guidance_calls=calls, stop=True)
    # Each step before the last is whole; of the last one only what precedes the captured site ran.
    halves = 2 if calls == "two" else 1
    assert (len(started), len(finished)) == (2 * halves, halves)
    for half in ("activations", "uncond"):
        assert torch.equal(getattr(stopped, half)[site], getattr(wanted, half)[site])
    assert stopped.stopped
    assert torch.equal(stopped.latents, wanted.latents[:2])
    assert stopped.timesteps == wanted.timesteps
    with pytest.raises(InputError, match="stopped"):
        _ = stopped.images


def test_stopping_needs_a_site_of_the_denoiser() -> None:
    with pytest.raises(InputError, match="site of the denoiser"):
        run_ours("unet", capture="text_encoder.blocks.0.hook_resid_post", stop=True)
    # Sites elsewhere do not keep a run from stopping.
    sites = ["text_encoder.blocks.0.hook_resid_post", SITES["unet"][0]]
    assert run_ours("unet", capture=sites, save_steps=0, stop=True).stopped


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize(
    ("family", "half"), [(family, half) for family in FAMILIES for half in ("cond", "uncond")] + [("unet", None)]
)
def test_edits_by_step_and_half_equal_a_plain_hook_on_the_pipeline(family: str, half: str | None) -> None:
    site, path = SITES[family]
    component, inside = path.split(".", 1)
    module = pipeline(family).components[component].get_submodule(inside)

    def change(output: Tensor, call: int) -> Tensor:
        if family == "flux":
            step, now = call // 2, ("cond", "uncond")[call % 2]
            return output * 0 if step == 1 and half in (now, None) else output
        if call != 1:
            return output
        uncond, cond = output.chunk(2)
        return torch.cat([uncond * (half == "cond"), cond * (half == "uncond")])

    plain = untouched(family)
    with plain_edit(module, change):
        wanted = run_pipeline(family)
    for calls in ("batch", "two") if family == "unet" else ("batch",) if half == "cond" else ("two",):
        edited = run_ours(family, edits=Zero(site, steps=1, half=half), guidance_calls=calls)
        torch.testing.assert_close(edited.final, wanted, **CLOSE)
        torch.testing.assert_close(edited.latents[1], plain.latents[1], **CLOSE)
        assert (edited.latents[2] - plain.latents[2]).abs().max() > 0.01


def test_edits_of_the_autoencoder_change_the_images_and_not_the_latents() -> None:
    plain = untouched("unet")
    edited = run_ours("unet", edits=Scale("vae.decoder.hook_in", 0.5))
    assert torch.equal(edited.final, plain.final)
    with torch.no_grad():
        vae = pipeline("unet").vae
        # The decoder's input is the latents after this convolution.
        wanted = vae.decoder(vae.post_quant_conv(plain.final / vae.config.scaling_factor) * 0.5) / 2 + 0.5
    torch.testing.assert_close(edited.pixels, wanted.clamp(0, 1), **CLOSE)
    assert (edited.pixels - plain.pixels).abs().max() > 0.01


def test_edits_of_the_text_encoder_by_half() -> None:
    site = "text_encoder.blocks.2.hook_resid_post"
    value = torch.linspace(-3, 3, tiny_diffusion.WIDTH)
    ends = [run_ours("unet", edits=Add(site, value, half=half)).final for half in ("cond", "uncond")]
    plain = untouched("unet").final
    assert (ends[0] - plain).abs().max() > 0.01
    assert (ends[1] - plain).abs().max() > 0.01
    assert (ends[0] - ends[1]).abs().max() > 0.01


def test_edits_that_never_apply_are_refused_before_anything_runs() -> None:
    site = SITES["unet"][0]
    with hooked_calls(pipeline("unet").unet) as calls:
        with pytest.raises(InputError, match="never applies: without guidance"):
            run_ours("unet", edits=Zero(site, half="uncond"), guidance_scale=1.0, negative_prompt=None)
        with pytest.raises(InputError, match="step 3 is out of range; the run has steps 0 to 2"):
            run_ours("unet", edits=Zero(site, steps=[1, 3]))
        with pytest.raises(InputError, match="selects no step"):
            run_ours("unet", edits=Zero(site, steps=slice(5, 9)))
        with pytest.raises(InputError, match="'cond' and 'uncond'"):
            run_ours("unet", edits=Zero(site, half="both"))
    assert not calls


def test_captures_and_edits_of_a_tiny_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("unet")
    vae = tiny_diffusion.tiny_autoencoder()
    monkeypatch.setitem(pipe._internal_dict, "vae", ("diffusers", "AutoencoderTiny"))
    monkeypatch.setattr(pipe, "vae", vae)
    monkeypatch.setattr(pipe, "vae_scale_factor", 4)
    sites = ["vae.decoder.hook_in", "vae.decoder.up.1.resnets.0.hook_branch", "vae.decoder.hook_out"]
    plain = run_ours("unet", capture=sites)
    with torch.no_grad(), hooked(vae.decoder.layers[6].conv) as branch, hooked(vae.decoder) as out:
        vae.decode(plain.final / vae.config.scaling_factor)
    assert torch.equal(plain.activations[sites[0]], plain.final / vae.config.scaling_factor)
    assert torch.equal(plain.activations[sites[1]], branch[0])
    assert torch.equal(plain.activations[sites[2]], out[0])
    edited = run_ours("unet", edits=Zero(sites[1]))
    assert torch.equal(edited.latents, plain.latents)
    assert (edited.pixels - plain.pixels).abs().max() > 0.01
    images = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inverted = Diffusion(pipe).invert(images, steps=2, capture="vae.encoder.hook_out", progress=False)
    got = inverted.activations["vae.encoder.hook_out"] * vae.config.scaling_factor
    torch.testing.assert_close(got, inverted.latents[0], **CLOSE)


def test_runs_inside_blocks_that_touch_the_denoisers_input() -> None:
    # The block's hook on the UNet's input is there before the run's own clock.
    sd = Diffusion(pipeline("unet"))
    streamed: list[tuple[int, float]] = []
    with sd.edit(Scale("hook_in", 1.5)):
        kept = run_ours("unet", capture="hook_in", save_steps=[1])
        run_ours("unet", capture="hook_in", consume=lambda site, step, time, x: streamed.append((step, time)))
    assert streamed == list(enumerate(kept.timesteps))
    torch.testing.assert_close(kept.activations["hook_in"][0], kept.latents[1] * 1.5, **CLOSE)
    with sd.record("hook_in") as acts:
        run = run_ours("unet", edits=Scale("hook_in", 1.5, steps=1, half="cond"))
    uncond, cond = acts["hook_in"].chunk(2, dim=1)
    assert torch.equal(uncond, run.latents[:-1])
    torch.testing.assert_close(cond[1], uncond[1] * 1.5, **CLOSE)
    assert torch.equal(cond[[0, 2]], uncond[[0, 2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_consumers_are_told_the_timesteps_of_the_trajectory(family: str) -> None:
    # Flux is given them in thousandths.
    streamed: list[float] = []
    site = SITES[family][0]
    run = run_ours(family, capture=site, consume=lambda site, step, time, x: streamed.append(time))
    assert tuple(streamed) == run.timesteps


def test_means_are_those_of_one_half() -> None:
    edit = MeanAblate(SITES["unet"][0])
    one, two = (run_ours("unet", edits=edit, guidance_calls=calls) for calls in ("batch", "two"))
    torch.testing.assert_close(one.final, two.final, **CLOSE)
    assert (one.final - untouched("unet").final).abs().max() > 0.01
    # Rows that are selected by hand take another way through the selection.
    rows, both = (MeanAblate(SITES["unet"][0], rows=rows) for rows in ([0, 1], None))
    torch.testing.assert_close(run_ours("unet", edits=rows).final, run_ours("unet", edits=both).final, **CLOSE)


def test_zeros_in_place_of_an_empty_prompt_are_not_edited() -> None:
    site = "text_encoder_2.blocks.0.hook_resid_post"
    assert pipeline("sdxl").config.force_zeros_for_empty_prompt
    with pytest.raises(NeverFiredError, match="half never came"):
        run_ours("sdxl", negative_prompt=None, edits=Scale(site, 3.0, half="uncond"))
    edited = run_ours("sdxl", edits=Scale(site, 3.0, half="uncond"))
    assert (edited.final - untouched("sdxl").final).abs().max() > 0.01
