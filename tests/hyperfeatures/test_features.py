import gc
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from interp import hyperfeatures
from interp.errors import InputError, UnknownNameError
from interp.hyperfeatures import (
    Accumulator,
    AggregationNetwork,
    FeatureSpec,
    add_noise,
    extract,
    features,
    layer_maps,
    presets,
    stack,
    stream,
)
from interp.models.diffusion import Diffusion
from tests.tiny_diffusion import pipeline, stable_diffusion

STEPS = 10
# The same float32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@cache
def model():
    return Diffusion(stable_diffusion())


def pixels(n=2, height=16, width=16, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def spec_of(sd, **settings):
    return presets.hyperfeatures(sd, **{"steps": STEPS, "indices": (9, 5, 0), "seed": 3} | settings)


def network(sd, spec, seed=0):
    net = AggregationNetwork(
        sd.channels(list(spec.sites)), spec.n_steps, dim=16, width=8, n_groups=4, sites=spec.sites, seed=seed
    )
    net.mixing_weights.data += torch.randn(net.mixing_weights.shape, generator=torch.Generator().manual_seed(seed))
    return net


class Conv2Hooks:
    """Plain torch hooks on conv2 of every resnet of the decoder, and on the UNet's timesteps."""

    def __init__(self, unet):
        self.unet, self.maps, self.times, self.handles = unet, [], [], []

    def __enter__(self):
        self.handles.append(self.unet.register_forward_pre_hook(self.start, with_kwargs=True))
        for block in self.unet.up_blocks:
            for resnet in block.resnets:
                self.handles.append(resnet.conv2.register_forward_hook(lambda *call: self.maps[-1].append(call[2])))
        return self

    def start(self, module, args, kwargs):
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.times.append(float(torch.as_tensor(time).flatten()[0]))
        self.maps.append([])

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def joined(maps, size):
    resized = [F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps]
    return torch.cat(resized, dim=1)


def test_the_preset_has_the_official_layers_and_timesteps():
    spec = presets.hyperfeatures(model())
    assert spec.sites == tuple(f"up.{block}.resnets.{n}.hook_branch" for block in range(4) for n in range(3))
    assert spec.timesteps == (-1, 60, 160, 260, 360, 460, 560, 660, 760, 860, 960)
    assert (spec.mode, spec.convention, spec.steps, spec.output_size) == ("inversion", "dhf", 50, (8, 8))
    made = presets.generated(model(), "a bird")
    assert made.timesteps == (0, 80, 180, 280, 380, 480, 580, 680, 780, 880, 980)
    assert (made.prompt, made.guidance_scale, made.saved[0]) == ("a bird", 7.5, 49)
    assert "grainy,  writing" in made.negative_prompt
    one = presets.one_step(model())
    assert (one.timesteps, one.steps, one.saved) == ((-1,), 1, (0,))
    dift = presets.dift(model(), prompt="a photo of a cat")
    assert (dift.sites, dift.timesteps, dift.n_noises) == (("up.1.hook_out",), (261,), 8)


def test_presets_fit_a_model_of_three_blocks():
    spec = presets.hyperfeatures(Diffusion(pipeline("sdxl")), steps=20)
    assert len(spec.sites) == 9
    assert spec.n_steps == 11
    assert (spec.timesteps[0], spec.timesteps[-1]) == (-1, 900)


def test_a_stack_by_inversion_is_what_plain_hooks_on_conv2_see():
    sd, images = model(), pixels()
    spec = spec_of(sd, vae="mode", output_size=(5, 7))
    found = stack(sd, images, spec)
    with Conv2Hooks(sd.pipeline.unet) as hooks:
        sd.invert(sd.encode(images), steps=STEPS, convention="dhf", progress=False)
    assert hooks.times == [-1, 0, 100, 200, 300, 400, 500, 600, 700, 800]
    assert found.shape == (2, 3, 3 * 32 + 3 * 32 + 3 * 24 + 3 * 16, 5, 7)
    for step, call in enumerate((0, 4, 9)):
        assert hooks.times[call] == spec.timesteps[step]
        torch.testing.assert_close(found[:, step], joined(hooks.maps[call], (5, 7)), **CLOSE)
    assert not torch.allclose(found[:, 0], found[:, 1], atol=0.1)


def test_layer_maps_are_the_hooks_outputs_as_they_are():
    sd, images = model(), pixels()
    spec = spec_of(sd, vae="mode", output_size=(5, 7))
    found, clean = layer_maps(sd, images, spec)
    torch.testing.assert_close(clean, sd.encode(images))
    with Conv2Hooks(sd.pipeline.unet) as hooks:
        sd.invert(sd.encode(images), steps=STEPS, convention="dhf", progress=False)
    assert {tuple(maps.shape[-2:]) for maps in found} == {(1, 1), (2, 2), (4, 4), (8, 8)}
    for layer, maps in enumerate(found):
        for step, call in enumerate((0, 4, 9)):
            torch.testing.assert_close(maps[:, step], hooks.maps[call][layer], **CLOSE)
    torch.testing.assert_close(features.joined(found, (5, 7)), stack(sd, images, spec), **CLOSE)
    with pytest.raises(InputError, match="several sizes"):
        features.joined(found, None)


@pytest.mark.parametrize(
    "site", ["up.3.attn.0.blocks.0.self.hook_q", "up.3.attn.0.blocks.0.cross.hook_pattern", "hook_time_embed"]
)
def test_sites_that_hold_no_map_of_the_image_are_refused(site):
    with pytest.raises(InputError, match=f"{site} is .*no map of the image"):
        stack(model(), pixels(), presets.one_step(model(), sites=site))


def test_a_drawn_latent_does_not_depend_on_the_batch():
    sd, images = model(), pixels()
    spec = spec_of(sd, vae="sample")
    both, alone = stack(sd, images, spec), stack(sd, images[1:], spec)
    torch.testing.assert_close(both[1:], alone, **CLOSE)
    other = stack(sd, images[1:], replace(spec, seed=4))
    assert not torch.allclose(alone, other, atol=1e-2)


def test_the_clean_map_is_one_call_at_minus_one_on_the_clean_latent():
    sd, images = model(), pixels()
    one = stack(sd, images, presets.one_step(sd, vae="mode"))
    with Conv2Hooks(sd.pipeline.unet) as hooks, torch.no_grad():
        latents = sd.encode(images, vae="mode")
        text = sd.pipeline.encode_prompt([""] * 2, "cpu", 1, False)[0]
        sd.pipeline.unet(latents, torch.tensor(-1), encoder_hidden_states=text)
    torch.testing.assert_close(one[:, 0], joined(hooks.maps[0], (8, 8)), **CLOSE)
    many = stack(sd, images, spec_of(sd, vae="mode"))
    torch.testing.assert_close(many[:, 0], one[:, 0], **CLOSE)


def test_a_stack_by_generation_runs_clean_to_noisy_and_keeps_the_conditional_half():
    sd = model()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    spec = presets.generated(sd, "a bird", steps=STEPS, indices=(9, 5, 0), seed=3)
    with Conv2Hooks(sd.pipeline.unet) as hooks:
        found = stack(sd, noise, spec)
    assert hooks.times == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    for step, call in enumerate((9, 5, 0)):
        doubled = joined(hooks.maps[call], (8, 8))
        torch.testing.assert_close(found[:, step], doubled[1:], **CLOSE)
        assert not torch.allclose(found[:, step], doubled[:1], atol=1e-2)


def test_generation_takes_prompts_and_returns_what_it_made():
    sd = model()
    spec = replace(presets.generated(sd, "", steps=4, indices=(3, 0), seed=5), sites=("up.3.resnets.2.hook_branch",))
    maps = []
    latents = stream(sd, ["a bird", "a cat"], spec, lambda step, layer, found: maps.append((step, layer, found.shape)))
    assert [(step, layer) for step, layer, _ in maps] == [(1, 0), (0, 0)]
    trajectory = sd.generate(
        ["a bird", "a cat"], negative_prompt=spec.negative_prompt, steps=4, seed=5, convention="dhf", progress=False
    )
    torch.testing.assert_close(latents, trajectory.latents[-1])
    with pytest.raises(InputError, match="a prompt for each image"):
        stack(sd, [3], spec)


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_streamed_extraction_equals_the_network_on_the_stack(size):
    sd, images = model(), pixels(height=16, width=24)
    spec = spec_of(sd, output_size=size)
    net = network(sd, spec)
    streamed = extract(sd, images, net, spec)
    assert streamed.shape == (2, 16, *size)
    assert not streamed.requires_grad
    torch.testing.assert_close(streamed, net(stack(sd, images, spec)), **CLOSE)


def test_generation_streams_too():
    sd = model()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    spec = presets.generated(sd, "a bird", steps=STEPS, indices=(9, 5, 0))
    net = network(sd, spec)
    torch.testing.assert_close(extract(sd, noise, net, spec), net(stack(sd, noise, spec)), **CLOSE)


def test_without_a_spec_the_published_one_is_taken():
    sd, images = model(), pixels(1)
    spec = presets.hyperfeatures(sd)
    net = network(sd, spec)
    with Conv2Hooks(sd.pipeline.unet) as hooks:
        found = extract(sd, images, net)
    assert hooks.times == [-1, *range(0, 980, 20)]
    assert found.shape == (1, 16, 8, 8)
    other = AggregationNetwork(
        net.channels, 11, dim=16, width=8, n_groups=4, timesteps=tuple(float(t) for t in range(11))
    )
    with pytest.raises(InputError, match="give the spec"):
        extract(sd, images, other)


def test_training_gradients_reach_the_network_alone():
    sd, images = model(), pixels(1)
    spec = spec_of(sd)
    # In float64 from the resize on, so that no rectifier switches by rounding.
    maps, _ = layer_maps(sd, images, spec)
    assert not any(one.requires_grad for one in maps)
    net, stacked = network(sd, spec).double(), features.joined([one.double() for one in maps], spec.output_size)
    probe = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = torch.autograd.grad((net(stacked) * probe).sum(), list(net.parameters()))
    (extract(sd, images, net, spec, grad=True) * probe).sum().backward()
    assert all(parameter.grad is None for parameter in sd.pipeline.unet.parameters())
    assert any(gradient.abs().max() > 0.1 for gradient in expected)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


def test_extraction_never_holds_more_than_a_map_or_two_however_many_timesteps(monkeypatch):
    sd, images = model(), pixels(1)
    delivered = Accumulator.add
    peaks = []
    for indices in ((3, 0), (3, 2, 1, 0)):
        spec = spec_of(sd, steps=4, indices=indices)
        raw, live, peak, times = weakref.WeakSet(), weakref.WeakSet(), 0, 0

        def count(total, step, layer, maps, raw=raw, live=live):
            nonlocal peak, times
            live.add(maps)
            peak, times = max(peak, len(live) + len(raw)), times + 1
            delivered(total, step, layer, maps)

        monkeypatch.setattr(Accumulator, "add", count)
        hooks = [
            resnet.conv2.register_forward_hook(lambda *call, raw=raw: raw.add(call[2]))
            for block in sd.pipeline.unet.up_blocks
            for resnet in block.resnets
        ]
        gc.collect()
        extract(sd, images, network(sd, spec), spec)
        for hook in hooks:
            hook.remove()
        assert times == 12 * len(indices)
        peaks.append(peak)
        gc.collect()
        assert len(live) + len(raw) == 0
    # The map that is being added and the output of the convolution that it was made from, each beside the one before
    # it, which a frame of the caller may still name; 24 and 48 maps went through.
    assert peaks[0] == peaks[1] <= 4


def test_extraction_leaves_no_hook_and_no_feature_behind():
    sd, images = model(), pixels(1)
    before = sd.pipeline.unet.conv_in.forward
    net = network(sd, spec_of(sd))

    def breaking(step, layer, found):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stream(sd, images, spec_of(sd), breaking)
    extract(sd, images, net, spec_of(sd))
    assert sd.pipeline.unet.conv_in.forward == before
    assert not [name for name, module in sd.pipeline.unet.named_modules() if module._forward_hooks]


def test_noised_features_are_the_mean_over_noises_of_single_calls():
    sd, images = model(), pixels()
    spec = presets.dift(sd, n_noises=3, vae="mode", seed=11, prompt="a photo of a cat")
    found = stack(sd, images, spec)
    generator = torch.Generator().manual_seed(11)
    latents = sd.encode(images, vae="mode")
    alpha = sd.pipeline.scheduler.alphas_cumprod[261]
    seen = []
    handle = sd.pipeline.unet.up_blocks[1].register_forward_hook(lambda *call: seen.append(call[2]))
    text = sd.pipeline.encode_prompt(["a photo of a cat"] * 2, "cpu", 1, False)[0]
    with torch.no_grad():
        for _ in range(3):
            noise = torch.randn(4, 8, 8, generator=generator)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            sd.pipeline.unet(noisy, torch.tensor(261), encoder_hidden_states=text)
    handle.remove()
    torch.testing.assert_close(found[:, 0], torch.stack(seen).mean(0), **CLOSE)
    assert not torch.allclose(found[:, 0], seen[0], atol=1e-2)


def test_a_map_does_not_depend_on_what_else_is_in_the_batch():
    sd, images = model(), pixels(3)
    for spec in (presets.dift(sd, n_noises=2, vae="mode"), spec_of(sd, vae="mode")):
        # Convolutions sum in another order for another batch, and ten steps carry that on; maps are of size 1.
        torch.testing.assert_close(stack(sd, images, spec)[2:], stack(sd, images[2:], spec), rtol=1e-3, atol=1e-3)


def test_noise_is_added_as_the_scheduler_does_it():
    sd = model()
    latents, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    expected = sd.pipeline.scheduler.add_noise(latents, noise, torch.tensor([261, 261]))
    torch.testing.assert_close(add_noise(sd, latents, noise, 261.0), expected)
    for timestep, message in ((1000.0, "out of range"), (-1.0, "out of range"), (2.5, "not whole")):
        with pytest.raises(InputError, match=message):
            add_noise(sd, latents, noise, timestep)
    flow = Diffusion(pipeline("sd3"))
    torch.testing.assert_close(add_noise(flow, latents, noise, 250.0), 0.75 * latents + 0.25 * noise)


def test_encoding_by_a_sample_is_the_same_under_the_same_seed():
    sd, images = model(), pixels()
    spec = presets.one_step(sd, seed=1)
    assert spec.vae == "sample"
    assert torch.equal(stack(sd, images, spec), stack(sd, images, spec))
    assert not torch.allclose(stack(sd, images, spec), stack(sd, images, replace(spec, seed=2)), atol=1e-3)


def test_a_half_precision_stack_is_the_rounded_one():
    sd, images = model(), pixels(1)
    spec = presets.one_step(sd)
    assert torch.equal(stack(sd, images, spec, dtype=torch.float16), stack(sd, images, spec).half())


@pytest.mark.parametrize("family", ["sd3", "pixart"])
def test_tokens_of_diffusion_transformers_become_maps(family):
    sd = Diffusion(pipeline(family))
    sites = ("blocks.1.hook_resid_post",)
    spec = presets.noised(sd, sites, (100.0,), vae="mode", seed=2, prompt="a bird")
    images = pixels(1, 16, 24)
    found = stack(sd, images, spec)
    latents = sd.encode(images, vae="mode")
    noise = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(2))
    tokens = sd.capture(add_noise(sd, latents, noise, 100.0), 100.0, "a bird", list(sites))[sites[0]]
    assert found.shape == (1, 1, tokens.shape[-1], 4, 6)
    torch.testing.assert_close(found[0, 0, :, 2, 3], tokens[0, 2 * 6 + 3], **CLOSE)


