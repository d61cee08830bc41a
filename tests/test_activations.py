import json

import pytest
import torch

from interp import Activations
from interp.activations import from_taps
from interp.errors import InputError, NeverFiredError, ShapeError, UnknownNameError
from interp.hooks import Tap
from interp.selection import Where
from interp.sites import SPATIAL, Place
from tests import tiny
from tests.plain import writing

SITES = "blocks.*.hook_resid_post"


@pytest.fixture(scope="module")
def acts():
    return tiny.vlm("llama").capture(tiny.text_inputs(), [SITES, "blocks.*.attn.hook_z"], at="last")


def test_a_mapping_with_named_axes(acts) -> None:
    assert list(acts) == [
        *(f"blocks.{i}.hook_resid_post" for i in range(4)),
        *(f"blocks.{i}.attn.hook_z" for i in range(4)),
    ]
    assert acts.axes("blocks.0.hook_resid_post") == ("batch", "d_model")
    assert acts.axes("blocks.0.attn.hook_z") == ("batch", "head", "d_head")
    stacked = acts.stack("hook_resid_post")
    assert stacked.shape == (4, 2, 32) and acts.layers("hook_resid_post") == [0, 1, 2, 3]
    assert all(torch.equal(stacked[i], acts[f"blocks.{i}.hook_resid_post"]) for i in range(4))
    assert list(acts.select("blocks.[01].attn.*")) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    assert acts.to(dtype=torch.float64)["blocks.0.attn.hook_z"].dtype == torch.float64
    assert "blocks.0.hook_resid_post: (2, 32) batch·d_model" in repr(acts)
    for wrong in (lambda: acts["blocks.0.hook_resid_pots"], lambda: acts.stack("hook_resid_pots")):
        with pytest.raises(UnknownNameError, match="hook_resid_post"):
            wrong()


def test_ten_layers_stack_in_the_order_of_layers() -> None:
    sites = {f"blocks.{i}.hook_resid_post": [torch.tensor([float(i)])] for i in (10, 2, 0, 1)}
    many = Activations(sites, dict.fromkeys(sites, ("d_model",)))
    assert many.stack("hook_resid_post").flatten().tolist() == [0, 1, 2, 10]


def test_steps_of_different_shapes() -> None:
    acts = Activations({"hook_embed": [torch.zeros(2, 3), torch.zeros(2, 1)]}, {"hook_embed": ("batch", "pos")})
    with pytest.raises(ShapeError, match="2 times with different shapes"):
        acts["hook_embed"]
    assert acts.axes("hook_embed") == ("step", "batch", "pos") and len(acts.calls("hook_embed")) == 2


