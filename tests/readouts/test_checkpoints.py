import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from interp.errors import InputError
from interp.hyperfeatures import About
from interp.readouts import (
    AttentionProbe,
    LinearProbe,
    Readout,
    ReadoutHead,
    about,
    load,
    load_official,
    save,
)
from tests.readouts.heads import SITES, SIZE, closed_form, model, perturbed, readout


def latents():
    return torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("convention", ["true_t", "generation_index"])
@pytest.mark.parametrize(("kind", "channels"), [("spatial", 3), ("keypoints", 18), ("features", None)])
def test_a_readout_comes_back_with_all_that_it_says(tmp_path, kind, channels, convention):
    sd = model()
    one = readout(sd, channels, kind, time_convention=convention)
    said = About("tiny", "creatures, 200 renders", 500, {"error": 0.5}, "a test")
    save(one, tmp_path / "deep", said)
    again = load(tmp_path / "deep", sd)
    for name in ("sites", "size", "kind", "name", "value_range", "model", "time_convention", "fingerprint"):
        assert getattr(again, name) == getattr(one, name)
    assert torch.equal(again.read(sd, latents(), 300), one.read(sd, latents(), 300))
    assert about(tmp_path / "deep") == said
    assert set(load_file(tmp_path / "deep/readout.safetensors")) == set(one.head.state_dict())
    content = json.loads((tmp_path / "deep/readout.json").read_text())
    assert content["readout"]["sites"] == list(SITES)
    assert content["head"]["channels"] == sd.channels(list(SITES))
    assert content["readout"]["time_convention"] == content["head"]["time_convention"] == convention


def test_another_time_convention_is_an_error_unless_it_is_asked_for(tmp_path):
    sd = model()
    save(readout(sd, time_convention="generation_index"), tmp_path)
    with pytest.raises(InputError, match="trained with time convention 'generation_index', not 'true_t'"):
        load(tmp_path, time_convention="true_t")
    assert load(tmp_path, time_convention="generation_index").time_convention == "generation_index"
    other = load(tmp_path, sd, time_convention="true_t", override=True)
    assert other.time_convention == other.head.time_convention == "true_t"
    found, mirrored = (one.read(sd, latents(), 300) for one in (other, load(tmp_path)))
    assert (found - mirrored).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [LinearProbe, AttentionProbe])
def test_probes_have_a_format_too(tmp_path, kind):
    probe = kind(32, 5, seed=4)
    probe.standardised.measure(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1)
    save(Readout(probe, SITES[:1], SIZE, "features", "parts"), tmp_path)
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(load(tmp_path).head(x), probe(x))


def test_other_models_and_damaged_files_are_refused(tmp_path):
    sd = model()
    save(readout(sd), tmp_path)
    with pytest.raises(InputError, match="another model"):
        load(tmp_path, model(seed=70))
    description = tmp_path / "readout.json"
    whole = description.read_text()
    for change, words in (
        (lambda content: content["head"].update(dim=20), "damaged|do not fit|divisible"),
        (lambda content: content["head"].update(kind="Head"), "no kind of head 'Head'"),
        (lambda content: content["readout"].pop("size"), "damaged"),
        (lambda content: content["readout"].update(sites=["a"]), "1 sites|sites are named"),
        (lambda content: content.update(version=99), "is of format"),
        (lambda content: content.pop("head"), "damaged: 'head'"),
    ):
        content = json.loads(whole)
        change(content)
        description.write_text(json.dumps(content))
        with pytest.raises(InputError, match=words):
            load(tmp_path)
    description.write_text("{")
    with pytest.raises(InputError, match=r"readout\.json' is damaged"):
        load(tmp_path)
    description.write_text(whole)
    (tmp_path / "readout.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"no readout in .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="the kind 'Identity' has no format"):
        save(replace(readout(sd), head=torch.nn.Identity()), tmp_path / "other")
    with pytest.raises(InputError, match=r"readout\.json' cannot be a folder"):
        save(readout(sd), description)