def test_what_does_not_fit_is_refused():
    sd, images = model(), pixels(1)
    spec = spec_of(sd)
    with pytest.raises(UnknownNameError, match="up"):
        presets.hyperfeatures(sd, sites="up.9.resnets.*.hook_branch")
    with pytest.raises(UnknownNameError, match="up"):
        stack(sd, images, replace(spec, sites=("up.0.resnets.9.hook_branch",)))
    with pytest.raises(InputError, match="saw timestep -1 at step 0 of the stack, but the spec says 0"):
        stack(sd, images, replace(spec, timesteps=(0.0, 300.0, 800.0)))
    with pytest.raises(InputError, match="give the spec an output_size"):
        stack(sd, images, replace(spec, output_size=None))
    net = network(sd, spec)
    with pytest.raises(InputError, match="mixes 3 steps, the spec has 1"):
        extract(sd, images, net, presets.one_step(sd))
    with pytest.raises(InputError, match="mixes 12 layers, the spec has 1 sites"):
        extract(sd, images, net, replace(spec, sites=spec.sites[:1]))
    with pytest.raises(InputError, match=r"has 32 channels, but up\.3\.resnets\.2\.hook_branch has 16"):
        extract(sd, images, net, replace(spec, sites=spec.sites[::-1]))
    v_prediction = Diffusion(stable_diffusion("v_prediction"))
    with pytest.raises(InputError, match="v_prediction"):
        stack(v_prediction, images, spec)


