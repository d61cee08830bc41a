import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from interp.errors import InputError
from interp.hyperfeatures import About, AggregationNetwork, FeatureSpec, load, load_official, save, without_wrapper

CHANNELS = (6, 4)
SPEC = FeatureSpec(
    sites=("up.0.resnets.0.hook_branch", "up.1.resnets.2.hook_branch"),
    steps=50,
    saved=(0, 4, 9),
    timesteps=(-1.0, 60.0, 160.0),
    output_size=(6, 8),
    load_size=(32, 32),
    seed=7,
)
ABOUT = About("zoo:tiny-diffusion", "creatures, 400 pairs", 120, {"PCK@0.1 img": 0.5}, "a test")


def network(seed=1):
    net = AggregationNetwork(
        CHANNELS, 3, dim=16, width=8, n_groups=4, sites=SPEC.sites, timesteps=SPEC.timesteps, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return net


def stack():
    return torch.randn(1, 3, 10, 6, 8, generator=torch.Generator().manual_seed(0))


def test_a_checkpoint_comes_back_with_all_that_it_says(tmp_path):
    net = network()
    save(net, tmp_path / "deep/net.safetensors", SPEC, ABOUT)
    loaded = load(tmp_path / "deep/net")
    assert torch.equal(loaded.net(stack()), net(stack()))
    assert loaded.spec == SPEC
    assert loaded.about == ABOUT
    assert loaded.net.mixing_table().equals(net.mixing_table())
    assert (loaded.net.n_groups, loaded.net.width) == (4, 8)
    assert set(load_file(tmp_path / "deep/net.safetensors")) == set(net.state_dict())
    said = json.loads((tmp_path / "deep/net.json").read_text())
    assert said["features"]["timesteps"] == [-1.0, 60.0, 160.0]
    assert said["about"]["training_steps"] == 120


def test_a_checkpoint_that_does_not_say_what_it_is_for_is_not_written(tmp_path):
    with pytest.raises(InputError, match="states its timesteps"):
        save(network(), tmp_path / "net", replace(SPEC, timesteps=()), ABOUT)
    with pytest.raises(InputError, match="the network has 3 steps, the spec 1"):
        save(
            network(),
            tmp_path / "net",
            SPEC.cell(0, 0).__class__(**vars(SPEC) | {"saved": (0,), "timesteps": (-1.0,)}),
            ABOUT,
        )
    with pytest.raises(InputError, match="the network has 2 layers, the spec 1"):
        save(network(), tmp_path / "net", replace(SPEC, sites=("a",)), ABOUT)
    assert not list(tmp_path.iterdir())


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        load(tmp_path / "net")
    save(network(), tmp_path / "net", SPEC, ABOUT)
    said = json.loads((tmp_path / "net.json").read_text())
    for change, message in (
        ({"format": "else"}, r"is of format \('else', 1\)"),
        ({"network": said["network"] | {"dim": 32}}, "do not fit the network.*size mismatch"),
        ({"features": said["features"] | {"timestep": 3}}, "no field 'timestep'. Did you mean 'timesteps'"),
        ({"about": {"modle": "x"}}, "damaged"),
    ):
        (tmp_path / "net.json").write_text(json.dumps(said | change))
        with pytest.raises(InputError, match=message):
            load(tmp_path / "net")
    (tmp_path / "net.json").write_text(json.dumps(said))
    (tmp_path / "net.safetensors").write_bytes(b"0" * 20)
    with pytest.raises(InputError, match="damaged"):
        load(tmp_path / "net")


OFFICIAL = FeatureSpec(
    sites=tuple(f"up.{block}.resnets.{resnet}.hook_branch" for block in range(2) for resnet in range(3)),
    steps=50,
    saved=(0, 4, 9, 14, 19, 24, 29, 34, 39, 44, 49),
    timesteps=(-1.0, *(float(t) for t in range(60, 961, 100))),
    output_size=(64, 64),
    image_size=(512, 512),
)
CONFIG = {
    "model_id": "withdrawn/model",
    "diffusion_mode": "inversion",
    "save_timestep": [49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0],
    "num_timesteps": 50,
    "output_resolution": 64,
    "guidance_scale": -1,
    "prompt": "",
    "negative_prompt": "",
    "projection_dim": 64,
}


@pytest.mark.parametrize("style", ["wrapped", "bare"])
def test_files_of_the_authors_load_in_both_styles_of_keys(tmp_path, style):
    net = AggregationNetwork((40, 40, 40, 24, 24, 24), 11, dim=64, width=32, seed=3)
    net.mixing_weights.data += torch.randn(66, generator=torch.Generator().manual_seed(1))
    net(torch.randn(1, 11, 192, 4, 4)).sum().backward()
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.step()
    state = net.state_dict() if style == "wrapped" else without_wrapper(net.state_dict())
    content = {"step": 5000, "config": CONFIG, "aggregation_network": state}
    torch.save(content | {"optimizer_state_dict": optimizer.state_dict()}, tmp_path / "aggregation_network.pt")
    loaded = load_official(tmp_path / "aggregation_network.pt", model={"withdrawn/model": "there/it-is"})
    features = torch.randn(1, 11, 192, 4, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.net(features), net(features))
    assert loaded.spec == OFFICIAL
    assert (loaded.about.model, loaded.about.training_steps) == ("there/it-is", 5000)
    assert load_official(tmp_path / "aggregation_network.pt").about.model == "withdrawn/model"
    save(loaded.net, tmp_path / "published", loaded.spec, loaded.about)
    assert not [key for key in load_file(tmp_path / "published.safetensors") if "optim" in key]
    assert torch.equal(load(tmp_path / "published").net(features), net(features))


def test_the_one_step_file_stands_for_one_call_at_minus_one(tmp_path):
    net = AggregationNetwork((40, 40, 40), 1, dim=64, width=32)
    config = CONFIG | {"save_timestep": [0], "num_timesteps": 1}
    torch.save({"step": 1, "config": config, "aggregation_network": net.state_dict()}, tmp_path / "one.pt")
    spec = load_official(tmp_path / "one.pt").spec
    assert (spec.steps, spec.saved, spec.timesteps) == (1, (0,), (-1.0,))
    generated = config | CONFIG | {"diffusion_mode": "generation", "guidance_scale": 7.5, "negative_prompt": "blurry"}
    net = AggregationNetwork((40, 40, 40), 11, dim=64, width=32)
    torch.save({"step": 1, "config": generated, "aggregation_network": net.state_dict()}, tmp_path / "gen.pt")
    spec = load_official(tmp_path / "gen.pt", sites=("a", "b", "c")).spec
    assert spec.saved == (49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0)
    assert spec.timesteps == (0.0, *(float(t) for t in range(80, 981, 100)))
    assert (spec.sites, spec.guidance_scale, spec.negative_prompt) == (("a", "b", "c"), 7.5, "blurry")


class NotATensor:
    pass


def test_official_files_that_hold_anything_else_are_refused(tmp_path):
    state = AggregationNetwork((40, 40), 2, dim=64, width=32).state_dict()
    with pytest.raises(InputError, match="no checkpoint at"):
        load_official(tmp_path / "none.pt")
    torch.save({"aggregation_network": NotATensor()}, tmp_path / "code.pt")
    with pytest.raises(InputError, match="no checkpoint of tensors and plain values"):
        load_official(tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match="no checkpoint of tensors and plain values"):
        load_official(tmp_path / "text.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"no 'aggregation_network'; it holds \['model'\]"):
        load_official(tmp_path / "other.pt")
    torch.save({"aggregation_network": state, "config": CONFIG}, tmp_path / "steps.pt")
    with pytest.raises(InputError, match="saves 11 timesteps, the weights mix 2"):
        load_official(tmp_path / "steps.pt")
    short = {key: tensor for key, tensor in state.items() if key != "bottleneck_layers.1.0.conv2.weight"}
    torch.save({"aggregation_network": short, "config": CONFIG | {"save_timestep": [1, 0]}}, tmp_path / "short.pt")
    with pytest.raises(InputError, match=r"Missing key.*bottleneck_layers\.1\.0\.conv2\.weight"):
        load_official(tmp_path / "short.pt")