CHANNELS = (16, 8) * 6


def official(path, head, **changes):
    config = {"projection_dim": 16, "dims": list(CHANNELS), "dataset_args": {"control_range": [-0.5, 0.5]}}
    content = {
        "step": 5000,
        "config": config | {"model_id": "runwayml/stable-diffusion-v1-5"},
        "aggregation_network": head.state_dict(),
        "optimizer_state_dict": {"state": {0: {"state1": torch.zeros(3)}}},
    }
    content |= changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def official_head(out_channels=3):
    return perturbed(ReadoutHead(CHANNELS, 16, 8, out_channels=out_channels, time_dim=20, n_groups=4))


def test_files_of_the_authors_load_strictly_with_what_their_configuration_says(tmp_path):
    head = official_head()
    path = official(tmp_path / "readout_sdv15_spatial_pose.pt", head)
    one, said = load_official(path, n_groups=4, model={"runwayml/stable-diffusion-v1-5": "here/sd15"})
    assert (one.name, one.kind, one.size, one.value_range, one.model) == (
        "pose", "spatial", (64, 64), (-0.5, 0.5), "here/sd15"
    )  # fmt: skip
    assert one.sites[:4] == (
        "up.0.resnets.0.hook_branch", "up.0.resnets.1.hook_branch", "up.0.resnets.2.hook_branch",
        "up.1.resnets.0.hook_branch",
    )  # fmt: skip
    assert (one.time_convention, said.training_steps) == ("true_t", 5000)
    maps = [torch.randn(1, c, 4, 4, generator=torch.Generator().manual_seed(c)) for c in CHANNELS]
    embedding = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.head(maps, embedding), head(maps, embedding))
    mirrored, _ = load_official(path, n_groups=4, time_convention="generation_index")
    assert mirrored.time_convention == "generation_index"
    assert mirrored.model == "runwayml/stable-diffusion-v1-5"


def test_the_kinds_of_official_heads_and_the_correspondence_head_without_embedding(tmp_path):
    points, _ = load_official(official(tmp_path / "readout_sdv15_pose_keypoints.pt", official_head(18)), n_groups=4)
    assert (points.kind, points.name, points.value_range) == ("keypoints", "pose", None)
    drag, _ = load_official(
        official(tmp_path / "readout_sdv15_drag_correspondence.pt", official_head(None)), n_groups=4
    )
    assert (drag.kind, drag.name, drag.head.uses_time) == ("features", "correspondence", False)
    appearance, _ = load_official(
        official(tmp_path / "readout_sdv15_drag_appearance.pt", official_head(None)), n_groups=4
    )
    assert appearance.head.uses_time
    asked, _ = load_official(tmp_path / "readout_sdv15_drag_correspondence.pt", n_groups=4, use_time=True)
    assert asked.head.uses_time


def test_official_files_that_do_not_fit_are_refused(tmp_path):
    head, path = official_head(), tmp_path / "readout_sdv15_spatial_pose.pt"
    state = head.state_dict()
    del state["bottleneck_layers.3.conv2.norm.bias"]
    with pytest.raises(InputError, match=r"bottleneck_layers\.3\.conv2\.norm\.bias"):
        load_official(official(path, head, aggregation_network=state), n_groups=4)
    with pytest.raises(InputError, match="nexpected"):
        load_official(official(path, head, aggregation_network=head.state_dict() | {"x": torch.zeros(1)}), n_groups=4)
    with pytest.raises(InputError, match=r"says projection_dim 384"):
        load_official(official(path, head, config={"projection_dim": 384}), n_groups=4)
    with pytest.raises(InputError, match="control_range"):
        load_official(official(path, head, config={}), n_groups=4)
    with pytest.raises(InputError, match="give name="):
        load_official(official(tmp_path / "checkpoint.pt", head), n_groups=4)
    assert load_official(tmp_path / "checkpoint.pt", name="edge", n_groups=4)[0].name == "edge"
    with pytest.raises(InputError, match="no 'aggregation_network'"):
        load_official(official(path, head, aggregation_network=None))
    with pytest.raises(InputError, match="no checkpoint of tensors"):
        load_official(official(path, head, config={"path": tmp_path}))