def test_a_checkpoint_is_checked_against_a_model_and_a_spec(tmp_path):
    sd = model()
    spec = spec_of(sd)
    net = network(sd, spec)
    hyperfeatures.save(net, tmp_path / "net", spec, hyperfeatures.About("tiny"))
    checkpoint = hyperfeatures.load(tmp_path / "net")
    checkpoint.check(sd)
    checkpoint.check(sd, replace(spec, seed=9))
    made = presets.generated(sd, "a bird", steps=STEPS, indices=(9, 5, 0))
    with pytest.raises(InputError, match="mode 'inversion', not 'generation'"):
        checkpoint.check(sd, made)
    checkpoint.check(sd, made, transfer=True)
    other_steps = presets.hyperfeatures(sd, steps=20, indices=(19, 10, 0))
    with pytest.raises(InputError, match=r"timestep 1 is 300\.0 in the checkpoint, but 400\.0 here"):
        checkpoint.check(sd, other_steps)
    with pytest.raises(InputError, match=r"site 0 is .up\.0\.resnets\.0\.hook_branch. in the checkpoint"):
        checkpoint.check(sd, replace(spec, sites=spec.sites[1:] + spec.sites[:1]))
    with pytest.raises(InputError, match="has 12 sites, not 11"):
        checkpoint.check(sd, replace(spec, sites=spec.sites[:-1]))
    with pytest.raises(InputError, match="mixes 3 steps, not 11"):
        checkpoint.check(sd, presets.hyperfeatures(sd))
    with pytest.raises(UnknownNameError, match=r"up\.3"):
        checkpoint.check(Diffusion(pipeline("sdxl")))