def test_a_round_trip_through_files(acts, tmp_path) -> None:
    acts.save(tmp_path / "deep" / "run.1")
    loaded = Activations.load(tmp_path / "deep" / "run.1")
    assert list(loaded) == list(acts)
    assert all(torch.equal(loaded[site], acts[site]) and loaded.axes(site) == acts.axes(site) for site in acts)
    about, tensors = tmp_path / "deep" / "run.1.json", tmp_path / "deep" / "run.1.safetensors"
    good = about.read_text()
    for text in (good[:-5], "[]", json.dumps({**json.loads(good), "more": {"axes": [], "calls": 1}})):
        about.write_text(text)
        with pytest.raises(InputError, match="damaged"):
            Activations.load(tensors)
    about.write_text(good)
    tensors.write_bytes(tensors.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged"):
        Activations.load(about)
    with pytest.raises(InputError, match="no activations at"):
        Activations.load(tmp_path / "other")


# --- gradients


@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_gradients_equal_finite_differences(name) -> None:
    vlm = tiny.VLM(tiny.ALL[name]().double())
    inputs = tiny.inputs_for(name)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    sites = ["blocks.1.hook_resid_post", "blocks.1.hook_attn_out", "hook_embed"]
    sites += ["vision.blocks.0.hook_mlp_out", "projector.hook_out"] if name == "llava" else []
    acts = vlm.capture(inputs, sites, grad=True)

    def metric(output):
        return (output.logits[:, -1, 5] - output.logits[:, -1, 6]).sum()

    grads = acts.gradients(metric(acts.output))
    step = 5e-3
    for site in sites:
        entry = (grads[site].abs() * (acts[site] != 0)).flatten().argmax()

        def shifted(sign, site=site, entry=entry):
            def change(x):
                x.view(-1)[entry] += sign * step
                return x

            with torch.no_grad(), writing(vlm.model, vlm.place(site).path, change):
                return metric(vlm(inputs)).item()

        slope = (shifted(1) - shifted(-1)) / (2 * step)
        # The norms compute in float32 even here: 1e-6 of noise on logits of order 10, divided by the step.
        assert slope == pytest.approx(grads[site].flatten()[entry].item(), rel=1e-2, abs=2e-3), site


def test_gradients_of_heads_and_selections() -> None:
    vlm, inputs = tiny.vlm("gpt2"), tiny.text_inputs()
    whole = vlm.capture(inputs, ["blocks.1.attn.hook_q", "blocks.1.attn.hook_k", "blocks.1.attn.hook_v"], grad=True)
    want = whole.gradients(whole.output.logits[:, -1, 5].sum())
    path, kept = vlm.place("blocks.1.attn.hook_q").path, []

    def keep(module, args, out):
        out.retain_grad()
        kept.append(out)

    handle = vlm.model.get_submodule(path).register_forward_hook(keep)
    vlm(inputs).logits[:, -1, 5].sum().backward()
    handle.remove()
    vlm.model.zero_grad()
    by_hand = kept[0].grad.view(2, 9, 3, 4, 8)
    for index, letter in enumerate("qkv"):
        site = f"blocks.1.attn.hook_{letter}"
        torch.testing.assert_close(want[site], by_hand[:, :, index], atol=1e-5, rtol=1e-4)
    part = vlm.capture(inputs, "blocks.1.attn.hook_v", at=-2, heads=[2], rows=1, grad=True)
    got = part.gradients(part.output.logits[:, -1, 5].sum())["blocks.1.attn.hook_v"]
    torch.testing.assert_close(got, by_hand[[1], 7, 2][:, [2]], atol=1e-5, rtol=1e-4)


def test_metrics_without_a_gradient(acts) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    with pytest.raises(InputError, match="grad=True"):
        acts.gradients(torch.zeros(()))
    acts = vlm.capture(inputs, "blocks.1.hook_resid_post", at=-1, grad=True)
    for metric in (acts.output.logits, torch.zeros(())):
        with pytest.raises(InputError, match="one number with a graph"):
            acts.gradients(metric)
    with pytest.raises(NeverFiredError, match="zero everywhere"):
        acts.gradients(0 * acts.output.logits.sum())
    with pytest.raises(NeverFiredError, match="missing"):
        acts.gradients(torch.ones((), requires_grad=True) * 2)


def test_selected_sites_keep_their_graph() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    acts = vlm.capture(inputs, SITES, grad=True)
    metric = acts.output.logits[:, -1, 5].sum()
    want = acts.gradients(metric)["blocks.1.hook_resid_post"]
    for some in (acts.select("blocks.1.*"), acts.to(dtype=torch.float64).select("blocks.1.*")):
        got = some.gradients(metric)
        assert list(got) == ["blocks.1.hook_resid_post"]
        assert torch.equal(got["blocks.1.hook_resid_post"], want)


def test_axes_of_raw_modules() -> None:
    vlm = tiny.vlm("llava")
    conv, mlp = "model.vision_tower.embeddings.patch_embedding:output", "model.language_model.layers.1.mlp:output"
    acts = vlm.capture(tiny.image_inputs(), [conv, mlp])
    assert acts.axes(conv) == ("batch", "axis_1", "axis_2", "axis_3") and acts[conv].ndim == 4
    assert acts.axes(mlp) == ("batch", "pos", "feature")


def test_steps_lead_even_when_there_is_one(tmp_path) -> None:
    site = "up.1.resnets.0.hook_branch"
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    axes = {site: ("batch", "channel", "height", "width")}
    acts = Activations({site: [x]}, axes, stepped=True)
    assert acts[site].shape == (1, 1, 2, 3, 4) and acts.axes(site)[:2] == ("step", "batch")
    acts.save(tmp_path / "acts")
    for other in (Activations.load(tmp_path / "acts"), acts.select("up.*"), acts.to(dtype=torch.float64)):
        assert other.stepped and other[site].shape == (1, 1, 2, 3, 4)
    assert Activations({site: [x]}, axes)[site].shape == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("at", "caught", "axes"),
    [
        (None, torch.zeros(2, 3, 4, 5), ("batch", "channel", "height", "width")),
        (1, torch.zeros(2, 3), ("batch", "channel")),
        ([1, 2], torch.zeros(2, 2, 3), ("batch", "cell", "channel")),
    ],
)
def test_axes_of_feature_maps(at, caught, axes) -> None:
    place = Place("down.0.hook_out", "x", "output", SPATIAL, layout="grid", part="denoiser")
    assert from_taps([Tap(place, Where(at), caught=[caught])]).axes("down.0.hook_out") == axes


@pytest.mark.parametrize(
    ("caught", "axes"),
    [
        (torch.zeros(2, 3, 4, 5), ("batch", "channel", "height", "width")),
        (torch.zeros(2, 3, 4), ("batch", "axis_1", "axis_2")),
        (torch.zeros(2, 3), ("batch", "axis_1")),
    ],
)
def test_axes_of_raw_tensors_of_a_diffusion_model(caught, axes) -> None:
    place = Place("unet.conv_in:output", "unet.conv_in", "output", SPATIAL, layout="auto", part="denoiser")
    assert from_taps([Tap(place, caught=[caught])]).axes(place.site) == axes