def with_settings(**settings):
    return {
        "projection_dim": 16,
        "dims": list(CHANNELS),
        "dataset_args": {"control_range": [-0.5, 0.5]},
        "aggregation_kwargs": settings,
    }


def test_what_official_configurations_say_of_the_head_is_honoured(tmp_path):
    head, path = official_head(), tmp_path / "readout_sdv15_spatial_pose.pt"
    maps = [torch.randn(1, c, 4, 4, generator=torch.Generator().manual_seed(c)) for c in CHANNELS]
    embedding = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    said = {"use_output_head": True, "output_head_channels": 3, "bottleneck_sequential": False}
    plain, _ = load_official(official(path, head, config=with_settings(**said)), n_groups=4)
    assert torch.equal(plain.head(maps, embedding), head(maps, embedding))
    linear, _ = load_official(official(path, head, config=with_settings(output_head_act=False, **said)), n_groups=4)
    assert linear.kind == "spatial" and not linear.head.squash
    torch.testing.assert_close(linear.head(maps, embedding).tanh(), plain.head(maps, embedding))
    assert (linear.head(maps, embedding) - plain.head(maps, embedding)).abs().max() > 1e-3
    points = official_head(18)
    bounded, _ = load_official(official(path, points, config=with_settings(output_head_act=True)), n_groups=4)
    assert bounded.kind == "keypoints" and bounded.head.squash
    torch.testing.assert_close(bounded.head(maps, embedding), points(maps, embedding).tanh())


def wrapped(state):
    return {re.sub(r"^(bottleneck_layers\.\d+)\.", r"\1.0.", key): weight for key, weight in state.items()}


def test_heads_under_the_sequential_wrapper_do_without_the_embedding(tmp_path):
    head, path = official_head(), tmp_path / "readout_sdv15_spatial_pose.pt"
    for config in (with_settings(bottleneck_sequential=True), with_settings()):
        one, _ = load_official(
            official(path, head, aggregation_network=wrapped(head.state_dict()), config=config), n_groups=4
        )
        assert not one.head.uses_time
        maps = [torch.randn(1, c, 4, 4, generator=torch.Generator().manual_seed(c)) for c in CHANNELS]
        expected = closed_form(head.state_dict(), maps, squash=True)
        torch.testing.assert_close(one.head(maps).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck_sequential": True}, "says bottleneck_sequential True, but the weights False"),
        ({"use_output_head": False}, "says use_output_head False, but the weights True"),
        ({"output_head_channels": 18}, "says output_head_channels 18, but the weights 3"),
        ({"output_head_act": "tanh"}, "says output_head_act 'tanh': expected true or false"),
        ("none", "aggregation_kwargs in .* is a str"),
    ],
)
def test_configurations_that_their_weights_contradict(tmp_path, settings, message):
    config = with_settings() | {"aggregation_kwargs": settings}
    path = official(tmp_path / "readout_sdv15_spatial_pose.pt", official_head(), config=config)
    with pytest.raises(InputError, match=message):
        load_official(path, n_groups=4)


def test_files_that_hold_other_things_than_weights(tmp_path):
    head, path = official_head(), tmp_path / "readout_sdv15_spatial_pose.pt"
    for changes, message in (
        ({"config": ["a"]}, "config in .* is a list"),
        ({"aggregation_network": [1]}, "aggregation_network in .* is a list"),
        ({"aggregation_network": {"mixing_weights": 3}}, "something else than tensors"),
    ):
        with pytest.raises(InputError, match=message):
            load_official(official(path, head, **changes), n_groups=4)
