from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from interp import Diffusion
from interp.errors import InputError, ShapeError, UnknownNameError
from interp.readouts import (
    LinearProbe,
    Readout,
    ReadoutHead,
    embedded_timestep,
    noise_timestep,
    time_dim,
    time_embedding,
)
from interp.readouts.times import allowed_timesteps
from tests.pipelines import hooked_calls, last_block
from tests.readouts.heads import MODULES, SITES, SIZE, TIME, closed_form, embedding_of, model, readout
from tests.tiny_diffusion import pipeline, sdxl

# Single precision through a small UNet, another order of sums in the head.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def latents(n=2, seed=4):
    return torch.randn(n, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


def plain_maps(sd, x, time):
    """The branches, by plain hooks around diffusers' own call."""
    text = sd.prompt("").cond.states
    caught = []
    modules = [sd.denoiser.get_submodule(name) for name in MODULES]
    handles = [module.register_forward_hook(lambda m, a, out: caught.append(out)) for module in modules]
    with torch.no_grad():
        sd.denoiser(x, torch.as_tensor(time), text.expand(len(x), -1, -1))
    for handle in handles:
        handle.remove()
    return [F.interpolate(one, size=SIZE, mode="bilinear", align_corners=False) for one in caught]


@pytest.mark.parametrize("convention", ["true_t", "generation_index"])
def test_reading_is_the_closed_form_on_plain_hooks_under_each_time_convention(convention):
    sd = model()
    one = readout(sd, time_convention=convention)
    told = {"true_t": 300.0, "generation_index": 700.0}[convention]
    expected = closed_form(
        one.head.state_dict(), plain_maps(sd, latents(), 300), embedding_of(sd, torch.tensor([told] * 2)), squash=True
    )
    found = one.read(sd, latents(), 300)
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    other = {"true_t": 700.0, "generation_index": 300.0}[convention]
    mirrored = closed_form(
        one.head.state_dict(), plain_maps(sd, latents(), 300), embedding_of(sd, torch.tensor([other] * 2)), squash=True
    )
    assert (found - mirrored).abs().max() > 1e-2
    assert not found.requires_grad


def test_the_models_embedding_is_that_of_its_weights():
    sd = model()
    times = torch.tensor([-1.0, 0.0, 1.0, 499.5, 999.0])
    # Angles near 999 are rounded to 6e-5 in single precision.
    torch.testing.assert_close(time_embedding(sd, times), embedding_of(sd, times), rtol=1e-3, atol=5e-4)
    assert time_embedding(sd, torch.tensor(3.0)).shape == (1, TIME)
    assert time_dim(sd) == TIME
    assert not time_embedding(sd, times).requires_grad
    with pytest.raises(ShapeError, match="one for each row"):
        time_embedding(sd, torch.zeros(2, 2))
    with pytest.raises(InputError, match="PixArtTransformer2DModel has no time embedding"):
        time_embedding(Diffusion(pipeline("pixart")), times)


def test_the_embedding_for_the_head_does_not_disturb_captures_of_the_models_own():
    sd = model()
    with sd.record("hook_time_embed") as acts:
        readout(sd).read(sd, latents(), 300)
        readout(sd).embedding(10.0, 2, sd)
    assert len(acts.calls("hook_time_embed")) == 1


def test_time_conventions_by_hand():
    assert float(embedded_timestep(1, "generation_index")) == 999
    assert float(embedded_timestep(999, "generation_index")) == 1
    assert float(embedded_timestep(250, "true_t")) == 250
    # Index s: noise at 999 - s, the model called at 1000 - s.
    assert [noise_timestep(1000 - s, "generation_index") for s in (1, 500, 999)] == [998, 499, 0]
    assert noise_timestep(0, "generation_index") is None
    assert (noise_timestep(7, "true_t"), noise_timestep(-1, "true_t")) == (7, None)
    sd = model()
    assert allowed_timesteps(sd, "true_t", "uniform") == range(0, 1000)
    assert allowed_timesteps(sd, "generation_index", "uniform") == range(1, 1000)
    with pytest.raises(InputError, match="timestep 0 is out of range: a generation_index head is trained at 1 to 999"):
        allowed_timesteps(sd, "generation_index", [0, 1])


def test_rows_with_timesteps_of_their_own_are_read_as_if_alone():
    sd, times = model(), torch.tensor([100, 800])
    one = readout(sd)
    found = one.read(sd, latents(), times)
    for row, time in enumerate((100, 800)):
        torch.testing.assert_close(found[row], one.read(sd, latents()[row : row + 1], time)[0], **CLOSE)
    with pytest.raises(ShapeError, match="3 timesteps for 2 rows"):
        one.embedding(torch.tensor([1.0, 2.0, 3.0]), 2, sd)


def test_reading_stops_the_model_after_the_last_site():
    sd = model()
    with hooked_calls(last_block(sd)) as calls:
        readout(sd).read(sd, latents(), 300)
    assert not calls


def test_a_graph_runs_from_the_readout_to_the_latents_as_plain_autograd_has_it():
    sd = model()
    one, x = readout(sd), latents().requires_grad_()
    acts = sd.capture(x, 300, "", list(SITES), grad=True)
    found = torch.autograd.grad(one(acts, 300, sd).square().sum(), x)[0]

    caught = []
    handles = [
        sd.denoiser.get_submodule(name).register_forward_hook(lambda m, a, out: caught.append(out)) for name in MODULES
    ]
    sd.denoiser(x, torch.tensor(300), sd.prompt("").cond.states.expand(2, -1, -1))
    for handle in handles:
        handle.remove()
    maps = [F.interpolate(one, size=SIZE, mode="bilinear", align_corners=False) for one in caught]
    read = closed_form(one.head.state_dict(), maps, embedding_of(sd, torch.tensor([300.0, 300.0])), squash=True)
    expected = torch.autograd.grad(read.square().sum(), x)[0]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_other_models_sites_and_maps_are_refused():
    sd = model()
    one = readout(sd)
    one.check(sd)
    with pytest.raises(InputError, match="another model, although its sites have the same channels"):
        one.check(model(seed=70))
    replace(one, fingerprint=()).check(model(seed=70))
    with pytest.raises((InputError, UnknownNameError), match=r"up\.3"):
        one.check(Diffusion(sdxl()))
    wide = ReadoutHead((32, 32, 99), 16, 8, out_channels=3, time_dim=TIME, n_groups=4)
    with pytest.raises(InputError, match="takes 99 channels of up"):
        replace(one, head=wide).check(sd)
    other_time = ReadoutHead(sd.channels(list(SITES)), 16, 8, out_channels=3, time_dim=TIME + 1, n_groups=4)
    with pytest.raises(InputError, match=f"time embedding of {TIME + 1}"):
        replace(one, head=other_time).read(sd, latents(), 3)
    with pytest.raises(UnknownNameError, match="which was not captured"):
        one({SITES[0]: torch.zeros(1, 32, 2, 2)}, 3, sd)
    with pytest.raises(ShapeError, match="no map of an image"):
        one({site: torch.zeros(2, 1, 32, 2, 2) for site in SITES}, 3, sd)


def test_contradicting_readouts_are_refused():
    sd = model()
    one = readout(sd)
    for changes, words in (
        ({"kind": "picture"}, "no kind 'picture'"),
        ({"sites": SITES[:2]}, "mixes 3 layers, but 2 sites"),
        ({"sites": SITES[::-1]}, "the head is for sites"),
        ({"size": (0, 8)}, "size must be"),
        ({"value_range": (1.0, 1.0)}, "value_range must be"),
        ({"value_range": None}, "needs the value_range"),
        ({"time_convention": "generation_index"}, "the head's time convention is 'true_t'"),
    ):
        with pytest.raises(InputError, match=words):
            replace(one, **changes)


def test_tokens_of_a_transformer_and_a_linear_probe_are_read_too():
    sd = Diffusion(pipeline("pixart"))
    probe = LinearProbe(32, 5)
    one = Readout(probe, ("blocks.1.hook_resid_post",), SIZE, "features", "parts")
    acts = sd.capture(latents(), 300, "", ["blocks.1.hook_resid_post"])
    with hooked_calls(sd.denoiser.transformer_blocks[2]) as calls:
        found = one.read(sd, latents(), 300)
    assert not calls
    tokens = acts["blocks.1.hook_resid_post"]
    grid = tokens.reshape(2, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=SIZE, mode="bilinear", align_corners=False)
    expected = torch.einsum("bdhw,od->bohw", grid, probe.linear.weight) + probe.linear.bias[:, None, None]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