def test_live_extraction_trains_as_cached_features_do():
    sd, images = model(), pixels(4)
    spec = spec_of(sd, vae="mode", indices=(9,))
    points = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    pairs = [(images[i : i + 1], images[i + 1 : i + 2], points, points.flip(1)) for i in (0, 2)]

    def live(net, found):
        return [extract(sd, image, net, spec, grad=True)[0] for image in found]

    def cached(index):
        first, second, *rest = pairs[index]
        return stack(sd, first, spec)[0], stack(sd, second, spec)[0], *rest

    nets = [network(sd, spec), network(sd, spec)]
    one = hyperfeatures.train(nets[0], pairs.__getitem__, 2, steps=2, describe=live)
    two = hyperfeatures.train(nets[1], cached, 2, steps=2)
    assert one.history["loss"][0] != one.history["loss"][1]
    # A step of Adam carries the rounding of the sums on.
    assert one.history["loss"].to_numpy() == pytest.approx(two.history["loss"].to_numpy(), rel=1e-3)


def test_a_spec_without_timesteps_takes_what_comes():
    sd, images = model(), pixels(1)
    spec = spec_of(sd, vae="mode")
    bare = FeatureSpec(spec.sites, steps=STEPS, saved=spec.saved, vae="mode", output_size=(8, 8))
    assert torch.equal(stack(sd, images, bare), stack(sd, images, spec))


def test_a_network_refuses_maps_of_other_sites_with_as_many_channels():
    sd = model()
    spec = spec_of(sd)
    net = AggregationNetwork(sd.channels(list(spec.sites)), spec.n_steps, 32, 8, n_groups=8, sites=spec.sites)
    outputs = tuple(site.replace("hook_branch", "hook_out") for site in spec.sites)
    other = replace(spec, sites=outputs)
    with pytest.raises(InputError, match=r"layer 0 of the network is up\.0.*hook_branch, but the spec has .*hook_out"):
        extract(sd, pixels(), net, other, progress=False)
