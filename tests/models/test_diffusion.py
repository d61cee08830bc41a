"""The wrapper: what it knows, one call of the denoiser, and contexts around the pipeline's own runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from interp.edits import Scale, Zero
from interp.errors import InputError, NeverFiredError, ShapeError, SiteUnavailableError, UnknownNameError
from interp.models.diffusion import Diffusion
from interp.models.diffusion_loading import load_pipeline
from tests import tiny_diffusion
from tests.pipelines import CLOSE, SITES, hooked, hooked_calls, last_block, run_ours, run_pipeline
from tests.tiny_diffusion import FAMILIES, pipeline

BRANCHES = "up.*.resnets.*.hook_branch"


def noise(sd: Diffusion, rows: int = 2) -> Tensor:
    return torch.randn(rows, sd.adapter.latent_channels, 8, 6, generator=torch.Generator().manual_seed(7))


def n_hooks(pipe: Any) -> int:
    modules = [
        module for part in pipe.components.values() if isinstance(part, torch.nn.Module) for module in part.modules()
    ]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


# ---------------------------------------------------------------- what it is


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_is(family: str) -> None:
    sd = Diffusion(pipeline(family))
    assert sd.family == family
    assert sd.prediction == ("flow" if family in ("sd3", "flux") else "epsilon")
    assert (sd.dtype, sd.device) == (torch.float32, torch.device("cpu"))
    assert sd.denoiser is (sd.pipeline.unet if family in ("unet", "sdxl") else sd.pipeline.transformer)
    assert f"family={family!r}" in repr(sd)
    assert SITES[family][0] in sd.sites()
    assert sd.place(SITES[family][0]).path == SITES[family][1]


def test_the_twelve_branches_of_a_unet_and_their_channels() -> None:
    sd = Diffusion(pipeline("unet"))
    sites = sd.sites(BRANCHES)
    assert len(sites) == 12
    convs = [resnet.conv2 for block in sd.pipeline.unet.up_blocks for resnet in block.resnets]
    assert sd.channels(sites) == [conv.out_channels for conv in convs] == sd.channels(BRANCHES)


def test_absent_sites_say_what_there_is() -> None:
    sd = Diffusion(pipeline("sd3"))
    with pytest.raises((UnknownNameError, SiteUnavailableError)):
        sd.sites(BRANCHES)
    with pytest.raises((UnknownNameError, SiteUnavailableError)):
        sd.capture(noise(sd), 500.0, "a cat", "up.0.resnets.0.hook_branch")


def test_only_pipelines_of_known_families_are_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="StableDiffusionPipeline"):
        Diffusion(pipeline("unet").unet)
    with pytest.raises(InputError, match="from_pretrained"):
        Diffusion("zoo:tiny-diffusion")
    monkeypatch.setattr(pipeline("unet"), "vae", None)
    with pytest.raises(InputError, match="no vae"):
        Diffusion(pipeline("unet"))


# ---------------------------------------------------------------- images


def test_images_to_latents_and_back() -> None:
    sd = Diffusion(pipeline("unet"))
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    latents = sd.encode(image, size=(16, 24))
    small = image.resize((24, 16), Image.Resampling.BILINEAR)
    assert torch.equal(latents, sd.encode([small]))
    assert latents.shape == (1, 4, 8, 12)
    assert sd.decode(latents).shape == (1, 3, 16, 24)
    sampled = [sd.encode(small, vae="sample", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    with pytest.raises(InputError, match="give seed="):
        sd.encode(small, vae="sample")
    with pytest.raises(ShapeError, match="latents of shape"):
        sd.decode(torch.zeros(1, 3, 8, 8))


def test_sizes_follow_the_model() -> None:
    for family, multiple in (("unet", 2), ("sd3", 4), ("flux", 4), ("pixart", 4)):
        sd = Diffusion(pipeline(family))
        side = 5 * multiple
        assert sd.encode(torch.zeros(1, 3, side, multiple)).shape[-2:] == (side // 2, multiple // 2)
        with pytest.raises(InputError, match=f"multiples of {multiple}"):
            sd.encode(torch.zeros(1, 3, side, side + 1))
    sd3 = Diffusion(pipeline("sd3"))
    with pytest.raises(ShapeError, match="positions for 48"):
        sd3.capture(torch.zeros(1, 4, 8, 50), 500.0, "a cat", "hook_in")
    with pytest.raises(ShapeError, match="multiples of 2"):
        sd3.capture(torch.zeros(1, 4, 8, 7), 500.0, "a cat", "hook_in")


# ---------------------------------------------------------------- one call


@pytest.mark.parametrize("family", FAMILIES)
def test_a_capture_equals_a_plain_hook_and_leaves_nothing_behind(family: str) -> None:
    sd = Diffusion(pipeline(family))
    site, path = SITES[family]
    component, inside = path.split(".", 1)
    text, latents, hooks = sd.prompt(["a cat", "a dog"]), noise(sd), n_hooks(sd.pipeline)
    with torch.no_grad(), hooked(sd.pipeline.components[component].get_submodule(inside)) as caught:
        wanted = sd.adapter.predict(latents, torch.tensor(321), text.cond, 3.5)
    acts = sd.capture(latents, 321, text, site)
    assert torch.equal(acts[site], caught[0])
    assert torch.equal(acts.output, wanted)
    assert acts.output.shape == latents.shape
    assert n_hooks(sd.pipeline) == hooks
    # The same prompts as text, and one for all latents.
    assert torch.equal(sd.capture(latents, 321, ["a cat", "a dog"], site)[site], caught[0])
    one = sd.capture(latents, 321, "a cat", site)[site]
    torch.testing.assert_close(one[0], caught[0][0], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stopped_capture_computes_nothing_further(family: str) -> None:
    sd = Diffusion(pipeline(family))
    site = SITES[family][0]
    whole = sd.capture(noise(sd), 321, "a cat", site)
    with hooked_calls(last_block(sd)) as calls:
        stopped = sd.capture(noise(sd), 321, "a cat", site, stop=True)
        assert not calls
    assert stopped.output is None
    assert torch.equal(stopped[site], whole[site])


def test_a_capture_takes_timesteps_of_any_kind() -> None:
    sd = Diffusion(pipeline("unet"))
    site, latents = SITES["unet"][0], noise(sd)
    text = sd.prompt("a cat")
    for clean in (-1, -1.0, torch.tensor(-1)):
        with torch.no_grad():
            wanted = sd.denoiser(latents, -1, text.cond.states.repeat(2, 1, 1)).sample
        assert torch.equal(sd.capture(latents, clean, text, site).output, wanted)
    assert not torch.equal(sd.capture(latents, 0, text, site).output, wanted)
    # Token states alone, in the family that needs nothing else.
    assert torch.equal(sd.capture(latents, -1, text.cond.states, site).output, wanted)
    with pytest.raises(InputError, match=r"sd\.prompt"):
        Diffusion(pipeline("flux")).capture(noise(Diffusion(pipeline("flux"))), 1, text.cond.states, "hook_in")
    with pytest.raises(InputError, match="3 prompts for 2 images"):
        sd.capture(latents, 0, ["a", "b", "c"], site)


@pytest.mark.parametrize(
    ("timestep", "error", "match"),
    [
        (1001, InputError, "out of range"),
        (-2, InputError, "out of range"),
        (float("nan"), InputError, "out of range"),
        (torch.zeros(3), ShapeError, "one for all latents, or 2"),
    ],
)
def test_bad_timesteps_of_a_capture(timestep: Any, error: type[Exception], match: str) -> None:
    sd = Diffusion(pipeline("unet"))
    with pytest.raises(error, match=match):
        sd.capture(noise(sd), timestep, "a cat", "hook_out")


@pytest.mark.parametrize("shape", [(1, 5, 31), (5, 32)])
def test_bad_token_states_of_a_capture(shape: tuple[int, ...]) -> None:
    sd = Diffusion(pipeline("unet"))
    with pytest.raises(ShapeError, match=r"takes \[batch, pos, 32\]"):
        sd.capture(noise(sd), 1, torch.zeros(shape), "hook_out")


def test_edits_of_one_call() -> None:
    sd = Diffusion(pipeline("unet"))
    site, path = SITES["unet"]
    latents, text = noise(sd), sd.prompt("a cat")
    module = sd.pipeline.unet.get_submodule(path.removeprefix("unet."))
    plain = sd.capture(latents, 321, text, "hook_out").output
    handle = module.register_forward_hook(lambda module, args, output: output * 0.5)
    wanted = sd.capture(latents, 321, text, "hook_out").output
    handle.remove()
    edited = sd.capture(latents, 321, text, site, edits=Scale(site, 0.5))
    torch.testing.assert_close(edited.output, wanted, **CLOSE)
    assert (edited.output - plain).abs().max() > 0.01
    torch.testing.assert_close(edited[site], sd.capture(latents, 321, text, site)[site] * 0.5, **CLOSE)
    with pytest.raises(InputError, match="out of range; the run has steps 0 to 0"):
        sd.capture(latents, 321, text, site, edits=Zero(site, steps=1))


def test_gradients_on_request() -> None:
    sd = Diffusion(pipeline("unet"))
    site, path = SITES["unet"]
    latents, text = noise(sd), sd.prompt("a cat")
    acts = sd.capture(latents, 321, text, site, grad=True)
    got = acts.gradients(acts.output.square().sum())[site]
    kept: list[Tensor] = []
    module = sd.pipeline.unet.get_submodule(path.removeprefix("unet."))
    handle = module.register_forward_hook(lambda module, args, output: kept.append(output))
    output = sd.denoiser(latents, 321, text.cond.states.repeat(2, 1, 1)).sample
    handle.remove()
    (wanted,) = torch.autograd.grad(output.square().sum(), kept)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)  # sums of 10^4 products in single precision
    assert wanted.abs().max() > 0.01
    assert not sd.capture(latents, 321, text, site)[site].requires_grad


# ---------------------------------------------------------------- around the pipeline's own runs


@pytest.mark.parametrize("family", ["unet", "sd3", "pixart"])
def test_edits_and_records_around_the_pipelines_own_run(family: str) -> None:
    sd = Diffusion(pipeline(family))
    site, path = SITES[family]
    component, inside = path.split(".", 1)
    with hooked(sd.pipeline.components[component].get_submodule(inside)) as caught:
        plain = run_pipeline(family)
    with sd.record(site, steps=[0, 2], half="cond") as acts:
        assert torch.equal(run_pipeline(family), plain)
    wanted = torch.stack([caught[step].chunk(2)[1] for step in (0, 2)])
    assert torch.equal(acts[site], wanted)
    with sd.edit(Zero(site, steps=1, half="cond")):
        edited = run_pipeline(family)
    ours = sd.generate(
        "a red cat", negative_prompt="a bad, blurry one", n=2, steps=3, guidance_scale=3.0,
        size=(24, 16), seed=5, edits=Zero(site, steps=1, half="cond"), progress=False,
    )  # fmt: skip
    torch.testing.assert_close(edited, ours.final, **CLOSE)
    assert (edited - plain).abs().max() > 0.01
    with pytest.raises(InputError, match="at least one edit"), sd.edit():
        pass
    with pytest.raises(NeverFiredError), sd.edit(Zero(site, steps=7)):
        run_pipeline(family)


def test_flux_calls_for_the_conditional_half_first() -> None:
    sd = Diffusion(pipeline("flux"))
    site, path = SITES["flux"]
    with hooked(sd.denoiser.get_submodule(path.removeprefix("transformer."))) as caught:
        plain = run_pipeline("flux")
    with sd.record(site, steps=[1, 2], half="uncond") as acts:
        run_pipeline("flux")
    assert torch.equal(acts[site], torch.stack([caught[3], caught[5]]))
    with sd.edit(Zero(site, steps=2, half="cond")):
        edited = run_pipeline("flux")
    ours = run_ours("flux", edits=Zero(site, steps=2, half="cond"))
    torch.testing.assert_close(edited, ours.final, **CLOSE)
    assert (edited - plain).abs().max() > 0.01
    # Runs of one step without guidance are no halves of each other.
    with sd.record(site, half="cond") as acts:
        for _ in range(2):
            run_pipeline("flux", true_cfg_scale=1.0, num_inference_steps=1)
    assert len(acts.calls(site)) == 2


# ---------------------------------------------------------------- loading


def test_a_saved_pipeline_loads_in_single_precision_unless_told_otherwise(tmp_path: Path) -> None:
    tiny_diffusion.stable_diffusion(seed=60).to(torch.float16).save_pretrained(tmp_path)
    sd = Diffusion.from_pretrained(tmp_path)
    for part in (sd.pipeline.unet, sd.pipeline.vae, sd.pipeline.text_encoder):
        assert part.dtype == torch.float32
        assert not part.training
    assert sd.name == str(tmp_path)
    assert sd.generate("a cat", steps=1, size=16, progress=False).final.isfinite().all()
    assert Diffusion.from_pretrained(str(tmp_path), dtype="float16").dtype == torch.float16
    assert Diffusion.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        load_pipeline(tmp_path / "absent")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}')
    with pytest.raises(InputError, match="cannot load a diffusion pipeline"):
        load_pipeline(tmp_path)
    with pytest.raises(InputError, match="not both"):
        load_pipeline(tmp_path, device="cpu", device_map="balanced")
    for wrong in ("float12", torch.int8):
        with pytest.raises(InputError, match="floating dtype"):
            load_pipeline(tmp_path, dtype=wrong)
    with pytest.raises(UnknownNameError, match="tiny-"):
        load_pipeline("zoo:tiny-difusion")
